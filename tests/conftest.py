"""Strict JAX on 8 fake CPU devices; a GPU machine keeps its own devices. Shared, small fixtures."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, settings

from lmeraser_jax import interrupt

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tests")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images and weights kept beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data and weights are not at {SHARED}")
    return SHARED


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _nobody_is_asked_to_stop():
    """A test that leaves the process asked to stop would end the next one's work."""
    yield
    left = interrupt.stop_requested()
    interrupt._asked.clear()
    assert not left
