"""Influence functions against dense matrices, closed forms and refitted models, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from lmeraser_jax.unlearning import influence
from lmeraser_jax.unlearning.influence import Objective, Problem, Rows, Settings, chunked

EXACT = Settings(iterations=400, tolerance=1e-13)
CHUNK = 64


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def linear(parameters, frozen, inputs):
    return inputs @ parameters["kernel"] + parameters["bias"][None]


def binary(parameters, frozen, inputs):
    """Logits 0 and x'w: logistic regression."""
    logit = inputs @ parameters
    return jnp.stack([jnp.zeros_like(logit), logit], axis=1)


def network(parameters, frozen, inputs):
    """Logits for two tokens of each row, by a hidden layer; no convex loss."""
    hidden = jnp.tanh(inputs @ parameters["first"])
    return (hidden @ parameters["second"]).reshape(len(inputs), 2, 3) + frozen


LINEAR, BINARY, NETWORK = Objective(linear), Objective(binary), Objective(network)
RIDGE = Objective(
    lambda parameters, frozen, inputs: (inputs @ parameters)[:, None],
    losses=lambda outputs, labels: 0.5 * (outputs[:, 0] - labels) ** 2,
    curvature=lambda outputs, labels, tangent: tangent,
)


def problem_of(objective, inputs, labels, strength, frozen=0.0, extra=0):
    """A problem over all rows, in chunks of `CHUNK`, and `extra` chunks of padding."""
    chunks = -(-len(inputs) // CHUNK) + extra
    rows = Rows(chunked(inputs, CHUNK, chunks), chunked(labels, CHUNK, chunks))
    return Problem(objective, frozen, rows, strength)


def weights_of(problem, selected, total):
    """1 / total for the selected rows, given by a boolean mask or by indices."""
    chunks = len(problem.rows.inputs)
    flat = np.zeros(chunks * CHUNK)
    flat[np.flatnonzero(selected) if np.asarray(selected).dtype == bool else selected] = 1 / total
    return flat.reshape(chunks, CHUNK)


@pytest.fixture
def tokens(rng):
    """(problem, parameters, weights): 100 rows of two tokens each, some of which do not count."""
    inputs, labels = rng.normal(size=(100, 4)), rng.integers(0, 3, (100, 2)).astype(np.int32)
    labels[::7, 1] = -1
    strength = {"first": 0.01, "second": 0.02}
    problem = problem_of(NETWORK, inputs, labels, strength, frozen=rng.normal(size=(1, 2, 3)))
    parameters = {"first": rng.normal(size=(4, 5)), "second": rng.normal(size=(5, 6))}
    return problem, parameters, weights_of(problem, np.arange(80), 80)


def flat_risk(problem, parameters, weights):
    """R as a function of one vector, written without chunks; the vector of the parameters, and its inverse."""
    vector, unravel = ravel_pytree(parameters)
    inputs, labels, flat = (np.concatenate(part) for part in (*problem.rows, weights))

    def value(vector):
        tree = unravel(vector)
        chosen = jax.nn.log_softmax(problem.objective.outputs(tree, problem.frozen, inputs))
        chosen = jnp.take_along_axis(chosen, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        counts = (labels >= 0).astype(float)
        losses = -(chosen * counts).sum(axis=1) / jnp.maximum(counts.sum(axis=1), 1)
        squares = jax.tree.map(lambda leaf, lam: lam * (leaf**2).sum() / 2, tree, problem.strength)
        return (flat * losses).sum() + sum(jax.tree.leaves(squares))

    return value, vector, unravel


def test_hessian_products_are_those_of_the_dense_hessian(tokens, rng):
    problem, parameters, weights = tokens
    value, vector, unravel = flat_risk(problem, parameters, weights)
    value = jax.jit(value)
    direction = rng.normal(size=vector.shape)
    true = dataclasses.replace(problem, objective=Objective(network, gauss_newton=False))
    product = influence.product(true, parameters, weights, unravel(direction), 0.1)
    expected = jax.jit(jax.hessian(value))(vector) @ direction + 0.1 * direction
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, rtol=1e-10, atol=1e-12)
    grad = ravel_pytree(influence.gradient(problem, parameters, weights))[0]
    np.testing.assert_allclose(grad, jax.grad(value)(vector), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(influence.risk(problem, parameters, weights), value(vector), rtol=1e-12)


def test_gauss_newton_is_the_dense_matrix_and_positive(tokens, rng):
    problem, parameters, weights = tokens
    _, vector, unravel = flat_risk(problem, parameters, weights)
    product = jax.jit(lambda row: ravel_pytree(influence.product(problem, parameters, weights, unravel(row)))[0])
    matrix = np.stack([product(row) for row in np.eye(len(vector))])
    inputs, labels, flat = (np.concatenate(part) for part in (*problem.rows, weights))
    outputs = lambda vector: network(unravel(vector), problem.frozen, inputs)  # noqa: E731
    jacobian, p = (
        np.asarray(jax.jit(f)(vector)) for f in (jax.jacobian(outputs), lambda v: jax.nn.softmax(outputs(v)))
    )  # [N, T, Y, n], [N, T, Y]
    counts = (labels >= 0) / np.maximum((labels >= 0).sum(axis=1, keepdims=True), 1)
    curvature = (np.eye(3) * p[..., None] - p[..., None] * p[..., None, :]) * (counts * flat[:, None])[..., None, None]
    strength = np.concatenate([np.full(20, 0.01), np.full(30, 0.02)])
    expected = np.einsum("btyn,btyz,btzm->nm", jacobian, curvature, jacobian) + np.diag(strength)
    np.testing.assert_allclose(matrix, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > 0.009


def test_padding_changes_nothing(tokens, rng):
    problem, parameters, weights = tokens
    inputs, labels = (np.concatenate(part) for part in problem.rows)
    longer = problem_of(NETWORK, inputs, labels, problem.strength, problem.frozen, extra=3)
    more = np.concatenate([weights, np.zeros((3, CHUNK))])
    for short, long in (
        (influence.gradient(problem, parameters, weights), influence.gradient(longer, parameters, more)),
        (
            influence.product(problem, parameters, weights, parameters),
            influence.product(longer, parameters, more, parameters),
        ),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=0), short, long)


def test_conjugate_gradients_solve(rng):
    root = rng.normal(size=(12, 12))
    matrix, b = root @ root.T + np.eye(12), rng.normal(size=12)
    solution = influence.solve(lambda v: {"x": matrix @ v["x"]}, {"x": b}, 50, 1e-12)
    np.testing.assert_allclose(solution.x["x"], np.linalg.solve(matrix, b), rtol=1e-9)
    assert solution.residual <= 1e-12 and 0 < solution.iterations < 50 and solution.curvature > 0
    short = influence.solve(lambda v: matrix @ v, b, 3, 1e-12)
    assert short.iterations == 3
    np.testing.assert_allclose(short.residual, np.linalg.norm(b - matrix @ short.x) / np.linalg.norm(b), rtol=1e-9)


def test_an_indefinite_operator_stops_and_says_so():
    solution = influence.solve(lambda v: jnp.array([1.0, -2.0]) * v, jnp.ones(2), 50, 1e-12)
    assert solution.curvature < 0 and solution.iterations == 1 and solution.residual == 1
    assert not solution.x.any()


# Logistic regression on real data


@functools.cache
def cancer():
    """Standardised breast cancer data with a bias, and its labels."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1), labels.astype(np.int32)


def refit(inputs, labels, weights, strength):
    """Weighted logistic regression by Newton's method, in NumPy."""
    w = np.zeros(inputs.shape[1])
    for _ in range(60):
        p = 1 / (1 + np.exp(-inputs @ w))
        gradient = inputs.T @ (weights * (p - labels)) + strength * w
        hessian = (inputs * (weights * p * (1 - p))[:, None]).T @ inputs + strength * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
    return w


def removal_errors(share, mode, sets=5, strength=1e-2):
    """Relative errors of the change against the refitted model's, for random sets of removed rows."""
    inputs, labels = cancer()
    n, problem = len(inputs), problem_of(BINARY, inputs, labels, strength)
    start = refit(inputs, labels, np.full(n, 1 / n), strength)
    errors = []
    for seed in range(sets):
        removed = np.random.default_rng(seed).permutation(n)[: max(1, round(share * n))]
        remains = np.setdiff1d(np.arange(n), removed)
        before, after = weights_of(problem, np.arange(n), n), weights_of(problem, remains, n)
        new, _ = influence.update(problem, start, before, after, dataclasses.replace(EXACT, mode=mode))
        flat = np.where(np.isin(np.arange(n), removed), 0, 1 / n)
        p = 1 / (1 + np.exp(-inputs @ start))
        curved = (flat if mode == "newton" else 1 / n) * p * (1 - p)
        dense = (inputs * curved[:, None]).T @ inputs + strength * np.eye(len(start))
        step = np.linalg.solve(dense, inputs[removed].T @ (p - labels)[removed] / n)
        np.testing.assert_allclose(new - start, step, rtol=1e-8, atol=1e-12)
        change = refit(inputs, labels, flat, strength) - start
        errors.append(np.linalg.norm(new - start - change) / np.linalg.norm(change))
    return np.median(errors)


@pytest.mark.parametrize(("share", "newton", "paper"), [(0.0, 0.0, 0.0), (0.1, 0.043, 0.126), (0.2, 0.064, 0.175)])
def test_removals_from_logistic_regression(share, newton, paper):
    """The steps are those of dense matrices; their errors are those of another implementation on the same data."""
    errors = removal_errors(share, "newton"), removal_errors(share, "paper")
    assert errors[0] < 0.2 * errors[1] if not share else errors[0] < errors[1]
    if share:  # of a single record the errors depend on the record
        np.testing.assert_allclose(errors, (newton, paper), rtol=0.2)


def test_weights_before_and_after_must_be_of_one_normalisation():
    """A refit on the mean loss of the rest is another objective: matched weights reach it, the sum over S does not."""
    inputs, labels = cancer()
    n, strength, removed = len(inputs), 1e-2, np.arange(57)
    problem, remains = problem_of(BINARY, inputs, labels, strength), np.arange(57, n)
    start = refit(inputs, labels, np.full(n, 1 / n), strength)
    mean = np.where(np.isin(np.arange(n), removed), 0, 1 / len(remains))
    change = refit(inputs, labels, mean, strength) - start
    errors = []
    for total in (len(remains), n):
        weights = weights_of(problem, np.arange(n), n), weights_of(problem, remains, total)
        new, _ = influence.update(problem, start, *weights, EXACT)
        errors.append(np.linalg.norm(new - start - change) / np.linalg.norm(change))
    assert errors[0] < 0.1 and errors[1] > 2 * errors[0]


def test_an_edit_of_nothing_changes_nothing_and_a_removal_raises_the_loss():
    inputs, labels = cancer()
    n, problem = len(inputs), problem_of(BINARY, inputs, labels, 1e-2)
    start = refit(inputs, labels, np.full(n, 1 / n), 1e-2)
    before, removed = weights_of(problem, np.arange(n), n), weights_of(problem, np.arange(20), n)
    for mode in ("newton", "paper"):
        settings = Settings(mode=mode)
        same, report = influence.update(problem, start, before, before, settings)
        np.testing.assert_array_equal(same, start)
        assert report.iterations == 0 and report.change == 0 and report.positive
        new, report = influence.update(problem, start, before, before - removed, settings)
        assert influence.mean_loss(problem, new, removed) > influence.mean_loss(problem, start, removed)
        assert report.strength == 1e-2 and report.change > 0 and report.gradient < 1e-8


def test_the_papers_formula_is_additive():
    inputs, labels = cancer()
    n, problem = len(inputs), problem_of(BINARY, inputs, labels, 1e-2)
    start, before = np.linspace(-1, 1, inputs.shape[1]), weights_of(problem, np.arange(n), n)
    first, second = (weights_of(problem, rows, n) for rows in (np.arange(20), np.arange(20, 50)))
    paper = dataclasses.replace(EXACT, mode="paper")
    changes = [influence.update(problem, start, before, before - s, paper)[0] - start for s in (first, second)]
    both, _ = influence.update(problem, start, before, before - first - second, paper)
    np.testing.assert_allclose(both - start, sum(changes), rtol=1e-8, atol=1e-12)


def test_ridge_regression_is_solved_to_rounding():
    inputs, targets = load_diabetes(return_X_y=True)
    targets = (targets - targets.mean()) / targets.std()
    n, strength, problem = len(inputs), 1e-3, problem_of(RIDGE, inputs, targets, 1e-3)

    def closed(rows, total):
        hessian = inputs[rows].T @ inputs[rows] / total + strength * np.eye(inputs.shape[1])
        return np.linalg.solve(hessian, inputs[rows].T @ targets[rows] / total), hessian

    start, hessian = closed(np.arange(n), n)
    before, remains = weights_of(problem, np.arange(n), n), np.arange(40, n)
    new, report = influence.update(problem, start, before, weights_of(problem, remains, n), EXACT)
    np.testing.assert_allclose(new, closed(remains, n)[0], atol=1e-10)
    assert report.residual <= 1e-13
    paper = dataclasses.replace(EXACT, mode="paper")
    new, _ = influence.update(problem, start, before, weights_of(problem, np.arange(1, n), n), paper)
    leverage = inputs[0] @ np.linalg.solve(hessian, inputs[0]) / n
    np.testing.assert_allclose((new - start) / (1 - leverage), closed(np.arange(1, n), n)[0] - start, atol=1e-10)


def test_rounds_correct_labels():
    """A tenth of the labels was wrong and is corrected: one step is poor, repeated ones reach the refitted model."""
    inputs, labels = cancer()
    n, strength, wrong = len(inputs), 1e-2, labels.copy()
    wrong[:57] = 1 - wrong[:57]
    problem = problem_of(BINARY, np.tile(inputs, (2, 1)), np.concatenate([wrong, labels]), strength)
    before, after = (weights_of(problem, np.arange(n) + offset, n) for offset in (0, n))
    start, goal = (refit(inputs, y, np.full(n, 1 / n), strength) for y in (wrong, labels))
    errors = []
    for rounds in (1, 3, 6):
        new, report = influence.update(problem, start, before, after, dataclasses.replace(EXACT, rounds=rounds))
        errors.append(np.linalg.norm(new - goal) / np.linalg.norm(start - goal))
    assert errors[0] > 0.1 and errors[1] < errors[0] / 2 and errors[2] < 1e-3
    assert report.step == 1


def test_warm_steps_lower_the_edited_risk():
    inputs, labels = cancer()
    n, problem = len(inputs), problem_of(BINARY, inputs, labels, 1e-2)
    start, weights = np.zeros(inputs.shape[1]), weights_of(problem, np.arange(n), n)
    new, report = influence.update(problem, start, weights, weights, Settings(mode="warm"))
    assert influence.risk(problem, new, weights) < 0.5 * influence.risk(problem, start, weights)
    assert (report.iterations, report.residual) == (0, 0) and report.change > 0


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_calibration_lifts_the_erased_rows_to_the_held_out_ones(dtype):
    """A linear head on 64 digits that it knows by heart; the step is scaled without a look at any refitted head."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = (pixels[:192] / 16).astype(dtype), labels[:192].astype(np.int32)
    strength = {"kernel": np.asarray(1e-3, dtype), "bias": np.asarray(1e-3, dtype)}
    problem = problem_of(LINEAR, pixels, labels, strength)
    zeros = {"kernel": np.zeros((64, 10), dtype), "bias": np.zeros(10, dtype)}
    before, after, heldout = (
        weights_of(problem, rows, 64).astype(dtype) for rows in (np.arange(64), np.arange(8, 64), np.arange(64, 192))
    )
    start, _ = influence.update(problem, zeros, before, before, Settings(rounds=8, iterations=60))
    new, report = influence.update(problem, start, before, after, heldout=heldout)
    erased = before - after
    losses = [[float(influence.mean_loss(problem, tree, w)) for w in (erased, heldout, after)] for tree in (start, new)]
    assert losses[0][0] < 0.5 * losses[0][1]
    assert 0.6 * losses[1][1] < losses[1][0] < 1.4 * losses[1][1] and losses[1][2] < 0.5
    assert report.step != 1 and all(leaf.dtype == dtype for leaf in jax.tree.leaves(new))


def test_requests_share_one_program(tokens):
    problem, parameters, weights = tokens
    sizes = []
    for removed in (0, 1, 2):
        after = weights.copy()
        after[0, : removed + 1] = 0
        influence.update(problem, parameters, weights, after)
        sizes.append(influence._one_step._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]
