"""A logistic head: multinomial logistic regression on standardised features, in steps of a fixed order and number.

Each step is a Newton step with a bound in the place of the Hessian (Boehning 1992: half the correlation matrix of the
features, for every class), with Nesterov's momentum. Up to `BATCH` members a step sees all of them; more go by in
minibatches, so that a million members are read a few times and never copied at once.

Shapes: m members, D feature, Y classes, B batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.hashing import philox

BATCH = 8192  # members of a step, at most
STEPS = 100  # at least
EPOCHS = 4  # at least, where members go by in minibatches
SAMPLE = 16_384  # members, at most, from which scale and bound are computed
MOMENTUM = 0.9


class _State(NamedTuple):
    kernel: jax.Array  # [D, Y]
    bias: jax.Array  # [Y]
    kernel_velocity: jax.Array
    bias_velocity: jax.Array


class _Scale(NamedTuple):
    mean: np.ndarray  # [D]
    deviation: np.ndarray  # [D]
    inverse: np.ndarray  # [D, D], of the bound
    penalty: np.float32


def logistic(
    features: np.ndarray, labels: np.ndarray, classes: int, penalty: float, balanced: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Minimises the mean cross-entropy plus penalty / 2 times the squared weights of the standardised features.

    Args:
        features: float32 [m, D]; may be a memory map.
        labels: int32 [m].
        balanced: every class counts alike, whatever the number of its members.

    Returns:
        (kernel, bias, loss): float32 [D, Y] and [Y] for features as they come, and the last step's cross-entropy.
    """
    count, width = features.shape
    counts = np.bincount(labels, minlength=classes)
    per_class = np.float32(count) / (np.count_nonzero(counts) * np.maximum(counts, 1)) if balanced else np.ones(classes)
    weights = per_class[labels].astype(np.float32)  # [m], of mean 1
    scale = _scale(features, weights, penalty)
    batch = min(BATCH, 1 << max(8, (count - 1).bit_length()))  # few shapes: a program serves nearly all requests
    state = _State(*(jnp.zeros(shape) for shape in [(width, classes), (classes,)] * 2))
    loss, rows, inputs = 0.0, np.zeros(0, np.int64), ()
    steps = max(STEPS, -(-EPOCHS * count // batch))
    for number in range(steps):
        if count > batch or not number:
            if len(rows) < min(batch, count):
                epoch = np.arange(count) if count <= batch else _order(count, number)
                rows = np.concatenate([rows, epoch])
            now, rows = rows[:batch], rows[batch:]
            inputs = _padded(features[now], labels[now], weights[now], batch)
        rate = 1.0 if count <= batch else 0.5 + 0.5 * np.cos(np.pi * number / steps)  # calms the minibatches' noise
        state, loss = _step(state, *inputs, scale, np.float32(rate))
    kernel, bias, *_ = (np.asarray(leaf, np.float64) for leaf in state)
    kernel /= scale.deviation[:, None]
    return kernel.astype(np.float32), (bias - scale.mean @ kernel).astype(np.float32), float(loss)


def _order(count: int, number: int) -> np.ndarray:
    return philox(0, "logistic", str(count), str(number)).permutation(count)


def _padded(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, batch: int) -> tuple[jax.Array, ...]:
    """A batch on the device, filled up with members of weight 0."""
    missing = batch - len(labels)
    return tuple(
        jnp.asarray(np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)))
        for array in (features, labels, weights)
    )


def _scale(features: np.ndarray, weights: np.ndarray, penalty: float) -> _Scale:
    """Mean, deviation and inverse bound of (a sample of) the members."""
    rows = slice(None) if len(features) <= SAMPLE else np.sort(_order(len(features), 0)[:SAMPLE])
    x, w = features[rows].astype(np.float64), weights[rows].astype(np.float64)[:, None]
    mean = (w * x).sum(axis=0) / w.sum()
    deviation = np.sqrt((w * (x - mean) ** 2).sum(axis=0) / w.sum())
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    x = (x - mean) / deviation
    bound = 0.5 * (w * x).T @ x / w.sum() + max(penalty, 1e-6) * np.eye(x.shape[1])
    mean, deviation, inverse = (part.astype(np.float32) for part in (mean, deviation, np.linalg.inv(bound)))
    return _Scale(mean, deviation, inverse, np.float32(penalty))


@functools.partial(jax.jit, donate_argnums=0)
def _step(state: _State, features: jax.Array, labels: jax.Array, weights: jax.Array, scale: _Scale, rate: jax.Array):
    """One step from where the momentum leads: (new state, loss)."""
    x = (features - scale.mean[None]) / scale.deviation[None]  # [B, D]
    kernel = state.kernel + MOMENTUM * state.kernel_velocity
    bias = state.bias + MOMENTUM * state.bias_velocity
    weights = weights / jnp.sum(weights)
    log_shares = jax.nn.log_softmax(x @ kernel + bias[None])  # [B, Y]
    target = jax.nn.one_hot(labels, len(bias))
    residual = (jnp.exp(log_shares) - target) * weights[:, None]
    gradient = x.T @ residual + scale.penalty * kernel
    kernel_velocity = MOMENTUM * state.kernel_velocity - rate * scale.inverse @ gradient
    bias_velocity = MOMENTUM * state.bias_velocity - rate * 2.0 * jnp.sum(residual, axis=0)
    moved = _State(state.kernel + kernel_velocity, state.bias + bias_velocity, kernel_velocity, bias_velocity)
    return moved, -jnp.sum(weights * jnp.sum(log_shares * target, axis=1))
