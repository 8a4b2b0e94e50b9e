"""Adapters of a language model as files that the library `peft` loads onto the model of transformers.

`peft` is not needed to write them. It computes the same: y + (lora_alpha / r) lora_B lora_A x, its matrices transposed.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.models.lora import LoraSpec
from lmeraser_jax.storage import checkpoints

LAYER = re.compile(r"blocks/(\d+)/(attention|mlp)/(\w+)/lora_([ab])")
PARTS = {"attention": "self_attn", "mlp": "mlp"}  # our name -> that of transformers


def settings(spec: LoraSpec, adapters: Any, base: str) -> dict[str, Any]:
    """adapter_config.json; `base` says where the model's weights are."""
    layers = [_parsed(name) for name in checkpoints.flatten(adapters)]
    chosen = {"layers_to_transform": sorted({layer for layer, *_ in layers}), "layers_pattern": "layers"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({f"{role}_proj" for _, _, role, _ in layers}),
        **(chosen if spec.layers else {}),
    }


def arrays(adapters: Any) -> dict[str, np.ndarray]:
    """adapter_model.safetensors: lora_A [R, D] and lora_B [E, R] of each layer, under the names of `peft`."""
    renamed = {}
    for name, leaf in checkpoints.flatten(adapters).items():
        layer, part, role, matrix = _parsed(name)
        place = f"base_model.model.model.layers.{layer}.{PARTS[part]}.{role}_proj"
        renamed[f"{place}.lora_{matrix.upper()}.weight"] = np.ascontiguousarray(leaf.T)
    return renamed


def save(folder: Path, spec: LoraSpec, adapters: Any, base: str) -> None:
    """Writes both files into a new folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(arrays(adapters), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings(spec, adapters, base), indent=2) + "\n")


def _parsed(name: str) -> tuple[int, str, str, str]:
    """Block, part of it, role and matrix of an adapter's flat name."""
    match = LAYER.fullmatch(name)
    assert match, name
    return int(match[1]), match[2], match[3], match[4]
