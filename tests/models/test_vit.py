"""The ViT against a NumPy transcription in float64; position embeddings; bit stability of features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from published import VIT, vision_transformer
from transcriptions import TOLERANCE, coefficients, features, gradient, outputs, pictures, relative_error
from transcriptions import vision_transformer as transcription

from lmeraser_jax.config import Backbone
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert
from lmeraser_jax.models.layers import extract_patches
from lmeraser_jax.models.vit import ViTConfig, interpolate_positions
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.features import Extractor
from lmeraser_jax.training.train_step import mesh_of

CLS = dataclasses.replace(VIT, feature="cls", image_size=8)


def params_of(config: ViTConfig, seed: int = 0):
    """The parameters of random published arrays, and the arrays."""
    arrays = vision_transformer(config, seed)
    return convert.parameters(Weights("weights", arrays, ""), Backbone())[1], arrays


@pytest.mark.parametrize(
    "config",
    [
        VIT,
        dataclasses.replace(CLS, gelu="tanh", epsilon=0.3),
        dataclasses.replace(CLS, heads=4, channels=1, patch=2, depth=1),
    ],
    ids=["pooler", "tanh GELU", "four heads, grey"],
)
def test_features_and_logits_match_the_transcription(config):
    params, arrays = params_of(config)
    images = pictures(2, config.image_size, config.channels)
    ours = outputs(config, params, images)
    assert ours["features"].dtype == jnp.float32 and len(ours["states"]) == 1 + config.depth
    expected = np.stack([transcription(arrays, config, image) for image in images])
    assert relative_error(ours["features"], expected) < TOLERANCE
    assert relative_error(ours["logits"], expected @ arrays["head/kernel"] + arrays["head/bias"]) < TOLERANCE


def test_the_image_gradient_is_the_transcriptions_slope():
    """Directional derivatives against central differences in float64."""
    params, arrays = params_of(CLS)
    images = pictures(2, CLS.image_size)
    slopes = np.asarray(gradient(CLS, params, images), np.float64)
    values = coefficients(2, CLS.width)
    for seed in range(2):
        direction = np.random.default_rng(10 + seed).normal(size=images.shape)
        ahead, behind = (
            sum(transcription(arrays, CLS, image) @ row for image, row in zip(images + step, values, strict=True))
            for step in (1e-5 * direction, -1e-5 * direction)
        )
        np.testing.assert_allclose(np.sum(slopes * direction), (ahead - behind) / 2e-5, rtol=1e-3)


def test_every_parameter_matters():
    """Each array reaches the features, but the classifier (not part of them)."""
    params, _ = params_of(CLS)
    images = pictures(1, CLS.image_size)
    base = np.asarray(features(CLS, params, images))
    leaves, structure = jax.tree.flatten(params)
    for i, name in enumerate(flatten(params)):
        changed = jax.tree.unflatten(structure, [*leaves[:i], leaves[i] * np.float32(1.5), *leaves[i + 1 :]])
        moved = np.abs(np.asarray(features(CLS, changed, images)) - base).max()
        assert moved == 0 if name.startswith("head/") else moved > 1e-3, name


def test_patches_are_cut_row_by_row():
    images = np.arange(2 * 6 * 9 * 2, dtype=np.float32).reshape(2, 6, 9, 2)
    patches = np.asarray(extract_patches(jnp.asarray(images), 3))
    for row in range(2):
        for column in range(3):
            expected = images[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(2, -1)
            np.testing.assert_array_equal(patches[:, row, column], expected)


def test_bfloat16_parameters_give_float32_features_close_by():
    params, arrays = params_of(CLS)
    images = pictures(1, CLS.image_size)
    low = features(CLS, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params), images)
    assert low.dtype == jnp.float32
    assert 1e-4 < relative_error(low[0], transcription(arrays, CLS, images[0])) < 0.1


@pytest.mark.parametrize("antialias", [True, False], ids=["antialiased", "plain"])
def test_interpolated_positions_keep_constants_rows_and_columns(antialias):
    positions = np.random.default_rng(0).normal(size=(1, 17, 6)).astype(np.float32)
    np.testing.assert_array_equal(interpolate_positions(positions, 4, antialias), positions)
    for grid in (2, 3, 7):
        resized = interpolate_positions(positions, grid, antialias)
        assert resized.shape == (1, 1 + grid * grid, 6) and resized.dtype == np.float32
        np.testing.assert_array_equal(resized[:, 0], positions[:, 0])
        constant = np.broadcast_to(positions[:, :1], positions.shape)
        expected = np.broadcast_to(positions[:, :1], resized.shape)
        np.testing.assert_allclose(interpolate_positions(constant, grid, antialias), expected, atol=1e-6)
    # A row coordinate stays one: it grows down the new grid, symmetrically, and is equal along each row.
    row = np.repeat(np.linspace(-1, 1, 4), 4)
    whole = np.concatenate([[9.0], row]).reshape(1, 17, 1).astype(np.float32)
    resized = interpolate_positions(whole, 8, antialias)[0, 1:, 0].reshape(8, 8)
    np.testing.assert_allclose(resized, np.broadcast_to(resized[:, :1], (8, 8)), atol=1e-6)
    assert (np.diff(resized[:, 0]) > 0).all()
    np.testing.assert_allclose(resized[:, 0], -resized[::-1, 0], atol=1e-6)
    whole[0, 1:, 0] = row.reshape(4, 4).T.ravel()
    transposed = interpolate_positions(whole, 8, antialias)[0, 1:, 0].reshape(8, 8)
    np.testing.assert_allclose(transposed, resized.T, atol=1e-6)


@pytest.mark.parametrize("grid", [3, 5, 9])
def test_the_antialiased_kernel_is_pillows(grid):
    """Each feature of the position embedding, resized as an image of its own."""
    positions = np.random.default_rng(0).normal(size=(1, 37, 2)).astype(np.float32)
    resized = interpolate_positions(positions, grid)[0, 1:].reshape(grid, grid, 2)
    for i in range(2):
        image = Image.fromarray(np.ascontiguousarray(positions[0, 1:, i].reshape(6, 6)))
        expected = np.asarray(image.resize((grid, grid), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[..., i], expected, atol=1e-5)


def test_a_backbone_has_no_classifier_and_its_digest_covers_the_rest():
    params, _ = params_of(CLS)
    half, other = (0.5,), (0.4,)
    backbone = backbone_lib.make(CLS, params, half, half)
    assert backbone.config.classes == 0 and "head" not in backbone.params
    assert backbone.digest == backbone_lib.make(CLS, params, half, half).digest
    changes = [{"heads": 4}, {"gelu": "tanh"}, {"epsilon": 1e-12}]
    others = [backbone_lib.make(dataclasses.replace(CLS, **change), params, half, half) for change in changes]
    others += [backbone_lib.make(CLS, params, other, half), backbone_lib.make(CLS, params, half, other)]
    others += [backbone_lib.make(CLS, params_of(CLS, seed=1)[0], half, half)]
    assert len({backbone.digest, *(each.digest for each in others)}) == 7


@pytest.mark.parametrize(("devices", "batch"), [(1, 8), (8, 2)])
def test_a_records_feature_has_the_same_bits_in_every_batch(devices, batch):
    params, arrays = params_of(CLS)
    backbone = backbone_lib.make(CLS, params, (0.5,), (0.5,))
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (37, 8, 8, 3)).astype(np.uint8)
    spec = ImageSpec(8, 8, 3, size=8, resize=8, out_channels=3)
    extract = Extractor(backbone, spec, batch, mesh_of(jax.devices()[:devices]), jnp.dtype("float32"))
    together = extract(images)
    expected = transcription(arrays, CLS, (images[3] / 255.0 - 0.5) / 0.5)
    assert relative_error(together[3], expected) < TOLERANCE
    for rows in (rng.permutation(37), rng.permutation(37)[:11], [0], [13], [36]):  # alone means in a padded batch
        np.testing.assert_array_equal(extract(images[rows]), together[rows])
    assert extract(images[:0]).shape == (0, CLS.width)
