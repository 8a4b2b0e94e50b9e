"""A choice: which method, within a budget for the mean erasure, does best on the private hold-out.

The candidates are methods of a comparison on the hold-out, with the config's seed. Test images are not looked at.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.experiments import runner
from lmeraser_jax.experiments.candidates import expected_passes, most_clusters, write_config
from lmeraser_jax.experiments.comparison import Comparison
from lmeraser_jax.experiments.figures import pareto
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import request_cost
from lmeraser_jax.progress import warn
from lmeraser_jax.unlearning.run import Run, open_run

SLACK = 1.02  # shards that a hash deals are equal but for chance: a cost so little beyond the budget is within it
FEWEST = 5  # records of a shard or cluster, in the mean, to try it unasked
STARTING = 10  # seconds of a candidate on two cores beside its forward passes
NORMAL = 1.96  # standard errors in half a 95 % interval


def score(row: Measurement, by: str) -> tuple[float, float]:
    """The accuracy or the balanced accuracy, and half of its 95 % interval."""
    if by == "balanced":
        return row.balanced, NORMAL * row.balanced_error
    rate, count = (row.accuracy * row.tested + 1) / (row.tested + 2), row.tested + 2  # as `accuracy.balanced_error`
    return row.accuracy, NORMAL * math.sqrt(rate * (1 - rate) / count)


def cost(row: Measurement) -> float:
    """What the budget limits, of the mean request: the larger share, of the records or of a full tuning's images."""
    return max(row.share_request, request_cost(row) / 100)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the candidates reached on the hold-out, and the best of those within the budget."""

    budget: float  # share
    by: str  # accuracy | balanced
    rows: tuple[Measurement, ...]  # of the candidates, the best first
    chosen: Measurement
    titles: Mapping[str, str]  # {method: what people read}
    config: Path  # the file with the chosen settings

    @property
    def front(self) -> set[str]:
        """Methods than which no other is cheaper and as good."""
        return {self.rows[i].method for i in pareto([(cost(row), score(row, self.by)[0]) for row in self.rows])}

    def table(self) -> str:
        width, budget = max(map(len, self.titles.values())), f"{100 * self.budget:.3g} %"
        lines = [f"hold-out: {self.chosen.tested} images; budget of the mean request: {budget} of the data and images"]
        heads = "  {:<{width}}  {:<15}  {:<15}    data  images  seconds  passes  weight"
        lines.append(heads.format("", "accuracy, 95 %", "balanced, 95 %", width=width))
        for row in self.rows:
            mark = ">" if row is self.chosen else "*" if row.method in self.front else " "
            scores = "  ".join("{:.4f} ± {:.4f}".format(*score(row, by)) for by in ("accuracy", "balanced"))
            costs = f"{row.share_request:>7.1%} {request_cost(row) / 100:>7.1%} {row.seconds_request:>8.2f}"
            costs += f" {row.passes:>7.0f} {row.common_weight:>7.1f}"
            lines.append(f"{mark} {self.titles[row.method]:<{width}}  {scores}  {costs}")
        lines += [
            "> chosen; * on the front: no other is cheaper and as good. Data, images (the larger counts), seconds:",
            "of the mean request. Passes: of one prediction. Weight: of the common head.",
            self.verdict,
        ]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """What the chosen method is worth beside the best one whose erasures pass no image."""
        simple, chosen = next((row for row in self.rows if cost(row) == 0), None), self.titles[self.chosen.method]
        if simple is None:
            return f"Chosen: {chosen}. No candidate does without passing images again."
        if simple is self.chosen:
            return f"The simplest wins: {chosen}. Its erasures pass no image."
        (high, reach), (low, other_reach) = score(self.chosen, self.by), score(simple, self.by)
        difference, noise = high - low, math.hypot(reach, other_reach)
        margin = f"{100 * difference:.1f} ± {100 * noise:.1f} points above {self.titles[simple.method]}"
        if difference > noise:
            return f"Chosen: {chosen}, {margin}, whose erasures pass no image."
        return f"Chosen: {chosen}, {margin}: within the noise that is as good, and its erasures pass no image."

    def values(self) -> dict[str, Any]:
        reaches = [{f"{by}_reach": score(row, by)[1] for by in ("accuracy", "balanced")} for row in self.rows]
        costs = [{"title": self.titles[row.method], "cost": cost(row)} for row in self.rows]
        rows = [dataclasses.asdict(row) | more | extra for row, more, extra in zip(self.rows, reaches, costs)]
        named = {"chosen": self.chosen.method, "front": sorted(self.front), "config": str(self.config)}
        return {"budget": self.budget, "by": self.by, **named, "verdict": self.verdict, "candidates": rows}


def choose(comparison: Comparison, budget: float, command: str, fit: bool) -> Choice:
    """Asks the hold-out about every candidate, and writes the config of the best within the budget.

    Args:
        comparison: on the hold-out, of the experiment `methods` with one seed; its methods are the candidates.
        budget: share of the data, and of the images of a full tuning, that the mean request may pass again.
        fit: leave out candidates for which there are too few records.

    Raises:
        UserError: as `runner.compare`; no candidate is within the budget; or the balanced accuracy decides and the
            hold-out lacks a class.
    """
    by = comparison.options.by
    if waiting := runner.prepare(comparison):
        with open_run(comparison.base(waiting[0].seed)) as run:
            _check_classes(run, by)
            if fit:
                comparison = _with_enough_records(comparison, len(run.catalog.live("train")))
            print(_expectation(run, comparison), file=sys.stderr, flush=True)
    tasks = {task.method.name: task for task in comparison.tasks}
    titles = {name: task.method.title for name, task in tasks.items()}
    rows = [row for row in runner.compare(comparison, command).rows if row.method in tasks]
    rows.sort(key=lambda row: (-score(row, by)[0], cost(row), row.passes))
    chosen = best_within(budget, rows, titles)
    choice = Choice(budget, by, tuple(rows), chosen, titles, comparison.folder / "chosen.py")
    config = tasks[chosen.method].config
    inference = dataclasses.replace(config.inference, common_weight=chosen.common_weight)
    write_config(choice.config, dataclasses.replace(config, inference=inference), [command, choice.verdict])
    return choice


def _check_classes(run: Run, by: str) -> None:
    """Warns of classes without an image in the hold-out, or refuses them where the balanced accuracy decides."""
    counts = np.bincount(run.catalog.live("holdout").labels, minlength=len(run.classes))
    missing = join_limited(run.classes[label] for label in np.flatnonzero(counts == 0))
    if missing and by == "balanced":
        remedy = "raise --config.data.holdout, or take --by=accuracy"
        raise UserError(f"--by=balanced: the hold-out has no image of {missing}; {remedy}")
    if missing:
        warn(f"the hold-out has no image of {missing}: the balanced accuracy is of the other classes")


def _with_enough_records(comparison: Comparison, records: int) -> Comparison:
    most = {task.method: most_clusters(task.config) for task in comparison.tasks}
    small = [method for method in most if FEWEST * most[method] > records]
    warn(*(f"{records} records are too few for {m.title}: left out; --candidates={m.name} tries it" for m in small))
    return dataclasses.replace(comparison, methods=tuple(method for method in most if method not in small))


def _expectation(run: Run, comparison: Comparison) -> str:
    """The expected seconds of the candidates that are not done yet, from the measured time of a forward pass."""
    records, held_out = (run.catalog.live(split) for split in ("train", "holdout"))
    size = run.config.clustering.feature_batch * run.mesh.size
    images = run.images[records.rows[:size]]
    run.extractor(images)  # compiles
    start = time.perf_counter()
    run.extractor(images)
    per_image = (time.perf_counter() - start) / size
    tasks = [task for task in comparison.tasks if not comparison.rows_file(task).is_file()]
    sizes = len(records), len(held_out), comparison.options.requests
    passes = sum(expected_passes(task.config, *sizes) for task in tasks)
    return (
        f"{len(tasks)} of {len(comparison.tasks)} candidates to do, in about"
        f" {passes * per_image + STARTING * len(tasks):.0f} s. This is an estimate: {passes:.2g} forward passes of an"
        f" image at {1 / per_image:.0f} a second, as measured now, and {STARTING} s a candidate for compiling and files"
    )


def best_within(budget: float, rows: Sequence[Measurement], titles: Mapping[str, str]) -> Measurement:
    """The first row within the budget."""
    for row in rows:
        if cost(row) <= SLACK * budget:
            return row
    least = min(rows, key=cost)
    measured = (f"- {titles[row.method]}: {100 * cost(row):.3g} %, accuracy {row.accuracy:.4f}" for row in rows)
    raise UserError(
        f"--budget={100 * budget:.3g}%: no candidate is within it; the cheapest, {titles[least.method]}, passes"
        f" {100 * cost(least):.3g} % a request; raise --budget, or add logistic to --candidates, which passes nothing."
        f" Measured, and kept for the next try:\n{chr(10).join(measured)}"
    )
