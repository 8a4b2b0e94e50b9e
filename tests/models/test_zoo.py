"""Backbones by name: sizes as published, ids, features and normalisation of the paper's four."""

import dataclasses
import math
import re

import jax
import pytest
from published import settings_of

from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import zoo
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig

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
}
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PAPERS = {  # hub id, revision, feature, its size, normalisation, epsilon
    "vit-b-22k": (
        "google/vit-base-patch16-224-in21k",
        "b4569560a39a0f1af58e3ddaf17facf20ab919b0",
        "pooler",
        768,
        HALF,
        1e-12,
    ),
    "vit-b-1k": (
        "google/vit-base-patch16-224",
        "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
        "cls",
        768,
        HALF,
        1e-12,
    ),
    "swin-b-22k": ("microsoft/swin-base-patch4-window7-224-in22k", "main", "mean", 1024, IMAGENET, 1e-5),
    "swin-b-1k": ("microsoft/swin-base-patch4-window7-224", "main", "mean", 1024, IMAGENET, 1e-5),
}


def by_formula(c: ViTConfig | SwinConfig) -> int:
    """Parameters of the feature part, from the papers' description and not from the modules."""

    def dense(inputs, outputs):
        return (inputs + 1) * outputs

    def block(width, hidden):  # two norms, queries, keys, values, output, MLP
        return 4 * width + 3 * dense(width, width) + dense(width, width) + dense(width, hidden) + dense(hidden, width)

    embedding = dense(c.patch**2 * c.channels, c.width)
    if isinstance(c, ViTConfig):
        tokens = (c.image_size // c.patch) ** 2 + 1
        pooler = dense(c.width, c.width) if c.feature == "pooler" else 0
        return embedding + (1 + tokens) * c.width + c.depth * block(c.width, c.mlp) + 2 * c.width + pooler
    total, widths = embedding + 2 * c.width, [c.width * 2**stage for stage in range(len(c.depths))]
    for width, depth, heads in zip(widths, c.depths, c.heads, strict=True):
        total += depth * (block(width, int(c.mlp_ratio * width)) + (2 * c.window - 1) ** 2 * heads)
    return total + sum(8 * width + 8 * width**2 for width in widths[:-1]) + 2 * widths[-1]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_backbone_builds_with_the_published_number_of_parameters(name):
    config = zoo.entry(name).architecture
    _, shapes = backbone_lib.graph(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name] == by_formula(config)
    assert config.classes == 0 and config.image_size == 224
    answer = jax.eval_shape(
        lambda params, images: backbone_lib.features(config, params, images),
        shapes,
        jax.ShapeDtypeStruct((2, 224, 224, 3), "float32"),
    )
    assert answer.shape == (2, config.feature_size)


def test_the_numbers_are_those_of_transformers():
    """Its own models, without memory for their arrays."""
    torch = pytest.importorskip("torch", reason="counts transformers' models with torch")
    import transformers

    for name, entry in zoo.ZOO.items():
        values = settings_of(entry.architecture)
        with torch.device("meta"):
            if isinstance(entry.architecture, SwinConfig):
                model = transformers.SwinModel(transformers.SwinConfig(**values), add_pooling_layer=False)
            else:
                pooler = entry.architecture.feature == "pooler"
                model = transformers.ViTModel(transformers.ViTConfig(**values), add_pooling_layer=pooler)
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name], name


def test_the_papers_four():
    for name, wanted in PAPERS.items():
        entry = zoo.entry(name)
        c = entry.architecture
        assert (entry.hub, entry.revision, c.feature, c.feature_size, entry.normalisation, c.epsilon) == wanted
        assert c.gelu == "erf" and entry.licence == "Apache-2.0"


def test_every_entry_is_complete():
    for name, entry in zoo.ZOO.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)
        assert re.fullmatch(r"main|[0-9a-f]{40}", entry.revision) and entry.licence and entry.about
        for values in entry.normalisation:
            assert len(values) == 3 and all(0 < value < 1 for value in values)
        usual = IMAGENET if isinstance(entry.architecture, SwinConfig) else HALF
        assert entry.normalisation == usual
    assert len({entry.hub for entry in zoo.ZOO.values()}) == len(zoo.ZOO)


def test_download_hint():
    assert zoo.download_hint("") == ""
    for name, entry in zoo.ZOO.items():
        text = zoo.download_hint(name)
        assert all(part in text for part in (name, entry.hub, entry.revision, entry.licence, "model.safetensors"))
    with pytest.raises(UserError, match="legal: vit-b-22k"):
        zoo.download_hint("nothing like it")


def test_what_differs_is_listed():
    wanted = zoo.entry("swin-t").architecture
    assert zoo.differences("swin-t", wanted) == []
    free = dataclasses.replace(wanted, image_size=384, classes=1000, epsilon=1e-6, gelu="tanh")
    assert zoo.differences("swin-t", free) == []
    assert zoo.differences("swin-t", zoo.entry("swin-s").architecture) == [
        "depths is (2, 2, 18, 2), swin-t has (2, 2, 6, 2)"
    ]
    assert zoo.differences("swin-t", zoo.entry("vit-s").architecture) == ["swin-t is a Swin, the weights are a ViT"]
    pooled = dataclasses.replace(zoo.entry("vit-b-22k").architecture, feature="cls")
    assert zoo.differences("vit-b-22k", pooled) == []
    assert "heads is 6, vit-ti has 3" in zoo.differences("vit-ti", zoo.entry("vit-s").architecture)
