"""Conversion of timm-named weights: parity on real ones, round trip on made-up ones, every misfit named."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert
from lmeraser_jax.models.vit import ViTConfig
from lmeraser_jax.models.weight_files import Weights, read
from lmeraser_jax.storage.checkpoints import flatten

# -- real weights --


@pytest.fixture(scope="module")
def weights(shared: Path) -> Path:
    path = shared / "weights" / "vit_tiny_patch16_224_imagenet1k.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def real(weights: Path) -> Weights:
    return read(str(weights))


@pytest.fixture(scope="module")
def check(weights: Path) -> dict[str, np.ndarray]:
    with np.load(weights.with_name("vit_tiny_check_17.npz"), allow_pickle=False) as file:
        return {name: file[name] for name in ("images", "labels", "logits", "cls_features")}


@pytest.fixture(scope="module")
def run(real, check):
    """timm-named weights -> logits and features of the reference images."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(vit, params, images):
        features = backbone_lib.features(vit, params, images)
        return backbone_lib.logits(vit, params, images), features

    def outputs(arrays, count):
        images = (check["images"][:count].astype(np.float32) / 255 - 0.5) / 0.5
        vit, params, _ = convert.parameters(dataclasses.replace(real, arrays=arrays), settings.Backbone())
        return jax.device_get(both(vit, params, images))

    return outputs


def test_the_architecture_is_read_off_the_shapes(real):
    vit, _, provenance = convert.parameters(real, settings.Backbone())
    assert vit == ViTConfig(
        image_size=224, patch=16, channels=3, width=192, depth=12, heads=3, mlp=768, feature="cls", classes=1000
    )
    assert provenance.origin == "timm ViT" and set(provenance.left_out) == {"head/kernel", "head/bias"}


def test_the_real_weights_are_those_of_their_name(weights):
    named = settings.Backbone(name="vit-ti", weights=str(weights))
    assert convert.load(named)[0].digest == load(weights, 224)[0].digest
    with pytest.raises(UserError, match=r"is not vit-s(.|\n)*width is 192, vit-s has 384"):
        convert.load(dataclasses.replace(named, name="vit-s"))


def test_real_weights_reproduce_the_reference(run, real, check):
    logits, features = run(real.arrays, 17)
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
    arrays = dict(real.arrays)
    bug(arrays)
    logits, features = run(arrays, 17)
    assert np.abs(logits - check["logits"]).max() > 0.05
    assert np.abs(features - check["cls_features"]).max() > 0.05


@pytest.mark.parametrize("size", [64, 96])
def test_real_weights_at_another_image_size(weights, real, check, size):
    backbone, _ = load(weights, size)
    assert backbone.config.image_size == size and backbone.config.classes == 0
    flat, tokens = flatten(backbone.params), 1 + (size // 16) ** 2
    assert flat["positions"].shape == (1, tokens, 192)
    np.testing.assert_array_equal(flat["positions"][:, 0], real.arrays["pos_embed"][:, 0])
    images = (check["images"][:2, :size, :size].astype(np.float32) / 255 - 0.5) / 0.5
    features = np.asarray(jax.jit(functools.partial(backbone_lib.features, backbone.config))(backbone.params, images))
    assert features.shape == (2, 192) and np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-2


# -- made-up weights --

VIT = ViTConfig(image_size=12, patch=4, channels=1, width=16, depth=2, heads=2, mlp=24, feature="cls", classes=7)


def random_params(vit: ViTConfig):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), backbone_lib.graph(vit)[1])


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
        modules |= {f"blocks.{i}.mlp.{fc}": linear(block["mlp"][fc]) for fc in ("fc1", "fc2")}
    if vit.feature == "pooler":
        modules["pre_logits.fc"] = linear(params["pooler"])
    if vit.classes:
        modules["head"] = linear(params["head"])
    arrays = {f"{module}.{part}": array for module, parts in modules.items() for part, array in parts.items()}
    return {**arrays, "cls_token": params["cls"], "pos_embed": params["positions"]}


def load(path: Path, image_size: int, heads: int = 0, feature: str = "auto"):
    return convert.load(settings.Backbone(weights=str(path), heads=heads, feature=feature), image_size)


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
    backbone, _ = load(written(tmp_path, timm_arrays(vit, params)), 12, vit.heads, vit.feature)
    assert backbone.config == dataclasses.replace(vit, classes=0)
    want = {name: array for name, array in flatten(params).items() if not name.startswith("head/")}
    got = flatten(backbone.params)
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert backbone.digest == backbone_lib.make(vit, params, backbone.mean, backbone.std).digest
    assert set(backbone.mean + backbone.std) == {0.5}


def test_the_classifier_is_converted_but_kept_out_of_the_backbone(arrays):
    found = Weights("weights", arrays, "")
    _, params, provenance = convert.parameters(found, settings.Backbone(heads=2))
    assert set(provenance.left_out) == {"head/kernel", "head/bias"}
    assert "head" not in convert.freeze(found, settings.Backbone(heads=2))[0].params
    np.testing.assert_array_equal(params["head"]["kernel"], arrays["head.weight"].T)
    np.testing.assert_array_equal(params["head"]["bias"], arrays["head.bias"])


def test_half_precision_weights_become_float32(tmp_path, arrays):
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    backbone, _ = load(written(tmp_path, half), 12, 2)
    leaves = jax.tree.leaves(backbone.params)
    assert all(leaf.dtype == np.float32 for leaf in leaves)
    np.testing.assert_array_equal(flatten(backbone.params)["embed/bias"], half["patch_embed.proj.bias"])


# -- what a user can get wrong --


def refusal(path: Path, image_size: int, heads: int = 0, feature: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        load(path, image_size, heads, feature)
    return str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    message = refusal(tmp_path / "absent.npz", 12)
    assert "absent.npz" in message and "--config.backbone.weights" in message
    assert "--config.backbone.weights" in refusal(tmp_path, 12)  # a folder


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
        message = refusal(path, 12)
        assert path.name in message and "--config.backbone.weights" in message, what


def test_arrays_without_which_there_is_no_architecture(tmp_path, arrays):
    del arrays["blocks.0.mlp.fc1.weight"]
    message = refusal(written(tmp_path, arrays), 12)
    assert "missing: blocks/0/mlp/fc1/kernel" in message and "timm ViT" in message
    del arrays["pos_embed"]
    message = refusal(written(tmp_path, arrays), 12)
    assert "none of the known layouts" in message and "timm ViT has pos_embed, and this has not" in message


def test_all_misfits_are_listed_at_once(tmp_path, arrays):
    del arrays["norm.bias"]
    del arrays["blocks.1.attn.qkv.weight"]
    arrays["dist_head.weight"] = np.zeros((3, 5), np.float32)
    arrays["blocks.0.mlp.fc2.bias"] = np.zeros(17, np.float32)
    message = refusal(written(tmp_path, arrays), 12, 2)
    lines = message.splitlines()
    assert len(lines) == 5 and "weights.npz" in lines[0]
    for needles in (
        ("missing", "norm/bias", "[16]"),
        ("missing", "blocks/1/attention/qkv/kernel", "[16, 48]"),
        ("not used", "dist_head/kernel", "[5, 3]"),
        ("blocks/0/mlp/fc2/bias", "[17]", "[16]"),
    ):
        assert sum(all(needle in line for needle in needles) for line in lines) == 1, needles


def test_the_wanted_feature_must_be_in_the_file(tmp_path, arrays):
    assert load(written(tmp_path, arrays), 12, 2)[0].config.feature == "cls"
    message = refusal(written(tmp_path, arrays), 12, 2, "pooler")
    assert "pooler/kernel" in message and "pooler/bias" in message
    other = dataclasses.replace(VIT, feature="pooler")
    pooled = written(tmp_path, timm_arrays(other, random_params(other)))
    assert load(pooled, 12, 2)[0].config.feature == "pooler"
    backbone, provenance = load(pooled, 12, 2, "cls")
    assert {"pooler/kernel", "pooler/bias"} <= set(provenance.left_out)
    plain = dataclasses.replace(other, feature="cls")
    assert backbone.config == dataclasses.replace(plain, classes=0) and "pooler" not in backbone.params


def test_image_size_and_heads_must_fit(tmp_path, arrays):
    path = written(tmp_path, arrays)
    assert "--config.data.image_size=10" in refusal(path, 10, 2)
    assert "--config.backbone.heads=5" in refusal(path, 12, 5)
    both = refusal(path, 10, 5)
    assert "--config.data.image_size=10" in both and "--config.backbone.heads=5" in both


def test_integer_arrays_are_refused(tmp_path, arrays):
    arrays["norm.bias"] = arrays["norm.bias"].astype(np.int32)
    message = refusal(written(tmp_path, arrays), 12, 2)
    assert "norm.bias" in message and "int32" in message


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pos_embed", (1, 11, 16), "positions [1, 11, 16]"),  # class and distillation token: no square grid
        ("pos_embed", (1, 0, 16), "positions [1, 0, 16]"),
        ("pos_embed", (1, 1, 16), "positions [1, 1, 16]"),
        ("pos_embed", (10, 16), "positions [10, 16]"),
        ("patch_embed.proj.weight", (16, 16), "embed/kernel [16, 16]"),
        ("patch_embed.proj.weight", (16, 3, 0, 0), "embed/kernel [0, 0, 3, 16]"),
        ("blocks.0.mlp.fc1.weight", (), "blocks/0/mlp/fc1/kernel []"),
        ("head.weight", (), "head/kernel []"),
    ],
    ids=str,
)
def test_shapes_from_which_no_architecture_can_be_read(tmp_path, arrays, name, shape, message):
    arrays[name] = np.zeros(shape, np.float32)
    found = refusal(written(tmp_path, arrays), 12, 2)
    assert message in found and "weights.npz" in found


@pytest.mark.parametrize("shape", [(), (5,), (47, 16), (2, 3, 4)], ids=str)
def test_a_misshapen_joined_kernel_is_listed(tmp_path, arrays, shape):
    arrays["blocks.1.attn.qkv.weight"] = np.zeros(shape, np.float32)
    message = refusal(written(tmp_path, arrays), 12, 2)
    assert f"blocks/1/attention/qkv/kernel: the file has {list(shape[::-1])}, the model needs [16, 48]" in message


def test_patches_must_be_square(tmp_path, arrays):
    arrays["patch_embed.proj.weight"] = np.zeros((16, 1, 4, 2), np.float32)
    message = refusal(written(tmp_path, arrays), 12, 2)
    assert "embed/kernel [4, 2, 1, 16]: patches must be square" in message


def test_blocks_must_be_numbered_without_a_gap(tmp_path, arrays):
    for name in [name for name in arrays if name.startswith("blocks.1.")]:
        arrays[name.replace("blocks.1.", "blocks.3.")] = arrays.pop(name)
    message = refusal(written(tmp_path, arrays), 12, 2)
    assert "missing: blocks/1/" in message and "missing: blocks/2/" in message
