"""Public adaptation: published weights are trained on, at the input size of the private images, on public records only.

The network learns the labels of the public set, or to give from small images the features that the same weights give
at their own image size (distillation, which needs no labels), or both. No private record meets it, so it costs an
erasure nothing.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.config import Config
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.pretrain import PublicSet, Start, image_spec, train
from lmeraser_jax.storage import checkpoints

BATCH = 32  # images per device and call of the network at its own image size


def adapt(folder: Path, public: PublicSet, config: Config, mesh: Mesh) -> tuple[Backbone, dict[str, Any], float]:
    """Trains the published weights that the config names on a public set; checkpoints lie in `folder`.

    Also returns the provenance, and the accuracy as `pretrain.train` gives it. Raises `UserError` where the weights or
    the settings do not fit or the loss is not finite, and `Stopped` where the process was asked to stop; the same call
    goes on.
    """
    backbone, provenance = convert.load(config.backbone, config.data.image_size)
    spec = image_spec(config, public.images.shape[1:], backbone.config.channels, backbone.mean, backbone.std)
    if config.pretraining.distill:
        public = _with_features(folder / "features", public, config, mesh)
    width, classes = backbone.config.feature_size, public.classes
    head = {"kernel": np.zeros((width, classes), np.float32), "bias": np.zeros(classes, np.float32)}
    start = Start(dataclasses.replace(backbone.config, classes=classes), {**backbone.params, "head": head}, spec)
    adapted, accuracy = train(folder / "steps", start, public, config, mesh)
    record = {
        "public": config.public.path or config.public.dataset or config.data.source,
        "public_digest": public.digest,
        "images": len(public.images),
        "pretraining": dataclasses.asdict(config.pretraining),
        "seed": config.seed,
        "accuracy": accuracy if config.pretraining.supervise else None,
    }
    facts = dataclasses.asdict(provenance) | {"published_size": config.data.image_size, "adapted": record}
    return adapted, facts, accuracy


def _with_features(folder: Path, public: PublicSet, config: Config, mesh: Mesh) -> PublicSet:
    """Adds what the published weights see in the images at their own size; computed once, and kept in `folder`."""
    teacher, _ = convert.load(config.backbone, note=False)
    size = teacher.config.image_size
    if size <= config.data.image_size:
        raise UserError(
            f"--config.pretraining.distill={config.pretraining.distill}: the weights are for images of {size} px,"
            f" which must be more than --config.data.image_size={config.data.image_size}; set it to 0"
        )
    identity = digest([teacher.digest, public.digest])
    features = None
    with contextlib.suppress(Damaged):  # not there yet, or cut short
        arrays, notes, _ = checkpoints.load(folder)
        features = arrays["features"] if notes["identity"] == identity else None
    if features is None:
        features = _features(teacher, public.images, config, mesh)
        checkpoints.save(folder, {"features": features}, {"identity": identity})
    deviation = features.std(axis=0) + 1e-6
    return dataclasses.replace(public, features=features / deviation, deviation=deviation)


def _features(teacher: Backbone, images: np.ndarray, config: Config, mesh: Mesh) -> np.ndarray:
    """Features at the network's own image size: uint8 [N, h, w, c] -> float32 [N, D]."""
    size, channels = teacher.config.image_size, teacher.config.channels
    spec = dataclasses.replace(
        image_spec(config, images.shape[1:], channels, teacher.mean, teacher.std),
        size=size,
        resize=size,
        augment="none",
    )
    params = jax.device_put(teacher.params, NamedSharding(mesh, P()))
    split = NamedSharding(mesh, P(mesh.axis_names[0]))

    @functools.partial(jax.jit, in_shardings=(None, split))
    def compute(params, pixels):
        return backbone_lib.features(teacher.config, params, centred(pixels, spec))

    program, width = functools.partial(compute, params), teacher.config.feature_size
    return backbone_lib.features_of_all(program, images, BATCH * mesh.size, width, "teacher")
