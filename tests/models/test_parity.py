"""Published models as transformers computes them in PyTorch: every layer, feature, logits and image gradient."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from published import SWIN, VIT, settings_of, spread
from timm_reference import NO_TIMM, SIZES
from transcriptions import TOLERANCE, apart, features, outputs, pictures, scalar

from lmeraser_jax.config import Backbone
from lmeraser_jax.models import convert, weight_files, zoo
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.storage.checkpoints import flatten

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch")
transformers = pytest.importorskip("transformers", reason="parity with PyTorch needs transformers")

NUMERICS = dataclasses.replace(VIT, feature="cls", epsilon=0.01, gelu="tanh")
BARE = dataclasses.replace(VIT, feature="cls", classes=0)
POOLED = dataclasses.replace(VIT, classes=0)
CASES = {  # transformers' class, its options, architecture, sizes: native, enlarged, shrunk
    "ViT with pooler": ("ViTModel", {"add_pooling_layer": True}, POOLED, (16, 24, 8)),
    "ViT without pooler": ("ViTModel", {"add_pooling_layer": False}, BARE, (16,)),
    "ViT classifier, other numerics": ("ViTForImageClassification", {}, NUMERICS, (16,)),
    # window == grid in the last stage; then padding, a padded shift, an odd grid to merge
    "Swin classifier": ("SwinForImageClassification", {}, SWIN, (32, 36)),
}
SLOPES = {24, 36}


class Published(NamedTuple):
    """A random model of PyTorch's and the folder that it saved itself into."""

    model: object
    folder: Path


def published(name: str, options, architecture, folder: Path, **more) -> Published:
    kind = getattr(transformers, "SwinConfig" if isinstance(architecture, SwinConfig) else "ViTConfig")
    values = settings_of(architecture) | ({"num_labels": architecture.classes} if architecture.classes else {}) | more
    model = getattr(transformers, name)(kind(**values), **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            parameter.normal_(*spread(part), generator=generator)
            if parameter.ndim > 1 and architecture.width > 100:  # so wide that float32 itself would differ from float64
                parameter.mul_(4 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    return Published(model, folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Published]:
    transformers.utils.logging.disable_progress_bar()
    return {case: published(*CASES[case][:3], tmp_path_factory.mktemp("published") / "model") for case in CASES}


def theirs(model, images: np.ndarray, native: int):
    """PyTorch's states, feature, logits and gradient; from a copy, because Swin keeps the last image's windows."""
    model = copy.deepcopy(model)
    x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    more = {"interpolate_pos_encoding": True} if images.shape[1] != native else {}
    found = model(x, output_hidden_states=True, **more)
    base = getattr(model, model.base_model_prefix, model)
    inner = base(x, **more)
    pooled = getattr(inner, "pooler_output", None)
    feature = inner.last_hidden_state[:, 0] if pooled is None else pooled
    (feature * torch.tensor(scalar(*feature.shape))).sum().backward()
    states = [state.detach().numpy() for state in found.hidden_states]
    logits = found.logits.detach().numpy() if hasattr(found, "logits") else None
    return states, feature.detach().numpy(), logits, x.grad.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("case", "size"), [(case, size) for case, (*_, sizes) in CASES.items() for size in sizes], ids=str
)
def test_every_layer_is_pytorchs(models, case, size):
    published, architecture = models[case], CASES[case][2]
    chosen = Backbone(weights=str(published.folder))
    config, params, provenance = convert.parameters(weight_files.read(chosen.weights), chosen, size)
    assert config == dataclasses.replace(architecture, image_size=size)
    images = pictures(2, size)
    got = jax.device_get(outputs(config, params, images, size in SLOPES))
    states, feature, logits, gradient = theirs(published.model, images, architecture.image_size)
    for index, (have, want) in enumerate(zip(got["states"], states, strict=True)):
        assert apart(have.reshape(want.shape), want) < TOLERANCE, f"state {index}"
    assert apart(got["features"], feature) < TOLERANCE
    if architecture.classes:
        assert apart(got["logits"], logits) < TOLERANCE
        assert {"head/kernel", "head/bias"} == set(provenance.left_out)
    if size in SLOPES:
        assert apart(got["gradient"], gradient) < TOLERANCE
    made, _ = convert.load(chosen, size)  # what a run uses: the same without the classifier
    for name, array in flatten(made.params).items():
        np.testing.assert_array_equal(array, flatten(params)[name])


@pytest.fixture(scope="session")
def timm(tmp_path_factory) -> Path:
    """timm's random models (safetensors) and their answers (npz), made by a program of its own."""
    folder = tmp_path_factory.mktemp("timm")
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "support" / "timm_reference.py", folder],
        capture_output=True,
        text=True,
    )
    if done.returncode == NO_TIMM:
        pytest.skip("parity with timm needs timm")
    assert done.returncode == 0, done.stderr
    return folder


TIMM = {"vit": dataclasses.replace(VIT, feature="cls", epsilon=1e-6), "swin": SWIN}


@pytest.mark.parametrize(("family", "size"), [(f, size) for f, sizes in SIZES.items() for size in sizes], ids=str)
def test_timms_features_and_logits(timm, family, size):
    """Swin at sizes that need no padding: timm shifts before it pads, transformers and we pad before we shift."""
    file = timm / f"{family}.safetensors"
    config, params, provenance = convert.parameters(weight_files.read(str(file)), Backbone(heads=VIT.heads), size)
    assert config == dataclasses.replace(TIMM[family], image_size=size)
    assert provenance.origin == f"timm {'ViT' if family == 'vit' else 'Swin'}"
    got = outputs(config, params, pictures(2, size), False)
    with np.load(timm / f"{family}.npz") as answers:
        assert apart(got["features"], answers[f"features{size}"]) < TOLERANCE
        assert apart(got["logits"], answers[f"logits{size}"]) < TOLERANCE


def test_microsofts_names_give_the_same_parameters(timm):
    """Their merging stands at the end of a stage; and their files hold index tables and masks."""
    found = weight_files.read(str(timm / "swin.safetensors"))
    renamed = {}
    for name, array in found.arrays.items():
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest}"
        renamed[name.replace("head.fc.", "head.")] = array
    renamed["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    renamed["layers.0.blocks.1.attn_mask"] = np.zeros((16, 16, 16), np.float32)
    one = convert.parameters(found, Backbone())
    other = convert.parameters(dataclasses.replace(found, arrays=renamed), Backbone())
    assert one[0] == other[0] and other[2].origin == "Microsoft Swin"
    assert set(other[2].left_out) - set(one[2].left_out) == {
        "layers.0.blocks.0.attn.relative_position_index",
        "layers.0.blocks.1.attn_mask",
    }
    for name, array in flatten(one[1]).items():
        np.testing.assert_array_equal(flatten(other[1])[name], array)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("vit-b-22k", "ViTModel", {}),
        ("vit-b-1k", "ViTForImageClassification", {}),
        ("swin-b-22k", "SwinModel", {}),
        ("swin-b-1k", "SwinForImageClassification", {}),
    ],
)
def test_a_backbone_of_the_papers_size_is_pytorchs(tmp_path, name, model, options):
    entry = zoo.entry(name)
    made = published(model, options, entry.architecture, tmp_path / "model")
    backbone, provenance = convert.load(Backbone(name=name, weights=str(made.folder)), 224)
    assert backbone.config == entry.architecture
    assert (backbone.mean, backbone.std) == entry.normalisation
    images = pictures(2, 224)
    with torch.no_grad():
        base = getattr(made.model, made.model.base_model_prefix, made.model)
        found = base(torch.tensor(images.transpose(0, 3, 1, 2)))
    pooled = getattr(found, "pooler_output", None)
    want = (found.last_hidden_state[:, 0] if pooled is None else pooled).numpy()
    error = apart(features(backbone.config, backbone.params, images), want)
    print(f"{name}: {error:.1e}, {provenance.left_out}")
    assert error < TOLERANCE
