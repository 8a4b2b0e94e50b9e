"""What attacks are scored with: margins, ROC curves with their uncertainty, Gaussian likelihoods, permutations.

Everything is NumPy in float64. A margin is the log-odds of the true class, log(p / (1 - p)), which is also
the correct logit minus the logsumexp of the others; the loss follows from it without loss of digits.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special, stats

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
    """How well a score tells members from others.

    Attributes:
        auc: probability that a member scores higher than another, ties counted half, with DeLong's interval.
        p: chance of members scoring at least so much higher if there were no difference (Mann-Whitney).
        accuracy: mean of true positive and true negative rate at the best threshold; at least 0.5, also by chance.
        rates: true positive rates at the false positive rates `RATES`; None where there are too few others to tell.
        others: how many others were scored.
    """

    auc: Estimate
    p: float
    accuracy: float
    rates: tuple[Estimate | None, ...]
    others: int


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


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, rising, of every threshold between scores: from (0, 0) to (1, 1)."""
    scores, inside = np.concatenate([members, others]), np.arange(len(members) + len(others)) < len(members)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # tied scores pass a threshold together
    hits, alarms = np.cumsum(inside[order])[last], np.cumsum(~inside[order])[last]
    return np.append(0.0, alarms / len(others)), np.append(0.0, hits / len(members))


def rate_at(
    members: np.ndarray, others: np.ndarray, rate: float, counts: tuple[int, int] | None = None
) -> Estimate | None:
    """The true positive rate at a rate of false positives, with its interval (Clopper and Pearson, 1934).

    Scores are float [m] and [n]; `counts` are the independent members and others, where a record has several scores.
    None where one false positive is more than the rate already.
    """
    m, n = counts or (len(members), len(others))
    if m < 1 or n * rate < 1:
        return None
    false, true = roc(members, others)
    value = float(true[false <= rate].max())
    interval = stats.binomtest(round(value * m), m).proportion_ci(COVERED, "exact")
    return Estimate(value, float(interval.low), float(interval.high))


def cell(value: Estimate | Tested | None) -> str:
    """A value in a table."""
    return "-" if value is None else str(value)


def rate_lines(columns: Sequence[Sequence[Estimate | None]]) -> list[tuple[str, ...]]:
    """Rows of a table: true positive rates at each of `RATES`, a cell for each column."""
    return [(f"TPR at {rate:.1%} FPR", *(cell(column[i]) for column in columns)) for i, rate in enumerate(RATES)]


def separation(members: np.ndarray, others: np.ndarray) -> Separation:
    """Scores of members and of others, float [m] and [n], higher for members if the attack works."""
    auc, deviation = delong(members, others)
    reach = float(stats.norm.ppf(0.5 + COVERED / 2)) * deviation
    false, true = roc(members, others)
    return Separation(
        auc=Estimate(auc, max(0.0, auc - reach), min(1.0, auc + reach)),
        p=float(stats.mannwhitneyu(members, others, alternative="greater").pvalue),
        accuracy=float((true + 1.0 - false).max() / 2),
        rates=tuple(rate_at(members, others, rate) for rate in RATES),
        others=len(others),
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


def clustered_auc(
    members: Sequence[np.ndarray], others: Sequence[np.ndarray], rng: np.random.Generator
) -> Estimate | None:
    """The area under the ROC curve where each record has several scores, by a bootstrap over records.

    `members` and `others` have for each of n records its scores as a member and as none. Records without scores of both
    kinds are left out; None where no record is left.
    """
    pairs = [(inside, outside) for inside, outside in zip(members, others, strict=True) if len(inside) and len(outside)]
    if not pairs:
        return None
    sizes = np.array([(len(inside), len(outside)) for inside, outside in pairs], np.float64)  # [n, 2]
    flat, n = np.concatenate([outside for _, outside in pairs]), len(pairs)
    record = np.repeat(np.arange(n), sizes[:, 1].astype(int))
    wins = [((inside[:, None] > flat) + 0.5 * (inside[:, None] == flat)).sum(axis=0) for inside, _ in pairs]
    table = np.stack([np.bincount(record, row, n) for row in wins])  # [n, n], one's members above another's others
    weights = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), ROUNDS)])
    areas = ((weights @ table) * weights).sum(axis=1) / (weights @ sizes).prod(axis=1)
    low, high = np.quantile(areas[1:], [0.5 - COVERED / 2, 0.5 + COVERED / 2])
    return Estimate(float(areas[0]), float(low), float(high))


def log_ratio(
    values: np.ndarray, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Log-likelihood ratio of values under two Gaussians, each given by mean and standard deviation."""

    def log_density(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:  # without its constant
        return -0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation)

    return log_density(*first) - log_density(*second)


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
