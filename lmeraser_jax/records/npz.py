"""A user's own images in one .npz file.

Keys: train_images, train_labels, test_images, test_labels (uint8 [N, H, W, 1 or 3] or [N, H, W], int
[N]), class_names; optional train_ids, test_ids, train_owners, public_images, public_labels. Ids default
to "train/<index>", so give ids of your own if the file will ever lose or gain images.
"""

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError, raise_all, some
from lmeraser_jax.records.source import Item, Pixels, Source
from lmeraser_jax.records.stream import DAMAGE, Rows

TRAIN, TEST = ("train_images", "train_labels"), ("test_images", "test_labels")
SPLITS = ("train", "test", "public")
MOST_UNNAMED = 100_000  # classes that need no names


def load(path: str, own_test: bool = True) -> Source:
    """Reads the file but for its images, of which only shape and type are looked at; nothing is unpickled.

    Args:
        path: the file.
        own_test: test images are required.

    Raises:
        UserError: the file is missing or no .npz, or its arrays have wrong keys, shapes or dtypes.
    """
    images, arrays = _read(path)
    there = {**images, **arrays}
    missing = [key for key in (*TRAIN, *(TEST if own_test else ())) if key not in there]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {some(there) or 'nothing'} (--config.data.path)")
    splits = [split for split in SPLITS if f"{split}_images" in images]
    names = arrays.get("class_names")
    found = [line for split in splits for line in _wrong(images[f"{split}_images"], arrays, split)]
    if names is not None and names.ndim != 1:
        found.append(f"class_names must be a list, has shape {list(names.shape)}")
    raise_all(found, f"{path} cannot be used:")
    streams = [images[f"{split}_images"] for split in splits]
    shapes = {_with_channels(stream.shape[1:]) for stream in streams}
    if len(shapes) > 1:
        raise UserError(f"{path}: all images must have one shape; found {some(sorted(shapes))}")
    items = [item for split in splits for item in _items(arrays, split)]
    if names is None:
        top = max((item.label for item in items), default=0)
        if top >= MOST_UNNAMED:
            raise UserError(f"{path}: a label of {top} without class_names; name the classes or number them from 0")
        names = np.array([str(i) for i in range(top + 1)])
    (shape,) = shapes
    class_names = tuple(_text(name) for name in names)

    def read(start: int, stop: int) -> Pixels:
        return Pixels(_joined(streams, start, stop).reshape(-1, *shape))

    return Source(path, class_names, shape, items, read)


def _read(path: str) -> tuple[dict[str, Rows], dict[str, np.ndarray]]:
    """The arrays of images as streams, and the other arrays that have a meaning here."""
    if not Path(path).is_file():
        raise UserError(f"--config.data.path={path}: no such file")
    images, arrays = {}, {}
    known = {f"{split}_{what}" for split in SPLITS for what in ("labels", "ids", "owners")} | {"class_names"}
    try:
        with zipfile.ZipFile(path) as file:
            for member in file.namelist():
                key = member.removesuffix(".npy")
                if key in {f"{split}_images" for split in SPLITS}:
                    images[key] = Rows(path, member, file)
                elif key in known:
                    arrays[key] = np.lib.format.read_array(io.BytesIO(file.read(member)), allow_pickle=False)
    except DAMAGE as error:
        raise UserError(f"--config.data.path={path} is not a readable .npz without pickles: {error}") from error
    return images, arrays


def _joined(streams: list[Rows], start: int, stop: int) -> np.ndarray:
    """Rows start..stop of all streams, one behind the other: uint8 [n, ...]."""
    parts, offset = [], 0
    for stream in streams:
        first, last = max(start - offset, 0), min(stop - offset, stream.shape[0])
        if first < last:
            parts.append(stream.read(first, last).reshape(last - first, -1))
        offset += stream.shape[0]
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.uint8)


def _wrong(images: Rows, arrays: dict[str, np.ndarray], split: str) -> list[str]:
    """What is wrong with the arrays of one split."""
    labels, shape = arrays.get(f"{split}_labels"), images.shape
    found, count = [], shape[0] if shape else 0
    if images.dtype != np.uint8:
        found.append(f"{split}_images must be uint8, are {images.dtype}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        found.append(f"{split}_images must be [N, H, W] or [N, H, W, 1 or 3], are {list(shape)}")
    if images.fortran:
        found.append(f"{split}_images is stored in Fortran order; save np.ascontiguousarray({split}_images)")
    if labels is None:
        return [*found, f"{split}_labels is missing"]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        found.append(f"{split}_labels must be {count} integers, are {labels.dtype} {list(labels.shape)}")
    for key in (f"{split}_ids", f"{split}_owners"):
        if key in arrays and arrays[key].shape != (count,):
            found.append(f"{key} must have {count} entries, has shape {list(arrays[key].shape)}")
    return found


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
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
