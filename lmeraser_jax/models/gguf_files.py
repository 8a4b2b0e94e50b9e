"""GGUF files of Llama and Qwen2 -> arrays and settings under the names that transformers gives them.

llama.cpp turns neighbours (2 i, 2 i + 1) of a head where Llama's published code turns (i, i + H / 2), so its files of
Llama hold the rows of queries and keys in another order, which is put back here. Files of Qwen2 hold the usual order.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError, raise_all, shorten, stand_in

TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")
ARCHITECTURES = ("llama", "qwen2")
KEYS = {  # of the metadata, after the architecture's name -> of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
}
NAMES = (  # pattern -> replacement, in order
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, float32, and settings as config.json has them.

    Raises `UserError` where the file is not readable, or holds another architecture or other types of numbers.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise UserError(f"{path}: .gguf files need the package gguf; pip install 'lmeraser_jax[gguf]'") from error
    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:  # it raises many kinds over damaged bytes
        raise UserError(f"{path} is not a readable .gguf: {stand_in(path) or f'perhaps cut short: {error}'}") from error
    problems = [
        f"{tensor.name} is of type {tensor.tensor_type.name}; known: {', '.join(TYPES)}"
        for tensor in reader.tensors
        if tensor.tensor_type.name not in TYPES
    ]
    if architecture not in ARCHITECTURES:
        problems.append(f"architecture {shorten(architecture)}; known: {', '.join(ARCHITECTURES)}")
    raise_all(problems, f"{path} cannot be used:", limit=10)
    prefix, fields = f"{architecture}.", reader.fields
    metadata = {key.removeprefix(prefix): fields[key].contents() for key in fields if key.startswith(prefix)}
    shapes = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
    values = settings(metadata, architecture, shapes)
    heads = {"q": values.get("num_attention_heads"), "k": values.get("num_key_value_heads")}
    arrays = {}
    for tensor in reader.tensors:
        array, rotary = dequantize(tensor.data, tensor.tensor_type), re.search(r"\.attn_([qk])\.", tensor.name)
        if architecture == "llama" and rotary:
            array = halves_first(array, heads[rotary[1]])
        name = tensor.name
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        arrays[name] = array
    return arrays, values


def settings(metadata: Mapping[str, Any], architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a config.json would say: from the metadata without the architecture's name, and the arrays' shapes."""
    values = {theirs: metadata[ours] for ours, theirs in KEYS.items() if ours in metadata}
    values = {key: float(str(np.float32(v))) if isinstance(v, float) else v for key, v in values.items()}  # 1e-5 again
    scaling = "llama3" if "rope_freqs.weight" in shapes else metadata.get("rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {"rope_type": scaling}
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    turned = metadata.get("rope.dimension_count")
    if turned and width and heads and turned != values.get("head_dim", width // heads):
        values["partial_rotary_factor"] = turned / values.get("head_dim", width // heads)
    rows = shapes.get("token_embd.weight", ())[:1]
    return values | {
        "model_type": architecture,
        "vocab_size": rows[0] if rows else None,
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def halves_first(array: np.ndarray, heads: Any) -> np.ndarray:
    """Rows (or numbers of a bias) of `heads` heads from pairs of neighbours to first halves, then second halves."""
    if not isinstance(heads, int) or not heads or len(array) % (2 * heads):
        return array  # refused later: the settings do not fit the arrays
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])  # [A, H / 2, 2, ...]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
