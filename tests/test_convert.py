"""Conversion of timm-named weights: parity on real ones, round trip on made-up ones, every misfit named."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from lmeraser_jax import config as settings
from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.backbones import convert
from lmeraser_jax.backbones.vit import ViTConfig
from lmeraser_jax.errors import UserError
from lmeraser_jax.store.checkpoints import flatten

# -- real weights --


@pytest.fixture(scope="module")
def weights(shared: Path) -> Path:
    path = shared / "weights" / "vit_tiny_patch16_224_imagenet1k.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def real(weights: Path) -> dict[str, np.ndarray]:
    return convert.read_npz(str(weights))


@pytest.fixture(scope="module")
def check(weights: Path) -> dict[str, np.ndarray]:
    with np.load(weights.with_name("vit_tiny_check_17.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in ("images", "labels", "logits", "cls_features")}


@pytest.fixture(scope="module")
def run(real, check):
    """timm-named weights -> logits and features of the reference images."""
    vit = convert.architecture(real, 0, "cls")

    @jax.jit
    def both(params, images):
        features = frozen.features(vit, params, images)
        return frozen.logits(vit, params, images), features

    def outputs(arrays, count):
        images = (check["images"][:count].astype(np.float32) / 255 - 0.5) / 0.5
        return jax.device_get(both(convert.convert(arrays, vit, "weights"), images))

    return outputs


def test_the_architecture_is_read_off_the_shapes(real):
    assert convert.architecture(real, 0, "cls") == ViTConfig(
        image_size=224, patch=16, channels=3, width=192, depth=12, heads=3, mlp=768, feature="cls", classes=1000
    )


def test_real_weights_reproduce_the_reference(run, real, check):
    logits, features = run(real, 17)
    assert np.abs(logits - check["logits"]).max() < 1e-3
    assert np.abs(features - check["cls_features"]).max() < 1e-3
    assert (logits.argmax(axis=1) == check["labels"]).sum() == 17


def swap_q_and_k(arrays):
    for name in [name for name in arrays if ".attn.qkv." in name]:
        q, k, v = np.split(arrays[name], 3)
        arrays[name] = np.concatenate([k, q, v])


def leave_square_kernels_untransposed(arrays):
    for name in [name for name in arrays if name.endswith("attn.proj.weight")]:
        arrays[name] = arrays[name].T


def transpose_patches(arrays):
    arrays["patch_embed.proj.weight"] = arrays["patch_embed.proj.weight"].swapaxes(2, 3)


def reverse_colours(arrays):
    arrays["patch_embed.proj.weight"] = arrays["patch_embed.proj.weight"][:, ::-1]


@pytest.mark.parametrize(
    "bug",
    [swap_q_and_k, leave_square_kernels_untransposed, transpose_patches, reverse_colours],
    ids=lambda f: f.__name__,
)
def test_the_reference_shows_conversion_bugs(run, real, check, bug):
    """A conversion that fits all shapes and is wrong is found by the parity test above."""
    arrays = dict(real)
    bug(arrays)
    logits, features = run(arrays, 17)
    assert np.abs(logits - check["logits"]).max() > 0.05
    assert np.abs(features - check["cls_features"]).max() > 0.05


@pytest.mark.parametrize("size", [64, 96])
def test_real_weights_at_another_image_size(weights, real, check, size):
    backbone = convert.load(config_for(weights, size))
    assert backbone.config.image_size == size and backbone.config.classes == 0
    flat, tokens = flatten(backbone.params), 1 + (size // 16) ** 2
    assert flat["positions"].shape == (1, tokens, 192)
    np.testing.assert_array_equal(flat["positions"][:, 0], real["pos_embed"][:, 0])
    images = (check["images"][:2, :size, :size].astype(np.float32) / 255 - 0.5) / 0.5
    features = np.asarray(jax.jit(functools.partial(frozen.features, backbone.config))(backbone.params, images))
    assert features.shape == (2, 192) and np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-2


# -- made-up weights --

VIT = ViTConfig(image_size=12, patch=4, channels=1, width=16, depth=2, heads=2, mlp=24, feature="cls", classes=7)


def random_params(vit: ViTConfig):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), frozen.graph(vit)[1])


def timm_arrays(vit: ViTConfig, params) -> dict[str, np.ndarray]:
    """Our parameters under timm's names and in its layout."""

    def linear(leaf):
        return {"weight": leaf["kernel"].T, "bias": leaf["bias"]}

    def norm(leaf):
        return {"weight": leaf["scale"], "bias": leaf["bias"]}

    kernel = np.zeros((vit.width, vit.channels, vit.patch, vit.patch), np.float32)
    for y in range(vit.patch):
        for x in range(vit.patch):
            for c in range(vit.channels):
                kernel[:, c, y, x] = params["embed"]["kernel"][(y * vit.patch + x) * vit.channels + c]
    modules = {"patch_embed.proj": {"weight": kernel, "bias": params["embed"]["bias"]}, "norm": norm(params["norm"])}
    for i in range(vit.depth):
        block = params["blocks"][i]
        modules[f"blocks.{i}.norm1"], modules[f"blocks.{i}.norm2"] = norm(block["norm1"]), norm(block["norm2"])
        modules[f"blocks.{i}.attn.qkv"] = linear(block["attention"]["qkv"])
        modules[f"blocks.{i}.attn.proj"] = linear(block["attention"]["out"])
        modules[f"blocks.{i}.mlp.fc1"], modules[f"blocks.{i}.mlp.fc2"] = linear(block["fc1"]), linear(block["fc2"])
    if vit.feature == "pooler":
        modules["pre_logits.fc"] = linear(params["pooler"])
    if vit.classes:
        modules["head"] = linear(params["head"])
    arrays = {f"{module}.{part}": array for module, parts in modules.items() for part, array in parts.items()}
    return {**arrays, "cls_token": params["cls"], "pos_embed": params["positions"]}


def config_for(path: Path, image_size: int, heads: int = 0, feature: str = "cls") -> settings.Config:
    return settings.Config(
        data=settings.Data(image_size=image_size),
        backbone=settings.Backbone(weights=str(path), heads=heads, feature=feature),
    )


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return timm_arrays(VIT, random_params(VIT))


def written(folder: Path, arrays) -> Path:
    np.savez(folder / "weights.npz", **arrays)
    return folder / "weights.npz"


@pytest.mark.parametrize(
    "vit",
    [VIT, dataclasses.replace(VIT, feature="pooler", channels=3, classes=0)],
    ids=["cls, grey, classifier", "pooler, colour, none"],
)
def test_round_trip(tmp_path, vit):
    params = random_params(vit)
    backbone = convert.load(config_for(written(tmp_path, timm_arrays(vit, params)), 12, vit.heads, vit.feature))
    assert backbone.config == dataclasses.replace(vit, classes=0)
    want = {name: array for name, array in flatten(params).items() if not name.startswith("head/")}
    got = flatten(backbone.params)
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert backbone.digest == frozen.make(vit, params, 0.5, 0.5).digest


def test_the_classifier_is_converted_but_kept_out_of_the_backbone(arrays):
    params = convert.convert(arrays, VIT, "weights")
    np.testing.assert_array_equal(params["head"]["kernel"], arrays["head.weight"].T)
    np.testing.assert_array_equal(params["head"]["bias"], arrays["head.bias"])


def test_half_precision_weights_become_float32(tmp_path, arrays):
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    backbone = convert.load(config_for(written(tmp_path, half), 12, 2))
    leaves = jax.tree.leaves(backbone.params)
    assert all(leaf.dtype == np.float32 for leaf in leaves)
    np.testing.assert_array_equal(flatten(backbone.params)["embed/bias"], half["patch_embed.proj.bias"])


# -- what a user can get wrong --


def refusal(config: settings.Config) -> str:
    with pytest.raises(UserError) as caught:
        convert.load(config)
    return str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    message = refusal(config_for(tmp_path / "absent.npz", 12))
    assert "absent.npz" in message and "--config.backbone.weights" in message
    assert "--config.backbone.weights" in refusal(config_for(tmp_path, 12))  # a folder


def test_a_file_that_is_no_npz(tmp_path, arrays):
    whole = written(tmp_path, arrays).read_bytes()
    middle = len(whole) // 2
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", **{**arrays, "pos_embed": np.array([{}], dtype=object)})
    contents = {
        "text": b"these are not weights",
        "empty": b"",
        "one array": (tmp_path / "array.npy").read_bytes(),
        "cut off": whole[:middle],
        "flipped bits": whole[:middle]
        + bytes(255 - byte for byte in whole[middle : middle + 64])
        + whole[middle + 64 :],
        "pickled objects": (tmp_path / "objects.npz").read_bytes(),
    }
    for what, content in contents.items():
        path = tmp_path / f"{what}.npz"
        path.write_bytes(content)
        message = refusal(config_for(path, 12))
        assert path.name in message and "--config.backbone.weights" in message, what


def test_arrays_without_which_there_is_no_architecture(tmp_path, arrays):
    for name in ("pos_embed", "blocks.0.mlp.fc1.weight"):
        del arrays[name]
    message = refusal(config_for(written(tmp_path, arrays), 12))
    assert "pos_embed" in message and "blocks.0.mlp.fc1.weight" in message and "cls_token" not in message


def test_all_misfits_are_listed_at_once(tmp_path, arrays):
    del arrays["norm.bias"]
    del arrays["blocks.1.attn.qkv.weight"]
    arrays["dist_head.weight"] = np.zeros((3, 5), np.float32)
    arrays["blocks.0.mlp.fc2.bias"] = np.zeros(17, np.float32)
    message = refusal(config_for(written(tmp_path, arrays), 12, 2))
    lines = message.splitlines()
    assert len(lines) == 5 and "weights.npz" in lines[0]
    for needles in (
        ("missing", "norm/bias", "[16]"),
        ("missing", "blocks/1/attention/qkv/kernel", "[16, 48]"),
        ("not used", "dist_head/kernel", "[5, 3]"),
        ("blocks/0/fc2/bias", "[17]", "[16]"),
    ):
        assert sum(all(needle in line for needle in needles) for line in lines) == 1, needles


def test_the_wanted_feature_must_be_in_the_file(tmp_path, arrays):
    message = refusal(config_for(written(tmp_path, arrays), 12, 2, "pooler"))
    assert "pooler/kernel" in message and "pooler/bias" in message
    other = dataclasses.replace(VIT, feature="pooler")
    pooled = written(tmp_path, timm_arrays(other, random_params(other)))
    message = refusal(config_for(pooled, 12, 2, "cls"))
    assert "not used: pooler/kernel" in message


def test_image_size_and_heads_must_fit(tmp_path, arrays):
    path = written(tmp_path, arrays)
    assert "--config.data.image_size=10" in refusal(config_for(path, 10, 2))
    assert "--config.backbone.heads=5" in refusal(config_for(path, 12, 5))
    both = refusal(config_for(path, 10, 5))
    assert "--config.data.image_size=10" in both and "--config.backbone.heads=5" in both


def test_integer_arrays_are_refused(tmp_path, arrays):
    arrays["norm.bias"] = arrays["norm.bias"].astype(np.int32)
    message = refusal(config_for(written(tmp_path, arrays), 12, 2))
    assert "norm.bias" in message and "int32" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (1, 11, 16)),  # a class and a distillation token: no square grid
        ("pos_embed", (1, 0, 16)),
        ("pos_embed", (1, 1, 16)),
        ("pos_embed", (10, 16)),
        ("patch_embed.proj.weight", (16, 16)),
        ("blocks.0.mlp.fc1.weight", ()),
        ("head.weight", ()),
    ],
    ids=str,
)
def test_shapes_from_which_no_architecture_can_be_read(tmp_path, arrays, name, shape):
    arrays[name] = np.zeros(shape, np.float32)
    message = refusal(config_for(written(tmp_path, arrays), 12, 2))
    assert f"{name} {list(shape)}" in message and "weights.npz" in message


def test_patches_must_be_square(tmp_path, arrays):
    arrays["patch_embed.proj.weight"] = np.zeros((16, 1, 4, 2), np.float32)
    message = refusal(config_for(written(tmp_path, arrays), 12, 2))
    assert "embed/kernel: the file has [8, 16], the model needs [16, 16]" in message


def test_blocks_must_be_numbered_without_a_gap(tmp_path, arrays):
    for name in [name for name in arrays if name.startswith("blocks.1.")]:
        arrays[name.replace("blocks.1.", "blocks.3.")] = arrays.pop(name)
    message = refusal(config_for(written(tmp_path, arrays), 12, 2))
    assert "missing: blocks/1/" in message and "missing: blocks/2/" in message
