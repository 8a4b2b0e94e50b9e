"""The border prompt against a pixel-by-pixel reference; what a recipe's digest depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeraser_jax.config import NOT_IN_RECIPE, Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.hashing import digest
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.training.slices import (
    RecipeConstants,
    border_size,
    init_slice,
    place_prompt,
    recipe,
)

VIT = ViTConfig(image_size=8, patch=4, width=16, depth=1, heads=2, mlp=32, channels=3)
SPEC = ImageSpec(8, 8, 3, size=8, resize=8, out_channels=3)


@pytest.mark.parametrize(("size", "width", "channels"), [(8, 2, 3), (6, 1, 1), (4, 2, 1), (5, 0, 3), (224, 30, 3)])
def test_the_border_has_the_numbers_of_definition_1(size, width, channels):
    n = border_size(size, width, channels)
    assert n == 2 * width * (size + size - 2 * width) * channels
    image = np.asarray(place_prompt(jnp.arange(1.0, n + 1), size, width, channels))
    rows, columns = np.indices((size, size))
    edge = np.minimum(np.minimum(rows, columns), np.minimum(size - 1 - rows, size - 1 - columns)) < width
    assert image.shape == (size, size, channels)
    assert (image[~edge] == 0).all()
    assert sorted(image[edge].ravel().tolist()) == list(range(1, n + 1)), "each number lies on exactly one place"


def test_the_paper_s_prompt_has_69840_numbers():
    assert border_size(224, 30, 3) == 69840


def test_init_depends_on_the_key_alone_and_on_the_scales():
    tuning = Tuning(prompt_width=2, prompt_init=0.5, head_init=0.1)
    a, b, c = (init_slice(jax.random.key(seed), tuning, VIT, 10) for seed in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a[:3], b[:3], strict=True))
    assert (a.prompt != c.prompt).any() and (a.kernel != c.kernel).any()
    assert 0.3 < float(jnp.std(a.prompt)) < 0.7 and 0.05 < float(jnp.std(a.kernel)) < 0.15
    zero = init_slice(jax.random.key(0), Tuning(prompt_width=2), VIT, 10)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(zero))


CONSTANTS = RecipeConstants(Tuning(), backbone="theta", input_spec=SPEC, classes=2, seed=0)
MEMBERS = [("a", "hash-a", 0), ("b", "hash-b", 1)]


def recipe_digest(key="k", members=MEMBERS, **constants) -> str:
    return digest(recipe(key, members, dataclasses.replace(CONSTANTS, **constants)))


def test_the_digest_covers_everything_that_reaches_the_bits():
    changes = [
        {"key": "other"},
        {"members": MEMBERS[:1]},
        {"members": [("a", "hash-a", 1), MEMBERS[1]]},
        {"members": [("a", "pixels", 0), MEMBERS[1]]},
        {"tuning": Tuning(epochs=31)},
        {"tuning": Tuning(lanes=2)},
        {"backbone": "other"},
        {"input_spec": dataclasses.replace(SPEC, augment="flip")},
        {"classes": 3},
        {"seed": 1},
        {"feature_batch": 8},
    ]
    digests = [recipe_digest(), *(recipe_digest(**change) for change in changes)]
    assert len(set(digests)) == 1 + len(changes)


def test_settings_that_never_reach_the_bits_are_not_in_the_digest():
    for name in NOT_IN_RECIPE:
        assert recipe_digest(tuning=dataclasses.replace(Tuning(), **{name: 7})) == recipe_digest()
