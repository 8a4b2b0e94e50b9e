"""Vision Transformer (Dosovitskiy et al., 2020) as a Flax NNX module.

Pre-norm blocks, class token, learned position embedding, exact GELU, LayerNorm epsilon 1e-6: the
numerics of the public timm / google checkpoints. The patch embedding is a reshape and one matrix
product, so that a `vmap` over lanes leaves a single large product for the whole device.

Shapes: B batch, H W C image, N tokens (1 + number of patches), D width, A heads.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

LAYER_NORM_EPSILON = 1e-6


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

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch


class LayerNorm(nnx.LayerNorm):
    """Statistics in float32 whatever the compute dtype."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        super().__init__(config.width, epsilon=LAYER_NORM_EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:  # [..., D] -> [..., D]
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes bfloat16 input with float32 statistics
            return super().__call__(x, mask=mask)


class Attention(nnx.Module):
    """Multi-head self-attention; softmax in float32 whatever the compute dtype."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = nnx.Linear(config.width, 3 * config.width, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, N, D] -> [B, N, D]
        b, n, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads), 2, 0)
        scores = jnp.einsum("bqad,bkad->baqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (d // self.heads) ** -0.5, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("baqk,bkad->bqad", weights, v)
        return self.out(mixed.reshape(b, n, d))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config, rngs)
        self.attention = Attention(config, rngs)
        self.norm2 = LayerNorm(config, rngs)
        self.fc1 = nnx.Linear(config.width, config.mlp, rngs=rngs)
        self.fc2 = nnx.Linear(config.mlp, config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, N, D] -> [B, N, D]
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """The whole network: `features` is the frozen part, `head` the public classifier (may be absent)."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.config = config
        inputs = config.patch * config.patch * config.channels
        tokens = 1 + config.grid**2
        self.embed = nnx.Linear(inputs, config.width, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, config.width)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, config.width)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.norm = LayerNorm(config, rngs)
        if config.feature == "pooler":
            self.pooler = nnx.Linear(config.width, config.width, rngs=rngs)
        if config.classes:
            self.head = nnx.Linear(config.width, config.classes, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """Feature of each image.

        Args:
            images: [B, H, W, C] float, normalised; H = W = `config.image_size`.

        Returns:
            [B, D] in the dtype of the images.
        """
        x = self.embed(patches(images, self.config.patch))  # [B, N-1, D]
        cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(x.dtype)  # [B, N, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[:, 0]  # [B, D]
        return jnp.tanh(self.pooler(x)) if self.config.feature == "pooler" else x

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of the public classifier: [B, H, W, C] -> [B, classes]."""
        return self.head(self.features(images))


def patches(images: jax.Array, patch: int) -> jax.Array:
    """Cuts images into flat patches, row by row: [B, H, W, C] -> [B, H/p * W/p, p * p * C]."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def interpolate_positions(positions: jax.Array, grid: int) -> jax.Array:
    """Resizes a position embedding to another number of patches (bicubic, antialiased; class token kept).

    Args:
        positions: [1, 1 + g * g, D] float.
        grid: wanted patches along a side.

    Returns:
        [1, 1 + grid * grid, D] float32.
    """
    old = math.isqrt(positions.shape[1] - 1)
    assert old * old == positions.shape[1] - 1, positions.shape
    if old == grid:
        return jnp.asarray(positions, jnp.float32)
    cls, patch = positions[:, :1], positions[:, 1:].reshape(old, old, -1)
    patch = jax.image.resize(patch, (grid, grid, patch.shape[-1]), "cubic", antialias=True)
    return jnp.concatenate([cls, patch.reshape(1, grid * grid, -1)], axis=1)
