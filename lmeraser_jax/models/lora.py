"""Low-rank adapters of dense layers (LoRA, Hu et al., 2021).

A layer of inputs x [..., D] and outputs [..., E] with a frozen kernel W and bias b computes (their Eq. 3)

    x W + b + (alpha / R) (x A) B,    A [D, R], B [R, E],

and only A and B are tuned. The product A B is never added to W: so no gradient of W's size is computed, and all lanes
of a device, each with adapters of its own, share one product with W.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import seed_words

Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Size and scale of the adapters of a network."""

    rank: int  # R
    alpha: float  # what an adapter adds is multiplied by alpha / R
    layers: int = 0  # only the last so many blocks have adapters; 0: all


class Linear(nnx.Linear):
    """A dense layer of a block's attention or MLP, to which `adapt` can give an adapter."""

    scale: float = 0.0  # alpha / R; 0: no adapter
    lora_a: nnx.LoRAParam  # A, if there is an adapter
    lora_b: nnx.LoRAParam  # B, likewise

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:  # [..., D] -> [..., E]
        return self._adapted(super().__call__(x, out_sharding), x, slice(None))

    def columns(self, x: jax.Array, columns: slice) -> jax.Array:
        """The chosen outputs alone: [B, N, D] -> [B, N, number of columns]."""
        assert self.bias is not None
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return self._adapted(x @ kernel[:, columns] + bias[None, None, columns], x, columns)

    def _adapted(self, y: jax.Array, x: jax.Array, columns: slice) -> jax.Array:
        if not self.scale:
            return y
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        if a.ndim == 3:  # [B, D, R]: every row of the batch has an adapter of its own
            return y + (x @ (self.scale * a)) @ b[..., columns]
        flat = x.reshape(-1, x.shape[-1])  # [tokens, D]: with one axis the products take two thirds of the time on CPU
        return y + ((flat @ (self.scale * a)) @ b[:, columns]).reshape(y.shape)


def adapt(model: Model, spec: LoraSpec) -> Model:
    """Gives every `Linear` in the last `spec.layers` blocks of a network an adapter of zeros, in place.

    Blocks are the members of lists named `blocks`, in the order of the forward pass. Raises `UserError` where there are
    fewer of them, or where the rank is larger than a layer is wide.
    """
    layers = {path: layer for path, layer in nnx.iter_modules(model) if isinstance(layer, Linear)}
    block_of = {path: path[: path.index("blocks") + 2] for path in layers}
    blocks = sorted(set(block_of.values()))
    if spec.layers > len(blocks):
        raise UserError(f"--config.tuning.lora_layers={spec.layers}: the backbone has {len(blocks)} blocks; 0: all")
    adapted = blocks[-spec.layers :]
    smallest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if spec.rank > smallest:
        raise UserError(
            f"--config.tuning.rank={spec.rank}: must be at most {smallest}, the width of the smallest layer"
        )
    for path, layer in layers.items():
        if block_of[path] in adapted:
            layer.scale = spec.alpha / spec.rank
            layer.lora_a = nnx.LoRAParam(jnp.zeros((layer.in_features, spec.rank), jnp.float32))
            layer.lora_b = nnx.LoRAParam(jnp.zeros((spec.rank, layer.out_features), jnp.float32))
    return model


def init_adapters(key: jax.Array, shapes: Any) -> Any:
    """First values, float32, for a tree of adapters: A uniform in +-1 / sqrt(D), as in peft, and B zeros.

    So a network starts as the frozen one. Each A depends on the key and on the layer's name alone.
    """

    def init(path: Any, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("lora_b"):
            return jnp.zeros(shape.shape, jnp.float32)
        own = key
        for word in seed_words(name):
            own = jax.random.fold_in(own, word)
        limit = shape.shape[0] ** -0.5
        return jax.random.uniform(own, shape.shape, jnp.float32, -limit, limit)

    return jax.tree_util.tree_map_with_path(init, shapes)
