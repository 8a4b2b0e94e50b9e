"""Swin against a literal transcription; of ViT too: gradient, what reaches a feature, precision, bits in any batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import SWIN, VIT, Arrays, hugging_face_swin, settings_of, vision_transformer
from transcriptions import TOLERANCE, Swin, coefficients, features, gradient, outputs, pictures, relative_error
from transcriptions import vision_transformer as transcription

from lmeraser_jax.config import Backbone
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert
from lmeraser_jax.models.backbone import Architecture
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.features import Extractor
from lmeraser_jax.training.train_step import mesh_of

# Two stages. At 12 px, its grids of 6 and 3 call for a shift, a merge and padding.
SMALL = dataclasses.replace(SWIN, image_size=12, depths=(3, 2), heads=(2, 1), window=2)


def swin_of(config: SwinConfig, size: int) -> tuple[Any, Arrays]:
    """Parameters for images of a size, from random published arrays, and these arrays without their prefix."""
    arrays = hugging_face_swin(config, prefix="swin.")
    weights = Weights("weights", arrays, "", settings_of(config))
    wanted, params, _ = convert.parameters(weights, Backbone(), size)
    assert wanted == dataclasses.replace(config, image_size=size)
    return params, {name.removeprefix("swin."): array for name, array in arrays.items()}


# SMALL | window == grid in the last stage | padding, a padded shift, an odd grid to merge | grids below the window
SIZES = [pytest.param(SWIN, size, marks=pytest.mark.slow) for size in (32, 36, 16)]


@pytest.mark.parametrize(("config", "size"), [(SMALL, 12), *SIZES], ids=["12 px", "32 px", "36 px", "16 px"])
def test_every_state_of_a_swin_its_feature_and_logits_match_the_transcription(config, size):
    params, arrays = swin_of(config, size)
    images = pictures(2, size)
    ours = jax.device_get(outputs(dataclasses.replace(config, image_size=size), params, images))
    reference = Swin(arrays, config)
    for row, image in enumerate(images):
        states, feature = reference(image)
        for index, (state, expected) in enumerate(zip(ours["states"], states, strict=True)):
            assert relative_error(state[row], expected) < TOLERANCE, index
        assert relative_error(ours["features"][row], feature) < TOLERANCE
        logits = arrays["classifier.weight"] @ feature + arrays["classifier.bias"]
        assert relative_error(ours["logits"][row], logits) < TOLERANCE


class Model(NamedTuple):
    config: Architecture
    params: Any
    reference: Callable[[np.ndarray], np.ndarray]  # feature of an image in float64, by a literal transcription


@pytest.fixture(scope="module", params=["vit", "swin"])
def model(request) -> Model:
    if request.param == "vit":
        config = dataclasses.replace(VIT, feature="cls", image_size=8)
        arrays = vision_transformer(config)
        params = convert.parameters(Weights("weights", arrays, ""), Backbone())[1]
        return Model(config, params, functools.partial(transcription, arrays, config))
    config = dataclasses.replace(SMALL, depths=(2, 1))
    params, arrays = swin_of(config, 12)
    return Model(config, params, lambda image: Swin(arrays, config)(image)[1])


def test_the_image_gradient_is_the_transcriptions_slope(model):
    """A directional derivative against central differences in float64."""
    image = pictures(1, model.config.image_size)
    slopes = np.asarray(gradient(model.config, model.params, image), np.float64)[0]
    direction = np.random.default_rng(3).normal(size=slopes.shape)
    ahead, behind = (model.reference(image[0] + step) for step in (1e-5 * direction, -1e-5 * direction))
    slope = (ahead - behind) @ coefficients(1, model.config.feature_size)[0] / 2e-5
    np.testing.assert_allclose(np.sum(slopes * direction), slope, rtol=1e-3)


def test_every_parameter_matters(model):
    """Each array reaches the features, but the classifier (not part of them)."""
    images = pictures(1, model.config.image_size)
    base = np.asarray(features(model.config, model.params, images))
    leaves, structure = jax.tree.flatten(model.params)
    for i, name in enumerate(flatten(model.params)):
        changed = jax.tree.unflatten(structure, [*leaves[:i], leaves[i] * np.float32(1.5), *leaves[i + 1 :]])
        moved = np.abs(np.asarray(features(model.config, changed, images)) - base).max()
        assert moved == 0 if name.startswith("head/") else moved > 1e-3, name


def test_bfloat16_parameters_give_float32_features_close_by(model):
    image = pictures(1, model.config.image_size)
    low = features(model.config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model.params), image)
    assert low.dtype == jnp.float32
    assert 1e-4 < relative_error(low[0], model.reference(image[0])) < 0.1


def test_a_records_feature_has_the_same_bits_in_every_batch_and_on_every_device(model, rng):
    backbone = backbone_lib.make(model.config, model.params, (0.5,), (0.5,))
    size = model.config.image_size
    images = rng.integers(0, 256, (37, size, size, 3)).astype(np.uint8)
    spec = ImageSpec(size, size, 3, size=size, resize=size, out_channels=3)
    extract, on_two = (Extractor(backbone, spec, 4, mesh_of(jax.devices()[:n]), jnp.dtype("float32")) for n in (1, 2))
    together = extract(images)
    np.testing.assert_array_equal(on_two(images), together)
    assert relative_error(together[3], model.reference((images[3] / 255.0 - 0.5) / 0.5)) < TOLERANCE
    for rows in (rng.permutation(37), rng.permutation(37)[:11], [0], [13], [36]):  # alone means in a padded batch
        np.testing.assert_array_equal(extract(images[rows]), together[rows])
    assert extract(images[:0]).shape == (0, model.config.feature_size)
