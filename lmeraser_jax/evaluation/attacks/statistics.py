"""What attacks are scored with: margins, ROC curves with their uncertainty, Gaussian likelihoods, permutations.

Everything is NumPy in float64. A margin is the log-odds of the true class, log(p / (1 - p)), which is also
the correct logit minus the logsumexp of the others; loss and probability follow from it without loss of digits.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special, stats

RATES = (0.01, 0.001)  # false positive rates at which the true positive rate is told (Carlini et al., 2022)
COVERED = 0.95  # of confidence and chance intervals
DOUBT = 0.005  # an attack has found something where chance alone would do as well less often than this
ROUNDS = 1000  # deals of a permutation test
ENOUGH = 8  # values that a standard deviation of one's own takes
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
        auc: probability that a member scores higher than another, ties counted half.
        low, high: its confidence interval (DeLong), clipped to [0, 1].
        p: chance of members scoring at least so much higher if there were no difference (Mann-Whitney).
        accuracy: mean of true positive and true negative rate at the best threshold; at least 0.5, also by chance.
        rates: true positive rates at the false positive rates `RATES`; None where there are too few others to tell.
        members, others: how many were scored.
    """

    auc: float
    low: float
    high: float
    p: float
    accuracy: float
    rates: tuple[Estimate | None, ...]
    members: int
    others: int


@dataclasses.dataclass(frozen=True)
class Tested:
    """A statistic, the interval that it lies in by chance, and the chance of reaching it (one-sided).

    `least` is the smallest such chance that there could have been: with few slices or records no value is unlikely.
    """

    value: float
    low: float
    high: float
    p: float
    least: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.2f} to {self.high:.2f})"


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log(p_y / (1 - p_y)) of logits [..., N, Y] and labels int [N]: float64 [..., N]."""
    logits = np.asarray(logits, np.float64)
    at = np.broadcast_to(labels[..., None], (*logits.shape[:-1], 1))
    correct = np.take_along_axis(logits, at, axis=-1)[..., 0]
    others = np.where(np.arange(logits.shape[-1]) == labels[..., None], -np.inf, logits)
    return correct - special.logsumexp(others, axis=-1)


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
    """The true positive rate at a false positive rate, with its interval (Clopper and Pearson, 1934).

    Args:
        members: float [m], scores.
        others: float [n].
        rate: of false positives.
        counts: independent members and others, where the scores are more than these; by default m and n.

    Returns:
        None where one false positive is more than the rate already.
    """
    m, n = counts or (len(members), len(others))
    if m < 1 or n * rate < 1:
        return None
    false, true = roc(members, others)
    found = float(true[false <= rate].max())
    interval = stats.binomtest(round(found * m), m).proportion_ci(COVERED, "exact")
    return Estimate(found, float(interval.low), float(interval.high))


def rate_lines(rates: Sequence[Sequence[Estimate | None]]) -> list[tuple[str, ...]]:
    """Rows of a table: true positive rates at each of `RATES`, a cell for each column."""
    cells = [["-" if rate is None else str(rate) for rate in column] for column in rates]
    return [(f"TPR at {rate:.1%} FPR", *(column[i] for column in cells)) for i, rate in enumerate(RATES)]


def separation(members: np.ndarray, others: np.ndarray) -> Separation:
    """Scores of members and of others, float [m] and [n], higher for members if the attack works."""
    auc, deviation = delong(members, others)
    reach = float(stats.norm.ppf(0.5 + COVERED / 2)) * deviation
    false, true = roc(members, others)
    return Separation(
        auc=auc,
        low=max(0.0, auc - reach),
        high=min(1.0, auc + reach),
        p=float(stats.mannwhitneyu(members, others, alternative="greater").pvalue),
        accuracy=float((true + 1.0 - false).max() / 2),
        rates=tuple(rate_at(members, others, rate) for rate in RATES),
        members=len(members),
        others=len(others),
    )


def delong(members: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The area under the ROC curve and its standard error (DeLong et al., 1988), by ranks as Sun and Xu (2014)."""
    m, n = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    above = (ranks[:m] - stats.rankdata(members)) / n  # share of others below each member
    below = 1.0 - (ranks[m:] - stats.rankdata(others)) / m  # share of members above each other
    spread = sum(np.var(part, ddof=1) / len(part) if len(part) > 1 else 0.25 for part in (above, below))
    return float(above.mean()), float(np.sqrt(spread))


def surplus(members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Tested:
    """By how much one slice's AUC is above another's: a paired permutation test (Bandos et al., 2005).

    If neither knows the members better, a record's rank under the one might as well be its rank under the other. What
    both have in common cancels: hard records, and members that differ from others whoever saw them.

    Args:
        members, others: float [2, m] and [2, n], the scores of the same records under either slice.
        rng: of the exchanges.
    """
    ranks, m = stats.rankdata(np.concatenate([members, others], axis=1), axis=1), members.shape[1]
    exchanged = rng.random((1 + ROUNDS, ranks.shape[1])) < 0.5
    exchanged[0] = False
    one, other = np.where(exchanged, ranks[1], ranks[0]), np.where(exchanged, ranks[0], ranks[1])
    sums = (stats.rankdata(part, axis=1)[:, :m].sum(axis=1) for part in (one, other))  # halves: exact
    return tested((next(sums) - next(sums)) / (m * others.shape[1]))


def clustered_auc(
    members: Sequence[np.ndarray], others: Sequence[np.ndarray], rng: np.random.Generator
) -> Estimate | None:
    """The area under the ROC curve of scores of which a record gives several, by a bootstrap over records.

    Args:
        members, others: for each of n records its scores as a member and as none, float [any].
        rng: of the bootstrap.

    Returns:
        None where no record has scores of both kinds; records that do not are left out.
    """
    pairs = [(one, other) for one, other in zip(members, others, strict=True) if len(one) and len(other)]
    if not pairs:
        return None
    sizes = np.array([(len(one), len(other)) for one, other in pairs], np.float64)  # [n, 2]
    flat, n = np.concatenate([other for _, other in pairs]), len(pairs)
    owner = np.repeat(np.arange(n), sizes[:, 1].astype(int))
    wins = [((one[:, None] > flat) + 0.5 * (one[:, None] == flat)).sum(axis=0) for one, _ in pairs]
    table = np.stack([np.bincount(owner, row, n) for row in wins])  # [n, n], one's members above another's others
    weights = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), ROUNDS)])
    areas = ((weights @ table) * weights).sum(axis=1) / (weights @ sizes).prod(axis=1)
    low, high = np.quantile(areas[1:], [0.5 - COVERED / 2, 0.5 + COVERED / 2])
    return Estimate(float(areas[0]), float(low), float(high))


def gaussian(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Log-density of a normal distribution, without its constant."""
    return -0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation)


def moments(values: np.ndarray, valid: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column over some of its rows.

    A column with fewer than `ENOUGH` values gets the deviation of all columns together (Carlini et al., 2022, do so
    with few shadow models).

    Args:
        values: float [M, N].
        valid: bool [M, N], values that count.
        rows: bool [R, M], the rows of each of R selections.

    Returns:
        Two of float64 [R, N]; a mean is NaN where no value counts.
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
    """A statistic of two groups of rows, as they are and with the rows dealt anew.

    Args:
        statistic: bool [R, M], the rows of the first group in each of R deals -> float [R, N].
        first: bool [M], the rows of the first group as they are.
        strata: int [M]; rows are exchanged with rows of the same stratum only.
        rng: of the deals.

    Returns:
        float [1 + ROUNDS, N], the statistic as it is in front.
    """
    deals = np.repeat(first[None], 1 + ROUNDS, axis=0)
    for stratum in np.unique(strata):
        inside = strata == stratum
        deals[1:, inside] = rng.permuted(deals[1:, inside], axis=1)
    return np.concatenate([statistic(part) for part in np.array_split(deals, 20)])  # in pieces, for the memory


def tested(values: np.ndarray) -> Tested:
    """A statistic float [1 + rounds], as it is in front and under permutations, tested for being too large."""
    low, high = np.quantile(values[1:], [0.5 - COVERED / 2, 0.5 + COVERED / 2])
    least = float((values >= values.max()).mean())
    return Tested(float(values[0]), float(low), float(high), float((values >= values[0]).mean()), least)
