"""What attacks are scored with: margins, ROC curves with their uncertainty, Gaussian likelihoods, permutations.

Everything is NumPy in float64. A margin is the log-odds of the true class, log(p / (1 - p)), which is also
the correct logit minus the logsumexp of the others; the loss follows from it without loss of digits.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import special, stats
from sklearn.metrics import roc_curve

RATES = (0.01, 0.001)  # false positive rates at which true positive rates are reported (Carlini et al., 2022)
COVERED = 0.95  # of confidence intervals and intervals by chance
SIGNIFICANT = 0.005  # an attack detects something where chance alone does as well less often than this
ROUNDS = 1000  # of permutations and bootstraps
ENOUGH = 8  # values from which a column has a standard deviation of its own
SMALLEST = 1e-6  # standard deviations are at least so large


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"


@dataclasses.dataclass(frozen=True)
class Separation:
    """How well a score tells members from others."""

    auc: Estimate  # probability that a member scores higher than another, ties counted half; DeLong's interval
    p: float  # chance of members scoring at least so much higher if there were no difference (Mann-Whitney)
    rates: tuple[Estimate | None, ...]  # true positive rates at `RATES`; None where there are too few others to tell


@dataclasses.dataclass(frozen=True)
class Tested:
    """A statistic, the interval that it lies in by chance, and the chance p of reaching it (one-sided).

    `smallest_p` is the smallest chance that any value could have had: with few slices or records none is unlikely.
    """

    value: float
    low: float
    high: float
    p: float
    smallest_p: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.2f} to {self.high:.2f})"


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log(p_y / (1 - p_y)) of logits [..., N, Y] and labels int [N]: float64 [..., N]."""
    logits = np.asarray(logits, np.float64)
    true_class = np.arange(logits.shape[-1]) == labels[..., None]  # [N, Y]
    correct = np.where(true_class, logits, 0.0).sum(axis=-1)
    return correct - special.logsumexp(np.where(true_class, -np.inf, logits), axis=-1)


def losses(margins: np.ndarray) -> np.ndarray:
    """Cross-entropy -log p_y from margins."""
    return np.logaddexp(0.0, -margins)


def cell(value: Estimate | Tested | float | None) -> str:
    """A value in a table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def rate_at(members: np.ndarray, others: np.ndarray, rate: float) -> Estimate | None:
    """The true positive rate at a rate of false positives, with its interval (Clopper and Pearson, 1934).

    Scores are float [m] and [n]. None where one false positive is more than the rate already.
    """
    m = len(members)
    if len(others) * rate < 1:
        return None
    truth = np.repeat([1, 0], [m, len(others)])
    false, true, _ = roc_curve(truth, np.concatenate([members, others]), drop_intermediate=False)
    value = float(true[false <= rate].max())
    interval = stats.binomtest(round(value * m), m).proportion_ci(COVERED, "exact")
    return Estimate(value, float(interval.low), float(interval.high))


def separation(members: np.ndarray, others: np.ndarray) -> Separation:
    """Scores of members and of others, float [m] and [n], higher for members if the attack works."""
    auc, deviation = delong(members, others)
    reach = float(stats.norm.ppf(0.5 + COVERED / 2)) * deviation
    return Separation(
        auc=Estimate(auc, max(0.0, auc - reach), min(1.0, auc + reach)),
        p=float(stats.mannwhitneyu(members, others, alternative="greater").pvalue),
        rates=tuple(rate_at(members, others, rate) for rate in RATES),
    )


def delong(members: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The area under the ROC curve and its standard error (DeLong et al., 1988), by ranks as Sun and Xu (2014)."""
    m, n = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    below = (ranks[:m] - stats.rankdata(members)) / n  # share of others below each member
    above = 1.0 - (ranks[m:] - stats.rankdata(others)) / m  # share of members above each other
    variance = sum(np.var(shares, ddof=1) / len(shares) if len(shares) > 1 else 0.25 for shares in (below, above))
    return float(below.mean()), float(np.sqrt(variance))


def auc_difference(members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Tested:
    """By how much one slice's AUC is above another's: a paired permutation test (Bandos et al., 2005).

    If neither knows the members better, a record's rank under the one might as well be its rank under the other. What
    both have in common cancels: hard records, and members that differ from others whoever saw them. Scores of the same
    records under either slice are float [2, m] and [2, n].
    """
    ranks, m = stats.rankdata(np.concatenate([members, others], axis=1), axis=1), members.shape[1]
    exchanged = rng.random((1 + ROUNDS, ranks.shape[1])) < 0.5
    exchanged[0] = False

    def rank_sums(scores: np.ndarray) -> np.ndarray:
        return stats.rankdata(scores, axis=1)[:, :m].sum(axis=1)  # multiples of a half: exact

    difference = rank_sums(np.where(exchanged, ranks[1], ranks[0])) - rank_sums(np.where(exchanged, ranks[0], ranks[1]))
    return tested(difference / (m * others.shape[1]))


def log_ratio(
    values: np.ndarray, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Log-likelihood ratio of values under two Gaussians, each given by mean and standard deviation."""
    densities = [-0.5 * ((values - mean) / spread) ** 2 - np.log(spread) for mean, spread in (first, second)]
    return densities[0] - densities[1]


def moments(values: np.ndarray, valid: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column over some of its rows.

    A column with fewer than `ENOUGH` values gets the deviation of all columns together (Carlini et al., 2022, do so
    with few shadow models). Of the values, float [M, N], those count that are valid, bool [M, N], and in one of R
    selections of rows, bool [R, M]. Two of float64 [R, N]; a mean is NaN where no value counts.
    """
    centre = values.mean(axis=0)  # keeps the digits of the squares
    gaps, chosen = np.where(valid, values - centre, 0.0), rows.astype(np.float64)
    count, total = chosen @ valid.astype(np.float64), chosen @ gaps
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        squares = np.where(count > 0, chosen @ gaps**2 - count * mean**2, 0.0)
        together = squares.sum(axis=1, keepdims=True) / np.maximum(count - 1, 0).sum(axis=1, keepdims=True)
        variance = np.where(count >= ENOUGH, squares / (count - 1), together)
    return mean + centre, np.sqrt(np.fmax(variance, SMALLEST**2))


def permuted(
    statistic: Callable[[np.ndarray], np.ndarray], first: np.ndarray, strata: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A statistic of two groups of rows, float [1 + ROUNDS, N]: as they are in front, then with the rows dealt anew.

    The statistic maps the rows of the first group in each of R deals, bool [R, M], to float [R, N]; `first`, bool [M],
    are those rows as they are. Rows are exchanged with rows of the same stratum, int [M], only.
    """
    deals = np.repeat(first[None], 1 + ROUNDS, axis=0)
    for stratum in np.unique(strata):
        inside = strata == stratum
        deals[1:, inside] = rng.permuted(deals[1:, inside], axis=1)
    return np.concatenate([statistic(rows) for rows in np.array_split(deals, 20)])  # in pieces, for the memory


def tested(values: np.ndarray) -> Tested:
    """A statistic float [1 + rounds], as it is in front and under permutations, tested for being too large."""
    low, high = np.quantile(values[1:], [0.5 - COVERED / 2, 0.5 + COVERED / 2])
    smallest = float((values >= values.max()).mean())
    return Tested(float(values[0]), float(low), float(high), float((values >= values[0]).mean()), smallest)
