"""Arrays of published checkpoints under our names and in our layout: what `key_maps` says, done."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.models.key_maps import FINAL_RULES, ORIGINS, PREFIXES, Origin
from lmeraser_jax.models.weight_files import Weights

Flat = dict[str, np.ndarray]
TABLE = "stages/{}/blocks/0/attention/table"
REQUIRED = {  # our name -> dimensions; without these no architecture can be read
    "vit": {"embed/kernel": 4, "positions": 3, "cls": 3, "blocks/0/mlp/fc1/kernel": 2},
    "swin": {"embed/kernel": 4, TABLE.format(0): 2, "stages/0/blocks/0/mlp/fc1/kernel": 2},
}


def translate(weights: Weights) -> tuple[Origin, Flat, tuple[str, ...]]:
    """Arrays under our names and in our layout, positions and embedding still as published.

    Also returns their origin, and the names in the file that are no parameters. Raises `UserError` for names that no
    known origin has, arrays that are not floating point or hold inf or NaN, or dimensions from which no architecture
    can be read.
    """
    arrays = {re.sub(PREFIXES, "", name.replace("/", ".")): array for name, array in weights.arrays.items()}
    origin = _origin(weights.name, arrays)
    flat, ignored, problems = {}, [], []
    for old, array in arrays.items():
        if any(re.search(pattern, old) for pattern in origin.ignored):
            ignored.append(old)
            continue
        new = old
        for pattern, replacement in (*origin.rules, *FINAL_RULES):
            new = re.sub(pattern, replacement, new)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{old} must be floating point, is {array.dtype}")
            continue
        with np.errstate(over="ignore"):
            array = np.asarray(array, np.float32)
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            problems.append(f"{old} must be finite, has {bad} inf or NaN of {array.size} (as float32)")
        elif new in flat:
            problems.append(f"{old} stands for {new}, and so does another array")
        else:
            flat[new] = _input_first(new, array, torch=old.endswith(".weight"))
    raise_all(problems, f"{weights.name} cannot be used:")
    flat, problems = _fold_layer_scale(_complete(_join_attention(flat)))
    raise_all(problems + _shape_problems(origin.family, flat), f"{weights.name} looks like {origin.name}, but:")
    return origin, flat, tuple(ignored)


def _origin(file: str, arrays: Mapping[str, Any]) -> Origin:
    """The origin whose markers are all there. Raises `UserError` where there is none."""
    lacking = []
    for origin in ORIGINS:
        absent = [marker for marker in origin.markers if marker not in arrays]
        if not absent:
            return origin
        if len(absent) < len(origin.markers):
            lacking.append(f"{origin.name} has {', '.join(absent)}")
    known = ", ".join(origin.name for origin in ORIGINS)
    hint = f" ({'; '.join(lacking)}, and this has not)" if lacking else ""
    raise UserError(
        f"{file} has none of the known layouts ({known}){hint}; its arrays: {join_limited(arrays) or 'none'}"
    )


def _input_first(name: str, array: np.ndarray, torch: bool) -> np.ndarray:
    """PyTorch's [out, in] and OIHW, and Flax's [in, heads, out], as [in, out] and HWIO."""
    if torch and name.endswith("/kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    if re.search(r"/attention/(query|key|value)/", name) and array.ndim == (3 if name.endswith("kernel") else 2):
        return array.reshape(*array.shape[:-2], -1)
    if name.endswith("/attention/out/kernel") and array.ndim == 3:
        return array.reshape(-1, array.shape[-1])
    if name in ("cls", "positions"):  # CLIP's have no axis for the batch
        return array.reshape((1,) * (3 - array.ndim) + array.shape)
    return array


def _join_attention(flat: Flat) -> Flat:
    """Queries, keys and values of a block side by side, as our attention has them; missing biases are zero."""
    joined = dict(flat)
    for stem in [name.removesuffix("query/kernel") for name in flat if name.endswith("/query/kernel")]:
        names = [stem + name for name in ("query", "key", "value")]
        kernels = [flat.get(f"{name}/kernel", np.zeros(())) for name in names]
        if any(kernel.shape != kernels[0].shape or kernel.ndim != 2 for kernel in kernels):
            continue  # listed later as missing and not used
        biases = [joined.pop(f"{name}/bias", np.zeros(kernels[0].shape[1], np.float32)) for name in names]
        joined[f"{stem}qkv/kernel"] = np.concatenate([joined.pop(f"{name}/kernel") for name in names], axis=1)
        joined[f"{stem}qkv/bias"] = np.concatenate([bias.reshape(-1) for bias in biases])
    for name in [name for name in joined if name.endswith("/qkv/kernel")]:
        joined.setdefault(name.removesuffix("kernel") + "bias", np.zeros(joined[name].shape[-1:], np.float32))
    return joined


def _complete(flat: Flat) -> Flat:
    """Adds the zeros that an origin leaves out: the embedding's bias (CLIP), the position of the class token (timm)."""
    flat = dict(flat)
    if "pre_norm/scale" in flat and "embed/kernel" in flat:
        flat.setdefault("embed/bias", np.zeros(flat["embed/kernel"].shape[-1:], np.float32))
    positions = flat.get("positions", np.zeros(()))
    if positions.ndim == 3 and positions.shape[1] > 1 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        flat["positions"] = np.pad(positions, ((0, 0), (1, 0), (0, 0)))  # a square of patches alone
    return flat


def _fold_layer_scale(flat: Flat) -> tuple[Flat, list[str]]:
    """LayerScale, which multiplies what a layer adds, as part of that layer: exact but for the rounding of float32.

    Also returns a line for each layer that has none where others have it.
    """
    layers = [name.removesuffix("kernel") for name in flat if re.search(r"/(attention/out|mlp/fc2)/kernel$", name)]
    if not any(name.endswith("/gamma") for name in flat):
        return flat, []
    folded, problems = dict(flat), []
    for layer in layers:
        scale = folded.pop(f"{layer}gamma", None)
        if scale is None:
            problems.append(f"missing: {layer}gamma (LayerScale)")
            continue
        for leaf in (f"{layer}kernel", f"{layer}bias"):
            if leaf in flat and scale.shape != flat[leaf].shape[-1:]:
                problems.append(f"{layer}gamma {list(scale.shape)}: does not fit {leaf} {list(flat[leaf].shape)}")
            elif leaf in flat:
                folded[leaf] = flat[leaf] * scale
    return folded, problems


def _shape_problems(family: str, flat: Flat) -> list[str]:
    """Arrays that no architecture can be read from."""
    if family == "decoder":  # config.json has it
        return []
    required = REQUIRED[family]
    optional = {key: 2 for key in flat if key == "head/kernel" or key.endswith("/attention/table")} | {"registers": 3}
    problems = [f"missing: {key}" for key in required if key not in flat]
    for key, ndim in (optional | required).items():
        if key in flat and (flat[key].ndim != ndim or not flat[key].size):
            problems.append(f"{key} {list(flat[key].shape)}: must have {ndim} dimensions, none of them 0")
    if problems:
        return problems
    shape = list(flat["embed/kernel"].shape)
    if shape[0] != shape[1]:
        problems.append(f"embed/kernel {shape}: patches must be square")
    if family == "vit":
        hidden, second = flat["blocks/0/mlp/fc1/kernel"].shape[1], flat.get("blocks/0/mlp/fc2/kernel")
        if second is not None and second.shape[:1] == (hidden / 2,):
            problems.append("its MLP is gated (SwiGLU, as in DINOv2's giant), which is not supported: take S, B or L")
        shape = list(flat["positions"].shape)
        if shape[1] < 2 or math.isqrt(shape[1] - 1) ** 2 != shape[1] - 1:
            problems.append(f"positions {shape}: must hold one class token and a square of patches")
    else:
        rows = len(flat[TABLE.format(0)])
        if math.isqrt(rows) ** 2 != rows or math.isqrt(rows) % 2 == 0:
            problems.append(f"{TABLE.format(0)} has {rows} rows: must be (2 * window - 1) squared")
    return problems
