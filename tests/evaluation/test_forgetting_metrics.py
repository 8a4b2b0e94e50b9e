"""What is measured of forgetting, against SciPy, scikit-learn and literal definitions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import log_loss, roc_auc_score

from lmeraser_jax.evaluation import forgetting


@pytest.fixture
def rows(rng):
    """(logits, labels) of three rows with 4, 1 and 0 response tokens."""
    logits, labels = rng.normal(size=(3, 6, 5)).astype(np.float32), np.full((3, 6), -1, np.int32)
    labels[0, 1:5], labels[1, 2] = [4, 0, 2, 2], 1
    logits[0, 1, 4] = 9.0  # one token is right for certain
    return logits, labels


def test_row_scores_look_at_response_tokens_only(rows):
    logits, labels = rows
    scores = forgetting.row_scores(jnp.asarray(logits), jnp.asarray(labels))
    for row in (0, 1):
        chosen = labels[row] >= 0
        p, truth = special.softmax(logits[row, chosen].astype(np.float64), axis=1), labels[row, chosen]
        assert scores.losses[row] == pytest.approx(log_loss(truth, p, labels=range(5)), abs=1e-5)
        assert scores.accuracies[row] == np.mean(p.argmax(axis=1) == truth)
    assert scores.losses[2] == scores.accuracies[2] == 0
    logits[labels < 0] += 7 * np.arange(5, dtype=np.float32)
    other = forgetting.row_scores(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_array_equal(scores, other)


def test_divergence_is_that_of_scipy_from_the_reference_to_the_model(rows, rng):
    logits, labels = rows
    reference = rng.normal(size=logits.shape).astype(np.float32)
    values = forgetting.divergences(jnp.asarray(reference), jnp.asarray(logits), jnp.asarray(labels))
    for row in (0, 1):
        chosen = labels[row] >= 0
        p, q = (special.softmax(array[row, chosen].astype(np.float64), axis=1) for array in (reference, logits))
        assert values[row] == pytest.approx(stats.entropy(p, q, axis=1).mean(), rel=1e-5)
    assert values[2] == 0
    same = forgetting.divergences(jnp.asarray(logits), jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_array_equal(same, 0)


def test_recognition_is_high_where_edited_rows_have_the_lower_losses(rng):
    edited, heldout = rng.normal(2, 1, 9), np.round(rng.normal(3, 1, 40), 1)
    expected = roc_auc_score([1] * 9 + [0] * 40, -np.concatenate([edited, heldout]))
    assert forgetting.recognition(edited, heldout).value == pytest.approx(expected)
    assert forgetting.recognition(np.zeros(4), np.ones(4)).value == 1


def test_truth_ratios_and_forget_quality_are_those_of_tofu(rng):
    paraphrased, wrong = rng.gamma(2, 1, 12), rng.gamma(2, 1, (12, 5))
    ratios = forgetting.truth_ratios(paraphrased, wrong)
    np.testing.assert_allclose(ratios, np.mean(np.exp(-wrong), axis=1) / np.exp(-paraphrased))
    assert np.isfinite(forgetting.truth_ratios(np.array([800.0]), np.full((1, 5), 800.0))).all()
    assert forgetting.forget_quality(ratios, ratios) == 1
    assert forgetting.forget_quality(ratios, ratios + 100) == pytest.approx(2 / math.comb(24, 12))  # exact, two-sided


def test_preference_counts_rows(rng):
    assert forgetting.preference(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 3.0, 5.0])) == 0.5


def test_a_hit_ratio_has_wilsons_interval_and_no_hit_by_a_tie(rng):
    losses, positions = rng.normal(size=(30, 20)), rng.integers(0, 20, 30)
    losses[np.arange(12), positions[:12]] = -9.0
    losses[12:, 0] = np.where(positions[12:] == 0, 9.0, -9.0)
    losses[0] = 1.0  # all candidates alike
    result, p, z = forgetting.hit_ratio(losses, positions), 11 / 30, stats.norm.ppf(0.975)
    centre, reach = p + z * z / 60, z * math.sqrt(p * (1 - p) / 30 + z * z / 3600)
    assert (result.value, result.low, result.high) == pytest.approx(
        (p, (centre - reach) / (1 + z * z / 30), (centre + reach) / (1 + z * z / 30))
    )


def test_the_auc_of_answers_is_that_of_scikit_learn(rng):
    yes, no, truth = rng.normal(size=40), rng.normal(size=40), rng.random(40) < 0.4
    assert forgetting.answer_auc(yes, no, truth).value == pytest.approx(roc_auc_score(truth, no - yes))
