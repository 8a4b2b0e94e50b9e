"""A small tuning problem for the tests of the tuning program: digits, a random frozen ViT, real jobs."""

import dataclasses
import functools
import math
from collections.abc import Iterable

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
from lmeraser_jax.training.slices import place_prompt
from lmeraser_jax.training.train_step import TuningSpec, mesh_of
from lmeraser_jax.training.tune import Tuned, tune

CLASSES = 10
GROUPS = {f"c{i}": np.arange(i * 12, i * 12 + 5 + 3 * i) for i in range(6)}


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


def problem_of(backbone: backbone_lib.Backbone, **changes) -> TuningSpec:
    """The problem with other settings of `tuning`, or another `augment`."""
    spec = ImageSpec(8, 8, 1, size=8, resize=8, out_channels=1, augment=changes.pop("augment", "none"))
    settings = dataclasses.replace(small_config().tuning, **changes)
    return TuningSpec(backbone.config, spec, settings, CLASSES, seed=0)


def run_jobs(problem: TuningSpec, jobs: Iterable[Job], devices: int = 1) -> list[Tuned]:
    """Everything that the jobs hand over, in order, on the first so many devices."""
    mesh = mesh_of(jax.devices()[:devices])
    return list(tune(problem, small_backbone(), list(jobs), *small_data(), mesh))


def run(problem, backbone, data, groups, devices=1):
    """{key: Tuned} of the clusters given as {key: rows}."""
    jobs = [make_job(key, np.asarray(rows), problem.tuning) for key, rows in groups.items()]
    return {done.job.key: done for done in tune(problem, backbone, jobs, *data, mesh_of(jax.devices()[:devices]))}


def same_bits(a: Tuned, b: Tuned) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a.slice, b.slice)), strict=True))


def assert_near(part, wanted):
    """A slice against the prompt, kernel and bias of `reference`."""
    laid = place_prompt(jnp.asarray(part.prompt), len(wanted[0]), small_config().tuning.prompt_width, 1)
    np.testing.assert_allclose(laid, wanted[0], atol=2e-4)
    for found, leaf in zip(part[1:3], wanted[1:3], strict=True):
        np.testing.assert_allclose(found, leaf, atol=2e-4)


def reference(problem, backbone, data, job, stop=None):
    """A job in a plain loop, float64 where NumPy computes: prompt by slicing, optimizers by hand.

    Returns:
        prompt [H, W, C], kernel and bias after `stop` steps; all steps by default.
    """
    t, size, width = problem.tuning, problem.architecture.image_size, problem.tuning.prompt_width
    mask = np.ones((size, size, 1), np.float32)
    mask[width : size - width, width : size - width] = 0
    images, labels = data
    orders, valid = batches(job, problem.seed)
    prompt, kernel = np.zeros((size, size, 1)), np.zeros((problem.architecture.feature_size, CLASSES))
    bias = np.zeros(CLASSES)
    if job.start is not None:
        prompt = np.asarray(place_prompt(jnp.asarray(job.start.prompt), size, width, 1), np.float64)
        kernel, bias = (np.asarray(leaf, np.float64) for leaf in job.start[1:3])
    state = [[np.zeros_like(p), np.zeros_like(p)] for p in (prompt, kernel, bias)]

    def loss(parts, pixels, targets):
        features = backbone_lib.features(problem.architecture, backbone.params, pixels + (parts[0] * mask)[None])
        logits = features @ parts[1] + parts[2][None]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(targets)), targets])

    gradient = jax.jit(jax.grad(loss))
    warmup = math.ceil(t.warmup * job.steps)
    for step in range(stop or job.steps):
        chosen = orders[step][valid[step]]
        pixels = centred(jnp.asarray(images[chosen]), problem.image_spec)
        parts = tuple(np.asarray(p, np.float32) for p in (prompt, kernel, bias))
        grads = [np.asarray(g, np.float64) for g in gradient(parts, pixels, labels[chosen])]
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(job.steps - warmup, 1)))
        new = []
        for p, g, s, group in zip((prompt, kernel, bias), grads, state, ("prompt", "head", "head"), strict=True):
            rate, decay = getattr(t, f"{group}_rate"), getattr(t, f"{group}_decay")
            if t.optimizer == "sgd":
                s[0] = t.momentum * s[0] + (g + decay * p)
                direction = s[0]
            else:
                s[0], s[1] = 0.9 * s[0] + 0.1 * g, 0.999 * s[1] + 0.001 * g * g
                scale = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                direction = scale * s[0] / (np.sqrt(s[1]) + 1e-8 * math.sqrt(1 - 0.999 ** (step + 1))) + decay * p
            new.append(p - rate * factor * direction)
        prompt, kernel, bias = new
    return prompt * mask, kernel, bias
