"""The tuning program: one compiled SPMD step tunes a cluster in every lane of every device (Eqs. 5, 6).

`vmap` over lanes inside `jax.shard_map` over devices, a device-side loop over many steps, buffers
donated. A lane re-initialises its slice when a new cluster starts and drops the finished slice into an
output slot, so neither the number of clusters nor of records is part of any shape: training, one
request or a thousand run the same executable. Gradients are taken with respect to the slice only.

Where clusters are tuned in stages (`tuning.slices` > 1) each call also gets the slices to carry on from.
Elsewhere that input is None, which JAX leaves out of the program.

Shapes: G lanes of all devices, L lanes per device, T steps of one call, B images per lane, W output slots.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax import interrupt
from lmeraser_jax.config import Tuning
from lmeraser_jax.data.transforms import ImageSpec, augmented
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Architecture, Backbone
from lmeraser_jax.progress import progress
from lmeraser_jax.training import profiling
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.jobs import Job, StepBatch, step_batches
from lmeraser_jax.training.slices import Slice, init_slice, place_prompt
from lmeraser_jax.training.tracking import Tracker, Tuned


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
    start: Any = None  # int32, place of the slice that step 0 starts from, -1 for a fresh one; None: always fresh


@dataclasses.dataclass(frozen=True)
class TuningSpec:
    """Everything static about a tuning program."""

    architecture: Architecture
    spec: ImageSpec
    tuning: Tuning
    classes: int
    seed: int
    mapping: tuple[int, ...] = ()  # the feature that is each class's logit; empty: heads are tuned
    prompts: int = 0  # K where one slice has a prompt for each cluster; then a label is label + Y * cluster

    @property
    def on_features(self) -> bool:
        """Whether slices are made of features that are computed once, not of images."""
        return self.tuning.closed or self.tuning.method == "head" and self.spec.augment == "none"

    @property
    def own_architecture(self) -> Architecture | None:
        """Of the backbone that every slice has of its own; None where all share the frozen one."""
        return self.architecture if self.tuning.method == "backbone" else None

    @property
    def slots(self) -> int:
        """W: slices that one call can hand over per device. Few where each is as large as a backbone."""
        return max(16 if self.tuning.method != "backbone" else 1, 2 * self.tuning.lanes)

    @property
    def starts(self) -> int:
        """Slices to carry on from that one call can get per device: W, for a job begins in one of the first
        lanes or after an output, while every lane has a slot left. 0: none, and the program lacks the input.
        """
        return self.slots if self.tuning.slices > 1 else 0


def mesh_of(devices: Sequence[Any] | None = None) -> Mesh:
    """1-D mesh over the devices (all of them by default)."""
    return Mesh(np.array(devices or jax.devices()), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


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
    return Slice("prompt", "head", "head", jax.tree.map(lambda _: "backbone", tree.backbone))


def _by_group(tuning: Tuning, what: str) -> dict[str, float]:
    """Rates or decays; of a fixed head none."""
    head = getattr(tuning, f"head_{what}") if tuning.method != "prompt" else 0.0
    backbone = tuning.backbone_rate if what == "rate" else 0.0
    return {"prompt": getattr(tuning, f"prompt_{what}"), "head": head, "backbone": backbone}


def learning_rate(tuning: Tuning, step: jax.Array, total: jax.Array) -> jax.Array:
    """Factor in [0, 1] in the cluster's own progress: linear warm-up, then half a cosine to zero."""
    warmup = jnp.ceil(tuning.warmup * total.astype(jnp.float32))
    at, last = step.astype(jnp.float32), total.astype(jnp.float32)
    rising = (at + 1.0) / jnp.maximum(warmup, 1.0)
    falling = 0.5 * (1.0 + jnp.cos(math.pi * (at - warmup) / jnp.maximum(last - warmup, 1.0)))
    return jnp.where(at < warmup, rising, falling)


def features_of(part: Slice, problem: TuningSpec, params: Any, inputs: jax.Array, which=None) -> jax.Array:
    """Features of a batch as a slice sees it: with its prompt (Def. 1), or its own backbone.

    Args:
        part: the slice.
        problem: static settings.
        params: frozen backbone; its dtype is the compute dtype.
        inputs: float32 [B, H, W, C], normalised images; [B, D] where `problem.on_features`.
        which: int32 [B], the prompt of each image, where the slice has several.

    Returns:
        float32 [B, D].
    """
    if problem.on_features:
        return inputs
    architecture, width = problem.architecture, problem.tuning.active_prompt_width
    if part.backbone is not None:
        params = jax.tree.map(lambda own, given: own.astype(given.dtype), part.backbone, params)
    lay = functools.partial(place_prompt, size=architecture.image_size, width=width, channels=architecture.channels)
    if which is not None:
        inputs = inputs + jax.vmap(lay)(part.prompt[which])
    elif width:
        inputs = inputs + lay(part.prompt)[None]
    return backbone_lib.features(architecture, params, inputs)


def cluster_loss(part: Slice, problem: TuningSpec, params: Any, inputs: jax.Array, labels: jax.Array, valid: jax.Array):
    """Masked mean cross-entropy of one cluster's batch (Eq. 6).

    Args:
        part: the cluster's slice, the only thing that is differentiated.
        problem: static settings.
        params: frozen backbone.
        inputs: as in `features_of`.
        labels: int32 [B].
        valid: bool [B].
    """
    which = None
    if problem.prompts:
        which, labels = labels // problem.classes, labels % problem.classes
    features = features_of(part, problem, params, inputs, which)  # [B, D]
    logits = features @ part.kernel + part.bias[None]  # [B, Y]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    weights = valid.astype(losses.dtype)
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def cluster_step(
    problem: TuningSpec,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    starts: Slice | None,
    state: LaneState,
    batch: Batch,
):
    """One optimizer step of one cluster; starts afresh, or from a given slice, at its step 0.

    Every random number comes from (seed, cluster, step), and the rate from the cluster's own progress.

    Args:
        problem: static settings.
        params: frozen backbone.
        images: uint8 [M, h, w, c], the images on the device; float32 [M, D] where `problem.on_features`.
        labels: int32 [M].
        starts: slices with a leading axis, for `batch.start`; None where that is.
        state: the lane's state.
        batch: the lane's work.

    Returns:
        (new state, loss float32 []).
    """
    tuning = problem.tuning
    tx = optimizer(tuning)
    key = jax.random.key(problem.seed)
    for i in range(2):
        key = jax.random.fold_in(key, batch.words[i])
    key_init, key_augment = jax.random.split(key)
    first = _first(problem, key_init, params)
    if starts is not None:
        first = jax.tree.map(lambda given, new: jnp.where(batch.start < 0, new, given[batch.start]), starts, first)
    fresh = LaneState(first, tx.init(first))
    part, opt = jax.tree.map(lambda new, old: jnp.where(batch.step == 0, new, old), fresh, state)
    inputs = images[batch.rows]
    if not problem.on_features:
        inputs = augmented(inputs, problem.spec, jax.random.fold_in(key_augment, batch.step))
    loss, grads = jax.value_and_grad(cluster_loss)(part, problem, params, inputs, labels[batch.rows], batch.valid)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
        directions, opt = tx.update(grads, opt, part)
    factor = learning_rate(tuning, batch.step, batch.total)
    rates = _by_group(tuning, "rate")
    part = jax.tree.map(lambda p, group, d: p - rates[group] * factor * d, part, _groups(part), directions)
    return LaneState(part, opt), loss


def _first(problem: TuningSpec, key: jax.Array, params: Any) -> Slice:
    """A fresh slice; a backbone of its own begins as the frozen one."""
    first = init_slice(key, problem.tuning, problem.architecture, problem.classes, problem.mapping, problem.prompts)
    if problem.tuning.method != "backbone":
        return first
    return first._replace(backbone=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def device_program(
    problem: TuningSpec,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    steps: jax.Array,
    state: LaneState,
    work: Batch,
    starts: Slice | None = None,
):
    """What one device runs: `steps` steps over its L lanes.

    Args:
        problem: static settings.
        params, images, labels: on every device.
        steps: int32 [], steps to run, at most T.
        state: `LaneState` with leading axis L.
        work: `Batch` with leading axes [T, L].
        starts: slices to carry on from with leading axis `problem.starts`; None where that is 0.

    Returns:
        (state, slices handed over with leading axis W, losses float32 [T, L]).
    """
    tune = functools.partial(cluster_step, problem, params, images, labels, starts)
    finished = jax.tree.map(lambda leaf: jnp.zeros((problem.slots, *leaf.shape[1:]), leaf.dtype), state.slice)
    losses = jnp.zeros(work.step.shape, jnp.float32)

    def body(t, carry):
        state, finished, losses = carry
        batch = jax.tree.map(lambda leaf: leaf[t], work)
        state, loss = jax.vmap(tune)(state, batch)
        finished = jax.tree.map(lambda out, new: out.at[batch.slot].set(new, mode="drop"), finished, state.slice)
        return state, finished, losses.at[t].set(loss)

    return jax.lax.fori_loop(0, steps, body, (state, finished, losses))


@functools.lru_cache(maxsize=8)
def compiled(problem: TuningSpec, mesh: Mesh):
    """The jitted program over a mesh; cached, so that every request of a process shares one executable."""
    lanes, work = P(mesh.axis_names[0]), P(None, mesh.axis_names[0])
    inputs, outputs = (P(), P(), P(), P(), lanes, work, lanes), (lanes, lanes, work)
    program = functools.partial(device_program, problem)
    mapped = jax.shard_map(program, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    # Shardings are said outright: on one device XLA would return the state under another name for the same
    # layout, and the second call would compile again.
    named = functools.partial(jax.tree.map, functools.partial(NamedSharding, mesh))
    return jax.jit(mapped, donate_argnums=4, in_shardings=named(inputs), out_shardings=named(outputs))


def initial_state(problem: TuningSpec, mesh: Mesh) -> LaneState:
    """Zeros in the shape of all lanes' states, split over the mesh."""

    def one(params: Any) -> LaneState:
        part = _first(problem, jax.random.key(0), params)
        return LaneState(part, optimizer(problem.tuning).init(part))

    lanes = mesh.size * problem.tuning.lanes
    shapes = jax.eval_shape(one, backbone_lib.graph(problem.architecture)[1])
    zeros = jax.tree.map(lambda leaf: np.zeros((lanes, *leaf.shape), leaf.dtype), shapes)
    return jax.device_put(zeros, NamedSharding(mesh, P(mesh.axis_names[0])))


def tune(
    problem: TuningSpec, backbone: Backbone, jobs: Sequence[Job], images: np.ndarray, labels: np.ndarray, mesh: Mesh
) -> Iterator[Tuned]:
    """Tunes clusters and yields each as it finishes, and its snapshots as they are made.

    Args:
        problem: static settings.
        backbone: frozen network, `problem.architecture` its architecture.
        jobs: clusters to tune; their rows point into `images`. Only with `tuning.slices` > 1 may they have a start.
        images: uint8 [N, h, w, c], on the host (may be a memory map); float32 [N, D] where `problem.on_features`.
        labels: int32 [N].
        mesh: 1-D mesh.

    Raises:
        Stopped: the process was asked to stop; what its calls have finished was yielded before.
    """
    params = on_device(backbone, compute_dtype(problem.tuning.dtype, mesh), mesh)
    program, state = compiled(problem, mesh), initial_state(problem, mesh)
    data = _Images(problem, images, labels, mesh)
    tracker = Tracker(jobs, mesh.size)
    with progress("tune", sum(job.steps for job in jobs)) as shown, profiling.tracing() as trace:
        waiting = None  # results are fetched one call late, so that the device never waits for the host

        def fetch() -> Iterator[Tuned]:
            if waiting is not None:
                yield from tracker.collect(*waiting, problem.slots)
                shown.advance(int((waiting[0].job >= 0).sum()), f"loss {tracker.last_loss:.3f}")

        for chunk in step_batches(jobs, mesh.size, problem.tuning, problem.slots, problem.seed):
            if interrupt.stop_requested():
                break
            trace.next_call()
            pixels, targets, rows = data.of(chunk)
            starts = _starts(problem, jobs, chunk, state.slice)
            places = None if starts is None else chunk.start
            work = Batch(rows, chunk.valid, chunk.seed_words, chunk.step, chunk.total, chunk.slot, places)
            state, handed, losses = program(params, pixels, targets, np.int32(chunk.steps), state, work, starts)
            yield from fetch()
            waiting = (chunk, handed, losses)
        yield from fetch()
        interrupt.raise_if_stopped()


def _starts(problem: TuningSpec, jobs: Sequence[Job], chunk: StepBatch, like: Slice) -> Slice | None:
    """The slices that a call's jobs carry on from, `problem.starts` for each device; None where that is 0."""
    if not problem.starts:
        assert not any(chunk.starts), "a start needs tuning.slices > 1"
        return None
    size = problem.starts
    stacks = jax.tree.map(lambda leaf: np.zeros((len(chunk.starts) * size, *leaf.shape[1:]), leaf.dtype), like)
    for device, begun in enumerate(chunk.starts):
        assert len(begun) <= size, (len(begun), size)
        for place, index in enumerate(begun, device * size):
            for stack, leaf in zip(jax.tree.leaves(stacks), jax.tree.leaves(jobs[index].start), strict=True):
                assert (leaf.shape, leaf.dtype) == (stack.shape[1:], stack.dtype), "a start of another problem"
                stack[place] = leaf
    return stacks


class _Images:
    """The images a call reads: all of them on the device when they fit, else the call's own."""

    def __init__(self, problem: TuningSpec, images: np.ndarray, labels: np.ndarray, mesh: Mesh):
        self.images, self.labels, self.everywhere = images, labels, NamedSharding(mesh, P())
        self.resident = None
        if bucket(len(images)) * images[0].nbytes <= problem.tuning.device_bytes:
            size = bucket(len(images))
            full, targets = np.zeros((size, *images.shape[1:]), images.dtype), np.zeros(size, np.int32)
            full[: len(images)], targets[: len(images)] = _known(images), labels
            self.resident = jax.device_put((full, targets), self.everywhere)

    def of(self, chunk: StepBatch) -> tuple[Any, Any, np.ndarray]:
        """(images, labels, rows into them) for one call."""
        if self.resident is not None:
            return *self.resident, chunk.rows
        window = chunk.rows.reshape(-1)
        pixels, targets = jax.device_put((_known(self.images[window]), self.labels[window]), self.everywhere)
        return pixels, targets, np.arange(len(window), dtype=np.int32).reshape(chunk.rows.shape)


def _known(values: np.ndarray) -> np.ndarray:
    """Zeros for features that nobody needs and that were not computed; a lane that idles must not read NaN."""
    return np.nan_to_num(values) if values.dtype == np.float32 else values


def bucket(count: int) -> int:
    """A size of at least `count`, at most an eighth above it: data sets of nearly one size share a program."""
    step = max(256, 1 << max(count.bit_length() - 4, 0))
    return -(-max(count, 1) // step) * step
