"""The ViT against a plain NumPy transcription in float64; purity and bit stability of its features."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import special

from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.layers import extract_patches
from lmeraser_jax.models.vit import ViTConfig, interpolate_positions
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.features import Extractor
from lmeraser_jax.training.tune import mesh_of

CLS = ViTConfig(image_size=8, patch=4, width=16, depth=2, heads=2, mlp=24, channels=3, feature="cls", classes=5)
POOLER = ViTConfig(image_size=8, patch=2, width=16, depth=1, heads=4, mlp=32, channels=1, feature="pooler")
TANH = dataclasses.replace(CLS, gelu="tanh", epsilon=0.3, classes=0)
NUMERICS = dataclasses.replace(CLS, gelu="tanh"), dataclasses.replace(CLS, epsilon=1e-12)
HALF, OTHER = (0.5,), (0.4,)
SPEC = ImageSpec(8, 8, 3, size=8, resize=8, out_channels=3)


def random_params(config: ViTConfig, seed: int = 0):
    """Parameters far from any initialisation, so that every one of them shows in the output."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1 / np.sqrt(leaf.shape[0]) if leaf.ndim == 2 else 1.0
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, backbone_lib.graph(config)[1])


def reference(config: ViTConfig, params, images: np.ndarray) -> np.ndarray:
    """Dosovitskiy et al. (2020), Eqs. 1 to 4, one image and one head at a time, in float64."""
    p = {name: array.astype(np.float64) for name, array in flatten(params).items()}

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + config.epsilon) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def gelu(x):
        if config.gelu == "tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + special.erf(x / np.sqrt(2)))

    def attention(x, name):
        q, k, v = np.split(dense(x, f"{name}/qkv"), 3, axis=-1)
        size = config.width // config.heads
        heads = []
        for a in range(config.heads):
            part = slice(a * size, (a + 1) * size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(size)
            weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            heads.append(weights @ v[:, part])
        return dense(np.concatenate(heads, axis=-1), f"{name}/out")

    found = []
    for image in images.astype(np.float64):
        x = np.concatenate([p["cls"][0], dense(loop_patches(image, config.patch), "embed")]) + p["positions"][0]
        for i in range(config.depth):
            x = x + attention(norm(x, f"blocks/{i}/norm1"), f"blocks/{i}/attention")
            h = dense(norm(x, f"blocks/{i}/norm2"), f"blocks/{i}/mlp/fc1")
            x = x + dense(gelu(h), f"blocks/{i}/mlp/fc2")
        x = norm(x, "norm")[0]
        found.append(np.tanh(dense(x, "pooler")) if config.feature == "pooler" else x)
    return np.stack(found)


def loop_patches(image: np.ndarray, patch: int) -> np.ndarray:
    rows = []
    for top in range(0, image.shape[0], patch):
        for left in range(0, image.shape[1], patch):
            rows.append([image[top + y, left + x] for y in range(patch) for x in range(patch)])
    return np.array(rows).reshape(len(rows), -1)


def inputs(config: ViTConfig, count: int = 4, seed: int = 1) -> np.ndarray:
    shape = (count, config.image_size, config.image_size, config.channels)
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@functools.lru_cache(maxsize=8)
def compiled(config: ViTConfig):
    return jax.jit(functools.partial(backbone_lib.features, config))


@pytest.mark.parametrize("config", [CLS, POOLER, TANH], ids=["cls", "pooler", "tanh GELU"])
def test_features_match_the_transcription(config):
    params, images = random_params(config), inputs(config)
    got = compiled(config)(params, images)
    assert got.dtype == jnp.float32 and got.shape == (4, config.width)
    np.testing.assert_allclose(np.asarray(got), reference(config, params, images), atol=2e-5)


def test_logits_are_the_head_on_the_features():
    params, images = random_params(CLS), inputs(CLS)
    want = reference(CLS, params, images) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(
        np.asarray(jax.jit(functools.partial(backbone_lib.logits, CLS))(params, images)), want, atol=1e-4
    )


def test_every_parameter_matters():
    """Each array reaches the features, but the classifier (not part of them)."""
    params, images = random_params(CLS), inputs(CLS)
    base = np.asarray(compiled(CLS)(params, images))
    leaves, structure = jax.tree.flatten(params)
    for i, name in enumerate(flatten(params)):
        changed = jax.tree.unflatten(structure, [*leaves[:i], leaves[i] * np.float32(1.5), *leaves[i + 1 :]])
        moved = np.abs(np.asarray(compiled(CLS)(changed, images)) - base).max()
        assert moved == 0 if name.startswith("head/") else moved > 1e-3, name


def test_the_number_of_heads_matters():
    other = ViTConfig(**{**vars(CLS), "heads": 4})
    params, images = random_params(CLS), inputs(CLS)
    two, four = (np.asarray(compiled(config)(params, images)) for config in (CLS, other))
    assert np.abs(two - four).max() > 1e-2
    np.testing.assert_allclose(four, reference(other, params, images), atol=1e-4)


def test_patches_are_cut_row_by_row():
    images = np.arange(2 * 6 * 9 * 2, dtype=np.float32).reshape(2, 6, 9, 2)
    got = np.asarray(extract_patches(jnp.asarray(images), 3))
    assert got.shape == (2, 2, 3, 18)
    np.testing.assert_array_equal(got.reshape(2, 6, 18), np.stack([loop_patches(image, 3) for image in images]))


def test_bfloat16_parameters_give_float32_features_close_by():
    params, images = random_params(CLS), inputs(CLS)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    got = compiled(CLS)(low, images)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) - reference(CLS, params, images))
    assert 1e-5 < error.mean() < 0.05


def test_gradient_with_respect_to_the_image():
    """Directional derivatives against central differences of the float64 transcription."""
    params, images = random_params(CLS), inputs(CLS, count=2)
    weights = np.random.default_rng(3).normal(size=(2, CLS.width)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(backbone_lib.features(CLS, params, x) * weights)))(images)
    for seed in range(4):
        direction = np.random.default_rng(10 + seed).normal(size=images.shape)
        ahead, behind = (reference(CLS, params, images + sign * 1e-5 * direction) for sign in (1, -1))
        slope = np.sum((ahead - behind) * weights) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-3, atol=1e-3)


KERNELS = pytest.mark.parametrize("antialias", [True, False], ids=["antialiased", "plain"])


@KERNELS
def test_interpolated_positions(antialias):
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(1, 17, 6)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(interpolate_positions(positions, 4, antialias)), positions)
    for grid in (2, 3, 7):
        got = np.asarray(interpolate_positions(positions, grid, antialias))
        assert got.shape == (1, 1 + grid * grid, 6) and got.dtype == np.float32
        np.testing.assert_array_equal(got[:, 0], positions[:, 0])
        constant = np.broadcast_to(positions[:, :1], positions.shape)
        resized = np.asarray(interpolate_positions(constant, grid, antialias))
        np.testing.assert_allclose(resized, np.broadcast_to(positions[:, :1], got.shape), atol=1e-6)


@KERNELS
def test_interpolation_keeps_rows_and_columns_apart(antialias):
    """A row coordinate stays one: it grows down the new grid, symmetrically, and is equal along each row."""
    row = np.repeat(np.linspace(-1, 1, 4), 4)
    positions = np.concatenate([[9.0], row]).reshape(1, 17, 1).astype(np.float32)
    got = np.asarray(interpolate_positions(positions, 8, antialias))[0, 1:, 0].reshape(8, 8)
    np.testing.assert_allclose(got, np.broadcast_to(got[:, :1], (8, 8)), atol=1e-6)
    assert (np.diff(got[:, 0]) > 0).all()
    np.testing.assert_allclose(got[:, 0], -got[::-1, 0], atol=1e-6)
    mirrored = positions.copy()
    mirrored[0, 1:, 0] = row.reshape(4, 4).T.ravel()
    transposed = np.asarray(interpolate_positions(mirrored, 8, antialias))[0, 1:, 0].reshape(8, 8)
    np.testing.assert_allclose(transposed, got.T, atol=1e-6)


@pytest.mark.parametrize("grid", [3, 5, 9])
def test_the_antialiased_kernel_is_pillows(grid):
    """Each feature of the position embedding, resized as an image of its own."""
    positions = np.random.default_rng(0).normal(size=(1, 37, 4)).astype(np.float32)
    got = interpolate_positions(positions, grid)[0, 1:].reshape(grid, grid, 4)
    for i in range(4):
        image = Image.fromarray(np.ascontiguousarray(positions[0, 1:, i].reshape(6, 6)))
        want = np.asarray(image.resize((grid, grid), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(got[..., i], want, atol=1e-5)


@pytest.fixture(scope="module")
def tiny() -> backbone_lib.Backbone:
    return backbone_lib.make(CLS, random_params(CLS), HALF, HALF)


def test_making_a_backbone_drops_the_classifier_and_names_all_the_rest(tiny):
    assert tiny.config.classes == 0 and "head" not in tiny.params
    assert tiny.digest == backbone_lib.make(CLS, random_params(CLS), HALF, HALF).digest
    heads = ViTConfig(**{**vars(CLS), "heads": 4})
    others = [
        backbone_lib.make(CLS, random_params(CLS, 1), HALF, HALF),
        backbone_lib.make(heads, random_params(CLS), HALF, HALF),
    ]
    others += [backbone_lib.make(CLS, random_params(CLS), *other) for other in ((OTHER, HALF), (HALF, OTHER))]
    others += [backbone_lib.make(numerics, random_params(CLS), HALF, HALF) for numerics in NUMERICS]
    assert len({tiny.digest, *(other.digest for other in others)}) == 7


@pytest.mark.parametrize(("devices", "batch"), [(1, 8), (8, 2)])
def test_a_records_feature_has_the_same_bits_wherever_it_stands(tiny, devices, batch):
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (37, 8, 8, 3)).astype(np.uint8)
    mesh = mesh_of(jax.devices()[:devices])
    get = Extractor(tiny, SPEC, batch, mesh, jnp.dtype("float32"))
    found = get(images)
    want = reference(tiny.config, tiny.params, (images / 255.0 - 0.5) / 0.5)
    np.testing.assert_allclose(found, want, atol=1e-4)
    np.testing.assert_array_equal(get(images), found)
    for _ in range(3):  # any order, any number of records, any neighbours
        chosen = rng.permutation(37)[: rng.integers(1, 38)]
        np.testing.assert_array_equal(get(images[chosen]), found[chosen])
    for row in (0, 13, 36):  # alone in a padded batch
        np.testing.assert_array_equal(get(images[row : row + 1]), found[row : row + 1])
    assert get(images[:0]).shape == (0, CLS.width)
