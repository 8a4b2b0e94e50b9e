"""Published layouts, numerics, normalisation and features; and real ImageNet weights against a reference."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from published import (
    CLIP,
    DINOV2,
    REGISTERS,
    SWIN,
    VIT,
    Arrays,
    flax_tree,
    hub_folder,
    hugging_face_clip,
    hugging_face_dinov2,
    hugging_face_swin,
    hugging_face_vit,
    settings_of,
    timm,
    vision_transformer,
)
from transcriptions import TOLERANCE, dinov2_or_clip, features, outputs, pictures, relative_error
from transcriptions import vision_transformer as transcription

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, weight_settings, zoo
from lmeraser_jax.models.architectures import architecture_from, describe
from lmeraser_jax.models.key_maps import BY_NAME
from lmeraser_jax.models.vit import ViTConfig, interpolate_positions
from lmeraser_jax.models.weight_files import Weights, read
from lmeraser_jax.storage.checkpoints import flatten

FAMILIES = {"vit": (hugging_face_vit, VIT), "swin": (hugging_face_swin, SWIN)}
KINDS = {"dinov2": DINOV2, "dinov2_with_registers": REGISTERS, "clip": CLIP}


def params_of(path, image_size: int = 0, **settings) -> Arrays:
    return flatten(convert.load(Backbone(weights=str(path), **settings), image_size)[0].params)


def freeze(arrays: Arrays, settings=None, image_size: int = 0, **chosen):
    return convert.freeze(Weights("weights", arrays, "", settings or {}), Backbone(**chosen), image_size)


def assert_same(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return hugging_face_vit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arrays):
    return hub_folder(tmp_path_factory.mktemp("vit"), arrays, settings_of(VIT))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_same_parameters(family):
    """transformers', timm's and Microsoft's names; with a classifier or without; with index tables and masks."""
    make, config = FAMILIES[family]
    bare, whole = make(config), make(config, prefix=f"{family}.")
    kind = "ViT" if family == "vit" else "Swin"
    layouts = {f"Hugging Face {kind}": (bare, whole), f"timm {kind}": (timm(bare), timm(whole))}
    if family == "swin":
        buffers = {"layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64)}
        buffers |= {"layers.0.blocks.1.attn_mask": np.zeros((16, 16, 16), np.float32)}
        layouts["Microsoft Swin"] = (timm(bare, "microsoft") | buffers, timm(whole, "microsoft"))
    expected = flatten(freeze(bare, settings_of(config))[0].params)
    for origin, layout in layouts.items():
        for saved in layout:
            backbone, provenance = freeze(saved, heads=VIT.heads if family == "vit" else 0)
            assert provenance.origin == origin
            numerics = {"epsilon": backbone.config.epsilon}  # the origin's
            assert backbone.config == dataclasses.replace(config, classes=0, **numerics)
            assert_same(flatten(backbone.params), expected)
        assert set(provenance.left_out) == {"head/kernel", "head/bias"}
    for prefix in ("model.", "module."):
        assert_same(flatten(freeze(make(config, prefix=prefix))[0].params), expected)


def test_a_classifier_is_converted_and_left_out_of_the_backbone():
    arrays = timm(hugging_face_vit(prefix="vit."))
    config, params, _ = convert.parameters(Weights("weights", arrays, ""), Backbone(heads=2))
    np.testing.assert_array_equal(params["head"]["kernel"], arrays["head.weight"].T)
    np.testing.assert_array_equal(params["head"]["bias"], arrays["head.bias"])
    assert config.classes == VIT.classes and "head" not in freeze(arrays)[0].params


def test_the_google_npz_has_the_numerics_of_its_own_code_at_every_size(tmp_path):
    published = vision_transformer(dataclasses.replace(VIT, feature="cls"))
    np.savez(tmp_path / "weights.npz", **published)
    backbone, provenance = convert.load(Backbone(weights=str(tmp_path / "weights.npz")), 24)
    assert backbone.config == dataclasses.replace(
        VIT, image_size=24, feature="cls", epsilon=1e-6, gelu="tanh", classes=0
    )
    assert provenance.origin == "vision_transformer ViT" and provenance.published_size == 16
    name = "Transformer/posembed_input/pos_embedding"
    np.testing.assert_array_equal(backbone.params["positions"], interpolate_positions(published[name], 6))
    image = pictures(1, 24)
    resized = published | {name: backbone.params["positions"]}
    expected = transcription(resized, backbone.config, image[0])
    assert relative_error(features(backbone.config, backbone.params, image)[0], expected) < TOLERANCE


def test_a_flax_msgpack_gives_the_parameters_of_the_safetensors(tmp_path, folder):
    from flax.serialization import msgpack_serialize

    tree = flax_tree(hugging_face_vit(prefix="vit."))  # with a classifier, as FlaxViTForImageClassification writes it
    assert tree["vit"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"].shape == (VIT.width, VIT.mlp)
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    assert_same(params_of(tmp_path / "flax_model.msgpack", heads=2), params_of(folder))
    (tmp_path / "config.json").write_text(json.dumps(settings_of(dataclasses.replace(VIT, epsilon=0.5, gelu="tanh"))))
    backbone, provenance = convert.load(Backbone(weights=str(tmp_path)))
    assert_same(flatten(backbone.params), params_of(folder))
    assert (backbone.config.epsilon, backbone.config.gelu, backbone.config.heads) == (0.5, "tanh", VIT.heads)
    assert provenance.origin == "Hugging Face ViT"


def test_shards_are_read_together(tmp_path, folder, arrays):
    shards = hub_folder(tmp_path, arrays, settings_of(VIT), shards=3)
    assert not (shards / "model.safetensors").exists()
    single, sharded = (convert.load(Backbone(weights=str(path))) for path in (folder, shards))
    assert single[0].digest == sharded[0].digest and single[1].sha256 != sharded[1].sha256
    alone = convert.load(Backbone(weights=str(folder / "model.safetensors")))[0]  # config.json beside it is read
    assert alone.digest == single[0].digest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, arrays, dtype):
    low = {name: np.asarray(jnp.asarray(array, dtype)) for name, array in arrays.items()}
    params = params_of(hub_folder(tmp_path, low, settings_of(VIT)))
    exact = {name: array.astype(np.float32) for name, array in low.items()}
    assert all(array.dtype == np.float32 for array in params.values())
    assert_same(params, flatten(freeze(exact)[0].params))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_biases_of_queries_keys_and_values_they_are_zero(family):
    make, config = FAMILIES[family]
    arrays = make(config)
    biases = [name for name in arrays if name.endswith(("query.bias", "key.bias", "value.bias"))]
    without = {name: array for name, array in arrays.items() if name not in biases}
    zeros = arrays | {name: np.zeros_like(arrays[name]) for name in biases}
    settings = settings_of(config) | {"qkv_bias": False}
    expected = flatten(freeze(zeros, settings)[0].params)
    assert_same(flatten(freeze(without, settings)[0].params), expected)
    joined = {name: array for name, array in timm(arrays).items() if not name.endswith("qkv.bias")}
    assert_same(flatten(freeze(joined, heads=2 if family == "vit" else 0)[0].params), expected)


def test_epsilon_gelu_and_heads_come_from_config_json(arrays):
    wanted = dataclasses.replace(VIT, heads=4, epsilon=0.25, gelu="tanh")
    assert freeze(arrays, settings_of(wanted))[0].config == dataclasses.replace(wanted, classes=0)
    alone = freeze(arrays)[0].config  # as transformers' code has them
    assert (alone.epsilon, alone.gelu, alone.heads) == (1e-12, "erf", 1)
    pairs = freeze(arrays, settings_of(VIT) | {"image_size": [16, 16], "patch_size": [4, 4]})[0].config
    assert (pairs.image_size, pairs.patch) == (16, 4)
    with pytest.raises(UserError, match=r"--config.backbone.heads=4: .* has 2"):
        freeze(arrays, settings_of(VIT), heads=4)
    assert freeze(arrays, settings_of(VIT), heads=2)[0].config.heads == 2
    wide = dataclasses.replace(VIT, width=24)
    settings = {name: value for name, value in settings_of(wide).items() if name != "num_attention_heads"}
    assert freeze(hugging_face_vit(wide), settings)[0].config.heads == 12


@pytest.mark.slow
def test_what_config_json_leaves_out_is_transformers_default():
    transformers = pytest.importorskip("transformers")
    kinds = {"Hugging Face ViT": transformers.ViTConfig, "Hugging Face DINOv2": transformers.Dinov2Config}
    kinds |= {"Hugging Face Swin": transformers.SwinConfig, "Hugging Face CLIP": transformers.CLIPVisionConfig}
    kinds |= {"Hugging Face DINOv2 with registers": transformers.Dinov2WithRegistersConfig}
    for name, kind in kinds.items():
        origin, gelu = BY_NAME[name], weight_settings.GELUS[kind().hidden_act]
        assert (kind().layer_norm_eps, gelu) == (origin.epsilon, origin.gelu)
        assert kind.model_type == (origin.model_type or origin.family)
        assert name == "Hugging Face Swin" or kind().num_attention_heads == weight_settings.VIT_HEADS


def test_positions_are_resized_as_the_origin_does_it(arrays):
    """transformers resizes without antialiasing, but for DINOv2 with registers; timm with it."""
    name, clip = "embeddings.position_embeddings", "vision_model.embeddings.position_embedding.weight"
    cases = [(arrays, name, False), (timm(arrays), "pos_embed", True), (hugging_face_clip(), clip, False)]
    cases += [(hugging_face_dinov2(), name, False), (hugging_face_dinov2(REGISTERS), name, True)]
    for saved, name, antialias in cases:
        positions = saved[name].reshape(1, -1, VIT.width)
        resized = freeze(saved, image_size=8)[0].params["positions"]
        np.testing.assert_array_equal(resized, interpolate_positions(positions, 2, antialias))
        assert np.abs(resized - interpolate_positions(positions, 2, not antialias)).max() > 0.01


MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def normalisation(path, **settings):
    backbone, _ = convert.load(Backbone(weights=str(path), **settings))
    return backbone.mean, backbone.std


def test_the_normalisation_is_that_of_the_settings_the_name_the_file_or_the_family(tmp_path, monkeypatch, arrays):
    folder = hub_folder(tmp_path / "vit", arrays, settings_of(VIT))
    assert normalisation(folder) == zoo.HALF  # ViT's usual one
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert normalisation(folder) == (MEAN, STD)
    assert normalisation(folder, mean="0.7") == ((0.7,), STD)
    assert normalisation(folder, mean="0.7", std="1,2,3") == ((0.7,), (1.0, 2.0, 3.0))
    assert convert.load(Backbone(weights=str(folder)))[0].digest != freeze(arrays, settings_of(VIT))[0].digest
    entry = dataclasses.replace(zoo.ZOO["vit-ti"], architecture=VIT, normalisation=(STD, MEAN))
    monkeypatch.setitem(zoo.ZOO, "vit-ti", entry)
    assert normalisation(folder, name="vit-ti") == (STD, MEAN)
    assert normalisation(folder, name="vit-ti", std="0.9") == (STD, (0.9,))
    swin = timm(hugging_face_swin())
    config = {"architecture": "swin", "pretrained_cfg": {"mean": MEAN, "std": STD}}  # as timm writes it
    assert normalisation(hub_folder(tmp_path / "timm", swin, config)) == (MEAN, STD)
    assert normalisation(hub_folder(tmp_path / "swin", swin, {"architecture": "swin"})) == zoo.IMAGENET


def test_a_grey_backbone_takes_the_mean_of_the_colours():
    grey = ViTConfig(image_size=8, patch=4, width=16, depth=1, heads=1, mlp=16, channels=1)
    weights = Weights("weights", hugging_face_vit(grey), "", settings_of(grey), normalisation=(MEAN, STD))
    backbone, provenance = convert.freeze(weights, Backbone())
    assert provenance.notes == ("mean and std of the one channel are the means of those of the colours",)
    assert backbone.mean == pytest.approx((0.2,)) and backbone.std == pytest.approx((0.5,))
    backbone, _ = convert.freeze(weights, Backbone(mean="0.7,0.7,0.1"))
    assert backbone.mean == pytest.approx((0.5,))


def test_the_feature_is_that_of_the_settings_the_name_or_the_file(monkeypatch, folder):
    def feature(**settings):
        return convert.load(Backbone(weights=str(folder), **settings))[0].config.feature

    entry = dataclasses.replace(zoo.ZOO["vit-ti"], architecture=dataclasses.replace(VIT, feature="cls"))
    monkeypatch.setitem(zoo.ZOO, "vit-ti", entry)
    assert feature() == feature(feature="pooler") == feature(name="vit-ti", feature="pooler") == "pooler"
    assert feature(feature="cls") == feature(name="vit-ti") == "cls"
    backbone, provenance = convert.load(Backbone(weights=str(folder), feature="cls"))
    assert "pooler" not in backbone.params and {"pooler/kernel", "pooler/bias"} <= set(provenance.left_out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_of_dinov2_and_clip_matches_the_transcription(tmp_path, kind):
    config = KINDS[kind]
    arrays = hugging_face_clip() if kind == "clip" else hugging_face_dinov2(config)
    backbone, provenance = convert.load(Backbone(weights=str(hub_folder(tmp_path, arrays, settings_of(config, kind)))))
    assert backbone.config == config and architecture_from(describe(config)) == config
    assert backbone.mean == (zoo.CLIP if kind == "clip" else zoo.IMAGENET)[0]
    image = pictures(1, config.image_size)
    ours = outputs(config, backbone.params, image)
    states, feature = dinov2_or_clip(published.dinov2_or_clip(config), config, image[0])
    for ours_state, expected in zip(ours["states"], states, strict=True):
        assert relative_error(ours_state[0], expected) < TOLERANCE
    assert relative_error(ours["features"][0], feature) < TOLERANCE
    left_out = {"clip": "visual_projection.weight", "dinov2": "embeddings.mask_token"}[kind[:6]]
    assert left_out in provenance.left_out and provenance.notes[0].startswith("assumed, as no file beside the weights")


def test_timms_names_of_dinov2_and_clip_give_the_same_features():
    """timm keeps no position for the class token beside registers: it is added to the token."""
    for config, authors in ((DINOV2, True), (REGISTERS, False), (REGISTERS, True)):
        arrays = published.dinov2_or_clip(config)
        renamed = timm(arrays) | {"mask_token": np.zeros((1, 16), np.float32)}
        if config.registers and authors:
            renamed["register_tokens"] = renamed.pop("reg_token")
        elif config.registers:
            renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
            renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
        backbone, provenance = freeze(renamed, heads=2)
        wanted = dataclasses.replace(config, epsilon=1e-6)
        assert (provenance.origin, backbone.config, backbone.mean) == ("timm DINOv2", wanted, zoo.IMAGENET[0])
        expected = dinov2_or_clip(arrays, wanted, pictures(1, 16)[0])[1]
        assert relative_error(features(wanted, backbone.params, pictures(1, 16))[0], expected) < TOLERANCE
    backbone, provenance = freeze(timm(published.dinov2_or_clip(CLIP)), heads=2)
    assert provenance.origin == "timm CLIP" and backbone.config == dataclasses.replace(CLIP, epsilon=1e-5)
    assert backbone.mean == zoo.CLIP[0] and "GELU sigmoid" in provenance.notes[0]
    assert_same(flatten(backbone.params), flatten(freeze(hugging_face_clip())[0].params))


def test_flax_names_of_dinov2_and_clip_give_the_parameters_of_the_safetensors():
    for arrays in (hugging_face_clip(), hugging_face_dinov2(REGISTERS)):
        name = "vision_model.embeddings.position_embedding."
        tree = flax_tree({key.replace(f"{name}weight", f"{name}embedding"): a for key, a in arrays.items()})
        assert freeze(flatten(tree), heads=2)[0].digest == freeze(arrays, heads=2)[0].digest


@pytest.mark.slow
def test_real_weights_reproduce_the_reference(shared):
    """timm's ViT-Tiny on 17 photographs: logits, features and every label; then at a smaller size."""
    path = shared / "weights" / "vit_tiny_patch16_224_imagenet1k.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path.with_name("vit_tiny_check_17.npz"), allow_pickle=False) as file:
        images, labels, logits, cls = (file[name] for name in ("images", "labels", "logits", "cls_features"))
    vit, params, provenance = convert.parameters(read(str(path)), Backbone())
    sizes = {"width": 192, "depth": 12, "heads": 3, "mlp": 768, "classes": 1000}
    assert vit == ViTConfig(image_size=224, patch=16, channels=3, feature="cls", **sizes)
    assert provenance.origin == "timm ViT" and set(provenance.left_out) == {"head/kernel", "head/bias"}
    pixels = (images.astype(np.float32) / 255 - 0.5) / 0.5
    answers = np.asarray(jax.jit(functools.partial(backbone_lib.features_and_logits, vit))(params, pixels)[1])
    assert np.abs(answers - logits).max() < 1e-3 and (answers.argmax(axis=1) == labels).all()
    named = convert.load(Backbone(name="vit-ti", weights=str(path)), 224)[0]
    assert np.abs(features(named.config, named.params, pixels) - cls).max() < 1e-3
    small = convert.load(Backbone(weights=str(path)), 64)[0]
    assert small.params["positions"].shape == (1, 17, 192)
    answers = np.asarray(features(small.config, small.params, pixels[:2, :64, :64]))
    assert np.isfinite(answers).all() and np.abs(answers[0] - answers[1]).max() > 1e-2
    with pytest.raises(UserError, match=r"is not vit-s(.|\n)*width is 192, vit-s has 384"):
        convert.load(Backbone(name="vit-s", weights=str(path)))
