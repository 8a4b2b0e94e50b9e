"""Clusters -> lanes: which batch each lane of each device works on at each step. Host only (NumPy).

A cluster is a job of so many steps. Jobs are packed longest first; where and when a job runs never
reaches its numbers. A lane starts its next job in the step after the last, so lanes idle only at the end.

Shapes: T steps of one call, G lanes of all devices, B images per lane.
"""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.digests import philox, words


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One cluster to tune.

    Attributes:
        key: cluster key.
        rows: int32 [m], image rows of the members, sorted by record id.
        epochs: times each member is seen.
        steps: batches of B; only the last may be short.
    """

    key: str
    rows: np.ndarray
    epochs: int
    steps: int

    @property
    def images(self) -> int:
        """Images passed forward and backward."""
        return self.epochs * len(self.rows)


def make_job(key: str, rows: np.ndarray, tuning: Tuning) -> Job:
    """A small cluster repeats its members until it makes at least `tuning.min_steps` steps."""
    assert len(rows), key
    epochs = max(tuning.epochs, -(-tuning.min_steps * tuning.batch // len(rows)))
    return Job(key, rows.astype(np.int32), epochs, -(-epochs * len(rows) // tuning.batch))


def batches(job: Job, seed: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The job's batches: rows int32 [steps, B] and valid bool [steps, B].

    Epochs are permutations from a Philox stream keyed by (seed, cluster key, epoch), joined end to end,
    so that a cluster smaller than a batch wastes nothing.
    """
    orders = [philox(seed, "order", job.key, str(epoch)).permutation(job.rows) for epoch in range(job.epochs)]
    rows = np.zeros(job.steps * batch, np.int32)
    rows[: job.images] = np.concatenate(orders)
    valid = np.arange(job.steps * batch) < job.images
    return rows.reshape(job.steps, batch), valid.reshape(job.steps, batch)


def pack(steps: Sequence[int], lanes: int) -> list[list[int]]:
    """Longest job first onto the least loaded lane: job indices per lane, in running order."""
    plan: list[list[int]] = [[] for _ in range(lanes)]
    load = [(0, lane) for lane in range(lanes)]
    for index in sorted(range(len(steps)), key=lambda i: (-steps[i], i)):
        total, lane = heapq.heappop(load)
        plan[lane].append(index)
        heapq.heappush(load, (total + steps[index], lane))
    return plan


def efficiency(jobs: Sequence[Job], lanes: int, batch: int) -> float:
    """Real images / images processed, padding and idle lanes counted."""
    if not jobs:
        return 1.0
    longest = max(sum(jobs[i].steps for i in lane) for lane in pack([job.steps for job in jobs], lanes))
    return sum(job.images for job in jobs) / (longest * lanes * batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """The work of one call of the device program; only the first `steps` steps are run.

    Attributes:
        steps: steps to run, at most T.
        rows: int32 [T, G, B]; valid: bool [T, G, B].
        words: uint32 [T, G, 2], seed words of the cluster.
        step, total: int32 [T, G], the cluster's own step and its number of steps; step 0 starts afresh.
        slot: int32 [T, G], where the finished slice goes in the device's output; `slots` for nowhere.
        job: int32 [T, G], index of the job, -1 where the lane idles.
        finished: (job index, device, slot) of the jobs that end here.
    """

    steps: int
    rows: np.ndarray
    valid: np.ndarray
    words: np.ndarray
    step: np.ndarray
    total: np.ndarray
    slot: np.ndarray
    job: np.ndarray
    finished: tuple[tuple[int, int, int], ...]


class _Lane:
    """A lane's queue of jobs and its place in the current one."""

    def __init__(self, jobs: Sequence[Job], queue: list[int], seed: int, batch: int):
        self.jobs, self.queue, self.seed, self.batch = jobs, queue, seed, batch
        self.current, self.at = -1, 0

    def start(self) -> bool:
        """Makes sure that a job is under way; False when none is left."""
        if self.current < 0 and self.queue:
            self.current, self.at = self.queue.pop(0), 0
            self.rows, self.valid = batches(self.jobs[self.current], self.seed, self.batch)
            self.words = words(self.jobs[self.current].key)
        return self.current >= 0


def chunks(jobs: Sequence[Job], devices: int, tuning: Tuning, slots: int, seed: int) -> Iterator[Chunk]:
    """The calls that tune all jobs, in order.

    A call ends early when a device's output slots are used up, so the output stays small however many
    clusters there are and its shape never changes.
    """
    count = devices * tuning.lanes
    lanes = [_Lane(jobs, queue, seed, tuning.batch) for queue in pack([job.steps for job in jobs], count)]
    while any(lane.start() for lane in lanes):
        yield _chunk(lanes, devices, tuning, slots)


def _chunk(lanes: list[_Lane], devices: int, tuning: Tuning, slots: int) -> Chunk:
    shape = (tuning.scan_steps, len(lanes))
    chunk = Chunk(
        steps=0,
        rows=np.zeros((*shape, tuning.batch), np.int32),
        valid=np.zeros((*shape, tuning.batch), bool),
        words=np.zeros((*shape, 2), np.uint32),
        step=np.ones(shape, np.int32),
        total=np.ones(shape, np.int32),
        slot=np.full(shape, slots, np.int32),
        job=np.full(shape, -1, np.int32),
        finished=(),
    )
    finished: list[tuple[int, int, int]] = []
    used = [0] * devices
    steps = 0
    while steps < tuning.scan_steps and max(used) + tuning.lanes <= slots and any([lane.start() for lane in lanes]):
        for g, lane in enumerate(lanes):
            if lane.current < 0:
                continue
            job, at, device = lane.jobs[lane.current], lane.at, g // tuning.lanes
            chunk.rows[steps, g], chunk.valid[steps, g] = lane.rows[at], lane.valid[at]
            chunk.words[steps, g], chunk.job[steps, g] = lane.words, lane.current
            chunk.step[steps, g], chunk.total[steps, g] = at, job.steps
            lane.at += 1
            if lane.at == job.steps:
                chunk.slot[steps, g] = used[device]
                finished.append((lane.current, device, used[device]))
                used[device] += 1
                lane.current = -1
        steps += 1
    return dataclasses.replace(chunk, steps=steps, finished=tuple(finished))
