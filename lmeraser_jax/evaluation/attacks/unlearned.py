"""Can slices that unlearned a record be told from slices that never saw it? Two attacks on populations of slices.

U-LiRA (Hayes et al., 2025): for each record a Gaussian is fitted to the margins of half the slices of either
population; the other half is then told apart by likelihood. An accuracy of one half is perfect unlearning.

KLoM (Georgiev et al., 2025): for each record, the Kullback-Leibler divergence of two histograms over slices: of its
margins under slices that unlearned it, and under oracles tuned without it. Two sets of oracles give the floor that so
few slices allow.

For an exact method the populations have one distribution, so both search for bugs. Beside them stands what they do
with an "unlearning" that keeps the old slices (column `KEPT`) and with two populations that never saw the records
(`NEVER`).

Shapes: N slices of a population, M slices of two, w records, R deals of a permutation test, t slices to tell apart.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special

from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, RETAINED, VALIDATION, ShadowSets
from lmeraser_jax.evaluation.attacks.statistics import RATES, SIGNIFICANT, Estimate, Tested

KEPT, UNLEARNED, NEVER = COLUMNS = range(3)
BINS = 20  # of KLoM's histograms, as published, like the next two
EMPTY = 1e-5  # probability of an oracle's empty bin
CLIPPED = 100.0  # margins are cut to +- so much
ROLES = {"forgotten": FORGOTTEN, "retained": RETAINED, "validation": VALIDATION}


@dataclasses.dataclass(frozen=True, eq=False)
class PopulationPair:
    """Two populations of slices of one pool, to be told apart by the margins of some records.

    Attributes:
        margins: float [M, w], under the slices of both.
        in_first: bool [M], the slices of the first population.
        counts_in_first, counts_in_second: bool [M, w], where a slice counts for a record if it is dealt to either.
        fitted: bool [M], slices that Gaussians are fitted to; the others are told apart.
    """

    margins: np.ndarray
    in_first: np.ndarray
    counts_in_first: np.ndarray
    counts_in_second: np.ndarray
    fitted: np.ndarray

    def log_ratios(self, in_first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-likelihood ratios of the t slices that nothing was fitted to, float [R, t, w].

        `in_first`, bool [R, M], are the slices of the first population in each of R deals. Ratios are NaN where a
        population has no slice to fit. Also returns which count for the first and for the second population.
        """
        tests = ~self.fitted
        first = statistics.moments(self.margins, self.counts_in_first, in_first & self.fitted)
        second = statistics.moments(self.margins, self.counts_in_second, ~in_first & self.fitted)
        moments = [(mean[:, None], deviation[:, None]) for mean, deviation in (first, second)]
        ratios = statistics.log_ratio(self.margins[tests][None], *moments)
        is_first = in_first[:, tests, None]
        return ratios, is_first & self.counts_in_first[tests][None], ~is_first & self.counts_in_second[tests][None]

    def accuracies(self, in_first: np.ndarray) -> np.ndarray:
        """Mean of the shares of both populations that are told right: float [R, w], NaN where there is none."""
        ratios, of_first, of_second = self.log_ratios(in_first)
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
    """U-LiRA over some pools; `rng` draws permutations and bootstraps.

    Returns:
        A finding with, for each column, the mean accuracy over forgotten and over retained records, and the AUC and
        true positive rates of the likelihood ratios of all forgotten records and slices. None: too few could be fitted.
    """
    forgotten = [[population_pair(sets, FORGOTTEN, column) for sets in pools] for column in COLUMNS]
    retained = [[population_pair(sets, RETAINED, column) for sets in pools] for column in COLUMNS]
    accuracies = [_accuracy(pairs, rng) for pairs in forgotten]
    retained_accuracies = [_accuracy(pairs, rng) for pairs in retained]
    control = accuracies[KEPT]
    ratios = [_ratios_by_record(pairs) for pairs in forgotten]
    aucs = [statistics.clustered_auc(first, second, rng) for first, second in ratios]
    rates = [_rates(first, second) for first, second in ratios]
    return Finding(
        "ulira",
        detected=tuple(tested is not None and tested.p < SIGNIFICANT for tested in accuracies),
        smallest_p=1.0 if control is None else control.smallest_p,
        lines=[
            ("accuracy, forgotten (by chance)", *map(statistics.cell, accuracies)),
            ("AUC", *map(statistics.cell, aucs)),
            *statistics.rate_lines(rates),
            ("accuracy, retained (by chance)", *map(statistics.cell, retained_accuracies)),
        ],
        values={"forgotten": accuracies, "retained": retained_accuracies, "auc": aucs, "rates": rates},
    )


def _accuracy(pairs: Sequence[PopulationPair], rng: np.random.Generator) -> Tested | None:
    """Mean accuracy over the records of all pools; None where there are too few slices to fit anything to."""
    values = [statistics.permuted(pair.accuracies, pair.in_first, pair.fitted, rng) for pair in pairs]
    values = np.concatenate(values, axis=1)  # [1 + rounds, records]
    valid = ~np.isnan(values)
    if not valid[0].any():
        return None
    return statistics.tested(np.where(valid, values, 0.0).sum(axis=1) / np.maximum(valid.sum(axis=1), 1))


def _ratios_by_record(pairs: Sequence[PopulationPair]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each record, its log-likelihood ratios in slices of the first population and in those of the second."""
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    for pair in pairs:
        ratios, of_first, of_second = (values[0] for values in pair.log_ratios(pair.in_first[None]))
        fitted = ~np.isnan(ratios)
        for record in range(ratios.shape[1]):
            first.append(ratios[of_first[:, record] & fitted[:, record], record])
            second.append(ratios[of_second[:, record] & fitted[:, record], record])
    return first, second


def _rates(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[Estimate | None, ...]:
    counts = sum(len(ratios) > 0 for ratios in first), sum(len(ratios) > 0 for ratios in second)
    return tuple(statistics.rate_at(np.concatenate(first), np.concatenate(second), rate, counts) for rate in RATES)


def klom(pools: Sequence[ShadowSets], rng: np.random.Generator) -> Finding:
    """KLoM over some pools; `rng` draws permutations.

    Returns:
        A finding with, for each role and column, the mean and the 95th percentile of the divergences over records.
        Tested is the mean over forgotten records, by permutations of slices and oracles.
    """
    mean, high = {}, {}
    for name, role in ROLES.items():
        columns = []
        for column in COLUMNS:
            pairs = [klom_pair(sets, role, column) for sets in pools]
            values = np.concatenate([pair.divergences(pair.in_first[None])[0] for pair in pairs])
            columns.append(values if len(values) else np.array([np.nan]))
        mean[name] = [float(values.mean()) for values in columns]
        high[name] = [float(np.quantile(values, 0.95)) for values in columns]
    tests = []
    for column in (KEPT, UNLEARNED):
        pairs = [klom_pair(sets, FORGOTTEN, column) for sets in pools]
        deals = [
            statistics.permuted(pair.divergences, pair.in_first, np.zeros(len(pair.in_first)), rng) for pair in pairs
        ]
        tests.append(statistics.tested(np.concatenate(deals, axis=1).mean(axis=1)))
    rows = {f"mean, {role}": mean[role] for role in ("retained", "validation")}
    rows |= {f"95th percentile, {role}": high[role] for role in ROLES}
    return Finding(
        "klom",
        detected=(*(tested.p < SIGNIFICANT for tested in tests), False),
        smallest_p=tests[KEPT].smallest_p,
        lines=[
            ("mean, forgotten (by chance)", *map(str, tests), f"{mean['forgotten'][NEVER]:.3f}"),
            *((name, *(f"{value:.3f}" for value in values)) for name, values in rows.items()),
        ],
        values={"mean": mean, "high": high, "tested": tests},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class KlomPair:
    """Slices of one pool, others that might stand in their place, and oracles to compare them with.

    Attributes:
        margins: float [M, w], under the slices and the others.
        valid: bool [M, w], where a slice counts for a record.
        in_first: bool [M], the slices.
        oracles: float [N / 2, w], margins under the oracles.
    """

    margins: np.ndarray
    valid: np.ndarray
    in_first: np.ndarray
    oracles: np.ndarray

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
