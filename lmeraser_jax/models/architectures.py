"""Sizes and numerics of the networks as plain values. Nothing here imports JAX: refusals of flags must be quick."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

Gelu = Literal["erf", "tanh", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Architecture of one ViT."""

    image_size: int  # side of the square input, in pixels; a multiple of `patch`
    patch: int  # side of a patch, in pixels
    width: int  # D, a multiple of `heads`
    depth: int  # number of blocks
    heads: int
    mlp: int  # hidden width of a block's MLP
    channels: int = 3  # of the input's colours
    feature: str = "cls"  # the class token after the last LayerNorm; "pooler": tanh of a dense layer on it
    classes: int = 0  # outputs of the public classifier; 0 leaves it out
    epsilon: float = 1e-6  # of every LayerNorm, as the checkpoint's origin has it
    gelu: Gelu = "erf"  # exact, or one of its approximations, as the checkpoint's origin has it
    registers: int = 0  # R, further tokens beside the class token, without positions (DINOv2)
    pre_norm: bool = False  # a LayerNorm of all tokens before the first block (CLIP)

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
    """Architecture of one Swin; fields without a comment are those of `ViTConfig`."""

    image_size: int
    patch: int
    width: int  # D of the first stage; it doubles with each
    depths: tuple[int, ...]  # blocks of each stage
    heads: tuple[int, ...]  # of each stage
    window: int  # side of a window, in patches
    mlp_ratio: float = 4.0  # hidden width of a block's MLP over D
    channels: int = 3
    classes: int = 0
    epsilon: float = 1e-5  # of the blocks' and the last LayerNorm
    gelu: Gelu = "erf"

    @property
    def feature(self) -> str:
        """Kind of the feature: the mean token."""
        return "mean"

    @property
    def feature_size(self) -> int:
        """D of the feature."""
        return self.width * 2 ** (len(self.depths) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of one Llama or Qwen2."""

    vocabulary: int  # V, rows of the embedding
    context: int  # tokens of a row, at most
    width: int  # D
    depth: int  # number of blocks
    heads: int  # of the queries, a multiple of `kv_heads`
    kv_heads: int  # of the keys and values
    head_size: int  # width of a head, even
    mlp: int  # hidden width of a block's MLP
    theta: float  # base of the rotary embedding's wavelengths
    epsilon: float  # of every RMSNorm
    tied: bool  # the output matrix is the embedding
    biased: bool = False  # queries, keys and values have a bias (Qwen2)

    image_size: ClassVar[int] = 0  # it reads no images
    channels: ClassVar[int] = 0
    feature: ClassVar[str] = "mean"  # the mean token after the last RMSNorm

    @property
    def feature_size(self) -> int:
        """D of the feature."""
        return self.width


ImageArchitecture = ViTConfig | SwinConfig
Architecture = ImageArchitecture | DecoderConfig
LATER = ("registers", "pre_norm")  # not described at their defaults: the digests of older backbones stay as they are
FAMILIES: dict[str, type[Architecture]] = {"vit": ViTConfig, "swin": SwinConfig, "decoder": DecoderConfig}


def describe(config: Architecture) -> dict[str, Any]:
    """An architecture as plain values, which `architecture_from` reads."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(config, kind))
    values = dataclasses.asdict(config)
    return {"family": family, **{name: value for name, value in values.items() if value or name not in LATER}}


def architecture_from(values: Mapping[str, Any]) -> Architecture:
    """The inverse of `describe`, also from JSON."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return FAMILIES[fields.pop("family")](**fields)
