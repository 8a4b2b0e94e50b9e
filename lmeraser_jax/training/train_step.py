"""The tuning program: one compiled step tunes a cluster in every lane of every device (Eqs. 5, 6).

`vmap` over lanes, the same program on every device, a device-side loop over many steps, buffers donated. A lane
re-initialises its slice when a new cluster starts and drops the finished slice into an output slot, so neither the
number of clusters nor of records is part of any shape: training, one request or a thousand run the same executable.
Gradients are taken with respect to the slice only. Pure functions; `tune` is the loop around them.

Shapes: G lanes of all devices, L lanes per device, T steps of one call, B images per lane, W output slots.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.config import Tuning
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.lora import init_adapters
from lmeraser_jax.training.each_device import on_each
from lmeraser_jax.training.multihost import local_devices
from lmeraser_jax.training.slices import Slice, init_slice
from lmeraser_jax.training.tasks import TuningSpec, outputs_of, row_losses, step_inputs, targets_of


class LaneState(NamedTuple):
    """A cluster under way: its slice and its optimizer state."""

    slice: Slice
    opt: Any


class Batch(NamedTuple):
    """What one lane gets for one step; with leading axes [T, G] for a whole call."""

    rows: Any  # int32 [B], rows of the images on the device
    valid: Any  # bool [B]
    words: Any  # uint32 [2], the job's seed words
    step: Any  # int32, the job's own step
    total: Any  # int32, its number of steps
    slot: Any  # int32, output slot when the slice is handed over after this step, else W


def mesh_of(devices: Sequence[Any] | None = None) -> Mesh:
    """1-D mesh over the devices, by default those of this process. Raises `UserError` where there is none."""
    return Mesh(np.array(devices or local_devices()), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


def optimizer(tuning: Tuning) -> optax.GradientTransformation:
    """Directions, before the learning rates: SGD with momentum or Adam(W), decay per group."""
    decay = optax.partition(
        {group: optax.add_decayed_weights(rate) for group, rate in _by_group(tuning, "decay").items()}, _groups
    )
    if tuning.optimizer == "sgd":
        return optax.chain(decay, optax.trace(tuning.momentum))
    return optax.chain(optax.scale_by_adam(), decay)


def _groups(tree: Slice) -> Slice:
    """Names the group of each leaf, for optax."""
    return Slice("prompt", "head", "head", jax.tree.map(lambda _: "own", tree.backbone))


def _by_group(tuning: Tuning, kind: str) -> dict[str, float]:
    """Rates or decays; of a fixed head none."""
    head = getattr(tuning, f"head_{kind}") if tuning.method != "prompt" else 0.0
    own = (tuning.lora_rate if tuning.method == "lora" else tuning.backbone_rate) if kind == "rate" else 0.0
    return {"prompt": getattr(tuning, f"prompt_{kind}"), "head": head, "own": own}


def learning_rate(tuning: Tuning, step: jax.Array, total: jax.Array) -> jax.Array:
    """Factor in [0, 1] in the cluster's own progress: linear warm-up, then half a cosine to zero."""
    warmup = jnp.ceil(tuning.warmup * total.astype(jnp.float32))
    at, last = step.astype(jnp.float32), total.astype(jnp.float32)
    rising = (at + 1.0) / jnp.maximum(warmup, 1.0)
    falling = 0.5 * (1.0 + jnp.cos(math.pi * (at - warmup) / jnp.maximum(last - warmup, 1.0)))
    return jnp.where(at < warmup, rising, falling)


def cluster_loss(
    slice_: Slice, tuning_spec: TuningSpec, params: Any, inputs: jax.Array, labels: jax.Array, valid: jax.Array
):
    """Masked mean cross-entropy of one cluster's batch (Eq. 6), to be differentiated by `slice_` only.

    `inputs` are as in `features_of`; labels int32 [B], valid bool [B].
    """
    outputs = outputs_of(slice_, tuning_spec, params, inputs)
    losses = row_losses(outputs, targets_of(tuning_spec, inputs, labels))
    weights = valid.astype(losses.dtype)
    loss = jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)
    strength = tuning_spec.tuning.lora_l2
    if not strength:
        return loss
    return loss + 0.5 * strength * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(slice_.backbone))


def cluster_step(
    tuning_spec: TuningSpec, params: Any, images: jax.Array, labels: jax.Array, state: LaneState, batch: Batch
):
    """One optimizer step of one cluster: (new state, loss float32 []). Its step 0 begins with a fresh slice.

    Every random number comes from (seed, cluster, step), and the rate from the cluster's own progress. `images` and
    `labels` int32 [M] are those on the device: uint8 [M, h, w, c], or float32 [M, D] where `tuning_spec.on_features`.
    """
    tuning = tuning_spec.tuning
    tx = optimizer(tuning)
    key = jax.random.key(tuning_spec.seed)
    for i in range(2):
        key = jax.random.fold_in(key, batch.words[i])
    key_init, key_augment = jax.random.split(key)
    first = fresh_slice(tuning_spec, key_init, params)
    fresh = LaneState(first, tx.init(first))
    slice_, opt = jax.tree.map(lambda new, old: jnp.where(batch.step == 0, new, old), fresh, state)
    inputs = jax.tree.map(lambda leaf: leaf[batch.rows], images)
    inputs = step_inputs(tuning_spec, inputs, jax.random.fold_in(key_augment, batch.step))
    targets = labels[batch.rows]

    def loss_of(slice_: Slice) -> jax.Array:
        return cluster_loss(slice_, tuning_spec, params, inputs, targets, batch.valid)

    # Traced to a jaxpr first: the lanes and the gradient then meet plain operations, not hundreds of small jitted ones.
    traced_loss, hoisted = jax.closure_convert(loss_of, slice_)
    loss, grads = jax.value_and_grad(traced_loss)(slice_, *hoisted)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
        directions, opt = tx.update(grads, opt, slice_)
    factor = learning_rate(tuning, batch.step, batch.total)
    rates = _by_group(tuning, "rate")
    slice_ = jax.tree.map(lambda p, group, d: p - rates[group] * factor * d, slice_, _groups(slice_), directions)
    return LaneState(slice_, opt), loss


def fresh_slice(tuning_spec: TuningSpec, key: jax.Array, params: Any) -> Slice:
    """A slice before its first step: a backbone of its own as the frozen one, adapters that change nothing."""
    first = init_slice(key, tuning_spec.tuning, tuning_spec.architecture, tuning_spec.classes, tuning_spec.mapping)
    if tuning_spec.start:
        return first._replace(prompt=jnp.array(np.frombuffer(tuning_spec.start, np.float32)))
    if tuning_spec.tuning.method == "lora":
        return first._replace(backbone=init_adapters(key, tuning_spec.own_parameters))
    if tuning_spec.tuning.method == "backbone":
        return first._replace(backbone=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    return first


def device_program(
    spec: TuningSpec, params: Any, images: jax.Array, labels: jax.Array, steps: jax.Array, state: LaneState, work: Batch
):
    """What one device runs: `steps` int32 [] steps, at most T, over its L lanes.

    `state` has the leading axis L, `work` the leading axes [T, L]. Returns the new state, the slices handed over with
    the leading axis W, and the losses float32 [T, L].
    """
    tune = functools.partial(cluster_step, spec, params, images, labels)
    finished = jax.tree.map(lambda leaf: jnp.zeros((spec.slots, *leaf.shape[1:]), leaf.dtype), state.slice)
    losses = jnp.zeros(work.step.shape, jnp.float32)

    def body(t, carry):
        state, finished, losses = carry
        batch = jax.tree.map(lambda leaf: leaf[t], work)
        state, loss = jax.vmap(tune)(state, batch)
        finished = jax.tree.map(lambda out, new: out.at[batch.slot].set(new, mode="drop"), finished, state.slice)
        return state, finished, losses.at[t].set(loss)

    return jax.lax.fori_loop(0, steps, body, (state, finished, losses))


@functools.lru_cache(maxsize=8)
def compiled(tuning_spec: TuningSpec, mesh: Mesh):
    """The jitted program over a mesh; cached, so that every request of a process shares one executable."""
    lanes, work = P(mesh.axis_names[0]), P(None, mesh.axis_names[0])
    program = functools.partial(device_program, tuning_spec)
    return on_each(program, mesh, (P(), P(), P(), P(), lanes, work), (lanes, lanes, work), donated=(4,))


def initial_state(tuning_spec: TuningSpec, mesh: Mesh) -> LaneState:
    """Zeros in the shape of all lanes' states, split over the mesh."""

    def lane_state(params: Any) -> LaneState:
        slice_ = fresh_slice(tuning_spec, jax.random.key(0), params)
        return LaneState(slice_, optimizer(tuning_spec.tuning).init(slice_))

    lanes = mesh.size * tuning_spec.tuning.lanes
    shapes = jax.eval_shape(lane_state, backbone_lib.graph(tuning_spec.architecture)[1])
    zeros = jax.tree.map(lambda leaf: np.zeros((lanes, *leaf.shape), leaf.dtype), shapes)
    return jax.device_put(zeros, NamedSharding(mesh, P(mesh.axis_names[0])))
