"""Weights that are no backbone: every contradiction and every array that does not fit is named at once."""

import numpy as np
import pytest
from published import (
    DINOV2,
    REGISTERS,
    SWIN,
    VIT,
    hugging_face_clip,
    hugging_face_dinov2,
    hugging_face_swin,
    hugging_face_vit,
    settings_of,
    timm,
)

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import convert
from lmeraser_jax.models.weight_files import Weights


def refusal(arrays, settings=None, image_size: int = 0, **chosen) -> str:
    """The message for arrays that were read."""
    with pytest.raises(UserError) as caught:
        convert.freeze(Weights("FILE", arrays, "", settings or {}), Backbone(**chosen), image_size)
    assert "FILE" in str(caught.value) or "--config." in str(caught.value)
    return str(caught.value)


def assert_lines(message: str, lines: list[tuple[str, ...]]) -> None:
    """The message has a heading and exactly these lines, each with its words."""
    found = message.splitlines()[1:]
    assert len(found) == len(lines), message
    for words in lines:
        assert sum(all(word in line for word in words) for line in found) == 1, (words, message)


def test_weights_of_another_backbone_than_the_named_one():
    other = "swin-b-22k is a Swin, the weights are a ViT"
    cases = [(hugging_face_vit, VIT, "vit-b-22k", other), (hugging_face_swin, SWIN, "swin-b-1k", "weights are a Swin")]
    for make, config, name, kinds in cases:
        heading, *lines = refusal(make(config), settings_of(config), name=name).splitlines()
        assert heading.startswith("FILE is not ") and "--config.backbone.name" in heading and len(lines) >= 4
        assert any("width is 16" in line for line in lines) and any("patch is" in line for line in lines)
        another = "swin-b-22k" if config is VIT else "vit-b-1k"
        assert kinds in refusal(make(config), settings_of(config), name=another)


def test_a_config_json_that_contradicts_the_arrays():
    for kind in ("swin", "deit", "nonsense"):
        message = refusal(hugging_face_vit(), settings_of(VIT) | {"model_type": kind})
        assert f"config.json says model_type={kind}, the arrays are those of a vit" in message
    wrong = {"hidden_size": 32, "num_hidden_layers": "three", "image_size": [16, 8], "hidden_act": "relu"}
    message = refusal(hugging_face_vit(), settings_of(VIT) | wrong)
    assert "do not belong together" in message
    lines = [("hidden_size is 32 in config.json, 16 in the arrays",), ("num_hidden_layers is three", "2 in the arrays")]
    assert_lines(message, [*lines, ("image_size is [16, 8]", "16 in the arrays"), ("hidden_act=relu; known: gelu",)])
    for name, value in {"depths": [2, 1, 3], "window_size": 8, "num_heads": [2, 4, 8], "embed_dim": 32}.items():
        message = refusal(hugging_face_swin(), settings_of(SWIN) | {name: value})
        assert f"{name} is {value} in config.json" in message and message.count("in the arrays") == 1


def test_an_unknown_layout_lists_the_known_ones_and_what_is_lacking():
    names = [f"img/Transformer/encoderblock/{name}/kernel" for name in "abcdefghijklmn"]
    message = refusal({name: np.zeros((2, 2), np.float32) for name in names})
    for known in ("Hugging Face ViT", "Hugging Face Swin", "timm ViT", "timm Swin", "vision_transformer ViT"):
        assert known in message
    assert "img.Transformer.encoderblock.a.kernel" in message and "(14 in all)" in message
    assert "its arrays: none" in refusal({})
    arrays = hugging_face_vit()
    del arrays["embeddings.position_embeddings"]
    assert "Hugging Face ViT has embeddings.position_embeddings, and this has not" in refusal(arrays)


def test_all_mismatches_are_listed_at_once():
    arrays = hugging_face_swin()
    del arrays["encoder.layers.0.blocks.1.layernorm_after.bias"]
    del arrays["encoder.layers.1.downsample.reduction.weight"]
    arrays["extra.weight"] = np.zeros((3, 5), np.float32)
    arrays["encoder.layers.2.blocks.0.output.dense.bias"] = np.zeros(7, np.float32)
    arrays["encoder.layers.2.blocks.1.attention.self.relative_position_bias_table"] = np.zeros((25, 4), np.float32)
    message = refusal(arrays, settings_of(SWIN))
    assert message.startswith("the weights FILE do not fit")
    lines = [
        ("missing", "stages/0/blocks/1/norm2/bias", "[16]"),
        ("missing", "stages/1/merging/reduction/kernel", "[128, 64]"),
        ("not used", "extra/kernel", "[5, 3]"),
        ("stages/2/blocks/0/mlp/fc2/bias", "[7]", "[64]"),
        ("stages/2/blocks/1/attention/table", "[25, 4]", "[49, 4]"),
    ]
    assert_lines(message, lines)


def test_queries_keys_and_values_that_do_not_fit_are_listed():
    stem = "encoder.layer.1.attention.attention"
    for name in ("query.weight", "key.weight", "value.bias"):
        for shape in ((), (3,), (16, 8), (2, 2, 2)):
            message = refusal(hugging_face_vit() | {f"{stem}.{name}": np.zeros(shape, np.float32)}, settings_of(VIT))
            assert "do not fit the backbone" in message and "blocks/1/attention/" in message, (name, shape)
    arrays = hugging_face_vit()
    del arrays[f"{stem}.key.weight"]
    message = refusal(arrays, settings_of(VIT))
    assert "missing: blocks/1/attention/qkv/kernel [16, 48]" in message
    assert message.count("not used: blocks/1/attention/") >= 2
    for shape in ((), (5,), (47, 16), (2, 3, 4)):
        joined = timm(hugging_face_vit()) | {"blocks.1.attn.qkv.weight": np.zeros(shape, np.float32)}
        expected = f"blocks/1/attention/qkv/kernel: the file has {list(shape[::-1])}, the model needs [16, 48]"
        assert expected in refusal(joined, heads=2)


def test_shapes_from_which_no_architecture_can_be_read():
    shapes = [
        ("pos_embed", (1, 11, 16), "positions [1, 11, 16]"),  # class and distillation token: no square grid
        ("pos_embed", (1, 0, 16), "positions [1, 0, 16]"),
        ("pos_embed", (1, 1, 16), "positions [1, 1, 16]"),
        ("pos_embed", (11, 16), "positions [1, 11, 16]"),
        ("patch_embed.proj.weight", (16, 16), "embed/kernel [16, 16]"),
        ("patch_embed.proj.weight", (16, 3, 0, 0), "embed/kernel [0, 0, 3, 16]"),
        ("patch_embed.proj.weight", (16, 1, 4, 2), "embed/kernel [4, 2, 1, 16]: patches must be square"),
        ("blocks.0.mlp.fc1.weight", (), "blocks/0/mlp/fc1/kernel []"),
        ("head.weight", (), "head/kernel []"),
    ]
    for name, shape, expected in shapes:
        message = refusal(timm(hugging_face_vit()) | {name: np.zeros(shape, np.float32)})
        assert expected in message and "looks like timm ViT" in message
    arrays = timm(hugging_face_vit())
    del arrays["blocks.0.mlp.fc1.weight"]
    assert "missing: blocks/0/mlp/fc1/kernel" in refusal(arrays)
    for name in [name for name in arrays if name.startswith("blocks.1.")]:
        arrays[name.replace("blocks.1.", "blocks.3.")] = arrays.pop(name)
    arrays["blocks.0.mlp.fc1.weight"] = np.zeros((24, 16), np.float32)
    message = refusal(arrays)
    assert "missing: blocks/1/" in message and "missing: blocks/2/" in message


def test_bias_tables_that_do_not_fit():
    table = "layers.{}.blocks.{}.attn.relative_position_bias_table"
    for shape in ((), (49,), (48, 2), (64, 2), (49, 0)):
        arrays = timm(hugging_face_swin()) | {table.format(0, 0): np.zeros(shape, np.float32)}
        assert "stages/0/blocks/0/attention/table" in refusal(arrays), shape
    wrong = {table.format(0, block): np.zeros((49, 3), np.float32) for block in range(SWIN.depths[0])}
    message = refusal(timm(hugging_face_swin()) | wrong)
    assert "the bias tables of stage 0 are for 3 heads, which do not divide its width 16" in message
    arrays = timm(hugging_face_swin())
    del arrays[table.format(1, 0)]
    assert "missing: stages/1/blocks/0/attention/table" in refusal(arrays)


def test_one_parameter_under_two_names():
    arrays = hugging_face_vit()
    arrays["model.layernorm.scale"] = arrays["layernorm.weight"]
    assert "norm/scale" in refusal(arrays) and "so does another array" in refusal(arrays)


def test_arrays_that_are_not_floating_point_or_not_finite_are_all_named():
    cases = [(dtype, 1, f"must be floating point, is {dtype}") for dtype in ("int32", "uint8", "bool", "complex64")]
    finite = "must be finite, has 1 inf or NaN of"
    for dtype, value, words in (*cases, ("f4", np.nan, finite), ("f2", np.inf, finite), ("f8", 1e300, finite)):
        arrays = hugging_face_vit()
        for name in ("layernorm.bias", "encoder.layer.1.output.dense.weight"):
            arrays[name] = arrays[name].astype(dtype)
            arrays[name].flat[3] = value
        message = refusal(arrays)
        assert message.count(words) == 2 and "layernorm.bias" in message and "1.output.dense.weight" in message, dtype


def test_settings_that_the_weights_cannot_serve():
    swin = settings_of(SWIN)
    for feature in ("cls", "pooler"):
        message = refusal(hugging_face_swin(), swin, image_size=33, feature=feature)
        assert f"--config.backbone.feature={feature}" in message and "use auto" in message
        assert "--config.data.image_size=33: must be a multiple of the patch size 2" in message
    message = refusal(timm(hugging_face_vit()), image_size=33, heads=5)
    assert "--config.data.image_size=33: must be a multiple of the patch size 4" in message
    assert "--config.backbone.heads=5: must divide the width 16" in message
    without = {name: array for name, array in hugging_face_vit().items() if "pooler" not in name}
    message = refusal(without, feature="pooler")
    assert "missing: pooler/kernel" in message and "missing: pooler/bias" in message


def test_a_gated_mlp_is_refused_by_name():
    arrays = hugging_face_dinov2()
    for name in [name for name in arrays if ".mlp.fc" in name]:
        arrays[name.replace("fc1", "weights_in").replace("fc2", "weights_out")] = arrays.pop(name)
    gated = {"encoder.layer.0.mlp.weights_in.weight": np.zeros((64, 16), np.float32)}
    assert "SwiGLU" in refusal(arrays | gated, settings_of(DINOV2, "dinov2"))
    assert "SwiGLU" in refusal(
        timm(hugging_face_dinov2()) | {"blocks.0.mlp.fc1.weight": np.zeros((64, 16), np.float32)}
    )
    stated = settings_of(DINOV2, "dinov2") | {"use_swiglu_ffn": True, "hidden_act": "relu"}
    message = refusal(hugging_face_dinov2(), stated)
    assert "use_swiglu_ffn=true is not supported" in message and "hidden_act=relu; known: gelu" in message


def test_layer_scale_is_complete_and_fits_or_is_named():
    arrays = hugging_face_dinov2()
    del arrays["encoder.layer.1.layer_scale1.lambda1"]
    arrays["encoder.layer.1.layer_scale2.lambda1"] = np.ones(5, np.float32)
    arrays["encoder.layer.7.layer_scale2.lambda1"] = np.ones(16, np.float32)
    message = refusal(arrays)
    assert "missing: blocks/1/attention/out/gamma" in message
    assert "blocks/1/mlp/fc2/gamma [5]: does not fit blocks/1/mlp/fc2/kernel [32, 16]" in message
    arrays = hugging_face_dinov2() | {"encoder.layer.1.layer_scale3.lambda1": np.ones(16, np.float32)}
    assert "not used: blocks/1/layer_scale3/lambda1" in refusal(arrays, settings_of(DINOV2, "dinov2"))


def test_what_contradicts_the_arrays_of_dinov2_and_clip():
    settings = settings_of(REGISTERS, "dinov2_with_registers")
    message = refusal(hugging_face_dinov2(REGISTERS), settings | {"num_register_tokens": 4, "patch_size": 16})
    assert "num_register_tokens is 4 in config.json, 3 in the arrays" in message
    assert "patch_size is 16 in config.json, 4 in the arrays" in message
    for arrays, kind in ((hugging_face_dinov2(), "dinov2"), (hugging_face_clip(), "clip_vision_model")):
        message = refusal(arrays, settings_of(VIT))
        assert f"config.json says model_type=vit, the arrays are those of a {kind}" in message
    args = {"architecture": "vit_small_patch14_reg4_dinov2", "model_args": {"reg_tokens": 4, "pre_norm": True}}
    message = refusal(timm(hugging_face_dinov2()), args)
    assert "reg_tokens is 4 in config.json, 0 in the arrays" in message and "pre_norm is True" in message
    message = refusal(hugging_face_dinov2(REGISTERS), settings, name="dinov2-s")
    assert "registers is 3, dinov2-s has 0" in message and "patch is 4, dinov2-s has 14" in message
    assert "pre_norm is False, clip-b-32 has True" in refusal(hugging_face_dinov2(), heads=2, name="clip-b-32")
    message = refusal(hugging_face_dinov2(), image_size=35, heads=2)
    assert "--config.data.image_size=35: must be a multiple of the patch size 4, such as 36" in message
