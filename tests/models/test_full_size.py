"""ViT-B/16 and Swin-B at 224 px, random weights in Hugging Face's form: convert, train, predict, erase on a CPU."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import small_config, small_source, with_items

from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.models import zoo
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run


def save_random_model(name: str, folder) -> str:
    """A random model of the named backbone's architecture, written as the hub has it."""
    transformers = pytest.importorskip("transformers", reason="the models are made by transformers")
    torch = pytest.importorskip("torch", reason="the weights are made by PyTorch (extra test)")
    torch.manual_seed(0)
    if name == "vit-b-22k":
        model = transformers.ViTModel(transformers.ViTConfig())
    else:
        settings = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
        model = transformers.SwinForImageClassification(transformers.SwinConfig(**settings, num_labels=1000))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-b-22k", "swin-b-1k"])
def test_a_published_backbone_from_its_folder_to_an_erasure(name, tmp_path):
    """The public path at the real size; two steps of two images."""
    digits = small_source(train=6, test=2, public=0)
    images = np.repeat(digits.read(0, len(digits.items)).images, 28, axis=1).repeat(28, axis=2)  # 224 x 224
    source = dataclasses.replace(with_items(digits, digits.items, images), shape=(224, 224, 1))
    config = small_config(
        backbone__name=name,
        backbone__heads=0,
        backbone__weights=save_random_model(name, tmp_path / "weights"),
        data__image_size=224,
        clustering__sample_size=4,
        clustering__cut="auto:2",
        clustering__min_members=0,
        clustering__feature_batch=2,
        tuning__prompt_width=30,
        tuning__batch=2,
        tuning__lanes=1,
        tuning__epochs=1,
        tuning__min_steps=1,
        inference__batch=2,
    )
    with prepare_run(tmp_path / "run", config, devices=jax.devices()[:1], source=source) as (run, imported):
        assert imported.added == 8
        expected = dataclasses.replace(zoo.entry(name).architecture, image_size=224)
        assert run.backbone.config == dataclasses.replace(expected, epsilon=run.backbone.config.epsilon)
        assert (run.image_spec.mean, run.image_spec.std) == zoo.entry(name).normalisation
        report = build(run)
        assert report.retuned == report.clusters == 2
        answers = predict(load_model(run), run.images[:3])
        assert answers.probabilities.shape == (3, 10) and np.isfinite(answers.probabilities).all()
        erased = erase.request_erasure(run, [run.catalog.live("train").ids[0]])
        assert erased.records == 1 and erased.outcome.retuned >= 1
