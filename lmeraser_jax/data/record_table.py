"""The live records of one split, sorted by id: the only view of the data that the numbers may depend on."""

import dataclasses

import numpy as np

from lmeraser_jax.data.names import list_names
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RecordTable:
    """Columns of N records, sorted by id."""

    ids: tuple[str, ...]
    rows: np.ndarray  # int64 [N], places in the image file; never part of a digest or a result
    labels: np.ndarray  # int32 [N]
    owners: tuple[str, ...]  # may be empty
    contents: tuple[str, ...]  # content hashes
    clusters: tuple[str, ...]  # published cluster keys, "" where none is published yet

    @staticmethod
    def empty() -> "RecordTable":
        return RecordTable((), np.zeros(0, np.int64), np.zeros(0, np.int32), (), (), ())

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> "RecordTable":
        """The records at the given positions, in that order."""
        texts = (tuple(column[i] for i in index) for column in (self.ids, self.owners, self.contents, self.clusters))
        ids, owners, contents, clusters = texts
        return RecordTable(ids, self.rows[index], self.labels[index], owners, contents, clusters)

    def plus(self, other: "RecordTable") -> "RecordTable":
        """The records of both, sorted by id."""
        if not len(other):
            return self
        both = RecordTable(
            self.ids + other.ids,
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.labels, other.labels]),
            self.owners + other.owners,
            self.contents + other.contents,
            self.clusters + other.clusters,
        )
        return both.take(np.array(sorted(range(len(both)), key=both.ids.__getitem__), np.int64))

    def without(self, ids: frozenset[str]) -> "RecordTable":
        """The records whose id is not among `ids`."""
        return self.take(np.array([i for i, name in enumerate(self.ids) if name not in ids], np.int64)) if ids else self


def check_pixel_hashes(images: np.ndarray, records: RecordTable) -> None:
    """Refuses records whose stored pixels are no longer those that were imported: a digest would name other bytes.

    `images` are the rows of the image file, uint8 [N, h, w, c]. Raises `UserError` naming the records.
    """
    pairs = zip(records.ids, records.rows, records.contents, strict=True)
    changed = [name for name, row, content in pairs if content_hash(images[row]) != content]
    if changed:
        raise UserError(
            f"the stored contents of {len(changed)} records are not those that were imported:"
            f" {list_names(changed)}; read them from the source again with lmeraser train --reimport, or erase"
            " these records with lmeraser unlearn"
        )
