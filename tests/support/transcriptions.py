"""Published models written out in float64 NumPy, from the published arrays: explicit windows, patches and heads.

They share nothing with the code under test: no reshaped windows, no rolled grids, no joined attention.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import special

from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.architectures import DecoderConfig
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig

Arrays = Mapping[str, np.ndarray]
TOLERANCE = 2e-4  # of the largest number of the reference; both sides in float32, or the reference in float64

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # a third of the time


def relative_error(actual: Any, reference: Any) -> float:
    """Largest difference over the largest number of the reference."""
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape, (actual.shape, reference.shape)
    return float(np.abs(actual - reference).max() / np.abs(reference).max())


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
@jax.default_matmul_precision("highest")  # a GPU would round to fewer digits
def features(config: backbone_lib.Architecture, params: Any, images: jax.Array) -> jax.Array:
    """Ours, [B, D]."""
    return backbone_lib.features(config, params, images)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
@jax.default_matmul_precision("highest")
def outputs(config: backbone_lib.Architecture, params: Any, images: jax.Array) -> dict[str, Any]:
    """Ours: all hidden states, the feature, and logits where there is a classifier."""
    result = {"states": nnx.merge(backbone_lib.graph(config)[0], params).hidden_states(images)}
    result["features"] = backbone_lib.features(config, params, images)
    if config.classes:
        result["logits"] = backbone_lib.features_and_logits(config, params, images)[1]
    return result


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
@jax.default_matmul_precision("highest")
def gradient(config: backbone_lib.Architecture, params: Any, images: jax.Array) -> jax.Array:
    """Ours: d(sum of feature * `coefficients`) / d(images), [B, H, W, C]."""
    values = coefficients(len(images), config.feature_size)
    return jax.grad(lambda x: jnp.sum(backbone_lib.features(config, params, x) * values))(images)


def coefficients(count: int, width: int) -> np.ndarray:
    """Weights [count, width] float32 that make one number of features."""
    return np.random.default_rng(5).normal(size=(count, width)).astype(np.float32)


def pictures(count: int, size: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, size, size, channels)).astype(np.float32)


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + special.erf(x / math.sqrt(2))) / 2


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


class Swin:
    """A transformers Swin, one image at a time; the state is {(row, column): [D]}."""

    def __init__(self, arrays: Arrays, config: SwinConfig):
        self.arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
        self.config = config

    def dense(self, x: np.ndarray, name: str) -> np.ndarray:
        y = self.arrays[f"{name}.weight"] @ x
        return y + self.arrays[f"{name}.bias"] if f"{name}.bias" in self.arrays else y

    def norm(self, x: np.ndarray, name: str, epsilon: float) -> np.ndarray:
        return layer_norm(x, self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"], epsilon)

    def __call__(self, image: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """([H, W, C]) -> (states [h, w, D] before the first stage and after each one, feature [D])."""
        c, side = self.config, len(image) // self.config.patch
        kernel = self.arrays["embeddings.patch_embeddings.projection.weight"]  # OIHW
        bias, grid = self.arrays["embeddings.patch_embeddings.projection.bias"], {}
        for y in range(side):
            for x in range(side):
                patch = image[y * c.patch : (y + 1) * c.patch, x * c.patch : (x + 1) * c.patch].astype(np.float64)
                grid[y, x] = self.norm(np.einsum("oihw,hwi->o", kernel, patch) + bias, "embeddings.norm", 1e-5)
        states = [self.picture(grid, side)]
        for stage, depth in enumerate(c.depths):
            stem = f"encoder.layers.{stage}"
            for i in range(depth):
                grid = self.block(grid, side, f"{stem}.blocks.{i}", c.heads[stage], shifted=i % 2 == 1)
            if stage + 1 < len(c.depths):
                grid, side = self.merge(grid, side, f"{stem}.downsample"), -(-side // 2)
            states.append(self.picture(grid, side))
        tokens = [self.norm(value, "layernorm", c.epsilon) for value in grid.values()]
        return states, np.mean(tokens, axis=0)

    @staticmethod
    def picture(grid: dict[tuple[int, int], np.ndarray], side: int) -> np.ndarray:
        return np.array([[grid[y, x] for x in range(side)] for y in range(side)])

    def merge(self, grid, side: int, name: str):
        """Patches above, below, right above and right below each other become one; outside there are zeros."""
        zeros, result = np.zeros_like(grid[0, 0]), {}
        for y, x in itertools.product(range(0, side, 2), repeat=2):
            corners = [grid.get(at, zeros) for at in ((y, x), (y + 1, x), (y, x + 1), (y + 1, x + 1))]
            joined = self.norm(np.concatenate(corners), f"{name}.norm", 1e-5)
            result[y // 2, x // 2] = self.dense(joined, f"{name}.reduction")
        return result

    def block(self, grid, side: int, name: str, heads: int, shifted: bool):
        normed = {at: self.norm(value, f"{name}.layernorm_before", self.config.epsilon) for at, value in grid.items()}
        mixed = self.attention(normed, side, f"{name}.attention", heads, shifted)
        added = {at: value + mixed[at] for at, value in grid.items()}
        return {at: value + self.mlp(value, name) for at, value in added.items()}

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        hidden = self.norm(x, f"{name}.layernorm_after", self.config.epsilon)
        return self.dense(exact_gelu(self.dense(hidden, f"{name}.intermediate.dense")), f"{name}.output.dense")

    def attention(self, grid, side: int, name: str, heads: int, shifted: bool):
        """Each patch looks at those of its window; windows that a shift moved over the edge fall apart."""
        window = min(self.config.window, side)
        shift = window // 2 if shifted and side > self.config.window else 0
        whole = -(-side // window) * window  # with padding below and on the right
        zeros, result = np.zeros_like(grid[0, 0]), {}
        for top, left in itertools.product(range(shift, whole + shift, window), repeat=2):
            cells = list(itertools.product(range(top, top + window), range(left, left + window)))
            places = [(y % whole, x % whole) for y, x in cells]  # beyond the edge they go on at the other side
            values = [grid.get(place, zeros) for place in places]
            result |= dict(zip(places, self.window(cells, values, whole, name, heads), strict=True))
        return result

    def window(self, cells, values, whole: int, name: str, heads: int) -> list[np.ndarray]:
        q, k, v = ([self.dense(x, f"{name}.self.{role}") for x in values] for role in ("query", "key", "value"))
        table, reach = self.arrays[f"{name}.self.relative_position_bias_table"], self.config.window - 1
        size = len(values[0]) // heads
        result = []
        for i, (y, x) in enumerate(cells):
            mixed = []
            for head in range(heads):
                columns = slice(head * size, (head + 1) * size)
                scores = []
                for j, (other_y, other_x) in enumerate(cells):
                    row = (y - other_y + reach) * (2 * reach + 1) + (x - other_x + reach)
                    apart = (y < whole) != (other_y < whole) or (x < whole) != (other_x < whole)
                    scores.append(q[i][columns] @ k[j][columns] / math.sqrt(size) + table[row, head] - 100 * apart)
                mixed.append(sum(weight * v[j][columns] for j, weight in enumerate(special.softmax(scores))))
            result.append(self.dense(np.concatenate(mixed), f"{name}.output.dense"))
        return result


def vision_transformer(arrays: Arrays, config: ViTConfig, image: np.ndarray) -> np.ndarray:
    """Feature [D] of google-research/vision_transformer's model: its npz as it is, one head at a time.

    Dosovitskiy et al. (2020), Eqs. 1 to 4, with the LayerNorm's epsilon and the GELU of the config.
    """
    p = {name: array.astype(np.float64) for name, array in arrays.items()}
    gelu = tanh_gelu if config.gelu == "tanh" else exact_gelu

    def norm(x, name):
        return layer_norm(x, p[f"{name}/scale"], p[f"{name}/bias"], config.epsilon)

    tokens = [p["cls"][0, 0]]
    for y, x in itertools.product(range(0, len(image), config.patch), repeat=2):
        patch = image[y : y + config.patch, x : x + config.patch]
        tokens.append(np.einsum("hwi,hwio->o", patch, p["embedding/kernel"]) + p["embedding/bias"])
    x = np.stack(tokens) + p["Transformer/posembed_input/pos_embedding"][0]
    for i in range(config.depth):
        stem = f"Transformer/encoderblock_{i}"
        name, normed = f"{stem}/MultiHeadDotProductAttention_1", norm(x, f"{stem}/LayerNorm_0")
        for head in range(config.heads):
            q, k, v = (
                normed @ p[f"{name}/{role}/kernel"][:, head] + p[f"{name}/{role}/bias"][head]
                for role in ("query", "key", "value")
            )
            x = x + special.softmax(q @ k.T / math.sqrt(q.shape[1]), axis=1) @ v @ p[f"{name}/out/kernel"][head]
        x = x + p[f"{name}/out/bias"]
        hidden = norm(x, f"{stem}/LayerNorm_2") @ p[f"{stem}/MlpBlock_3/Dense_0/kernel"]
        hidden = gelu(hidden + p[f"{stem}/MlpBlock_3/Dense_0/bias"])
        x = x + hidden @ p[f"{stem}/MlpBlock_3/Dense_1/kernel"] + p[f"{stem}/MlpBlock_3/Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")[0]
    return np.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"]) if "pre_logits/kernel" in p else x


def dinov2_or_clip(arrays: Arrays, config: ViTConfig, image: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(states [N, D], feature [D]) of DINOv2 (Oquab et al., 2023) or of CLIP's vision tower (Radford et al., 2021).

    Takes `published.dinov2_or_clip`. Registers stand between the class token and the patches; LayerScale multiplies
    what a layer adds.
    """
    p = {name: array.astype(np.float64) for name, array in arrays.items()}

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], config.epsilon)

    tokens, embed = [p["embeddings.cls_token"][0, 0]], "embeddings.patch_embeddings.projection"
    for y, x in itertools.product(range(0, len(image), config.patch), repeat=2):
        patch = np.einsum("oihw,hwi->o", p[f"{embed}.weight"], image[y : y + config.patch, x : x + config.patch])
        tokens.append(patch + p.get(f"{embed}.bias", 0))
    tokens = np.stack(tokens) + p["embeddings.position_embeddings"][0]
    x = np.stack([tokens[0], *p.get("embeddings.register_tokens", [[]])[0], *tokens[1:]])
    states = [norm(x, "pre_layrnorm") if config.pre_norm else x]
    for i in range(config.depth):
        x, stem = states[-1], f"encoder.layer.{i}"
        normed, mixed = norm(x, f"{stem}.layernorm_before"), []
        for columns in np.split(np.arange(config.width), config.heads):
            roles = [f"{stem}.attention.attention.{role}" for role in ("query", "key", "value")]
            q, k, v = (dense(normed, role)[:, columns] for role in roles)
            mixed.append(special.softmax(q @ k.T / math.sqrt(len(columns)), axis=1) @ v)
        added = dense(np.concatenate(mixed, axis=1), f"{stem}.attention.output.dense")
        x = x + added * p.get(f"{stem}.layer_scale1.lambda1", 1)
        hidden = dense(norm(x, f"{stem}.layernorm_after"), f"{stem}.intermediate.dense")
        hidden = hidden * special.expit(1.702 * hidden) if config.gelu == "sigmoid" else exact_gelu(hidden)
        states.append(x + dense(hidden, f"{stem}.output.dense") * p.get(f"{stem}.layer_scale2.lambda1", 1))
    return states, norm(states[-1], "layernorm")[0]


def language_model(arrays: Arrays, config: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of a transformers Llama or Qwen2, for one row of tokens [T]: one token and one head at a time.

    The rotary embedding turns the complex number of a head's halves (Su et al., 2021, Eq. 12).
    """
    p = {name.removeprefix("model."): array.astype(np.float64) for name, array in arrays.items()}
    x = p["embed_tokens.weight"][tokens]
    for i in range(config.depth):
        x = x + _attend(
            p, f"layers.{i}.self_attn", config, rms_norm(x, p[f"layers.{i}.input_layernorm.weight"], config)
        )
        hidden = rms_norm(x, p[f"layers.{i}.post_attention_layernorm.weight"], config)
        gate, up = (hidden @ p[f"layers.{i}.mlp.{role}_proj.weight"].T for role in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p[f"layers.{i}.mlp.down_proj.weight"].T
    return rms_norm(x, p["norm.weight"], config) @ p["embed_tokens.weight" if config.tied else "lm_head.weight"].T


def rms_norm(x: np.ndarray, scale: np.ndarray, config: DecoderConfig) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.epsilon) * scale


def _attend(p: Arrays, name: str, config: DecoderConfig, x: np.ndarray) -> np.ndarray:
    def heads(role: str) -> np.ndarray:
        values = x @ p[f"{name}.{role}_proj.weight"].T + p.get(f"{name}.{role}_proj.bias", 0.0)
        return values.reshape(len(x), -1, config.head_size)  # [T, A or G, H]

    def turned(values: np.ndarray, position: int) -> np.ndarray:
        half = config.head_size // 2
        angles = position * config.theta ** (-np.arange(half) / half)
        rotated = (values[:half] + 1j * values[half:]) * np.exp(1j * angles)
        return np.concatenate([rotated.real, rotated.imag])

    q, k, v = heads("q"), heads("k"), heads("v")
    result = np.zeros_like(q)
    for t, head in itertools.product(range(len(x)), range(config.heads)):
        group = head * config.kv_heads // config.heads
        query = turned(q[t, head], t)
        scores = [query @ turned(k[s, group], s) / math.sqrt(config.head_size) for s in range(t + 1)]
        result[t, head] = special.softmax(scores) @ v[: t + 1, group]
    return result.reshape(len(x), -1) @ p[f"{name}.o_proj.weight"].T
