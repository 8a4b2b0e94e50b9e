"""The initial prompt from public records (`tuning.start=public`): tuned on them, with a head that is thrown away.

Every cluster's prompt begins with it. No private record reaches it, so it costs an erasure nothing.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from lmeraser_jax.config import Config, Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.hashing import arrays_digest, digest
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training import tune
from lmeraser_jax.training.jobs import make_job
from lmeraser_jax.training.slices import recipe_settings
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.train_step import mesh_of

KEY = "public prompt"  # in the place of a cluster's key


def tune_prompt(config: Config, public: PublicSet, backbone: Backbone, spec: ImageSpec, mesh: Mesh) -> np.ndarray:
    """The prompt, float32 [n], of a slice whose members are the public records; `spec` leads from their images.

    Always tuned on one device, so that it is the same beside any number of them. Raises `UserError` for a loss that is
    not finite, and `Stopped` where the process was asked to stop.
    """
    tuning = _own_tuning(config.tuning)
    tuning_spec = TuningSpec(backbone.config, spec, tuning, public.classes, config.seed)
    job = make_job(KEY, np.arange(len(public.images)), tuning)
    mesh = mesh_of([mesh.devices.flat[0]])
    (tuned,) = tune.make_slices(tuning_spec, backbone, [job], public.images, public.labels, mesh)
    if tuned.failed_at is not None:
        raise UserError(f"the public prompt: the loss is not finite in step {tuned.failed_at}; lower the rates")
    return tuned.slice.prompt


def name_of(config: Config, backbone: Backbone) -> str:
    """A digest of what the prompt depends on: settings of tuning, images and the public set; seed and backbone."""
    data = [config.data.image_size, config.data.resize_size, config.data.augment]
    settings = [recipe_settings(_own_tuning(config.tuning)), dataclasses.asdict(config.public), data, config.seed]
    return digest([*settings, backbone.digest])


def save(folder: Path, prompt: np.ndarray) -> None:
    """Writes a prompt with its digest."""
    arrays = {"prompt": prompt}
    checkpoints.save(folder, arrays, {"digest": arrays_digest(arrays)})


def load(folder: Path) -> tuple[np.ndarray, str]:
    """A saved prompt, float32 [n], and its digest. Raises `Damaged` where it is missing or has another digest."""
    again = "lmeraser train tunes it again"
    try:
        arrays, notes, _ = checkpoints.load(folder)
    except Damaged as error:
        raise Damaged(f"{error}; {again}") from error
    if arrays_digest(arrays) != notes["digest"]:
        raise Damaged(f"{folder} is damaged: its prompt is not the one that was tuned; {again}")
    return arrays["prompt"], notes["digest"]


def _own_tuning(tuning: Tuning) -> Tuning:
    return dataclasses.replace(tuning, method="prompt+head", start="fresh", lanes=1)
