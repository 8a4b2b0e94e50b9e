"""What comes back from the calls of the tuning program: finished slices, snapshots, losses and times. Host only."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from lmeraser_jax.training.closed_form import KeptSums
from lmeraser_jax.training.jobs import Job, StepBatch
from lmeraser_jax.training.slices import Slice


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A job's slice at its end, or at one of its snapshots.

    Attributes:
        job: the job.
        step: steps made.
        slice: float32 arrays on the host.
        loss: mean over the last epoch until then.
        failed_at: step at which the loss or the slice was no longer finite, None while all is well.
        seconds: of device time, the job's share until the call that handed the slice over was done.
        tally: what a closed form was made of, where it is to be kept.
    """

    job: Job
    step: int
    slice: Slice
    loss: float
    failed_at: int | None
    seconds: float
    tally: KeptSums | None = None

    @property
    def final(self) -> bool:
        """Whether this is the job's end, no snapshot."""
        return self.step == self.job.steps


class Tracker:
    """Follows losses and times of the jobs under way, on so many devices."""

    def __init__(self, jobs: Sequence[Job], devices: int):
        self.jobs, self.devices = jobs, devices
        self.losses: dict[int, np.ndarray] = {}  # of the jobs under way, step by step
        self.seconds = np.zeros(len(jobs))
        self.last_loss, self.since = math.nan, time.perf_counter()

    def collect(self, chunk: StepBatch, handed: Slice, losses: jax.Array, slots: int) -> Iterator[Tuned]:
        """Waits for a call's results; yields the slices that it handed over."""
        values, job = np.asarray(losses)[: chunk.steps], chunk.job[: chunk.steps]
        busy, now = job >= 0, time.perf_counter()
        elapsed, self.since = now - self.since, now
        for index in np.unique(job[busy]).tolist():
            here = job == index
            self.seconds[index] += elapsed * self.devices * here.sum() / busy.sum()
            known = self.losses.setdefault(index, np.zeros(self.jobs[index].steps))
            known[chunk.step[: chunk.steps][here]] = values[here]
        self.last_loss = float(values[busy].mean())
        if chunk.outputs:
            stacks = jax.device_get(handed)
            for index, step, device, slot in chunk.outputs:
                part = jax.tree.map(lambda leaf, place=device * slots + slot: leaf[place].copy(), stacks)
                yield self._tuned(index, step, part)

    def _tuned(self, index: int, step: int, part: Slice) -> Tuned:
        job, losses = self.jobs[index], self.losses[index][:step]
        if step == job.steps:
            del self.losses[index]
        broken = np.flatnonzero(~np.isfinite(losses)).tolist()
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(part)):
            broken.append(step)
        loss = float(losses[-job.steps_of(1) :].mean())
        return Tuned(job, step, part, loss, broken[0] if broken else None, float(self.seconds[index]))
