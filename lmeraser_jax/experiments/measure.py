"""The experiments of a comparison. Each takes a workdir of its own and yields its rows in order.

A workdir begins as a copy of one that has images and a backbone and no slice yet. An interrupted task carries on:
slices that exist are not tuned again.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.evaluation import overview
from lmeraser_jax.evaluation.accuracy import best_weight, evaluate, with_weight
from lmeraser_jax.evaluation.predict import Predictions, load_model, predict, with_slices
from lmeraser_jax.experiments import sequences
from lmeraser_jax.experiments.comparison import Options, Task
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.rows import SliceKind, SliceRow
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_slice, reference
from lmeraser_jax.unlearning.build import BuildReport, build
from lmeraser_jax.unlearning.plan import current_plan, sampled
from lmeraser_jax.unlearning.run import Run, prepare_run

REMOVED_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the records (paper Fig. 6, left)


def run_task(task: Task, options: Options, base: Path, folder: Path, tuned: Path | None = None) -> list[Measurement]:
    """Does a task in the workdir `folder` and returns its rows; an interrupted try carries on there.

    It begins as a copy of `base`, which has images and a backbone, or of `tuned`, which later tasks with the same
    `tuning_digest` begin as, too; that is made here if it is missing.
    """
    if folder.exists():
        with prepare_run(folder, task.config, retune=True) as (run, _):
            has_requests = bool(requests.listed(run.catalog))
        if has_requests:  # interrupted after its first erasure; the state before that is to be measured
            shutil.rmtree(folder)
    if not folder.exists():
        _copy(tuned if tuned is not None and tuned.exists() else base, folder)
    with prepare_run(folder, task.config, retune=True) as (run, _):  # the shared workdir has another common head
        build(run)
    if tuned is not None and not tuned.exists():
        _copy(folder, tuned)
    with prepare_run(folder, task.config) as (run, _):
        return list(EXPERIMENTS[task.experiment](run, task, options))


def _copy(source: Path, target: Path) -> None:
    """Copies a workdir; the target exists completely or not at all."""
    partial = target.with_name(f".{target.name}.copy")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def _measure(run: Run, task: Task, options: Options, answers: Predictions | None = None, **point: Any) -> Measurement:
    """A row of the published state, or of other answers, at a point of the experiment, without costs of requests."""
    evaluation = evaluate(run, options.split, linear=False, answers=answers)
    shown, (per_cluster, common) = overview.overview(run.layout, run.catalog, run.config), _parameter_counts(run)
    return Measurement(
        experiment=task.experiment,
        dataset=options.dataset,
        backbone=options.backbone,
        method=task.method.name,
        seed=task.seed,
        records=shown.records["train"],
        clusters=len(shown.clusters),
        accuracy=evaluation.accuracy,
        balanced=evaluation.balanced,
        balanced_error=evaluation.balanced_error,
        common_weight=run.config.inference.common_weight if run.config.common.method != "none" else 0.0,
        majority=evaluation.majority,
        images_full=_passed(run, sum(row.images for row in run.catalog.slices().values())),
        parameters=per_cluster * len({cluster.slice for cluster in shown.clusters}) + common,
        expected_share=shown.expected_share,
        sampled_share=shown.sampled_share,
        tested=evaluation.images,
        passes=forward_passes(run, len(shown.clusters)),
        **point,
    )


def _passed(run: Run, images: int) -> int:
    """Images that pass through the backbone when slices are tuned on so many; heads on features pass none."""
    return 0 if run.tuning_spec.on_features else images


def methods(run: Run, task: Task, options: Options) -> Iterator[Measurement]:
    """Accuracy, and what a request costs: planned for many records, served for a few (Figs. 3, 7, Table 3)."""
    seconds_full, answers = full_tuning_seconds(run), None
    if options.by and run.config.common.method != "none":
        weight, answers = best_weight(run, options.split, options.by)
        run = with_weight(run, weight)
    row = _measure(run, task, options, answers)
    images, records, passed, parameters = planned_costs(run, options.probes).T
    always_full = row.images_full > 0 and images.min() > 0.999 * row.images_full * (1 - 1 / row.records)
    count = min(options.requests, 1) if always_full else options.requests  # such requests last long and are all alike
    unsampled, sampled_ = served_seconds(run, count)
    yield dataclasses.replace(
        row,
        seconds_full=seconds_full,
        images_request=float(images.mean()),
        images_worst=float(images.max()),
        records_request=float(records.mean()),
        share_request=float(passed.mean()) / row.records,
        parameters_request=float(parameters.mean()),
        seconds_request=(1 - row.sampled_share) * unsampled + row.sampled_share * sampled_,
        seconds_unsampled=unsampled,
        seconds_sampled=sampled_,
    )


def removal(run: Run, task: Task, options: Options) -> Iterator[Measurement]:
    """Accuracy while more and more records are erased (Fig. 6, left)."""
    ids = run.catalog.live("train").ids
    order, erased = philox(run.config.seed, "removal").permutation(len(ids)), 0
    yield _measure(run, task, options)
    for share in REMOVED_SHARES:
        end = round(share * len(ids))
        _erase(run, [ids[i] for i in order[erased:end]])
        erased = end
        yield _measure(run, task, options, x=share)


def cut(run: Run, task: Task, options: Options) -> Iterator[Measurement]:
    """Accuracy and number of clusters for one cut of the tree (Fig. 6, right)."""
    series = "K" if task.variant.startswith("auto:") else "threshold"
    yield _measure(run, task, options, x=float(task.variant.removeprefix("auto:")), series=series)


def epochs(run: Run, task: Task, options: Options) -> Iterator[Measurement]:
    """Accuracy over the epochs of tuning, from the snapshots of every cluster (Fig. 5).

    After x of e epochs a cluster is as it was after x / e of its own steps, which `tuning.min_steps` raises for a
    small cluster; the nearest snapshot stands for that.
    """
    manifest, slices, every = run.catalog.manifest(), run.catalog.slices(), run.config.checkpoints.every_epochs
    assert manifest is not None
    images, last = run.images[run.catalog.live(options.split).rows], run.config.tuning.epochs
    for x in range(every, last, every):
        earlier = {key: nearest_snapshot(run, slices[name], x / last) for key, name in manifest.clusters.items()}
        answers = predict(with_slices(load_model(run), earlier), images)
        yield _measure(run, task, options, answers, x=float(x))
    yield _measure(run, task, options, x=float(last))


def nearest_snapshot(run: Run, row: SliceRow, share: float) -> str:
    """The reference of a slice after about this share of its steps; of two equally near ones the earlier."""
    steps = (*run.catalog.epochs(row.digest), row.steps)
    nearest = min(steps, key=lambda step: (abs(step - share * row.steps), step))
    return reference(row.digest, nearest % row.steps)


def sequence(run: Run, task: Task, options: Options) -> Iterator[Measurement]:
    """Images passed and accuracy along a sequence of requests."""
    spent, batches = 0, sequences.KINDS[task.variant](run, options.length)
    yield _measure(run, task, options, series=task.variant)
    for number, batch in enumerate(batches, 1):
        spent += _passed(run, _erase(run, batch).images)
        yield _measure(run, task, options, x=float(number), series=task.variant, spent=float(spent))


EXPERIMENTS: dict[str, Callable[[Run, Task, Options], Iterator[Measurement]]] = {
    experiment.__name__: experiment for experiment in (methods, removal, cut, epochs, sequence)
}


def _erase(run: Run, ids: list[str]) -> BuildReport:
    report = erase.request_erasure(run, ids).outcome
    assert report is not None
    return report


def planned_costs(run: Run, count: int) -> np.ndarray:
    """Plans the erasures of n = `count` live records, drawn uniformly, each on its own. Changes nothing.

    float64 [n, 4]: images passed forward and backward; members of all slices that are made again, and of those whose
    images pass; parameters of all of them.
    """
    ids = run.catalog.live("train").ids
    chosen = philox(run.config.seed, "probe").choice(len(ids), min(count, len(ids)), replace=False)
    costs, (per_cluster, common) = [], _parameter_counts(run)
    with progress("plan", len(chosen)) as shown:
        for index in chosen:
            build_plan = current_plan(run, {ids[index]})
            members = {key: build_plan.members[key].rows for key in build_plan.missing}
            records = np.unique(np.concatenate([np.empty(0), *members.values()]))
            passed = _passed(run, sum(len(rows) for key, rows in members.items() if key != SliceKind.COMMON))
            parameters = sum(common if key == SliceKind.COMMON else per_cluster for key in build_plan.missing)
            costs.append((_passed(run, build_plan.images_missing), len(records), passed, parameters))
            shown.advance(1)
    return np.array(costs, np.float64)


def served_seconds(run: Run, count: int) -> list[float]:
    """Erases `count` records that are not sampled and as many that are, one request after the other.

    Mean seconds of the requests of either kind, from the plan to the purge; 0 for none.
    """
    live, sample = run.catalog.live("train").ids, set(sampled(run)[0].ids)
    strata = {"unsampled": [name for name in live if name not in sample], "sampled": sorted(sample.intersection(live))}
    means = []
    for stratum, ids in strata.items():
        order = philox(run.config.seed, "served", stratum).choice(len(ids), min(count, len(ids)), replace=False)
        seconds = [_erase(run, [ids[index]]).seconds for index in order]
        means.append(float(np.mean(seconds)) if seconds else 0.0)
    return means


def full_tuning_seconds(run: Run) -> float:
    """Seconds of all builds of a workdir so far, features left out; of an interrupted try those of its slices."""
    lines = [json.loads(line) for line in run.layout.metrics.read_text("utf-8").splitlines()]
    builds = [line for line in lines if line["kind"] == "build"]
    start = builds[0]["at"] - builds[0]["seconds"]
    earlier = sum(row.seconds for row in run.catalog.slices().values() if row.created < start)
    return earlier / run.mesh.size + sum(line["seconds"] for line in builds)


def _parameter_counts(run: Run) -> tuple[int, int]:
    """Parameters in the slice of a cluster, all of which have as many, and in the common head (0 without one)."""
    manifest = run.catalog.manifest()
    assert manifest is not None

    def count(ref: str) -> int:
        return sum(leaf.size for leaf in checkpoints.flatten(load_slice(run, ref)).values())

    common = manifest.entries.get(SliceKind.COMMON)
    return count(next(iter(manifest.clusters.values()))), count(common) if common else 0


def forward_passes(run: Run, clusters: int) -> float:
    """Images passed forward through the backbone for one prediction of K clusters (`predict.routed_probabilities`).

    Padding of a batch or of the stack of clusters does not count.
    """
    routing, tuning = run.config.inference, run.config.tuning
    common_head = routing.common_weight > 0 and run.config.common.method != "none"
    if tuning.shares_feature or common_head and routing.common_weight == 1:
        return 1.0
    everyone = routing.nearest == 0 or tuning.method == "backbone"
    prompted = clusters if everyone else min(routing.nearest, clusters)
    routed = run.config.clustering.has_prototypes and routing.nearest > 0
    return float(prompted + (routed or common_head))
