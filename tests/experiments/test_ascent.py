"""Unlearning by raising losses, on a small softmax head with known gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeraser_jax.experiments import ascent
from lmeraser_jax.training.tasks import row_losses
from lmeraser_jax.unlearning import influence
from lmeraser_jax.unlearning.influence import Objective, Problem, Rows

HEAD = Objective(lambda kernel, frozen, inputs: (inputs @ kernel)[:, None] * jnp.ones((1, 2, 1)))  # two equal tokens


@pytest.fixture
def case(rng):
    """(problem, tuned kernel, weights of 8 erased, 24 kept and 16 held-out rows) in chunks of 8."""
    inputs = rng.normal(size=(48, 40)).astype(np.float32)
    labels = np.repeat(rng.integers(0, 5, 48).astype(np.int32)[:, None], 2, axis=1)
    rows = Rows(inputs.reshape(6, 8, 40), labels.reshape(6, 8, 2))
    problem = Problem(HEAD, 0.0, rows, np.float32(1e-3))
    sizes, weights = (8, 24, 16), []
    for start, size in zip((0, 8, 32), sizes, strict=True):
        flat = np.zeros(48, np.float32)
        flat[start : start + size] = 1 / size
        weights.append(jnp.asarray(flat.reshape(6, 8)))
    trained = (weights[0] * 8 + weights[1] * 24) / 32
    settings = influence.Settings(mode="warm", warm_passes=60, warm_rate=0.1)
    kernel, _ = influence.update(problem, jnp.zeros((40, 5), jnp.float32), trained, trained, settings)
    return problem, kernel, *weights


@pytest.mark.parametrize("kind", ascent.RATES)
def test_the_erased_rows_end_at_the_loss_of_held_out_ones(case, kind):
    problem, kernel, erased, kept, heldout = case
    target = influence.mean_loss(problem, kernel, heldout)
    assert influence.mean_loss(problem, kernel, erased) < 0.1 * target
    new, steps = ascent.unlearn(problem, kernel, erased, kept, heldout, kind)
    reached = influence.mean_loss(problem, new, erased)
    if steps < ascent.MOST_STEPS:
        assert target <= reached < 1.2 * target
    assert reached > 10 * influence.mean_loss(problem, kernel, erased)
    if kind == "difference":
        alone, _ = ascent.unlearn(problem, kernel, erased, kept, heldout, "ascent")
        assert influence.mean_loss(problem, new, kept) < influence.mean_loss(problem, alone, kept)


def test_the_gradient_of_npo_is_that_of_its_loss(case):
    """One step of Adam is a sign: the first step goes along the gradient of the objective as it is written."""
    problem, kernel, erased, kept, heldout = case

    def objective(tree):
        def log_p(parameters):
            outputs = HEAD.outputs(parameters, 0.0, problem.rows.inputs[0])
            return -2 * row_losses(outputs, problem.rows.labels[0])

        forgotten = jnp.mean(jnp.logaddexp(0.0, ascent.BETA * (log_p(tree) - log_p(kernel))))
        return 2 / ascent.BETA * forgotten + influence.mean_loss(problem, tree, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ascent, "MOST_STEPS", 1)
        ascent.unlearn.clear_cache()
        new, steps = ascent.unlearn(problem, kernel, erased, kept, heldout, "npo")
    ascent.unlearn.clear_cache()
    assert steps == 1
    np.testing.assert_allclose(new - kernel, -ascent.RATES["npo"] * np.sign(jax.grad(objective)(kernel)), rtol=2e-2)
