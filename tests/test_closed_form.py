"""Closed-form heads: against scikit-learn, and sums that are the same bits in any order and after any removal."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from lmeraser_jax import closed_form
from lmeraser_jax.config import Tuning

CLASSES, WIDTH = 4, 12


def members(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around a mean for each class; the spread differs between features."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    means = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    noise = rng.normal(size=(count, WIDTH)) * np.linspace(0.1, 3, WIDTH)
    return (means[labels] + noise).astype(np.float32), labels


def test_ridge_is_that_of_scikit_learn():
    features, labels = members(200)
    rounded = closed_form.fixed_point(features) / closed_form.STEPS
    penalty, onehot = 0.3, np.eye(CLASSES)[labels]
    scaler = StandardScaler().fit(rounded)
    known = Ridge(alpha=penalty * len(labels)).fit(scaler.transform(rounded), onehot)
    found = closed_form.ridge(closed_form.sums(features, labels, CLASSES), penalty)
    wanted = closed_form.SHARPNESS * known.predict(scaler.transform(rounded))
    np.testing.assert_allclose(rounded @ found.kernel + found.bias, wanted, atol=2e-5)


def test_the_nearest_class_mean_is_that_of_scikit_learn():
    features, labels = members(300)
    wanted, _ = members(500, seed=1)
    known = NearestCentroid().fit(closed_form.fixed_point(features), labels)
    found, _ = closed_form.solve(Tuning(what="ncm"), features, labels, CLASSES)
    rounded = closed_form.fixed_point(wanted)
    answers = (rounded / closed_form.STEPS @ found.kernel + found.bias).argmax(axis=1)
    np.testing.assert_array_equal(answers, known.predict(rounded))


def test_a_class_without_members_is_never_the_answer():
    features, labels = members(60)
    kept = labels != 2
    for what in ("ncm", "ridge"):
        part, _ = closed_form.solve(Tuning(what=what), features[kept], labels[kept], CLASSES)
        assert not ((features @ part.kernel + part.bias).argmax(axis=1) == 2).any(), what


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 1000))
def test_what_is_left_after_removals_is_what_there_would_have_been(kept, gone, seed):
    features, labels = members(kept + gone, seed)
    order = np.random.default_rng(seed).permutation(kept + gone)
    features, labels = features * 37.7, labels  # some beyond the largest
    whole = closed_form.sums(features[order], labels[order], CLASSES)
    left = whole - closed_form.sums(features[kept:], labels[kept:], CLASSES)
    fresh = closed_form.sums(features[:kept], labels[:kept], CLASSES)
    for field in ("products", "by_class", "counts"):
        assert getattr(left, field).tobytes() == getattr(fresh, field).tobytes(), field
    for what in ("ridge", "ncm"):
        direct, _ = closed_form.solve(Tuning(what=what), features[:kept], labels[:kept], CLASSES)
        again, _ = closed_form.solve(Tuning(what=what), features[:kept][::-1], labels[:kept][::-1], CLASSES)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(direct[:3], again[:3], strict=True)), what


def test_sums_of_any_piece_size_are_the_same_bits(monkeypatch):
    features, labels = members(101)
    whole = closed_form.sums(features, labels, CLASSES)
    monkeypatch.setattr(closed_form, "PIECE", 7)
    pieces = closed_form.sums(features, labels, CLASSES)
    assert np.array_equal(whole.products, pieces.products) and np.array_equal(whole.by_class, pieces.by_class)


def test_float64_holds_every_sum_of_a_piece():
    largest = (closed_form.LARGEST * closed_form.STEPS) ** 2 * closed_form.PIECE
    assert largest < 2**53


@pytest.mark.parametrize("what", ["ridge", "ncm"])
def test_the_loss_is_the_mean_cross_entropy(what):
    features, labels = members(50)
    part, loss = closed_form.solve(Tuning(what=what), features, labels, CLASSES)
    logits = features.astype(np.float64) @ part.kernel + part.bias
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = -np.log(shares[np.arange(50), labels]).mean()
    assert loss == pytest.approx(wanted)


def test_random_cosines_approximate_the_kernel_of_directions():
    """Mean of products of cosines -> half the Gaussian kernel of the features' directions (Rahimi and Recht)."""
    features, _ = members(20)
    found = closed_form.expanded(features, 20_000)
    assert np.array_equal(found[:, :WIDTH], features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gaps = ((unit[:, None] - unit[None]) ** 2).sum(axis=-1)
    kernel = found[:, WIDTH:] @ found[:, WIDTH:].T / 20_000
    np.testing.assert_allclose(kernel, 0.5 * np.exp(-0.5 * closed_form.BANDWIDTH**2 * gaps), atol=0.03)
    on_device = closed_form.expanded(jnp.asarray(features), 50)
    np.testing.assert_allclose(on_device, closed_form.expanded(features, 50), atol=1e-5)
