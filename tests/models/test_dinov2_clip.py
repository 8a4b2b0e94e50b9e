"""DINOv2 and CLIP's vision tower from their published names, against a NumPy transcription; and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from published import (
    CLIP,
    DINOV2,
    REGISTERS,
    SWIN,
    VIT,
    flax_tree,
    hub_folder,
    hugging_face_clip,
    hugging_face_dinov2,
    hugging_face_vit,
    settings_of,
    timm,
)
from transcriptions import TOLERANCE, dinov2_or_clip, features, outputs, pictures, relative_error

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, zoo
from lmeraser_jax.models.architectures import architecture_from, describe
from lmeraser_jax.models.vit import interpolate_positions
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.storage.checkpoints import flatten

CASES = {"dinov2": DINOV2, "dinov2_with_registers": REGISTERS, "clip": CLIP}


def published(kind: str, seed: int = 0):
    return hugging_face_clip(seed=seed) if kind == "clip" else hugging_face_dinov2(CASES[kind], seed)


def loaded(tmp_path, arrays, settings, image_size: int = 0, **chosen):
    """A backbone and its provenance from a folder as on the hub."""
    return convert.load(Backbone(weights=str(hub_folder(tmp_path / "hub", arrays, settings)), **chosen), image_size)


def freeze(arrays, settings=None, image_size: int = 0, **chosen):
    return convert.freeze(Weights("FILE", arrays, "", settings or {}), Backbone(**chosen), image_size)


@pytest.mark.parametrize("kind", CASES)
def test_every_state_and_the_feature_match_the_transcription(tmp_path, kind):
    config, arrays = CASES[kind], published(kind)
    backbone, provenance = loaded(tmp_path, arrays, settings_of(config, kind))
    assert backbone.config == config and architecture_from(describe(config)) == config
    assert backbone.mean == (zoo.CLIP if kind == "clip" else zoo.IMAGENET)[0]
    image = pictures(1, config.image_size)
    ours = outputs(config, backbone.params, image)
    states, feature = dinov2_or_clip(arrays, config, image[0])
    for ours_state, expected in zip(ours["states"], states, strict=True):
        assert relative_error(ours_state[0], expected) < TOLERANCE
    assert relative_error(ours["features"][0], feature) < TOLERANCE
    left_out = {"clip": "text_projection.weight", "dinov2": "embeddings.mask_token"}[kind[:6]]
    assert left_out in provenance.left_out and provenance.notes[0].startswith("assumed, as no file beside the weights")


@pytest.mark.parametrize(("kind", "antialias"), [("dinov2", False), ("dinov2_with_registers", True), ("clip", False)])
def test_positions_are_resized_as_transformers_does_it(kind, antialias):
    name = "vision_model.embeddings.position_embedding.weight" if kind == "clip" else "embeddings.position_embeddings"
    arrays = published(kind)
    positions = arrays[name].reshape(1, -1, VIT.width)
    resized = freeze(arrays, image_size=24)[0].params["positions"]
    np.testing.assert_array_equal(resized, interpolate_positions(positions, 6, antialias))
    assert np.abs(resized - interpolate_positions(positions, 6, not antialias)).max() > 0.01


def test_timms_names_give_the_same_features():
    """timm keeps no position for the class token beside registers: it is added to the token."""
    for config, authors in ((DINOV2, True), (REGISTERS, False), (REGISTERS, True)):
        arrays = hugging_face_dinov2(config)
        renamed = {name.removeprefix("embeddings."): array for name, array in timm(arrays).items()}
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
    arrays = timm(hugging_face_vit(dataclasses.replace(CLIP, pre_norm=False)))
    del arrays["patch_embed.proj.bias"]
    arrays |= {"norm_pre.weight": np.full(16, 2, np.float32), "norm_pre.bias": np.full(16, 3, np.float32)}
    backbone, provenance = freeze(arrays, heads=2)
    assert provenance.origin == "timm CLIP" and backbone.config == dataclasses.replace(CLIP, epsilon=1e-5)
    assert backbone.mean == zoo.CLIP[0] and "GELU sigmoid" in provenance.notes[0]
    assert (backbone.params["pre_norm"]["scale"] == 2).all() and (backbone.params["pre_norm"]["bias"] == 3).all()
    assert not backbone.params["embed"]["bias"].any()


def test_flax_names_give_the_parameters_of_the_safetensors():
    for arrays in (hugging_face_clip(), hugging_face_dinov2(REGISTERS)):
        name = "vision_model.embeddings.position_embedding."
        tree = flax_tree({key.replace(f"{name}weight", f"{name}embedding"): a for key, a in arrays.items()})
        assert freeze(flatten(tree), heads=2)[0].digest == freeze(arrays, heads=2)[0].digest


def test_timms_name_and_notes_say_which_gelu_a_clip_tower_has():
    arrays = timm(hugging_face_vit(dataclasses.replace(CLIP, width=64, heads=1)))
    arrays |= {"norm_pre.weight": np.ones(64, np.float32), "norm_pre.bias": np.ones(64, np.float32)}
    notes = ["natively QuickGELU, use quickgelu model variant for original results"]
    cases = [("vit_x_clip_224", {}, "erf"), ("vit_x_clip_quickgelu_224", {}, "sigmoid")]
    cases += [("vit_x_clip_224", {"tag": "openai"}, "sigmoid"), ("vit_x_clip_224", {"notes": notes}, "sigmoid")]
    cases += [("vit_x_clip_224", {"tag": "openai_ft_in1k"}, "erf")]
    for name, block, gelu in cases:
        backbone, _ = freeze(arrays, {"architecture": name, "pretrained_cfg": block})
        assert backbone.config.gelu == gelu, (name, block)
    args = {"architecture": "vit_x_clip_224", "model_args": {"act_layer": "gelu_tanh", "pre_norm": True}}
    assert freeze(arrays, args)[0].config.gelu == "tanh"


def test_of_a_config_json_for_images_and_texts_the_images_count(tmp_path, capsys):
    """As OpenAI's repositories have it: every setting of generation, and an older block that has the last word."""
    vision = settings_of(CLIP, "clip")["vision_config"] | {"num_beams": 1, "top_p": 1.0, "id2label": {"0": "a"}}
    settings = {"model_type": "clip", "projection_dim": 4, "text_config": {"hidden_act": "relu", "hidden_size": 1}}
    settings |= {"vision_config": vision, "vision_config_dict": {"hidden_act": "gelu"}}
    backbone, provenance = loaded(tmp_path, hugging_face_clip(), settings, mean="0.5", std="0.5")
    assert backbone.config == dataclasses.replace(CLIP, gelu="erf") and provenance.notes == ()
    assert capsys.readouterr().err == ""
    assert freeze(hugging_face_clip(), {"model_type": "clip_vision_model", "num_attention_heads": 2})[0].config == (
        dataclasses.replace(CLIP, epsilon=1e-5)
    )


def refusal(arrays, settings=None, image_size: int = 0, **chosen) -> str:
    with pytest.raises(UserError) as caught:
        freeze(arrays, settings, image_size, **chosen)
    return str(caught.value)


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


def test_what_contradicts_the_arrays_is_named():
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


def test_the_digests_of_older_backbones_stay():
    """A workdir records its backbone's digest: new settings of an architecture do not count at their defaults."""
    known = {VIT: "a47f763e69d3bf92010d14aef95e9ecf9c3bc8ac33dbe9c8d921280c9311d09e"}
    known |= {SWIN: "327f565b8c5ca0370d2b33cd51e5093e4ea00f0f1add132ecba2908f708c536b"}
    for config, expected in known.items():
        ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), backbone_lib.graph(config)[1])
        assert backbone_lib.make(config, ones, (0.5,), (0.5,)).digest == expected
    kinds = [DINOV2, REGISTERS, CLIP, dataclasses.replace(REGISTERS, registers=4)]
    assert len({digest(describe(config)) for config in kinds}) == 4
