"""Swin against a transcription with explicit windows and pairs, through the path that published weights take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import SWIN, hugging_face_swin, settings_of
from transcriptions import TOLERANCE, Swin, coefficients, features, gradient, outputs, pictures, relative_error

from lmeraser_jax.config import Backbone
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, swin
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.features import Extractor
from lmeraser_jax.training.train_step import mesh_of

# Two stages of odd and even depth. At 12 px, its grids of 6 and 3 call for a shift, a merge and padding.
SMALL = dataclasses.replace(SWIN, image_size=12, depths=(3, 2), heads=(2, 1), window=2, classes=5)
TINY = dataclasses.replace(SMALL, depths=(2,), heads=(2,), classes=0)


def params_of(config: SwinConfig, size: int = 0):
    """Parameters of random published arrays, and the arrays without their prefix."""
    arrays = hugging_face_swin(config, prefix="swin." if config.classes else "")
    weights = Weights("weights", arrays, "", settings_of(config))
    wanted, params, _ = convert.parameters(weights, Backbone(), size)
    assert wanted == dataclasses.replace(config, image_size=size or config.image_size)
    return params, {name.removeprefix("swin."): array for name, array in arrays.items()}


def assert_transcribed(config: SwinConfig, size: int, count: int) -> None:
    """Every hidden state, the feature and the logits."""
    params, arrays = params_of(config, size)
    images = pictures(count, size)
    ours = jax.device_get(outputs(dataclasses.replace(config, image_size=size), params, images))
    reference = Swin(arrays, config)
    for row, image in enumerate(images):
        states, feature = reference(image)
        for index, (state, expected) in enumerate(zip(ours["states"], states, strict=True)):
            assert relative_error(state[row], expected) < TOLERANCE, index
        assert relative_error(ours["features"][row], feature) < TOLERANCE
        logits = arrays["classifier.weight"] @ feature + arrays["classifier.bias"]
        assert relative_error(ours["logits"][row], logits) < TOLERANCE


def test_states_features_and_logits_match_the_transcription():
    assert_transcribed(SMALL, 12, count=2)


# window == grid in the last stage | padding, a padded shift, an odd grid to merge | grids below the window
@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 36, 16])
def test_three_stages_match_the_transcription(size):
    assert_transcribed(SWIN, size, count=2)


def test_the_image_gradient_is_the_transcriptions_slope():
    """A directional derivative against central differences in float64."""
    params, arrays = params_of(TINY)
    image = pictures(1, TINY.image_size)
    slopes = np.asarray(gradient(TINY, params, image), np.float64)[0]
    direction = np.random.default_rng(3).normal(size=slopes.shape)
    ahead, behind = (Swin(arrays, TINY)(image[0] + step)[1] for step in (1e-5 * direction, -1e-5 * direction))
    slope = (ahead - behind) @ coefficients(1, TINY.feature_size)[0] / 2e-5
    np.testing.assert_allclose(np.sum(slopes * direction), slope, rtol=1e-3)


def test_every_parameter_matters():
    params, _ = params_of(SMALL)
    images = pictures(1, SMALL.image_size)
    base = np.asarray(features(SMALL, params, images))
    leaves, structure = jax.tree.flatten(params)
    for i, name in enumerate(flatten(params)):
        changed = jax.tree.unflatten(structure, [*leaves[:i], leaves[i] * np.float32(1.5), *leaves[i + 1 :]])
        moved = np.abs(np.asarray(features(SMALL, changed, images)) - base).max()
        assert moved == 0 if name.startswith("head/") else moved > 1e-3, name


def test_bfloat16_parameters_give_float32_features_close_by():
    params, arrays = params_of(TINY)
    image = pictures(1, TINY.image_size)
    low = features(TINY, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params), image)
    assert low.dtype == jnp.float32
    assert 1e-4 < relative_error(low[0], Swin(arrays, TINY)(image[0])[1]) < 0.1


def test_a_records_feature_has_the_same_bits_in_every_batch():
    backbone = backbone_lib.make(TINY, params_of(TINY)[0], (0.5,), (0.5,))
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (21, 12, 12, 3)).astype(np.uint8)
    spec = ImageSpec(12, 12, 3, size=12, resize=12, out_channels=3)
    extract = Extractor(backbone, spec, 2, mesh_of(jax.devices()), jnp.dtype("float32"))
    together = extract(images)
    for rows in (rng.permutation(21), [13], [20, 0, 5]):
        np.testing.assert_array_equal(extract(images[rows]), together[rows])


def test_the_mask_separates_what_only_the_shift_brought_together():
    """A grid of 4 with windows of 2, shifted by 1: the last row and column come from the other side."""
    mask = swin.shift_mask(4, 4, 2, 1)
    assert mask.shape == (4, 4, 4) and mask.dtype == np.float32
    assert not mask[0].any()
    np.testing.assert_array_equal(mask[1] == 0, np.equal.outer([0, 1, 0, 1], [0, 1, 0, 1]))
    np.testing.assert_array_equal(mask[2] == 0, np.equal.outer([0, 0, 1, 1], [0, 0, 1, 1]))
    np.testing.assert_array_equal(mask[3] == 0, np.eye(4, dtype=bool))
    assert set(np.unique(mask)) == {0.0, swin.OUTSIDE}
