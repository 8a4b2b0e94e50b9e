"""A frozen backbone: architecture, parameters, normalisation and digest; one pure `features`.

The NNX module is split once into a static graph and a tree of arrays. Everything downstream sees only
the pure function, so no optimizer and no gradient ever meets the backbone's parameters.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.hashing import arrays_digest, digest
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.storage import checkpoints

Params = Any  # nested dict of arrays
Architecture = ViTConfig | SwinConfig
FAMILIES: dict[str, type[Architecture]] = {"vit": ViTConfig, "swin": SwinConfig}


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """What the private side knows of the public one.

    Attributes:
        config: architecture, without the public classifier.
        params: nested dict of float32 arrays on the host.
        mean, std: normalisation of pixels in [0, 1]; one number, or one for each channel.
        digest: SHA-256 over architecture, normalisation and parameters.
    """

    config: Architecture
    params: Params
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


@functools.lru_cache(maxsize=16)
def graph(config: Architecture) -> tuple[Any, Params]:
    """Static graph and abstract parameters (shapes only) of an architecture."""
    model = nnx.eval_shape(lambda: config.build(nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def features(config: Architecture, params: Params, images: jax.Array) -> jax.Array:
    """Feature of each image, pure in `params` and `images`.

    Args:
        config: architecture (static).
        params: its parameters; their dtype is the compute dtype.
        images: [B, H, W, C] float, normalised.

    Returns:
        [B, D] float32.
    """
    model = nnx.merge(graph(config)[0], params)
    return model.features(images.astype(jax.tree.leaves(params)[0].dtype)).astype(jnp.float32)


def logits(config: Architecture, params: Params, images: jax.Array) -> jax.Array:
    """Logits of the public classifier: [B, H, W, C] -> [B, classes] float32."""
    return nnx.merge(graph(config)[0], params)(images).astype(jnp.float32)


def make(config: Architecture, params: Params, mean: tuple[float, ...], std: tuple[float, ...]) -> Backbone:
    """Freezes parameters into a backbone; a public classifier among them is dropped."""
    config = dataclasses.replace(config, classes=0)
    params = {name: leaf for name, leaf in params.items() if name != "head"}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    identity = [described(config), mean, std, arrays_digest(checkpoints.flatten(params))]
    return Backbone(config, params, mean, std, digest(identity))


def misfits(config: Architecture, arrays: dict[str, np.ndarray]) -> list[str]:
    """Every array that is missing, left over or of another shape than the architecture asks for."""
    wanted = {name: leaf.shape for name, leaf in _flat_shapes(config).items()}
    lines = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in arrays]
    lines += [f"not used: {name} {list(arrays[name].shape)}" for name in arrays if name not in wanted]
    return lines + [
        f"{name}: the file has {list(arrays[name].shape)}, the model needs {list(shape)}"
        for name, shape in wanted.items()
        if name in arrays and arrays[name].shape != shape
    ]


def _flat_shapes(config: Architecture) -> dict[str, Any]:
    shapes = graph(config)[1]
    return checkpoints.flatten(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes))


def from_flat(config: Architecture, arrays: dict[str, np.ndarray], name: str) -> Params:
    """Nested parameters from flat ones. Raises `UserError` with all mismatches at once."""
    raise_all(misfits(config, arrays), f"the weights {name} do not fit the backbone:")
    return checkpoints.unflatten(arrays, graph(config)[1])


def described(config: Architecture) -> dict[str, Any]:
    """An architecture as plain values."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(config, kind))
    return {"family": family, **dataclasses.asdict(config)}


def architecture(values: dict[str, Any]) -> Architecture:
    """The inverse of `described`, also from JSON. Raises KeyError or TypeError if it is none."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return FAMILIES[values.pop("family")](**values)


def save(folder: Path, backbone: Backbone, inputs: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Writes a backbone into a folder of its own, with the settings and the files it was made from."""
    metadata = {
        "config": described(backbone.config),
        "mean": backbone.mean,
        "std": backbone.std,
        "digest": backbone.digest,
        "inputs": inputs,
        "provenance": provenance,
    }
    checkpoints.save(folder, checkpoints.flatten(backbone.params), metadata)


def load(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """Reads a saved backbone and the settings it was made with. A damaged one is refused."""
    arrays, metadata, _ = checkpoints.load(folder)
    backbone = restored(folder, arrays, metadata)
    return backbone, metadata["inputs"]


def restored(folder: Path, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Backbone:
    """The backbone of a folder's arrays and metadata. Raises `UserError` where its digest is not the recorded one."""
    try:
        config = architecture(metadata["config"])
        _refuse_other_kinds(config, arrays, metadata)
        normalisation = tuple(metadata["mean"]), tuple(metadata["std"])
        backbone = make(config, from_flat(config, arrays, str(folder)), *normalisation)
        digest_then = str(metadata["digest"])
    except UserError:
        raise
    except Exception as error:  # an architecture of any values raises whatever its modules do
        raise UserError(f"{folder} is damaged: {type(error).__name__}: {str(error)[:500]}") from error
    if backbone.digest == digest_then:
        return backbone
    raise UserError(
        f"{folder} is damaged: digest {backbone.digest[:12]}, written as {digest_then[:12]};"
        " restore the folder, or delete it and make it again"
    )


def _refuse_other_kinds(config: Architecture, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for what no backbone has, before a model of these sizes is outlined."""
    if not isinstance(metadata["inputs"], dict) or not isinstance(metadata.get("provenance", {}), dict):
        raise TypeError("inputs and provenance must be JSON objects")
    values = dataclasses.asdict(config)
    numbers = [one for value in values.values() for one in (value if isinstance(value, tuple) else (value,))]
    blocks = sum(config.depths) if isinstance(config, SwinConfig) else config.depth
    if not all(isinstance(one, int | float | str) for one in numbers) or not 0 <= blocks <= len(arrays):
        raise ValueError(f"{len(arrays)} arrays are not those of the architecture {str(values)[:300]}")
    for name in ("mean", "std"):
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in metadata[name]):
            raise ValueError(f"{name} must be finite numbers")
    other = [name for name, leaf in arrays.items() if leaf.dtype != np.float32]
    if other:
        raise ValueError(f"arrays must be float32; these are not: {join_limited(other)}")
