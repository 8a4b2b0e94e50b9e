"""A user's own images in one .npz file.

Keys: train_images, train_labels, test_images, test_labels (uint8 [N, H, W, 1 or 3] or [N, H, W], int
[N]), class_names; optional train_ids, test_ids, train_owners, public_images, public_labels. Ids default
to "train/<index>", so give ids of your own if the file will ever lose or gain images.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from lmeraser_jax.config import Data
from lmeraser_jax.data.names import LONGEST, shown
from lmeraser_jax.data.source import Item, Pixels, Source
from lmeraser_jax.data.stream import DAMAGE, Rows
from lmeraser_jax.errors import UserError, join_limited, raise_all

TRAIN, TEST = ("train_images", "train_labels"), ("test_images", "test_labels")
SPLITS = ("train", "test", "public")
NAMES = {"class_names"} | {f"{split}_{what}" for split in SPLITS for what in ("ids", "owners")}
KNOWN = NAMES | {f"{split}_{what}" for split in SPLITS for what in ("images", "labels")}
MOST_CLASSES = 100_000
FEW_IMAGES = 100_000  # a file may hold so many; more only if it has a byte for each


def load(path: str, own_test: bool = True, most: int = Data().max_pixels) -> Source:
    """Reads the file but for its images, of which only shape and type are looked at; nothing is unpickled.

    Shapes and types of all arrays are checked before any of them is read.

    Args:
        path: the file.
        own_test: test images are required.
        most: pixels of an image at most (`data.max_pixels`).

    Raises:
        UserError: the file is missing or no .npz, or its arrays have wrong keys, shapes or dtypes.
    """
    there = _opened(path)
    missing = [key for key in (*TRAIN, *(TEST if own_test else ())) if key not in there]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it has {join_limited(there) or 'nothing'} (--config.data.path)"
        )
    splits = [split for split in SPLITS if f"{split}_images" in there]
    found = [line for split in splits for line in _wrong(there, split, most, os.path.getsize(path))]
    raise_all(found + _wrong_names(there), f"{path} cannot be used:")
    streams = [there[f"{split}_images"] for split in splits]
    shapes = {_with_channels(stream.shape[1:]) for stream in streams}
    if len(shapes) > 1:
        raise UserError(f"{path}: all images must have one shape; found {join_limited(sorted(shapes))}")
    with _damage(path):
        arrays = {key: rows.whole() for key, rows in there.items() if not key.endswith("_images")}
        items = [item for split in splits for item in _items(arrays, split)]
        names = [_text(name) for name in arrays.get("class_names", ())]
    if "class_names" not in arrays:
        top = max((item.label for item in items), default=0)
        if top >= MOST_CLASSES:
            raise UserError(f"{path}: a label of {top} without class_names; name the classes or number them from 0")
        names = [str(i) for i in range(top + 1)]
    (shape,) = shapes

    def read(start: int, stop: int) -> Pixels:
        return Pixels(_joined(streams, start, stop).reshape(-1, *shape))

    return Source(path, tuple(names), shape, items, read)


@contextlib.contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turns what a damaged file raises into a `UserError`."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        why = shown(str(error)) if len(str(error)) > 1000 else error
        raise UserError(f"--config.data.path={path} is not a readable .npz without pickles: {why}") from error


def _opened(path: str) -> dict[str, Rows]:
    """The arrays that have a meaning here, of which only the headers are read."""
    if not Path(path).is_file():
        raise UserError(f"--config.data.path={path}: no such file")
    found: dict[str, Rows] = {}
    with _damage(path), ZipFile(path) as file:
        for member in file.namelist():
            key = member.removesuffix(".npy")
            if key in found:
                raise ValueError(f"it holds {key} twice")
            if key in KNOWN:
                found[key] = Rows(path, member, file)
    return found


def _joined(streams: list[Rows], start: int, stop: int) -> np.ndarray:
    """Rows start..stop of all streams, one behind the other: uint8 [n, ...]."""
    parts, offset = [], 0
    for stream in streams:
        first, last = max(start - offset, 0), min(stop - offset, stream.shape[0])
        if first < last:
            parts.append(stream.read(first, last).reshape(last - first, -1))
        offset += stream.shape[0]
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.uint8)


def _wrong(there: Mapping[str, Rows], split: str, most: int, size: int) -> list[str]:
    """What is wrong with the arrays of one split, in a file of so many bytes."""
    images, labels = there[f"{split}_images"], there.get(f"{split}_labels")
    found, shape = [], images.shape
    count = shape[0] if shape else 0
    if images.dtype != np.uint8:
        found.append(f"{split}_images must be uint8, are {_kind(images)}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        found.append(f"{split}_images must be [N, H, W] or [N, H, W, 1 or 3], are {list(shape)}")
    elif not 1 <= shape[1] * shape[2] <= most:
        found.append(f"{split}_images must have 1 to --config.data.max_pixels={most} pixels, are {list(shape)}")
    if count > max(FEW_IMAGES, size):
        found.append(f"{split}_images are {count}, more than the {size} bytes of the file can tell apart")
    if images.fortran:
        found.append(f"{split}_images is stored in Fortran order; save np.ascontiguousarray({split}_images)")
    if labels is None:
        return [*found, f"{split}_labels is missing"]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        found.append(f"{split}_labels must be {count} integers, are {_kind(labels)} {list(labels.shape)}")
    for key in (f"{split}_ids", f"{split}_owners"):
        if key in there and there[key].shape != (count,):
            found.append(f"{key} must have {count} entries, has shape {list(there[key].shape)}")
    return found


def _wrong_names(there: Mapping[str, Rows]) -> list[str]:
    """What is wrong with the arrays of names, whatever they name."""
    found, classes = [], there.get("class_names")
    if classes is not None and len(classes.shape) == 1 and classes.shape[0] > MOST_CLASSES:
        found.append(f"class_names are {classes.shape[0]}; {MOST_CLASSES} at most are legal")
    if classes is not None and len(classes.shape) != 1:
        found.append(f"class_names must be a list, has shape {list(classes.shape)}")
    for key in sorted(NAMES & there.keys()):
        dtype = there[key].dtype
        if dtype.hasobject:
            found.append(f"{key} holds Python objects, which only a pickle can store; save them as np.array(.., str)")
        elif dtype.kind not in "USiu" or dtype.itemsize > 4 * LONGEST:
            found.append(f"{key} must be whole numbers or text of {LONGEST} bytes at most, is {_kind(there[key])}")
    return found


def _kind(rows: Rows) -> str:
    return shown(str(rows.dtype))


def _with_channels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)


def _items(arrays: dict[str, np.ndarray], split: str) -> Iterator[Item]:
    labels, ids, owners = (arrays.get(f"{split}_{what}") for what in ("labels", "ids", "owners"))
    assert labels is not None
    for i, label in enumerate(labels):
        name = _text(ids[i]) if ids is not None else f"{split}/{i}"
        yield Item(name, split, int(label), sys.intern(_text(owners[i])) if owners is not None else "")


def _text(value: Any) -> str:
    """A name from an array of strings, bytes or numbers."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
