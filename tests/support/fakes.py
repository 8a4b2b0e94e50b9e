"""Fast stand-ins for the tuning program, the features and the backbone: deterministic functions of their inputs.

For tests of the store, of requests, receipts, rollback and serving. What tests exactness or training uses real JAX.
"""

import hashlib
import json
import shutil
from types import MappingProxyType

import jax
import numpy as np

from lmeraser_jax.errors import Damaged
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training import tune
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import Tuned
from lmeraser_jax.unlearning import plan as plan_module
from lmeraser_jax.unlearning import run as run_module


def fake_slice(tuning_spec, backbone, key, images, labels, step) -> Slice:
    """A slice drawn from a hash of everything that may matter to it, for members in the order of their ids."""
    size = backbone.config.image_size
    shapes = ((max(4 * (size - 1), 0),), (backbone.config.feature_size, tuning_spec.classes), (tuning_spec.classes,))
    members = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    inputs = (key, members, tuning_spec.tuning, tuning_spec.seed, step)
    rng = np.random.default_rng(list(hashlib.sha256(repr(inputs).encode()).digest()))
    own = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tuning_spec.own_parameters)
    return Slice(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes), own)


def fake_tune(tuning_spec, backbone, jobs, images, labels, mesh):
    """Hands the slices of jobs over as the tuning loop does, with their snapshots."""
    for job in jobs:
        for step in (*job.snapshots, job.steps):
            slice_ = fake_slice(tuning_spec, backbone, job.key, images[job.rows], labels[job.rows], step)
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
    patch.setattr(plan_module.clustering_lib, "assign", fake_assign)


def fake_save(folder, arrays, metadata, step=0, earlier=MappingProxyType({})) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for number, tree in {**earlier, step: arrays}.items():
        (temporary / str(number) / "metadata").mkdir(parents=True)
        np.savez(temporary / str(number) / "arrays.npz", **tree)
        (temporary / str(number) / "metadata" / "metadata").write_text(json.dumps({"metadata": metadata}))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def fake_load(folder, step=None):
    if not folder.is_dir():
        raise Damaged(f"{folder} does not exist")
    try:
        step = max(int(path.name) for path in folder.iterdir()) if step is None else step
        metadata = json.loads((folder / str(step) / "metadata" / "metadata").read_text())["metadata"]
        with np.load(folder / str(step) / "arrays.npz") as file:
            return dict(file), metadata, step
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder} cannot be read: {error}") from error


def fast_checkpoints(patch) -> None:
    """Lets every checkpoint, the backbone's too, be one .npz file for each step, as long as a `MonkeyPatch` holds."""
    patch.setattr(checkpoints, "save", fake_save)
    patch.setattr(checkpoints, "load", fake_load)
