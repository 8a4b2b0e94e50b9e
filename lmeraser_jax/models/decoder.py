"""Llama and Qwen2 language models (Touvron et al., 2023; Yang et al., 2024) as a Flax NNX module.

Pre-norm blocks of RMSNorm, rotary position embedding, grouped key and value heads and a gated MLP. Rows are padded on
the right and positions count from 0. A token attends to itself and to those before it, so that no token of a row sees
its padding, and no mask is needed.

Shapes: B rows, T tokens, S places of a cache, D width, A heads, G key and value heads, H width of a head, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmeraser_jax.errors import UserError
from lmeraser_jax.models.architectures import DecoderConfig
from lmeraser_jax.models.lora import Linear

PIECES, SMALLEST = 4, 16  # of a row's queries in attention, and tokens of a piece
UNSEEN = -1e9  # the score of a token that comes later; infinity would give NaN in second derivatives
Cache = tuple[jax.Array, jax.Array]  # keys and values of a block, [B, S, G, H]


class RMSNorm(nnx.RMSNorm):
    """The mean square is taken in float32 whatever the compute dtype."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        super().__init__(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:  # [B, T, D] -> [B, T, D]
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask=mask)


class Attention(nnx.Module):
    """Causal self-attention; each key and value head serves A / G heads that follow each other."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        outer, inner = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q = Linear(config.width, outer, use_bias=config.biased, rngs=rngs)
        self.k = Linear(config.width, inner, use_bias=config.biased, rngs=rngs)
        self.v = Linear(config.width, inner, use_bias=config.biased, rngs=rngs)
        self.o = Linear(outer, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        """States [B, T, D] of tokens at `positions`, int32 [B, T] or [1, T] -> [B, T, D] and all keys and values.

        Without a cache the tokens see each other; with one, keys and values are written to their positions in it.
        """
        b, t, _ = x.shape
        q, k, v = (layer(x).reshape(b, t, -1, self.config.head_size) for layer in (self.q, self.k, self.v))
        q, k = rotate(q, positions, self.config.theta), rotate(k, positions, self.config.theta)
        if cache:
            rows = jnp.arange(b)[:, None]
            k, v = cache[0].at[rows, positions].set(k), cache[1].at[rows, positions].set(v)  # [B, S, G, H]
        shared = q.shape[2] // k.shape[2]
        queries = (q * q.shape[-1] ** -0.5).transpose(0, 2, 1, 3)  # [B, A, T, H]
        keys = jnp.repeat(k, shared, axis=2).transpose(0, 2, 3, 1)  # [B, A, H, S]
        values = jnp.repeat(v, shared, axis=2).transpose(0, 2, 1, 3)  # [B, A, S, H]
        if cache:
            mixed = _attend(queries, keys, values, positions)
        else:  # a piece of the queries at a time: most of what comes after them is not computed
            size = max(SMALLEST, -(-t // PIECES))
            ends = [(start, min(start + size, t)) for start in range(0, t, size)]
            pieces = (_attend(queries[:, :, i:j], keys[..., :j], values[:, :, :j], positions[:, i:j]) for i, j in ends)
            mixed = jnp.concatenate(list(pieces), axis=2)
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(b, t, -1)), (k, v)


def _attend(queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Each query's mean of the values up to its position: [B, A, T, H], [B, A, H, S], [B, A, S, H] -> [B, A, T, H]."""
    scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)  # [B, A, T, S]
    later = jnp.arange(keys.shape[-1])[None, None] > positions[:, :, None]  # [B or 1, T, S]
    hidden = jnp.where(later, jnp.float32(UNSEEN), jnp.float32(0))[:, None]  # added, it costs no backward pass
    return jnp.matmul(_softmax(scores + hidden).astype(values.dtype), values)


@jax.custom_jvp
def _softmax(scores: jax.Array) -> jax.Array:
    """Softmax of the last axis, whose derivative reads its result alone."""
    return jax.nn.softmax(scores, axis=-1)


@_softmax.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    weights, change = _softmax(*primals), tangents[0]
    return weights, weights * (change - jnp.sum(weights * change, axis=-1, keepdims=True))


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.gate = Linear(config.width, config.mlp, use_bias=False, rngs=rngs)
        self.up = Linear(config.width, config.mlp, use_bias=False, rngs=rngs)
        self.down = Linear(config.mlp, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config, rngs)
        self.attention = Attention(config, rngs)
        self.norm2 = RMSNorm(config, rngs)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        """As `Attention`."""
        mixed, cache = self.attention(self.norm1(x), positions, cache)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), cache


class Decoder(nnx.Module):
    """The whole network; tokens are int32."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocabulary, config.width)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.norm = RMSNorm(config, rngs)
        if not config.tied:
            self.output = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """States before the first block: [B, T] -> [B, T, D]."""
        return self.embedding[...][tokens]

    def forward(self, x: jax.Array, first: int = 0, last: int | None = None) -> jax.Array:
        """States [B, T, D] before block `first` -> those before block `last`; None: after all blocks.

        What `forward(x, 0, n)` gives may be kept, so that `forward(kept, n)` need not compute it again.
        """
        for block in list(self.blocks)[first:last]:
            x, _ = block(x, jnp.arange(x.shape[1])[None])
        return x

    def hidden_states(self, tokens: jax.Array) -> list[jax.Array]:
        """States [B, T, D] before the first block and after each."""
        states = [self.embed(tokens)]
        for index in range(self.config.depth):
            states.append(self.forward(states[-1], index, index + 1))
        return states

    def logits(self, x: jax.Array) -> jax.Array:
        """States after all blocks [B, T, D] -> scores of the next token, float32 [B, T, V]."""
        matrix = self.embedding if self.config.tied else self.output
        return jnp.einsum("btd,vd->btv", self.norm(x), matrix[...], preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of all places: [B, T] -> float32 [B, T, V]."""
        return self.logits(self.forward(self.embed(tokens)))

    def features(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Mean normalised state of the first `lengths` [B] tokens of each row: [B, T] -> float32 [B, D]."""
        states = self.norm(self.forward(self.embed(tokens))).astype(jnp.float32)
        valid = jnp.arange(tokens.shape[1])[None] < lengths[:, None]  # [B, T]
        return jnp.sum(jnp.where(valid[..., None], states, 0), axis=1) / lengths[:, None].astype(jnp.float32)

    def extend(self, tokens: jax.Array, positions: jax.Array, caches: list[Cache]) -> tuple[jax.Array, list[Cache]]:
        """States [B, T, D] after all blocks of tokens that follow those in the caches, and the caches with both."""
        x, extended = self.embed(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, positions, cache)
            extended.append(cache)
        return x, extended


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding (Su et al., 2021, Eq. 34): heads [B, T, A, H] turned by their positions [B or 1, T].

    Number i of a head's first half and number i of its second are turned by position * theta^(-2 i / H), in float32.
    """
    halves = np.arange(0, x.shape[-1], 2, dtype=np.float32)
    frequencies = np.float32(1) / np.float32(theta) ** (halves / np.float32(x.shape[-1]))
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]  # [B or 1, T, 1, H / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("graph", "new"))
def generate(
    graph: Any,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    temperature: jax.Array,
    stop: jax.Array,
    new: int,
) -> jax.Array:
    """Continues each prompt, the first `lengths` [B] tokens of a row [B, T], until its token `stop`: int32 [B, new].

    `graph` and `params` are as `backbone.graph` has them. Temperature 0 takes the likeliest token, any other draws from
    softmax(logits / temperature), each row by its own one of the `keys` [B]. After `stop` follow more of it. Raises
    `UserError` where T + new is more than the context.
    """
    model: Decoder = nnx.merge(graph, params)
    config, (b, t) = model.config, prompts.shape
    if t + new > config.context:
        raise UserError(f"{t} tokens of a prompt and {new} new ones are more than the model's context {config.context}")
    place = jnp.zeros((b, t + new, config.kv_heads, config.head_size), model.embedding.dtype)
    states, caches = model.extend(prompts, jnp.arange(t)[None], [(place, place)] * config.depth)
    logits = model.logits(states[jnp.arange(b), lengths - 1][:, None])[:, 0]  # [B, V]

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        step, _, done, *_ = carry
        return (step < new) & ~jnp.all(done)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens, done, logits, caches = carry
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        drawn = jax.vmap(jax.random.categorical)(step_keys, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        token = jnp.where(done, stop, token)
        states, caches = model.extend(token[:, None], (lengths + step)[:, None], caches)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        return step + 1, tokens, done | (token == stop), model.logits(states)[:, 0], caches

    tokens = jnp.full((b, new), stop, jnp.int32)
    start = (jnp.int32(0), tokens, jnp.zeros(b, bool), logits, caches)
    return jax.lax.while_loop(unfinished, advance, start)[1]
