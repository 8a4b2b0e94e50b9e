"""What every source delivers: items with stable ids, and their contents, images or rows of text, in bounded pieces."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lmeraser_jax.config import Data
from lmeraser_jax.data.names import class_fault, fault, quoted
from lmeraser_jax.errors import join_limited
from lmeraser_jax.hashing import keyed_hash

SPLITS = ("train", "holdout", "test", "public")
WITHOUT_LABELS = "--config.pretraining.supervise=0 --config.pretraining.distill=1"  # what a set without labels can do


class Item(NamedTuple):
    """One record without its content. Splits: train (private), holdout (private, never tuned on), test, public."""

    id: str
    split: str
    label: int  # -1: none; of text, and of public sets, from which features are learned
    owner: str = ""


class Contents(NamedTuple):
    """A piece of a source's contents."""

    rows: np.ndarray  # uint8 [n, h, w, c], images, or int32 [n, 2 + T], text; zeros where one could not be read
    unreadable: Mapping[int, str] = MappingProxyType({})  # {position in the piece: what is wrong with it}
    converted: int = 0  # images that had another colour mode and were converted; texts that were cut


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set, before it is imported."""

    name: str  # what messages call it
    class_names: tuple[str, ...]  # index = label; fixed at import, so that erasing a whole class keeps its logit
    shape: tuple[int, ...]  # (h, w, c) of a stored image, (2 + T,) of a row of text (`text_rows`)
    items: Sequence[Item]  # all, in any order
    read: Callable[[Sequence[int]], Contents]  # of the items at some positions, which rise
    notes: tuple[str, ...] = ()  # what an import tells about it, such as what it has that is not used


def not_used(names: Mapping[str, Collection[str]], files: str = "") -> tuple[str, ...]:
    """The note of what a source has and no record is made of, {kind: names}; none where everything is used."""
    parts = [files] if files else []
    parts += [f"{kind}: {join_limited(values)}" for kind, values in names.items() if values]
    return (f"not used: {', '.join(parts)}",) if parts else ()


def problems(source: Source, classes: int = 2) -> list[str]:
    """A line for everything that makes the source unusable: so many classes must be there; 0: labels may be missing."""
    items, last, lines, text = source.items, len(source.class_names) - 1, [], is_text(source.shape)
    classes = 0 if text else classes
    labels = {item.label for item in items if item.split == "train"}
    if not labels:
        lines.append("there is no training record")
    elif len(labels) < classes:
        lines.append(f"only one class is present ({join_limited(labels)}); a classifier needs at least 2")
    counts = Counter(item.id for item in items)
    offenders = {
        f"labels must lie in 0..{last} (the class names)": [
            f"{quoted(item.id)}={item.label}" for item in items if not min(classes, 1) - 1 <= item.label <= last
        ],
        "ids must be unique; these occur more than once": [quoted(name) for name in counts if counts[name] > 1],
        "ids (file names), owners and class names must be plain text; these are not": _illegal_names(source),
        "ids must not be empty; these items (counted from 0) have none": [
            f"{place} of {split}"
            for split in SPLITS
            for place, item in enumerate(item for item in items if item.split == split)
            if not item.id
        ],
    }
    lines += [f"{rule}: {join_limited(names)}" for rule, names in offenders.items() if names]
    if not text and (min(source.shape) < 1 or source.shape[2] not in (1, 3)):
        lines.append(f"images must be [height, width, 1 or 3 channels], not {list(source.shape)}")
    return lines


def _illegal_names(source: Source) -> list[str]:
    """Each name that is illegal, with what it names and why."""
    owners = {item.owner: item.id for item in reversed(source.items) if item.owner}  # the first record of each
    return [
        *(f"{quoted(item.id)} ({fault(item.id)})" for item in source.items if item.id and fault(item.id)),
        *(f"owner {quoted(name)} of {quoted(owners[name])} ({fault(name)})" for name in owners if fault(name)),
        *(f"class {quoted(name)} ({class_fault(name)})" for name in source.class_names if class_fault(name)),
    ]


def is_text(shape: Sequence[int]) -> bool:
    """Whether stored contents of a shape are rows of text."""
    return len(shape) == 1


def dtype_of(shape: Sequence[int]) -> np.dtype:
    """The dtype of stored contents of a shape."""
    return np.dtype(np.int32 if is_text(shape) else np.uint8)


def content_hash(row: np.ndarray) -> str:
    """SHA-256 over shape and bytes of one image or row of text; equal ones have equal hashes."""
    sha = hashlib.sha256(str(row.shape).encode())
    sha.update(np.ascontiguousarray(row).tobytes())
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


def limit_positions(items: Sequence[Item], train: int, test: int, by: str = "record") -> list[int]:
    """Positions of the items that the limits of each split keep (0: all).

    Items are drawn by a keyed hash of their ids, so the same ones whatever their order is. By "class", every class gets
    its share and, as far as the limit reaches, at least one.
    """
    dropped: set[int] = set()
    for split, limit in (("train", train), ("test", test)):
        positions = [position for position, item in enumerate(items) if item.split == split]
        if not 0 < limit < len(positions):
            continue
        ranks = sorted((keyed_hash(0, "limit", items[position].id), position) for position in positions)
        if by == "class":
            sizes, counts, shares = Counter(items[position].label for position in positions), Counter(), {}
            for _, position in ranks:
                label = items[position].label
                shares[position] = counts[label] / sizes[label]
                counts[label] += 1
            ranks.sort(key=lambda rank: shares[rank[1]])
        dropped.update(position for _, position in ranks[limit:])
    return [position for position in range(len(items)) if position not in dropped]
