"""A pool: one attacked cluster's records, and others that are routed to it, each with a part to play.

Shapes: n records of a pool, w of them watched.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning.run import Run

FORGOTTEN, RETAINED, OUTSIDE, VALIDATION = range(4)
WATCHED = 64  # retained records of a pool that are looked at; all of them are tuned on


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """One attacked cluster.

    Attributes:
        key: of the cluster.
        ref: its published slice.
        records: n records, sorted by id.
        roles: int8 [n]. FORGOTTEN and RETAINED are the cluster's members; the others are images that no published
            model was made with: OUTSIDE are in shadows and are told from the forgotten, VALIDATION are in none.
        watched: int64 [w], places among the records whose margins are looked at.
    """

    key: str
    ref: str
    records: RecordTable
    roles: np.ndarray
    watched: np.ndarray

    def of(self, *roles: int) -> RecordTable:
        """The records with one of these roles."""
        return self.records.take(np.flatnonzero(np.isin(self.roles, roles)))


def make(key: str, ref: str, records: RecordTable, roles: Mapping[str, int], seed: int) -> Pool:
    """A pool of records with their roles by id; a part of the retained ones is watched."""
    kinds = np.array([roles[name] for name in records.ids], np.int8)
    retained = philox(seed, "attack", "watched", key).permutation(np.flatnonzero(kinds == RETAINED))
    watched = np.concatenate([np.flatnonzero(kinds != RETAINED), retained[:WATCHED]])
    return Pool(key, ref, records, kinds, np.sort(watched))


def refuse_changed(run: Run, pools: Iterable[Pool]) -> None:
    """Refuses what was found if a record's pixels are gone by now: somebody erased it meanwhile."""
    images = run.images
    for pool in pools:
        pairs = zip(pool.records.rows, pool.records.contents, strict=True)
        if any(content_hash(images[row]) != content for row, content in pairs):
            raise UserError("records were erased while they were attacked, so the result is void; run the attack again")
