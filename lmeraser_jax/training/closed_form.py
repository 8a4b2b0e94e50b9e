"""Heads that are a formula of their members' features: ridge regression, nearest class mean, logistic regression.

For the first two, features are rounded to a fixed point, so that sums over members are sums of whole numbers: the same
bits in any order, and subtracting a member gives the sum without it. Only the step from sums to a head is in floating
point. The sums of a large slice are kept beside it (`KeptSums`), so that an erasure subtracts the erased members and
reads no other feature.

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
from lmeraser_jax.training.logistic import logistic
from lmeraser_jax.training.slices import Slice

SCALE = 512  # steps of the fixed point from 0 to 1
LARGEST = 64  # features beyond it count as that large
CHUNK = 65_536  # members summed at once: all products of two numbers sum below 2^53, so float64 holds them exactly
KEPT_FROM = 4096  # members from which on sums are kept; fewer are added up again as fast
SUMS_FILE = "sums.npz"
ABSENT = -1e9  # logit of a class without a member
BANDWIDTH = 1.0  # of the random cosines, for features of length 1
SHARPNESS = 10.0  # a ridge head fits 0 and 1; times this, its differences are log-odds of about the right size


@functools.lru_cache(maxsize=8)
def random_directions(width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 [D, E] and phases float32 [E] of the random cosines; they depend on D and E alone."""
    random = philox(0, "random cosines", str(width), str(count))
    weights = random.standard_normal((width, count), np.float32)
    return weights, random.uniform(0, 2 * np.pi, count).astype(np.float32)


def expand(features: Any, count: int) -> Any:
    """Features [m, D], NumPy or JAX, with E random cosines of their direction beside them: [m, D + E].

    Rahimi and Recht (2007). The cosines are the same for all records, so erasure needs nothing more.
    """
    if not count:
        return features
    numbers = jnp if isinstance(features, jax.Array) else np
    weights, phases = random_directions(features.shape[1], count)
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


def to_fixed_point(features: np.ndarray) -> np.ndarray:
    """Whole numbers of 1/512 as float64 [m, D], which holds them exactly; features float32 [m, D]."""
    return np.rint(np.clip(features.astype(np.float64), -LARGEST, LARGEST) * SCALE)


def add_up(features: np.ndarray, labels: np.ndarray, classes: int) -> Sums:
    """Sums over members, float32 [m, D] and int32 [m]: exact, so the same in any order and in any chunks."""
    width = features.shape[1]
    total = Sums(np.zeros((width, width), np.int64), np.zeros((classes, width), np.int64), np.zeros(classes, np.int64))
    for start in range(0, len(features), CHUNK):
        x, y = to_fixed_point(features[start : start + CHUNK]), labels[start : start + CHUNK]
        onehot = (y[:, None] == np.arange(classes)[None]).astype(np.float64)  # [m, Y]
        chunk = (x.T @ x, onehot.T @ x, onehot.sum(axis=0))
        total += Sums(*(array.astype(np.int64) for array in chunk))
    return total


def ridge(total: Sums, penalty: float) -> tuple[Slice, float]:
    """Least squares on standardised features, with a penalty on the squared weights; the intercept is free.

    Solves (C + penalty I) W = B, where C is the correlation matrix of the features and B their covariance with the
    one-hot labels. Returns the head, and its mean squared error on one-hot labels.
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
    return _head(SHARPNESS * weights * SCALE, SHARPNESS * bias), float(error)


def nearest_class_mean(total: Sums) -> tuple[Slice, float]:
    """The class whose mean feature is nearest: minus half the squared distance, less what all classes share.

    Also returns the members' mean squared distance to the mean of their own class.
    """
    present = total.counts > 0
    means = total.by_class / np.maximum(total.counts, 1)[:, None] / SCALE  # [Y, D]
    count, squares = total.counts.sum(), (means**2).sum(axis=1)
    spread = np.trace(total.products) / SCALE**2 / count - (total.counts * squares).sum() / count
    return _head(means.T, np.where(present, -0.5 * squares, ABSENT)), float(spread)


def _head(kernel: np.ndarray, bias: np.ndarray) -> Slice:
    return Slice(np.zeros(0, np.float32), kernel.astype(np.float32), bias.astype(np.float32))


def solve(options: Tuning | Common, total: Sums) -> tuple[Slice, float]:
    """The head, ridge or ncm as `options.method` says, and its loss: functions of the sums alone."""
    return ridge(total, options.penalty) if options.method == "ridge" else nearest_class_mean(total)


def has_sums(options: Tuning | Common) -> bool:
    """Whether a head follows from sums over members; cosines have other bits in another company."""
    return options.method in ("ridge", "ncm") and not options.expand


def solve_members(
    options: Tuning | Common, features: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[Slice, float]:
    """The head of these members, and its loss; features float32 [m, D], not yet expanded, and labels int32 [m]."""
    if options.method == "linear":
        kernel, bias, loss = logistic(
            expand(features, options.expand), labels, classes, options.penalty, options.balanced
        )
        return _head(kernel, bias), loss
    return solve(options, add_up(expand(features, options.expand), labels, classes))


@dataclasses.dataclass(frozen=True, eq=False)
class KeptSums:
    """Sums and the members they are over, so that members can be subtracted again. As private as the members."""

    total: Sums  # over all members
    rows: np.ndarray  # int32 [m], image rows of the members
    labels: np.ndarray  # int32 [m]
    checksums: np.ndarray  # uint32 [m], CRC-32 of their features: only what was added may be subtracted

    def without(self, rows: np.ndarray, labels: np.ndarray, features: np.ndarray) -> "KeptSums | None":
        """The sums over the members in `rows` int32 [k], in the same order; reads only the removed members' features.

        `labels` int32 [N] and `features` float32 [N, D] are those of all image rows. None where a subtraction would not
        be exact: a member was added or has another label, or a feature is not the one that was added.
        """
        remains = np.isin(self.rows, rows)
        removed = self.rows[~remains]
        same = np.array_equal(self.rows[remains], rows) and np.array_equal(self.labels[remains], labels[rows])
        if not same or removed.max(initial=-1) >= len(features):
            return None
        values = features[removed]
        if not np.array_equal(_checksums(values), self.checksums[~remains]):
            return None
        total = self.total - add_up(values, self.labels[~remains], len(self.total.counts))
        return KeptSums(total, rows, self.labels[remains], self.checksums[remains])


def keep_sums(features: np.ndarray, labels: np.ndarray, rows: np.ndarray, classes: int) -> KeptSums:
    """The sums over members: float32 [m, D], int32 [m], image rows int32 [m]."""
    return KeptSums(add_up(features, labels, classes), rows, labels, _checksums(features))


def _checksums(features: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row) for row in features], np.uint32)


def save_sums(folder: Path, sums: KeptSums) -> None:
    """Writes sums beside the slice that was made from them, so that removing the slice removes both."""
    buffer = io.BytesIO()
    arrays = dataclasses.asdict(sums.total)
    np.savez(buffer, rows=sums.rows, labels=sums.labels, checksums=sums.checksums, **arrays)
    write_bytes(folder / SUMS_FILE, buffer.getvalue())


def load_sums(folder: Path) -> KeptSums | None:
    """The sums beside a slice; None where there are none that can be read: they save time and nothing else."""
    try:
        arrays = read_arrays(folder / SUMS_FILE)
        total = Sums(arrays["products"], arrays["by_class"], arrays["counts"])
        sums = KeptSums(total, arrays["rows"], arrays["labels"], arrays["checksums"])
        counts = np.bincount(sums.labels, minlength=len(total.counts))
        return sums if np.array_equal(counts, total.counts) else None
    except Exception:  # see `read_arrays`
        return None
