"""A comparison from beginning to end: a base workdir, the tasks one by one, rows on disk after each."""

import collections
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmeraser_jax import clustering
from lmeraser_jax import config as settings
from lmeraser_jax.comparison import sequences
from lmeraser_jax.comparison.experiments import EXPERIMENTS, Plan, Task, rows, tasks
from lmeraser_jax.comparison.measurement import Results, load_rows, save
from lmeraser_jax.config import Config
from lmeraser_jax.errors import UserError, raise_all, some
from lmeraser_jax.legality import cut_of
from lmeraser_jax.methods import Method
from lmeraser_jax.run import Run, prepared
from lmeraser_jax.store.layout import write_json


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What to compare, where.

    Attributes:
        folder: everything goes here.
        config: of the experiment, without any method's changes.
        methods, seeds, experiments: every one with every other.
        plan: what is measured of each.
        keep: keep the workdirs; else each goes when its rows are on disk.
    """

    folder: Path
    config: Config
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    experiments: tuple[str, ...]
    plan: Plan
    keep: bool = False

    @property
    def tasks(self) -> list[Task]:
        every = [(e, m, s) for s in self.seeds for e in self.experiments for m in self.methods]
        return [task for e, m, s in every for task in tasks(e, m, s, self.config, self.plan)]

    def base(self, seed: int) -> Path:
        """The workdir that those of a seed begin as; one for all seeds where the backbone is not trained here."""
        return self.folder / ("base" if self.config.backbone.weights else f"base_{seed}")

    def tuned(self, task: Task) -> Path:
        """What several tasks that tune the same begin as, as long as there are such."""
        return self.folder / f"tuned_{task.tunes}"

    def rows_of(self, task: Task) -> Path:
        return self.folder / "rows" / f"{task.name}.json"


def check(comparison: Comparison) -> None:
    """Refuses what cannot work before anything is done.

    Raises:
        UserError: names every unknown experiment, cut or kind of sequence, every method that does not go with the
            config, and settings other than those that the folder's rows were made with.
    """
    plan, problems = comparison.plan, []
    for flag, given, legal in (
        ("experiments", comparison.experiments, tuple(EXPERIMENTS)),
        ("sequences", plan.sequences, tuple(sequences.KINDS)),
    ):
        unknown = [name for name in given if name not in legal]
        problems += [f"--{flag}: {some(unknown)} unknown; legal: {', '.join(legal)}"] if unknown else []
    if not comparison.methods:
        problems.append("--methods: name at least one")
    for text in plan.cuts:
        try:
            cut_of(text)
        except ValueError:
            problems.append(f"--cuts={text}: must be a distance of 0 or more, or auto:K with K >= 1")
    if "cut" in comparison.experiments and not plan.cuts:
        problems.append("--cuts is missing: the values of clustering.cut to try, such as auto:5,auto:10,auto:20")
    for method in comparison.methods:
        try:
            method.of(comparison.config)
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    _same_as_before(comparison)


def _same_as_before(comparison: Comparison) -> None:
    """Rows of other settings must not stand beside new ones."""
    path, now = comparison.folder / "comparison.json", _binding(comparison)
    if path.is_file():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); name another --workdir") from error
        lines = settings.differences(before, now)
        raise_all(
            lines, f"{comparison.folder} compares with other settings; name another --workdir or drop:" * bool(lines)
        )
    elif comparison.folder.is_dir() and any(comparison.folder.iterdir()):
        raise UserError(
            f"--workdir={comparison.folder} holds other files and no comparison; name a new or an empty folder"
        )


def _binding(comparison: Comparison) -> dict[str, Any]:
    plan = dataclasses.asdict(comparison.plan)
    for name in ("cuts", "sequences", "montage"):  # more of them are more tasks, and a picture is no number
        del plan[name]
    return {"config": settings.to_dict(comparison.config), "plan": plan}


def compare(comparison: Comparison, command: str) -> Results:
    """Does what is not done yet; every row so far is in results.json at any time.

    Raises:
        UserError: see `check`; or data with too few records for a shard or a class.
        Stopped: the process was asked to stop; the same command carries on.
    """
    check(comparison)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    write_json(comparison.folder / "comparison.json", _binding(comparison))
    every = comparison.tasks
    waiting = [task for task in every if not comparison.rows_of(task).is_file()]
    to_come = collections.Counter(task.tunes for task in waiting)
    for number, task in enumerate(waiting, 1 + len(every) - len(waiting)):
        base, start = comparison.base(task.seed), time.perf_counter()
        _make_base(base, dataclasses.replace(comparison.config, seed=task.seed))
        with prepared(base, dataclasses.replace(comparison.config, seed=task.seed)) as (run, _):
            _enough(run, task)
        folder, tuned = comparison.folder / task.name, comparison.tuned(task)
        found = rows(task, comparison.plan, base, folder, tuned if tuned.exists() or to_come[task.tunes] > 1 else None)
        write_json(comparison.rows_of(task), [dataclasses.asdict(row) for row in found])
        to_come[task.tunes] -= 1
        for path in [folder] * (not comparison.keep) + [tuned] * (not to_come[task.tunes]):
            shutil.rmtree(path, ignore_errors=True)
        spent = time.perf_counter() - start
        what = f"accuracy {found[-1].accuracy:.4f}, {spent:.0f} s"
        print(f"[{number}/{len(every)}] {task.name.replace('_', ' ')}: {what}", file=sys.stderr, flush=True)
        save(comparison.folder, collected(comparison, command))
    for path in comparison.folder.glob("tuned_*"):  # of an interrupted run that had more to do
        shutil.rmtree(path, ignore_errors=True)
    results = collected(comparison, command)
    save(comparison.folder, results)
    return results


def collected(comparison: Comparison, command: str) -> Results:
    """The rows that are on disk, of all tasks that were ever done in the folder, in the order of their names."""
    paths = sorted((comparison.folder / "rows").glob("*.json"))
    return Results(tuple(row for path in paths for row in load_rows(path)), command, machine())


def machine() -> str:
    """The device and the libraries, for people."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return (
        f"{len(jax.devices())} x {device.device_kind}{cores}, jax {jax.__version__}, Python {platform.python_version()}"
    )


def merged(results: Results, others: Sequence[Results]) -> Results:
    """Results with the rows of other comparisons."""
    rows_ = {row.point: row for one in (*others, results) for row in one.rows}
    return dataclasses.replace(results, rows=tuple(rows_.values()))


def _make_base(folder: Path, config: Config) -> None:
    """Images, backbone and features, once; a folder under another name until it is whole."""
    if folder.exists():
        return
    making = folder.with_name(f"making_{folder.name}")
    with prepared(making, config) as (run, _):
        run.features(run.catalog.live("train"))
    making.rename(folder)


def _enough(run: Run, task: Task) -> None:
    """Refuses data with a class or a shard that gets too few training records."""
    records, k = run.catalog.live("train"), task.config.clustering
    counts = np.bincount(records.labels, minlength=len(run.classes))
    few = [f"class {run.classes[label]}: {counts[label]} training records" for label in np.flatnonzero(counts < 2)]
    if k.partition == "random":
        sizes = np.bincount(clustering.shard_of(records.ids, k.shards, task.seed), minlength=k.shards)
        few += [f"shard {shard} of {k.shards}: no record" for shard in np.flatnonzero(sizes == 0)]
    what = f"{len(records)} training records are too few for the method {task.method.name}, seed {task.seed};"
    raise_all(few, f"{what} use more data or fewer --config.clustering.shards:" if few else "")
