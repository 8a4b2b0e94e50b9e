"""Membership inference: was this record among those that a slice was tuned on?

Three attacks, from weak to strong: a threshold on the loss (Yeom et al., 2018), RMIA (Zarifzadeh et al., 2024) and
LiRA (Carlini et al., 2022). Each scores the forgotten records against images that no slice saw.

Shapes: C slices under attack, N shadows, n records, Z records of a population.
"""

import dataclasses
from typing import Any

import numpy as np

from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.statistics import DOUBT, Separation, Tested

INTERPOLATION = 0.3  # a, of RMIA without shadows that saw the record
GAMMA = 2.0  # a record counts as more likely than another of the population from this ratio on


@dataclasses.dataclass(frozen=True, eq=False)
class Membership:
    """What one attack finds in the slices that are kept, unlearned and tuned from scratch.

    Attributes:
        name: loss | rmia | lira | common.
        columns: for each of the three.
        beyond: AUC of the first two above that of the third.
        curves: for each of the three, false and true positive rates of the ROC curve.
    """

    name: str
    columns: tuple[Separation, ...]
    beyond: tuple[Tested, ...]
    curves: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def found(self) -> tuple[bool, ...]:
        reference = self.columns[-1].p
        return *(part.p < DOUBT for part in self.beyond), min(reference, 1 - reference) < DOUBT / 2

    @property
    def least(self) -> float:
        return self.beyond[0].least

    def lines(self) -> list[tuple[str, ...]]:
        """Rows of the table: what is measured, and a cell for each column."""
        rows = [("AUC", *(f"{c.auc:.3f} [{c.low:.2f}, {c.high:.2f}]" for c in self.columns))]
        rows.append(("above from scratch (by chance)", *map(str, self.beyond), ""))
        rows.append(("best balanced accuracy", *(f"{c.accuracy:.3f}" for c in self.columns)))
        return rows + statistics.rate_lines([c.rates for c in self.columns])

    def values(self) -> dict[str, Any]:
        columns, beyond = ([dataclasses.asdict(part) for part in parts] for parts in (self.columns, self.beyond))
        return {"columns": columns, "beyond": beyond, "found": self.found}


def membership(name: str, members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Membership:
    """What scores tell under three slices, the last of them the reference.

    Args:
        name: of the attack.
        members: float [3, m], of the forgotten records.
        others: float [3, n], of records that no slice saw.
        rng: of permutations.
    """
    pairs = list(zip(members, others, strict=True))
    return Membership(
        name,
        tuple(statistics.separation(*pair) for pair in pairs),
        tuple(statistics.surplus(members[[c, -1]], others[[c, -1]], rng) for c in range(len(pairs) - 1)),
        tuple(statistics.roc(*pair) for pair in pairs),
    )


def lira(margins: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each margin under the Gaussians of shadows that saw the record, and that did not.

    Args:
        margins: float [C, n], under the slices under attack.
        shadows: float [N, n], under the shadows.
        inside: bool [N, n], which shadows saw the record; two of either kind at least.

    Returns:
        float64 [C, n].
    """
    every = np.ones((1, len(shadows)), bool)
    seen, unseen = (statistics.moments(shadows, mask, every) for mask in (inside, ~inside))
    return statistics.gaussian(margins, *seen) - statistics.gaussian(margins, *unseen)


def relative(margins: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """log p(x | slice) - log p(x), RMIA's likelihood ratio of one record, float64 [C, n].

    p(x) is ((1 + a) p_out(x) + 1 - a) / 2, with p_out the mean over the shadows that did not see the record.
    """
    unseen = np.where(inside, 0.0, np.exp(-statistics.losses(shadows))).sum(axis=0) / (~inside).sum(axis=0)
    return -statistics.losses(margins) - np.log(((1 + INTERPOLATION) * unseen + 1 - INTERPOLATION) / 2)


def rmia(ratios: np.ndarray, population: np.ndarray) -> np.ndarray:
    """Share of a population that a record dominates: `relative` of records [C, n] and of others [C, Z] -> [C, n]."""
    bars = np.sort(population + np.log(GAMMA), axis=1)
    shares = [np.searchsorted(bar, row, side="right") for bar, row in zip(bars, ratios, strict=True)]
    return np.stack(shares) / population.shape[1]
