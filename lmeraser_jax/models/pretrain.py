"""Training of the backbone on public data (paper Eq. 2), data-parallel over all devices.

It begins with random parameters here, with published weights in `adapt`. AdamW with warm-up and cosine; parameters and
optimizer are replicated, the batch is split over the mesh. Orders and augmentation are derived from (seed, epoch,
step), so a training that resumes from a checkpoint computes what an uninterrupted one would have.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax import interrupt
from lmeraser_jax.config import Config, parse_numbers
from lmeraser_jax.data.transforms import ImageSpec, augmented
from lmeraser_jax.errors import Damaged, UserError, raise_all
from lmeraser_jax.hashing import arrays_digest, digest, philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.architectures import Architecture, ViTConfig
from lmeraser_jax.models.backbone import Backbone, Params
from lmeraser_jax.models.convert import per_channel, size_problems
from lmeraser_jax.models.vit import ViT
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints

State = tuple[Any, Any]  # (parameters, optimizer state)
PROGRAM = 2  # raise it when the same settings start to give other bits: older checkpoints are then not continued
CHECKPOINT_SECONDS = 300.0  # between checkpoints, at most, whatever pretraining.checkpoint_epochs says
CALL_STEPS = 64  # steps of one call of the compiled program, at most: between calls a training can stop


@dataclasses.dataclass(frozen=True, eq=False)
class PublicSet:
    """Public images on the host, and what to learn from each."""

    images: np.ndarray  # uint8 [N, h, w, c]
    labels: np.ndarray  # int32 [N]
    classes: int
    features: np.ndarray | None = None  # float32 [N, D] to come close to, in units of their standard deviation
    deviation: np.ndarray | None = None  # float32 [D], that of the features

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over images and labels."""
        return arrays_digest({"images": self.images, "labels": self.labels})


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What a training begins with: a network with a classifier of the public set's classes."""

    config: Architecture
    params: Params
    spec: ImageSpec  # from public images to its input


def architecture(config: Config, channels: int, classes: int) -> ViTConfig:
    """The ViT that the config describes, with a public classifier. Raises `UserError` if its sizes do not fit."""
    b = config.backbone
    vit = ViTConfig(
        image_size=config.data.image_size,
        patch=b.patch,
        channels=channels,
        width=b.width,
        depth=b.depth,
        heads=b.heads or max(1, b.width // 16),
        mlp=b.mlp or 4 * b.width,
        feature="cls" if b.feature == "auto" else b.feature,
        classes=classes,
    )
    raise_all(size_problems(vit))
    return vit


def image_spec(
    config: Config, shape: tuple[int, ...], channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageSpec:
    """From public images [h, w, c] to the normalised input of a backbone of so many channels."""
    if shape[2] > channels:
        raise UserError(f"the public images have {shape[2]} channels, the backbone takes {channels}")
    return ImageSpec(
        *shape,
        size=config.data.image_size,
        resize=config.data.resize_size or config.data.image_size,
        out_channels=channels,
        mean=mean,
        std=std,
        augment=config.pretraining.augment,
    )


def optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW; linear warm-up and cosine to zero over `steps`; no decay on biases, norms and embeddings."""
    p = config.pretraining
    warmup = max(1, int(p.warmup * steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, p.rate, warmup, max(steps, warmup + 1))

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim == 2, params)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=p.weight_decay, mask=matrices))


def pretrain(folder: Path, public: PublicSet, config: Config, mesh: Mesh) -> tuple[Backbone, float]:
    """Trains a ViT from random parameters; as `train`. Raises `UserError` where there are no public images, too."""
    if not len(public.images):
        raise UserError(
            "there are no public images to pretrain on; name a backbone with --config.backbone.weights=FILE"
        )
    return train(folder, from_scratch(config, public), public, config, mesh)


def from_scratch(config: Config, public: PublicSet) -> Start:
    """Random parameters. Raises `UserError` where sizes or normalisation do not fit."""
    vit = architecture(config, channels=public.images.shape[3], classes=public.classes)
    params = nnx.to_pure_dict(nnx.split(ViT(vit, nnx.Rngs(config.seed)), nnx.Param)[1])
    mean, std = (parse_numbers(text) or (0.5,) for text in (config.backbone.mean, config.backbone.std))
    mean, std = per_channel(mean, std, vit.channels)
    return Start(vit, params, image_spec(config, public.images.shape[1:], vit.channels, mean, std))


def train(folder: Path, start: Start, public: PublicSet, config: Config, mesh: Mesh) -> tuple[Backbone, float]:
    """Trains a network on public images over a 1-D mesh; goes on from the checkpoints of the same training in `folder`.

    The loss is pretraining.supervise times the cross-entropy of the labels (Eq. 2) plus pretraining.distill times the
    mean squared distance of the features from `public.features`.

    Also returns the accuracy, in [0, 1], on augmented public images in the last epoch. Raises `UserError` for a loss
    that is not finite, and `Stopped`, with a checkpoint written, where the process was asked to stop.
    """
    p, count = config.pretraining, len(public.images)
    batch = -(-p.batch // mesh.size) * mesh.size
    steps = -(-count // batch)
    calls = np.array_split(np.arange(steps, dtype=np.int32), -(-steps // CALL_STEPS))  # of an epoch
    tx = optimizer(config, p.epochs * steps)
    program = _compiled(start.config, start.spec, tx, mesh, p.supervise, p.distill)
    data = {"images": public.images, "labels": np.asarray(public.labels, np.int32)}
    if public.features is not None and public.deviation is not None:
        data |= {"features": public.features, "deviation": public.deviation}
    initial = arrays_digest(checkpoints.flatten(start.params))
    identity = digest(
        [PROGRAM, str(start.config), str(start.spec), str(p), config.seed, batch, initial, arrays_digest(data)]
    )
    state, first, right = _resume(folder, (start.params, tx.init(start.params)), identity)
    state, data = jax.device_put((state, data), NamedSharding(mesh, P()))
    saved = time.monotonic()
    with progress("pretrain", p.epochs * len(calls)) as shown:
        shown.advance(first)
        for number in range(first, p.epochs * len(calls)):
            epoch, place = divmod(number, len(calls))
            rows, valid = _epoch_rows(config.seed, epoch, count, batch)
            key = jax.random.fold_in(jax.random.key(config.seed), epoch)
            now = calls[place]
            state, loss, hits = program(state, data, rows[now], valid[now], now, key)
            right = (right if place else 0) + int(hits)
            if not math.isfinite(float(loss)):
                raise UserError(f"pretraining: the loss is {loss} in epoch {epoch}; lower --config.pretraining.rate")
            shown.advance(1, f"loss {float(loss):.3f}")
            ended, end = number + 1, p.epochs * len(calls)
            due = ended % (p.checkpoint_epochs * len(calls)) == 0 or time.monotonic() - saved >= CHECKPOINT_SECONDS
            if ended < end and (interrupt.stop_requested() or due):
                notes = {"identity": identity, "right": right}
                checkpoints.save_step(folder, checkpoints.flatten(state), notes, ended)
                saved = time.monotonic()
                interrupt.raise_if_stopped()
    return backbone_lib.make(start.config, jax.device_get(state[0]), start.spec.mean, start.spec.std), right / count


def _resume(folder: Path, state: State, identity: str) -> tuple[State, int, int]:
    """What to go on with: state, calls made, hits of the epoch; from the same training's newest checkpoint, if any."""
    with contextlib.suppress(Damaged):  # there is none, or the first save was cut short
        arrays, notes, calls = checkpoints.load(folder)
        if notes["identity"] == identity:
            return checkpoints.unflatten(arrays, state), calls, notes["right"]
    shutil.rmtree(folder, ignore_errors=True)
    return state, 0, 0


def _epoch_rows(seed: int, epoch: int, count: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, B] in a new order for each epoch, and which of them are real."""
    steps = -(-count // batch)
    order = philox(seed, "pretrain", str(epoch)).permutation(count)
    rows, valid = np.resize(order, steps * batch).astype(np.int32), np.arange(steps * batch) < count
    return rows.reshape(steps, batch), valid.reshape(steps, batch)


def _compiled(
    config: Architecture,
    spec: ImageSpec,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    supervise: float,
    distill: float,
):
    """One call: a scan over some steps of an epoch."""
    split = NamedSharding(mesh, P(None, mesh.axis_names[0]))

    def loss_fn(params, pixels, data, rows, valid):
        features, logits = backbone_lib.features_and_logits(config, params, pixels)
        labels, weights = data["labels"][rows], valid.astype(jnp.float32)

        def mean(losses):
            return jnp.sum(losses * weights) / jnp.sum(weights)

        loss = jnp.zeros(())
        if supervise:
            loss = supervise * mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        if distill:
            distance = features / data["deviation"][None] - data["features"][rows]  # [B, D]
            loss = loss + distill * mean(jnp.mean(jnp.square(distance), axis=-1))
        return loss, jnp.sum((jnp.argmax(logits, -1) == labels) & valid)

    @functools.partial(jax.jit, donate_argnums=0)
    def call(state, data, rows, valid, steps, key):
        rows, valid = jax.lax.with_sharding_constraint((rows, valid), split)

        def step(state, batch):
            params, opt = state
            rows, valid, index = batch
            pixels = augmented(data["images"][rows], spec, jax.random.fold_in(key, index))
            (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, pixels, data, rows, valid)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
                updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), (loss, right)

        state, (losses, right) = jax.lax.scan(step, state, (rows, valid, steps))
        return state, jnp.mean(losses), jnp.sum(right)

    return call
