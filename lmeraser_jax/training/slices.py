"""A slice: the tuned parameters of one cluster, a border prompt (paper Def. 1) and a classifier head.

Shapes: P prompt width, H W C input image, D feature, Y classes, n = 2P(H + W - 2P)C border numbers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.errors import raise_all
from lmeraser_jax.hashing import digest
from lmeraser_jax.models.backbone import Architecture, array_problems, from_flat

RECIPE_VERSION = 3  # raise it when the same recipe starts to give other bits
OWN = "backbone/"  # begins the names of a slice's own backbone in a checkpoint
NOT_IN_RECIPE = ("scan_steps", "device_bytes")  # settings that never reach the numbers


class Slice(NamedTuple):
    """prompt float32 [n], kernel float32 [D, Y], bias float32 [Y]; on the device, or NumPy on the host.

    `backbone` are the parameters of a backbone of the slice's own (`tuning.method=backbone`), None elsewhere.
    """

    prompt: Any
    kernel: Any
    bias: Any
    backbone: Any = None


def as_slice(arrays: Mapping[str, np.ndarray], name: str, architecture: Architecture | None = None) -> Slice:
    """The slice of a checkpoint's arrays, on the host.

    Args:
        arrays: whatever a checkpoint holds, by name.
        name: what a message calls the slice.
        architecture: of the slice's own backbone; None where it has none.

    Raises:
        UserError: names every array that is missing, left over or of another dtype or shape.
    """
    wanted = {"prompt": 1, "kernel": 2, "bias": 1}
    own = {field.removeprefix(OWN): leaf for field, leaf in arrays.items() if architecture and field.startswith(OWN)}
    arrays = {field: leaf for field, leaf in arrays.items() if not architecture or not field.startswith(OWN)}
    problems = [f"{field} is missing" for field in wanted if field not in arrays]
    problems += [f"{ascii(field)[:80]} is no part of a slice" for field in arrays if field not in wanted]
    problems += [f"backbone: {line}" for line in array_problems(architecture, own)] if architecture else []
    for field in wanted.keys() & arrays.keys():
        leaf = arrays[field]
        if leaf.dtype != np.float32 or leaf.ndim != wanted[field]:
            what = f"float32 of {wanted[field]} dimensions"
            problems.append(f"{field} must be {what}, is {leaf.dtype} {list(leaf.shape)}")
    if not problems and arrays["kernel"].shape[1:] != arrays["bias"].shape:
        shapes = [list(arrays[field].shape) for field in ("kernel", "bias")]
        problems.append(f"kernel {shapes[0]} and bias {shapes[1]} have different numbers of classes")
    raise_all(sorted(problems), f"slice {name} is damaged:" if problems else "")
    return Slice(**arrays, backbone=from_flat(architecture, own, name) if architecture else None)


def border_size(size: int, width: int, channels: int) -> int:
    """Numbers in a border of the given width around a square image: 2P(H + W - 2P)C."""
    return 2 * width * (2 * size - 2 * width) * channels


def place_prompt(border: jax.Array, size: int, width: int, channels: int) -> jax.Array:
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


def init_slice(
    key: jax.Array,
    tuning: Tuning,
    architecture: Architecture,
    classes: int,
    mapping: Sequence[int] = (),
) -> Slice:
    """First values of a slice; a function of its key alone, never of its members.

    Args:
        key: random key.
        tuning: settings.
        architecture: of the backbone.
        classes: Y.
        mapping: Y features, each the logit of a class; empty: a head of its own.
    """
    key_prompt, key_head = jax.random.split(key)
    n = border_size(architecture.image_size, tuning.active_prompt_width, architecture.channels)
    prompt, kernel = jnp.zeros((n,)), jnp.zeros((architecture.feature_size, classes))
    if tuning.prompt_init:
        prompt = tuning.prompt_init * jax.random.normal(key_prompt, prompt.shape)
    if tuning.head_init:
        kernel = tuning.head_init * jax.random.normal(key_head, kernel.shape)
    if mapping:
        kernel = jnp.zeros_like(kernel).at[np.array(mapping), np.arange(classes)].set(1.0)
    return Slice(prompt, kernel, jnp.zeros((classes,)))


@dataclasses.dataclass(frozen=True)
class RecipeConstants:
    """What the recipes of all slices of a run share.

    Attributes:
        tuning: settings; those that never reach the numbers are left out of the recipe.
        backbone: digest of the frozen backbone.
        image_spec: image pipeline.
        classes: Y.
        seed: the run's seed.
        feature_batch: images per call with which the features were computed that slices are made of; 0: made of images.
    """

    tuning: Tuning
    backbone: str
    image_spec: ImageSpec
    classes: int
    seed: int
    feature_batch: int = 0


def recipe(key: str, members: Sequence[tuple[str, str, int]], constants: RecipeConstants) -> dict[str, Any]:
    """Everything that a slice's bits depend on, given the program.

    Args:
        key: cluster key.
        members: (id, content hash, label) of each member, sorted by id.
        constants: what all recipes of the run share.
    """
    tuning = {name: value for name, value in dataclasses.asdict(constants.tuning).items() if name not in NOT_IN_RECIPE}
    return {
        "version": RECIPE_VERSION,
        "cluster": key,
        "members": digest(list(members)),
        "tuning": tuning,
        "backbone": constants.backbone,
        "images": dataclasses.asdict(constants.image_spec),
        "classes": constants.classes,
        "seed": constants.seed,
        "feature_batch": constants.feature_batch,
    }
