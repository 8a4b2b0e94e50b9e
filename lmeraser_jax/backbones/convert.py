"""Published weights -> parameters: the architecture is read off the shapes, all mismatches are listed.

Known layout: timm's names in an .npz ("blocks.0.attn.qkv.weight" and so on; linear weights [out, in],
patch embedding OIHW).
"""

import math
import re
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.backbones.backbone import Backbone, Params
from lmeraser_jax.backbones.vit import ViTConfig, interpolate_positions
from lmeraser_jax.config import Config
from lmeraser_jax.errors import UserError, raise_all

RENAMES = (  # timm name -> ours
    (r"^patch_embed\.proj\.", "embed."),
    (r"^cls_token$", "cls"),
    (r"^pos_embed$", "positions"),
    (r"^pre_logits\.fc\.", "pooler."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc", ".fc"),
    (r"(norm[12]?)\.weight$", r"\1.scale"),
    (r"\.weight$", ".kernel"),
    (r"\.", "/"),
)
NEEDED = ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.mlp.fc1.weight")
RANKS = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2}


def read_npz(path: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz of weights. Raises `UserError` when it cannot be one."""
    if not Path(path).is_file():
        raise UserError(f"--config.backbone.weights={path}: no such file; expected a timm-named .npz of a ViT")
    try:
        with open(path, "rb") as raw:  # np.load of a path leaves a damaged file open
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds a single array")
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--config.backbone.weights={path} is not a readable .npz: {error}") from error
    missing = [name for name in NEEDED if name not in arrays]
    raise_all([f"{path} is no timm-named ViT; it lacks {', '.join(missing)}"] if missing else [])
    raise_all(_misshapen(arrays), f"{path} is no timm-named ViT:")
    return arrays


def _misshapen(arrays: dict[str, np.ndarray]) -> list[str]:
    """Arrays whose shape tells no architecture."""
    found = [
        f"{name} {list(arrays[name].shape)}: must have {rank} dimensions"
        for name, rank in RANKS.items()
        if name in arrays and arrays[name].ndim != rank
    ]
    positions = arrays["pos_embed"].shape
    if len(positions) == 3 and (positions[1] < 2 or math.isqrt(positions[1] - 1) ** 2 != positions[1] - 1):
        found.append(f"pos_embed {list(positions)}: must hold one class token and a square of patches")
    return found


def architecture(arrays: dict[str, np.ndarray], heads: int, feature: str) -> ViTConfig:
    """The ViT that the arrays belong to, at the image size it was trained with.

    Args:
        arrays: timm-named weights.
        heads: attention heads, which no shape tells; 0: width / 64.
        feature: cls | pooler.
    """
    width, channels, patch, _ = arrays["patch_embed.proj.weight"].shape
    blocks = [int(m.group(1)) for name in arrays if (m := re.match(r"blocks\.(\d+)\.", name))]
    grid = math.isqrt(arrays["pos_embed"].shape[1] - 1)
    return ViTConfig(
        image_size=grid * patch,
        patch=patch,
        channels=channels,
        width=width,
        depth=1 + max(blocks),
        heads=heads or max(1, width // 64),
        mlp=len(arrays["blocks.0.mlp.fc1.weight"]),
        feature=feature,
        classes=len(arrays["head.weight"]) if "head.weight" in arrays else 0,
    )


def convert(arrays: dict[str, np.ndarray], config: ViTConfig, name: str) -> Params:
    """Nested parameters of `config` from timm-named arrays; positions are resized to its image size.

    Raises:
        UserError: lists every missing, unused or misshapen array.
    """
    flat = {}
    for old, array in arrays.items():
        if array.dtype.kind != "f":
            raise UserError(f"{name}: {old} must be floating point, is {array.dtype}")
        new = old
        for pattern, replacement in RENAMES:
            new = re.sub(pattern, replacement, new)
        array = np.asarray(array, np.float32)
        if new == "embed/kernel":  # OIHW -> [patch row, patch column, channel] flattened, width
            array = array.transpose(2, 3, 1, 0).reshape(-1, len(array))
        elif new.endswith("/kernel") and array.ndim == 2:
            array = array.T
        elif new == "positions" and array.ndim == 3:
            array = np.asarray(interpolate_positions(jnp.asarray(array), config.grid))
        flat[new] = array
    return frozen.from_flat(config, flat, name)


def load(config: Config) -> Backbone:
    """The backbone that `config.backbone.weights` names, for images of `config.data.image_size`.

    Raises:
        UserError: the file, the image size or a shape does not fit.
    """
    arrays = read_npz(config.backbone.weights)
    native = architecture(arrays, config.backbone.heads, config.backbone.feature)
    size = config.data.image_size
    raise_all(misfits(native, size))
    wanted = ViTConfig(**{**vars(native), "image_size": size})
    params = convert(arrays, wanted, config.backbone.weights)
    return frozen.make(wanted, params, config.backbone.mean, config.backbone.std)


def misfits(vit: ViTConfig, image_size: int) -> list[str]:
    """What keeps an architecture from an image size, and its own numbers from each other."""
    found = []
    if image_size % vit.patch:
        found.append(f"--config.data.image_size={image_size}: must be a multiple of the patch size {vit.patch}")
    if vit.width % vit.heads:
        found.append(f"--config.backbone.heads={vit.heads}: must divide the width {vit.width}")
    return found
