"""The prompt that is tuned on public records, and the slices that begin with it."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import small_config, small_run

from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.training.public_prompt import tune_prompt
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.plan import constants_digest
from lmeraser_jax.unlearning.run import image_spec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained workdir whose prompts stay what they begin with: noise, as the public prompt does."""
    config = small_config(tuning__start="public", tuning__prompt_init=1.0, tuning__prompt_rate=0.0)
    with small_run(tmp_path_factory.mktemp("prompted") / "run", config=config) as run:
        build(run)
        yield run


def test_every_prompt_begins_with_the_public_one(run):
    slices = [load_slice(run, ref) for ref in run.catalog.manifest().entries.values()]
    prompt, _ = run.public_prompt
    assert len(slices) > 2 and prompt.std() > 0.5
    assert {slice_.prompt.tobytes() for slice_ in slices} == {prompt.tobytes()}
    assert len({slice_.kernel.tobytes() for slice_ in slices}) == len(slices)
    assert run.common_spec.start == b"" and run.common_constants.start == ""
    other = dataclasses.replace(run.recipe_constants, start="digest of another prompt")
    assert constants_digest(other) != constants_digest(run.recipe_constants)


def test_it_is_tuned_by_public_labels_alone_on_any_number_of_lanes_and_devices(run):
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 7, 1)).astype(np.uint8)
    public = PublicSet(images, np.arange(20, dtype=np.int32) % 3, 3)
    spec = image_spec(run.config, images.shape[1:], run.backbone)

    def tuned(public, devices=1, **changes):
        tuning = dataclasses.replace(run.config.tuning, prompt_rate=0.03, prompt_init=0.0, **changes)
        config = dataclasses.replace(run.config, tuning=tuning)
        return tune_prompt(config, public, run.backbone, spec, mesh_of(jax.devices()[:devices]))

    prompt = tuned(public)
    assert (prompt != 0).mean() > 0.9
    np.testing.assert_array_equal(tuned(public, devices=len(jax.devices()), lanes=3), prompt)
    others = dataclasses.replace(public, labels=np.arange(20, dtype=np.int32) // 7)
    assert np.abs(tuned(others) - prompt).max() > 1e-3
