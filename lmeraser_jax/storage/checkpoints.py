"""Checkpoints. The only file that imports Orbax.

A tree of arrays is saved flat, as {"blocks/0/fc1/kernel": array}, by an Orbax `CheckpointManager` in a
hidden folder; the folder is synced and renamed into place, so it is there completely or not at all.
"""

import errno
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import atomic_files


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not what Orbax does, nor the tracebacks of its threads: their errors are raised here as well."""
    return "orbax" not in record.pathname or record.levelno >= logging.WARNING and not record.exc_info


logging.getLogger("absl").addFilter(_worth_saying)

Arrays = Mapping[str, np.ndarray]
RATIO = 40_000  # bytes of arrays that one byte of the files can stand for: Zstandard gives at most 32,768
SHOWN = 2000  # characters of an error in a message


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """{"path/to/leaf": array} of a nested tree; paths are unique and sorted by JAX's key order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_name(key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Arrays, like: Any) -> Any:
    """The inverse of `flatten` for a tree of the same structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [arrays["/".join(map(_name, path))] for path, _ in paths])


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def save(
    folder: Path,
    arrays: Arrays,
    metadata: dict[str, Any],
    step: int = 0,
    earlier: Mapping[int, Arrays] = MappingProxyType({}),
) -> None:
    """Writes a checkpoint, and earlier ones of the same training, completely or not at all.

    Args:
        folder: their own folder; replaced if it exists.
        arrays: flat tree.
        metadata: JSON kept beside it.
        step: its number in the folder.
        earlier: {smaller step: flat tree}.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _manager(temporary, create=True) as manager:
            for number, tree in sorted([*earlier.items(), (step, arrays)], key=lambda pair: pair[0]):
                _write(manager, number, tree, metadata)
        atomic_files.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise


def save_step(folder: Path, arrays: Arrays, metadata: dict[str, Any], step: int) -> None:
    """Adds a step to a folder of checkpoints of one training; the last two are kept."""
    with _manager(folder, create=True, keep=2) as manager:
        _write(manager, step, arrays, metadata)


def _write(manager: ocp.CheckpointManager, step: int, arrays: Arrays, metadata: dict[str, Any]) -> None:
    empty = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items() if not leaf.size}
    filled = {name: leaf for name, leaf in arrays.items() if leaf.size}  # Orbax refuses arrays without elements
    notes = {"metadata": metadata, "empty": empty}
    items = ocp.args.Composite(arrays=ocp.args.StandardSave(filled), metadata=ocp.args.JsonSave(notes))
    try:
        manager.save(step, args=items, force=True)
        manager.wait_until_finished()
    except ValueError as error:  # how TensorStore reports a full disk
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(manager.directory)) from error
        raise


def load(folder: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Reads a step, the newest by default: arrays on the host, metadata, step. Nothing is unpickled.

    Raises:
        UserError: nothing readable is there, or its description calls for more than the files can hold.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    try:
        with _manager(folder, create=False) as manager:
            step = manager.latest_step() if step is None else step
            if step is None:
                raise UserError(f"{folder} holds no checkpoint")
            shapes = manager.item_metadata(step)["arrays"]
            sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in dict(shapes).values()]
            if sum(sizes) > RATIO * atomic_files.disk_use(folder):  # never allocate for a promise
                raise ValueError(f"it calls for {sum(sizes)} bytes, more than its files can hold")
            target = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in dict(shapes).items()}
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(target), metadata=ocp.args.JsonRestore())
            restored = manager.restore(step, args=items)
        notes = restored["metadata"]
        found = {name: np.asarray(leaf) for name, leaf in restored["arrays"].items()}
        found |= {name: _empty(dtype, shape) for name, (dtype, shape) in notes["empty"].items()}
        if not isinstance(notes["metadata"], dict):
            raise ValueError("its metadata is no JSON object")
        return found, notes["metadata"], step
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise nearly every kind over damaged files
        why = str(error)[:SHOWN] or type(error).__name__
        raise UserError(f"the checkpoint {folder} cannot be read: {why}") from error


def _empty(dtype: str, shape: list[int]) -> np.ndarray:
    """An array without elements, as `save` noted it."""
    if 0 not in shape:
        raise ValueError(f"an array of shape {shape} is noted as empty")
    return np.zeros(shape, dtype)


def _manager(folder: Path, create: bool, keep: int | None = None) -> ocp.CheckpointManager:
    folder = folder.absolute()  # Orbax refuses relative paths; a link stays one (`scratch.held`)
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=create, max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
