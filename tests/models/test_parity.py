"""Published models as transformers and timm compute them in PyTorch, layer by layer; and a run at their real size."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import small_config, small_source, with_items
from published import CLIP, DINOV2, REGISTERS, SWIN, VIT, settings_of, spread
from timm_reference import ACTS, NAMED, NO_TIMM, SIZES
from transcriptions import TOLERANCE, coefficients, features, gradient, outputs, pictures, relative_error

from lmeraser_jax.config import Backbone
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.models import convert, weight_files, zoo
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run

pytestmark = pytest.mark.slow
CLS = dataclasses.replace(VIT, feature="cls")
CASES = {  # transformers' class, its options, architecture, sizes: native, enlarged, shrunk
    "ViT with pooler": ("ViTModel", {"add_pooling_layer": True}, dataclasses.replace(VIT, classes=0), (16, 24, 8)),
    "ViT without pooler": ("ViTModel", {"add_pooling_layer": False}, dataclasses.replace(CLS, classes=0), (16,)),
    "ViT classifier": ("ViTForImageClassification", {}, dataclasses.replace(CLS, epsilon=0.01, gelu="tanh"), (16,)),
    "ViT of quick GELU": ("ViTModel", {}, dataclasses.replace(VIT, classes=0, gelu="sigmoid"), (16,)),
    # window == grid in the last stage; then padding, a padded shift, an odd grid to merge
    "Swin classifier": ("SwinForImageClassification", {}, SWIN, (32, 36)),
    "DINOv2": ("Dinov2Model", {}, DINOV2, (16, 24, 8)),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {}, REGISTERS, (16, 24, 8)),
    "CLIP's vision tower": ("CLIPVisionModel", {}, CLIP, (16, 24, 8)),
    "CLIP of images and texts": ("CLIPModel", {}, dataclasses.replace(CLIP, gelu="erf"), (16,)),
}
PUBLISHED = {
    "vit-b-22k": "ViTModel",
    "vit-b-1k": "ViTForImageClassification",
    "swin-b-22k": "SwinModel",
    "swin-b-1k": "SwinForImageClassification",
    "dinov2-s": "Dinov2Model",
    "dinov2-s-reg": "Dinov2WithRegistersModel",
    "clip-b-32": "CLIPVisionModel",
}


TWO_STEPS: dict[str, Any] = {"clustering__sample_size": 4, "clustering__cut": "auto:2", "clustering__min_members": 0}
TWO_STEPS |= {"clustering__feature_batch": 2, "inference__batch": 2, "tuning__prompt_width": 30, "tuning__batch": 2}
TWO_STEPS |= {"tuning__lanes": 1, "tuning__epochs": 1, "tuning__min_steps": 1}


def random_model(name: str, options, architecture, folder: Path):
    """A random model of transformers', which has saved itself into the folder."""
    torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch")
    transformers = pytest.importorskip("transformers", reason="parity with PyTorch needs transformers")
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, name).config_class
    labels = {"num_labels": architecture.classes} if architecture.classes else {}
    values = {key: value for key, value in settings_of(architecture, kind.model_type).items() if key != "model_type"}
    model = getattr(transformers, name)(kind(**values, **labels), **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(*spread(key), generator=generator)
            if parameter.ndim > 1 and architecture.width > 100:  # so wide that float32 itself would differ from float64
                parameter.mul_(4 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    return getattr(model, "vision_model", model)


def pytorch_outputs(model, images: np.ndarray, native: int):
    """States, feature, logits and gradient; from a copy, because Swin keeps the last image's windows."""
    import torch

    model = copy.deepcopy(model)
    x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    resizes = images.shape[1] != native and "dinov2" not in model.config.model_type  # which does it unasked
    options = {"interpolate_pos_encoding": True} if resizes else {}
    result = model(x, output_hidden_states=True, **options)
    base = getattr(model, model.base_model_prefix, model)(x, **options)
    pooled = getattr(base, "pooler_output", None)
    feature = base.last_hidden_state[:, 0] if pooled is None else pooled
    (feature * torch.tensor(coefficients(*feature.shape))).sum().backward()
    states = [state.detach().numpy() for state in result.hidden_states]
    logits = result.logits.detach().numpy() if hasattr(result, "logits") else None
    return states, feature.detach().numpy(), logits, x.grad.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_pytorchs(tmp_path, case):
    name, options, architecture, sizes = CASES[case]
    model = random_model(name, options, architecture, tmp_path / "model")
    chosen = Backbone(weights=str(tmp_path / "model"))
    for size in sizes:
        config, params, provenance = convert.parameters(weight_files.read(chosen.weights), chosen, size)
        assert config == dataclasses.replace(architecture, image_size=size)
        images = pictures(2, size)
        ours = jax.device_get(outputs(config, params, images))
        states, feature, logits, slopes = pytorch_outputs(model, images, architecture.image_size)
        for index, (state, expected) in enumerate(zip(ours["states"], states, strict=True)):
            assert relative_error(state.reshape(expected.shape), expected) < TOLERANCE, f"size {size}, state {index}"
        assert relative_error(ours["features"], feature) < TOLERANCE, size
        assert relative_error(gradient(config, params, images), slopes) < TOLERANCE, size
        if architecture.classes:
            assert relative_error(ours["logits"], logits) < TOLERANCE, size
            assert {"head/kernel", "head/bias"} == set(provenance.left_out)


@pytest.fixture(scope="session")
def timm(tmp_path_factory) -> Path:
    """timm's random models (safetensors) and their answers (npz), made by a program of its own."""
    folder = tmp_path_factory.mktemp("timm")
    program = Path(__file__).parents[1] / "support" / "timm_reference.py"
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True)
    if done.returncode == NO_TIMM:
        pytest.skip("parity with timm needs timm")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("family", "size"), [(f, size) for f, sizes in SIZES.items() for size in sizes], ids=str)
def test_timms_features_and_logits(timm, family, size):
    """Swin at sizes that need no padding: timm shifts before it pads, transformers and we pad before we shift."""
    file = timm / f"{family}.safetensors"
    config, params, provenance = convert.parameters(weight_files.read(str(file)), Backbone(heads=VIT.heads), size)
    native = SWIN if family == "swin" else dataclasses.replace(CLS, epsilon=1e-6)
    assert config == dataclasses.replace(native, image_size=size)
    assert provenance.origin == f"timm {'ViT' if family == 'vit' else 'Swin'}"
    ours = outputs(config, params, pictures(2, size))
    with np.load(timm / f"{family}.npz") as answers:
        assert relative_error(ours["features"], answers[f"features{size}"]) < TOLERANCE
        assert relative_error(ours["logits"], answers[f"logits{size}"]) < TOLERANCE


@pytest.mark.parametrize("act", ACTS)
def test_a_folder_that_timm_saved_has_timms_heads_and_gelu(timm, act):
    backbone, _ = convert.load(Backbone(weights=str(timm / act)))
    assert backbone.config.width // backbone.config.heads == 32
    with np.load(timm / f"{act}.npz") as answers:
        ours = features(backbone.config, backbone.params, pictures(2, 160))
        assert relative_error(ours, answers["features"]) < TOLERANCE


@pytest.mark.parametrize("name", NAMED)
def test_a_folder_of_timms_name_is_as_timm_has_it(timm, name):
    """Two blocks of the published width; at the published size and at another."""
    chosen = Backbone(weights=str(timm / name))
    with np.load(timm / f"{name}.npz") as answers:
        for size in NAMED[name]:
            backbone, provenance = convert.load(chosen, size)
            assert not [note for note in provenance.notes if "assumed" in note or "not known" in note]
            ours = features(backbone.config, backbone.params, pictures(1, size))
            assert relative_error(ours, answers[str(size)]) < TOLERANCE, size


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_backbone_of_the_published_size_is_pytorchs(tmp_path, name):
    import torch

    entry = zoo.entry(name)
    model = random_model(PUBLISHED[name], {}, entry.architecture, tmp_path / "model")
    backbone, _ = convert.load(Backbone(name=name, weights=str(tmp_path / "model")), 224)
    assert backbone.config == dataclasses.replace(entry.architecture, image_size=224)
    assert (backbone.mean, backbone.std) == entry.normalisation
    images = pictures(2, 224)
    with torch.no_grad():
        result = getattr(model, model.base_model_prefix, model)(torch.tensor(images.transpose(0, 3, 1, 2)))
    pooled = getattr(result, "pooler_output", None)
    expected = (result.last_hidden_state[:, 0] if pooled is None else pooled).numpy()
    assert relative_error(features(backbone.config, backbone.params, images), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["swin-b-1k", "dinov2-s-reg"])
def test_a_published_backbone_from_its_folder_to_an_erasure(name, tmp_path):
    """At 224 px with random weights: convert, train, predict, erase; two steps of two images."""
    entry = zoo.entry(name)
    random_model(PUBLISHED[name], {}, entry.architecture, tmp_path / "weights")
    digits = small_source(train=6, test=2, public=0)
    images = np.repeat(digits.read(range(len(digits.items))).rows, 28, axis=1).repeat(28, axis=2)  # 224 x 224
    source = dataclasses.replace(with_items(digits, digits.items, images), shape=(224, 224, 1))
    config = small_config(
        backbone__name=name,
        backbone__heads=0,
        backbone__weights=str(tmp_path / "weights"),
        data__image_size=224,
        **TWO_STEPS,
    )
    with prepare_run(tmp_path / "run", config, devices=jax.devices()[:1], source=source) as (run, imported):
        assert imported.added == 8
        assert run.backbone.config == dataclasses.replace(entry.architecture, image_size=224)
        assert (run.image_spec.mean, run.image_spec.std) == entry.normalisation
        report = build(run)
        assert report.retuned == report.clusters == 2
        answers = predict(load_model(run), run.images[:3])
        assert answers.probabilities.shape == (3, 10) and np.isfinite(answers.probabilities).all()
        erased = erase.request_erasure(run, [run.catalog.live("train").ids[0]])
        assert erased.records == 1 and erased.outcome.retuned >= 1
