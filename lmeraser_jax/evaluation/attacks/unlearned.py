"""Can slices that unlearned a record be told from slices that never saw it? U-LiRA and KLoM, on populations of slices.

For an exact method both have one distribution. The column `KEPT` is an "unlearning" that keeps the old slices, `NEVER`
compares two populations that never saw the records.

Shapes: N slices of a population, M slices of two, w forgotten records, R deals of a permutation test.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, ShadowSets
from lmeraser_jax.evaluation.attacks.statistics import SIGNIFICANT, Tested

KEPT, UNLEARNED, NEVER = COLUMNS = range(3)
BINS = 20  # of KLoM's histograms, as published, like the next two
EMPTY = 1e-5  # probability of an oracle's empty bin
CLIPPED = 100.0  # margins are cut to +- so much


class PopulationPair(NamedTuple):
    """Two populations of slices of one pool, to be told apart by the margins of its forgotten records."""

    margins: np.ndarray  # float [M, w], under the slices of both
    in_first: np.ndarray  # bool [M], the slices of the first population
    counts_in_first: np.ndarray  # bool [M, w], where a slice counts for a record if it is dealt to the first
    fitted: np.ndarray  # bool [M], slices that Gaussians are fitted to; the others are told apart

    def accuracies(self, in_first: np.ndarray) -> np.ndarray:
        """Mean of the shares of both populations that are told right: float [R, w], NaN where nothing can be fitted.

        `in_first`, bool [R, M], are the slices of the first population in each of R deals.
        """
        first = statistics.moments(self.margins, self.counts_in_first, in_first & self.fitted)
        second = statistics.moments(self.margins, np.ones_like(self.counts_in_first), ~in_first & self.fitted)
        moments = [(mean[:, None], deviation[:, None]) for mean, deviation in (first, second)]
        tests = ~self.fitted
        ratios = statistics.log_ratio(self.margins[tests][None], *moments)
        of_second = ~in_first[:, tests, None]
        of_first = ~of_second & self.counts_in_first[tests][None]
        says_first = np.where(ratios == 0, 0.5, ratios > 0)
        with np.errstate(invalid="ignore"):
            hits = (says_first * of_first).sum(axis=1) / of_first.sum(axis=1)
            rejections = ((1 - says_first) * of_second).sum(axis=1) / of_second.sum(axis=1)
        return np.where(np.isnan(ratios).any(axis=1), np.nan, (hits + rejections) / 2)


def population_pair(sets: ShadowSets, column: int) -> PopulationPair:
    """The slices of a column beside slices that never saw the forgotten records.

    A record counts in the slices that were tuned on it first, and in all that never saw it. In the column `NEVER`,
    slices that never saw the records stand beside others that did not either.
    """
    if column == NEVER:
        first, second = sets.never[::2], sets.never[1::2]
        saw = np.concatenate([sets.drawn[::2], sets.drawn[1::2]])
    else:
        first, second = sets.kept if column == KEPT else sets.unlearned, sets.never
        saw = np.concatenate([sets.inside, sets.drawn])
    forgotten = sets.roles == FORGOTTEN
    return PopulationPair(
        margins=np.concatenate([first, second])[:, forgotten],
        in_first=np.arange(len(saw)) < len(first),
        counts_in_first=saw[:, forgotten],
        fitted=np.concatenate([np.arange(len(first)) % 2 == 0, np.arange(len(second)) % 2 == 0]),
    )


def ulira(pools: Sequence[ShadowSets], rng: np.random.Generator) -> Finding:
    """U-LiRA (Hayes et al., 2025) over some pools; `rng` draws permutations.

    For each forgotten record a Gaussian is fitted to the margins of half the slices of either population; the other
    half is then told apart by likelihood. One half is perfect unlearning. The finding has the mean accuracy for each
    column, None where there are too few slices to fit anything to.
    """
    columns = [_accuracy([population_pair(sets, column) for sets in pools], rng) for column in COLUMNS]
    control = columns[KEPT]
    return Finding(
        "ulira",
        detected=tuple(tested is not None and tested.p < SIGNIFICANT for tested in columns),
        smallest_p=1.0 if control is None else control.smallest_p,
        lines=[("accuracy, forgotten (by chance)", *map(statistics.cell, columns))],
        values={"forgotten": columns},
    )


def _accuracy(pairs: Sequence[PopulationPair], rng: np.random.Generator) -> Tested | None:
    """Mean accuracy over the records of all pools; None where there are too few slices to fit anything to."""
    values = [statistics.permuted(pair.accuracies, pair.in_first, pair.fitted, rng) for pair in pairs]
    values = np.concatenate(values, axis=1)  # [1 + rounds, records]
    valid = ~np.isnan(values)
    if not valid[0].any():
        return None
    return statistics.tested(np.where(valid, values, 0.0).sum(axis=1) / np.maximum(valid.sum(axis=1), 1))


def klom(pools: Sequence[ShadowSets], rng: np.random.Generator) -> Finding:
    """KLoM (Georgiev et al., 2025) over some pools; `rng` draws permutations of slices and oracles.

    For each forgotten record, the Kullback-Leibler divergence of two histograms over slices: of its margins under
    slices that unlearned it, and under oracles tuned without it. Two sets of oracles give the floor that so few slices
    allow. The finding has the mean divergence over the records, for each column.
    """
    tests = []
    for column in (KEPT, UNLEARNED):
        pairs = [klom_pair(sets, column) for sets in pools]
        deals = [
            statistics.permuted(pair.divergences, pair.in_first, np.zeros(len(pair.in_first)), rng) for pair in pairs
        ]
        tests.append(statistics.tested(np.concatenate(deals, axis=1).mean(axis=1)))
    oracles = [klom_pair(sets, NEVER) for sets in pools]
    floor = float(np.concatenate([pair.divergences(pair.in_first[None])[0] for pair in oracles]).mean())
    return Finding(
        "klom",
        detected=(*(tested.p < SIGNIFICANT for tested in tests), False),
        smallest_p=tests[KEPT].smallest_p,
        lines=[("mean, forgotten (by chance)", *map(str, tests), statistics.cell(floor))],
        values={"forgotten": tests, "floor": floor},
    )


class KlomPair(NamedTuple):
    """Slices of one pool, others that might stand in their place, and oracles to compare them with."""

    margins: np.ndarray  # float [M, w], under the slices and the others
    valid: np.ndarray  # bool [M, w], where a slice counts for a record
    in_first: np.ndarray  # bool [M], the slices
    oracles: np.ndarray  # float [N / 2, w], margins under the oracles

    def divergences(self, in_first: np.ndarray) -> np.ndarray:
        """KL(histogram of the first slices' margins || histogram of the oracles'), in nats: float64 [R, w].

        `in_first`, bool [R, M], are the first slices in each of R deals. The bins span all margins.
        """
        margins = np.clip(np.concatenate([self.margins, self.oracles]), -CLIPPED, CLIPPED)
        low, span = margins.min(axis=0), np.ptp(margins, axis=0)
        bins = np.minimum((margins - low) / np.where(span > 0, span, 1.0) * BINS, BINS - 1).astype(int)
        in_bin = bins[..., None] == np.arange(BINS)  # [M + N / 2, w, bins]
        slices, oracles = in_bin[: len(self.margins)] & self.valid[..., None], in_bin[len(self.margins) :]
        p = np.einsum("rm,mwb->rwb", in_first.astype(np.float64), slices)
        p /= np.maximum(p.sum(axis=-1, keepdims=True), 1.0)
        q = oracles.mean(axis=0)
        q = np.where(p > 0, np.maximum(q, EMPTY), q)
        return special.rel_entr(p, q / q.sum(axis=-1, keepdims=True)).sum(axis=-1)


def klom_pair(sets: ShadowSets, column: int) -> KlomPair:
    """The slices of a column beside half of the oracles, for the forgotten records; the other half is the reference.

    All comparisons are of N / 2 slices: a record counts in those that were tuned on it first.
    """
    half, forgotten = len(sets.never) // 2, sets.roles == FORGOTTEN
    first, second = sets.kept if column == KEPT else sets.unlearned, sets.never[:half]
    valid = np.concatenate([sets.inside, sets.drawn[:half]])
    if column == NEVER:
        first, second = sets.never[:half], sets.unlearned[:half]  # the second only widens the bins
        valid = np.ones((2 * half, len(sets.roles)), bool)
    return KlomPair(
        margins=np.concatenate([first, second])[:, forgotten],
        valid=valid[:, forgotten],
        in_first=np.arange(len(valid)) < len(first),
        oracles=sets.never[half : 2 * half, forgotten],
    )
