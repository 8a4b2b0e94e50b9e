"""How sure the numbers are: what ± and the bars are, the error of the test set, and what an ordering's verdict is.

All methods of a comparison share split and backbone of a seed, so two methods are compared seed by seed: the mean of
their differences, with Student's interval. Plain text, not yet escaped for a page.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lmeraser_jax.experiments.summary import ACCURACY, TEST_ERROR, Quantity, Rows

SURE = 95  # percent
MARGIN = 1.0  # percentage points; two methods whose difference is surely smaller are as accurate as each other
NOT_MEASURED = "not measured"
SEEDS = (
    "± is one sample standard deviation (n - 1) over seeds. A seed redraws clusters, prompts, heads and the order of"
    " images; the split, too, where the data has none, and the backbone where it is trained here. With published"
    " weights and a given test set those two are the same for all seeds, and ± does not hold the sampling error of the"
    " test set, sqrt(p (1 - p) / n) for the accuracy p on n images."
)
RULE = (
    "An ordering of the paper is judged by the differences between the accuracies of the first and the second method,"
    f" seed by seed in percentage points, and Student's {SURE} % interval of their mean. 'More accurate' holds where"
    " the interval is above 0 and is contradicted where it is below; 'as accurate' holds where the interval is inside"
    f" ±{MARGIN:g} point, and they differ where it excludes 0 and leaves ±{MARGIN:g}; all else is undecided. One seed"
    " decides nothing, nor do seeds that all give the same difference. What holds for ± holds for the interval. Every"
    " ordering is judged for itself, without a correction for their number."
)


class Claim(NamedTuple):
    """An ordering of accuracies that the paper reports."""

    first: str
    sign: Literal[">", "~"]
    second: str


class Difference(NamedTuple):
    """Mean of paired differences and the ends of Student's interval; these are not numbers for one seed."""

    mean: float
    low: float
    high: float
    seeds: int


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Of two methods' numbers by seed, over the seeds of both; None where there is none, or one is no number.

    mean(d) ± t(n - 1, 0.975) sd(d) / sqrt(n), sd with n - 1. Without an interval where d does not vary at all: then
    the seeds have not redrawn what d depends on.
    """
    from scipy.stats import t

    differences = np.array([first[seed] - second[seed] for seed in first if seed in second], np.float64)
    n = len(differences)
    if not n or not np.isfinite(differences).all():
        return None
    mean, sd = float(differences.mean()), float(differences.std(ddof=1)) if n > 1 else 0.0
    reach = float(t.ppf(0.5 + SURE / 200, n - 1)) * sd / math.sqrt(n) if sd > 1e-9 else math.nan
    return Difference(mean, mean - reach, mean + reach, n)


def verdict(claim: Claim, found: Mapping[str, Mapping[int, float]]) -> str:
    """Whether a claim holds among accuracies in percent by method and seed, in a few words; see `RULE`."""
    difference = paired(found.get(claim.first, {}), found.get(claim.second, {}))
    if difference is None:
        return NOT_MEASURED
    mean, low, high, seeds = difference
    if seeds == 1:
        return f"one seed decides nothing, {mean:+.2f} points"
    if math.isnan(low):
        return f"undecided, {mean:+.2f} points in each of {seeds} seeds"
    word = _ordered(low, high) if claim.sign == ">" else _alike(low, high)
    return f"{word}, {mean:+.2f} points ({SURE} % interval {low:+.2f} to {high:+.2f}, {seeds} seeds)"


def _ordered(low: float, high: float) -> str:
    return "holds" if low > 0 else "contradicted" if high < 0 else "undecided"


def _alike(low: float, high: float) -> str:
    if -MARGIN <= low and high <= MARGIN:
        return "holds"
    return "differs" if low > 0 or high < 0 else "undecided"


def bars(rows: Rows, quantities: Iterable[Quantity]) -> str:
    """What the bars or bands of a figure of some rows are, and the error of their test set if accuracies are shown."""
    shown = list(quantities)
    linear = "one standard deviation over seeds each way"
    logarithmic = "from the lowest to the highest seed"
    if len({row.seed for row in rows}) < 2:
        text = "One seed: no bars."
    elif all(quantity.logarithmic for quantity in shown):
        text = f"Bars and bands: {logarithmic}."
    elif any(quantity.logarithmic for quantity in shown):
        text = f"Bars and bands: {linear}; on logarithmic axes {logarithmic}."
    else:
        text = f"Bars and bands: {linear}."
    return " ".join(filter(None, (text, test_error(rows) if ACCURACY in shown else "")))


def test_error(rows: Rows) -> str:
    """The sampling error of accuracies in a sentence, "" where the number of test images is not known."""
    errors = [error for error in map(TEST_ERROR.of, rows) if math.isfinite(error)]
    if not errors:
        return ""
    images = _range([f"{count:,}" for count in sorted({row.tested for row in rows if row.tested})])
    points = _range([f"{error:.1f}" for error in (min(errors), max(errors))])
    return f"Standard error from {images} test images alone: {points} points."


def _range(texts: list[str]) -> str:
    return " to ".join(dict.fromkeys((texts[0], texts[-1])))
