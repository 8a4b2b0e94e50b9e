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

from lmeraser_jax.artifacts import load_clustering, load_slice
from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.clustering import Clustering, padded, squared_distances
from lmeraser_jax.errors import UserError
from lmeraser_jax.features import compute_dtype, on_device
from lmeraser_jax.images import centred
from lmeraser_jax.run import Run
from lmeraser_jax.slices import Slice, border_size, lay_prompt
from lmeraser_jax.store.catalog import Manifest
from lmeraser_jax.tuning import Problem

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
    """

    run: Run
    clustering: str
    keys: tuple[str, ...]
    refs: tuple[str, ...]
    prototypes: jax.Array
    present: jax.Array
    stack: Slice
    params: Any

    @property
    def nearest(self) -> int:
        """m: the clusters that an answer is averaged over, at most."""
        return min(self.run.config.inference.nearest, len(self.keys))


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
    held = frozenset(before.refs if before else ())
    for _ in range(ATTEMPTS):
        manifest, quarantined = _published(run)
        try:
            if before is not None and before.clustering == manifest.clustering:
                clustering, keys = None, before.keys
            else:
                clustering = load_clustering(run.layout, manifest.clustering)
                keys = clustering.keys
            refs = tuple("" if key in quarantined else manifest.entries.get(key, "") for key in keys)
            for ref in refs:
                if ref and ref not in held and ref not in read:
                    read[ref] = load_slice(run, ref)
        except UserError:
            if _published(run) == (manifest, quarantined):
                raise  # damaged, not replaced
            continue
        if before is not None and clustering is None:
            return before if refs == before.refs else _replaced(before, refs, read)
        assert clustering is not None
        return _replaced(_rearranged(run, before, clustering), refs, read)
    raise UserError(
        f"{run.layout.root}: the published state was replaced {ATTEMPTS} times while it was read; try again when"
        " fewer erasures are being served"
    )


def _published(run: Run) -> tuple[Manifest, frozenset[str]]:
    """The current manifest and the quarantined clusters, both of one moment."""
    with run.catalog.snapshot():
        manifest, quarantined = run.catalog.manifest(), run.catalog.quarantined()
    root = run.layout.root
    if manifest is None:
        raise UserError(f"{root} has no tuned cluster yet; run: lmeraser train --workdir={root}")
    if not manifest.entries:
        raise UserError(f"{root}: every private record was erased, so there is nothing to predict with")
    if quarantined.issuperset(manifest.entries):
        raise UserError(
            f"{root}: all {len(manifest.entries)} clusters are quarantined by accepted erasures, so there is nothing to"
            f" predict with until they are served; run: lmeraser process --workdir={root}"
        )
    return manifest, quarantined


def _rearranged(run: Run, before: Model | None, clustering: Clustering) -> Model:
    """A model of another clustering: slices that `before` holds, by cluster, and no reference for the others."""
    prototypes, _ = padded(clustering.prototypes)
    source = np.full(len(prototypes), -1, np.int32)
    if before is None:
        tuning, architecture = run.config.tuning, run.backbone.config
        width = border_size(architecture.image_size, tuning.prompt_width, architecture.channels)
        heads = (architecture.feature_size, len(run.classes))
        stack = Slice(*(np.zeros((len(prototypes), *rest), np.float32) for rest in ((width,), heads, heads[1:])))
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
    nothing = Slice(*(np.zeros(leaf.shape[1:], leaf.dtype) for leaf in stack))
    for k, (old, new) in enumerate(zip(model.refs, refs, strict=True)):
        if old != new:
            stack = place(stack, read[new] if new else nothing, k)
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


def routed_probabilities(problem: Problem, nearest: int, params: Any, stack: Slice, prototypes, present, images):
    """Class probabilities, averaged over the prompts and heads of the m nearest clusters that are present.

    Args:
        problem: static settings.
        nearest: m.
        params: backbone.
        stack: slices [K, ...].
        prototypes: float32 [K, D].
        present: bool [K].
        images: uint8 [B, h, w, c].

    Returns:
        (float32 [B, Y], int32 [B, m]; -1 where fewer than m clusters are present).
    """
    architecture, width = problem.architecture, problem.tuning.prompt_width
    pixels = centred(images, problem.spec)  # [B, H, W, C]
    gaps = squared_distances(frozen.features(architecture, params, pixels), prototypes, present)
    index = jax.lax.top_k(-gaps, nearest)[1]  # [B, m]
    lay = functools.partial(lay_prompt, size=architecture.image_size, width=width, channels=architecture.channels)
    prompts = jax.vmap(jax.vmap(lay))(stack.prompt[index])  # [B, m, H, W, C]
    prompted = (pixels[:, None] + prompts).reshape(-1, *pixels.shape[1:])  # [B * m, H, W, C]
    features = frozen.features(architecture, params, prompted).reshape(*index.shape, -1)  # [B, m, D]
    logits = jnp.einsum("bmd,bmdy->bmy", features, stack.kernel[index]) + stack.bias[index]
    chosen = present[index]  # [B, m]
    each = jnp.where(chosen[..., None], jax.nn.softmax(logits, axis=-1), 0.0)
    return each.sum(axis=1) / chosen.sum(axis=1, keepdims=True, dtype=each.dtype), jnp.where(chosen, index, -1)


@functools.lru_cache(maxsize=8)
def compiled(problem: Problem, nearest: int, mesh: Mesh):
    """The jitted prediction program over a mesh."""
    axis = mesh.axis_names[0]
    function = functools.partial(routed_probabilities, problem, nearest)
    specs = (P(), P(), P(), P(), P(axis))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(axis), P(axis)), check_vma=False))


def predict(model: Model, images: np.ndarray) -> Predictions:
    """Predicts images of the stored shape: uint8 [N, h, w, c]."""
    run = model.run
    program = compiled(run.problem, model.nearest, run.mesh)
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
        answers = program(model.params, model.stack, model.prototypes, model.present, batch)
        for all_, part in zip((found.probabilities, found.clusters), answers, strict=True):
            all_[start : start + size] = np.asarray(part)[: len(piece)]
    return found
