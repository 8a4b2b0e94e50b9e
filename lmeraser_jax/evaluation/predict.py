"""Prediction: route by the un-prompted feature, lay the cluster's prompt on the image, classify.

All slices lie in one stack with a leading cluster axis; a mixed batch gathers prompt and head by cluster.
Shapes are fixed: a ragged last batch is padded, the stack is padded to a power of two.

Shapes: B batch, K clusters (padded), m nearest clusters, D feature, Y classes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.data.source import content_hash
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.storage.rows import Manifest, SliceKind
from lmeraser_jax.training.closed_form import expanded
from lmeraser_jax.training.clustering import Clustering, padded, squared_distances
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.slices import Slice, border_size, place_prompt
from lmeraser_jax.training.tune import TuningSpec, features_of
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice
from lmeraser_jax.unlearning.run import Run

ATTEMPTS = 20  # a state read in pieces may be replaced so often in between


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A published state, ready to predict.

    Attributes:
        run: the workdir it came from.
        clustering: digest of the clustering.
        keys: K cluster keys, those of the clustering.
        refs: K slice references; "" where no prediction may use the cluster (quarantined, or without a member).
        prototypes: float32 [K padded, D], on the devices.
        present: bool [K padded], on the devices: clusters with a reference.
        stack: `Slice` with leading axis K padded, on the devices; zeros where there is no reference.
        params: the backbone on the devices.
        common_ref: reference of the common head, "" where none answers: there is none, or it may have seen what an
            accepted erasure that quarantines is about.
        common: that head, on the devices; None where there is none.
    """

    run: Run
    clustering: str
    keys: tuple[str, ...]
    refs: tuple[str, ...]
    prototypes: jax.Array
    present: jax.Array
    stack: Slice
    params: Any
    common_ref: str = ""
    common: Slice | None = None

    @property
    def nearest(self) -> int:
        """m: the clusters that an answer is made of, at most."""
        return min(self.run.config.inference.nearest or len(self.keys), len(self.keys))

    @property
    def question(self) -> "RoutingOptions":
        asked, common = self.run.config.inference, self.run.config.common
        return RoutingOptions(self.nearest, asked.nearest == 0, asked.aggregate, asked.common_weight, common.expand)


@dataclasses.dataclass(frozen=True)
class RoutingOptions:
    """Which clusters are asked, and how their answers become one.

    Attributes:
        nearest: m.
        everyone: m are all clusters, in their own order.
        aggregate: mean of probabilities | vote.
        common: weight of the common head, where there is one.
        expand: random cosines that it is made of, too.
    """

    nearest: int
    everyone: bool
    aggregate: str
    common: float
    expand: int


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Answers for N images.

    Attributes:
        probabilities: float32 [N, Y].
        clusters: int32 [N, m], indices into `keys`, nearest first; -1 where fewer than m clusters may be used.
        keys: the cluster keys of the state that answered.
    """

    probabilities: np.ndarray
    clusters: np.ndarray
    keys: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)


def load_model(run: Run, before: Model | None = None) -> Model:
    """The published state of a workdir without its quarantined clusters; all of one manifest.

    A writer may publish and remove files while they are read; then everything is looked up again.

    Args:
        run: an opened workdir.
        before: a model of the same run to start from: only slices whose reference changed are read. It is
            returned where nothing changed; else its arrays are used up and it cannot predict any more.

    Raises:
        UserError: nothing is published, every cluster is quarantined, a slice cannot be read, or the state changed
            `ATTEMPTS` times while it was read. `before` can still predict then.
    """
    read: dict[str, Slice] = {}  # slices by reference; a further attempt goes on where the last one stopped
    held = frozenset((*before.refs, before.common_ref) if before else ())
    for _ in range(ATTEMPTS):
        manifest, quarantined = _published(run)
        try:
            if before is not None and before.clustering == manifest.clustering:
                clustering, keys = None, before.keys
            else:
                clustering = load_clustering(run.layout, manifest.clustering)
                keys = clustering.keys
            refs = tuple("" if key in quarantined else manifest.entries.get(key, "") for key in keys)
            common = (
                ""
                if quarantined or not run.config.inference.common_weight
                else manifest.entries.get(SliceKind.COMMON, "")
            )
            for ref in (*refs, common):
                if ref and ref not in held and ref not in read:
                    read[ref] = load_slice(run, ref)
        except UserError:
            if _published(run) == (manifest, quarantined):
                raise  # damaged, not replaced
            continue
        if before is not None and clustering is None:
            same = (refs, common) == (before.refs, before.common_ref)
            return before if same else _with_common(_replaced(before, refs, read), common, read)
        assert clustering is not None
        return _with_common(_replaced(_rearranged(run, before, clustering), refs, read), common, read)
    raise UserError(
        f"{run.layout.root}: the published state was replaced {ATTEMPTS} times while it was read; try again when"
        " fewer erasures are being served"
    )


def _with_common(model: Model, ref: str, read: Mapping[str, Slice]) -> Model:
    """The model with a common head that is among `read` or that it has, "" for none."""
    if ref == model.common_ref:
        return model
    head = jax.device_put(read[ref], NamedSharding(model.run.mesh, P())) if ref else None
    return dataclasses.replace(model, common_ref=ref, common=head)


def with_slices(model: Model, refs: Mapping[str, str]) -> Model:
    """The model with other slices of its clusters, {key: reference}, such as earlier epochs; uses up the old one.

    Raises:
        UserError: a slice cannot be read.
    """
    new = tuple(refs.get(key, old) for key, old in zip(model.keys, model.refs, strict=True))
    return _replaced(model, new, {ref: load_slice(model.run, ref) for ref in set(new) - {""}})


def _published(run: Run) -> tuple[Manifest, frozenset[str]]:
    """The current manifest and the quarantined clusters, both of one moment."""
    with run.catalog.snapshot():
        manifest, quarantined = run.catalog.manifest(), run.catalog.quarantined()
    root = run.layout.root
    if manifest is None:
        raise UserError(f"{root} has no tuned cluster yet; run: lmeraser train --workdir={root}")
    if not manifest.clusters:
        raise UserError(f"{root}: every private record was erased, so there is nothing to predict with")
    if quarantined.issuperset(manifest.clusters):
        raise UserError(
            f"{root}: all {len(manifest.clusters)} clusters are quarantined by accepted erasures, so there is nothing"
            f" to predict with until they are served; run: lmeraser process --workdir={root}"
        )
    return manifest, quarantined


def _rearranged(run: Run, before: Model | None, clustering: Clustering) -> Model:
    """A model of another clustering: slices that `before` holds, by cluster, and no reference for the others."""
    prototypes, _ = padded(clustering.prototypes)
    source = np.full(len(prototypes), -1, np.int32)
    if before is None:
        tuning, architecture = run.config.tuning, run.backbone.config
        width = border_size(architecture.image_size, tuning.active_prompt_width, architecture.channels)
        heads = (architecture.feature_size + tuning.expand, len(run.classes))
        shapes = ((width,), heads, heads[1:])
        stack = Slice(*(np.zeros((len(prototypes), *rest), np.float32) for rest in shapes))
        if run.tuning_spec.own_architecture:
            own = backbone_lib.graph(architecture)[1]
            own = jax.tree.map(lambda leaf: np.zeros((len(prototypes), *leaf.shape), np.float32), own)
            stack = stack._replace(backbone=own)
        params, refs = on_device(run.backbone, compute_dtype(tuning.dtype, run.mesh), run.mesh), ("",) * len(source)
    else:
        place = {key: k for k, key in enumerate(before.keys)}
        source[: len(clustering.keys)] = [place.get(key, -1) for key in clustering.keys]
        stack, params = _moved(run.mesh)(before.stack, source), before.params
        refs = tuple(before.refs[k] if k >= 0 else "" for k in source)
    stack, prototypes, present = jax.device_put(
        (stack, prototypes, np.zeros(len(prototypes), bool)), NamedSharding(run.mesh, P())
    )
    keys = clustering.keys
    return Model(run, clustering.digest, keys, refs[: len(keys)], prototypes, present, stack, params)


def _replaced(model: Model, refs: tuple[str, ...], read: Mapping[str, Slice]) -> Model:
    """The model with other references; uses up its stack. Slices that are not among `read` are there already."""
    stack, place = model.stack, _placed(model.run.mesh)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), stack)
    for k, (old, new) in enumerate(zip(model.refs, refs, strict=True)):
        if old != new:
            part = read[new] if new else nothing
            if new and model.run.config.tuning.one_head:
                part = part._replace(prompt=part.prompt[k])
            stack = place(stack, part, k)
    present = np.zeros(len(model.present), bool)
    present[: len(refs)] = [bool(ref) for ref in refs]
    return dataclasses.replace(
        model, refs=refs, stack=stack, present=jax.device_put(present, NamedSharding(model.run.mesh, P()))
    )


@functools.lru_cache(maxsize=8)
def _placed(mesh: Mesh):
    """Compiled `(stack, slice, k) -> stack` with the slice at place k; in place, for any k."""

    def placed(stack: Slice, slice_: Slice, k: jax.Array) -> Slice:
        return jax.tree.map(lambda leaf, part: leaf.at[k].set(part), stack, slice_)

    return jax.jit(placed, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))


@functools.lru_cache(maxsize=8)
def _moved(mesh: Mesh):
    """Compiled `(stack, source int32 [K]) -> stack` of the slices at the given places; zeros for -1."""

    def moved(stack: Slice, source: jax.Array) -> Slice:
        return jax.tree.map(
            lambda leaf: leaf.at[source].get(mode="fill", fill_value=0, wrap_negative_indices=False), stack
        )

    return jax.jit(moved, out_shardings=NamedSharding(mesh, P()))


def routed_probabilities(
    problem: TuningSpec,
    question: RoutingOptions,
    params: Any,
    stack: Slice,
    prototypes,
    present,
    common: Slice | None,
    images,
    draws=None,
):
    """Class probabilities from the prompts and heads of the m nearest clusters that are present (Eq. 4, Fig. 2).

    Args:
        problem: static settings.
        question: static: whom to ask.
        params: backbone.
        stack: slices [K, ...].
        prototypes: float32 [K, D].
        present: bool [K].
        common: the head of all, which joins with a weight; None where there is none.
        images: uint8 [B, h, w, c].
        draws: float32 [B, K], what stands for distances where shards have no place in the feature space; else None.

    Returns:
        (float32 [B, Y], int32 [B, m]; -1 where fewer than m clusters are present).
    """
    pixels = centred(images, problem.spec)  # [B, H, W, C]
    bare = problem.tuning.active_prompt_width == 0 and stack.backbone is None  # then all heads see the same feature
    if question.everyone:
        draws = jnp.zeros((len(pixels), len(present)))
    looked_at = bare or draws is None or common is not None
    plain = backbone_lib.features(problem.architecture, params, pixels) if looked_at else prototypes  # [B, D]
    far = squared_distances(plain, prototypes, present) if draws is None else draws
    gaps = jnp.where(present[None], far, jnp.inf)  # [B, K]
    index = jax.lax.top_k(-gaps, question.nearest)[1]  # [B, m]; of equal ones the first
    if bare:
        seen = expanded(plain, problem.tuning.expand)
        logits = jnp.einsum("bd,bmdy->bmy", seen, stack.kernel[index]) + stack.bias[index]
    elif question.everyone or stack.backbone is not None:
        logits = jnp.take_along_axis(_of_all(problem, params, stack, present, pixels), index[..., None], axis=1)
    else:
        logits = _of_chosen(problem, params, stack, pixels, index)
    chosen = present[index]  # [B, m]
    each = jax.nn.softmax(logits, axis=-1)  # [B, m, Y]
    if question.aggregate == "vote":
        each = jax.nn.one_hot(each.argmax(axis=-1), each.shape[-1], dtype=each.dtype)
    each = jnp.where(chosen[..., None], each, 0.0)
    found = each.sum(axis=1) / chosen.sum(axis=1, keepdims=True, dtype=each.dtype)  # [B, Y]
    if common is not None:
        together = jax.nn.softmax(expanded(plain, question.expand) @ common.kernel + common.bias[None], axis=-1)
        found = (1 - question.common) * found + question.common * together
    return found, jnp.where(chosen, index, -1)


def _of_chosen(problem: TuningSpec, params: Any, stack: Slice, pixels: jax.Array, index: jax.Array) -> jax.Array:
    """Logits [B, m, Y] of the clusters chosen for each image, index int32 [B, m]: one pass of B * m images."""
    architecture, width = problem.architecture, problem.tuning.active_prompt_width
    lay = functools.partial(place_prompt, size=architecture.image_size, width=width, channels=architecture.channels)
    prompts = jax.vmap(jax.vmap(lay))(stack.prompt[index])  # [B, m, H, W, C]
    prompted = (pixels[:, None] + prompts).reshape(-1, *pixels.shape[1:])  # [B * m, H, W, C]
    features = backbone_lib.features(architecture, params, prompted).reshape(*index.shape, -1)  # [B, m, D]
    return jnp.einsum("bmd,bmdy->bmy", features, stack.kernel[index]) + stack.bias[index]


def _of_all(problem: TuningSpec, params: Any, stack: Slice, present: jax.Array, pixels: jax.Array) -> jax.Array:
    """Logits [B, K, Y] of all clusters that are present, one after the other; zeros of the others."""

    def answer(part: Slice) -> jax.Array:
        return features_of(part, problem, params, pixels) @ part.kernel + part.bias[None]

    def nothing(part: Slice) -> jax.Array:
        return jnp.zeros((len(pixels), part.bias.shape[-1]), part.bias.dtype)

    logits = jax.lax.map(lambda one: jax.lax.cond(one[1], answer, nothing, one[0]), (stack, present))  # [K, B, Y]
    return jnp.swapaxes(logits, 0, 1)


@functools.lru_cache(maxsize=8)
def compiled(problem: TuningSpec, question: RoutingOptions, mesh: Mesh):
    """The jitted prediction program over a mesh."""
    axis = mesh.axis_names[0]
    function = functools.partial(routed_probabilities, problem, question)
    specs = (P(), P(), P(), P(), P(), P(axis), P(axis))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(axis), P(axis)), check_vma=False))


def predict(model: Model, images: np.ndarray) -> Predictions:
    """Predicts images of the stored shape: uint8 [N, h, w, c]."""
    run = model.run
    program = compiled(run.tuning_spec, model.question, run.mesh)
    size = run.config.inference.batch * run.mesh.size
    found = Predictions(
        np.zeros((len(images), len(run.classes)), np.float32),
        np.zeros((len(images), model.nearest), np.int32),
        model.keys,
    )
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        batch = np.zeros((size, *images.shape[1:]), np.uint8)
        batch[: len(piece)] = piece
        state = (model.params, model.stack, model.prototypes, model.present, model.common)
        answers = program(*state, batch, _draws(model, batch))
        for all_, part in zip((found.probabilities, found.clusters), answers, strict=True):
            all_[start : start + size] = np.asarray(part)[: len(piece)]
    return found


def _draws(model: Model, images: np.ndarray) -> np.ndarray | None:
    """Where clusters are shards, numbers [B, K] that choose some for an image: a keyed hash of its content."""
    k, seed = model.run.config.clustering, model.run.config.seed
    if k.partition == "adaptive":
        return None
    if len(model.keys) <= model.nearest:
        return np.zeros((len(images), len(model.present)), np.float32)
    rows = [philox(seed, "route", content_hash(image)).random(len(model.present), np.float32) for image in images]
    return np.stack(rows)
