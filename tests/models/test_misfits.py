"""Weights that are no backbone: every contradiction and every array that does not fit is named at once."""

import numpy as np
import pytest
from published import SWIN, VIT, hugging_face_swin, hugging_face_vit, settings_of, timm_swin

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import convert
from lmeraser_jax.models.weight_files import Weights


def refused(arrays, settings=None, image_size: int = 0, **chosen) -> str:
    """The message for arrays that were read."""
    with pytest.raises(UserError) as caught:
        convert.freeze(Weights("FILE", arrays, "", settings or {}), Backbone(**chosen), image_size)
    return str(caught.value)


# -- weights of something else --


@pytest.mark.parametrize(("make", "config"), [(hugging_face_vit, VIT), (hugging_face_swin, SWIN)], ids=["vit", "swin"])
def test_weights_of_another_backbone_than_the_named_one(make, config):
    arrays, settings = make(config), settings_of(config)
    message = refused(arrays, settings, name="vit-b-22k" if config is VIT else "swin-b-1k")
    heading, *lines = message.splitlines()
    assert heading.startswith("FILE is not ") and "--config.backbone.name" in heading
    assert any("width is 16" in line for line in lines) and any("patch is" in line for line in lines)
    assert len(lines) >= 4
    message = refused(arrays, settings, name="swin-b-22k" if config is VIT else "vit-b-1k")
    assert ("swin-b-22k is a Swin, the weights are a ViT" if config is VIT else "the weights are a Swin") in message


@pytest.mark.parametrize("kind", ["swin", "deit", "bert", "nonsense"])
def test_config_json_of_another_family(kind):
    message = refused(hugging_face_vit(), {**settings_of(VIT), "model_type": kind})
    assert f"config.json says model_type={kind}, the arrays are those of a vit" in message


def test_config_json_that_contradicts_the_arrays():
    wrong = {"hidden_size": 32, "num_hidden_layers": 3, "image_size": [16, 8]}
    message = refused(hugging_face_vit(), settings_of(VIT) | wrong)
    assert "do not belong together" in message and len(message.splitlines()) == 4
    for line in (
        "hidden_size is 32 in config.json, 16 in the arrays",
        "num_hidden_layers is 3 in config.json, 2 in the arrays",
        "image_size is [16, 8] in config.json, 16 in the arrays",
    ):
        assert f"- {line}" in message


@pytest.mark.parametrize(
    ("name", "value"), [("depths", [2, 1, 3]), ("window_size", 8), ("num_heads", [2, 4, 8]), ("embed_dim", 32)]
)
def test_config_json_that_contradicts_the_arrays_of_a_swin(name, value):
    message = refused(hugging_face_swin(), {**settings_of(SWIN), name: value})
    assert f"{name} is {value} in config.json" in message and message.count("in the arrays") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "relu"), ("pooler_act", "gelu"), ("use_absolute_embeddings", True)],
)
def test_config_json_that_asks_for_what_there_is_not(name, value):
    family = (hugging_face_swin, SWIN) if name.startswith("use") else (hugging_face_vit, VIT)
    message = refused(family[0](), {**settings_of(family[1]), name: value})
    assert f"{name}={str(value).lower() if value is True else value}" in message


def test_an_unknown_layout_lists_the_known_ones():
    names = [f"img/Transformer/encoderblock/{name}/kernel" for name in "abcdefghijklmn"]
    message = refused({name: np.zeros((2, 2), np.float32) for name in names})
    for known in ("Hugging Face ViT", "Hugging Face Swin", "timm ViT", "timm Swin", "vision_transformer ViT"):
        assert known in message
    assert "img.Transformer.encoderblock.a.kernel" in message and "(14 in all)" in message
    assert "its arrays: none" in refused({})


def test_a_layout_that_lacks_little_says_what():
    arrays = hugging_face_vit()
    del arrays["embeddings.position_embeddings"]
    assert "Hugging Face ViT has embeddings.position_embeddings, and this has not" in refused(arrays)


# -- arrays that do not fit --


def test_all_mismatches_are_listed_at_once():
    arrays = hugging_face_swin()
    del arrays["encoder.layers.0.blocks.1.layernorm_after.bias"]
    del arrays["encoder.layers.1.downsample.reduction.weight"]
    arrays["extra.weight"] = np.zeros((3, 5), np.float32)
    arrays["encoder.layers.2.blocks.0.output.dense.bias"] = np.zeros(7, np.float32)
    arrays["encoder.layers.2.blocks.1.attention.self.relative_position_bias_table"] = np.zeros((25, 4), np.float32)
    lines = refused(arrays, settings_of(SWIN)).splitlines()
    assert lines[0].startswith("the weights FILE do not fit") and len(lines) == 6
    for needles in (
        ("missing", "stages/0/blocks/1/norm2/bias", "[16]"),
        ("missing", "stages/1/merging/reduction/kernel", "[128, 64]"),
        ("not used", "extra/kernel", "[5, 3]"),
        ("stages/2/blocks/0/mlp/fc2/bias", "[7]", "[64]"),
        ("stages/2/blocks/1/attention/table", "[25, 4]", "[49, 4]"),
    ):
        assert sum(all(needle in line for needle in needles) for line in lines) == 1, needles


@pytest.mark.parametrize("part", ["query.weight", "key.weight", "value.bias"])
@pytest.mark.parametrize("shape", [(), (3,), (16, 8), (2, 2, 2)], ids=str)
def test_misshapen_queries_keys_and_values_are_listed(part, shape):
    arrays = hugging_face_vit()
    arrays[f"encoder.layer.1.attention.attention.{part}"] = np.zeros(shape, np.float32)
    message = refused(arrays, settings_of(VIT))
    assert "do not fit the backbone" in message and "blocks/1/attention/" in message


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_missing_query_key_or_value(part):
    arrays = hugging_face_vit()
    del arrays[f"encoder.layer.0.attention.attention.{part}.weight"]
    message = refused(arrays, settings_of(VIT))
    assert "missing: blocks/0/attention/qkv/kernel [16, 48]" in message
    assert message.count("not used: blocks/0/attention/") >= 2


@pytest.mark.parametrize("shape", [(), (49,), (48, 2), (64, 2), (49, 0)], ids=str)
def test_a_bias_table_that_tells_no_window(shape):
    arrays = timm_swin(hugging_face_swin())
    arrays["layers.0.blocks.0.attn.relative_position_bias_table"] = np.zeros(shape, np.float32)
    assert "stages/0/blocks/0/attention/table" in refused(arrays)


def test_a_bias_table_for_heads_that_do_not_divide_the_width():
    arrays = timm_swin(hugging_face_swin())
    for block in range(SWIN.depths[0]):
        arrays[f"layers.0.blocks.{block}.attn.relative_position_bias_table"] = np.zeros((49, 3), np.float32)
    assert "the bias tables of stage 0 are for 3 heads, which do not divide its width 16" in refused(arrays)


def test_a_stage_without_its_bias_table():
    arrays = timm_swin(hugging_face_swin())
    del arrays["layers.1.blocks.0.attn.relative_position_bias_table"]
    assert "missing: stages/1/blocks/0/attention/table" in refused(arrays)


def test_one_parameter_under_two_names():
    arrays = hugging_face_vit()
    arrays["model.layernorm.scale"] = arrays["layernorm.weight"]
    assert "norm/scale" in refused(arrays) and "so does another array" in refused(arrays)


def test_swin_has_one_feature():
    arrays, settings = hugging_face_swin(), settings_of(SWIN)
    for feature in ("cls", "pooler"):
        message = refused(arrays, settings, feature=feature)
        assert f"--config.backbone.feature={feature}" in message and "auto" in message


@pytest.mark.parametrize(("make", "config"), [(hugging_face_vit, VIT), (hugging_face_swin, SWIN)], ids=["vit", "swin"])
def test_an_image_size_that_is_no_multiple_of_the_patch(make, config):
    message = refused(make(), settings_of(config), image_size=33)
    assert f"--config.data.image_size=33: must be a multiple of the patch size {config.patch}" in message
