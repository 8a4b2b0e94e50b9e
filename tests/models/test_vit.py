"""The ViT against a NumPy transcription in float64; position embeddings; what a backbone's digest covers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from published import SWIN, VIT, vision_transformer
from transcriptions import TOLERANCE, outputs, pictures, relative_error
from transcriptions import vision_transformer as transcription

from lmeraser_jax.config import Backbone
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert
from lmeraser_jax.models.architectures import describe
from lmeraser_jax.models.layers import MLP, LayerNorm
from lmeraser_jax.models.vit import ViTConfig, interpolate_positions
from lmeraser_jax.models.weight_files import Weights

CLS = dataclasses.replace(VIT, feature="cls", image_size=8)


def params_of(config: ViTConfig, seed: int = 0):
    """The parameters of random published arrays, and the arrays."""
    arrays = vision_transformer(config, seed)
    return convert.parameters(Weights("weights", arrays, ""), Backbone())[1], arrays


TANH = dataclasses.replace(CLS, gelu="tanh", epsilon=0.3)
GREY = dataclasses.replace(CLS, heads=4, channels=1, patch=2, depth=1)


@pytest.mark.parametrize("config", [VIT, TANH, GREY], ids=["pooler", "tanh GELU", "four heads, grey"])
def test_features_and_logits_match_the_transcription(config):
    params, arrays = params_of(config)
    images = pictures(2, config.image_size, config.channels)
    ours = outputs(config, params, images)
    assert ours["features"].dtype == jnp.float32 and len(ours["states"]) == 1 + config.depth
    expected = np.stack([transcription(arrays, config, image) for image in images])
    assert relative_error(ours["features"], expected) < TOLERANCE
    assert relative_error(ours["logits"], expected @ arrays["head/kernel"] + arrays["head/bias"]) < TOLERANCE


@pytest.mark.parametrize("gelu", ["erf", "tanh", "sigmoid"])
def test_layer_norm_and_gelu_hold_one_array_for_the_backward_pass(gelu):
    x, rngs = jnp.ones((2, 3, 4), jnp.float32), nnx.Rngs(0)
    for layer, width in ((LayerNorm(4, 1e-6, rngs), 4), (MLP(4, 5, gelu, rngs), 5)):
        _, backward = jax.vjp(layer, x)
        shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
        assert [shape for shape in shapes if shape[:2] == x.shape[:2]] == [(2, 3, width)]


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
    whole = np.concatenate([[9.0], np.repeat(np.linspace(-1, 1, 4), 4)]).reshape(1, 17, 1)
    resized = interpolate_positions(whole, 8, antialias)[0, 1:, 0].reshape(8, 8)
    np.testing.assert_allclose(resized, np.broadcast_to(resized[:, :1], (8, 8)), atol=1e-6)
    np.testing.assert_allclose(resized[:, 0], -resized[::-1, 0], atol=1e-6)
    assert (np.diff(resized[:, 0]) > 0).all()


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


def test_the_digests_of_older_backbones_stay():
    """A workdir records its backbone's digest: new settings of an architecture do not count at their defaults."""
    known = {VIT: "a47f763e69d3bf92010d14aef95e9ecf9c3bc8ac33dbe9c8d921280c9311d09e"}
    known |= {SWIN: "327f565b8c5ca0370d2b33cd51e5093e4ea00f0f1add132ecba2908f708c536b"}
    for config, expected in known.items():
        ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), backbone_lib.graph(config)[1])
        assert backbone_lib.make(config, ones, (0.5,), (0.5,)).digest == expected
    kinds = [{"registers": 1}, {"registers": 2}, {"pre_norm": True}, {}]
    assert len({str(describe(dataclasses.replace(VIT, **kind))) for kind in kinds}) == 4


@pytest.mark.parametrize("config", [VIT, SWIN])
def test_shapes_of_a_network_are_traced_without_counting_random_keys(monkeypatch, config):
    """At every key that is counted, Flax looks at all equations before it: with the depth that becomes slow."""

    def refuse(_):
        raise AssertionError("a key was counted")

    monkeypatch.setattr(nnx.RngStream, "__call__", refuse)
    assert backbone_lib.graph(dataclasses.replace(config, epsilon=1e-7))[1]
