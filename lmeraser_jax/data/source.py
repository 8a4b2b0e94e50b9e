"""What every source of images delivers: items with stable ids, and pixels read in bounded pieces."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lmeraser_jax.config import Data
from lmeraser_jax.data.names import VISIBLE, faults, shown
from lmeraser_jax.errors import join_limited
from lmeraser_jax.hashing import keyed_hash

SPLITS = ("train", "holdout", "test", "public")


class Item(NamedTuple):
    """One image without its pixels. Splits: train (private), holdout (private, never tuned on), test, public."""

    id: str
    split: str
    label: int
    owner: str = ""


class Pixels(NamedTuple):
    """A piece of a source's images.

    Attributes:
        images: uint8 [n, h, w, c]; zeros where an image could not be read.
        unreadable: {position in the piece: what is wrong with it}.
        converted: images that had another colour mode and were converted.
    """

    images: np.ndarray
    unreadable: Mapping[int, str] = MappingProxyType({})
    converted: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set, before it is imported.

    Attributes:
        name: what messages call it.
        class_names: index = label; fixed at import, so that erasing a whole class keeps its logit.
        shape: (h, w, c) of a stored image.
        items: all items, in any order.
        read: `read(start, stop)` gives the pixels of `items[start:stop]`; imports ask for rising positions.
    """

    name: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    items: Sequence[Item]
    read: Callable[[int, int], Pixels]


def problems(source: Source, first: bool = True) -> list[str]:
    """Everything about the items that makes the source unusable: one line each.

    Args:
        source: opened.
        first: nothing was imported before, so that it has to bring two classes itself.
    """
    found = []
    labels = {item.label for item in source.items if item.split == "train"}
    bad = [f"{shown(item.id)}={item.label}" for item in source.items if not 0 <= item.label < len(source.class_names)]
    twice = [shown(name) for name, count in Counter(item.id for item in source.items).items() if count > 1]
    nameless = [f"{position} of {item.split}" for position, item in enumerate(source.items) if not item.id]
    garbled = faults(text for item in source.items for text in (item.id, item.owner))
    garbled += [f"class {line}" for line in faults(source.class_names, VISIBLE)]
    if not any(item.split == "train" for item in source.items):
        found.append("there is no training image")
    elif first and len(labels) < 2:
        found.append(f"only one class is present ({join_limited(labels)}); a classifier needs at least 2")
    if bad:
        found.append(f"labels must lie in 0..{len(source.class_names) - 1} (the class names): {join_limited(bad)}")
    if twice:
        found.append(f"ids must be unique; these occur more than once: {join_limited(twice)}")
    if garbled:
        found.append(
            f"ids (file names), owners and class names must be plain text; these are not: {join_limited(garbled)}"
        )
    if nameless:
        found.append(f"ids must not be empty; these items (counted from 0) have none: {join_limited(nameless)}")
    if min(source.shape) < 1 or source.shape[2] not in (1, 3):
        found.append(f"images must be [height, width, 1 or 3 channels], not {list(source.shape)}")
    return found


def content_hash(image: np.ndarray) -> str:
    """SHA-256 over shape and pixels of one uint8 image; equal images have equal hashes."""
    sha = hashlib.sha256(str(image.shape).encode())
    sha.update(np.ascontiguousarray(image).tobytes())
    return sha.hexdigest()


def assign_split(item: Item, data: Data, seed: int) -> Item:
    """Moves shares of the training items to test and holdout, chosen by a keyed hash of the id or the owner."""
    if item.split != "train":
        return item
    group = item.owner if data.split_by == "owner" and item.owner else item.id
    for split, share in (("test", data.test_share), ("holdout", data.holdout)):
        draw = int.from_bytes(keyed_hash(seed, split, group)[:8], "little") / 2**64
        if draw < share:
            return item._replace(split=split)
    return item


def limited(items: Sequence[Item], train: int, test: int) -> list[int]:
    """Positions of the items that the limits keep: the first so many of each split (0: all)."""
    left = {"train": train or len(items), "test": test or len(items)}
    kept = []
    for position, item in enumerate(items):
        if left.get(item.split, 1) > 0:
            kept.append(position)
        if item.split in left:
            left[item.split] -= 1
    return kept
