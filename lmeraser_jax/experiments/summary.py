"""Rows to numbers: means, deviations and ranges over seeds, quantities with their units, the best trade-offs."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from lmeraser_jax.experiments.results import Measurement

LONGEST = 30  # characters of a name in a figure
ABSENT = "–"  # in place of a number that was not measured
Name = TypeVar("Name", bound=Hashable)
Rows = Sequence[Measurement]
Titles = Mapping[str, str]  # what people read in place of a method's, data set's or backbone's name
UNTITLED: Titles = {}


class Spread(NamedTuple):
    """Mean, sample standard deviation (n - 1) and range of one number per seed; no numbers where one is none."""

    mean: float
    sd: float  # 0 for one seed
    seeds: int
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)


MISSING = Spread(math.nan, math.nan, 0, math.nan, math.nan)


def spread(values: Iterable[float]) -> Spread:
    """Of the values of some seeds; without any, or with one that is not finite, the mean is not a number."""
    found = np.asarray(list(values), np.float64)
    if not len(found) or not np.isfinite(found).all():
        return MISSING._replace(seeds=len(found))
    deviation = float(found.std(ddof=1)) if np.ptp(found) > 0 else 0.0  # of equal numbers the sum may round
    return Spread(float(found.mean()), deviation, len(found), float(found.min()), float(found.max()))


def percent(value: float, like: float | None = None) -> str:
    return f"{value:.2f}"


def amount(value: float, like: float | None = None) -> str:
    """Three digits or, below 10,000, all before the point: 0.0312, 3,185, 69.8k; with the decimals of `like`."""
    like = abs(value if like is None else like)
    size, unit = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if like >= max(pair[0], 1e4)), (1, ""))
    digits = math.floor(math.log10(like / size)) + 1 if like else 1
    decimals = 0 if like == int(like) and size == 1 else max(0, 3 - digits)
    return f"{value / size:,.{decimals}f}{unit}"


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Something to show.

    Attributes:
        title: of an axis or a column, with the unit.
        of: the number of one row; not a number where the row does not have it.
        best: which of several means is the best; None where none is better.
        text: a number for people, with the decimals of a second one.
        logarithmic: whether an axis of it is.
        highest: what it cannot exceed.
    """

    title: str
    of: Callable[[Measurement], float]
    best: Callable[[Iterable[float]], float] | None = min
    text: Callable[[float, float], str] = amount
    logarithmic: bool = True
    highest: float = math.inf

    def shown(self, found: Spread) -> str:
        """Mean and, where the seeds differ, standard deviation."""
        if not found.known:
            return ABSENT
        mean = self.text(found.mean, found.mean)
        return f"{mean} ± {self.text(found.sd, found.mean)}" if found.sd > 0 else mean

    def bar(self, found: Spread) -> tuple[float, float]:
        """Ends of the bar at a mean: one standard deviation each way, as far as there are such numbers.

        On a logarithmic axis, where the mean less a deviation may have no place, the lowest and the highest seed.
        """
        if self.logarithmic:
            return found.low, found.high
        low, high = found.mean - found.sd, found.mean + found.sd
        return max(low, min(found.mean, 0.0)), min(high, max(found.mean, self.highest))


def cost(row: Measurement) -> float:
    """Images of a mean request in percent of those that tuning everything passes; 0 where nothing is passed at all."""
    if row.images_full > 0:
        return 100 * row.images_request / row.images_full
    return 0.0 if row.images_request == 0 else math.nan


def _measured(value: float) -> float:
    return value if value > 0 else math.nan  # nothing takes no time, predicts without a pass: it was not measured


def _test_error(row: Measurement) -> float:
    """Standard error in points of an accuracy on so many test images, sqrt(p (1 - p) / n)."""
    spread = row.accuracy * (1 - row.accuracy)
    return 100 * math.sqrt(spread / row.tested) if row.tested > 0 and spread >= 0 else math.nan


ACCURACY = Quantity("accuracy (%)", lambda row: 100 * row.accuracy, max, percent, logarithmic=False, highest=100)
BALANCED = Quantity("balanced accuracy (%)", lambda row: 100 * row.balanced, max, percent, False, 100)
TEST_ERROR = Quantity("standard error of the test set (points)", _test_error, None, percent, logarithmic=False)
CLUSTERS = Quantity("clusters", lambda row: row.clusters, None, amount, logarithmic=False)
COST = Quantity("images per request (% of a full tuning)", cost, highest=100)
IMAGES = Quantity("images passed per request", lambda row: row.images_request)
WORST = Quantity("images at worst", lambda row: row.images_worst)
PASSES = Quantity("forward passes per prediction", lambda row: _measured(row.passes))
SECONDS = Quantity("time per request (s)", lambda row: _measured(row.seconds_request))
UNSAMPLED = Quantity("time per request (s), record not sampled", lambda row: _measured(row.seconds_unsampled))
SAMPLED = Quantity("time per request (s), sampled record", lambda row: _measured(row.seconds_sampled))
RECORDS = Quantity("records affected per request", lambda row: row.records_request)
PARAMETERS = Quantity("parameters affected per request", lambda row: row.parameters_request)
FULL = Quantity("time of a full tuning (s)", lambda row: _measured(row.seconds_full))
SPENT = Quantity("images passed since the start", lambda row: row.spent)


def unique(values: Iterable[Name]) -> list[Name]:
    """In the order of first appearance."""
    return list(dict.fromkeys(values))


def of(rows: Rows, experiment: str) -> list[Measurement]:
    """The rows of an experiment that have a place on its axis."""
    return [row for row in rows if row.experiment == experiment and math.isfinite(row.x)]


def main(rows: Rows) -> list[Measurement]:
    """The rows of `methods`, for every data set those with the backbone that most methods were measured on."""
    methods = of(rows, "methods")
    measured = unique((row.dataset, row.backbone, row.method) for row in methods)
    chosen: dict[str, str] = {}
    for dataset in unique(row.dataset for row in methods):
        backbones = [backbone for name, backbone, _ in measured if name == dataset]
        chosen[dataset] = max(unique(backbones), key=backbones.count)  # the first of several
    return [row for row in methods if row.backbone == chosen[row.dataset]]


def on_several(rows: Rows) -> list[Measurement]:
    """The rows of `methods` of a method on a data set where it was measured on several backbones."""
    methods = of(rows, "methods")
    measured = unique((row.dataset, row.method, row.backbone) for row in methods)
    places = [place[:2] for place in measured]
    return [row for row in methods if places.count((row.dataset, row.method)) > 1]


def by_method(row: Measurement) -> str:
    return row.method


def by_dataset(row: Measurement) -> str:
    return row.dataset


def spreads(rows: Iterable[Measurement], quantity: Quantity, key: Callable[[Measurement], Name]) -> dict[Name, Spread]:
    """Over the rows with the same key."""
    values: dict[Name, list[float]] = {}
    for row in rows:
        values.setdefault(key(row), []).append(quantity.of(row))
    return {name: spread(found) for name, found in values.items()}


def by_seed(
    rows: Iterable[Measurement], quantity: Quantity, key: Callable[[Measurement], Name]
) -> dict[Name, dict[int, float]]:
    """The number of every seed, over the rows with the same key."""
    found: dict[Name, dict[int, float]] = {}
    for row in rows:
        found.setdefault(key(row), {})[row.seed] = quantity.of(row)
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (cost, accuracy) that no other beats: cheaper or as cheap, and better or as good.

    In the order of their cost; equal points are all kept, those that are not finite are left out.
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def printable(text: object) -> str:
    """What any font, SVG or HTML writer takes: control characters, line ends included, become �."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def clean(text: object) -> str:
    """Printable, in one line, with single spaces."""
    return printable(" ".join(str(text).split()))


def titled(name: str, titles: Titles, longest: int = LONGEST) -> str:
    """What people read in place of a name, cut after so many characters."""
    text = clean(titles.get(name, name)) or ABSENT
    return text if len(text) <= longest else text[: longest - 1] + "…"
