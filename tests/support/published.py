"""Random weights under the names and in the layouts in which checkpoints are published. NumPy only."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.models.architectures import Architecture, DecoderConfig
from lmeraser_jax.models.decoder_weights import COUNTS
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig

Arrays = dict[str, np.ndarray]
ACTS = {"erf": "gelu", "tanh": "gelu_new", "sigmoid": "quick_gelu"}  # transformers' names
VIT = ViTConfig(image_size=16, patch=4, width=16, depth=2, heads=2, mlp=24, feature="pooler", epsilon=1e-5, classes=5)
DINOV2 = dataclasses.replace(VIT, mlp=32, feature="cls", epsilon=1e-3, classes=0)
REGISTERS = dataclasses.replace(DINOV2, registers=3)
CLIP = dataclasses.replace(DINOV2, mlp=24, gelu="sigmoid", pre_norm=True)
# 3 stages of odd and even depths. At 32 px the last grid is as large as the window.
SWIN = SwinConfig(image_size=32, patch=2, width=16, depths=(2, 1, 2), heads=(2, 4, 4), window=4, mlp_ratio=2, classes=5)

SIZES = {"vocabulary": 40, "context": 32, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_size": 4, "mlp": 24}
LLAMA = DecoderConfig(**SIZES, theta=50.0, epsilon=0.03, tied=False)
QWEN2 = DecoderConfig(**SIZES, theta=50.0, epsilon=0.03, tied=True, biased=True)


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Random float32 arrays, spread so that every one of them shows in the output: sharp attention, strong biases."""
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(*spread(name), shape)).astype(np.float32) for name, shape in shapes.items()}


def spread(name: str) -> tuple[float, float]:
    """(mean, standard deviation) that a random array of that name is drawn with."""
    if "norm" in name.lower() and name.endswith(("weight", "scale")):
        return 1.0, 0.25
    return 0.0, 1.0 if name.endswith("table") else 0.25


def _dense(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def hugging_face_vit(c: ViTConfig = VIT, prefix: str = "", seed: int = 0) -> Arrays:
    """As transformers saves a ViTModel (with its pooler, if the feature is that)."""
    shapes = {
        "embeddings.cls_token": (1, 1, c.width),
        "embeddings.position_embeddings": (1, 1 + c.grid**2, c.width),
        "embeddings.patch_embeddings.projection.weight": (c.width, c.channels, c.patch, c.patch),
        "embeddings.patch_embeddings.projection.bias": (c.width,),
    }
    for i in range(c.depth):
        shapes |= _block(f"encoder.layer.{i}", "attention", c.width, c.mlp)
    shapes |= _norm("layernorm", c.width)
    if c.feature == "pooler":
        shapes |= _dense("pooler.dense", c.width, c.width)
    return _with_classifier(shapes, prefix, c.width, c.classes, seed)


DINOV2_NAMES = (  # pattern in the name of an array of transformers' ViT, replacement
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(layer\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)
CLIP_NAMES = (
    *DINOV2_NAMES,
    (r"^", "vision_model."),
    (r"cls_token", "class_embedding"),
    (r"position_embeddings", "position_embedding.weight"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"encoder\.layer", "encoder.layers"),
    (r"attention\.attention\.(.)[a-z]*", r"self_attn.\1_proj"),
    (r"attention\.output\.dense", "self_attn.out_proj"),
    (r"\.norm(\d)", r".layer_norm\1"),
    (r"\.layernorm", ".post_layernorm"),
)


def dinov2_or_clip(c: ViTConfig) -> Arrays:
    """DINOv2 or, with `pre_norm`, CLIP's vision tower under the names of transformers' ViT as far as it has them."""
    arrays = hugging_face_vit(c)
    if c.pre_norm:
        del arrays["embeddings.patch_embeddings.projection.bias"]
        return arrays | draw(_norm("pre_layrnorm", c.width))
    shapes = {f"encoder.layer.{i}.layer_scale{j}.lambda1": (c.width,) for i in range(c.depth) for j in (1, 2)}
    return arrays | draw(shapes | ({"embeddings.register_tokens": (1, c.registers, c.width)} if c.registers else {}))


def _renamed(arrays: Arrays, names: tuple[tuple[str, str], ...]) -> Arrays:
    renamed = {}
    for name, array in arrays.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    return renamed


def hugging_face_dinov2(c: ViTConfig = DINOV2) -> Arrays:
    """As transformers saves a Dinov2Model, or with registers a Dinov2WithRegistersModel."""
    mask = np.zeros((1, c.width), np.float32)
    return _renamed(dinov2_or_clip(c), DINOV2_NAMES) | {"embeddings.mask_token": mask}


def hugging_face_clip(c: ViTConfig = CLIP) -> Arrays:
    """As transformers saves a CLIPModel, most of whose network for texts is left out here."""
    arrays = _renamed(dinov2_or_clip(c), CLIP_NAMES)
    arrays |= {name: array.reshape(array.shape[-2:]) for name, array in arrays.items() if "position" in name}
    arrays |= {name: array.reshape(-1) for name, array in arrays.items() if "class_embedding" in name}
    arrays |= draw({"text_model.final_layer_norm.weight": (5,), "visual_projection.weight": (4, c.width)})
    return arrays | {"vision_model.embeddings.position_ids": np.arange(1 + c.grid**2)[None]}


def hugging_face_swin(c: SwinConfig = SWIN, prefix: str = "", seed: int = 0) -> Arrays:
    """As transformers saves a SwinModel."""
    shapes = {
        "embeddings.patch_embeddings.projection.weight": (c.width, c.channels, c.patch, c.patch),
        "embeddings.patch_embeddings.projection.bias": (c.width,),
        **_norm("embeddings.norm", c.width),
    }
    for stage, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
        width, stem = c.width * 2**stage, f"encoder.layers.{stage}"
        for i in range(depth):
            shapes |= _block(f"{stem}.blocks.{i}", "self", width, int(c.mlp_ratio * width))
            shapes[f"{stem}.blocks.{i}.attention.self.relative_position_bias_table"] = (2 * c.window - 1) ** 2, heads
        if stage + 1 < len(c.depths):
            shapes |= _norm(f"{stem}.downsample.norm", 4 * width)
            shapes[f"{stem}.downsample.reduction.weight"] = 2 * width, 4 * width
    shapes |= _norm("layernorm", c.feature_size)
    return _with_classifier(shapes, prefix, c.feature_size, c.classes, seed)


def hugging_face_decoder(c: DecoderConfig = LLAMA, seed: int = 0) -> Arrays:
    """As transformers saves a LlamaForCausalLM, or with biases a Qwen2ForCausalLM."""
    inner, outer = c.kv_heads * c.head_size, c.heads * c.head_size
    shapes = {"model.embed_tokens.weight": (c.vocabulary, c.width)}
    for i in range(c.depth):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.{norm}.weight": (c.width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for role, size in (("q", outer), ("k", inner), ("v", inner)):
            dense = _dense(f"{stem}.self_attn.{role}_proj", c.width, size)
            shapes |= {name: shape for name, shape in dense.items() if c.biased or name.endswith("weight")}
        shapes[f"{stem}.self_attn.o_proj.weight"] = c.width, outer
        shapes |= {f"{stem}.mlp.{role}_proj.weight": (c.mlp, c.width) for role in ("gate", "up")}
        shapes[f"{stem}.mlp.down_proj.weight"] = c.width, c.mlp
    shapes["model.norm.weight"] = (c.width,)
    return draw(shapes if c.tied else shapes | {"lm_head.weight": (c.vocabulary, c.width)}, seed)


def _with_classifier(shapes, prefix: str, width: int, classes: int, seed: int) -> Arrays:
    """The arrays under a prefix, with a classifier where there is a prefix."""
    arrays = {prefix + name: array for name, array in draw(shapes, seed).items()}
    return arrays | (draw(_dense("classifier", width, classes), seed + 1) if prefix else {})


def _block(stem: str, attention: str, width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    shapes = _norm(f"{stem}.layernorm_before", width) | _norm(f"{stem}.layernorm_after", width)
    for role in ("query", "key", "value"):
        shapes |= _dense(f"{stem}.attention.{attention}.{role}", width, width)
    shapes |= _dense(f"{stem}.attention.output.dense", width, width)
    return shapes | _dense(f"{stem}.intermediate.dense", width, mlp) | _dense(f"{stem}.output.dense", mlp, width)


def settings_of(c: Architecture, kind: str = "vit") -> dict[str, Any]:
    """config.json of a transformers folder; `kind` is the model_type of a ViT."""
    if isinstance(c, DecoderConfig):
        sizes = {key: getattr(c, field) for field, key in COUNTS.items()}
        rest = {"rope_theta": c.theta, "rms_norm_eps": c.epsilon, "tie_word_embeddings": c.tied, "hidden_act": "silu"}
        return {"model_type": "qwen2" if c.biased else "llama", **sizes, **rest}
    shared = {"image_size": c.image_size, "patch_size": c.patch, "num_channels": c.channels}
    shared |= {"layer_norm_eps": c.epsilon, "hidden_act": ACTS[c.gelu]}
    if isinstance(c, ViTConfig):
        sizes = {"hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads}
        sizes |= {"mlp_ratio": c.mlp // c.width} if kind.startswith("dinov2") else {"intermediate_size": c.mlp}
        sizes |= {"num_register_tokens": c.registers} if kind == "dinov2_with_registers" else {}
        if kind == "clip":
            texts = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
            return {"model_type": kind, "vision_config": sizes | shared, "text_config": texts | {"vocab_size": 9}}
        return {"model_type": kind, **sizes, **shared}
    sizes = {"embed_dim": c.width, "depths": list(c.depths), "num_heads": list(c.heads), "window_size": c.window}
    return {"model_type": "swin", "mlp_ratio": c.mlp_ratio, **sizes, **shared}


def hub_folder(folder: Path, arrays: Arrays, settings: Mapping[str, Any] | None, shards: int = 1) -> Path:
    """A folder of the hub's form: config.json beside model.safetensors, or beside shards and their index."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(arrays)}
    for shard in set(where.values()):
        save_file({name: arrays[name] for name in arrays if where[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def flax_tree(arrays: Arrays) -> dict[str, Any]:
    """PyTorch arrays of transformers as the nested tree of its Flax models: kernels [in, out], HWIO, scales."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        if leaf == "weight" and array.ndim > 1:
            leaf, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        elif leaf == "weight":
            leaf = "scale"
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[leaf] = np.ascontiguousarray(array)
    return tree


TIMM_NAMES = (
    ("embeddings.register_tokens", "reg_token"),
    ("pre_layrnorm", "norm_pre"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.norm", "patch_embed.norm"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("encoder.layer.", "blocks."),
    ("encoder.", ""),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
    ("attention.self.relative", "attn.relative"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("pooler.dense", "pre_logits.fc"),
)


def timm(arrays: Arrays, merging: str = "timm") -> Arrays:
    """A transformers model under timm's names. Swin's merging stands in the next stage, for "microsoft" in its own."""
    renamed: Arrays = {}
    for name, array in arrays.items():
        new = name.removeprefix("swin.").removeprefix("vit.")
        for old, replacement in TIMM_NAMES:
            new = new.replace(old, replacement)
        new = new.replace("classifier", "head.fc" if name.startswith("swin.") and merging == "timm" else "head")
        if ".downsample." in new and merging == "timm":
            _, stage, rest = new.split(".", 2)
            new = f"layers.{int(stage) + 1}.{rest}"
        if ".query." in new:
            stem, kind = new.split("attention.")[0], new.rsplit(".", 1)[1]
            roles = [arrays[name.replace(".query.", f".{role}.")] for role in ("query", "key", "value")]
            renamed[f"{stem}attn.qkv.{kind}"] = np.concatenate(roles)
        elif ".key." not in new and ".value." not in new:
            renamed[new] = array
    return renamed


def vision_transformer(c: ViTConfig, seed: int = 0) -> Arrays:
    """As the npz files of google-research/vision_transformer have a ViT; pre_logits if the feature is the pooler's."""
    d, heads, head = c.width, c.heads, c.width // c.heads
    shapes = {"cls": (1, 1, d), "Transformer/posembed_input/pos_embedding": (1, 1 + c.grid**2, d)}
    kernels = {"embedding": (c.patch, c.patch, c.channels, d)}
    norms = ["Transformer/encoder_norm"]
    for i in range(c.depth):
        stem = f"Transformer/encoderblock_{i}"
        norms += [f"{stem}/LayerNorm_0", f"{stem}/LayerNorm_2"]
        for role in ("query", "key", "value"):
            kernels[f"{stem}/MultiHeadDotProductAttention_1/{role}"] = d, heads, head
            shapes[f"{stem}/MultiHeadDotProductAttention_1/{role}/bias"] = heads, head
        kernels[f"{stem}/MultiHeadDotProductAttention_1/out"] = heads, head, d
        kernels |= {f"{stem}/MlpBlock_3/Dense_0": (d, c.mlp), f"{stem}/MlpBlock_3/Dense_1": (c.mlp, d)}
    kernels |= {"pre_logits": (d, d)} if c.feature == "pooler" else {}
    kernels |= {"head": (d, c.classes)} if c.classes else {}
    shapes |= {f"{name}/kernel": shape for name, shape in kernels.items()}
    shapes = {f"{name}/bias": shape[-1:] for name, shape in kernels.items()} | shapes  # of several heads: noted above
    shapes |= {f"{norm}/{leaf}": (d,) for norm in norms for leaf in ("scale", "bias")}
    return draw(shapes, seed)
