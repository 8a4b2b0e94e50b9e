"""A comparison from beginning to end: base workdirs, the tasks one after the other, rows on disk after each."""

import collections
import dataclasses
import datetime
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lmeraser_jax import __version__
from lmeraser_jax.config import Config
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.experiments import results
from lmeraser_jax.experiments.comparison import EXPERIMENTS, Comparison, Task, binding_of, check, has_rows
from lmeraser_jax.experiments.measure import run_task
from lmeraser_jax.experiments.results import FinishedTask, Results
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.training import clustering
from lmeraser_jax.unlearning.run import Run, open_run, prepare_run


def compare(comparison: Comparison, command: str) -> Results:
    """Does the tasks that are not done yet; results.json holds every finished task's rows at any time.

    Raises `UserError` as `check` does and for data with too few records for a shard or a class; and `Stopped`, after
    which the same command carries on.
    """
    tasks, waiting = comparison.tasks, prepare(comparison)
    _refuse_few_records(comparison, waiting)
    to_come = collections.Counter(task.tuning_digest for task in waiting)
    for number, task in enumerate(waiting, 1 + len(tasks) - len(waiting)):
        start, folder, tuned = time.perf_counter(), comparison.folder / task.name, comparison.tuned(task)
        shared = tuned if tuned.exists() or to_come[task.tuning_digest] > 1 else None
        rows = run_task(task, comparison.options, comparison.base(task.seed), folder, shared)
        finished = FinishedTask(task.settings, source_of(command), tuple(rows))
        write_json(comparison.rows_file(task), dataclasses.asdict(finished))
        to_come[task.tuning_digest] -= 1
        shutil.rmtree(folder, ignore_errors=True)
        if not to_come[task.tuning_digest]:
            shutil.rmtree(tuned, ignore_errors=True)
        seconds = time.perf_counter() - start
        name = f"[{number}/{len(tasks)}] {task.name.replace('_', ' ')}"
        print(f"{name}: accuracy {rows[-1].accuracy:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        results.save(comparison.folder, results.collect(comparison.folder))
    _remove(comparison.folder, "tuned_*")  # of an interrupted command that had more tasks
    return results.collect(comparison.folder)


def prepare(comparison: Comparison) -> list[Task]:
    """Makes the workdirs that the tasks begin as. Returns the tasks that are not done yet; raises as `check` does."""
    check(comparison)
    _bind(comparison)
    waiting = [task for task in comparison.tasks if not comparison.rows_file(task).is_file()]
    for seed in sorted({task.seed for task in waiting}):
        _make_base(comparison.base(seed), dataclasses.replace(comparison.config, seed=seed))
    return waiting


def _remove(folder: Path, *patterns: str) -> None:
    """Removes the folders in a folder that match a pattern."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _bind(comparison: Comparison) -> None:
    """Writes what is compared; removes what an earlier try left that finished no task and had other settings."""
    folder, path, binding = comparison.folder, comparison.folder / results.BINDING, binding_of(comparison)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made: {error.strerror}") from error
    if not has_rows(comparison) and results.read_binding(folder) not in (None, binding):
        _remove(folder, "*base*", "*tuned_*", ".*.copy", *(f"{name}_*" for name in EXPERIMENTS))
    write_json(path, binding)


def source_of(command: str) -> dict[str, str]:
    """Where the rows come from that are made now: the command, the devices and the libraries, the day."""
    devices, today = jax.devices(), datetime.datetime.now(datetime.UTC).date().isoformat()
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    machine = f"{len(devices)} x {devices[0].device_kind}{cores}, jax {jax.__version__}"
    machine += f", Python {platform.python_version()}"
    return {"command": command, "machine": machine, "version": __version__, "date": today}


def _refuse_few_records(comparison: Comparison, waiting: Sequence[Task]) -> None:
    """Refuses data that are too few for a task."""
    split, problems = comparison.options.split, []
    for seed in sorted({task.seed for task in waiting}):
        with open_run(comparison.base(seed)) as run:
            if not len(run.catalog.live(split)):
                holdout = "--config.data.holdout or holdout_split must leave some"
                remedy = holdout if split == "holdout" else "use more data"
                problems.append(f"--split={split}: no image of seed {seed} is in it; {remedy}")
            for task in {task.method.name: task for task in waiting if task.seed == seed}.values():
                problems += _too_few_records(run, task)
    raise_all(list(dict.fromkeys(problems)))


def _make_base(folder: Path, config: Config) -> None:
    """Imports images, makes the backbone and computes features, under another name until the workdir is whole."""
    if not folder.exists():
        partial = folder.with_name(f"making_{folder.name}")
        with prepare_run(partial, config) as (run, _):
            run.features(run.catalog.live("train"))
        partial.rename(folder)


def _too_few_records(run: Run, task: Task) -> list[str]:
    """Classes and shards that get too few training records."""
    records, shards = run.catalog.live("train"), task.config.clustering.shards
    prefix = f"{len(records)} training records are too few:"
    counts = np.bincount(records.labels, minlength=len(run.classes))
    few = [f"{run.classes[label]} ({counts[label]})" for label in np.flatnonzero(counts < 2)]
    remedy = "use more data, or of every class its share with --config.data.limit_by=class"
    problems = [f"{prefix} each class must have 2, {len(few)} have not: {join_limited(few)}; {remedy}"] if few else []
    if task.config.clustering.partition == "random":
        empty = sorted(set(range(shards)).difference(clustering.shard_of(records.ids, shards, task.seed).tolist()))
        if empty:
            problems.append(
                f"{prefix} of {shards} shards {len(empty)} get none with seed {task.seed} (shard"
                f" {join_limited(empty)}), but {task.method.name} needs one in each; use more data or fewer"
                " --config.clustering.shards"
            )
    return problems
