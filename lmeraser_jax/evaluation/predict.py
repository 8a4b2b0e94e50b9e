"""Prediction: route by the un-prompted feature, place the cluster's prompt on the image, classify (Eq. 4, Fig. 2).

All slices lie in one stack with a leading cluster axis; a mixed batch gathers prompt and head by cluster.
Shapes are fixed: a ragged last batch is padded, the stack is padded to a power of two.

Shapes: N images, B batch, K clusters (padded), m nearest clusters, D feature, Y classes.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.config import Config
from lmeraser_jax.data.decode import decode
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.storage.rows import Manifest, SliceKind
from lmeraser_jax.training.closed_form import expand
from lmeraser_jax.training.clustering import Clustering, padded, squared_distances
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.fingerprint import pinned
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TuningSpec, features_of
from lmeraser_jax.unlearning.artifacts import is_approximate, load_clustering, load_slice, load_slices
from lmeraser_jax.unlearning.binding import refuse_misfits
from lmeraser_jax.unlearning.run import Run

ATTEMPTS = 20  # to read a state that writers replace meanwhile


class ModelArrays(NamedTuple):
    """A published state on the devices."""

    params: Any  # the frozen backbone
    stack: Slice  # with leading axis K, zeros where there is no slice
    prototypes: jax.Array  # float32 [K, D]
    present: jax.Array  # bool [K]
    common: Slice | None  # the common head, None where there is none


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A published state, ready to predict.

    The reference of a slice is "" where no prediction may use it: a cluster is quarantined or has no member, or the
    common head may have seen a record that an accepted erasure with quarantine names.
    """

    run: Run  # the workdir it came from
    version: int  # of the manifest
    clustering: str  # digest
    keys: tuple[str, ...]  # the cluster keys, those of the clustering
    refs: tuple[str, ...]  # slice reference of each cluster
    common_ref: str  # reference of the common head; "" also where there is none
    arrays: ModelArrays

    @property
    def approximate(self) -> frozenset[str]:
        """Keys of the clusters that answer with an approximate slice."""
        return frozenset(key for key, ref in zip(self.keys, self.refs, strict=True) if is_approximate(ref))

    @property
    def nearest(self) -> int:
        """m: how many clusters answer."""
        return min(self.run.config.inference.nearest or len(self.keys), len(self.keys))


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Answers for N images."""

    probabilities: np.ndarray  # float32 [N, Y]; NaN for an image that could not be read
    clusters: np.ndarray  # int32 [N, m], indices into `keys`, nearest first; -1 where fewer than m may be used
    keys: tuple[str, ...]  # the cluster keys of the state that answered
    approximate: frozenset[str] = frozenset()  # keys of clusters that answered with an approximate slice
    unreadable: Mapping[int, str] = dataclasses.field(default_factory=dict)  # {position of a file: why}

    @property
    def labels(self) -> np.ndarray:
        """int [N]; -1 for an image that could not be read."""
        return np.where(np.isnan(self.probabilities[:, 0]), -1, self.probabilities.argmax(axis=1))


def load_model(run: Run, before: Model | None = None) -> Model:
    """The published state of a workdir without its quarantined clusters; all of one manifest.

    A writer may publish and purge files while they are read; then everything is looked up again. Of `before`, an
    earlier model of the same run, only slices whose reference changed are read. It is returned where nothing changed;
    else its arrays are used up and it cannot predict any more.

    Raises `UserError`, after which `before` can still predict: nothing is published, every cluster is quarantined, a
    slice cannot be read, or the state changed `ATTEMPTS` times while it was read.
    """
    held = {*before.refs, before.common_ref} if before else set()
    slices: dict[str, Slice] = {}  # by reference; a further attempt goes on where the last one stopped
    for _ in range(ATTEMPTS):
        manifest, quarantined = _published(run)
        try:
            clustering = load_clustering(run.layout, manifest.clustering)
            refs = tuple("" if key in quarantined else manifest.entries.get(key, "") for key in clustering.keys)
            common_ref = ""
            if run.config.inference.common_weight and not quarantined:
                common_ref = manifest.entries.get(SliceKind.COMMON, "")
            refuse_misfits(run.catalog, run.config.tuning, refs)
            for ref, slice_ in load_slices(run, manifest, {*refs, common_ref} - {"", *held, *slices}):
                slices[ref] = slice_
        except UserError:
            if _published(run) == (manifest, quarantined):
                raise  # damaged, not replaced
            continue
        if before is None:
            before = _loaded(run, clustering, refs, slices)
        elif before.clustering != clustering.digest:
            before = _rearranged(before, clustering)
        elif (refs, common_ref, manifest.version) == (before.refs, before.common_ref, before.version):
            return before
        return dataclasses.replace(_with_slices(before, refs, common_ref, slices), version=manifest.version)
    raise UserError(
        f"{run.layout.root}: the published state was replaced {ATTEMPTS} times while it was read; try again when"
        " fewer erasures are being served"
    )


def with_slices(model: Model, refs: Mapping[str, str]) -> Model:
    """The model with other slices of its clusters, {key: reference}, such as earlier epochs; uses up the old one."""
    replaced = tuple(refs.get(key, ref) for key, ref in zip(model.keys, model.refs, strict=True))
    slices = {ref: load_slice(model.run, ref) for ref in set(replaced) - {"", *model.refs}}
    return _with_slices(model, replaced, model.common_ref, slices)


def _published(run: Run) -> tuple[Manifest, frozenset[str]]:
    """The current manifest and the quarantined clusters, both of one moment."""
    with run.catalog.snapshot():
        manifest, quarantined = run.catalog.manifest(), run.catalog.quarantined()
    root = run.layout.root
    if manifest is None:
        raise UserError(f"{root} has no tuned cluster yet; run: lmeraser train {run.layout.flag}")
    if not manifest.clusters:
        raise UserError(f"{root}: every private record was erased, so there is nothing to predict with")
    if quarantined.issuperset(manifest.clusters):
        raise UserError(
            f"{root}: all {len(manifest.clusters)} clusters are quarantined by accepted erasures, so there is nothing"
            f" to predict with until they are served; run: lmeraser process {run.layout.flag}"
        )
    return manifest, quarantined


def _loaded(run: Run, clustering: Clustering, refs: tuple[str, ...], slices: Mapping[str, Slice]) -> Model:
    """A first model with these slices, stacked on the host: to place them one by one takes longer. No common head."""
    prototypes, _ = padded(clustering.prototypes)
    like = next(slices[ref] for ref in refs if ref)
    stack = jax.tree.map(lambda leaf: np.zeros((len(prototypes), *leaf.shape), leaf.dtype), like)
    for k, ref in enumerate(refs):
        if ref:
            jax.tree.map(lambda leaf, new, k=k: operator.setitem(leaf, k, new), stack, slices[ref])
    state = jax.device_put((stack, prototypes, np.zeros(len(prototypes), bool)), _on_all(run.mesh))
    params = on_device(run.backbone, compute_dtype(run.config.tuning.dtype, run.mesh), run.mesh)
    arrays = ModelArrays(params, *state, common=None)
    return Model(run, 0, clustering.digest, clustering.keys, refs, "", arrays)


def _rearranged(before: Model, clustering: Clustering) -> Model:
    """The model for another clustering: slices of clusters that are in both move to their new places."""
    places = {key: place for place, key in enumerate(before.keys)}
    prototypes, _ = padded(clustering.prototypes)
    source = np.full(len(prototypes), -1, np.int32)
    source[: len(clustering.keys)] = [places.get(key, -1) for key in clustering.keys]

    def moved(leaf: jax.Array) -> jax.Array:  # zeros for -1
        return leaf.at[source].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    stack, prototypes = jax.tree.map(moved, before.arrays.stack), jax.device_put(prototypes, _on_all(before.run.mesh))
    arrays = before.arrays._replace(stack=stack, prototypes=prototypes)
    refs = tuple(before.refs[places[key]] if key in places else "" for key in clustering.keys)
    return dataclasses.replace(before, clustering=clustering.digest, keys=clustering.keys, refs=refs, arrays=arrays)


def _with_slices(model: Model, refs: tuple[str, ...], common_ref: str, slices: Mapping[str, Slice]) -> Model:
    """The model with other references; uses up its stack. `slices` has those that the model does not hold."""
    arrays, mesh = model.arrays, model.run.mesh
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), arrays.stack)
    stack, place = arrays.stack, _place_program(mesh)
    for k, (old, new) in enumerate(zip(model.refs, refs, strict=True)):
        if new != old:
            stack = place(stack, slices[new] if new else empty, k)
    present = np.zeros(len(arrays.prototypes), bool)
    present[: len(refs)] = [bool(ref) for ref in refs]
    common = arrays.common
    if common_ref != model.common_ref:
        # Copied: on a CPU the device would use a memory-mapped file as it is, and hold it beyond an erasure.
        common = jax.device_put(jax.tree.map(np.array, slices[common_ref]), _on_all(mesh)) if common_ref else None
    arrays = arrays._replace(stack=stack, present=jax.device_put(present, _on_all(mesh)), common=common)
    return dataclasses.replace(model, refs=refs, common_ref=common_ref, arrays=arrays)


def _on_all(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


@functools.lru_cache(maxsize=8)
def _place_program(mesh: Mesh):
    """Compiled `(stack, slice, k) -> stack` with the slice at place k; in place, for any k."""

    def placed(stack: Slice, slice_: Slice, k: jax.Array) -> Slice:
        return jax.tree.map(lambda leaf, new: leaf.at[k].set(new), stack, slice_)

    return jax.jit(placed, donate_argnums=0, out_shardings=_on_all(mesh))


def routed_probabilities(
    tuning_spec: TuningSpec,
    config: Config,
    nearest: int,
    arrays: ModelArrays,
    images: jax.Array,
    draws: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Class probabilities from the slices of the m nearest clusters that are present (Eq. 4, Fig. 2).

    Args:
        nearest: m.
        images: uint8 [B, h, w, c].
        draws: float32 [B, K], used in place of distances where shards have no place in the feature space; else None.

    Returns (float32 [B, Y], int32 [B, m]; -1 where fewer than m clusters are present).
    """
    all_clusters = config.inference.nearest == 0  # in their own order
    pixels = centred(images, tuning_spec.image_spec)  # [B, H, W, C]

    @functools.cache
    def bare_feature() -> jax.Array:  # [B, D] without a prompt; computed where it is needed, and once
        return backbone_lib.features(tuning_spec.architecture, arrays.params, pixels)

    if all_clusters:
        distances = jnp.zeros((len(pixels), len(arrays.present)))
    elif draws is not None:
        distances = draws
    else:
        distances = squared_distances(bare_feature(), arrays.prototypes, arrays.present)
    distances = jnp.where(arrays.present[None], distances, jnp.inf)  # [B, K]
    index = jax.lax.top_k(-distances, nearest)[1]  # [B, m]; of equal ones the first
    chosen = arrays.present[index]  # [B, m]
    weight, common = config.inference.common_weight, None
    if arrays.common is not None:
        feature = expand(bare_feature(), config.common.expand)
        common = jax.nn.softmax(feature @ arrays.common.kernel + arrays.common.bias[None], axis=-1)
        if weight == 1:  # it answers alone: no image passes through a slice
            return common, jnp.where(chosen, index, -1)
    if tuning_spec.tuning.shares_feature:
        feature = expand(bare_feature(), tuning_spec.tuning.expand)
        logits = jnp.einsum("bd,bmdy->bmy", feature, arrays.stack.kernel[index]) + arrays.stack.bias[index]
    elif all_clusters or tuning_spec.tuning.method == "backbone":
        logits = jnp.take_along_axis(_logits_of_all(tuning_spec, arrays, pixels), index[..., None], axis=1)
    else:
        logits = _logits_of_chosen(tuning_spec, arrays, pixels, index)
    probabilities = jax.nn.softmax(logits, axis=-1)  # [B, m, Y]
    if config.inference.aggregate == "vote":
        probabilities = jax.nn.one_hot(probabilities.argmax(axis=-1), logits.shape[-1], dtype=logits.dtype)
    probabilities = jnp.where(chosen[..., None], probabilities, 0.0).sum(axis=1)
    probabilities /= chosen.sum(axis=1, keepdims=True, dtype=logits.dtype)  # [B, Y]
    if common is not None:
        probabilities = (1 - weight) * probabilities + weight * common
    return probabilities, jnp.where(chosen, index, -1)


def _logits_of_chosen(tuning_spec: TuningSpec, arrays: ModelArrays, pixels: jax.Array, index: jax.Array) -> jax.Array:
    """Logits [B, m, Y] of the clusters chosen for each image, index int32 [B, m]: one pass of B * m images."""

    def answer(slice_: Slice, image: jax.Array) -> jax.Array:
        return _logits(slice_, tuning_spec, arrays.params, image[None])[0]

    chosen = jax.tree.map(lambda leaf: leaf[index], arrays.stack)  # [B, m, ...]
    return jax.vmap(jax.vmap(answer, (0, None)))(chosen, pixels)


def _logits_of_all(tuning_spec: TuningSpec, arrays: ModelArrays, pixels: jax.Array) -> jax.Array:
    """Logits [B, K, Y] of all clusters that are present, one after the other; zeros of the others."""

    def answer(slice_: Slice) -> jax.Array:
        return _logits(slice_, tuning_spec, arrays.params, pixels)

    def zeros(slice_: Slice) -> jax.Array:
        return jnp.zeros((len(pixels), slice_.bias.shape[-1]), slice_.bias.dtype)

    def answer_if_present(cluster: tuple[Slice, jax.Array]) -> jax.Array:
        return jax.lax.cond(cluster[1], answer, zeros, cluster[0])

    return jnp.swapaxes(jax.lax.map(answer_if_present, (arrays.stack, arrays.present)), 0, 1)


def _logits(slice_: Slice, tuning_spec: TuningSpec, params: Any, pixels: jax.Array) -> jax.Array:
    """Logits [B, Y] of one slice."""
    return features_of(slice_, tuning_spec, params, pixels) @ slice_.kernel + slice_.bias[None]


@functools.lru_cache(maxsize=8)
def compiled(tuning_spec: TuningSpec, config: Config, nearest: int, mesh: Mesh):
    """The jitted prediction program over a mesh: `(arrays, images, draws) -> (probabilities, clusters)`."""
    batch = P(mesh.axis_names[0])
    function = functools.partial(routed_probabilities, tuning_spec, config, nearest)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), batch, batch), out_specs=(batch, batch), check_vma=False)
    return jax.jit(mapped)


def predict(model: Model, images: np.ndarray) -> Predictions:
    """Predicts images of the stored shape: uint8 [N, h, w, c]."""
    run = model.run
    program = compiled(run.tuning_spec, run.config, model.nearest, run.mesh)
    size = run.config.inference.batch * run.mesh.size
    probabilities = np.zeros((len(images), len(run.classes)), np.float32)
    clusters = np.zeros((len(images), model.nearest), np.int32)
    for start in range(0, len(images), size):
        rows = slice(start, min(start + size, len(images)))
        batch = np.zeros((size, *images.shape[1:]), np.uint8)
        batch[: rows.stop - start] = images[rows]
        with pinned():  # also in another thread than the one that opened the run
            answers = program(model.arrays, batch, draws(model, batch))
        probabilities[rows], clusters[rows] = (np.asarray(answer)[: rows.stop - start] for answer in answers)
    return Predictions(probabilities, clusters, model.keys, model.approximate)


def predict_files(run: Run, files: Sequence[Path], answer: Callable[[np.ndarray], Predictions]) -> Predictions:
    """Predicts image files, brought to the stored shape as an import does; those that cannot be read have no answer."""
    spec = run.image_spec
    pixels = decode(files, spec.height, spec.width, spec.channels, run.config.data.max_pixels)
    answers, lost = answer(pixels.rows), list(pixels.unreadable)
    answers.probabilities[lost], answers.clusters[lost] = np.nan, -1
    return dataclasses.replace(answers, unreadable=pixels.unreadable)


def draws(model: Model, images: np.ndarray) -> np.ndarray | None:
    """Where clusters are shards: numbers [B, K] that choose m of them by a keyed hash of an image's content."""
    config, count = model.run.config, len(model.arrays.present)
    if config.clustering.has_prototypes:
        return None
    if len(model.keys) <= model.nearest:
        return np.zeros((len(images), count), np.float32)
    streams = (philox(config.seed, "route", content_hash(image)) for image in images)
    return np.stack([stream.random(count, np.float32) for stream in streams])
