"""Published layouts: google-research npz, Flax msgpack, shards, half precision, prefixes, normalisation."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from published import (
    SWIN,
    VIT,
    Arrays,
    flax_tree,
    hub_folder,
    hugging_face_swin,
    hugging_face_vit,
    settings_of,
    timm_swin,
    vision_transformer,
)
from transcriptions import TOLERANCE, apart, features, pictures
from transcriptions import vision_transformer as transcribed

from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import convert, zoo
from lmeraser_jax.models.vit import ViTConfig, interpolate_positions
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.storage.checkpoints import flatten

GOOGLE = dataclasses.replace(VIT, epsilon=1e-6, gelu="tanh")  # its own numerics, which no file says


def params_of(path, image_size: int = 0, **settings) -> Arrays:
    return flatten(convert.load(Backbone(weights=str(path), **settings), image_size)[0].params)


def assert_same(got: Arrays, want: Arrays) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# -- google-research/vision_transformer --


@pytest.mark.parametrize("feature", ["pooler", "cls"], ids=["orig, with pre_logits", "augreg, without"])
def test_the_original_npz_gives_the_features_of_its_own_model(tmp_path, feature):
    wanted = dataclasses.replace(GOOGLE, feature=feature)
    arrays = vision_transformer(wanted)
    np.savez(tmp_path / "weights.npz", **arrays)
    backbone, provenance = convert.load(Backbone(weights=str(tmp_path / "weights.npz")))
    assert backbone.config == dataclasses.replace(wanted, classes=0)
    assert provenance.origin == "vision_transformer ViT"
    images = pictures(2, VIT.image_size)
    got = np.asarray(features(backbone.config, backbone.params, images))
    for have, image in zip(got, images, strict=True):
        assert apart(have, transcribed(arrays, wanted, image)) < TOLERANCE


def test_the_original_npz_at_another_size():
    arrays = vision_transformer(dataclasses.replace(GOOGLE, feature="cls"))
    config, params, _ = convert.parameters(Weights("weights", arrays, ""), Backbone(), 24)
    assert config.image_size == 24
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(params["positions"], interpolate_positions(positions, 6))
    image = pictures(1, 24)
    resized = {**arrays, "Transformer/posembed_input/pos_embedding": params["positions"]}
    plain = dataclasses.replace(config, classes=0)
    bare = {name: leaf for name, leaf in params.items() if name != "head"}
    assert apart(features(plain, bare, image)[0], transcribed(resized, config, image[0])) < TOLERANCE


def swapped(arrays: Arrays, one: str, other: str) -> Arrays:
    """Each array of one name under the other's and the other way round."""
    names = {one: other, other: one}
    return {"/".join(names.get(part, part) for part in name.split("/")): array for name, array in arrays.items()}


def changed(arrays: Arrays, ending: str, change) -> Arrays:
    return {name: change(array) if name.endswith(ending) else array for name, array in arrays.items()}


def heads_last(array: np.ndarray) -> np.ndarray:  # [D, heads, d] read as [D, d, heads]
    return array.reshape(array.shape[0], array.shape[2], array.shape[1]).transpose(0, 2, 1)


PLANTED = {
    "queries and keys swapped": lambda a: swapped(a, "query", "key"),
    "norms swapped": lambda a: swapped(a, "LayerNorm_0", "LayerNorm_2"),
    "output kernel transposed": lambda a: changed(a, "out/kernel", lambda k: k.reshape(16, 16).T.reshape(k.shape)),
    "heads read from the other axis": lambda a: changed(a, "query/kernel", heads_last),
    "patches transposed": lambda a: changed(a, "embedding/kernel", lambda k: k.transpose(1, 0, 2, 3)),
    "colours reversed": lambda a: changed(a, "embedding/kernel", lambda k: k[:, :, ::-1]),
    "pooler transposed": lambda a: changed(a, "pre_logits/kernel", np.transpose),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_transcription_shows_bugs(bug):
    """A conversion that fits all shapes and is wrong is found by the comparison above."""
    arrays = vision_transformer(GOOGLE)
    planted = Weights("weights", PLANTED[bug](arrays), "")
    backbone, _ = convert.freeze(planted, Backbone())
    image = pictures(2, VIT.image_size)
    got = features(backbone.config, backbone.params, image)
    assert apart(got[0], transcribed(arrays, GOOGLE, image[0])) > 50 * TOLERANCE


@pytest.mark.parametrize("setting", ["gelu", "epsilon"])
def test_the_numerics_of_the_origin_matter(setting):
    arrays, image = vision_transformer(GOOGLE), pictures(2, VIT.image_size)
    backbone, _ = convert.freeze(Weights("weights", arrays, ""), Backbone())
    other = dataclasses.replace(backbone.config, **{setting: {"gelu": "erf", "epsilon": 0.1}[setting]})
    assert apart(features(other, backbone.params, image)[0], transcribed(arrays, GOOGLE, image[0])) > TOLERANCE


# -- one model in many files --


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return hugging_face_vit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arrays):
    return hub_folder(tmp_path_factory.mktemp("vit"), arrays, settings_of(VIT))


def test_a_flax_msgpack_gives_the_parameters_of_the_safetensors(tmp_path, folder):
    from flax.serialization import msgpack_serialize

    saved = hugging_face_vit(prefix="vit.")  # with a classifier, as FlaxViTForImageClassification writes it
    tree = flax_tree(saved)
    assert tree["vit"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"].shape == (VIT.width, VIT.mlp)
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    (tmp_path / "config.json").write_text(json.dumps(settings_of(dataclasses.replace(VIT, epsilon=0.5, gelu="tanh"))))
    made, provenance = convert.load(Backbone(weights=str(tmp_path)))
    assert_same(flatten(made.params), params_of(folder))
    assert (made.config.epsilon, made.config.gelu, made.config.heads) == (0.5, "tanh", VIT.heads)
    assert provenance.origin == "Hugging Face ViT"
    plain = params_of(tmp_path / "flax_model.msgpack", heads=2)
    assert_same(plain, params_of(folder))


def test_shards_are_read_together(tmp_path, folder, arrays):
    shards = hub_folder(tmp_path, arrays, settings_of(VIT), shards=3)
    assert not (shards / "model.safetensors").exists()
    one, other = (convert.load(Backbone(weights=str(path))) for path in (folder, shards))
    assert one[0].digest == other[0].digest and one[1].sha256 != other[1].sha256


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, arrays, dtype):
    low = {name: np.asarray(jnp.asarray(array, dtype)) for name, array in arrays.items()}
    got = params_of(hub_folder(tmp_path, low, settings_of(VIT)))
    exact = {name: array.astype(np.float32) for name, array in low.items()}
    assert all(array.dtype == np.float32 for array in got.values())
    assert_same(got, params_of(hub_folder(tmp_path / "exact", exact, settings_of(VIT))))
    np.testing.assert_allclose(got["embed/bias"], arrays["embeddings.patch_embeddings.projection.bias"], rtol=1e-2)


@pytest.mark.parametrize("prefix", ["vit.", "model.", "module."])
def test_prefixes_of_whole_models_are_dropped(tmp_path, folder, prefix):
    path = hub_folder(tmp_path, hugging_face_vit(prefix=prefix), settings_of(VIT))
    assert_same(params_of(path), params_of(folder))


def test_swin_under_three_names_is_one_swin():
    plain = hugging_face_swin()
    whole = hugging_face_swin(prefix="swin.")
    settings = settings_of(SWIN)
    kinds = {
        "Hugging Face Swin": (plain, whole),
        "timm Swin": (timm_swin(plain), timm_swin(whole)),
        "Microsoft Swin": (timm_swin(plain, "microsoft"), timm_swin(whole, "microsoft")),
    }
    want = flatten(convert.freeze(Weights("weights", plain, "", settings), Backbone())[0].params)
    for origin, (bare, classifier) in kinds.items():
        for arrays in (bare, classifier):
            made, provenance = convert.freeze(Weights("weights", arrays, ""), Backbone())
            assert provenance.origin == origin and made.config == dataclasses.replace(SWIN, classes=0)
            assert_same(flatten(made.params), want)
        assert set(provenance.left_out) == {"head/kernel", "head/bias"}


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_without_biases_of_queries_keys_and_values_they_are_zero(family):
    make, config, settings = (
        (hugging_face_vit, VIT, settings_of(VIT)) if family == "vit" else (hugging_face_swin, SWIN, settings_of(SWIN))
    )
    arrays = make(config)
    left = {n: a for n, a in arrays.items() if not n.endswith(("query.bias", "key.bias", "value.bias"))}
    zeros = {n: a if n in left else np.zeros_like(a) for n, a in arrays.items()}
    assert len(left) < len(arrays)
    got, want = (
        convert.freeze(Weights("weights", each, "", {**settings, "qkv_bias": False}), Backbone())[0]
        for each in (left, zeros)
    )
    assert_same(flatten(got.params), flatten(want.params))
    if family == "swin":  # timm's joined kernel without a bias
        joined = {n: a for n, a in timm_swin(arrays).items() if not n.endswith("qkv.bias")}
        assert_same(flatten(convert.freeze(Weights("weights", joined, ""), Backbone())[0].params), flatten(want.params))


# -- what config.json says --


def test_the_file_of_a_hub_folder_is_read_with_its_config_json(tmp_path, folder):
    file = convert.load(Backbone(weights=str(folder / "model.safetensors")))[0]
    assert file.digest == convert.load(Backbone(weights=str(folder)))[0].digest


def test_heads_that_contradict_config_json_are_refused(folder):
    with pytest.raises(UserError, match=r"--config.backbone.heads=4: .* has 2"):
        convert.load(Backbone(weights=str(folder), heads=4))
    assert convert.load(Backbone(weights=str(folder), heads=2))[0].config.heads == 2


def test_epsilon_gelu_and_heads_come_from_config_json(arrays):
    wanted = dataclasses.replace(VIT, heads=4, epsilon=0.25, gelu="tanh")
    made, _ = convert.freeze(Weights("weights", arrays, "", settings_of(wanted)), Backbone())
    assert made.config == dataclasses.replace(wanted, classes=0)
    alone, _ = convert.freeze(Weights("weights", arrays, ""), Backbone())  # as transformers' code has them
    assert (alone.config.epsilon, alone.config.gelu, alone.config.heads) == (1e-12, "erf", 1)


@pytest.mark.parametrize("settings", [{"image_size": [16, 16], "patch_size": [4, 4]}, {"hidden_act": "gelu_new"}])
def test_other_spellings_of_config_json(arrays, settings):
    made, _ = convert.freeze(Weights("weights", arrays, "", settings_of(VIT) | settings), Backbone())
    assert (made.config.image_size, made.config.patch) == (16, 4)
    assert made.config.gelu == ("tanh" if "hidden_act" in settings else "erf")


def test_positions_are_resized_as_the_origin_does_it(arrays):
    """transformers resizes without antialiasing, timm with it."""
    positions = arrays["embeddings.position_embeddings"]
    theirs = convert.freeze(Weights("weights", arrays, "", settings_of(VIT)), Backbone(), 8)[0].params["positions"]
    np.testing.assert_array_equal(theirs, interpolate_positions(positions, 2, antialias=False))
    assert np.abs(theirs - interpolate_positions(positions, 2, antialias=True)).max() > 0.01


# -- normalisation --

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def normalisation(path, **settings):
    made, _ = convert.load(Backbone(weights=str(path), **settings))
    return made.mean, made.std


def test_normalisation_beside_the_weights_is_taken(tmp_path, arrays, folder):
    assert normalisation(folder) == zoo.HALF  # ViT's usual one
    hub_folder(tmp_path, arrays, settings_of(VIT))
    values = {"image_mean": list(MEAN), "image_std": list(STD), "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert normalisation(tmp_path) == (MEAN, STD)
    assert normalisation(tmp_path, mean="0.7") == ((0.7,), STD)
    assert normalisation(tmp_path, mean="0.7", std="1,2,3") == ((0.7,), (1.0, 2.0, 3.0))
    digests = {convert.load(Backbone(weights=str(path)))[0].digest for path in (tmp_path, folder)}
    assert len(digests) == 2  # it is part of the backbone


def test_a_folder_of_timms_has_the_normalisation_in_config_json(tmp_path):
    settings = {"architecture": "swin", "num_classes": 5, "pretrained_cfg": {"mean": MEAN, "std": STD}}
    hub_folder(tmp_path, timm_swin(hugging_face_swin()), settings)
    assert normalisation(tmp_path) == (MEAN, STD)
    hub_folder(tmp_path, timm_swin(hugging_face_swin()), {"architecture": "swin"})
    assert normalisation(tmp_path) == zoo.IMAGENET  # Swin's usual one


def test_a_name_wins_over_the_file_and_the_settings_over_both(tmp_path, monkeypatch, arrays):
    entry = dataclasses.replace(zoo.ZOO["vit-ti"], architecture=VIT, normalisation=(STD, MEAN))
    monkeypatch.setitem(zoo.ZOO, "vit-ti", entry)
    hub_folder(tmp_path, arrays, settings_of(VIT))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    assert normalisation(tmp_path, name="vit-ti") == (STD, MEAN)
    assert normalisation(tmp_path, name="vit-ti", std="0.9") == (STD, (0.9,))


def test_the_feature_is_the_names_then_what_the_file_has(tmp_path, monkeypatch, folder):
    def feature(**settings):
        return convert.load(Backbone(weights=str(folder), **settings))[0].config.feature

    monkeypatch.setitem(
        zoo.ZOO,
        "vit-ti",
        dataclasses.replace(zoo.ZOO["vit-ti"], architecture=dataclasses.replace(VIT, feature="cls")),
    )
    assert feature() == feature(feature="pooler") == feature(name="vit-ti", feature="pooler") == "pooler"
    assert feature(feature="cls") == feature(name="vit-ti") == "cls"


def test_a_grey_backbone_takes_the_mean_of_the_colours():
    grey = ViTConfig(image_size=8, patch=4, width=16, depth=1, heads=1, mlp=16, channels=1)
    found = Weights("weights", hugging_face_vit(grey), "", settings_of(grey), normalisation=(MEAN, STD))
    made, _ = convert.freeze(found, Backbone())
    assert made.mean == pytest.approx((0.2,)) and made.std == pytest.approx((0.5,))
    made, _ = convert.freeze(found, Backbone(mean="0.7,0.7,0.1"))
    assert made.mean == pytest.approx((0.5,))
