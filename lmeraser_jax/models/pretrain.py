"""Supervised training of the backbone on public data (paper Eq. 2), data-parallel over all devices.

AdamW with warm-up and cosine; parameters and optimizer are replicated, the batch is split over the mesh. Orders and
augmentation are derived from (seed, epoch, step), so a run that resumes from a checkpoint of a few epochs ago computes
what an uninterrupted one would have.
"""

import functools
import math
import shutil
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
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.convert import per_channel, size_problems
from lmeraser_jax.models.vit import ViT, ViTConfig
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.workdir import Layout

State = tuple[Any, Any]  # (parameters, optimizer state)


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


def image_spec(config: Config, shape: tuple[int, int, int]) -> ImageSpec:
    """From public images [h, w, c] to the backbone's normalised input."""
    mean, std = (parse_numbers(text) or (0.5,) for text in (config.backbone.mean, config.backbone.std))
    mean, std = per_channel(mean, std, shape[2])
    return ImageSpec(
        *shape,
        size=config.data.image_size,
        resize=config.data.resize_size or config.data.image_size,
        out_channels=shape[2],
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


def pretrain(
    layout: Layout, images: np.ndarray, labels: np.ndarray, classes: int, config: Config, mesh: Mesh
) -> tuple[Backbone, float]:
    """Trains a backbone on public images, uint8 [N, h, w, c] and int32 labels [N], over a 1-D mesh.

    Returns:
        (Backbone, accuracy): accuracy in [0, 1] on augmented public images in the last epoch.

    Raises:
        UserError: there are no public images, or the loss is not finite.
    """
    p = config.pretraining
    if not len(images):
        raise UserError(
            "there are no public images to pretrain on; name a backbone with --config.backbone.weights=FILE"
        )
    vit = architecture(config, channels=images.shape[3], classes=classes)
    spec = image_spec(config, images.shape[1:])
    batch = -(-p.batch // mesh.size) * mesh.size
    tx = optimizer(config, p.epochs * -(-len(images) // batch))
    epoch_fn = _epoch_function(vit, spec, tx, mesh)
    public = arrays_digest({"images": images, "labels": labels})
    identity = digest([str(vit), str(spec), str(p), config.seed, batch, public])
    state, first = _start(layout, vit, tx, config.seed, identity)
    replicated = NamedSharding(mesh, P())
    state, data, targets = jax.device_put((state, images, np.asarray(labels, np.int32)), replicated)
    accuracy = 0.0
    with progress("pretrain", p.epochs) as shown:
        shown.advance(first)
        for epoch in range(first, p.epochs):
            rows, valid = _epoch_rows(config.seed, epoch, len(images), batch)
            key = jax.random.fold_in(jax.random.key(config.seed), epoch)
            state, *metrics = epoch_fn(state, data, targets, rows, valid, key)
            loss, accuracy = map(float, metrics)
            if not math.isfinite(loss):
                raise UserError(f"pretraining: the loss is {loss} in epoch {epoch}; lower --config.pretraining.rate")
            shown.advance(1, f"loss {loss:.3f} accuracy {accuracy:.3f}")
            ended = epoch + 1
            if ended < p.epochs and (interrupt.stop_requested() or ended % p.checkpoint_epochs == 0):
                checkpoints.save_step(layout.pretraining, checkpoints.flatten(state), {"identity": identity}, ended)
                interrupt.raise_if_stopped()
    return backbone_lib.make(vit, jax.device_get(state[0]), spec.mean, spec.std), accuracy


def _start(
    layout: Layout, vit: ViTConfig, tx: optax.GradientTransformation, seed: int, identity: str
) -> tuple[State, int]:
    """The state and epoch to go on with: those of the same training's newest checkpoint, else from scratch."""
    params = nnx.to_pure_dict(nnx.split(ViT(vit, nnx.Rngs(seed)), nnx.Param)[1])
    state = (params, tx.init(params))
    if not layout.pretraining.exists():
        return state, 0
    try:
        arrays, metadata, epoch = checkpoints.load(layout.pretraining)
        if metadata["identity"] == identity:
            return checkpoints.unflatten(arrays, state), epoch
    except Damaged:
        pass  # the first save was cut short
    shutil.rmtree(layout.pretraining)
    return state, 0


def _epoch_rows(seed: int, epoch: int, count: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, B] in a new order for each epoch, and which of them are real."""
    steps = -(-count // batch)
    order = philox(seed, "pretrain", str(epoch)).permutation(count)
    rows, valid = np.resize(order, steps * batch).astype(np.int32), np.arange(steps * batch) < count
    return rows.reshape(steps, batch), valid.reshape(steps, batch)


def _epoch_function(vit: ViTConfig, spec: ImageSpec, tx: optax.GradientTransformation, mesh: Mesh):
    """One compiled epoch: a scan over its steps."""
    split = NamedSharding(mesh, P(None, mesh.axis_names[0]))

    def loss_fn(params, images, labels, valid):
        logits = backbone_lib.logits(vit, params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = (jnp.argmax(logits, -1) == labels) & valid
        weights = valid.astype(losses.dtype)
        return jnp.sum(losses * weights) / jnp.sum(weights), jnp.sum(right)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, images, labels, rows, valid, key):
        rows, valid = jax.lax.with_sharding_constraint((rows, valid), split)

        def step(state, batch):
            params, opt = state
            rows, valid, index = batch
            pixels = augmented(images[rows], spec, jax.random.fold_in(key, index))
            (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, pixels, labels[rows], valid)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
                updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), (loss, right)

        state, (losses, right) = jax.lax.scan(step, state, (rows, valid, jnp.arange(len(rows))))
        return state, jnp.mean(losses), jnp.sum(right) / jnp.sum(valid)

    return epoch
