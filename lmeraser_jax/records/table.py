"""The live records of one split, sorted by id: the only view of the data that the numbers may depend on."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RecordTable:
    """Columns of N records, sorted by id.

    Attributes:
        ids: N strings.
        rows: int64 [N], places in the image file; never part of a digest or a result.
        labels: int32 [N].
        owners: N strings, may be empty.
        contents: N content hashes.
        clusters: N published cluster keys, "" where none is published yet.
    """

    ids: tuple[str, ...]
    rows: np.ndarray
    labels: np.ndarray
    owners: tuple[str, ...]
    contents: tuple[str, ...]
    clusters: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> "RecordTable":
        """The records at the given positions, in that order."""

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in index)

        return RecordTable(
            pick(self.ids),
            self.rows[index],
            self.labels[index],
            pick(self.owners),
            pick(self.contents),
            pick(self.clusters),
        )

    def without(self, ids: frozenset[str]) -> "RecordTable":
        """The records whose id is not among `ids`."""
        return self.take(np.array([i for i, name in enumerate(self.ids) if name not in ids], np.int64))
