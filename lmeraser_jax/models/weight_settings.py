"""What stands beside published weights: config.json, of transformers or timm, and the settings of the image processor.

Every key is honoured, refused by name where its value calls for what is not there, listed as one that changes no
feature, or named as not known.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from lmeraser_jax.errors import raise_all, shorten
from lmeraser_jax.models.architectures import Gelu
from lmeraser_jax.models.zoo import Normalisation

Json = Mapping[str, Any]

GELUS: dict[str, Gelu] = {  # of transformers' hidden_act and timm's act_layer
    **dict.fromkeys(("gelu", "gelu_python"), "erf"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_tanh"), "tanh"),
    "quick_gelu": "sigmoid",
}
COMMON = {"patch": "patch_size", "channels": "num_channels", "image_size": "image_size"}
TIMM = {"width": "embed_dim", "heads": "num_heads", "patch": "patch_size", "channels": "in_chans"}
VIT = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads", "mlp": "intermediate_size"}
SIZES = {  # (timm's form, family): our setting -> the key of what the shapes of the arrays show as well
    (False, "vit"): VIT | COMMON | {"registers": "num_register_tokens"},
    (False, "swin"): {"width": "embed_dim", "depths": "depths", "heads": "num_heads", "window": "window_size"} | COMMON,
    (True, "vit"): {"depth": "depth", "image_size": "img_size"}
    | TIMM
    | {"registers": "reg_tokens", "pre_norm": "pre_norm"},
    (True, "swin"): {"depths": "depths", "window": "window_size", "image_size": "img_size"} | TIMM,
}
VIT_HEADS = 12  # of transformers' ViT, DINOv2 and CLIP where config.json names no other number
HEADS = {"test": 2, "tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "giant": 16, "gigantic": 16}  # timm's
LEGAL = {  # key -> what it may say; anything else calls for what the networks, or the images' way to them, do not have
    "pooler_act": ("tanh",),
    "pos_embed": ("learn",),
    **dict.fromkeys(("class_token", "final_norm"), (True,)),
    **dict.fromkeys(("fc_norm", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "use_swiglu_ffn"), (False,)),
    **dict.fromkeys(("use_absolute_embeddings", "pool_include_prefix", "always_partition"), (False,)),
    **dict.fromkeys(("do_flip_channel_order", "do_grayscale", "rescale_offset", "offset"), (False,)),
    **dict.fromkeys(("norm_layer", "embed_norm_layer", "embed_layer", "block_fn", "mlp_layer", "attn_layer"), ("",)),
    "head_dim": ("",),
}
NORMALISING = {"image_mean", "image_std", "mean", "std", "do_normalize", "do_rescale", "rescale_factor"}
RESIZING = {  # key -> values of what is done to the images here in any case
    "resample": (2,),
    "interpolation": ("bilinear",),
    "crop_pct": (1,),
    "crop_mode": ("center",),
    "do_pad": (False,),
}
LABELS = {"id2label", "label2id", "label_names", "label_descriptions", "labels"}
INERT = set(  # names, training, classifiers, output formats, texts, what the arrays show: they change no feature
    """_name_or_path _commit_hash architecture architectures model_type torch_dtype dtype auto_map transformers_version
    num_labels num_classes problem_type finetuning_task initializer_range encoder_stride hidden_dropout_prob
    attention_probs_dropout_prob classifier_dropout drop_rate pos_drop_rate patch_drop_rate proj_drop_rate
    attn_drop_rate drop_path_rate weight_init fix_init pooler_output_size mlp_ratio proj_bias path_norm hidden_size
    num_layers stage_names out_features out_indices use_mask_token output_attentions output_hidden_states return_dict
    torchscript tie_word_embeddings is_encoder_decoder dynamic_img_size dynamic_img_pad strict_img_size do_pooling
    url file state_dict hf_hub_id hf_hub_filename source tag custom_load label_offset pool_size test_pool_size
    first_conv classifier license description origin_url paper_name paper_ids notes input_size fixed_input_size
    min_input_size test_input_size test_crop_pct feature_extractor_type image_processor_type processor_class
    _valid_processor_keys use_fast do_convert_rgb data_format input_data_format return_tensors device disable_grouping
    default_to_square do_resize do_center_crop size crop_size chunk_size_feed_forward init_values no_embed_class
    layerscale_value apply_layernorm reshape_hidden_states projection_dim attention_dropout dropout initializer_factor
    add_cross_attention diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size is_decoder
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate temperature
    tie_encoder_decoder top_k top_p typical_p use_bfloat16 tf_legacy_loss""".split()
)
KNOWN = {  # beside those of `SIZES` and `LEGAL`
    "transformers": {"hidden_act", "layer_norm_eps", "qkv_bias"},
    "model_args": {"act_layer", "global_pool", "qkv_bias"},
    "timm": {"global_pool", "num_features"},
}


@dataclasses.dataclass(frozen=True)
class Stated:
    """What config.json says of an architecture; what it does not say is absent or None."""

    sizes: Mapping[str, tuple[str, Any]]  # our setting -> (key, value), to be compared with the arrays
    heads: int | None = None  # of a ViT
    gelu: Gelu | None = None
    epsilon: float | None = None
    qkv_bias: bool | None = None
    image_size: Any = None  # a side, or two
    pooled: bool = False  # whether it says what the feature is
    problems: tuple[str, ...] = ()  # what cannot be honoured


def of_images(config: Json) -> Json:
    """A config.json as it is, or of CLIP's what it says of the network for images, not of that for texts."""
    if config.get("model_type") != "clip":
        return config
    blocks = [config.get(key) for key in ("vision_config", "vision_config_dict")]  # of two values the last holds
    vision = {key: value for block in blocks if isinstance(block, Mapping) for key, value in block.items()}
    return {"model_type": "clip_vision_model"} | vision


def architecture_settings(config: Json, family: str, model_type: str, pooled: bool = True) -> Stated:
    """What config.json says; `pooled`: the feature is to be the published one, not one of the user's choice."""
    timm, kind = is_timm(config), config.get("model_type")
    args = (config.get("model_args") or {}) if timm else config
    if not isinstance(args, Mapping):
        return Stated({}, problems=(f"model_args={shorten(args)}; must be an object",))
    problems = _illegal(args)

    def legal(key: str, value: Any, good: Callable[[Any], bool], text: str) -> Any:
        if value is None or good(value):
            return value
        problems.append(f"{key}={shorten(value)}; {text}")
        return None

    if not timm and kind not in (None, model_type):
        problems.append(f"config.json says model_type={shorten(kind)}, the arrays are those of a {model_type}")
    sizes = {ours: (key, args[key]) for ours, key in SIZES[timm, family].items() if args.get(key) is not None}
    _, size = sizes.get("image_size", ("", None))
    heads, act_key = VIT_HEADS if kind else None, "hidden_act"
    if timm:
        channels, *sides = _input_size(config)
        sizes = ({"channels": ("input_size", channels)} if sides else {}) | sizes
        sizes |= {"feature_size": ("num_features", config["num_features"])} if config.get("num_features") else {}
        sizes = _sizes_of_name(str(config.get("architecture"))) | sizes
        size, heads, act_key = size or sides or None, _heads_of(config), "act_layer"
    act = args.get(act_key) or (_clip_act(config) if timm else None)
    act = legal(act_key, act, [*GELUS].__contains__, f"known: {', '.join(GELUS)}")
    epsilon, bias = None if timm else args.get("layer_norm_eps"), args.get("qkv_bias")
    epsilon = legal("layer_norm_eps", epsilon, lambda e: _is_number(e) and e > 0, "must be a number above 0")
    bias = legal("qkv_bias", bias, lambda b: isinstance(b, bool), "must be true or false")
    pool, usual = args.get("global_pool", config.get("global_pool")), "avg"
    if family == "vit":
        usual = "token; --config.backbone.feature=cls takes the class token"
        key, heads = sizes.get("heads", ("", heads))
        heads = legal(key, heads, lambda h: _is_number(h) and h == int(h) >= 1, "must be a whole number above 0")
        sizes = sizes if heads else {ours: pair for ours, pair in sizes.items() if ours != "heads"}
    if timm and pooled:
        legal("global_pool", pool, lambda p: p == usual.partition(";")[0], f"known: {usual}")
    heads, gelu = int(heads) if family == "vit" and heads else None, GELUS[act] if act else None
    return Stated(sizes, heads, gelu, epsilon, bias, size, pool is not None, tuple(problems))


def names_program(config: Json) -> bool:
    """Whether config.json names a program with defaults for what it leaves out."""
    name = str(config.get("architecture"))
    return bool(_heads_of(config) or name.startswith("swin_")) if is_timm(config) else bool(config.get("model_type"))


def is_timm(config: Json) -> bool:
    """Whether a config.json has timm's form."""
    return not {"architecture", "model_args", "pretrained_cfg"}.isdisjoint(config)


def _heads_of(config: Json) -> int | None:
    """Heads of a ViT by the name that timm has for it."""
    name = re.match(r"(?:vit|deit|flexivit)_([a-z]+)(?![a-z0-9])|test_vit$", str(config.get("architecture")))
    return HEADS.get(name[1] or "test") if name else None


def _clip_act(config: Json) -> str | None:
    """Activation of a CLIP vision tower by timm's name for it; quick GELU also where timm notes that it is native."""
    name, block = str(config.get("architecture")), config.get("pretrained_cfg", config)
    if "_clip_" not in name or not isinstance(block, Mapping):
        return None
    quick = "quickgelu" in f"{name} {block.get('notes')}".lower() or block.get("tag") == "openai"
    return "quick_gelu" if quick else "gelu"


def _sizes_of_name(name: str) -> dict[str, tuple[str, Any]]:
    """Width and patch of a ViT by the name that timm has for it, as `Stated.sizes`."""
    match = re.match(r"(?:vit|deit)_(tiny|small|base|large)_patch(\d+)", name)
    if not match:
        return {}
    return {"width": (f"architecture={name}: width", 64 * HEADS[match[1]]), "patch": ("its patch", int(match[2]))}


def _input_size(config: Json) -> list[Any]:
    """[channels, height, width] in a timm config; [None] where it does not say."""
    block = config.get("pretrained_cfg", config)
    size = block.get("input_size") if isinstance(block, Mapping) else None
    return size if isinstance(size, list) and len(size) == 3 else [None]


def _illegal(values: Json) -> list[str]:
    """Settings that call for what is not there."""
    return [
        f"{key}={shorten(values[key])}; known: {legal[0]}"
        if legal[0]
        else f"{key}={json.dumps(values[key])} is not supported"
        for key, legal in LEGAL.items()
        if values.get(key) not in (None, *legal)
    ]


def normalisation(config: Json, processor: Json, given: Collection[str] = ()) -> Normalisation | None:
    """Mean and standard deviation as the files say them in any of their blocks; None where they do not say.

    `given` names "mean" or "std" where the user sets it, so that the files need not. Raises `UserError` where they say
    what cannot be honoured, or two things.
    """
    problems, stated = _illegal(processor), {}
    for name, block in (*_blocks(config, "config.json"), *_blocks(processor, "preprocessor_config.json")):
        try:
            stated[name] = _normalisation_of(block, given)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    stated = {name: value for name, value in stated.items() if value}
    if len(set(stated.values())) > 1:
        problems.append("; ".join(f"{name} has mean {mean}, std {std}" for name, (mean, std) in stated.items()))
    flags = "--config.backbone.mean and --config.backbone.std replace them"
    raise_all(problems, f"mean and std beside the weights must be numbers that can be used; {flags}:")
    return next(iter(stated.values()), None)


def _blocks(values: Json, name: str) -> Iterator[tuple[str, Json]]:
    """The objects in a file that say something about normalisation, with their place."""
    if not NORMALISING.isdisjoint(values):
        yield name, values
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in LABELS:
            yield from _blocks(value, f"{name}: {key}")


def _normalisation_of(block: Json, given: Collection[str]) -> Normalisation | None:
    """(mean, std) of one block, for pixels in [0, 1]; None where it leaves them to a default. Raises ValueError."""
    for key in ("do_normalize", "do_rescale"):
        if not isinstance(block.get(key, True), bool):
            raise ValueError(f"{key}={shorten(block[key])}; must be true or false")
    factor = 1 / 255 if block.get("rescale_factor") is None else block["rescale_factor"]
    if not (_is_number(factor) and factor > 0):
        raise ValueError(f"rescale_factor={shorten(factor)}; must be a number above 0")
    scale = 255.0 if block.get("do_rescale") is False else 255.0 * factor  # what white is before it is normalised
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
    if block.get("do_normalize") is False:
        return (0.0,), (1.0 / scale,)
    stated = {key: _numbers(block, key) for key in ("mean", "std")}
    if not any(stated.values()) and scale == 1:
        return None
    for key in ("mean", "std"):
        if not stated[key] and key not in given:
            raise ValueError(f"{key} is missing")
    mean, std = (tuple(number / scale for number in numbers or (1.0,)) for numbers in stated.values())
    if min(std) <= 0:
        raise ValueError(f"std={std}; must be above 0")
    if stated["mean"] and not 0 <= min(mean) <= max(mean) <= 1:
        raise ValueError(f"mean={mean}; must lie in [0, 1], as the pixels do")
    return mean, std


def _numbers(block: Json, name: str) -> tuple[float, ...]:
    """One number or a list of them; () where there are none. Raises ValueError for anything else."""
    value = next((block[key] for key in (f"image_{name}", name) if block.get(key) is not None), ())
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(map(_is_number, numbers)) or value == []:
        raise ValueError(f"{name}={shorten(value)}; must be a finite number or a list of them")
    return tuple(map(float, numbers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def notes(config: Json, processor: Json, family: str, size: int) -> list[str]:
    """Keys that are not known here, and resizing that is not done; `size` is the side of the published input."""
    timm = is_timm(config)
    unknown = _unknown(config, "timm" if timm else "transformers", SIZES[timm, family].values())
    unknown += _unknown(processor, "processor", ())
    blocks = [config.get("pretrained_cfg", config)] if timm else []
    blocks += [block for _, block in _blocks(processor, "")] or [processor]
    resizing = []
    for block in filter(lambda block: isinstance(block, Mapping), blocks):
        resizing += [f"{key}={block[key]}" for key, usual in RESIZING.items() if block.get(key) not in (None, *usual)]
        cut = "crop_size" if block.get("do_center_crop") and block.get("crop_size") else "size"
        if square(block.get(cut)) not in (None, size):
            resizing.append(f"{cut}={block[cut]}")
    texts = {"keys that are not known here": unknown, "resizing, which is --config.data's": resizing}
    return [f"not used: {kind}: {', '.join(dict.fromkeys(keys))}" for kind, keys in texts.items() if keys]


def _unknown(values: Json, form: str, names: Collection[str]) -> list[str]:
    """Keys that could change a feature for all that is known here, also of the blocks inside."""
    known = KNOWN.get(form, set()) | INERT | LABELS | NORMALISING | RESIZING.keys()
    known = known | (set() if form == "timm" else LEGAL.keys()) | (set() if form == "timm" else set(names))
    unknown = []
    for key, value in values.items():
        inside = isinstance(value, Mapping)
        if inside and (key in ("model_args", "pretrained_cfg") or key not in known and any(_blocks(value, ""))):
            below = "model_args" if key == "model_args" else form
            unknown += [f"{key}.{name}" for name in _unknown(value, below, names)]
        elif key not in known and value is not None:
            unknown.append(key)
    return unknown


def square(value: Any) -> Any:
    """The side of a square that is given as one number, two, or an object; anything else as it is."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return value[0] if isinstance(value, list) and value and all(side == value[0] for side in value) else value
