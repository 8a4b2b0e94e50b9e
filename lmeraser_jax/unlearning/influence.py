"""Influence functions: new parameters for edited data from one linear solve, approximately (LLMEraser, ICLR 2025).

A record leaves, or another takes its place. Data before and after are two weight vectors over the same rows, so every
request runs the same compiled program. The new parameters come with no guarantee: `Report` says how good the solve was.
Pure functions of any tree of parameters; whatever dtype that has, float32 or float64, is the dtype of the arithmetic.

With R(theta) = sum_i w_i l_i(theta) + 1/2 |lambda theta|^2, where the w_i of the records in the data are 1/n:

    paper:   theta + (H_before + damp)^-1 (grad R_before - grad R_after)    curvature of the original data
    newton:  theta + (H_after + damp)^-1 (grad R_before - grad R_after)     curvature of the edited data
    rounds:  theta - (H_after + damp)^-1 grad R_after, repeated with a line search: for replaced records
    warm:    Adam on R_after, starting from theta, a chunk a step

Shapes: C chunks, B rows of a chunk, Y outputs. Rows of language have a token axis T: labels [C, B, T].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmeraser_jax.training.tasks import row_losses

Tree = Any  # of arrays
WARN_RESIDUAL, LARGEST_RESIDUAL = 0.3, 1.0  # of a solve: CG had not converged; the result is worth nothing
POLISH_DAMP = 0.1
HALVINGS, DOUBLINGS, BISECTIONS = 8, 4, 12  # of a step


class Rows(NamedTuple):
    """Records in chunks; zeros fill up the last one, with weight 0."""

    inputs: Any  # [C, B, ...]
    labels: Any  # int32 [C, B], or [C, B, T] with -1 for a token that does not count


def softmax_curvature(outputs: jax.Array, labels: jax.Array, tangent: jax.Array) -> jax.Array:
    """The Hessian of `tasks.row_losses` in the logits, diag(p) - p p' for each token, times a tangent."""
    p = jax.nn.softmax(outputs, axis=-1)
    product = p * (tangent - jnp.sum(p * tangent, axis=-1, keepdims=True))
    return product * _token_weights(labels, outputs.dtype)[..., None]


def _token_weights(labels: jax.Array, dtype: Any) -> jax.Array:
    """The share of each token in its row's loss; 0 where the label is negative."""
    counts = (labels >= 0).astype(dtype)
    return counts / jnp.maximum(jnp.sum(counts, axis=tuple(range(1, labels.ndim)), keepdims=True), 1.0)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, static under `jit`: one object for each compiled program."""

    outputs: Callable[[Tree, Tree, Tree], jax.Array]  # (parameters, frozen, inputs [B, ...]) -> [B, ..., Y]
    losses: Callable[[jax.Array, jax.Array], jax.Array] = row_losses  # (outputs, labels) -> [B]
    curvature: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = softmax_curvature
    gauss_newton: bool = True  # False: the true Hessian, which may be indefinite


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("frozen", "rows", "strength"), meta_fields=("objective",)
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """An objective and its data."""

    objective: Objective
    frozen: Tree  # what the outputs depend on beside the parameters, such as the backbone
    rows: Rows
    strength: Tree  # lambda, the L2 strength: a scalar for each leaf of the parameters


class Solution(NamedTuple):
    """What conjugate gradients found for A x = b."""

    x: Tree
    residual: jax.Array  # |b - A x| / |b|, 0 where b is 0
    iterations: jax.Array  # int32, products with A
    curvature: jax.Array  # p'Ap of the last direction; at most 0 where A is not positive definite, and CG stopped there


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an update is computed; defaults are those for removals."""

    mode: str = "newton"  # newton, paper or warm
    damp: float = 0.0  # beside the L2 strength
    iterations: int = 25  # of CG, at most, for each solve
    tolerance: float = 1e-3  # the residual at which CG stops
    rounds: int = 0  # newton: so many rounds with line search instead of one step
    warm_passes: int = 20  # warm: each makes a step for every chunk
    warm_rate: float = 1e-2


REMOVAL = Settings()
EDIT = Settings(damp=1e-2, rounds=4, iterations=12)  # with more iterations each a round goes too far
MODES = ("newton", "paper", "warm")


def settings_of(mode: str, edited: bool) -> Settings:
    """The settings of a mode where records only leave, or where edited ones take the place of others."""
    return EDIT if edited and mode == "newton" else Settings(mode)


@dataclasses.dataclass(frozen=True)
class Report:
    """How an update went. It says nothing about what is left of the removed records."""

    mode: str
    strength: float  # lambda, the smallest of all leaves
    damp: float
    iterations: int  # products, of all solves
    residual: float  # the largest of all solves; 0 where nothing was solved
    step: float  # of the last solve's result, what was added; 0 where the line search found no better point
    change: float  # norm of the difference between new and old parameters
    gradient: float  # norm of grad R_before: large where the old parameters were no minimum, as the formulas suppose
    positive: bool  # False: a direction of no positive curvature ended a solve early


def chunked(values: np.ndarray, size: int, chunks: int) -> np.ndarray:
    """Pads with zeros and cuts into chunks: [N, ...] -> [chunks, size, ...]."""
    padded = np.zeros((chunks * size, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded.reshape(chunks, size, *values.shape[1:])


def mean_loss(problem: Problem, parameters: Tree, weights: jax.Array) -> jax.Array:
    """sum_i w_i l_i / sum_i w_i, without L2; weights [C, B]."""
    return _data_loss(problem, parameters, weights) / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)


def risk(problem: Problem, parameters: Tree, weights: jax.Array) -> jax.Array:
    """R, with L2."""
    return _data_loss(problem, parameters, weights) + _penalty(problem, parameters)


def _penalty(problem: Problem, parameters: Tree) -> jax.Array:
    """1/2 lambda |theta|^2."""
    squares = jax.tree.map(lambda leaf, lam: lam * jnp.sum(leaf**2), parameters, problem.strength)
    return 0.5 * jax.tree.reduce(jnp.add, squares)


def gradient(problem: Problem, parameters: Tree, weights: jax.Array) -> Tree:
    """grad R, with L2."""
    data = data_gradient(problem, parameters, weights)
    return jax.tree.map(lambda grad, leaf, lam: grad + lam * leaf, data, parameters, problem.strength)


def data_gradient(problem: Problem, parameters: Tree, weights: jax.Array) -> Tree:
    """sum_i w_i grad l_i, without L2. Weights before minus weights after give grad R_before - grad R_after."""
    return _total(problem, weights, lambda *chunk: jax.grad(_chunk_loss, argnums=1)(problem, parameters, *chunk))


def product(problem: Problem, parameters: Tree, weights: jax.Array, vector: Tree, damp: float = 0.0) -> Tree:
    """(G + lambda + damp) v with G = sum_i w_i J_i' (d^2 l_i / d outputs^2) J_i (Gauss-Newton), or the Hessian."""
    objective = problem.objective

    def gauss_newton(inputs: jax.Array, labels: jax.Array, weight: jax.Array) -> Tree:
        def outputs_of(tree: Tree) -> jax.Array:
            return objective.outputs(tree, problem.frozen, inputs)

        outputs, tangent = jax.jvp(outputs_of, (parameters,), (vector,))
        curved = objective.curvature(outputs, labels, tangent)
        curved *= weight.reshape(-1, *[1] * (curved.ndim - 1))
        return jax.vjp(outputs_of, parameters)[1](curved)[0]

    def hessian(*chunk: jax.Array) -> Tree:
        grad = functools.partial(jax.grad(_chunk_loss, argnums=1), problem)
        return jax.jvp(lambda tree: grad(tree, *chunk), (parameters,), (vector,))[1]

    total = _total(problem, weights, gauss_newton if objective.gauss_newton else hessian)
    return jax.tree.map(lambda leaf, lam, v: leaf + (lam + damp) * v, total, problem.strength, vector)


def _chunk_loss(problem: Problem, parameters: Tree, inputs: jax.Array, labels: jax.Array, weights: jax.Array):
    outputs = problem.objective.outputs(parameters, problem.frozen, inputs)
    return jnp.sum(weights * problem.objective.losses(outputs, labels))


def _data_loss(problem: Problem, parameters: Tree, weights: jax.Array) -> jax.Array:
    return _total(problem, weights, lambda *chunk: _chunk_loss(problem, parameters, *chunk))


def _total(problem: Problem, weights: jax.Array, function: Callable[..., Tree]) -> Tree:
    """Sum over the chunks of a function of (inputs, labels, weights); memory is that of one chunk.

    A chunk whose rows all have weight 0 is passed over.
    """
    chunks = (problem.rows.inputs, problem.rows.labels, weights)
    shapes = jax.eval_shape(function, *(jax.tree.map(lambda leaf: leaf[0], part) for part in chunks))

    def add(total: Tree, chunk: Any) -> tuple[Tree, None]:
        def added() -> Tree:
            return jax.tree.map(jnp.add, total, function(*chunk))

        return jax.lax.cond(jnp.any(chunk[2] != 0), added, lambda: total), None

    return jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), chunks)[0]


def dot(a: Tree, b: Tree) -> jax.Array:
    """The inner product of two trees."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


@jax.jit
def norm(tree: Tree) -> jax.Array:
    return jnp.sqrt(dot(tree, tree))


@jax.jit
def moved(tree: Tree, step: float | jax.Array, direction: Tree) -> Tree:
    """tree + step * direction."""
    return jax.tree.map(lambda leaf, d: leaf + step * d, tree, direction)


def solve(operator: Callable[[Tree], Tree], b: Tree, iterations: int, tolerance: float) -> Solution:
    """Conjugate gradients for A x = b from x = 0; stops at the tolerance, or where p'Ap is not positive."""
    square = dot(b, b)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        _, _, _, residual, count, curvature = state
        return (residual > tolerance**2 * square) & (count < iterations) & (curvature > 0)

    def iterate(state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, r, p, residual, count, _ = state
        image = operator(p)
        curvature = dot(p, image)
        step = jnp.where(curvature > 0, residual / jnp.where(curvature > 0, curvature, 1.0), 0.0)
        x, r = moved(x, step, p), moved(r, -step, image)
        new = dot(r, r)
        return x, r, moved(r, new / residual, p), new, count + 1, curvature

    start = (jax.tree.map(jnp.zeros_like, b), b, b, square, jnp.int32(0), jnp.ones_like(square))
    x, _, _, residual, count, curvature = jax.lax.while_loop(unfinished, iterate, start)
    return Solution(x, jnp.sqrt(residual / jnp.where(square > 0, square, 1.0)), count, curvature)


@functools.partial(jax.jit, static_argnames="settings")
def _one_step(problem: Problem, parameters: Tree, before: jax.Array, after: jax.Array, settings: Settings):
    """The solution of (H + damp) x = grad R_before - grad R_after."""
    b = data_gradient(problem, parameters, before - after)
    curved = before if settings.mode == "paper" else after
    return _solve_at(problem, parameters, curved, b, settings)


@functools.partial(jax.jit, static_argnames="settings")
def _round(problem: Problem, parameters: Tree, after: jax.Array, settings: Settings):
    """(solution, step) of a Newton step on R_after, the largest of 1, 1/2, 1/4, ... that lowers it; or 0."""
    b = jax.tree.map(jnp.negative, gradient(problem, parameters, after))
    solution = _solve_at(problem, parameters, after, b, settings)
    old = risk(problem, parameters, after)

    def too_long(step: jax.Array) -> jax.Array:
        return (step > 0.5**HALVINGS) & ~(risk(problem, moved(parameters, step, solution.x), after) < old)

    step = jax.lax.while_loop(too_long, lambda step: step / 2, jnp.ones_like(old))
    return solution, jnp.where(step > 0.5**HALVINGS, step, 0.0)


def _solve_at(problem: Problem, parameters: Tree, weights: jax.Array, b: Tree, settings: Settings) -> Solution:
    def operator(vector: Tree) -> Tree:
        return product(problem, parameters, weights, vector, settings.damp)

    return solve(operator, b, settings.iterations, settings.tolerance)


@functools.partial(jax.jit, static_argnames="settings")
def _warm(problem: Problem, parameters: Tree, after: jax.Array, settings: Settings) -> Tree:
    """Adam with the gradient of one chunk after the other; its rate falls to zero as half a cosine.

    A chunk's rows count as often as there are chunks, so that the mean gradient of a pass is that of R_after. A chunk
    without weight makes no step.
    """
    tx, (inputs, labels), chunks = optax.scale_by_adam(), problem.rows, len(after)
    used = jnp.any(after != 0, axis=1)  # [C]
    total = settings.warm_passes * chunks
    rates = settings.warm_rate * 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))

    def loss(tree: Tree, chunk: tuple[Any, ...]) -> jax.Array:
        return jnp.sum(used).astype(after.dtype) * _chunk_loss(problem, tree, *chunk) + _penalty(problem, tree)

    def step(state: tuple[Tree, Any], work: tuple[Any, ...]) -> tuple[tuple[Tree, Any], None]:
        chunk, rate = work

        def changed() -> tuple[Tree, Any]:
            tree, opt = state
            directions, opt = tx.update(jax.grad(loss)(tree, chunk), opt)
            return moved(tree, -rate, directions), opt

        return jax.lax.cond(jnp.any(chunk[2] != 0), changed, lambda: state), None

    def one_pass(state: tuple[Tree, Any], pass_rates: jax.Array) -> tuple[tuple[Tree, Any], None]:
        return jax.lax.scan(step, state, ((inputs, labels, after), pass_rates))

    by_pass = jnp.asarray(rates.reshape(-1, chunks), after.dtype)
    return jax.lax.scan(one_pass, (parameters, tx.init(parameters)), by_pass)[0][0]


@jax.jit
def _calibrated_step(problem: Problem, parameters: Tree, direction: Tree, erased: jax.Array, heldout: jax.Array):
    """The step at which the erased rows' mean loss is that of held-out rows, at most 2^DOUBLINGS, by bisection."""

    def gap(step: jax.Array) -> jax.Array:
        tree = moved(parameters, step, direction)
        return mean_loss(problem, tree, heldout) - mean_loss(problem, tree, erased)

    one, most = jnp.ones((), erased.dtype), 2.0**DOUBLINGS
    high = jax.lax.while_loop(lambda step: (gap(step) > 0) & (step < most), lambda step: 2 * step, one)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        short = gap(middle) > 0
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(high), high))
    return high


def update(
    problem: Problem,
    parameters: Tree,
    before: np.ndarray,
    after: np.ndarray,
    settings: Settings = REMOVAL,
    heldout: np.ndarray | None = None,
) -> tuple[Tree, Report]:
    """Parameters for the data after an edit, approximately, from those that were tuned on the data before.

    Args:
        parameters: at a minimum of R_before, or near it.
        before, after: weights [C, B] of the rows in the data before and after, 1/n each, else 0. A removed row has none
            after; a replaced one has another row in its place.
        heldout: calibrates a single step: weights of rows that were in no training data. The step ends where the rows
            that left have the mean loss of these; then one round at damp `POLISH_DAMP` repairs the loss on the rest.
    """
    assert settings.mode in MODES, settings.mode
    start, solutions, step = parameters, [], 1.0
    old_gradient = float(norm(_gradient(problem, start, before)))
    with jax.default_matmul_precision("highest"):
        if settings.mode == "warm":
            with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int power
                parameters = _warm(problem, start, after, settings)
        elif settings.rounds:
            for _ in range(settings.rounds):
                solution, step = _round(problem, parameters, after, settings)
                solutions.append(solution)
                parameters = moved(parameters, step, solution.x)
        else:
            solutions.append(_one_step(problem, start, before, after, settings))
            if heldout is not None:
                erased = np.where(after > 0, 0, before)
                step = _calibrated_step(problem, start, solutions[0].x, erased, heldout)
            parameters = moved(start, step, solutions[0].x)
            if heldout is not None:
                polish = dataclasses.replace(settings, mode="newton", damp=POLISH_DAMP)
                solution, polish_step = _round(problem, parameters, after, polish)
                solutions.append(solution)
                parameters = moved(parameters, polish_step, solution.x)
    return parameters, Report(
        mode=settings.mode,
        strength=_least_strength(problem.strength, start),
        damp=settings.damp,
        iterations=sum(int(solution.iterations) for solution in solutions),
        residual=max((float(solution.residual) for solution in solutions), default=0.0),
        step=float(step),
        change=float(norm(moved(parameters, -1.0, start))),
        gradient=old_gradient,
        positive=all(float(solution.curvature) > 0 for solution in solutions),
    )


def _least_strength(strength: Tree, parameters: Tree) -> float:
    """The smallest lambda of the leaves that hold a number."""
    pairs = zip(jax.tree.leaves(strength), jax.tree.leaves(parameters), strict=True)
    return min(float(lam) for lam, leaf in pairs if np.size(leaf))


_gradient = jax.jit(gradient)
