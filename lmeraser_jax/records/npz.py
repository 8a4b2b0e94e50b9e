"""A user's own images in one .npz file.

Keys: train_images, train_labels, test_images, test_labels (uint8 [N, H, W, 1 or 3] or [N, H, W], int
[N]), class_names; optional train_ids, test_ids, train_owners, public_images, public_labels. Ids default
to "train/<index>", so give ids of your own if the file will ever lose or gain images.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from lmeraser_jax.errors import UserError, raise_all, some
from lmeraser_jax.records.source import Item, Source

REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
SPLITS = ("train", "test", "public")
MOST_UNNAMED = 100_000  # classes that need no names


def load(path: str) -> Source:
    """Reads the file; nothing in it is unpickled.

    Raises:
        UserError: the file is missing or no .npz, or its arrays have wrong keys, shapes or dtypes.
    """
    arrays = _read(path)
    missing = [key for key in REQUIRED if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {some(arrays) or 'nothing'} (--config.data.path)")
    splits = [split for split in SPLITS if f"{split}_images" in arrays]
    names = arrays.get("class_names")
    found = [line for split in splits for line in _wrong(arrays, split)]
    if names is not None and names.ndim != 1:
        found.append(f"class_names must be a list, has shape {list(names.shape)}")
    raise_all(found, f"{path} cannot be used:")
    images = [_with_channels(arrays[f"{split}_images"]) for split in splits]
    shapes = {array.shape[1:] for array in images}
    if len(shapes) > 1:
        raise UserError(f"{path}: all images must have one shape; found {some(sorted(shapes))}")
    items = [item for split in splits for item in _items(arrays, split)]
    if names is None:
        top = max((item.label for item in items), default=0)
        if top >= MOST_UNNAMED:
            raise UserError(f"{path}: a label of {top} without class_names; name the classes or number them from 0")
        names = np.array([str(i) for i in range(top + 1)])
    stacked = np.concatenate(images)
    shape = tuple(int(side) for side in stacked.shape[1:])
    class_names = tuple(_text(name) for name in names)
    return Source(path, class_names, (shape[0], shape[1], shape[2]), items, lambda start, stop: stacked[start:stop])


def _read(path: str) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise UserError(f"--config.data.path={path}: no such file")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in file.files}
    except (ValueError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--config.data.path={path} is not a readable .npz without pickles: {error}") from error


def _wrong(arrays: dict[str, np.ndarray], split: str) -> list[str]:
    """What is wrong with the arrays of one split."""
    images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
    found, count = [], len(images) if images.ndim else 0
    if images.dtype != np.uint8:
        found.append(f"{split}_images must be uint8, are {images.dtype}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        found.append(f"{split}_images must be [N, H, W] or [N, H, W, 1 or 3], are {list(images.shape)}")
    if labels is None:
        return [*found, f"{split}_labels is missing"]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        found.append(f"{split}_labels must be {count} integers, are {labels.dtype} {list(labels.shape)}")
    for key in (f"{split}_ids", f"{split}_owners"):
        if key in arrays and arrays[key].shape != (count,):
            found.append(f"{key} must have {count} entries, has shape {list(arrays[key].shape)}")
    return found


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images[..., None] if images.ndim == 3 else images


def _items(arrays: dict[str, np.ndarray], split: str) -> list[Item]:
    labels = arrays[f"{split}_labels"]
    ids = arrays.get(f"{split}_ids", np.array([f"{split}/{i}" for i in range(len(labels))]))
    owners = arrays.get(f"{split}_owners", np.full(len(labels), ""))
    return [Item(_text(i), split, int(y), _text(o)) for i, y, o in zip(ids, labels, owners, strict=True)]


def _text(value: object) -> str:
    """A name from an array of strings, bytes or numbers."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
