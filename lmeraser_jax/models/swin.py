"""Swin Transformer (Liu et al., 2021) as a Flax NNX module; the feature is the mean token.

Attention inside windows, every second block with windows shifted by half their side; patch merging halves the grid
between stages. A grid that is no multiple of the window is padded after the LayerNorm, as in the public code.
A grid smaller than the window gets one window of the grid's size, which uses the bias table's rows for its distances.

Shapes: B batch, H W grid, D width of the stage, A heads, w side of a window, M windows of an image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmeraser_jax.models.architectures import SwinConfig
from lmeraser_jax.models.layers import MLP, LayerNorm, extract_patches, self_attention
from lmeraser_jax.models.lora import Linear

OUTSIDE = -100.0  # added to the score of a pair that only the shift brought into one window; as in the public code
MERGE_EPSILON = 1e-5  # of the LayerNorms around embedding and merging, whatever epsilon the blocks have


class WindowAttention(nnx.Module):
    """Attention inside windows with a learned bias for every distance between two patches."""

    def __init__(self, config: SwinConfig, width: int, heads: int, rngs: nnx.Rngs):
        self.heads, self.window = heads, config.window
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.table = nnx.Param(jnp.zeros(((2 * config.window - 1) ** 2, heads), jnp.float32))

    def __call__(self, x: jax.Array, side: int, mask: np.ndarray | None) -> jax.Array:
        """[B * M, w * w, D] -> the same; `side` is w, `mask` float32 [M, w * w, w * w] or None."""
        bias = self.table[...][distances(side, self.window)].astype(jnp.float32)  # [w * w, w * w, A]
        bias = jnp.moveaxis(bias, -1, 0)  # [A, w * w, w * w]
        if mask is not None:
            count, tokens = len(mask), side * side
            bias = bias[None] + jnp.asarray(mask)[:, None]  # [M, A, w * w, w * w]
            shape = (x.shape[0] // count, count, self.heads, tokens, tokens)
            bias = jnp.broadcast_to(bias[None], shape).reshape(-1, self.heads, tokens, tokens)
        return self.out(self_attention(self.qkv(x), self.heads, bias))


class Block(nnx.Module):
    """x + attention(norm(x)) in windows, then x + mlp(norm(x))."""

    def __init__(self, config: SwinConfig, width: int, heads: int, shifted: bool, rngs: nnx.Rngs):
        self.window, self.shifted = config.window, shifted
        self.norm1 = LayerNorm(width, config.epsilon, rngs)
        self.attention = WindowAttention(config, width, heads, rngs)
        self.norm2 = LayerNorm(width, config.epsilon, rngs)
        self.mlp = MLP(width, int(config.mlp_ratio * width), config.gelu, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, D] -> [B, H, W, D]
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: jax.Array) -> jax.Array:
        b, h, w, d = x.shape
        side = min(self.window, h, w)
        shift = side // 2 if self.shifted and min(h, w) > self.window else 0
        high, wide = -(-h // side) * side, -(-w // side) * side
        x = jnp.pad(x, ((0, 0), (0, high - h), (0, wide - w), (0, 0)))
        x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = x.reshape(b, high // side, side, wide // side, side, d).transpose(0, 1, 3, 2, 4, 5)
        mask = shift_mask(high, wide, side, shift) if shift else None
        x = self.attention(x.reshape(-1, side * side, d), side, mask)
        x = x.reshape(b, high // side, wide // side, side, side, d).transpose(0, 1, 3, 2, 4, 5)
        x = jnp.roll(x.reshape(b, high, wide, d), (shift, shift), (1, 2))
        return x[:, :h, :w]


class Merging(nnx.Module):
    """Joins 2 x 2 patches into one of twice the width; an odd grid is padded with zeros."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * width, MERGE_EPSILON, rngs)
        self.reduction = nnx.Linear(4 * width, 2 * width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, D] -> [B, H/2, W/2, 2D]
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        corners = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


class Stage(nnx.Module):
    """Blocks of one width, then merging (not after the last stage)."""

    def __init__(self, config: SwinConfig, index: int, rngs: nnx.Rngs):
        width, heads = config.width * 2**index, config.heads[index]
        self.blocks = nnx.List([Block(config, width, heads, bool(i % 2), rngs) for i in range(config.depths[index])])
        if index + 1 < len(config.depths):
            self.merging = Merging(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, D] -> [B, H/2, W/2, 2D], or the same in the last stage
        for block in self.blocks:
            x = block(x)
        return self.merging(x) if hasattr(self, "merging") else x


class Swin(nnx.Module):
    """The whole network: `features` is the frozen part, `head` the public classifier (may be absent)."""

    def __init__(self, config: SwinConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Linear(config.patch**2 * config.channels, config.width, rngs=rngs)
        self.embed_norm = LayerNorm(config.width, MERGE_EPSILON, rngs)
        self.stages = nnx.List([Stage(config, index, rngs) for index in range(len(config.depths))])
        self.norm = LayerNorm(config.feature_size, config.epsilon, rngs)
        if config.classes:
            self.head = nnx.Linear(config.feature_size, config.classes, rngs=rngs)

    def hidden_states(self, images: jax.Array) -> list[jax.Array]:
        """Grid [B, H, W, D] before the first stage and after each one (after its merging)."""
        states = [self.embed_norm(self.embed(extract_patches(images, self.config.patch)))]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return states

    def features(self, images: jax.Array) -> jax.Array:
        """Mean token after the last LayerNorm: normalised images [B, H, W, C] -> [B, D], of the same dtype."""
        return jnp.mean(self.norm(self.hidden_states(images)[-1]), axis=(1, 2))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of the public classifier: [B, H, W, C] -> [B, classes]."""
        return self.head(self.features(images))


@functools.lru_cache(maxsize=64)
def distances(side: int, window: int) -> np.ndarray:
    """Row of the bias table for each pair of patches of a window of `side`, int [w * w, w * w].

    The table has a row for each distance (dy, dx) in a window of side `window`, each in -window + 1 .. window - 1.
    """
    y, x = (axis.reshape(-1) for axis in np.mgrid[:side, :side])
    dy, dx = y[:, None] - y[None] + window - 1, x[:, None] - x[None] + window - 1
    return dy * (2 * window - 1) + dx


@functools.lru_cache(maxsize=64)
def shift_mask(high: int, wide: int, side: int, shift: int) -> np.ndarray:
    """float32 [M, w * w, w * w]: `OUTSIDE` for pairs of patches that only the cyclic shift made neighbours."""
    y, x = np.arange(high), np.arange(wide)
    band_y = (y >= high - side).astype(int) + (y >= high - shift)
    band_x = (x >= wide - side).astype(int) + (x >= wide - shift)
    region = 3 * band_y[:, None] + band_x[None]
    windows = region.reshape(high // side, side, wide // side, side).transpose(0, 2, 1, 3).reshape(-1, side * side)
    return np.where(windows[:, :, None] == windows[:, None], 0.0, OUTSIDE).astype(np.float32)
