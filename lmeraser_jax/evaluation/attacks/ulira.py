"""U-LiRA (Hayes et al., 2025): can slices that unlearned a record be told from slices that never saw it?

For each record a Gaussian is fitted to the margins of half the slices of either population; the other half is then
told apart by likelihood. An accuracy of one half is perfect unlearning. For an exact method the two populations are
one distribution, so this is a search for bugs; what it would do with a method that leaks is shown beside it.

Shapes: N slices of a population, w records, R deals of a permutation test.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmeraser_jax.evaluation.attacks import forgetting, statistics
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, RETAINED
from lmeraser_jax.evaluation.attacks.shadows import Shadows
from lmeraser_jax.evaluation.attacks.statistics import DOUBT, RATES, Estimate, Tested

Trials = Sequence[tuple[np.ndarray, Shadows]]


@dataclasses.dataclass(frozen=True)
class ULira:
    """The attack on slices that keep the records, on those that unlearned them, and on those that never saw them.

    Attributes:
        forgotten, retained: mean accuracy over such records; None where too few slices were there to fit.
        auc: for each column, of the likelihood ratios of forgotten records and slices together; its interval is from a
            bootstrap over records. None where nothing could be fitted.
        rates: for each column, true positive rates of the same at the false positive rates `RATES`; a record counts
            once, in how many slices it is ever asked of: None where there are too few records to tell.
        quality: for each column, the forgetting quality.
    """

    forgotten: tuple[Tested | None, ...]
    retained: tuple[Tested | None, ...]
    auc: tuple[Estimate | None, ...]
    rates: tuple[tuple[Estimate | None, ...], ...]
    quality: tuple[float, ...]

    name = "ulira"

    @property
    def found(self) -> tuple[bool, ...]:
        return tuple(column is not None and column.p < DOUBT for column in self.forgotten)

    @property
    def least(self) -> float:
        return self.forgotten[0].least if self.forgotten[0] else 1.0

    def lines(self) -> list[tuple[str, ...]]:
        rows = [("accuracy, forgotten (by chance)", *_shown(self.forgotten)), ("AUC", *_shown(self.auc))]
        rows += statistics.rate_lines(self.rates)
        rows.append(("forgetting quality, 1 is best", *(f"{value:.3f}" for value in self.quality)))
        return [*rows, ("accuracy, retained (by chance)", *_shown(self.retained))]

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"found": self.found}


def _shown(columns: Sequence[Tested | Estimate | None]) -> tuple[str, ...]:
    return tuple("-" if column is None else str(column) for column in columns)


def ulira(trials: Trials, rng: np.random.Generator) -> ULira:
    """The attack over some pools.

    Args:
        trials: roles int [w] of a pool's watched records, and their scores under its shadows.
        rng: of the permutations and bootstraps.
    """
    columns: dict[int, list[Tested | None]] = {FORGOTTEN: [], RETAINED: []}
    for role, found in columns.items():
        for column in range(3):
            parts = []
            for roles, scores in trials:
                told = PopulationPair.of(scores, roles == role, role, column)
                parts.append(statistics.permuted(told.accuracies, told.group, told.fitted, rng))
            values = np.concatenate(parts, axis=1)
            found.append(None if np.isnan(values[0]).all() else statistics.tested(_mean(values)))
    asked = [_ratios(trials, column) for column in range(3)]
    return ULira(
        forgotten=tuple(columns[FORGOTTEN]),
        retained=tuple(columns[RETAINED]),
        auc=tuple(statistics.clustered_auc(*pair, rng) for pair in asked),
        rates=tuple(_rates(*pair) for pair in asked),
        quality=tuple(_quality(trials, column) for column in range(3)),
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over records of accuracies float [1 + R, w]; those that too few slices were fitted for do not count."""
    return np.where(np.isnan(values), 0.0, values).sum(axis=1) / np.maximum((~np.isnan(values)).sum(axis=1), 1)


def _ratios(trials: Trials, column: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-likelihood ratios, record by forgotten record, in slices of the column and in those that never saw it."""
    ones: list[np.ndarray] = []
    twos: list[np.ndarray] = []
    for roles, scores in trials:
        told = PopulationPair.of(scores, roles == FORGOTTEN, FORGOTTEN, column)
        ratio, *kinds = (part[0] for part in told.ratios(told.group[None]))
        for found, counts in zip((ones, twos), kinds, strict=True):
            found += [row[mask & ~np.isnan(row)] for row, mask in zip(ratio.T, counts.T, strict=True)]
    return ones, twos


def _rates(ones: list[np.ndarray], twos: list[np.ndarray]) -> tuple[Estimate | None, ...]:
    counts = sum(len(part) > 0 for part in ones), sum(len(part) > 0 for part in twos)
    pair = np.concatenate(ones), np.concatenate(twos)
    return tuple(statistics.rate_at(*pair, rate, counts) for rate in RATES)


def _quality(trials: Trials, column: int) -> float:
    found = []
    for roles, scores in trials:
        told = PopulationPair.of(scores, roles == FORGOTTEN, FORGOTTEN, column)
        masks = told.group[:, None] & told.first, ~told.group[:, None] & told.second
        for values, one, two in zip(told.margins.T, *(mask.T for mask in masks), strict=True):
            if one.any() and two.any():
                found.append(forgetting.epsilon(values[one], values[two]))
    return forgetting.quality(np.array(found))


@dataclasses.dataclass(frozen=True, eq=False)
class PopulationPair:
    """Two populations of slices of one pool, to be told apart.

    Attributes:
        margins: float [M, w], under the slices of both.
        first: bool [M, w], where a slice counts for a record if it is of the first population.
        second: bool [M, w], where it counts if it is of the second.
        group: bool [M], the slices of the first.
        fitted: bool [M], slices that the Gaussians are fitted to; the others are told apart.
    """

    margins: np.ndarray
    first: np.ndarray
    second: np.ndarray
    group: np.ndarray
    fitted: np.ndarray

    @classmethod
    def of(cls, scores: Shadows, chosen: np.ndarray, role: int, column: int) -> "PopulationPair":
        """The slices of a column beside those that never saw the records, for records of one role.

        A forgotten record counts in the slices that were tuned on it first, and in all that never saw it; a retained
        one in the slices of either population that were tuned on it. The last column is slices that never saw the
        records beside others that did not.
        """
        first = (scores.shadows, scores.unlearned, scores.never)[column]
        seen, second, drawn = scores.drawn if column == 2 else scores.inside, scores.never, scores.drawn
        if column == 2:
            half = np.arange(len(first)) % 2 == 0
            first, seen, second, drawn = first[half], seen[half], second[~half], drawn[~half]
        asked = np.concatenate([seen, drawn])[:, chosen]
        return cls(
            margins=np.concatenate([first, second])[:, chosen],
            first=asked,
            second=np.ones_like(asked) if role == FORGOTTEN else asked,
            group=np.arange(len(asked)) < len(first),
            fitted=np.concatenate([np.arange(len(part)) % 2 == 0 for part in (first, second)]),
        )

    def ratios(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-likelihood ratios of the t slices that nothing was fitted to, and which of them count.

        Args:
            rows: bool [R, M], the slices of the first population in each of R deals.

        Returns:
            float [R, t, w], NaN where a population has no slice to fit; bool [R, t, w], of the first population and to
            be counted; the same for the second.
        """
        tests = np.flatnonzero(~self.fitted)
        one = statistics.moments(self.margins, self.first, rows & self.fitted)
        two = statistics.moments(self.margins, self.second, ~rows & self.fitted)
        densities = (
            statistics.gaussian(self.margins[tests][None], *(part[:, None] for part in pair)) for pair in (one, two)
        )
        is_one = rows[:, tests, None] & self.first[tests][None]
        is_two = ~rows[:, tests, None] & self.second[tests][None]
        return next(densities) - next(densities), is_one, is_two

    def accuracies(self, rows: np.ndarray) -> np.ndarray:
        """Mean of the shares of both populations that are told right: float [R, w], NaN where there is none."""
        ratio, is_one, is_two = self.ratios(rows)
        says_one = np.where(ratio == 0, 0.5, ratio > 0)
        with np.errstate(invalid="ignore"):
            hits = (says_one * is_one).sum(axis=1) / is_one.sum(axis=1)
            rejections = ((1 - says_one) * is_two).sum(axis=1) / is_two.sum(axis=1)
        return np.where(np.isnan(ratio).any(axis=1), np.nan, (hits + rejections) / 2)
