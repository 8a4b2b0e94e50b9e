"""How well a language model knows rows, and what is left of rows that it was to forget.

The scores of single rows are pure functions in JAX; what is said of many rows is NumPy in float64. Labels are those of
`unlearning.influence`: int32 [B, T], -1 where no token of the response (nor its end) stands.

Shapes: B rows of a call, T tokens, V vocabulary, N rows, P wrong answers of a row, C candidates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from lmeraser_jax.evaluation.attacks.statistics import COVERED, Estimate, separation
from lmeraser_jax.training.tasks import row_losses


class RowScores(NamedTuple):
    """Of each row, [B]: means over its response tokens."""

    losses: jax.Array  # cross-entropy, -log p of the token that stands there
    accuracies: jax.Array  # share of tokens that the model finds likeliest


def row_scores(logits: jax.Array, labels: jax.Array) -> RowScores:
    """Scores of rows from logits float32 [B, T, V]; 0 for a row without a response token."""
    right = jnp.argmax(logits, axis=-1) == labels
    return RowScores(row_losses(logits, labels), _mean(right.astype(logits.dtype), labels))


def divergences(reference: jax.Array, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p_v log(p_v / q_v) of each row, the mean over its response tokens: [B].

    p are the probabilities of the reference, such as a model that was tuned again without the rows, and q those of the
    model that stands in for it; both logits are [B, T, V].
    """
    log_p, log_q = jax.nn.log_softmax(reference, axis=-1), jax.nn.log_softmax(logits, axis=-1)
    return _mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), labels)


def _mean(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of values [B, T] over the response tokens of each row."""
    counted = (labels >= 0).astype(values.dtype)
    return jnp.sum(values * counted, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1.0)


def recognition(edited: np.ndarray, heldout: np.ndarray) -> Estimate:
    """The chance that an edited row has a lower loss than a row that was never trained on, ties counted half.

    Losses are [N] and [M]. 0.5: nothing tells them apart by their loss; 1: every edited row is still known better.
    """
    return separation(-np.asarray(edited, np.float64), -np.asarray(heldout, np.float64)).auc


def truth_ratios(paraphrased: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """TOFU's truth ratio of each row (Maini et al., 2024, Eq. 1): float64 [N].

    mean_j p(wrong_j | q)^(1 / length) / p(paraphrase | q)^(1 / length), from the mean losses of a paraphrase of the
    right answer [N] and of wrong answers of the same form [N, P]. Below 1: the model finds the right answer likelier.
    """
    wrong = np.asarray(wrong, np.float64)
    return np.exp(special.logsumexp(-wrong, axis=1) - np.log(wrong.shape[1]) + np.asarray(paraphrased, np.float64))


def forget_quality(ratios: np.ndarray, retrained: np.ndarray) -> float:
    """TOFU's forget quality (Maini et al., 2024, section 2.2.2): the p-value of a Kolmogorov-Smirnov test.

    It compares the truth ratios [N] of the forgotten rows under a model with those under one that was tuned without
    them. Near 0: the two models can be told apart; few rows can never give a small value.
    """
    p: Any = stats.ks_2samp(ratios, retrained)[1]
    return float(p)


def preference(right: np.ndarray, wrong: np.ndarray) -> float:
    """Share of rows whose right answer has a lower mean loss than the wrong one; losses are [N]."""
    return float(np.mean(np.asarray(right) < np.asarray(wrong)))


def hit_ratio(losses: np.ndarray, positions: np.ndarray) -> Estimate:
    """Hit ratio at 1: share of rows where the right candidate has the lowest loss, with Wilson's interval (1927).

    Losses of all candidates are [N, C], the positions of the right ones int [N]. A tie with another candidate is a
    miss.
    """
    right = np.take_along_axis(losses, positions[:, None], axis=1)
    hits = int(np.sum(np.sum(losses <= right, axis=1) == 1))
    interval = stats.binomtest(hits, len(losses)).proportion_ci(COVERED, "wilson")
    return Estimate(hits / len(losses), float(interval.low), float(interval.high))


def answer_auc(yes: np.ndarray, no: np.ndarray, truth: np.ndarray) -> Estimate:
    """AUC of yes against no questions: how well log p(yes) - log p(no) tells rows whose answer is yes.

    Losses of both answers are [N], truth is bool [N]: whether yes is right.
    """
    scores = np.asarray(no, np.float64) - np.asarray(yes, np.float64)
    return separation(scores[truth], scores[~truth]).auc
