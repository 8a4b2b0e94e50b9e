"""What ViT and Swin share: float32 LayerNorm, the GELUs, the MLP, attention, cutting images into patches.

`jax.checkpoint` stands around functions that are cheap beside the products: the backward pass computes them again, in
one loop with what uses their derivatives, instead of reading what the forward pass would have to write.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lmeraser_jax.models.architectures import Gelu
from lmeraser_jax.models.lora import Linear


class LayerNorm(nnx.LayerNorm):
    """Statistics in float32 whatever the compute dtype."""

    def __init__(self, width: int, epsilon: float, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:  # [..., D] -> [..., D]
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes bfloat16 input with float32 statistics
            return jax.checkpoint(functools.partial(super().__call__, mask=mask))(x)


class MLP(nnx.Module):
    """Dense, GELU, dense. The exact GELU, or the approximation that a checkpoint was trained with."""

    def __init__(self, width: int, hidden: int, gelu: Gelu, rngs: nnx.Rngs):
        self.gelu: Gelu = gelu
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        return self.fc2(jax.checkpoint(self._activation)(self.fc1(x)))

    def _activation(self, x: jax.Array) -> jax.Array:
        return x * jax.nn.sigmoid(1.702 * x) if self.gelu == "sigmoid" else jax.nn.gelu(x, self.gelu == "tanh")


def self_attention(qkv: jax.Array, heads: int, bias: jax.Array | None = None) -> jax.Array:
    """Attention of A heads from stacked queries, keys and values, before the output projection.

    qkv [B, N, 3 * D] -> [B, N, D]; `bias` float32 [A, N, N] or [B, A, N, N] is added to the scores.
    """
    b, n, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    stacked = jax.lax.split(qkv.reshape(b, n, 3, heads, d // heads), (1, 1, 1), axis=2)  # its gradient concatenates
    q, k, v = (jnp.squeeze(x, 2) for x in stacked)
    return attention(q, k, v, bias)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Queries [B, M, A, D / A], keys and values [B, N, A, D / A] -> [B, M, D]; the softmax is in float32."""
    scores = jnp.einsum("bqad,bkad->baqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("baqk,bkad->bqad", weights, v).reshape(*q.shape[:2], -1)


def extract_patches(images: jax.Array, patch: int) -> jax.Array:
    """Cuts images into flat patches, row by row: [B, H, W, C] -> [B, H/p, W/p, p * p * C]."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)
