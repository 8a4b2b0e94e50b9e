"""A slice: the tuned parameters of one cluster, a border prompt (paper Def. 1) and a classifier head.

Shapes: P prompt width, H W C input image, D feature, Y classes, n = 2P(H + W - 2P)C border numbers.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.config import NOT_IN_RECIPE, Tuning
from lmeraser_jax.data.text_rows import TextSpec
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.errors import Damaged, UserError, raise_all
from lmeraser_jax.hashing import digest, philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Architecture, Backbone, Params, array_problems, from_flat
from lmeraser_jax.training import slice_arrays
from lmeraser_jax.training.slice_arrays import OWN

RECIPE_VERSION = 4  # raise it when the same recipe starts to give other bits
NOISE_IMAGES, NOISE_BATCH = 512, 64  # of `noise_activation`


class Slice(NamedTuple):
    """prompt float32 [n], kernel float32 [D, Y], bias float32 [Y]; on the device, or NumPy on the host.

    That of a language model has no prompt and no class, so that these three are empty.

    `backbone` are the parameters of the backbone that are the slice's own, in its nested form: all of them
    (`tuning.method=backbone`), or low-rank adapters of its layers (`lora`); None where there are none.
    """

    prompt: Any
    kernel: Any
    bias: Any
    backbone: Any = None


def as_slice(arrays: Mapping[str, np.ndarray], name: str, own_parameters: Params | None = None) -> Slice:
    """The slice of a checkpoint's arrays, on the host; `own_parameters` are as in `TuningSpec`.

    Raises `Damaged` with every array that is missing, left over or of another dtype or shape.
    """
    problems = slice_arrays.array_problems(arrays, own_parameters is not None)
    own = {field.removeprefix(OWN): leaf for field, leaf in arrays.items() if field.startswith(OWN)}
    if own_parameters is not None:
        problems += [f"backbone: {line}" for line in array_problems(own_parameters, own)]
    raise_all(sorted(problems), f"slice {name} is damaged:", kind=Damaged)
    backbone = from_flat(own_parameters, own, name) if own_parameters is not None else None
    return Slice(arrays["prompt"], arrays["kernel"], arrays["bias"], backbone)


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
    key: jax.Array, tuning: Tuning, architecture: Architecture, classes: int, mapping: Sequence[int] = ()
) -> Slice:
    """First values of a slice; a function of its random key alone, never of its members.

    `mapping` are Y features, each the logit of a class, as `noise_activation` chooses them; empty: a head of its own.
    """
    key_prompt, key_head = jax.random.split(key)
    n = border_size(architecture.image_size, tuning.active_prompt_width, architecture.channels)
    prompt = jnp.zeros((n,), jnp.float32)
    kernel = jnp.zeros((architecture.feature_size, classes), jnp.float32)
    if tuning.prompt_init:
        prompt = tuning.prompt_init * jax.random.normal(key_prompt, prompt.shape, jnp.float32)
    if tuning.head_init:
        kernel = tuning.head_init * jax.random.normal(key_head, kernel.shape, jnp.float32)
    if mapping:
        kernel = jnp.zeros_like(kernel).at[np.array(mapping), np.arange(classes)].set(1.0)
    return Slice(prompt, kernel, jnp.zeros((classes,), jnp.float32))


def noise_activation(backbone: Backbone, classes: int) -> tuple[int, ...]:
    """Features that stand for classes where prompts are tuned without a head (DAM-VP, head-missing).

    The Y features with the largest standard deviation over 512 normalised inputs of noise, N(0, 1), in ascending order.
    No label is looked at and nothing is learnt: a prompt has to move the image until the right one is the largest.
    Raises `UserError` where the backbone has fewer features than there are classes.
    """
    config = backbone.config
    if classes > config.feature_size:
        raise UserError(
            f"--config.tuning.method=prompt: {classes} classes need a feature each, the backbone has"
            f" {config.feature_size}; use prompt+head"
        )
    features = jax.jit(functools.partial(backbone_lib.features, config))
    shape = (NOISE_IMAGES, config.image_size, config.image_size, config.channels)
    noise = philox(0, "noise activation").standard_normal(shape, np.float32)
    batches = [noise[start : start + NOISE_BATCH] for start in range(0, NOISE_IMAGES, NOISE_BATCH)]
    values = np.concatenate([features(backbone.params, batch) for batch in batches])
    strongest = np.argsort(-values.std(axis=0), kind="stable")[:classes]
    return tuple(sorted(strongest.tolist()))


@dataclasses.dataclass(frozen=True)
class RecipeConstants:
    """What the recipes of all slices of a run share."""

    tuning: Tuning  # those settings that never reach the numbers are left out of the recipe
    backbone: str  # digest of the frozen backbone
    input_spec: ImageSpec | TextSpec
    classes: int  # Y
    seed: int
    feature_batch: int = 0  # rows per call that computed the features or states that slices are made of; 0: none
    start: str = ""  # digest of the prompt that prompts begin with; empty: they begin fresh


def recipe_settings(tuning: Tuning) -> dict[str, Any]:
    """The settings that reach the numbers."""
    return {name: value for name, value in dataclasses.asdict(tuning).items() if name not in NOT_IN_RECIPE}


def recipe(key: str, members: Sequence[tuple[str, str, int]], constants: RecipeConstants) -> dict[str, Any]:
    """Everything that a slice's bits depend on, given the program.

    `key` is the cluster's; `members` are (id, content hash, label) of each member, sorted by id.
    """
    return {
        "version": RECIPE_VERSION,
        "cluster": key,
        "members": digest(list(members)),
        "tuning": recipe_settings(constants.tuning),
        "start": constants.start,
        "backbone": constants.backbone,
        "text" if isinstance(constants.input_spec, TextSpec) else "images": dataclasses.asdict(constants.input_spec),
        "classes": constants.classes,
        "seed": constants.seed,
        "feature_batch": constants.feature_batch,
    }
