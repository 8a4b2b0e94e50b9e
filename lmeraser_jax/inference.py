"""Prediction: route by the un-prompted feature, lay the cluster's prompt on the image, classify.

All slices lie in one stack with a leading cluster axis; a mixed batch gathers prompt and head by cluster.
Shapes are fixed: a ragged last batch is padded, the stack is padded to a power of two.

Shapes: B batch, K clusters (padded), m nearest clusters, D feature, Y classes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax.artifacts import load_clustering, load_slice
from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.clustering import padded, squared_distances
from lmeraser_jax.errors import UserError
from lmeraser_jax.features import compute_dtype, on_device
from lmeraser_jax.images import centred
from lmeraser_jax.run import Run
from lmeraser_jax.slices import Slice, lay_prompt
from lmeraser_jax.tuning import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A published state, ready to predict.

    Attributes:
        run: the workdir it came from.
        keys: K cluster keys that have a slice.
        prototypes: float32 [K padded, D], on the devices.
        present: bool [K padded], on the devices.
        stack: `Slice` with leading axis K padded, on the devices.
        params: the backbone on the devices.
    """

    run: Run
    keys: tuple[str, ...]
    prototypes: jax.Array
    present: jax.Array
    stack: Slice
    params: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """probabilities float32 [N, Y]; clusters int32 [N, m], indices into the model's keys, nearest first."""

    probabilities: np.ndarray
    clusters: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)


def load_model(run: Run) -> Model:
    """The published state of a workdir.

    Raises:
        UserError: nothing is published, or a slice cannot be read.
    """
    manifest = run.catalog.manifest()
    if manifest is None:
        raise UserError(f"{run.layout.root} has no tuned cluster yet; run: lmeraser train --workdir={run.layout.root}")
    if not manifest.entries:
        raise UserError(f"{run.layout.root}: every private record was erased, so there is nothing to predict with")
    clustering = load_clustering(run.layout, manifest.clustering)
    keys = tuple(key for key in clustering.keys if key in manifest.entries)
    chosen = np.isin(clustering.keys, keys)
    prototypes, present = padded(clustering.prototypes[chosen])
    parts = [load_slice(run, manifest.entries[key]) for key in keys]
    parts += [jax.tree.map(np.zeros_like, parts[0])] * (len(present) - len(parts))
    stack = Slice(*(np.stack(leaves) for leaves in zip(*parts, strict=True)))
    params = on_device(run.backbone, compute_dtype(run.config.tuning.dtype, run.mesh), run.mesh)
    everywhere = NamedSharding(run.mesh, P())
    prototypes, present, stack = jax.device_put((prototypes, present, stack), everywhere)
    return Model(run, keys, prototypes, present, stack, params)


def routed_probabilities(problem: Problem, nearest: int, params: Any, stack: Slice, prototypes, present, images):
    """Class probabilities, averaged over the m nearest clusters' prompts and heads.

    Args:
        problem: static settings.
        nearest: m.
        params: backbone.
        stack: slices [K, ...].
        prototypes: float32 [K, D].
        present: bool [K].
        images: uint8 [B, h, w, c].

    Returns:
        (float32 [B, Y], int32 [B, m]).
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
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1), index


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
    nearest = min(run.config.inference.nearest, len(model.keys))
    program = compiled(run.problem, nearest, run.mesh)
    size = run.config.inference.batch * run.mesh.size
    probabilities, clusters = [], []
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        batch = np.zeros((size, *images.shape[1:]), np.uint8)
        batch[: len(piece)] = piece
        found = program(model.params, model.stack, model.prototypes, model.present, batch)
        probabilities.append(np.asarray(found[0])[: len(piece)])
        clusters.append(np.asarray(found[1])[: len(piece)])
    if not probabilities:
        return Predictions(np.zeros((0, len(run.classes)), np.float32), np.zeros((0, nearest), np.int32))
    return Predictions(np.concatenate(probabilities), np.concatenate(clusters))
