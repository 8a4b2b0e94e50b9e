"""Clusters -> lanes: which batch each lane of each device works on at each step. Host only (NumPy).

A cluster is a job of so many steps. Jobs are packed longest first; where and when a job runs never
reaches its numbers. A lane starts its next job in the step after the last, so lanes idle only at the end.

With R > 1 slices (SISA: Bourtoule et al., 2021) a cluster is a chain of jobs: a keyed hash of its id puts each
member into one of R parts, and stage r carries on from stage r - 1 with the members of parts 1 to r. An erasure
in part s repeats the stages from s on.

Shapes: T steps of one call, G lanes of all devices, B images per lane.
"""

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.hashing import keyed_hash, philox, seed_words
from lmeraser_jax.training.slices import Slice


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One cluster to tune, or one stage of it.

    Attributes:
        key: cluster key.
        rows: int32 [m], image rows of the members, sorted by record id.
        epochs: times each member is seen.
        batch: B, images per step; only the last step may have fewer.
        snapshots: numbers of steps, below `steps`, after which the slice is handed over too.
        stage: r, the latest part that the members are from.
        start: the slice to carry on from, on the host; None for a fresh one.
    """

    key: str
    rows: np.ndarray
    epochs: int
    batch: int
    snapshots: tuple[int, ...] = ()
    stage: int = 1
    start: Slice | None = None

    @property
    def stream(self) -> str:
        """Name of the job's random streams: no two stages of a cluster draw the same numbers."""
        return self.key if self.stage == 1 else f"{self.key}/{self.stage}"

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
    """A slice that has to exist: its digest, that of the slice it starts from ("" for none), how to make it."""

    digest: str
    parent: str
    job: Job


def make_job(key: str, rows: np.ndarray, tuning: Tuning, stage: int = 1) -> Job:
    """A small cluster repeats its members until it makes at least `tuning.min_steps` steps over its R stages.

    A closed form looks at each member's feature once, and passes no image through the backbone.
    """
    assert len(rows), key
    if tuning.closed:
        return Job(key, rows.astype(np.int32), 0, tuning.batch)
    min_steps = -(-tuning.min_steps // tuning.slices)
    epochs = max(stage_epochs(tuning, stage), -(-min_steps * tuning.batch // len(rows)))
    return Job(key, rows.astype(np.int32), epochs, tuning.batch, stage=stage)


def stage_epochs(tuning: Tuning, stage: int) -> int:
    """Epochs of a stage: 2e / (R + 1) on average, so that all R stages pass about as many images as e epochs do.

    Whole numbers are differences of the rounded sum over the stages; at least 1.
    """
    until, before = (2 * tuning.epochs * r // (tuning.slices + 1) for r in (stage, stage - 1))
    return max(1, until - before)


def parts(ids: Sequence[str], slices: int, seed: int) -> np.ndarray:
    """int32 [m]: the part, 1 to R, of each record; a keyed hash of its id, whoever else is a member."""
    hashes = (int.from_bytes(keyed_hash(seed, "slice", name), "little") for name in ids)
    return np.array([1 + value % slices for value in hashes], np.int32)


def stage_jobs(key: str, ids: Sequence[str], rows: np.ndarray, tuning: Tuning, seed: int) -> list[Job]:
    """The chain of a cluster's stages in running order, `start` still to be filled in.

    A stage whose part is empty is left out: it would see the members of the stage before once more.

    Args:
        key: cluster key.
        ids: the members, sorted.
        rows: int [m], their image rows.
        tuning: settings.
        seed: the run's seed.
    """
    if tuning.slices == 1:
        return [make_job(key, rows, tuning)]
    part = parts(ids, tuning.slices, seed)
    return [make_job(key, rows[part <= stage], tuning, stage) for stage in np.unique(part).tolist()]


def snapshot_steps(job: Job, every_epochs: int, keep: int) -> tuple[int, ...]:
    """Steps after which every member was seen a multiple of `every_epochs` times: the latest `keep` multiples.

    Several epochs of a cluster smaller than a batch may end in one step, and in the last, which needs no snapshot.
    """
    epochs = range(every_epochs, job.epochs, every_epochs)[-keep:] if every_epochs else ()
    return tuple(sorted({job.steps_of(epoch) for epoch in epochs} - {job.steps}))


def batches(job: Job, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The job's batches: rows int32 [steps, B] and valid bool [steps, B].

    Epochs are permutations from a Philox stream keyed by (seed, the job's stream, epoch), joined end to end,
    so that a cluster smaller than a batch wastes nothing.
    """
    orders = [philox(seed, "order", job.stream, str(epoch)).permutation(job.rows) for epoch in range(job.epochs)]
    rows = np.zeros(job.steps * job.batch, np.int32)
    rows[: job.images] = np.concatenate(orders)
    valid = np.arange(len(rows)) < job.images
    return rows.reshape(job.steps, job.batch), valid.reshape(job.steps, job.batch)


def pack(steps: Sequence[int], lanes: int) -> list[list[int]]:
    """Deals jobs to lanes, longest first: job indices per lane, in running order.

    MULTIFIT (Coffman, Garey and Johnson, 1978): the shortest time in which first-fit decreasing packs all jobs, by
    bisection, starting from what dealing each job to the least loaded lane takes. At most 2 % above the best possible
    for the paper's numbers of clusters on 8 lanes, where that start can be 5 % above.
    """
    order = sorted(range(len(steps)), key=lambda i: (-steps[i], i))
    plan = _least_loaded(steps, order, lanes)
    longest = max((sum(steps[i] for i in lane) for lane in plan), default=0)
    shortest = max(-(-sum(steps) // lanes), max(steps, default=0))
    while shortest < longest:
        middle = (shortest + longest) // 2
        found = _first_fit(steps, order, lanes, middle)
        if found is None:
            shortest = middle + 1
        else:
            plan, longest = found, max(sum(steps[i] for i in lane) for lane in found)
    return plan


def _least_loaded(steps: Sequence[int], order: Sequence[int], lanes: int) -> list[list[int]]:
    plan: list[list[int]] = [[] for _ in range(lanes)]
    load = [(0, lane) for lane in range(lanes)]
    for index in order:
        total, lane = heapq.heappop(load)
        plan[lane].append(index)
        heapq.heappush(load, (total + steps[index], lane))
    return plan


def _first_fit(steps: Sequence[int], order: Sequence[int], lanes: int, limit: int) -> list[list[int]] | None:
    """Each job in the first lane where it ends within the limit; None if one ends nowhere within it."""
    plan: list[list[int]] = [[] for _ in range(lanes)]
    left = [limit] * lanes
    for index in order:
        lane = next((lane for lane in range(lanes) if steps[index] <= left[lane]), None)
        if lane is None:
            return None
        plan[lane].append(index)
        left[lane] -= steps[index]
    return plan


def efficiency(jobs: Sequence[Job], lanes: int, batch: int) -> float:
    """Real images / images processed, padding and idle lanes counted."""
    if not sum(job.steps for job in jobs):
        return 1.0
    longest = max(sum(jobs[i].steps for i in lane) for lane in pack([job.steps for job in jobs], lanes))
    return sum(job.images for job in jobs) / (longest * lanes * batch)


class Output(NamedTuple):
    """A slice that a call hands over."""

    job: int  # index of the job
    step: int  # steps it has made
    device: int
    slot: int  # of the device


@dataclasses.dataclass(frozen=True, eq=False)
class StepBatch:
    """The work of one call of the device program; only the first `steps` steps are run.

    Attributes:
        steps: steps to run, at most T.
        rows: int32 [T, G, B]; valid: bool [T, G, B].
        words: uint32 [T, G, 2], seed words of the job.
        step, total: int32 [T, G], the job's own step and its number of steps; step 0 starts afresh.
        slot: int32 [T, G], where the slice goes in the device's output after the step; `slots` for nowhere.
        start: int32 [T, G], place in the device's `starts` of what step 0 starts from; -1 for a fresh slice.
        job: int32 [T, G], index of the job, -1 where the lane idles.
        outputs: the slices handed over.
        starts: for each device, the jobs that begin here with a `start`: at most as many as slots.
    """

    steps: int
    rows: np.ndarray
    valid: np.ndarray
    seed_words: np.ndarray
    step: np.ndarray
    total: np.ndarray
    slot: np.ndarray
    start: np.ndarray
    job: np.ndarray
    outputs: tuple[Output, ...]
    starts: tuple[tuple[int, ...], ...]


class _Lane:
    """A lane's queue of jobs and its place in the current one."""

    def __init__(self, jobs: Sequence[Job], queue: list[int], seed: int):
        self.jobs, self.queue, self.seed = jobs, queue, seed
        self.current, self.at = -1, 0

    def start(self) -> bool:
        """Makes sure that a job is under way; False when none is left."""
        if self.current < 0 and self.queue:
            self.current, self.at = self.queue.pop(0), 0
            self.rows, self.valid = batches(self.jobs[self.current], self.seed)
            self.words = seed_words(self.jobs[self.current].stream)
        return self.current >= 0


def step_batches(jobs: Sequence[Job], devices: int, tuning: Tuning, slots: int, seed: int) -> Iterator[StepBatch]:
    """The calls that tune all jobs, in order.

    A call ends early when a device's output slots are used up, so the output stays small however many
    clusters there are and its shape never changes.
    """
    count = devices * tuning.lanes
    lanes = [_Lane(jobs, queue, seed) for queue in pack([job.steps for job in jobs], count)]
    while any(lane.start() for lane in lanes):
        yield _chunk(lanes, devices, tuning, slots)


def _chunk(lanes: list[_Lane], devices: int, tuning: Tuning, slots: int) -> StepBatch:
    shape = (tuning.scan_steps, len(lanes))
    chunk = StepBatch(
        steps=0,
        rows=np.zeros((*shape, tuning.batch), np.int32),
        valid=np.zeros((*shape, tuning.batch), bool),
        seed_words=np.zeros((*shape, 2), np.uint32),
        step=np.ones(shape, np.int32),
        total=np.ones(shape, np.int32),
        slot=np.full(shape, slots, np.int32),
        start=np.full(shape, -1, np.int32),
        job=np.full(shape, -1, np.int32),
        outputs=(),
        starts=(),
    )
    outputs: list[Output] = []
    starts: list[list[int]] = [[] for _ in range(devices)]
    used = [0] * devices
    steps = 0
    while steps < tuning.scan_steps and max(used) + tuning.lanes <= slots and any([lane.start() for lane in lanes]):
        for g, lane in enumerate(lanes):
            if lane.current < 0:
                continue
            job, at, device = lane.jobs[lane.current], lane.at, g // tuning.lanes
            chunk.rows[steps, g], chunk.valid[steps, g] = lane.rows[at], lane.valid[at]
            chunk.seed_words[steps, g], chunk.job[steps, g] = lane.words, lane.current
            chunk.step[steps, g], chunk.total[steps, g] = at, job.steps
            if at == 0 and job.start is not None:
                chunk.start[steps, g] = len(starts[device])
                starts[device].append(lane.current)
            lane.at += 1
            if lane.at == job.steps or lane.at in job.snapshots:
                chunk.slot[steps, g] = used[device]
                outputs.append(Output(lane.current, lane.at, device, used[device]))
                used[device] += 1
            if lane.at == job.steps:
                lane.current = -1
        steps += 1
    return dataclasses.replace(chunk, steps=steps, outputs=tuple(outputs), starts=tuple(map(tuple, starts)))
