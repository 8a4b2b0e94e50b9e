"""Fast stand-ins for the tuning program, the features and the backbone: deterministic functions of their inputs.

For tests of the store, of requests, receipts, rollback and serving. What tests exactness or training uses real JAX.
"""

import hashlib

import numpy as np

from lmeraser_jax.training import tune
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import Tuned
from lmeraser_jax.unlearning import live_state
from lmeraser_jax.unlearning import run as run_module


def fake_tune(tuning_spec, backbone, jobs, images, labels, mesh):
    """Slices drawn from a hash of the jobs' inputs, handed over as the tuning loop does, with their snapshots."""
    size = backbone.config.image_size
    shapes = ((4 * (size - 1),), (backbone.config.feature_size, tuning_spec.classes), (tuning_spec.classes,))
    for job in jobs:
        members = [(images[row].tobytes(), int(labels[row])) for row in job.rows]
        for step in (*job.snapshots, job.steps):
            inputs = (job.key, members, tuning_spec.tuning, tuning_spec.seed, step)
            rng = np.random.default_rng(list(hashlib.sha256(repr(inputs).encode()).digest()))
            slice_ = Slice(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
            yield Tuned(job, step, slice_, 0.5, None, 0.01)


class FakeExtractor:
    """Sixteen pixel means of an image."""

    def __init__(self, *_):
        pass

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), 16, -1).mean(axis=2).astype(np.float32)


def fake_assign(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    return ((features[:, None] - prototypes[None]) ** 2).sum(axis=2).argmin(axis=1).astype(np.int32)


def fast_fakes(patch) -> None:
    """Installs the stand-ins for as long as a `pytest.MonkeyPatch` holds."""
    patch.setattr(tune, "make_slices", fake_tune)
    patch.setattr(run_module, "Extractor", FakeExtractor)
    patch.setattr(live_state.clustering_lib, "assign", fake_assign)
