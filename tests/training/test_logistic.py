"""The logistic head against scikit-learn, all members in a step and in minibatches."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lmeraser_jax.training import logistic

CLASSES, WIDTH, PENALTY = 4, 10, 0.02


def members(count, seed=0):
    """Correlated features of four classes, the first of which has most members."""
    random = np.random.default_rng(seed)
    labels = np.minimum(random.geometric(0.5, count) - 1, CLASSES - 1).astype(np.int32)
    means = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    mixing = np.random.default_rng(8).normal(size=(WIDTH, WIDTH)) * np.geomspace(3, 0.1, WIDTH)
    return ((means[labels] + random.normal(size=(count, WIDTH))) @ mixing + 5).astype(np.float32), labels


def known_head(features, labels, balanced):
    """scikit-learn's solution for the same objective, for features as they come."""
    counts = np.bincount(labels, minlength=CLASSES)
    weights = (len(labels) / CLASSES / counts)[labels] if balanced else np.ones(len(labels))
    mean = np.average(features, axis=0, weights=weights)
    deviation = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
    model = LogisticRegression(C=1 / (PENALTY * len(labels)), tol=1e-9, max_iter=5000)
    model.fit((features - mean) / deviation, labels, weights)
    kernel = model.coef_.T / deviation[:, None]
    return kernel, model.intercept_ - mean @ kernel


def shares(features, kernel, bias):
    logits = features @ kernel + bias
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("balanced", (False, True))
def test_it_is_that_of_scikit_learn(balanced):
    features, labels = members(700)
    *head, loss = logistic.logistic(features, labels, CLASSES, PENALTY, balanced)
    expected = shares(features, *known_head(features, labels, balanced))
    np.testing.assert_allclose(shares(features, *head), expected, atol=1e-3)
    weights = 1 / np.bincount(labels)[labels] if balanced else np.ones(700)
    assert loss == pytest.approx(np.average(-np.log(expected[np.arange(700), labels]), weights=weights), abs=1e-3)
    assert not np.allclose(shares(features, *known_head(features, labels, not balanced)), expected, atol=1e-2)


def test_minibatches_come_close_and_read_every_member(monkeypatch):
    monkeypatch.setattr(logistic, "BATCH", 512)
    features, labels = members(5000)
    seen, pad = [], logistic._padded
    monkeypatch.setattr(logistic, "_padded", lambda x, *others: seen.append(x) or pad(x, *others))
    *head, _ = logistic.logistic(features, labels, CLASSES, PENALTY, False)
    found, known = (shares(features, *each) for each in (head, known_head(features, labels, False)))
    assert np.mean(np.abs(found - known)) < 0.01
    losses = [-np.log(each[np.arange(5000), labels]).mean() for each in (found, known)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert len(seen) == logistic.STEPS and {len(rows) for rows in seen} == {512}
    rows, times = np.unique(np.concatenate(seen), axis=0, return_counts=True)
    assert len(rows) == 5000 and times.min() >= logistic.EPOCHS and times.max() <= times.min() + 1


def test_a_class_and_a_feature_that_never_change():
    features, labels = members(300)
    features[:, 3], labels[labels == 2] = 7.0, 1
    kernel, bias, loss = logistic.logistic(features, labels, CLASSES, PENALTY, True)
    assert np.isfinite(loss) and np.isfinite(kernel).all() and np.isfinite(bias).all()
    assert not (shares(features, kernel, bias).argmax(axis=1) == 2).any()


def test_programs_are_few():
    """Sets of nearly one size share a program, so a request compiles nothing."""
    logistic._step.clear_cache()
    for count in (600, 599, 700, 1000):
        logistic.logistic(*members(count), CLASSES, PENALTY, False)
    assert logistic._step._cache_size() == 1
