"""Strict JAX on 2 fake CPU devices (more would compile longer); a GPU machine keeps its own. Shared, small fixtures."""

import contextlib
import os
import shutil
from pathlib import Path

# What JAX compiles is kept between test processes and runs; children of the tests inherit the variables.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest
from absl import flags
from fakes import fast_checkpoints, fast_fakes
from helpers import small_run
from hypothesis import HealthCheck, settings

from lmeraser_jax import interrupt
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training import tune
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.build import build

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
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


@pytest.fixture
def new_workdir(tmp_path):
    """A workdir without anything in it: (layout, catalog)."""
    layout = Layout(tmp_path / "run")
    layout.prepare()
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        yield layout, catalog


@pytest.fixture(scope="session")
def trained_template(tmp_path_factory) -> Path:
    """A small workdir, trained once on one device with the real program. Tests copy it and never change it."""
    assert tune.make_slices.__module__ == tune.__name__, "a module with fakes must not train it for others"
    folder = tmp_path_factory.mktemp("trained") / "run"
    with small_run(folder) as run:
        build(run)
    return folder


@pytest.fixture(scope="session")
def erased_template(trained_template, tmp_path_factory) -> Path:
    """The trained workdir after the erasure of its first private record. Tests copy it and never change it."""
    folder = tmp_path_factory.mktemp("erased") / "run"
    shutil.copytree(trained_template, folder)
    with small_run(folder) as run:
        erase.request_erasure(run, [run.catalog.live("train").ids[0]], request="first")
    return folder


@pytest.fixture(scope="module")
def fast():
    """The stand-ins of `fakes`, for all tests of a module: `pytestmark = pytest.mark.usefixtures("fast")`."""
    with pytest.MonkeyPatch.context() as patch:
        fast_fakes(patch)
        yield


@pytest.fixture(scope="module")
def fast_files(fast):
    """The stand-ins, and every checkpoint one .npz file."""
    with pytest.MonkeyPatch.context() as patch:
        fast_checkpoints(patch)
        yield


@pytest.fixture(scope="session")
def fast_template(tmp_path_factory) -> Path:
    """A small workdir, trained once on one device with the stand-ins. Tests copy it and never change it."""
    folder = tmp_path_factory.mktemp("fast") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fast_fakes(patch)
        with small_run(folder) as run:
            build(run)
    return folder


@pytest.fixture
def fast_workdir(fast, fast_template, tmp_path) -> Path:
    """A copy of the workdir that was trained with the stand-ins, for one test to change."""
    return Path(shutil.copytree(fast_template, tmp_path / "fast" / "run"))


@pytest.fixture
def trained_workdir(trained_template, tmp_path) -> Path:
    """A copy of the small trained workdir, for one test to change. Open it with `helpers.small_run`."""
    return Path(shutil.copytree(trained_template, tmp_path / "trained" / "run"))


@pytest.fixture
def erased_workdir(erased_template, tmp_path) -> Path:
    """A copy of the small workdir after an erasure with the request id "first", for one test to change."""
    return Path(shutil.copytree(erased_template, tmp_path / "erased" / "run"))


@pytest.fixture(autouse=True)
def _no_stop_is_requested():
    """A test that leaves a stop requested would end the next test's work."""
    yield
    requested = interrupt.stop_requested()
    interrupt._requested.clear()
    assert not requested
