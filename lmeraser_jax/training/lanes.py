"""Jobs -> lanes: which batch each lane of each device works on at each step. Host only (NumPy).

Jobs are packed longest first. A lane starts its next job in the step after the last one, so lanes idle only at the end.

Shapes: T steps of one call, G lanes of all devices, B images per lane.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.hashing import seed_words
from lmeraser_jax.training.jobs import Job, batches


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
        shorter = _first_fit(steps, order, lanes, middle)
        if shorter is None:
            shortest = middle + 1
        else:
            plan, longest = shorter, max(sum(steps[i] for i in lane) for lane in shorter)
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
    """The work of one call of the device program."""

    steps: int  # steps to run, at most T; what lies behind them is not run
    rows: np.ndarray  # int32 [T, G, B]
    valid: np.ndarray  # bool [T, G, B]
    seed_words: np.ndarray  # uint32 [T, G, 2], of the job
    step: np.ndarray  # int32 [T, G], the job's own step; 0 starts afresh
    total: np.ndarray  # int32 [T, G], the job's number of steps
    slot: np.ndarray  # int32 [T, G], where the slice goes in the device's output after the step; `slots` for nowhere
    job: np.ndarray  # int32 [T, G], index of the job, -1 where the lane idles
    outputs: tuple[Output, ...]  # the slices handed over


def step_batches(jobs: Sequence[Job], devices: int, tuning: Tuning, slots: int, seed: int) -> Iterator[StepBatch]:
    """The calls that tune all jobs, in order.

    A call ends early when a device's output slots are used up, so the output's shape is small and never changes.
    """
    queues = pack([job.steps for job in jobs], devices * tuning.lanes)
    columns = itertools.zip_longest(*(_lane_steps(jobs, queue, seed) for queue in queues))  # of all lanes, step by step
    while True:
        call = _next_call(jobs, columns, devices, tuning, slots)
        if not call.steps:
            return
        yield call


def _lane_steps(jobs: Sequence[Job], queue: Sequence[int], seed: int) -> Iterator[tuple[Any, ...]]:
    """A lane's work: index and step of its job, rows [B], valid [B] and seed words [2]."""
    for index in queue:
        rows, valid = batches(jobs[index], seed)
        words = seed_words(jobs[index].key)
        for step in range(jobs[index].steps):
            yield index, step, rows[step], valid[step], words


def _next_call(
    jobs: Sequence[Job], columns: Iterator[tuple[Any, ...]], devices: int, tuning: Tuning, slots: int
) -> StepBatch:
    shape = (tuning.scan_steps, devices * tuning.lanes)
    call = StepBatch(
        steps=0,
        rows=np.zeros((*shape, tuning.batch), np.int32),
        valid=np.zeros((*shape, tuning.batch), bool),
        seed_words=np.zeros((*shape, 2), np.uint32),
        step=np.ones(shape, np.int32),
        total=np.ones(shape, np.int32),
        slot=np.full(shape, slots, np.int32),
        job=np.full(shape, -1, np.int32),
        outputs=(),
    )
    outputs, used, steps = [], [0] * devices, 0
    while steps < tuning.scan_steps and max(used) + tuning.lanes <= slots:
        column = next(columns, None)
        if column is None:
            break
        for g, work in enumerate(column):
            if work is None:  # the lane idles
                continue
            index, step, rows, valid, words = work
            job, device = jobs[index], g // tuning.lanes
            call.rows[steps, g], call.valid[steps, g], call.seed_words[steps, g] = rows, valid, words
            call.job[steps, g], call.step[steps, g], call.total[steps, g] = index, step, job.steps
            if step + 1 == job.steps or step + 1 in job.snapshots:
                call.slot[steps, g] = used[device]
                outputs.append(Output(index, step + 1, device, used[device]))
                used[device] += 1
        steps += 1
    return dataclasses.replace(call, steps=steps, outputs=tuple(outputs))
