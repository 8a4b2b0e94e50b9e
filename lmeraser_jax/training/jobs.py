"""What has to be tuned: a job for every slice, its batches and its snapshots. Host only (NumPy).

Everything here depends on one cluster alone, so where and when a job runs never reaches its numbers.
"""

import dataclasses

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.hashing import philox


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One cluster to tune."""

    key: str  # of the cluster; it also names the job's random streams
    rows: np.ndarray  # int32 [m], image rows of the members, sorted by record id
    epochs: int  # times each member is seen
    batch: int  # B, images per step; only the last step may have fewer
    snapshots: tuple[int, ...] = ()  # numbers of steps, below `steps`, after which the slice is handed over too

    @property
    def images(self) -> int:
        """Images passed forward and backward."""
        return self.epochs * len(self.rows)

    @property
    def steps(self) -> int:
        return self.steps_of(self.epochs)

    def steps_of(self, epochs: int) -> int:
        """Steps until every member was seen so many times."""
        return -(-epochs * len(self.rows) // self.batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A slice that has to exist: the digest of its recipe, and the job that makes it."""

    digest: str
    job: Job


def make_job(key: str, rows: np.ndarray, tuning: Tuning) -> Job:
    """The job of one cluster: a small one repeats its members until it makes at least `tuning.min_steps` steps.

    A closed form looks at each member's feature once and passes no image through the backbone.
    """
    assert len(rows), key
    if tuning.closed:
        return Job(key, rows.astype(np.int32), 0, tuning.batch)
    epochs = max(tuning.epochs, -(-tuning.min_steps * tuning.batch // len(rows)))
    return Job(key, rows.astype(np.int32), epochs, tuning.batch)


def snapshot_steps(job: Job, every_epochs: int, keep: int) -> tuple[int, ...]:
    """Steps after which every member was seen a multiple of `every_epochs` times: the latest `keep` multiples.

    Several epochs of a cluster smaller than a batch may end in one step, and in the last, which needs no snapshot.
    """
    epochs = range(every_epochs, job.epochs, every_epochs)[-keep:] if every_epochs else ()
    return tuple(sorted({job.steps_of(epoch) for epoch in epochs} - {job.steps}))


def batches(job: Job, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The job's batches: rows int32 [steps, B] and valid bool [steps, B].

    Epochs are permutations from a Philox stream keyed by (seed, cluster key, epoch), joined end to end, so that a
    cluster smaller than a batch wastes nothing.
    """
    orders = [philox(seed, "order", job.key, str(epoch)).permutation(job.rows) for epoch in range(job.epochs)]
    rows = np.zeros(job.steps * job.batch, np.int32)
    rows[: job.images] = np.concatenate(orders)
    valid = np.arange(len(rows)) < job.images
    return rows.reshape(job.steps, job.batch), valid.reshape(job.steps, job.batch)
