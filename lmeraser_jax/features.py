"""Features for clustering and routing: the un-prompted, un-augmented centre crop through the backbone.

Every call has the same shape (short batches are padded), so a record's feature has the same bits
whatever stands beside it. Features are cached in a row file beside the images.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.backbones.backbone import Backbone
from lmeraser_jax.backbones.vit import ViTConfig
from lmeraser_jax.images import ImageSpec, centred
from lmeraser_jax.progress import progress
from lmeraser_jax.records.cache import RowFile


def compute_dtype(name: str, mesh: Mesh) -> np.dtype:
    """`tuning.dtype` as a dtype; auto is float32 on CPU and bfloat16 elsewhere."""
    platform = mesh.devices.flat[0].platform
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16") if name == "auto" else jnp.dtype(name)


def on_device(backbone: Backbone, dtype: np.dtype, mesh: Mesh) -> Any:
    """The backbone's parameters in the compute dtype, once on every device of the mesh."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), backbone.params)
    return jax.device_put(cast, NamedSharding(mesh, P()))


@functools.lru_cache(maxsize=16)
def feature_function(vit: ViTConfig, spec: ImageSpec, mesh: Mesh):
    """Compiled `(params, uint8 [devices * batch, h, w, c]) -> float32 [devices * batch, D]`."""
    axis = mesh.axis_names[0]

    def one_device(params, images):
        return frozen.features(vit, params, centred(images, spec))

    return jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(axis), check_vma=False))


def extract(
    backbone: Backbone, spec: ImageSpec, images: np.ndarray, batch: int, mesh: Mesh, dtype: np.dtype
) -> np.ndarray:
    """Features of images at one fixed batch shape.

    Args:
        backbone: the frozen network.
        spec: how images become input.
        images: uint8 [N, h, w, c].
        batch: images per device and call.
        mesh: 1-D mesh.
        dtype: compute dtype.

    Returns:
        float32 [N, D].
    """
    function, params = feature_function(backbone.config, spec, mesh), on_device(backbone, dtype, mesh)
    size = batch * mesh.size
    found = np.zeros((len(images), backbone.config.width), np.float32)
    with progress("features", len(images)) as shown:
        for start in range(0, len(images), size):
            piece = images[start : start + size]
            padded = np.zeros((size, *images.shape[1:]), np.uint8)
            padded[: len(piece)] = piece
            found[start : start + size] = np.asarray(function(params, padded))[: len(piece)]
            shown.advance(len(piece))
    return found


def cached(
    file: RowFile,
    rows: np.ndarray,
    backbone: Backbone,
    spec: ImageSpec,
    images: np.ndarray,
    batch: int,
    mesh: Mesh,
    dtype: np.dtype,
) -> np.ndarray:
    """Features of the given rows, computed where the cache does not hold them yet (NaN).

    Args:
        file: the cache, as many rows as `images`; made and grown here.
        rows: int64 [n], rows wanted.
        backbone, spec, batch, mesh, dtype: as for `extract`.
        images: uint8 [N, h, w, c], all rows of the image file.

    Returns:
        float32 [n, D], in the order of `rows`.
    """
    file.truncate(min(len(file), len(images)))
    if len(file) < len(images):
        file.append(np.full((len(images) - len(file), *file.shape), np.nan, np.float32))
    view = file.view("r+")
    missing = rows[np.isnan(view[rows]).any(axis=1)]
    pieces = max(batch * mesh.size, 4096)
    for start in range(0, len(missing), pieces):
        chosen = missing[start : start + pieces]
        view[chosen] = extract(backbone, spec, images[chosen], batch, mesh, dtype)
        view.flush()
    return np.array(view[rows])
