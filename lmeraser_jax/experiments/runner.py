"""A comparison from beginning to end: a base workdir, the tasks one by one, rows on disk after each."""

import collections
import dataclasses
import datetime
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmeraser_jax import __version__
from lmeraser_jax import config as settings
from lmeraser_jax.config import Config, parse_cut
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.experiments import sequences
from lmeraser_jax.experiments.measure import EXPERIMENTS, MONTAGE, Plan, Task, rows, tasks
from lmeraser_jax.experiments.methods import Method
from lmeraser_jax.experiments.results import NOTE, Done, Measurement, Results, bound, load_done, save
from lmeraser_jax.storage.atomic_files import write_bytes
from lmeraser_jax.storage.ingest import import_settings
from lmeraser_jax.training import clustering
from lmeraser_jax.unlearning.run import Run, prepare_run


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
        """The workdir that those of a seed begin as; one for all where neither backbone nor records depend on it."""
        bound = not self.config.backbone.weights or "seed" in import_settings(self.config)
        return self.folder / (f"base_{seed}" if bound else "base")

    def tuned(self, task: Task) -> Path:
        """What several tasks that tune the same begin as, as long as there are such."""
        return self.folder / f"tuned_{task.tunes}"

    def rows_of(self, task: Task) -> Path:
        return self.folder / "rows" / f"{task.name}.json"


def check(comparison: Comparison) -> None:
    """Refuses what cannot work before anything is done.

    Raises:
        UserError: names every unknown experiment, cut or kind of sequence, every method that does not go with the
            config or with an experiment, and settings other than those that the folder's rows were made with.
    """
    plan, problems = comparison.plan, []
    for flag, given, legal in (
        ("experiments", comparison.experiments, tuple(EXPERIMENTS)),
        ("sequences", plan.sequences, tuple(sequences.KINDS)),
    ):
        unknown = [name for name in given if name not in legal]
        problems += [f"--{flag}: {join_limited(unknown)} unknown; legal: {', '.join(legal)}"] if unknown else []
    for flag in ("methods", "experiments"):
        if not getattr(comparison, flag):
            problems.append(f"--{flag}: name at least one")
    for text in plan.cuts:
        try:
            parse_cut(text)
        except ValueError:
            problems.append(f"--cuts={text}: must be a distance of 0 or more, or auto:K with K >= 1")
    if "cut" in comparison.experiments and not plan.cuts:
        problems.append("--cuts is missing: the values of clustering.cut to try, such as auto:5,auto:10,auto:20")
    if plan.split not in ("test", "holdout"):
        problems.append(f"--split={plan.split}: must be test or holdout")
    if plan.split == "holdout" and not (comparison.config.data.holdout or comparison.config.data.holdout_split):
        problems.append("--split=holdout: there is none; set --config.data.holdout, the share that is held out")
    for name, count in collections.Counter(method.name for method in comparison.methods).items():
        if count > 1:
            problems.append(f"--methods: {count} methods are called {name}; a file's name is its method's")
    for method in comparison.methods:
        try:
            problems += _senseless(method, method.of(comparison.config), comparison.experiments)
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    _same_as_before(comparison)


def _senseless(method: Method, config: Config, experiments: Sequence[str]) -> Iterator[str]:
    """Experiments that say nothing about a method."""
    if "cut" in experiments and config.clustering.partition != "adaptive":
        yield f"--experiments=cut: {method.name} cuts no tree; its partition is {config.clustering.partition}"
    if "epochs" in experiments and config.tuning.closed:
        yield f"--experiments=epochs: {method.name} has a closed form and no epochs"


def _same_as_before(comparison: Comparison) -> None:
    """Rows of other settings must not stand beside new ones."""
    before = bound(comparison.folder)
    if before is not None and _any_row(comparison):
        found = settings.differences(before, _binding(comparison))
        lines = [f"--{line.removeprefix('plan.')}" for line in found]  # each names the flag to change
        raise_all(
            lines, f"{comparison.folder} compares with other settings; name another --workdir or drop:" * bool(lines)
        )
    elif before is None and comparison.folder.is_dir() and any(comparison.folder.iterdir()):
        raise UserError(
            f"--workdir={comparison.folder} holds other files and no comparison; name a new or an empty folder"
        )
    paths = {task: comparison.rows_of(task) for task in comparison.tasks}
    stale = [path for task, path in paths.items() if path.is_file() and load_done(path).settings != task.settings]
    what = "made by a method of the same name with other settings; delete them, or give the method's file another name:"
    raise_all([f"{what} {join_limited([str(path) for path in stale])}"] if stale else [])


def _any_row(comparison: Comparison) -> bool:
    return any((comparison.folder / "rows").glob("*.json"))


def _binding(comparison: Comparison) -> dict[str, Any]:
    plan = dataclasses.asdict(comparison.plan)
    for name in ("cuts", "sequences", "montage"):  # more of them are more tasks; no number depends on the picture
        del plan[name]
    return {"config": settings.to_dict(comparison.config), "plan": plan}


def compare(comparison: Comparison, command: str) -> Results:
    """Does what is not done yet; every row so far is in results.json at any time.

    Raises:
        UserError: see `check`; or data with too few records for a shard or a class.
        Stopped: the process was asked to stop; the same command carries on.
    """
    check(comparison)
    _begin(comparison)
    every = comparison.tasks
    waiting = [task for task in every if not comparison.rows_of(task).is_file()]
    to_come = collections.Counter(task.tunes for task in waiting)
    _make_bases(comparison, waiting)
    for number, task in enumerate(waiting, 1 + len(every) - len(waiting)):
        base, start = comparison.base(task.seed), time.perf_counter()
        folder, tuned = comparison.folder / task.name, comparison.tuned(task)
        found = rows(task, comparison.plan, base, folder, tuned if tuned.exists() or to_come[task.tunes] > 1 else None)
        Done(task.settings, _source(command), tuple(found)).save(comparison.rows_of(task))
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


def _begin(comparison: Comparison) -> None:
    """Notes what is compared; what an earlier try without a row was about is forgotten."""
    folder, note = comparison.folder, comparison.folder / NOTE
    now = json.dumps(_binding(comparison), indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made: {error.strerror}") from error
    if note.is_file() and not _any_row(comparison) and note.read_text("utf-8") != now:
        (folder / MONTAGE).unlink(missing_ok=True)
        for pattern in ("*base*", "*tuned_*", ".*.copy", *(f"{name}_*" for name in EXPERIMENTS)):
            for path in folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
    write_bytes(note, now.encode())


def collected(comparison: Comparison, command: str) -> Results:
    """The rows that are on disk, of all tasks that were ever done in the folder, in the order of their names."""
    done = [load_done(path) for path in sorted((comparison.folder / "rows").glob("*.json"))]
    rows_ = tuple(dataclasses.replace(row, source=one.name) for one in done for row in one.rows)
    return Results(rows_, command, machine(), {one.name: one.source for one in done})


def _source(command: str) -> dict[str, str]:
    """Where rows come from that are made now."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": command, "machine": machine(), "version": __version__, "date": today}


def machine() -> str:
    """The device and the libraries, for people."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return (
        f"{len(jax.devices())} x {device.device_kind}{cores}, jax {jax.__version__}, Python {platform.python_version()}"
    )


def merged(results: Results, others: Mapping[str, Results]) -> Results:
    """Results with the rows of other comparisons, {folder: results}; of a point in several the first one's row.

    Raises:
        UserError: two of them say different things about the same point, time apart.
    """
    rows_, clashes = {row.point: row for row in results.rows}, []
    for folder, row in ((folder, row) for folder, one in others.items() for row in one.rows):
        if _timeless(rows_.setdefault(row.point, row)) != _timeless(row):
            clashes.append(f"{folder}: {row.experiment} of {row.method}, {row.dataset}, seed {row.seed}")
    what = "--merge: measured in another of these folders as well, with different results; leave one of them out: "
    raise_all([what + join_limited(sorted(set(clashes)))] if clashes else [])
    sources = {name: source for one in (*others.values(), results) for name, source in one.sources.items()}
    return dataclasses.replace(results, rows=tuple(rows_.values()), sources=sources)


def _timeless(row: Measurement) -> Measurement:
    """A row without what differs from run to run."""
    seconds = ("seconds_full", "seconds_request", "seconds_unsampled", "seconds_sampled")
    return dataclasses.replace(row, source="", **dict.fromkeys(seconds, 0.0))


def _make_base(folder: Path, config: Config) -> None:
    """Images, backbone and features, once; a folder under another name until it is whole."""
    if folder.exists():
        return
    making = folder.with_name(f"making_{folder.name}")
    with prepare_run(making, config) as (run, _):
        run.features(run.catalog.live("train"))
    making.rename(folder)


def _make_bases(comparison: Comparison, waiting: Sequence[Task]) -> None:
    """Makes what the tasks begin as, and looks whether every task has enough records, before the first is done."""
    problems = []
    for seed in sorted({task.seed for task in waiting}):
        base, config = comparison.base(seed), dataclasses.replace(comparison.config, seed=seed)
        _make_base(base, config)
        with prepare_run(base, config) as (run, _):
            if not len(run.catalog.live(comparison.plan.split)):
                split = comparison.plan.split
                hint = (
                    "--config.data.holdout or holdout_split must leave some" if split == "holdout" else "use more data"
                )
                problems.append(f"--split={split}: no image of seed {seed} is in it; {hint}")
            for task in {task.method.name: task for task in waiting if task.seed == seed}.values():
                problems += _too_few(run, task)
    raise_all(list(dict.fromkeys(problems)))


def _too_few(run: Run, task: Task) -> list[str]:
    """Classes and shards that get too few training records."""
    records, k = run.catalog.live("train"), task.config.clustering
    counts = np.bincount(records.labels, minlength=len(run.classes))
    have = f"{len(records)} training records are too few:"
    few = [
        f"{have} class {run.classes[label]} has {counts[label]} of them, must have 2; use more data"
        for label in np.flatnonzero(counts < 2)
    ]
    if k.partition == "random":
        sizes = np.bincount(clustering.shard_of(records.ids, k.shards, task.seed), minlength=k.shards)
        empty = np.flatnonzero(sizes == 0)
        few += [
            f"{have} of {k.shards} shards {len(empty)} get none with seed {task.seed} (shard"
            f" {join_limited(empty)}), which {task.method.name} cannot do with; use more"
            " data or fewer --config.clustering.shards"
        ] * bool(len(empty))
    return few
