"""Can slices that unlearned a record be told from slices that never saw it? U-LiRA and KLoM, on populations of slices.

For an exact method the populations have one distribution, so both search for bugs. Beside them stands what they do with
an "unlearning" that keeps the old slices (column `KEPT`) and with two populations that never saw the records (`NEVER`).

Shapes: N slices of a population, M slices of two, w records, R deals of a permutation test.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, RETAINED, VALIDATION, ShadowSets
from lmeraser_jax.evaluation.attacks.statistics import SIGNIFICANT, Tested

KEPT, UNLEARNED, NEVER = COLUMNS = range(3)
BINS = 20  # of KLoM's histograms, as published, like the next two
EMPTY = 1e-5  # probability of an oracle's empty bin
CLIPPED = 100.0  # margins are cut to +- so much
ROLES = {"forgotten": FORGOTTEN, "retained": RETAINED, "validation": VALIDATION}


class PopulationPair(NamedTuple):
    """Two populations of slices of one pool, to be told apart by the margins of some records."""

    margins: np.ndarray  # float [M, w], under the slices of both
    in_first: np.ndarray  # bool [M], the slices of the first population
    counts_in_first: np.ndarray  # bool [M, w], where a slice counts for a record if it is dealt to the first
    counts_in_second: np.ndarray  # bool [M, w], the same for the second
    fitted: np.ndarray  # bool [M], slices that Gaussians are fitted to; the others are told apart

    def accuracies(self, in_first: np.ndarray) -> np.ndarray:
        """Mean of the shares of both populations that are told right: float [R, w], NaN where nothing can be fitted.

        `in_first`, bool [R, M], are the slices of the first population in each of R deals.
        """
        first = statistics.moments(self.margins, self.counts_in_first, in_first & self.fitted)
        second = statistics.moments(self.margins, self.counts_in_second, ~in_first & self.fitted)
        moments = [(mean[:, None], deviation[:, None]) for mean, deviation in (first, second)]
        tests = ~self.fitted
        ratios = statistics.log_ratio(self.margins[tests][None], *moments)
        is_first = in_first[:, tests, None]
        of_first = is_first & self.counts_in_first[tests][None]
        of_second = ~is_first & self.counts_in_second[tests][None]
        says_first = np.where(ratios == 0, 0.5, ratios > 0)
        with np.errstate(invalid="ignore"):
            hits = (says_first * of_first).sum(axis=1) / of_first.sum(axis=1)
            rejections = ((1 - says_first) * of_second).sum(axis=1) / of_second.sum(axis=1)
        return np.where(np.isnan(ratios).any(axis=1), np.nan, (hits + rejections) / 2)


def population_pair(sets: ShadowSets, role: int, column: int) -> PopulationPair:
    """The slices of a column beside slices that never saw the forgotten records, for the records of one role.

    A forgotten record counts in the slices that were tuned on it first, and in all that never saw it; a retained one
    in the slices of either population that were tuned on it. In the column `NEVER`, slices that never saw the records
    stand beside others that did not either.
    """
    if column == NEVER:
        first, second = sets.never[::2], sets.never[1::2]
        saw = np.concatenate([sets.drawn[::2], sets.drawn[1::2]])
    else:
        first, second = sets.kept if column == KEPT else sets.unlearned, sets.never
        saw = np.concatenate([sets.inside, sets.drawn])
    records = sets.roles == role
    saw = saw[:, records]
    return PopulationPair(
        margins=np.concatenate([first, second])[:, records],
        in_first=np.arange(len(saw)) < len(first),
        counts_in_first=saw,
        counts_in_second=np.ones_like(saw) if role == FORGOTTEN else saw,
        fitted=np.concatenate([np.arange(len(first)) % 2 == 0, np.arange(len(second)) % 2 == 0]),
    )


def ulira(pools: Sequence[ShadowSets], rng: np.random.Generator) -> Finding:
    """U-LiRA (Hayes et al., 2025) over some pools; `rng` draws permutations.

    For each record a Gaussian is fitted to the margins of half the slices of either population; the other half is then
    told apart by likelihood. One half is perfect unlearning.

    Returns:
        A finding with the mean accuracy over forgotten and over retained records for each column, None where there are
        too few slices to fit anything to.
    """
    forgotten, retained = (
        [_accuracy([population_pair(sets, role, column) for sets in pools], rng) for column in COLUMNS]
        for role in (FORGOTTEN, RETAINED)
    )
    control = forgotten[KEPT]
    return Finding(
        "ulira",
        detected=tuple(tested is not None and tested.p < SIGNIFICANT for tested in forgotten),
        smallest_p=1.0 if control is None else control.smallest_p,
        lines=[
            ("accuracy, forgotten (by chance)", *map(statistics.cell, forgotten)),
            ("accuracy, retained (by chance)", *map(statistics.cell, retained)),
        ],
        values={"forgotten": forgotten, "retained": retained},
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
    """KLoM (Georgiev et al., 2025) over some pools; `rng` draws permutations.

    For each record, the Kullback-Leibler divergence of two histograms over slices: of its margins under slices that
    unlearned it, and under oracles tuned without it. Two sets of oracles give the floor that so few slices allow.

    Returns:
        A finding with the mean divergence over the records of each role for each column, None without such records.
        Tested is the mean over forgotten records, by permutations of slices and oracles.
    """
    mean: dict[str, list[float | None]] = {}
    for name, role in ROLES.items():
        mean[name] = []
        for column in COLUMNS:
            pairs = [klom_pair(sets, role, column) for sets in pools]
            values = np.concatenate([pair.divergences(pair.in_first[None])[0] for pair in pairs])
            mean[name].append(float(values.mean()) if len(values) else None)
    tests = []
    for column in (KEPT, UNLEARNED):
        pairs = [klom_pair(sets, FORGOTTEN, column) for sets in pools]
        deals = [
            statistics.permuted(pair.divergences, pair.in_first, np.zeros(len(pair.in_first)), rng) for pair in pairs
        ]
        tests.append(statistics.tested(np.concatenate(deals, axis=1).mean(axis=1)))
    return Finding(
        "klom",
        detected=(*(tested.p < SIGNIFICANT for tested in tests), False),
        smallest_p=tests[KEPT].smallest_p,
        lines=[
            ("mean, forgotten (by chance)", *map(str, tests), statistics.cell(mean["forgotten"][NEVER])),
            *((f"mean, {name}", *map(statistics.cell, mean[name])) for name in ("retained", "validation")),
        ],
        values={"mean": mean, "tested": tests},
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


def klom_pair(sets: ShadowSets, role: int, column: int) -> KlomPair:
    """The slices of a column beside half of the oracles, for the records of one role; the other half is the reference.

    All comparisons are of N / 2 slices. A forgotten record counts in those that were tuned on it first.
    """
    half = len(sets.never) // 2
    first, second = (sets.kept, sets.unlearned, sets.never)[column], sets.never[:half]
    if column == NEVER:
        second = sets.unlearned[:half]  # only widens the bins
    if role == FORGOTTEN and column != NEVER:
        valid = np.concatenate([sets.inside, sets.drawn[:half]])
    else:
        first = first[:half]
        valid = np.ones((2 * half, len(sets.roles)), bool)
    records = sets.roles == role
    return KlomPair(
        margins=np.concatenate([first, second])[:, records],
        valid=valid[:, records],
        in_first=np.arange(len(valid)) < len(first),
        oracles=sets.never[half : 2 * half, records],
    )
