"""Sizes and numerics of ViT and Swin as plain values. Nothing here imports JAX: refusals of flags must be quick."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Gelu = Literal["erf", "tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Architecture of one ViT.

    Attributes:
        image_size: side of the square input, in pixels; a multiple of `patch`.
        patch: side of a patch, in pixels.
        channels: colour channels of the input.
        width: D, a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp: hidden width of the block's MLP.
        feature: "cls" (class token after the final LayerNorm) or "pooler" (tanh of a dense layer on it,
            the feature that ViT-B trained on ImageNet-22K has).
        classes: outputs of the public classifier; 0 leaves it out.
        epsilon: of every LayerNorm, as the checkpoint's origin has it.
        gelu: "erf" (exact) or "tanh", as the checkpoint's origin has it.
    """

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp: int
    channels: int = 3
    feature: str = "cls"
    classes: int = 0
    epsilon: float = 1e-6
    gelu: Gelu = "erf"

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch

    @property
    def feature_size(self) -> int:
        """D of the feature."""
        return self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Architecture of one Swin.

    Attributes:
        image_size: side of the square input, in pixels; a multiple of `patch`.
        patch: side of a patch, in pixels.
        channels: colour channels of the input.
        width: D of the first stage; it doubles with each.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: side of a window, in patches.
        mlp_ratio: hidden width of a block's MLP over D.
        classes: outputs of the public classifier; 0 leaves it out.
        epsilon: of the blocks' and the last LayerNorm.
        gelu: "erf" (exact) or "tanh".
    """

    image_size: int
    patch: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp_ratio: float = 4.0
    channels: int = 3
    classes: int = 0
    epsilon: float = 1e-5
    gelu: Gelu = "erf"

    @property
    def feature(self) -> str:
        """Kind of the feature: the mean token."""
        return "mean"

    @property
    def feature_size(self) -> int:
        """D of the feature."""
        return self.width * 2 ** (len(self.depths) - 1)


Architecture = ViTConfig | SwinConfig
FAMILIES: dict[str, type[Architecture]] = {"vit": ViTConfig, "swin": SwinConfig}


def describe(config: Architecture) -> dict[str, Any]:
    """An architecture as plain values, which `architecture_from` reads."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(config, kind))
    return {"family": family, **dataclasses.asdict(config)}


def architecture_from(values: Mapping[str, Any]) -> Architecture:
    """The inverse of `describe`, also from JSON."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return FAMILIES[fields.pop("family")](**fields)
