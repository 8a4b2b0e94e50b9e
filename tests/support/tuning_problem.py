"""A small tuning problem for the tests of the tuning program: digits, a random frozen ViT, real jobs."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import small_config
from sklearn.datasets import load_digits

from lmeraser_jax.data.transforms import ImageSpec, centred
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import pretrain
from lmeraser_jax.models.vit import ViT
from lmeraser_jax.training.jobs import Job, batches, make_job
from lmeraser_jax.training.slices import Slice, place_prompt
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.training.tune import Tuned, make_slices

CLASSES = 10
GROUPS = {f"c{i}": np.arange(i * 12, i * 12 + 5 + 3 * i) for i in range(6)}  # {cluster key: rows of its members}


@functools.cache
def small_backbone() -> backbone_lib.Backbone:
    vit = pretrain.architecture(small_config(), channels=1, classes=0)
    params = nnx.to_pure_dict(nnx.split(ViT(vit, nnx.Rngs(0)), nnx.Param)[1])
    return backbone_lib.make(vit, params, 0.5, 0.5)


@functools.cache
def small_data() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [200, 8, 8, 1] and int32 labels [200]."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return images[:200], digits.target[:200].astype(np.int32)


def small_spec(augment: str = "none", seed: int = 0, **tuning: Any) -> TuningSpec:
    """The problem's static settings, with other values of some settings of `tuning`."""
    image_spec = ImageSpec(8, 8, 1, size=8, resize=8, out_channels=1, augment=augment)
    settings = dataclasses.replace(small_config().tuning, **tuning)
    return TuningSpec(small_backbone().config, image_spec, settings, CLASSES, seed)


def tune_jobs(spec: TuningSpec, jobs: Iterable[Job], devices: int = 1) -> list[Tuned]:
    """Everything that the jobs hand over, in order, on the first so many devices."""
    return list(make_slices(spec, small_backbone(), list(jobs), *small_data(), mesh_of(jax.devices()[:devices])))


def tune_groups(spec: TuningSpec, groups: Mapping[str, np.ndarray] = GROUPS, devices: int = 1) -> dict[str, Tuned]:
    """{cluster key: its slice} of clusters given as {key: rows}."""
    jobs = [make_job(key, rows, spec.tuning) for key, rows in groups.items()]
    return {tuned.job.key: tuned for tuned in tune_jobs(spec, jobs, devices)}


def same_bits(a: Slice, b: Slice) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def assert_near(slice_: Slice, expected: tuple[np.ndarray, ...]) -> None:
    """Compares a slice with the prompt, kernel and bias of `reference`."""
    prompt = place_prompt(jnp.asarray(slice_.prompt), len(expected[0]), small_config().tuning.prompt_width, 1)
    for leaf, reference_leaf in zip((prompt, slice_.kernel, slice_.bias), expected, strict=True):
        np.testing.assert_allclose(leaf, reference_leaf, atol=2e-4)


@functools.cache
def reference_gradient(architecture: backbone_lib.Architecture):
    """Gradient of the mean cross-entropy of (prompt [H, W, C], kernel, bias), pixels and labels."""

    def loss(leaves, pixels, labels):
        prompt, kernel, bias = leaves
        features = backbone_lib.features(architecture, small_backbone().params, pixels + prompt[None])
        logits = features @ kernel + bias[None]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(labels)), labels])

    return jax.jit(jax.grad(loss))


def reference(spec: TuningSpec, job: Job) -> list[tuple[np.ndarray, ...]]:
    """A job in a plain loop, float64 where NumPy computes: prompt by slicing, optimizers by hand.

    Returns:
        prompt [H, W, C], kernel and bias after each step.
    """
    t, size, width = spec.tuning, spec.architecture.image_size, spec.tuning.prompt_width
    images, labels = small_data()
    mask = np.ones((size, size, 1), np.float32)
    mask[width : size - width, width : size - width] = 0
    rows, valid = batches(job, spec.seed)
    leaves = [np.zeros((size, size, 1)), np.zeros((spec.architecture.feature_size, CLASSES)), np.zeros(CLASSES)]
    moments = [[np.zeros_like(leaf), np.zeros_like(leaf)] for leaf in leaves]
    warmup, history = math.ceil(t.warmup * job.steps), []
    for step in range(job.steps):
        chosen = rows[step][valid[step]]
        pixels = centred(jnp.asarray(images[chosen]), spec.image_spec)
        low = tuple(np.asarray(leaf, np.float32) for leaf in leaves)
        gradients = reference_gradient(spec.architecture)(low, pixels, labels[chosen])
        gradients = [np.asarray(gradient, np.float64) for gradient in gradients]
        gradients[0] *= mask
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(job.steps - warmup, 1)))
        for i, (rate, decay) in enumerate(((t.prompt_rate, t.prompt_decay), *[(t.head_rate, t.head_decay)] * 2)):
            g, m = gradients[i], moments[i]
            if t.optimizer == "sgd":
                m[0] = t.momentum * m[0] + (g + decay * leaves[i])
                direction = m[0]
            else:
                m[0], m[1] = 0.9 * m[0] + 0.1 * g, 0.999 * m[1] + 0.001 * g * g
                unbiased = m[0] / (1 - 0.9 ** (step + 1)), m[1] / (1 - 0.999 ** (step + 1))
                direction = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay * leaves[i]
            leaves[i] = leaves[i] - rate * factor * direction
        history.append(tuple(leaves))
    return history
