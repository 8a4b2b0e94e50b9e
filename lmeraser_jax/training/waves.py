"""Waves: how the processes of a command share slices and features.

Process 0 deals the slices of a wave, longest first, and broadcasts them; each process computes its share on its local
devices, so bits do not depend on the number of processes; an exchange ends the wave. With one process nothing is sent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training import multihost
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.lanes import pack
from lmeraser_jax.training.multihost import Processes
from lmeraser_jax.training.slices import as_slice
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.tune import Tuned

WAVE = 4  # jobs for each lane of all processes in one wave
TuneOwn = Callable[[Sequence[Job]], Iterator[Tuned]]


def make_slices(
    processes: Processes,
    context: Mapping[str, Any],
    tuning_spec: TuningSpec,
    jobs: Sequence[Job],
    labels: np.ndarray,
    tune_own: TuneOwn,
) -> Iterator[Tuned]:
    """Makes slices by all processes, in waves. Called at process 0; the others call `do_share`.

    `tune_own` makes the slices of some jobs on this process's devices (`tune.make_slices`); from the JSON values of
    `context` the other processes find theirs. `labels` int32 [N] are those of all image rows. Raises `Stopped` where a
    process was asked to stop; what all had finished was yielded before.
    """
    if processes.count == 1 or tuning_spec.tuning.closed:
        yield from tune_own(jobs)
        return
    size = WAVE * tuning_spec.tuning.lanes * jax.local_device_count() * processes.count
    longest_first = sorted(jobs, key=lambda job: -job.steps)
    for start in range(0, len(jobs), size):
        wave = longest_first[start : start + size]
        shares = pack([job.steps for job in wave], processes.count)
        facts = [[job.key, len(job.rows), job.epochs, job.batch, job.snapshots] for job in wave]
        rows = np.concatenate([job.rows for job in wave])
        multihost.broadcast(
            {"name": "slices", **context, "jobs": facts, "shares": shares}, {"rows": rows, "labels": labels[rows]}
        )
        yield from do_share(processes, shares, tuning_spec, wave, tune_own)


def jobs_of(task: Mapping[str, Any], rows: np.ndarray) -> list[Job]:
    """The jobs of a wave, at a process that received them; `rows` int32 are those of all jobs, in their order."""
    members = np.split(rows, np.cumsum([size for _, size, *_ in task["jobs"]])[:-1])
    return [
        Job(key, own, epochs, batch, tuple(snapshots))
        for (key, _, epochs, batch, snapshots), own in zip(task["jobs"], members, strict=True)
    ]


def do_share(
    processes: Processes,
    shares: Sequence[Sequence[int]],
    tuning_spec: TuningSpec,
    wave: Sequence[Job],
    tune_own: TuneOwn,
) -> Iterator[Tuned]:
    """Makes this process's share of a wave, then yields what all processes have finished. Raises as `make_slices`."""
    finished, stopped = [], False
    try:
        for tuned in tune_own([wave[position] for position in shares[processes.index]]):
            finished.append(tuned)
    except Stopped:
        stopped = True
    place = {id(job): position for position, job in enumerate(wave)}
    numbers = [
        [place[id(t.job)], t.step, t.loss, -1 if t.failed_at is None else t.failed_at, t.seconds] for t in finished
    ]
    own = {"stopped": np.array(stopped), "numbers": np.array(numbers, np.float64).reshape(-1, 5)}
    for i, tuned in enumerate(finished):
        own |= {f"{i}/{name}": leaf for name, leaf in flatten(tuned.slice).items()}
    results = multihost.exchange(own)
    for arrays in results:
        for i, (position, step, loss, failed_at, seconds) in enumerate(arrays["numbers"].tolist()):
            leaves = {name.partition("/")[2]: leaf for name, leaf in arrays.items() if name.startswith(f"{i}/")}
            job = wave[int(position)]
            slice_ = as_slice(leaves, job.key[:12], tuning_spec.own_parameters)
            yield Tuned(job, int(step), slice_, loss, None if failed_at < 0 else int(failed_at), seconds)
    if any(arrays["stopped"] for arrays in results):
        raise Stopped


def extract(
    processes: Processes, context: Mapping[str, Any], rows: np.ndarray, extract_own: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Features of image rows int64 [k], computed by all processes: float32 [k, D]. Called at process 0.

    Raises `Stopped` where a process was asked to stop.
    """
    if processes.count == 1:
        return extract_own(rows)
    multihost.broadcast({"name": "features", **context}, {"rows": rows})
    return extract_share(processes, rows, extract_own)


def extract_share(
    processes: Processes, rows: np.ndarray, extract_own: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Computes this process's share of some features, then returns those of all rows, at every process."""
    own, stopped = np.zeros((0, 0), np.float32), False
    try:
        own = extract_own(np.array_split(rows, processes.count)[processes.index])
    except Stopped:
        stopped = True
    results = multihost.exchange({"features": own, "stopped": np.array(stopped)})
    if any(arrays["stopped"] for arrays in results):
        raise Stopped
    return np.concatenate([arrays["features"] for arrays in results])
