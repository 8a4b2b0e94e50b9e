"""Checkpoints: Orbax writes a flat tree, {"blocks/0/fc1/kernel": array}, as Zarr arrays in an OCDBT database.

Only this file imports Orbax, and only to write. TensorStore reads many times faster, without JAX.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.storage import atomic_files
from lmeraser_jax.storage.atomic_files import disk_use

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Arrays = Mapping[str, np.ndarray]
RATIO = 40_000  # bytes of arrays that one byte of the files can stand for: Zstandard gives at most 32,768
DESCRIPTION = "/.zarray"  # what the key of an array's description ends with
PLAIN = re.compile(r"[^][*?\\\udc80-\udcff]*")  # paths that both libraries take as they are
PLACES = re.compile(r'(Error (?:[^:"]|"[^"]*")*: )+')  # where TensorStore was when it met the cause that follows
NOTES = re.compile(r" \[[a-z_ ]+='|\n")  # begins what follows it: notes for developers
OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # the note that names an error of the system


def _is_warning(record: logging.LogRecord) -> bool:
    """Keeps out Orbax's running account and the tracebacks of its threads, whose errors are raised here as well."""
    return "orbax" not in record.pathname or record.levelno >= logging.WARNING and not record.exc_info


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """{"path/to/leaf": array} of a nested tree; paths are unique and sorted by JAX's key order."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(map(_name, path)): np.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Arrays, like: Any) -> Any:
    """The inverse of `flatten` for a tree of the same structure."""
    import jax

    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [arrays["/".join(map(_name, path))] for path, _ in paths])


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def import_writer() -> None:
    """Imports Orbax ahead of the first `save`, at a time when a process would only wait for its devices."""
    importlib.import_module("orbax.checkpoint")


def save(
    folder: Path,
    arrays: Arrays,
    metadata: dict[str, Any],
    step: int = 0,
    earlier: Mapping[int, Arrays] = MappingProxyType({}),
) -> None:
    """Writes a checkpoint, and those of `earlier` steps of its training, completely or not at all.

    Replaces the folder: everything is written to a hidden one, which is read back, synced and renamed.

    Raises:
        Damaged: what is read is not what was written.
        OSError: it cannot be written or read now.
        UserError: it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, trees = folder.with_name(f".{folder.name}.tmp"), {**earlier, step: arrays}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _manager(temporary) as manager:
            for number in sorted(trees):
                _write(manager, number, trees[number], metadata)
        for number, tree in trees.items():
            _read_back(temporary, number, tree)
        atomic_files.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its space back
        raise


def save_step(folder: Path, arrays: Arrays, metadata: dict[str, Any], step: int) -> None:
    """Adds a step to a folder of checkpoints of one training; the last two are kept."""
    with _manager(folder, keep=2) as manager:
        _write(manager, step, arrays, metadata)
    _read_back(folder, step, arrays)
    atomic_files.note_digests(folder)


def _read_back(folder: Path, step: int, arrays: Arrays) -> None:
    """Raises `Damaged` where a step that was just written does not read as it was written."""
    if arrays_digest(load(folder, step)[0]) != arrays_digest(arrays):
        raise Damaged(f"{folder} was not written: step {step} holds other arrays when it is read back")


def _write(manager: "ocp.CheckpointManager", step: int, arrays: Arrays, metadata: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    empty = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items() if not leaf.size}
    filled = {name: leaf for name, leaf in arrays.items() if leaf.size}  # Orbax refuses arrays without elements
    notes = {"metadata": metadata, "empty": empty}
    items = ocp.args.Composite(arrays=ocp.args.StandardSave(filled), metadata=ocp.args.JsonSave(notes))
    try:
        manager.save(step, args=items, force=True)
        manager.wait_until_finished()
    except ValueError as error:  # how TensorStore reports whatever fails
        if code := OS_ERROR.search(str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(manager.directory)) from error
        raise UserError(f"a checkpoint cannot be written to {manager.directory}: {_cause(error)}") from error


def load(folder: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Reads a step, the newest by default: arrays on the host, metadata, step. Nothing is unpickled.

    Raises:
        Damaged: it is missing, or its files hold something else than was written.
        OSError: it cannot be read now, which says nothing about what it holds.
    """
    if not atomic_files.is_there(folder):
        raise Damaged(f"{folder} does not exist")
    steps = [int(path.name) for path in atomic_files.entries(folder) if path.name.isdecimal()]
    if not steps:
        raise Damaged(f"{folder} holds no checkpoint")
    step = max(steps) if step is None else step
    if step not in steps:
        raise Damaged(f"{folder} cannot be read: it holds no step {step}")
    try:
        notes = json.loads((folder / str(step) / "metadata" / "metadata").read_text(encoding="utf-8"))
        if not isinstance(notes["metadata"], dict):
            raise ValueError("its metadata is no JSON object")
        with _plain(folder) as path:
            arrays = _read_arrays(path / str(step) / "arrays", disk_use(folder))
        for name, (dtype, shape) in notes["empty"].items():
            if 0 not in shape:
                raise ValueError(f"an array of shape {shape} is noted as empty")
            arrays[name] = np.zeros(shape, dtype)
        return arrays, notes["metadata"], step
    except MemoryError:
        raise
    except Exception as error:  # TensorStore raises nearly every kind over damaged files, and where it cannot read
        raise atomic_files.why_unreadable(folder, _cause(error)) from error


def _cause(error: Exception) -> str:
    """An error in one line, of TensorStore's chain of places and reasons only the last reason."""
    text = NOTES.split(str(error), maxsplit=1)[0]
    status, _, chain = text.partition(": ")
    if status.isupper() and status.replace("_", "").isalpha():
        reason = PLACES.sub("", chain)
        text = f"{status.lower().replace('_', ' ')}: {chain}" if reason == chain else reason
    return text or type(error).__name__


def _read_arrays(folder: Path, file_bytes: int) -> dict[str, np.ndarray]:
    import tensorstore

    if not (folder / "manifest.ocdbt").is_file():  # TensorStore takes that for an empty database
        raise ValueError("its arrays are missing")
    database = {"driver": "ocdbt", "base": folder.as_uri() + "/"}
    keys = [key.decode() for key in tensorstore.KvStore.open(database).result().list().result()]
    names = [key.removesuffix(DESCRIPTION) for key in keys if key.endswith(DESCRIPTION)]
    specs = [{"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}} for name in names]
    stores = [future.result() for future in [tensorstore.open(spec) for spec in specs]]
    size = sum(math.prod(store.shape) * store.dtype.numpy_dtype.itemsize for store in stores)
    if size > RATIO * file_bytes:  # never allocate for a promise
        raise ValueError(f"it calls for {size} bytes, more than its files can hold")
    reads = [store.read() for store in stores]
    return {name: np.asarray(read.result()) for name, read in zip(names, reads, strict=True)}


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """An absolute path of a folder in which Orbax sees no pattern and TensorStore no separator: if need be, a link."""
    if PLAIN.fullmatch(str(folder.absolute())):
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # TMPDIR could be no plainer
        link = Path(place, "link")
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


@contextlib.contextmanager
def _manager(folder: Path, keep: int | None = None) -> Iterator["ocp.CheckpointManager"]:
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_warning)  # not before Orbax has made this logger one of its kind
    # Process 0 of several writes alone: Orbax must neither wait for the others nor make folders together with them.
    active = {0} if jax.process_count() > 1 else None
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=active)
    handlers = {
        "arrays": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        "metadata": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        create=False, max_to_keep=keep, enable_async_checkpointing=False, multiprocessing_options=alone
    )
    with _plain(folder) as path, ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
        yield manager
