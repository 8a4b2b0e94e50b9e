"""Features for clustering and routing: the un-prompted, un-augmented centre crop, or the query, through the backbone.

Every call has the same shape (short batches are padded), so a record's feature has the same bits whatever stands beside
it. Features are cached in a row file beside the images.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.text_rows import TextSpec, tokens_of
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Architecture, Backbone
from lmeraser_jax.training import tasks
from lmeraser_jax.training.each_device import on_each
from lmeraser_jax.training.tasks import TextRows, TuningSpec

PIECE = 16_384  # images in memory at a time


def compute_dtype(name: str, mesh: Mesh) -> np.dtype:
    """`tuning.dtype` as a dtype; auto is float32 on CPU and bfloat16 elsewhere."""
    platform = mesh.devices.flat[0].platform
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16") if name == "auto" else jnp.dtype(name)


def on_device(backbone: Backbone, dtype: np.dtype, mesh: Mesh) -> Any:
    """The backbone's parameters in the compute dtype, once on every device of the mesh."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), backbone.params)
    return jax.device_put(cast, NamedSharding(mesh, P()))


@functools.lru_cache(maxsize=16)
def feature_function(architecture: Architecture, spec: ImageSpec | TextSpec, mesh: Mesh):
    """Compiled `(params, rows [devices * batch, ...]) -> float32 [devices * batch, D]`."""
    split = P(mesh.axis_names[0])
    return on_each(functools.partial(tasks.bare_features, architecture, spec), mesh, (P(), split), split)


@functools.lru_cache(maxsize=16)
def state_function(architecture: Architecture, last: int, mesh: Mesh):
    """Compiled `(params, int32 [devices * batch, 2 + T]) -> [devices * batch, T, D]`, states before block `last`."""

    def states(params: Any, rows: jax.Array) -> jax.Array:
        return backbone_lib.token_states(architecture, params, tokens_of(rows)[0], last)

    split = P(mesh.axis_names[0])
    return on_each(states, mesh, (P(), split), split)


def network_inputs(tuning_spec: TuningSpec, params: Any, rows: np.ndarray, used: np.ndarray, mesh: Mesh) -> Any:
    """What the network reads of stored rows; of text the states after the frozen blocks, too, zeros for rows not used.

    `used` int64 [n] are places in `rows`. A program of one shape computes the states, so that their bits do not depend
    on what else is in memory.
    """
    if not tuning_spec.is_text:
        return rows
    if not tuning_spec.prefix:
        return TextRows(rows)
    program = state_function(tuning_spec.architecture, tuning_spec.prefix, mesh)
    size, states = tuning_spec.state_batch * mesh.size, None
    for start in range(0, len(used), size):
        places = used[start : start + size]
        batch = np.zeros((size, rows.shape[1]), np.int32)
        batch[: len(places)] = rows[places]
        piece = np.asarray(program(params, batch))[: len(places)]
        states = np.zeros((len(rows), *piece.shape[1:]), piece.dtype) if states is None else states
        states[places] = piece
    return TextRows(rows, states)


class Extractor:
    """Features of stored rows in the compute dtype, at one fixed shape: `batch` rows per device and call."""

    def __init__(self, backbone: Backbone, spec: ImageSpec | TextSpec, batch: int, mesh: Mesh, dtype: np.dtype):
        self.function = feature_function(backbone.config, spec, mesh)
        self.params, self.width = on_device(backbone, dtype, mesh), backbone.config.feature_size
        self.size = batch * mesh.size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, h, w, c] or int32 [N, 2 + T] -> float32 [N, D]."""
        program = functools.partial(self.function, self.params)
        return backbone_lib.features_of_all(program, images, self.size, self.width, "features")


def cached(
    file: RowFile, rows: np.ndarray, count: int, compute: Callable[[np.ndarray], np.ndarray], piece: int, write: bool
) -> np.ndarray:
    """Features float32 [n, D] of the given rows, computed where the cache does not hold them yet (NaN).

    Args:
        file: the cache, a row for each of the `count` rows of the image file.
        rows: int64 [n].
        compute: rows int64 [k] -> float32 [k, D]; called for at most `piece` rows that are missing.
        write: grow and fill the cache. Only the holder of the writer lock may: a reader could put back the
            feature of a record that is being erased.
    """
    if write:
        file.truncate(min(len(file), count))
        if len(file) < count:
            file.append(np.full((count - len(file), *file.shape), np.nan, np.float32))
    features = np.full((len(rows), *file.shape), np.nan, np.float32)
    cached_rows = np.flatnonzero(rows < len(file))
    if len(cached_rows):
        features[cached_rows] = file.view()[rows[cached_rows]]
    missing = np.flatnonzero(np.isnan(features).any(axis=1))
    for start in range(0, len(missing), piece):
        piece_rows = missing[start : start + piece]
        features[piece_rows] = compute(rows[piece_rows])
        if write:
            view = file.view("r+")
            view[rows[piece_rows]] = features[piece_rows]
            view.flush()
            if file.view()[rows[piece_rows]].tobytes() != features[piece_rows].tobytes():
                raise UserError(f"{file.path} holds other features than were written; delete the file and try again")
    return features
