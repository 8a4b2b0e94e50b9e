"""Heads that are a formula of their members' features: ridge regression and nearest class mean.

A feature is rounded to a fixed point first, so that every sum over members is a sum of whole numbers: the same bits in
any order, and what remains after a member is taken away is what there would be without it. Only the last
step, from sums to a head, is done in floating point. A large slice's sums are kept beside it (`KeptSums`), so that an
erasure subtracts and reads nobody else's feature.

A head is linear in the feature, and in random cosines of it where it is expanded (Rahimi and Recht, 2007): those are
the same for everybody, so nothing changes for erasure.

Shapes: m members, D feature, E random cosines, Y classes. Where features are expanded, D stands for D + E.
"""

import dataclasses
import functools
import io
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.config import Common, Tuning
from lmeraser_jax.data.npz import read_arrays
from lmeraser_jax.hashing import philox
from lmeraser_jax.storage.atomic_files import write_bytes
from lmeraser_jax.training.slices import Slice

STEPS = 512  # fixed-point numbers to 1
LARGEST = 64  # features beyond it count as that large
PIECE = 65_536  # members summed at once; all products of two numbers sum below 2^53, so float64 holds them exactly
TALLIED = 4096  # members from which on sums are kept; fewer are added up again as fast
TALLY = "sums.npz"
NEVER = -1e9  # logit of a class without a member
BANDWIDTH = 1.0  # of the random cosines, for features of length 1
SHARPNESS = 10.0  # a ridge head fits 0 and 1; times this, its differences are log-odds of about the right size


@functools.lru_cache(maxsize=8)
def directions(width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the random cosines: float32 [D, E] and phases float32 [E]. They depend on nothing but their number."""
    random = philox(0, "random cosines", str(width), str(count))
    weights = random.standard_normal((width, count), np.float32)
    return weights, random.uniform(0, 2 * np.pi, count).astype(np.float32)


def expanded(features: Any, count: int) -> Any:
    """Features [m, D], NumPy or JAX, with E random cosines of their direction beside them: [m, D + E]."""
    if not count:
        return features
    numbers = jnp if isinstance(features, jax.Array) else np
    weights, phases = directions(features.shape[1], count)
    length = numbers.sqrt(numbers.maximum(numbers.sum(features**2, axis=1, keepdims=True), 1e-12))
    cosines = numbers.cos(BANDWIDTH * (features / length) @ weights + phases[None])
    return numbers.concatenate([features, cosines], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Whole numbers over members: products int64 [D, D], by_class int64 [Y, D], counts int64 [Y]."""

    products: np.ndarray
    by_class: np.ndarray
    counts: np.ndarray

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.products + other.products, self.by_class + other.by_class, self.counts + other.counts)

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(self.products - other.products, self.by_class - other.by_class, self.counts - other.counts)


def fixed_point(features: np.ndarray) -> np.ndarray:
    """Whole numbers of 1/512 as float64 [m, D], which holds them exactly; features float32 [m, D]."""
    return np.rint(np.clip(features.astype(np.float64), -LARGEST, LARGEST) * STEPS)


def sums(features: np.ndarray, labels: np.ndarray, classes: int) -> Sums:
    """Adds up members: float32 [m, D], int32 [m]. Exact, so in any order and in any pieces the same."""
    width = features.shape[1]
    found = Sums(np.zeros((width, width), np.int64), np.zeros((classes, width), np.int64), np.zeros(classes, np.int64))
    for start in range(0, len(features), PIECE):
        x, y = fixed_point(features[start : start + PIECE]), labels[start : start + PIECE]
        chosen = (y[:, None] == np.arange(classes)[None]).astype(np.float64)  # [m, Y]
        parts = (x.T @ x, chosen.T @ x, chosen.sum(axis=0))
        found += Sums(*(part.astype(np.int64) for part in parts))
    return found


def ridge(total: Sums, penalty: float) -> tuple[Slice, float]:
    """Least squares on standardised features, with a penalty on the squared weights; the intercept is free.

    Solves (C + penalty I) W = B, where C is the correlation matrix of the features and B their covariance with the
    one-hot labels.

    Args:
        total: sums over the members, at least one.
        penalty: above 0.

    Returns:
        The head, and its mean squared error on one-hot labels.
    """
    count = total.counts.sum()
    mean = total.by_class.sum(axis=0) / count  # [D]
    shares = total.counts / count  # [Y]
    covariance = total.products / count - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diag(covariance), 1.0))  # one step of the fixed point at least
    correlation = covariance / np.outer(spread, spread)
    with_labels = (total.by_class / count - np.outer(shares, mean)).T / spread[:, None]  # [D, Y]
    solved = np.linalg.solve(correlation + penalty * np.eye(len(mean)), with_labels)
    error = (shares * (1 - shares)).sum() + (solved * (correlation @ solved - 2 * with_labels)).sum()
    weights = solved / spread[:, None]
    bias = shares - mean @ weights
    return _head(SHARPNESS * weights * STEPS, SHARPNESS * bias), float(error)


def nearest_class_mean(total: Sums) -> tuple[Slice, float]:
    """The class whose mean feature is nearest: minus half the squared distance, less what all classes share.

    Returns:
        The head, and the members' mean squared distance to the mean of their own class.
    """
    there = total.counts > 0
    means = total.by_class / np.maximum(total.counts, 1)[:, None] / STEPS  # [Y, D]
    count, squares = total.counts.sum(), (means**2).sum(axis=1)
    spread = np.trace(total.products) / STEPS**2 / count - (total.counts * squares).sum() / count
    return _head(means.T, np.where(there, -0.5 * squares, NEVER)), float(spread)


def _head(kernel: np.ndarray, bias: np.ndarray) -> Slice:
    return Slice(np.zeros(0, np.float32), kernel.astype(np.float32), bias.astype(np.float32))


def head(how: Tuning | Common, total: Sums) -> tuple[Slice, float]:
    """The slice of a cluster, ridge or ncm with its settings, and its loss: functions of the sums alone."""
    return ridge(total, how.penalty) if how.method == "ridge" else nearest_class_mean(total)


def solve(how: Tuning | Common, features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[Slice, float]:
    """The slice of a cluster with these members, and its loss.

    Args:
        how: ridge or ncm, with its settings.
        features: float32 [m, D], not expanded.
        labels: int32 [m].
        classes: Y.
    """
    return head(how, sums(expanded(features, how.expand), labels, classes))


@dataclasses.dataclass(frozen=True, eq=False)
class KeptSums:
    """Sums, and whose they are, so that members can be taken away again. As private as the members.

    Attributes:
        total: over all members.
        rows: int32 [m], image rows of the members.
        labels: int32 [m].
        checks: uint32 [m], CRC-32 of their features: what was added is what may be taken away.
    """

    total: Sums
    rows: np.ndarray
    labels: np.ndarray
    checks: np.ndarray

    def without(self, rows: np.ndarray, labels: np.ndarray, features: np.ndarray) -> "KeptSums | None":
        """The tally of the members that are left, in the same order; reads the features of the others only.

        Args:
            rows: int32 [k], of those that are left.
            labels: int32 [N], of all image rows.
            features: float32 [N, D], of all image rows.

        Returns:
            None where a subtraction would not be exact: somebody joined, has another label, or a feature is not what
            was added once.
        """
        left = np.isin(self.rows, rows)
        gone = self.rows[~left]
        same = np.array_equal(self.rows[left], rows) and np.array_equal(self.labels[left], labels[rows])
        if not same or gone.max(initial=-1) >= len(features):
            return None
        taken = features[gone]
        if not np.array_equal(_checks(taken), self.checks[~left]):
            return None
        total = self.total - sums(taken, self.labels[~left], len(self.total.counts))
        return KeptSums(total, rows, self.labels[left], self.checks[left])


def kept_sums(features: np.ndarray, labels: np.ndarray, rows: np.ndarray, classes: int) -> KeptSums:
    """The tally of members: float32 [m, D], int32 [m], image rows int32 [m]."""
    return KeptSums(sums(features, labels, classes), rows, labels, _checks(features))


def _checks(features: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row) for row in features], np.uint32)


def save_sums(folder: Path, kept: KeptSums) -> None:
    """Puts a tally beside the slice that is made of it: whatever removes one removes both."""
    buffer = io.BytesIO()
    np.savez(buffer, rows=kept.rows, labels=kept.labels, checks=kept.checks, **dataclasses.asdict(kept.total))
    write_bytes(folder / TALLY, buffer.getvalue())


def load_sums(folder: Path) -> KeptSums | None:
    """The tally beside a slice; None where there is none that can be read."""
    try:
        arrays = read_arrays(folder / TALLY)
        total = Sums(arrays["products"], arrays["by_class"], arrays["counts"])
        kept = KeptSums(total, arrays["rows"], arrays["labels"], arrays["checks"])
        counted = np.bincount(kept.labels, minlength=len(total.counts))
        return kept if np.array_equal(counted, total.counts) else None
    except (ValueError, TypeError, KeyError):
        return None
