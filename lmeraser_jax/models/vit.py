"""Vision Transformer (Dosovitskiy et al., 2020) as a Flax NNX module.

Pre-norm blocks, class token, learned position embedding; registers as DINOv2 may have (Darcet et al., 2023), and the
LayerNorm before the first block that CLIP's vision tower has (Radford et al., 2021). The patch embedding is a reshape
and one matrix product, so that a `vmap` over lanes leaves a single large product for the whole device.

Shapes: B batch, H W C image, R registers, N tokens (1 + R + number of patches), D width, A heads.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmeraser_jax.models.architectures import ViTConfig
from lmeraser_jax.models.layers import MLP, LayerNorm, attention, extract_patches, self_attention
from lmeraser_jax.models.lora import Linear


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, rngs=rngs)
        self.out = Linear(config.width, config.width, rngs=rngs)

    def __call__(self, x: jax.Array, queries: int | None = None) -> jax.Array:
        """Tokens [B, N, D] -> [B, N, D]; or only the first `queries` of them, which still attend to all."""
        if queries is None:
            return self.out(self_attention(self.qkv(x), self.heads))
        b, n, d = x.shape
        q = self.qkv.columns(x[:, :queries], slice(d)).reshape(b, queries, self.heads, -1)
        k, v = jnp.moveaxis(self.qkv.columns(x, slice(d, None)).reshape(b, n, 2, self.heads, -1), 2, 0)
        return self.out(attention(q, k, v))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, config.epsilon, rngs)
        self.attention = Attention(config, rngs)
        self.norm2 = LayerNorm(config.width, config.epsilon, rngs)
        self.mlp = MLP(config.width, config.mlp, config.gelu, rngs)

    def __call__(self, x: jax.Array, queries: int | None = None) -> jax.Array:
        """As `Attention`: [B, N, D] -> [B, N, D], or [B, queries, D]."""
        x = x[:, :queries] + self.attention(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """The whole network: `features` is the frozen part, `head` the public classifier (may be absent)."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.config = config
        tokens = 1 + config.grid**2
        self.embed = nnx.Linear(config.patch**2 * config.channels, config.width, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, config.width), jnp.float32))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, config.width), jnp.float32))
        if config.registers:
            self.registers = nnx.Param(jnp.zeros((1, config.registers, config.width), jnp.float32))
        if config.pre_norm:
            self.pre_norm = LayerNorm(config.width, config.epsilon, rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.norm = LayerNorm(config.width, config.epsilon, rngs)
        if config.feature == "pooler":
            self.pooler = nnx.Linear(config.width, config.width, rngs=rngs)
        if config.classes:
            self.head = nnx.Linear(config.width, config.classes, rngs=rngs)

    def hidden_states(self, images: jax.Array, blocks: int | None = None) -> list[jax.Array]:
        """Tokens [B, N, D] before the first block and after each of the first `blocks`; images as in `features`."""
        x = self.embed(extract_patches(images, self.config.patch))
        x = x.reshape(len(x), -1, x.shape[-1])  # [B, N-1-R, D]
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(x.dtype)  # [B, N-R, D]
        if self.config.registers:
            registers = jnp.broadcast_to(self.registers[...].astype(x.dtype), (x.shape[0], *self.registers.shape[1:]))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)  # [B, N, D]
        states = [self.pre_norm(x) if self.config.pre_norm else x]
        for block in list(self.blocks)[:blocks]:
            states.append(block(states[-1]))
        return states

    def features(self, images: jax.Array) -> jax.Array:
        """Feature of each image: normalised [B, H, W, C] -> [B, D], of the same dtype."""
        x = self.hidden_states(images, len(self.blocks) - 1)[-1]
        x = self.norm(self.blocks[-1](x, queries=1))[:, 0]  # [B, D]; only the class token leaves the last block
        return jnp.tanh(self.pooler(x)) if self.config.feature == "pooler" else x

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of the public classifier: [B, H, W, C] -> [B, classes]."""
        return self.head(self.features(images))


def interpolate_positions(positions: np.ndarray, grid: int, antialias: bool = True) -> np.ndarray:
    """Resizes a position embedding to `grid` patches along a side (bicubic; class token kept).

    [1, 1 + g * g, D] -> float32 [1, 1 + grid * grid, D]. With `antialias` as timm and Pillow do it (kernel a = -0.5,
    widened when it shrinks), else as PyTorch's interpolate and with it transformers (a = -0.75, four neighbours).
    """
    old = math.isqrt(positions.shape[1] - 1)
    positions = np.asarray(positions, np.float32)
    if old == grid:
        return positions
    weights = cubic_matrix(old, grid, antialias)
    cls, patch = positions[:, :1], positions[0, 1:].reshape(old, old, -1)
    patch = np.einsum("yh,xw,hwd->yxd", weights, weights, patch, optimize=True)
    return np.concatenate([cls, patch.reshape(1, grid * grid, -1).astype(np.float32)], axis=1)


def cubic_matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """Weights [new, old] float64 of a bicubic resize; rows sum to 1."""
    a, scale = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centres)[:, None] + np.arange(-2 * math.ceil(scale), 2 * math.ceil(scale) + 2)  # [new, taps]
    x = np.abs(taps - centres[:, None]) / scale
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    values = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:  # what lies outside counts nothing; PyTorch's plain kernel repeats the edge
        values = np.where((taps >= 0) & (taps < old), values, 0.0)
    columns = np.clip(taps, 0, old - 1).astype(int)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], columns), values)
    return weights / weights.sum(axis=1, keepdims=True)
