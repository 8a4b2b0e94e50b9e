"""Published weights of language models -> architecture and parameters.

The arrays show neither heads nor rotary base nor epsilon: config.json says them, or a GGUF file's own metadata.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError, raise_all, shorten
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.architectures import DecoderConfig
from lmeraser_jax.models.translate import Flat, translate
from lmeraser_jax.models.weight_files import Weights
from lmeraser_jax.models.weight_settings import INERT

Json = Mapping[str, Any]
Rule = tuple[Callable[[Any], bool], str]  # whether a value is legal, and what is
MODEL_TYPES = {"llama": False, "qwen2": True}  # transformers' name -> whether queries, keys and values have a bias
COUNTS = {
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "mlp": "intermediate_size",
}
USUAL = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # transformers' own defaults


def _known(*values: Any) -> Rule:
    return values.__contains__, f"known: {', '.join(map(json.dumps, values)) or 'none'}"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


RULES: dict[str, Rule] = {  # what else the keys say calls for what `decoder` does not have
    "model_type": _known(*MODEL_TYPES),
    "hidden_act": _known("silu", "swish"),
    "tie_word_embeddings": _known(True, False),
    **dict.fromkeys(COUNTS.values(), (lambda v: _is_positive(v) and v == int(v), "must be a whole number above 0")),
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), (_is_positive, "must be a number above 0")),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "use_mrope"), _known(False)),
    **dict.fromkeys(("rope_type", "type"), _known("default")),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), _known()),
    "num_experts": _known(0),
    "rope_interleaved": _known(False),
    "partial_rotary_factor": _known(1),
    "layer_types": _known("full_attention"),
}
QUIET = set(  # names, training, generation: they change no logit
    """attention_dropout bos_token_id eos_token_id pad_token_id use_cache max_window_layers pretraining_tp
    is_llama_config transformers.js_config sliding_window""".split()
)


def is_decoder(weights: Weights) -> bool:
    """Whether the arrays are those of a language model, as Llama and its kin name them."""
    return isinstance(weights.own, DecoderConfig) or any(
        name.endswith("mlp.gate_proj.weight") for name in weights.arrays
    )


def parameters(
    weights: Weights, chosen: settings.Backbone
) -> tuple[DecoderConfig, backbone_lib.Params, str, tuple[str, ...], tuple[str, ...]]:
    """Architecture, parameters, origin, arrays that were left out, and notes on what was assumed or not used.

    Raises `UserError` with everything that does not fit: settings that are for images, what config.json calls for and
    is not supported, arrays that are missing, not used or of another shape.
    """
    usual = settings.Backbone()
    flags = {key: getattr(chosen, key) for key in ("name", "feature", "mean", "std", "heads")}
    problems = [f"--config.backbone.{k}={v} is for images" for k, v in flags.items() if v != getattr(usual, k)]
    raise_all(problems, f"{weights.name} is a language model; leave these flags out:")
    if isinstance(weights.own, DecoderConfig):
        config, flat, origin, ignored, notes = weights.own, dict(weights.arrays), weights.origin, (), ()
    else:
        config, notes = architecture(weights.settings, weights.name)
        names, flat, ignored = translate(weights)
        origin, flat = names.name, _tie(flat, config.tied, weights.name)
    return config, backbone_lib.from_flat(backbone_lib.graph(config)[1], flat, weights.name), origin, ignored, notes


def architecture(config: Json, name: str) -> tuple[DecoderConfig, tuple[str, ...]]:
    """The architecture that a config.json describes, and notes; `name` is that of the weights, for messages.

    Raises `UserError` that lists everything that is missing, contradictory or not supported.
    """
    if not config:
        raise UserError(f"{name}: config.json is missing beside it; no array shows the heads and the rotary base")
    stated, problems = {}, []
    for key, value in _pairs(config):
        good, text = RULES.get(key, (lambda _: True, ""))
        if not good(value):
            problems.append(f"{key}={shorten(value)}; {text}")
        if stated.setdefault(key, value) != value and key == "rope_theta":
            problems.append(f"{key} is {stated[key]} and {value}")
    needed = {"model_type", *COUNTS.values()} - {"num_key_value_heads", "head_dim"}
    problems += [f"{key} is missing" for key in sorted(needed - stated.keys())]
    if "sliding_window" in stated and stated.get("model_type") != "qwen2":  # Qwen2 has a switch for it
        problems.append(f"sliding_window={shorten(stated['sliding_window'])} is not supported")
    heading = f"{name} cannot be used, because of what its config.json or its metadata say:"
    raise_all(problems, heading)
    values = USUAL | {"num_key_value_heads": stated["num_attention_heads"]} | stated
    heads, kv_heads, width = (values[COUNTS[field]] for field in ("heads", "kv_heads", "width"))
    values.setdefault("head_dim", width // heads)
    if heads % kv_heads:
        problems.append(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if values["head_dim"] % 2 or ("head_dim" not in stated and width % heads):
        problems.append(f"hidden_size={width} with {heads} heads gives no even head_dim")
    raise_all(problems, heading)
    fields: dict[str, Any] = {
        **{field: int(values[key]) for field, key in COUNTS.items()},
        "theta": float(values["rope_theta"]),
        "epsilon": float(values["rms_norm_eps"]),
        "tied": bool(values["tie_word_embeddings"]),
        "biased": MODEL_TYPES[values["model_type"]],
    }
    assumed = [f"{key}={value}" for key, value in USUAL.items() if key not in stated]
    unknown = [key for key in stated if key not in (*RULES, *QUIET, *INERT)]
    notes = {"assumed, as config.json does not say it": assumed, "not used: keys that are not known here": unknown}
    return DecoderConfig(**fields), tuple(f"{text}: {', '.join(keys)}" for text, keys in notes.items() if keys)


def _pairs(config: Json) -> Iterator[tuple[str, Any]]:
    """Keys and values that say something; those inside of the rotary blocks and the list of layer types one by one."""
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, Mapping):
            yield from _pairs(value)
        elif key == "layer_types" and isinstance(value, list):
            yield from ((key, kind) for kind in dict.fromkeys(map(str, value)))
        elif value is not None:
            yield key, value


def _tie(flat: Flat, tied: bool, name: str) -> Flat:
    """A tied matrix under the embedding's name: files hold it under that name, the output's, or both."""
    if not tied or "output" not in flat:
        return flat
    output, embedding = flat["output"], flat.get("embedding", flat["output"])
    if not np.array_equal(embedding, output):
        raise UserError(f"{name}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
    return {key: array for key, array in flat.items() if key != "output"} | {"embedding": embedding}
