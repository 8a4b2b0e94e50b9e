"""A slice: the tuned parameters of one cluster, a border prompt (paper Def. 1) and a classifier head.

Shapes: P prompt width, H W C input image, D feature, Y classes, n = 2P(H + W - 2P)C border numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeraser_jax.backbones.backbone import Architecture
from lmeraser_jax.config import Tuning
from lmeraser_jax.digests import digest
from lmeraser_jax.images import ImageSpec

RECIPE_VERSION = 1  # raise it when the same recipe starts to give other bits
NOT_IN_RECIPE = ("scan_steps", "device_bytes")  # settings that never reach the numbers


class Slice(NamedTuple):
    """prompt float32 [n], kernel float32 [D, Y], bias float32 [Y]; on the device, or NumPy on the host."""

    prompt: Any
    kernel: Any
    bias: Any


def border_size(size: int, width: int, channels: int) -> int:
    """Numbers in a border of the given width around a square image: 2P(H + W - 2P)C."""
    return 2 * width * (2 * size - 2 * width) * channels


def lay_prompt(border: jax.Array, size: int, width: int, channels: int) -> jax.Array:
    """The border on an otherwise zero image: [n] -> [H, W, C]. Order: top, bottom, left, right."""
    inner = size - 2 * width
    cuts = [width * size * channels, 2 * width * size * channels]
    cuts.append(cuts[1] + inner * width * channels)
    top, bottom, left, right = jnp.split(border, cuts)
    middle = [
        left.reshape(inner, width, channels),
        jnp.zeros((inner, inner, channels), border.dtype),
        right.reshape(inner, width, channels),
    ]
    rows = [top.reshape(width, size, channels), jnp.concatenate(middle, axis=1), bottom.reshape(width, size, channels)]
    return jnp.concatenate(rows, axis=0)


def init_slice(key: jax.Array, tuning: Tuning, architecture: Architecture, classes: int) -> Slice:
    """First values of a slice; a function of its key alone, never of its members."""
    key_prompt, key_head = jax.random.split(key)
    n = border_size(architecture.image_size, tuning.prompt_width, architecture.channels)
    prompt, kernel = jnp.zeros((n,)), jnp.zeros((architecture.feature_size, classes))
    if tuning.prompt_init:
        prompt = tuning.prompt_init * jax.random.normal(key_prompt, prompt.shape)
    if tuning.head_init:
        kernel = tuning.head_init * jax.random.normal(key_head, kernel.shape)
    return Slice(prompt, kernel, jnp.zeros((classes,)))


def recipe(
    key: str,
    members: Sequence[tuple[str, str, int]],
    tuning: Tuning,
    backbone: str,
    spec: ImageSpec,
    classes: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that a slice's bits depend on, given the program.

    Args:
        key: cluster key.
        members: (id, content hash, label) of each member, sorted by id.
        tuning: settings; those that never reach the numbers are left out.
        backbone: digest of the frozen backbone.
        spec: image pipeline.
        classes: Y.
        seed: the run's seed.
    """
    numbers = {name: value for name, value in dataclasses.asdict(tuning).items() if name not in NOT_IN_RECIPE}
    return {
        "version": RECIPE_VERSION,
        "cluster": key,
        "members": digest(list(members)),
        "tuning": numbers,
        "backbone": backbone,
        "images": dataclasses.asdict(spec),
        "classes": classes,
        "seed": seed,
    }
