"""Published backbones by name: architecture, where the weights are, feature, normalisation, licence.

The four of the paper (5.1) are vit-b-22k, vit-b-1k, swin-b-22k and swin-b-1k, with the feature that its code takes:
tanh of the pooler's dense layer for vit-b-22k, the class token after the last LayerNorm for vit-b-1k, the mean token
for Swin. The feature of DINOv2 and CLIP is the class token after the last LayerNorm, before CLIP's projection. The
revision "main" is the newest one; every workdir records the digest of what was read.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError
from lmeraser_jax.models.architectures import Architecture, SwinConfig, ViTConfig

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # (mean, std) of pixels in [0, 1]
HALF = (0.5,) * 3, (0.5,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FREE = ("image_size", "classes", "feature", "epsilon", "gelu")  # may differ: the numerics follow the file's origin


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published backbone."""

    architecture: Architecture  # at its native image size, without the classifier
    hub: str  # id on the Hugging Face hub
    about: str  # what it was trained on
    revision: str = "main"  # commit on the hub
    normalisation: Normalisation = HALF
    licence: str = "Apache-2.0"  # of the weights, as their publisher states it


def _vit(size: str, short: str, width: int, depth: int = 12) -> Entry:
    hub = f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k"
    return Entry(_vit_config(width, depth), hub, f"ViT-{short}/16, ImageNet-22K, then fine-tuned on ImageNet-1K")


def _vit_config(width: int, depth: int = 12, image_size: int = 224, patch: int = 16, **others: Any) -> ViTConfig:
    sizes = {"width": width, "depth": depth, "heads": width // 64, "mlp": 4 * width}
    return ViTConfig(image_size=image_size, patch=patch, **sizes, **others)


def _dinov2(size: str, short: str, width: int, depth: int = 12, registers: int = 0) -> Entry:
    config = _vit_config(width, depth, 518, 14, registers=registers)
    kind = "-with-registers" if registers else ""
    about = f"DINOv2 ViT-{short}/14{f', {registers} registers' if registers else ''}, LVD-142M, no labels"
    return Entry(config, f"facebook/dinov2{kind}-{size}", about, normalisation=IMAGENET)


def _clip(size: str, short: str, patch: int, width: int, depth: int = 12) -> Entry:
    config = _vit_config(width, depth, patch=patch, epsilon=1e-5, gelu="sigmoid", pre_norm=True)
    about = f"CLIP's vision tower, ViT-{short}/{patch}, 400 million images with texts"
    return Entry(config, f"openai/clip-vit-{size}-patch{patch}", about, normalisation=CLIP, licence="MIT")


def _swin(hub: str, about: str, width: int, third: int) -> Entry:
    heads = tuple(width // 32 * 2**stage for stage in range(4))
    config = SwinConfig(image_size=224, patch=4, width=width, depths=(2, 2, third, 2), heads=heads, window=7)
    return Entry(config, f"microsoft/swin-{hub}", about, normalisation=IMAGENET)


ZOO = {
    "vit-b-22k": Entry(
        _vit_config(768, feature="pooler", epsilon=1e-12),
        "google/vit-base-patch16-224-in21k",
        "ViT-B/16, ImageNet-22K",
        "b4569560a39a0f1af58e3ddaf17facf20ab919b0",
    ),
    "vit-b-1k": Entry(
        _vit_config(768, epsilon=1e-12),
        "google/vit-base-patch16-224",
        "ViT-B/16, ImageNet-22K, then fine-tuned on ImageNet-1K",
        "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    ),
    "swin-b-22k": _swin("base-patch4-window7-224-in22k", "Swin-B, ImageNet-22K", 128, 18),
    "swin-b-1k": _swin("base-patch4-window7-224", "Swin-B, ImageNet-1K", 128, 18),
    "vit-ti": _vit("tiny", "Tiny", 192),
    "vit-s": _vit("small", "S", 384),
    "vit-l": _vit("large", "L", 1024, depth=24),
    "swin-t": _swin("tiny-patch4-window7-224", "Swin-T, ImageNet-1K", 96, 6),
    "swin-s": _swin("small-patch4-window7-224", "Swin-S, ImageNet-1K", 96, 18),
    "dinov2-s": _dinov2("small", "S", 384),
    "dinov2-b": _dinov2("base", "B", 768),
    "dinov2-l": _dinov2("large", "L", 1024, depth=24),
    "dinov2-s-reg": _dinov2("small", "S", 384, registers=4),
    "dinov2-b-reg": _dinov2("base", "B", 768, registers=4),
    "dinov2-l-reg": _dinov2("large", "L", 1024, depth=24, registers=4),
    "clip-b-32": _clip("base", "B", 32, 768),
    "clip-b-16": _clip("base", "B", 16, 768),
    "clip-l-14": _clip("large", "L", 14, 1024, depth=24),
}


def entry(name: str) -> Entry:
    """The backbone of that name. Raises `UserError` that lists the names."""
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--config.backbone.name={name}: unknown; {hint}legal: {', '.join(ZOO)}")
    return ZOO[name]


def download_hint(name: str) -> str:
    """What to download for a named backbone, and where to put it; "" without a name."""
    if not name:
        return ""
    published = entry(name)
    return (
        f"{name} is {published.hub} on the Hugging Face hub (revision {published.revision}, {published.licence}):"
        " download its model.safetensors, config.json and, where there is one, preprocessor_config.json into a folder"
        " and give --config.backbone.weights=FOLDER, or let --config.backbone.weights=hub download it"
    )


def refuse_absent(chosen: settings.Backbone) -> None:
    """Raises `UserError` where `backbone.weights` names a path and nothing is there; loads no JAX."""
    if chosen.weights == "hub" or chosen.weights.startswith("hub:") or Path(chosen.weights).exists():
        return
    expected = "expected a file (.safetensors, .npz, .msgpack), a folder, or hub:OWNER/NAME for one of the hub's"
    hint = download_hint(chosen.name) or expected
    raise UserError(f"--config.backbone.weights={chosen.weights}: no such file or folder; {hint}")


def differences(name: str, architecture: Architecture) -> list[str]:
    """What in an architecture is not as the named backbone has it: a line for each setting."""
    published = entry(name).architecture
    kind, published_kind = (type(config).__name__.removesuffix("Config") for config in (architecture, published))
    if kind != published_kind:
        return [f"{name} is a {published_kind}, the weights are a {kind}"]
    values, expected = dataclasses.asdict(architecture), dataclasses.asdict(published)
    return [
        f"{field} is {values[field]}, {name} has {value}"
        for field, value in expected.items()
        if field not in FREE and values[field] != value
    ]
