"""One program for every device of a mesh, each with its own shards: the bits of one device on any number of them.

XLA compiles a partitioned program, as `jax.shard_map` makes it, with other fusions (`docs/design.md`).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding


def on_each(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any, donated: tuple[int, ...] = ()):
    """The compiled function of a device's own shards, which takes and returns arrays over a 1-D mesh.

    `inputs` and `outputs` have a `PartitionSpec` for each argument and result, which holds for all its leaves; those of
    `outputs` name the mesh's axis. Results may take the buffers of the arguments `donated`.
    """
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (inputs, outputs))
    if mesh.size == 1:
        # The shardings are explicit: XLA would return the state under another name for the same layout, and the
        # second call would compile again.
        return jax.jit(function, in_shardings=shardings[0], out_shardings=shardings[1], donate_argnums=donated)
    program, executables = jax.jit(function, donate_argnums=donated), {}

    def run(*arguments: Any) -> Any:
        placed = jax.device_put(arguments, shardings[0])
        own = [jax.tree.map(lambda leaf, i=i: leaf.addressable_shards[i].data, placed) for i in range(mesh.size)]
        kind = tuple(map(jax.typeof, jax.tree.leaves(placed)))
        if kind not in executables:  # traced once; of GPUs, JAX's cache on disk does not ask which one it is
            executables[kind] = [program.lower(*shards).compile() for shards in own]
        # In threads, because on some devices a call ends only when the loop on the device does.
        with ThreadPoolExecutor(mesh.size) as pool:
            results = list(pool.map(_call, executables[kind], own))
        return jax.tree.map(_joined, shardings[1], *results)

    return run


def _call(executable: Any, arguments: Any) -> Any:
    with jax.debug_nans(False), jax.debug_infs(False):  # all that a call reads; settings belong to a thread
        return executable(*arguments)


def _joined(sharding: NamedSharding, *parts: Any) -> Any:
    """One tree of arrays over the mesh from the trees of its devices."""
    axis = sharding.spec.index(sharding.mesh.axis_names[0])

    def joined(*leaves: jax.Array) -> jax.Array:
        shape = list(leaves[0].shape)
        shape[axis] *= len(leaves)
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, list(leaves))

    return jax.tree.map(joined, *parts)
