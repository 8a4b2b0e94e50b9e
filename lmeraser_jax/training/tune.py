"""The tuning loop: jobs go in, finished slices, snapshots, losses and times come out.

Every call of the compiled program (`train_step`) works on as many steps as fit; its results are fetched one call late,
so that the device never waits for the host. Slices with a closed form are computed here without the program.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax import interrupt
from lmeraser_jax.data.text_rows import HEADER
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training import closed_form, profiling
from lmeraser_jax.training.closed_form import KeptSums
from lmeraser_jax.training.features import compute_dtype, network_inputs, on_device
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.lanes import StepBatch, step_batches
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.train_step import Batch, compiled, initial_state


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A job's slice at its end, or at one of its snapshots."""

    job: Job
    step: int  # steps made
    slice: Slice  # float32 arrays on the host
    loss: float  # mean over the last epoch until then
    failed_at: int | None  # step at which the loss or the slice was no longer finite
    seconds: float  # of device time: the job's share until the call that handed the slice over was done
    sums: KeptSums | None = None  # what a closed form was computed from, where it is to be kept

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

    def collect(self, call: StepBatch, handed: Slice, losses: jax.Array, slots: int) -> Iterator[Tuned]:
        """Waits for a call's results; yields the slices that it handed over."""
        values, job = np.asarray(losses)[: call.steps], call.job[: call.steps]
        busy, now = job >= 0, time.perf_counter()
        elapsed, self.since = now - self.since, now
        for index in np.unique(job[busy]).tolist():
            here = job == index
            self.seconds[index] += elapsed * self.devices * here.sum() / busy.sum()
            known = self.losses.setdefault(index, np.zeros(self.jobs[index].steps))
            known[call.step[: call.steps][here]] = values[here]
        self.last_loss = float(values[busy].mean())
        if call.outputs:
            stacks = jax.device_get(handed)
            for index, step, device, slot in call.outputs:
                slice_ = jax.tree.map(lambda leaf, place=device * slots + slot: leaf[place].copy(), stacks)
                yield self._tuned(index, step, slice_)

    def _tuned(self, index: int, step: int, slice_: Slice) -> Tuned:
        job, losses = self.jobs[index], self.losses[index][:step]
        if step == job.steps:
            del self.losses[index]
        broken = np.flatnonzero(~np.isfinite(losses)).tolist()
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slice_)):
            broken.append(step)
        loss = float(losses[-job.steps_of(1) :].mean())
        return Tuned(job, step, slice_, loss, broken[0] if broken else None, float(self.seconds[index]))


def make_slices(
    tuning_spec: TuningSpec, backbone: Backbone, jobs: Sequence[Job], inputs: np.ndarray, labels: np.ndarray, mesh: Mesh
) -> Iterator[Tuned]:
    """Makes slices, by the tuning program or by a formula. Yields each as it finishes, and its snapshots before it.

    The jobs' rows point into `inputs` on the host, which may be a memory map: images uint8 [N, h, w, c], text int32
    [N, 2 + T] or, where `tuning_spec.on_features`, features float32 [N, D]; and into `labels` int32 [N]. `mesh` is a
    1-D one of this process's devices.

    Raises:
        Stopped: the process was asked to stop; what its calls have finished was yielded before.
    """
    tuning = tuning_spec.tuning
    if tuning.closed:
        yield from _solve(tuning_spec, jobs, inputs, labels)
        return
    if not jobs:
        return
    params = on_device(backbone, compute_dtype(tuning.dtype, mesh), mesh)
    program, state = compiled(tuning_spec, mesh), initial_state(tuning_spec, mesh)
    data = _Inputs(tuning_spec, params, jobs, inputs, labels, mesh)
    tracker = Tracker(jobs, mesh.size)
    with progress("tune", sum(job.steps for job in jobs)) as bar, profiling.Trace() as trace:
        pending = None  # the call whose results were not fetched yet

        def fetch() -> Iterator[Tuned]:
            if pending is not None:
                yield from tracker.collect(*pending, tuning_spec.slots)
                bar.advance(int((pending[0].job >= 0).sum()), f"loss {tracker.last_loss:.3f}")

        for call in step_batches(jobs, mesh.size, tuning, tuning_spec.slots, tuning_spec.seed):
            if interrupt.stop_requested():
                break
            trace.next_call()
            images, targets, rows = data.of(call)
            work = Batch(rows, call.valid, call.seed_words, call.step, call.total, call.slot)
            state, handed, losses = program(params, images, targets, np.int32(call.steps), state, work)
            checkpoints.import_writer()  # while the devices work
            yield from fetch()
            pending = (call, handed, losses)
        yield from fetch()
        interrupt.raise_if_stopped()


def _solve(tuning_spec: TuningSpec, jobs: Sequence[Job], features: np.ndarray, labels: np.ndarray) -> Iterator[Tuned]:
    """Closed forms. Where they can be, their sums are kept too, so that an erasure is a subtraction."""
    tuning = tuning_spec.tuning
    with progress("solve", len(jobs)) as bar:
        for job in jobs:
            start = time.perf_counter()
            members, targets = features[job.rows], labels[job.rows]
            if not closed_form.has_sums(tuning) or len(job.rows) < closed_form.KEPT_FROM:
                slice_, loss = closed_form.solve_members(tuning, members, targets, tuning_spec.classes)
                yield solved(job, slice_, loss, start)
            else:
                sums = closed_form.keep_sums(members, targets, job.rows, tuning_spec.classes)
                yield solved(job, *closed_form.solve(tuning, sums.total), start, sums)
            bar.advance(1)


def solved(job: Job, slice_: Slice, loss: float, start: float, sums: KeptSums | None = None) -> Tuned:
    """The result of a closed form whose computation began at `start`, a time of `time.perf_counter`."""
    finite = all(np.isfinite(leaf).all() for leaf in (slice_.kernel, slice_.bias))
    return Tuned(job, job.steps, slice_, loss, None if finite else 0, time.perf_counter() - start, sums)


class _Inputs:
    """What a call reads: all images or rows of text on the device when they fit, else the call's own."""

    def __init__(
        self,
        tuning_spec: TuningSpec,
        params: Any,
        jobs: Sequence[Job],
        images: np.ndarray,
        labels: np.ndarray,
        mesh: Mesh,
    ):
        self.images, self.labels, self.everywhere = images, labels, NamedSharding(mesh, P())
        self.spec, self.params, self.mesh = tuning_spec, params, mesh
        size, row_bytes = bucket(len(images)), images[0].nbytes
        if tuning_spec.prefix:
            dtype = jax.tree.leaves(params)[0].dtype
            row_bytes += (images.shape[1] - HEADER) * tuning_spec.architecture.feature_size * dtype.itemsize
        self.resident = None
        if size * row_bytes <= tuning_spec.tuning.device_bytes:
            full, targets = np.zeros((size, *images.shape[1:]), images.dtype), np.zeros(size, np.int32)
            full[: len(images)], targets[: len(images)] = _known(images), labels
            used = np.unique(np.concatenate([job.rows for job in jobs]))
            inputs = network_inputs(tuning_spec, params, full, used, mesh)
            self.resident = jax.device_put((inputs, targets), self.everywhere)

    def of(self, call: StepBatch) -> tuple[Any, Any, np.ndarray]:
        """(inputs, labels, rows into them) for one call."""
        if self.resident is not None:
            return *self.resident, call.rows
        window = call.rows.reshape(-1)
        rows = _known(self.images[window])
        inputs = network_inputs(self.spec, self.params, rows, np.arange(len(window)), self.mesh)
        inputs, targets = jax.device_put((inputs, self.labels[window]), self.everywhere)
        return inputs, targets, np.arange(len(window), dtype=np.int32).reshape(call.rows.shape)


def _known(values: np.ndarray) -> np.ndarray:
    """Zeros for features that nobody needs and that were not computed; a lane that idles must not read NaN."""
    return np.nan_to_num(values) if values.dtype == np.float32 else values


def bucket(count: int) -> int:
    """A size of at least `count`, at most an eighth above it: data sets of nearly one size share a program."""
    step = max(256, 1 << max(count.bit_length() - 4, 0))
    return -(-max(count, 1) // step) * step
