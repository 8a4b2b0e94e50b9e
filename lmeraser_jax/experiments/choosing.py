"""A choice: which method, within a budget for the mean erasure, does best on the private hold-out.

The candidates are methods of a comparison on the hold-out, with the config's seed. Test images are not looked at.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.experiments import runner
from lmeraser_jax.experiments.candidates import expected_passes, with_enough_records, write_config
from lmeraser_jax.experiments.comparison import Comparison
from lmeraser_jax.experiments.figures import pareto
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.experiments.summary import request_cost
from lmeraser_jax.progress import warn
from lmeraser_jax.unlearning.run import Run, open_run

CHOSEN = "chosen.py"
SLACK = 1.02  # shards that a hash deals are equal but for chance: a cost so little beyond the budget is within it
STARTING = 10  # seconds of a candidate on two cores beside its forward passes
NORMAL = 1.96  # standard errors in half a 95 % interval


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method with its answers to the hold-out and its costs; of the mean request, sampled records counted."""

    name: str
    title: str
    accuracy: float
    accuracy_reach: float  # half the 95 % interval
    balanced: float
    balanced_reach: float
    data_request: float  # share of the records that pass again, with all of their slices
    images_request: float  # share of the images of a full tuning that pass
    seconds_request: float  # 0: not timed
    seconds_full: float  # of a full tuning, cold
    passes: float  # images through the backbone for one prediction
    common_weight: float  # chosen on the hold-out

    @property
    def cost(self) -> float:
        """What is compared with the budget: the larger share."""
        return max(self.data_request, self.images_request)

    def score(self, by: str) -> tuple[float, float]:
        """What the choice goes by, accuracy or balanced, and half its 95 % interval."""
        return (self.balanced, self.balanced_reach) if by == "balanced" else (self.accuracy, self.accuracy_reach)


def candidate_of(row: Measurement, title: str) -> Candidate:
    rate, count = (row.accuracy * row.tested + 1) / (row.tested + 2), row.tested + 2  # as `accuracy.balanced_error`
    return Candidate(
        name=row.method,
        title=title,
        accuracy=row.accuracy,
        accuracy_reach=NORMAL * math.sqrt(rate * (1 - rate) / count),
        balanced=row.balanced,
        balanced_reach=NORMAL * row.balanced_error,
        data_request=row.share_request,
        images_request=request_cost(row) / 100,
        seconds_request=row.seconds_request,
        seconds_full=row.seconds_full,
        passes=row.passes,
        common_weight=row.common_weight,
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidates on the hold-out, the best first, and the best of those within the budget."""

    budget: float  # share
    by: str  # accuracy | balanced
    images: int  # of the hold-out
    candidates: tuple[Candidate, ...]
    front: tuple[str, ...]  # names: no candidate is cheaper and as good
    chosen: Candidate
    verdict: str  # how it stands beside the best candidate whose erasures pass no image
    config: Path  # the file with the chosen settings

    def table(self) -> str:
        width = max(len(row.title) for row in self.candidates)
        share = f"{100 * self.budget:.3g} % of the data and of the images of a full tuning"
        lines = [
            f"hold-out: {self.images} images; budget of the mean request: {share}",
            f"  {'':<{width}}  {'accuracy, 95 %':<15}  {'balanced, 95 %':<15}    data  images  seconds  passes  weight",
        ]
        for row in self.candidates:
            mark = ">" if row is self.chosen else "*" if row.name in self.front else " "
            scores = f"{row.accuracy:.4f} ± {row.accuracy_reach:.4f}  {row.balanced:.4f} ± {row.balanced_reach:.4f}"
            costs = f"{row.data_request:>7.1%} {row.images_request:>7.1%} {row.seconds_request:>8.2f}"
            lines.append(f"{mark} {row.title:<{width}}  {scores}  {costs} {row.passes:>7.0f} {row.common_weight:>7.1f}")
        lines += [
            "> chosen; * on the front: no other is cheaper and as good. Data, images (the larger counts) and seconds:",
            "of the mean request, sampled records counted. Passes: through the backbone, of one prediction. Weight: of",
            "the common head.",
            self.verdict,
        ]
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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
    (seed,), options = comparison.seeds, comparison.options
    if runner.prepare(comparison):
        with open_run(comparison.base(seed)) as run:
            _check_classes(run, options.by)
            if fit:
                comparison = _without_small(comparison, len(run.catalog.live("train")))
            print(_expectation(run, comparison), file=sys.stderr, flush=True)
    methods = {method.name: method for method in comparison.methods}
    rows = [row for row in runner.compare(comparison, command).rows if row.method in methods]
    tried = [candidate_of(row, methods[row.method].title) for row in rows]
    tried.sort(key=lambda candidate: (-candidate.score(options.by)[0], candidate.cost, candidate.passes))
    chosen = _best_within(budget, tried)
    path, verdict = comparison.folder / CHOSEN, _verdict(chosen, tried, options.by)
    config = methods[chosen.name].configure(dataclasses.replace(comparison.config, seed=seed))
    inference = dataclasses.replace(config.inference, common_weight=chosen.common_weight)
    write_config(path, dataclasses.replace(config, inference=inference), [command, chosen.title, verdict])
    points = [(candidate.cost, candidate.score(options.by)[0]) for candidate in tried]
    front = tuple(tried[i].name for i in pareto(points))
    return Choice(budget, options.by, rows[0].tested, tuple(tried), front, chosen, verdict, path)


def _check_classes(run: Run, by: str) -> None:
    """Warns of classes without an image in the hold-out, or refuses them where the balanced accuracy decides."""
    counts = np.bincount(run.catalog.live("holdout").labels, minlength=len(run.classes))
    if counts.all():
        return
    message = (
        f"the hold-out has no image of {join_limited(run.classes[label] for label in np.flatnonzero(counts == 0))}"
    )
    if by == "balanced":
        raise UserError(f"--by=balanced: {message}; raise --config.data.holdout, or take --by=accuracy")
    warn(f"{message}: the balanced accuracy is of the other classes")


def _without_small(comparison: Comparison, records: int) -> Comparison:
    methods = with_enough_records(comparison.methods, comparison.config, records)
    for method in comparison.methods:
        if method not in methods:
            warn(f"{records} records are too few for {method.title}: left out; --candidates={method.name} tries it")
    return dataclasses.replace(comparison, methods=methods)


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
    seconds = passes * per_image + STARTING * len(tasks)
    return (
        f"{len(tasks)} of {len(comparison.tasks)} candidates to do, in about {seconds:.0f} s. This is an estimate:"
        f" {passes:.2g} forward passes of an image at {1 / per_image:.0f} a second, as measured now, and {STARTING} s a"
        " candidate for compiling and files"
    )


def _best_within(budget: float, tried: list[Candidate]) -> Candidate:
    """The first candidate within the budget."""
    for candidate in tried:
        if candidate.cost <= SLACK * budget:
            return candidate
    cheapest = min(tried, key=lambda candidate: candidate.cost)
    raise UserError(
        f"--budget={100 * budget:.3g}%: no candidate is within it; the cheapest, {cheapest.title}, passes"
        f" {100 * cheapest.cost:.3g} % a request; raise --budget, or add logistic to --candidates, which passes nothing"
    )


def _verdict(chosen: Candidate, tried: list[Candidate], by: str) -> str:
    """What the choice is worth beside the best candidate whose erasures pass no image."""
    simple = next((candidate for candidate in tried if candidate.cost == 0), None)
    if simple is None:
        return f"Chosen: {chosen.title}. No candidate does without passing images again."
    if simple is chosen:
        return f"The simplest wins: {chosen.title}. Its erasures pass no image."
    (high, reach), (low, other_reach) = chosen.score(by), simple.score(by)
    difference, noise = high - low, math.hypot(reach, other_reach)
    text = f"Chosen: {chosen.title}, {100 * difference:.1f} ± {100 * noise:.1f} points above {simple.title}"
    if difference > noise:
        return f"{text}, whose erasures pass no image."
    return f"{text}: within the noise of the hold-out that is as good, and its erasures pass no image."
