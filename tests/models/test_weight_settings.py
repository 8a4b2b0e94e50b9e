"""What stands beside published weights decides the features: honoured, refused by name, or said in a line."""

import dataclasses
import json

import numpy as np
import pytest
from published import (
    CLIP,
    SWIN,
    VIT,
    dinov2_or_clip,
    hub_folder,
    hugging_face_clip,
    hugging_face_swin,
    hugging_face_vit,
    settings_of,
    timm,
)

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import convert

WIDE = dataclasses.replace(VIT, width=64, heads=2, feature="cls", epsilon=1e-6, classes=0)
NARROW = dataclasses.replace(WIDE, width=8)
TIMM = {"architecture": "test_vit", "global_pool": "token"}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
GREY = {"image_mean": 0.5, "image_std": 0.5}


@pytest.fixture
def read(tmp_path, capfd):
    """A function that reads weights with files beside them: the backbone and the line that was printed, or refusals."""

    def read_all(arrays, config, processor=None, file="preprocessor_config.json", **chosen):
        folder = hub_folder(tmp_path / "weights", arrays, config)
        (folder / file).write_text(json.dumps(processor or {}))
        try:
            backbone, provenance = convert.load(Backbone(weights=str(folder), **chosen))
        except UserError as error:
            return None, str(error)
        finally:
            (folder / file).unlink()
        printed = capfd.readouterr().err
        assert printed.count("\n") == bool(provenance.notes) and all(note in printed for note in provenance.notes)
        return backbone, printed

    return read_all


@pytest.fixture(scope="module")
def wide():
    return timm(hugging_face_vit(WIDE))


def processed(pixels: np.ndarray, processor) -> np.ndarray:
    """uint8 [N, 3] as an image processor of transformers prepares them: rescale, then normalise."""
    x = pixels.astype(np.float64)
    x = x * (processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else x
    if not processor.get("do_normalize", True):
        return x
    return (x - np.array(processor["image_mean"])) / np.array(processor["image_std"])


def test_pixels_reach_the_network_as_the_image_processor_prepares_them(read):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    lists = {"image_mean": MEAN, "image_std": STD}
    cases = [lists, GREY, {"do_normalize": False}, lists | {"do_normalize": False}, lists | {"rescale_factor": 0.003}]
    cases += [{"do_normalize": False, "do_rescale": False}, {"do_rescale": False, "image_mean": 127.5, "image_std": 9}]
    cases += [{"rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": [1, 2, 3]}]
    for processor in cases:
        nested = {"image_processor": processor, "processor_class": "X"}
        for content, file in ((processor, "preprocessor_config.json"), (nested, "processor_config.json")):
            backbone, printed = read(hugging_face_vit(), settings_of(VIT), content, file)
            assert backbone and not printed, (content, printed)
            ours = (pixels / 255 - np.array(backbone.mean)) / np.array(backbone.std)
            np.testing.assert_allclose(ours, processed(pixels, processor), rtol=1e-6, atol=1e-6, err_msg=str(content))


def test_a_normalisation_that_cannot_be_used_is_refused_unless_the_user_sets_it(read):
    cases = {
        "std is missing": {"image_mean": MEAN},
        "mean is missing": {"image_std": 0.5},
        "do_normalize=no": GREY | {"do_normalize": "no"},
        "do_rescale=None": GREY | {"do_rescale": None},
        "rescale_factor=0": GREY | {"rescale_factor": 0},
        "std=(0.5, 0.0, 0.5)": GREY | {"image_std": [0.5, 0, 0.5]},
        "std=1000": GREY | {"image_std": 10**400},
        "std=(-1.0,)": GREY | {"image_std": -1},
        "std=nan": GREY | {"image_std": float("nan")},
        "mean=[inf]": GREY | {"image_mean": [float("inf")]},
        "mean=[]": GREY | {"image_mean": []},
        "mean=True": GREY | {"image_mean": True},
        "mean=['a']": GREY | {"image_mean": ["a"]},
        "mean=(123.7,)": GREY | {"image_mean": 123.7},
        "do_flip_channel_order=true": GREY | {"do_flip_channel_order": True},
        "(0.0, 1.0): the backbone has 3 channels": {"image_mean": [0, 1], "image_std": 1},
        "image_processor has mean (0.4,)": GREY | {"image_processor": {"image_mean": 0.4, "image_std": 0.5}},
    }
    for expected, processor in cases.items():
        backbone, message = read(hugging_face_vit(), settings_of(VIT), processor)
        assert not backbone and expected in message and "--config.backbone.std" in message, (expected, message)
        backbone, _ = read(hugging_face_vit(), settings_of(VIT), processor, mean="0.25", std="0.75")
        assert backbone and (backbone.mean, backbone.std) == ((0.25,), (0.75,)), expected
    backbone, message = read(hugging_face_vit(), settings_of(VIT), {"image_mean": MEAN}, std="0.75")
    assert backbone and (backbone.mean, backbone.std) == ((*MEAN,), (0.75,)), message


def test_a_timm_config_is_read_wherever_it_says_something(read, wide):
    numbers = {"mean": MEAN, "std": STD, "input_size": [3, 16, 16]}
    for config in (TIMM | {"pretrained_cfg": numbers}, TIMM | numbers):
        backbone, printed = read(wide, config)
        assert backbone and not printed and (backbone.mean, backbone.std) == ((*MEAN,), (*STD,)), config
        assert backbone.config == WIDE  # heads of 32, as timm's code has that architecture
    args = {"num_heads": 8, "act_layer": "gelu_tanh", "embed_dim": 64, "qkv_bias": True}
    backbone, _ = read(wide, {"architecture": "mine", "model_args": args})
    assert backbone and (backbone.config.heads, backbone.config.gelu) == (8, "tanh")
    backbone, _ = read(wide, {"architecture": "mine", "model_args": {"act_layer": "quick_gelu"}}, heads=4)
    assert backbone and (backbone.config.heads, backbone.config.gelu) == (4, "sigmoid")
    swin, _ = read(
        timm(hugging_face_swin()), {"architecture": "swin_mine", "pretrained_cfg": {"input_size": [3, 48, 48]}}
    )
    assert swin and swin.config.image_size == 48
    assert read(wide, TIMM | {"global_pool": "avg"}, feature="cls")[0]


def test_what_the_networks_do_not_have_is_refused_by_name(read, wide):
    args = {"act_layer": "relu", "qk_norm": True, "mlp_layer": "swiglu", "norm_layer": "rmsnorm", "num_heads": 2.5}
    args |= {"qkv_bias": False, "img_size": 32, "reg_tokens": 4, "class_token": False}
    _, message = read(wide, TIMM | {"global_pool": "avg", "num_features": 8, "model_args": args})
    for key in ("global_pool=avg", "num_features", *args):
        assert key in message, key
    _, message = read(wide, {"architecture": "vit_base_patch32_224"})
    assert "architecture=vit_base_patch32_224: width is 768" in message and "its patch is 32" in message
    huge = {"architecture": "vit_huge_patch14_224"}  # 16 heads, whatever the width
    assert (
        "avg" in read(wide, TIMM | {"model_args": {"global_pool": "avg"}})[1] and read(wide, huge)[0].config.heads == 16
    )
    assert "16 heads, which config.json calls for" in read(timm(hugging_face_vit(NARROW)), huge)[1]
    args = {"always_partition": True, "norm_layer": "layernorm", "num_heads": [2, 4, 8]}
    _, message = read(timm(hugging_face_swin()), {"architecture": "swin_x", "global_pool": "max", "model_args": args})
    assert all(key in message for key in ("global_pool=max; known: avg", *args))
    backbone, _ = read(wide, TIMM | {"model_args": {"num_heads": 4.0}})
    assert backbone and isinstance(backbone.config.heads, int) and backbone.config.heads == 4
    wrong = {"hidden_act": ["gelu"], "pooler_act": "gelu", "layer_norm_eps": "small", "num_attention_heads": 2.5}
    for values in (wrong, {"hidden_act": "relu", "num_attention_heads": True, "layer_norm_eps": 0, "qkv_bias": False}):
        for config in (settings_of(VIT), {}):  # also without a model_type
            message = read(hugging_face_vit(), config | values)[1]
            assert all(key in message for key in values), (message, values)


def test_what_was_assumed_and_what_is_not_known_is_one_line(read, wide):
    _, printed = read(
        wide, {"architecture": "mine", "model_args": {"magic": 1}, "pretrained_cfg": {"crop_pct": 0.9, "q": 2}}
    )
    expected = ("1 heads of 64", "GELU erf", "epsilon 1e-06", "class token", "mean (0.5, 0.5, 0.5)", "model_args.magic")
    assert all(words in printed for words in (*expected, "pretrained_cfg.q", "crop_pct=0.9")), printed
    _, printed = read(
        hugging_face_vit(), settings_of(VIT) | {"magic": 1}, GREY | {"do_magic": 1, "size": {"shortest_edge": 20}}
    )
    assert "magic, do_magic" in printed and "size=" in printed and "assumed," not in printed
    known = {
        "architectures": ["ViTModel"],
        "torch_dtype": "float32",
        "id2label": {"0": "mean"},
        "label2id": {"mean": 0},
    }
    usual = {"do_resize": True, "resample": 2, "size": {"height": 16, "width": 16}, "image_processor_type": "X"}
    assert read(hugging_face_vit(), settings_of(VIT) | known, GREY | usual)[1] == ""
    _, printed = read(hugging_face_swin(), settings_of(SWIN), GREY | {"magic": 1})
    assert "not known here: magic" in printed


def test_timms_name_and_notes_say_which_gelu_a_clip_tower_has(read):
    arrays = timm(dinov2_or_clip(dataclasses.replace(CLIP, width=64, heads=1)))
    notes = ["natively QuickGELU, use quickgelu model variant for original results"]
    cases = [("vit_x_clip_224", {}, "erf"), ("vit_x_clip_quickgelu_224", {}, "sigmoid")]
    cases += [("vit_x_clip_224", {"tag": "openai"}, "sigmoid"), ("vit_x_clip_224", {"notes": notes}, "sigmoid")]
    cases += [("vit_x_clip_224", {"tag": "openai_ft_in1k"}, "erf")]
    for name, block, gelu in cases:
        backbone, _ = read(arrays, {"architecture": name, "pretrained_cfg": block})
        assert backbone.config.gelu == gelu, (name, block)
    args = {"architecture": "vit_x_clip_224", "model_args": {"act_layer": "gelu_tanh", "pre_norm": True}}
    assert read(arrays, args)[0].config.gelu == "tanh"


def test_of_a_config_json_for_images_and_texts_the_images_count(read):
    """As OpenAI's repositories have it: every setting of generation, and an older block that has the last word."""
    vision = settings_of(CLIP, "clip")["vision_config"] | {"num_beams": 1, "top_p": 1.0, "id2label": {"0": "a"}}
    settings = {"model_type": "clip", "projection_dim": 4, "text_config": {"hidden_act": "relu", "hidden_size": 1}}
    settings |= {"vision_config": vision, "vision_config_dict": {"hidden_act": "gelu"}}
    backbone, printed = read(hugging_face_clip(), settings, GREY)
    assert backbone.config == dataclasses.replace(CLIP, gelu="erf") and not printed
    backbone, _ = read(hugging_face_clip(), {"model_type": "clip_vision_model", "num_attention_heads": 2})
    assert backbone.config == dataclasses.replace(CLIP, epsilon=1e-5)
