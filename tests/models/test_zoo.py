"""Backbones by name: sizes as published, ids, features and normalisation of the paper's four."""

import dataclasses
import math
import re

import jax
import pytest

from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import zoo

PARAMETERS = {  # published, without the classifier
    "vit-b-22k": 86_389_248,
    "vit-b-1k": 85_798_656,
    "swin-b-22k": 86_743_224,
    "swin-b-1k": 86_743_224,
    "vit-ti": 5_524_416,
    "vit-s": 21_665_664,
    "vit-l": 303_301_632,
    "swin-t": 27_519_354,
    "swin-s": 48_837_258,
    "dinov2-s": 22_046_976,  # of these, without the mask token and LayerScale, which is part of other arrays here
    "dinov2-b": 86_561_280,
    "dinov2-l": 304_318_464,
    "dinov2-s-reg": 22_048_512,
    "dinov2-b-reg": 86_564_352,
    "dinov2-l-reg": 304_322_560,
    "clip-b-32": 87_456_768,  # of these, with a bias of the embedding, which is zero
    "clip-b-16": 85_800_192,
    "clip-l-14": 303_180_800,
}
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALISATIONS = {"vit": HALF, "swin": IMAGENET, "dinov2": IMAGENET, "clip": CLIP}
GOOGLE, MICROSOFT = "google/vit-base-patch16-224", "microsoft/swin-base-patch4-window7-224"
PAPERS = {  # hub id, revision, feature, its size, normalisation, epsilon
    "vit-b-22k": (f"{GOOGLE}-in21k", "b4569560a39a0f1af58e3ddaf17facf20ab919b0", "pooler", 768, HALF, 1e-12),
    "vit-b-1k": (GOOGLE, "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3", "cls", 768, HALF, 1e-12),
    "swin-b-22k": (f"{MICROSOFT}-in22k", "main", "mean", 1024, IMAGENET, 1e-5),
    "swin-b-1k": (MICROSOFT, "main", "mean", 1024, IMAGENET, 1e-5),
}
QUICK = ("vit-ti", "swin-t")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PARAMETERS]
)
def test_every_backbone_builds_with_the_published_number_of_parameters(name):
    config = zoo.entry(name).architecture
    params = backbone_lib.graph(config)[1]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    images = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), "float32")
    answer = jax.eval_shape(lambda params, images: backbone_lib.features(config, params, images), params, images)
    assert answer.shape == (2, config.feature_size)


def test_the_papers_four_are_as_published():
    for name, expected in PAPERS.items():
        entry = zoo.entry(name)
        c = entry.architecture
        assert (entry.hub, entry.revision, c.feature, c.feature_size, entry.normalisation, c.epsilon) == expected
        assert c.gelu == "erf" and entry.licence == "Apache-2.0"


def test_dinov2_and_clip_are_as_published():
    for name, entry in zoo.ZOO.items():
        c = entry.architecture
        if name.startswith("dinov2"):
            assert (c.image_size, c.patch, c.epsilon, c.gelu, c.pre_norm) == (518, 14, 1e-6, "erf", False)
            assert c.registers == 4 * name.endswith("-reg") == 4 * ("with-registers" in entry.hub)
        elif name.startswith("clip"):
            assert (c.image_size, c.epsilon, c.gelu, c.pre_norm, c.registers) == (224, 1e-5, "sigmoid", True, 0)
            assert entry.hub == f"openai/clip-vit-{'large' if c.width == 1024 else 'base'}-patch{c.patch}"
            assert name == f"clip-{'l' if c.width == 1024 else 'b'}-{c.patch}" and entry.licence == "MIT"


def test_every_entry_is_complete_and_says_how_to_download_it():
    assert zoo.ZOO.keys() == PARAMETERS.keys() and len({entry.hub for entry in zoo.ZOO.values()}) == len(zoo.ZOO)
    for name, entry in zoo.ZOO.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)
        assert re.fullmatch(r"main|[0-9a-f]{40}", entry.revision) and entry.licence and entry.about
        assert entry.normalisation == NORMALISATIONS[name.split("-")[0]]
        hint = zoo.download_hint(name)
        assert all(word in hint for word in (name, entry.hub, entry.revision, entry.licence, "model.safetensors"))
    assert zoo.download_hint("") == ""
    with pytest.raises(UserError, match="legal: vit-b-22k"):
        zoo.download_hint("nothing like it")


def test_differences_from_a_named_backbone_are_listed():
    expected = zoo.entry("swin-t").architecture
    free = dataclasses.replace(expected, image_size=384, classes=1000, epsilon=1e-6, gelu="tanh")
    assert zoo.differences("swin-t", expected) == zoo.differences("swin-t", free) == []
    depths = ["depths is (2, 2, 18, 2), swin-t has (2, 2, 6, 2)"]
    assert zoo.differences("swin-t", zoo.entry("swin-s").architecture) == depths
    assert zoo.differences("swin-t", zoo.entry("vit-s").architecture) == ["swin-t is a Swin, the weights are a ViT"]
