"""Published backbones by name: architecture, where the weights are, feature, normalisation, licence.

The four of the paper (5.1) are vit-b-22k, vit-b-1k, swin-b-22k and swin-b-1k, with the feature that its code
takes: tanh of the pooler's dense layer for vit-b-22k, the class token after the last LayerNorm for
vit-b-1k, the mean token for Swin. A revision of "main" is the newest one; the digest of what was read is
recorded in every workdir.
"""

import dataclasses
import difflib

from lmeraser_jax.errors import UserError
from lmeraser_jax.models.backbone import Architecture
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig

HALF = (0.5,) * 3, (0.5,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published backbone.

    Attributes:
        architecture: at its native image size, without the classifier.
        hub: id on the Hugging Face hub.
        revision: commit there.
        normalisation: (mean, std) of pixels in [0, 1].
        licence: of the weights, as their publisher states it.
        about: what it was trained on.
    """

    architecture: Architecture
    hub: str
    revision: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    licence: str
    about: str


def _vit(width: int, depth: int, feature: str = "cls", epsilon: float = 1e-6) -> ViTConfig:
    return ViTConfig(
        image_size=224,
        patch=16,
        width=width,
        depth=depth,
        heads=width // 64,
        mlp=4 * width,
        feature=feature,
        epsilon=epsilon,
    )


def _swin(width: int, third: int) -> SwinConfig:
    heads = tuple(width // 32 * 2**stage for stage in range(4))
    return SwinConfig(image_size=224, patch=4, width=width, depths=(2, 2, third, 2), heads=heads, window=7)


ZOO = {
    "vit-b-22k": Entry(
        _vit(768, 12, "pooler", 1e-12),
        "google/vit-base-patch16-224-in21k",
        "b4569560a39a0f1af58e3ddaf17facf20ab919b0",
        HALF,
        "Apache-2.0",
        "ViT-B/16, ImageNet-22K",
    ),
    "vit-b-1k": Entry(
        _vit(768, 12, epsilon=1e-12),
        "google/vit-base-patch16-224",
        "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
        HALF,
        "Apache-2.0",
        "ViT-B/16, ImageNet-22K, then fine-tuned on ImageNet-1K",
    ),
    "swin-b-22k": Entry(
        _swin(128, 18),
        "microsoft/swin-base-patch4-window7-224-in22k",
        "main",
        IMAGENET,
        "Apache-2.0",
        "Swin-B, ImageNet-22K",
    ),
    "swin-b-1k": Entry(
        _swin(128, 18), "microsoft/swin-base-patch4-window7-224", "main", IMAGENET, "Apache-2.0", "Swin-B, ImageNet-1K"
    ),
    "vit-ti": Entry(
        _vit(192, 12),
        "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "main",
        HALF,
        "Apache-2.0",
        "ViT-Tiny/16, ImageNet-22K, then fine-tuned on ImageNet-1K",
    ),
    "vit-s": Entry(
        _vit(384, 12),
        "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
        "main",
        HALF,
        "Apache-2.0",
        "ViT-S/16, ImageNet-22K, then fine-tuned on ImageNet-1K",
    ),
    "vit-l": Entry(
        _vit(1024, 24),
        "timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
        "main",
        HALF,
        "Apache-2.0",
        "ViT-L/16, ImageNet-22K, then fine-tuned on ImageNet-1K",
    ),
    "swin-t": Entry(
        _swin(96, 6), "microsoft/swin-tiny-patch4-window7-224", "main", IMAGENET, "Apache-2.0", "Swin-T, ImageNet-1K"
    ),
    "swin-s": Entry(
        _swin(96, 18), "microsoft/swin-small-patch4-window7-224", "main", IMAGENET, "Apache-2.0", "Swin-S, ImageNet-1K"
    ),
}


def entry(name: str) -> Entry:
    """The backbone of that name. Raises `UserError` that lists what exists."""
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--config.backbone.name={name}: unknown; {hint}legal: {', '.join(ZOO)}")
    return ZOO[name]


def how_to_get(name: str) -> str:
    """What to download for a named backbone, and where to put it; "" for no name."""
    if not name:
        return ""
    found = entry(name)
    return (
        f"{name} is {found.hub} on the Hugging Face hub (revision {found.revision}, {found.licence}): download its"
        " model.safetensors, config.json and, where there is one, preprocessor_config.json into a folder and give"
        " --config.backbone.weights=FOLDER, or let --config.backbone.weights=hub download it"
    )


def differing(name: str, found: Architecture) -> list[str]:
    """What in an architecture is not as the named backbone has it: a line for each setting."""
    wanted = entry(name).architecture
    if type(wanted) is not type(found):
        return [f"{name} is a {type(wanted).__name__[:-6]}, the weights are a {type(found).__name__[:-6]}"]
    free = ("image_size", "classes", "feature", "epsilon", "gelu")  # numerics follow the file's origin
    return [
        f"{field.name} is {getattr(found, field.name)}, {name} has {getattr(wanted, field.name)}"
        for field in dataclasses.fields(wanted)
        if field.name not in free and getattr(found, field.name) != getattr(wanted, field.name)
    ]
