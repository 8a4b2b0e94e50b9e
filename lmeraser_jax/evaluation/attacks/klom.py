"""KLoM (Georgiev et al., 2025): how far are unlearned slices' margins from those of slices that never saw a record?

For each record, the Kullback-Leibler divergence of two histograms over slices: of its margins under slices that
unlearned, and under oracles tuned without the forgotten records. Two sets of oracles give the floor that so few
slices allow. All comparisons are of N/2 slices with the same N/2 oracles.

Shapes: N slices of a population, w records, R deals of a permutation test.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, RETAINED, VALIDATION
from lmeraser_jax.evaluation.attacks.shadows import Shadows
from lmeraser_jax.evaluation.attacks.statistics import DOUBT, Tested

BINS = 20  # as published, like the next two
EMPTY = 1e-5  # probability of an oracle's empty bin
CLIPPED = 100.0  # margins are cut to +- so much
ROLES = {"forgotten": FORGOTTEN, "retained": RETAINED, "validation": VALIDATION}


@dataclasses.dataclass(frozen=True)
class Klom:
    """Divergences in nats, for slices that keep the records, unlearned them, and never saw them (the floor).

    Attributes:
        mean, high: {role: mean and 95th percentile over the records, for each column}.
        tested: the mean over the forgotten records, against what permuting slices and oracles gives.
    """

    mean: dict[str, tuple[float, ...]]
    high: dict[str, tuple[float, ...]]
    tested: tuple[Tested, ...]

    name = "klom"

    @property
    def found(self) -> tuple[bool, ...]:
        return *(column.p < DOUBT for column in self.tested), False

    @property
    def least(self) -> float:
        return self.tested[0].least

    def lines(self) -> list[tuple[str, ...]]:
        rows = [("mean, forgotten (by chance)", *map(str, self.tested), f"{self.mean['forgotten'][2]:.3f}")]
        rows += [(f"mean, {role}", *(f"{x:.3f}" for x in self.mean[role])) for role in ("retained", "validation")]
        return rows + [(f"95th percentile, {role}", *(f"{x:.3f}" for x in self.high[role])) for role in ROLES]

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"found": self.found}


def klom(trials: Sequence[tuple[np.ndarray, Shadows]], rng: np.random.Generator) -> Klom:
    """The measure over some pools.

    Args:
        trials: roles int [w] of a pool's watched records, and their scores under its shadows.
        rng: of the permutations.
    """
    mean, high, tests = {}, {}, []
    for name, role in ROLES.items():
        columns = []
        for column in range(3):
            pairs = (KlomPair.of(scores, roles == role, role, column) for roles, scores in trials)
            found = np.concatenate([pair.divergences(pair.group[None])[0] for pair in pairs])
            columns.append(found if len(found) else np.array([np.nan]))
        mean[name] = tuple(float(column.mean()) for column in columns)
        high[name] = tuple(float(np.quantile(column, 0.95)) for column in columns)
    for column in range(2):
        parts = []
        for roles, scores in trials:
            pair = KlomPair.of(scores, roles == FORGOTTEN, FORGOTTEN, column)
            parts.append(statistics.permuted(pair.divergences, pair.group, np.zeros(len(pair.group)), rng))
        tests.append(statistics.tested(np.concatenate(parts, axis=1).mean(axis=1)))
    return Klom(mean, high, tuple(tests))


@dataclasses.dataclass(frozen=True, eq=False)
class KlomPair:
    """Slices of one pool and oracles to compare them with.

    Attributes:
        margins: float [M, w], under the slices in question and under others that might have been in their place.
        valid: bool [M, w], where a slice counts for a record.
        group: bool [M], the slices in question.
        oracles: float [N / 2, w], margins under the oracles.
    """

    margins: np.ndarray
    valid: np.ndarray
    group: np.ndarray
    oracles: np.ndarray

    @classmethod
    def of(cls, scores: Shadows, chosen: np.ndarray, role: int, column: int) -> "KlomPair":
        """The slices of a column beside half the oracles, for records of one role; the other half is compared with.

        A forgotten record counts in the half of the slices that were tuned on it first.
        """
        half = len(scores.never) // 2
        first = (scores.shadows, scores.unlearned, scores.never)[column]
        second = scores.unlearned[:half] if column == 2 else scores.never[:half]
        if role == FORGOTTEN and column < 2:
            valid = np.concatenate([scores.inside, scores.drawn[:half]])
        else:
            first = first[:half]
            valid = np.ones((2 * half, len(chosen)), bool)
        margins, group = np.concatenate([first, second]), np.arange(len(valid)) < len(first)
        return cls(margins[:, chosen], valid[:, chosen], group, scores.never[half : 2 * half, chosen])

    def divergences(self, rows: np.ndarray) -> np.ndarray:
        """KL(histogram of some slices' margins || histogram of the oracles'), record by record, in nats.

        Args:
            rows: bool [R, M], the slices in question in each of R deals.

        Returns:
            float64 [R, w]; the bins span all margins, those of the oracles too.
        """
        both = np.clip(np.concatenate([self.margins, self.oracles]), -CLIPPED, CLIPPED)
        low, span = both.min(axis=0), np.ptp(both, axis=0)
        bins = np.minimum((both - low) / np.where(span > 0, span, 1.0) * BINS, BINS - 1).astype(int)
        marks = bins[..., None] == np.arange(BINS)  # [M + N / 2, w, bins]
        found = np.einsum("rm,mwb->rwb", rows.astype(np.float64), marks[: len(self.margins)] & self.valid[..., None])
        found /= np.maximum(found.sum(axis=-1, keepdims=True), 1.0)
        wanted = marks[len(self.margins) :].mean(axis=0)
        wanted = np.where(found > 0, np.maximum(wanted, EMPTY), wanted)
        return special.rel_entr(found, wanted / wanted.sum(axis=-1, keepdims=True)).sum(axis=-1)
