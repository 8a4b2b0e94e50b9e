"""Unlearning by raising the loss of the rows to forget: what influence functions are compared with.

    ascent:      minimise -L(S)                                  (Jang et al., 2023, Eq. 1)
    difference:  minimise L(K) - L(S)                            (Liu et al., 2022)
    npo:         minimise L(K) + 2/beta mean_S log(1 + (p / p_0)^beta)    (Zhang et al., 2024, with retain loss)

S are the rows to forget, K the other ones, L mean losses, p the probability of a whole response and p_0 that before.
Full-batch Adam; it stops where the mean loss of S is what that of held-out rows was before, so no model that was tuned
again is needed. Problems and weights [C, B] are those of `unlearning.influence`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmeraser_jax.unlearning.influence import Problem, Tree, data_gradient, mean_loss, moved

RATES = {"ascent": 1e-3, "difference": 1e-3, "npo": 5e-3}  # npo's gradient fades as it forgets
MOST_STEPS = 100
BETA = 0.1  # of npo, its authors' value


@functools.partial(jax.jit, static_argnames="kind")
def unlearn(
    problem: Problem, parameters: Tree, erased: jax.Array, kept: jax.Array, heldout: jax.Array, kind: str
) -> tuple[Tree, jax.Array]:
    """New parameters and the number of steps, int32, at most `MOST_STEPS`; all weights are 1 / the number of rows."""
    tx, start = optax.scale_by_adam(), _losses(problem, parameters, erased)
    lengths = jnp.sum(problem.rows.labels >= 0, axis=-1).astype(erased.dtype)  # [C, B]
    target = mean_loss(problem, parameters, heldout)

    def weights_of(losses: jax.Array) -> jax.Array:
        """Weights whose gradient lowers the objective."""
        if kind == "npo":
            ratio = lengths * (start - losses)  # log p / p_0
            return kept - 2 * jax.nn.sigmoid(BETA * ratio) * lengths * erased
        return (kept if kind == "difference" else 0 * kept) - erased

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        _, _, losses, steps = state
        return (jnp.sum(erased * losses) < target * jnp.sum(erased)) & (steps < MOST_STEPS)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        tree, opt, losses, steps = state
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int power
            directions, opt = tx.update(data_gradient(problem, tree, weights_of(losses)), opt)
        tree = moved(tree, -RATES[kind], directions)
        return tree, opt, _losses(problem, tree, erased), steps + 1

    tree, _, _, steps = jax.lax.while_loop(unfinished, step, (parameters, tx.init(parameters), start, jnp.int32(0)))
    return tree, steps


def _losses(problem: Problem, parameters: Tree, weights: jax.Array) -> jax.Array:
    """Losses [C, B] of the rows in chunks that have weight; 0 in others."""
    objective = problem.objective

    def of_chunk(chunk: tuple[jax.Array, ...]) -> jax.Array:
        inputs, labels, weight = chunk

        def losses() -> jax.Array:
            return objective.losses(objective.outputs(parameters, problem.frozen, inputs), labels)

        return jax.lax.cond(jnp.any(weight != 0), losses, lambda: jnp.zeros_like(weight))

    return jax.lax.map(of_chunk, (*problem.rows, weights))
