"""Random histories of a workdir against a plain-Python model (`history.History`)."""

import hypothesis
import jax
import pytest
from history import CONFIG, POOL, History

from lmeraser_jax.unlearning.run import prepare_run


@pytest.fixture(scope="module", autouse=True)
def backbone_folder(tmp_path_factory, fast_files):
    """The backbone of every history, made once."""
    with prepare_run(tmp_path_factory.mktemp("backbone") / "run", CONFIG, jax.devices()[:1], POOL) as (run, _):
        History.backbone_folder = run.layout.backbone


@pytest.mark.parametrize(("examples", "steps"), [(10, 12), pytest.param(25, 20, marks=pytest.mark.slow)])
def test_random_histories(examples, steps):
    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None
    )
    hypothesis.stateful.run_state_machine_as_test(History, settings=settings)
