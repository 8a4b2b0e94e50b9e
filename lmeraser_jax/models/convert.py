"""Published weights -> a frozen backbone: names and layouts are translated, every mismatch is listed at once.

The architecture is read off config.json where there is one (transformers' own classes fill in defaults),
else off the shapes. Steps: `translate` (our names, [in, out] kernels), `native` (the architecture as
published), `fit` (to the wanted image size and feature), `freeze`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import zoo
from lmeraser_jax.models.backbone import Architecture, Backbone, Params
from lmeraser_jax.models.key_maps import GELUS, LAST, ORIGINS, PREFIXES, Origin
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.models.vit import ViTConfig, interpolate_positions
from lmeraser_jax.models.weight_files import Weights, read

Flat = dict[str, np.ndarray]
NEEDED = {  # our name -> dimensions; without these no architecture can be read
    "vit": {"embed/kernel": 4, "positions": 3, "cls": 3, "blocks/0/mlp/fc1/kernel": 2},
    "swin": {"embed/kernel": 4, "stages/0/blocks/0/attention/table": 2, "stages/0/blocks/0/mlp/fc1/kernel": 2},
}
SHARED = {"patch": "patch_size", "channels": "num_channels", "image_size": "image_size"}
TOLD = {  # our setting -> the one of config.json that the arrays tell as well
    "vit": {"width": "hidden_size", "depth": "num_hidden_layers", "mlp": "intermediate_size", **SHARED},
    "swin": {"width": "embed_dim", "depths": "depths", "heads": "num_heads", "window": "window_size", **SHARED},
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a converted backbone comes from.

    Attributes:
        name: file or folder.
        origin: whose names it had.
        sha256: of what was read.
        left_out: arrays of the file that the backbone does not use.
        published_size: the image size that it was published for, in pixels.
    """

    name: str
    origin: str
    sha256: str
    left_out: tuple[str, ...]
    published_size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Translated:
    """Arrays under our names, positions and embedding still as published."""

    origin: Origin
    flat: Flat
    ignored: tuple[str, ...]


def load(chosen: settings.Backbone, image_size: int = 0) -> tuple[Backbone, Provenance]:
    """The backbone that the config names.

    Args:
        chosen: the config's backbone settings, with `weights` set.
        image_size: side of the input in pixels; 0: the size it was published for.

    Raises:
        UserError: an unknown name, unreadable weights, or anything in them that does not fit.
    """
    entry = zoo.entry(chosen.name) if chosen.name else None
    hub, revision = (entry.hub, entry.revision) if entry else ("", "")
    weights = read(chosen.weights, hub, revision, zoo.how_to_get(chosen.name))
    return freeze(weights, chosen, image_size)


def freeze(weights: Weights, chosen: settings.Backbone, image_size: int = 0) -> tuple[Backbone, Provenance]:
    """A frozen backbone from arrays; arguments and errors as in `load`."""
    config, params, provenance = parameters(weights, chosen, image_size)
    return backbone_lib.make(config, params, *normalisation(weights, chosen, config)), provenance


def parameters(
    weights: Weights, chosen: settings.Backbone, image_size: int = 0
) -> tuple[Architecture, Params, Provenance]:
    """Architecture and parameters, the public classifier among them; arguments and errors as in `load`."""
    if weights.own is not None:
        published, flat, origin, left_out = weights.own, dict(weights.arrays), weights.origin, ()
        _refuse_second_resize(weights, image_size)
    else:
        found = translate(weights)
        published, flat = native(found, weights, chosen.heads), found.flat
        origin, left_out = found.origin.name, found.ignored
    if chosen.name:
        heading = f"{weights.name} is not {chosen.name}; use other weights, or drop --config.backbone.name:"
        raise_all(zoo.differing(chosen.name, published), heading)
    wanted = dataclasses.replace(published, image_size=image_size or published.image_size)
    if isinstance(wanted, ViTConfig):
        wanted = dataclasses.replace(wanted, feature=_feature(wanted, flat, chosen))
    elif chosen.feature != "auto":
        raise UserError(f"--config.backbone.feature={chosen.feature}: Swin's feature is its mean token; use auto")
    raise_all(misfits(wanted, wanted.image_size))
    antialias = all(known.antialias for known in ORIGINS if known.name == origin)
    params, dropped = fit(flat, wanted, weights.name, antialias)
    unused = (*left_out, *dropped, *(name for name in flat if name.startswith("head/")))
    size = weights.published_size or published.image_size
    return wanted, params, Provenance(weights.name, origin, weights.sha256, unused, size)


def _refuse_second_resize(weights: Weights, image_size: int) -> None:
    """Positions that were resized once are not resized again: that would give other numbers than the original."""
    own = weights.own
    if (
        isinstance(own, ViTConfig)
        and image_size not in (0, own.image_size)
        and own.image_size != weights.published_size
    ):
        raise UserError(
            f"{weights.name} was converted for {own.image_size} px from weights for {weights.published_size} px;"
            f" convert the original for {image_size} px, or without --image_size, which serves every size"
        )


def translate(weights: Weights) -> Translated:
    """Arrays under our names and in our layout.

    Raises:
        UserError: names that no known origin has, arrays that are not floating point, or arrays of other
            dimensions than an architecture can be read from.
    """
    named = {_stripped(name): array for name, array in weights.arrays.items()}
    origin = _origin(weights, named)
    flat, ignored, wrong = {}, [], []
    for old, array in named.items():
        if any(re.search(pattern, old) for pattern in origin.ignored):
            ignored.append(old)
            continue
        new = old
        for pattern, replacement in (*origin.rules, *LAST):
            new = re.sub(pattern, replacement, new)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{old} must be floating point, is {array.dtype}")
        elif new in flat:
            wrong.append(f"{old} stands for {new}, and so does another array")
        else:
            flat[new] = _laid_out(new, np.asarray(array, np.float32), torch=old.endswith(".weight"))
    raise_all(wrong, f"{weights.name} cannot be used:")
    flat = _with_joined_attention(flat)
    _check_shapes(weights.name, origin, flat)
    return Translated(origin, flat, tuple(ignored))


def _stripped(name: str) -> str:
    name = name.replace("/", ".")
    for prefix in PREFIXES:
        name = re.sub(prefix, "", name)
    return name


def _origin(weights: Weights, named: Mapping[str, Any]) -> Origin:
    for origin in ORIGINS:
        if all(marker in named for marker in origin.markers):
            return origin
    known = ", ".join(origin.name for origin in ORIGINS)
    near = [origin for origin in ORIGINS if any(marker in named for marker in origin.markers)]
    lacking = [f"{o.name} has {', '.join(marker for marker in o.markers if marker not in named)}" for o in near]
    hint = f" ({'; '.join(lacking)}, and this has not)" if lacking else ""
    raise UserError(
        f"{weights.name} has none of the known layouts ({known}){hint}; its arrays: {join_limited(named) or 'none'}"
    )


def _laid_out(name: str, array: np.ndarray, torch: bool) -> np.ndarray:
    """PyTorch's [out, in] and OIHW, and Flax's [in, heads, out], as [in, out] and HWIO."""
    if torch and name.endswith("/kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    if re.search(r"/attention/(query|key|value)/", name) and array.ndim == (3 if name.endswith("kernel") else 2):
        return array.reshape(*array.shape[:-2], -1)
    if name.endswith("/attention/out/kernel") and array.ndim == 3:
        return array.reshape(-1, array.shape[-1])
    return array


def _with_joined_attention(flat: Flat) -> Flat:
    """Queries, keys and values of a block side by side, as our attention has them; missing biases are zero."""
    joined = dict(flat)
    for name in flat:
        if not name.endswith("/query/kernel"):
            continue
        stem = name.removesuffix("query/kernel")
        parts = [stem + part for part in ("query", "key", "value")]
        kernels = [flat.get(f"{part}/kernel", np.zeros(())) for part in parts]
        if any(kernel.shape != kernels[0].shape or kernel.ndim != 2 for kernel in kernels):
            continue  # listed later as missing and not used
        biases = [joined.pop(f"{part}/bias", np.zeros(kernels[0].shape[1], np.float32)) for part in parts]
        joined[f"{stem}qkv/kernel"] = np.concatenate([joined.pop(f"{part}/kernel") for part in parts], axis=1)
        joined[f"{stem}qkv/bias"] = np.concatenate([bias.reshape(-1) for bias in biases])
    for name in [name for name in joined if name.endswith("/qkv/kernel")]:
        joined.setdefault(name.removesuffix("kernel") + "bias", np.zeros(joined[name].shape[-1:], np.float32))
    return joined


def _check_shapes(name: str, origin: Origin, flat: Flat) -> None:
    """Refuses arrays that no architecture can be read from."""
    needed = NEEDED[origin.family]
    wrong = [f"missing: {key}" for key in needed if key not in flat]
    matrices = {key: 2 for key in flat if key == "head/kernel" or key.endswith("/attention/table")}
    wrong += [
        f"{key} {list(flat[key].shape)}: must have {ndim} dimensions, none of them 0"
        for key, ndim in (matrices | needed).items()
        if key in flat and (flat[key].ndim != ndim or not flat[key].size)
    ]
    if not wrong and flat["embed/kernel"].shape[0] != flat["embed/kernel"].shape[1]:
        wrong.append(f"embed/kernel {list(flat['embed/kernel'].shape)}: patches must be square")
    if not wrong and origin.family == "vit":
        tokens = flat["positions"].shape[1] - 1
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            shape = list(flat["positions"].shape)
            wrong.append(f"positions {shape}: must hold one class token and a square of patches")
    if not wrong and origin.family == "swin":
        rows = len(flat["stages/0/blocks/0/attention/table"])
        if math.isqrt(rows) ** 2 != rows or math.isqrt(rows) % 2 == 0:
            wrong.append(f"stages/0/blocks/0/attention/table has {rows} rows: must be (2 * window - 1) squared")
    raise_all(wrong, f"{name} looks like {origin.name}, but:")


def native(found: Translated, weights: Weights, heads: int) -> Architecture:
    """The architecture as published: from the shapes, and from config.json what shapes do not tell.

    Args:
        found: translated arrays.
        weights: where config.json's values are.
        heads: attention heads of a ViT, where the file does not say; 0: width / 64.

    Raises:
        UserError: config.json is of another family, or contradicts the shapes.
    """
    flat, told = found.flat, _hub_config(weights, found.origin.family)
    gelu = GELUS.get(getattr(told, "hidden_act", ""), found.origin.gelu)
    epsilon = float(getattr(told, "layer_norm_eps", found.origin.epsilon))
    patch, _, channels, width = flat["embed/kernel"].shape
    shared: dict[str, Any] = {"patch": patch, "channels": channels, "width": width, "gelu": gelu, "epsilon": epsilon}
    shared["classes"] = flat["head/kernel"].shape[-1] if "head/kernel" in flat else 0
    if found.origin.family == "vit":
        known = _heads_of_flax(weights) or getattr(told, "num_attention_heads", 0)
        if known and heads not in (0, known):
            raise UserError(f"--config.backbone.heads={heads}: {weights.name} has {known}; leave the flag out, or 0")
        grid = math.isqrt(flat["positions"].shape[1] - 1)
        vit = ViTConfig(
            image_size=grid * patch,
            depth=1 + max(int(m.group(1)) for name in flat if (m := re.match(r"blocks/(\d+)/", name))),
            heads=known or heads or max(1, width // 64),
            mlp=flat["blocks/0/mlp/fc1/kernel"].shape[1],
            **shared,
        )
        return _not_contradicted(vit, weights)
    blocks = [(int(m[1]), int(m[2])) for name in flat if (m := re.match(r"stages/(\d+)/blocks/(\d+)/", name))]
    stages = range(1 + max(stage for stage, _ in blocks))
    tables = [flat.get(f"stages/{stage}/blocks/0/attention/table", np.zeros((0, 0))) for stage in stages]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    size = _one(getattr(told, "image_size", None))
    swin = SwinConfig(
        image_size=size if isinstance(size, int) else patch * window * 2 ** (len(stages) - 1),
        depths=tuple(1 + max((block for stage, block in blocks if stage == s), default=-1) for s in stages),
        heads=tuple(table.shape[1] for table in tables),
        window=window,
        mlp_ratio=flat["stages/0/blocks/0/mlp/fc1/kernel"].shape[1] / width,
        **shared,
    )
    return _not_contradicted(swin, weights)


def _one(value: Any) -> Any:
    """The number of a square that config.json gives as two."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value


def _not_contradicted(config: Architecture, weights: Weights) -> Architecture:
    """The same architecture. Raises `UserError` where config.json says otherwise."""
    family = "vit" if isinstance(config, ViTConfig) else "swin"
    told = weights.settings if weights.settings.get("model_type") == family else {}
    wrong = []
    for ours, theirs in TOLD[family].items():
        has = getattr(config, ours)
        says = told.get(theirs, has)
        if has != (tuple(says) if isinstance(has, tuple) and isinstance(says, list) else _one(says)):
            wrong.append(f"{theirs} is {says} in config.json, {has} in the arrays")
    raise_all(wrong, f"{weights.name} and the config.json beside it do not belong together:")
    return config


def _hub_config(weights: Weights, family: str) -> Any:
    """config.json as transformers understands it, None where there is none of its kind."""
    kind = weights.settings.get("model_type")
    if kind is None:
        return None
    if kind != family:
        raise UserError(f"{weights.name}: config.json says model_type={kind}, the arrays are those of a {family}")
    from transformers import AutoConfig

    values = {name: value for name, value in weights.settings.items() if name != "model_type"}
    try:
        told = AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers checks values with many kinds of errors
        raise UserError(f"{weights.name}: config.json is not a {kind}'s: {error}") from error
    act = getattr(told, "hidden_act", "gelu")
    wrong = [] if act in GELUS else [f"hidden_act={act}; known: {', '.join(GELUS)}"]
    if getattr(told, "use_absolute_embeddings", False):
        wrong.append("use_absolute_embeddings=true is not supported")
    if getattr(told, "pooler_act", "tanh") != "tanh":
        wrong.append(f"pooler_act={told.pooler_act}; known: tanh")
    raise_all(wrong, f"{weights.name}: config.json asks for what there is not here:")
    return told


def _heads_of_flax(weights: Weights) -> int:
    """Heads, where a Flax file keeps them as an axis of the query kernel; else 0."""
    for name, array in weights.arrays.items():
        if name.endswith("query/kernel") and array.ndim == 3:
            return array.shape[1]
    return 0


def _feature(config: ViTConfig, flat: Flat, chosen: settings.Backbone) -> str:
    """cls or pooler: as asked for, else as the named backbone has it, else what the file has."""
    if chosen.feature != "auto":
        return chosen.feature
    if chosen.name:
        return zoo.entry(chosen.name).architecture.feature
    return "pooler" if "pooler/kernel" in flat else "cls"


def fit(flat: Flat, wanted: Architecture, name: str, antialias: bool = True) -> tuple[Params, tuple[str, ...]]:
    """Nested parameters of `wanted`, positions resized to its grid; also the arrays that were left out.

    Raises:
        UserError: lists every missing, unused or misshapen array.
    """
    flat = dict(flat)
    kernel = flat["embed/kernel"]
    flat["embed/kernel"] = kernel.reshape(-1, kernel.shape[-1])
    dropped = ()
    if isinstance(wanted, ViTConfig):
        flat["positions"] = interpolate_positions(flat["positions"], wanted.grid, antialias)
        if wanted.feature == "cls":
            dropped = tuple(key for key in flat if key.startswith("pooler/"))
    params = backbone_lib.from_flat(wanted, {key: leaf for key, leaf in flat.items() if key not in dropped}, name)
    return params, dropped


def normalisation(
    weights: Weights, chosen: settings.Backbone, config: Architecture
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): from the config, else as a folder of ours was made, the named backbone's, the file's, the usual."""
    usual = zoo.IMAGENET if isinstance(config, SwinConfig) else zoo.HALF
    if chosen.name and weights.own is None:
        mean, std = zoo.entry(chosen.name).normalisation
    else:
        mean, std = weights.normalisation or usual
    return per_channel(
        settings.parse_numbers(chosen.mean) or mean, settings.parse_numbers(chosen.std) or std, config.channels
    )


def per_channel(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) as so many channels need them: a grey backbone takes the mean over the colours."""
    found = mean, std
    if channels == 1:
        found = tuple((float(np.mean(values)),) for values in found)
    wrong = [values for values in found if len(values) not in (1, channels)]
    heading = "normalisation (--config.backbone.mean, --config.backbone.std):"
    raise_all([f"{values}: the backbone has {channels} channels" for values in wrong], heading)
    return found[0], found[1]


def misfits(config: Architecture, image_size: int) -> list[str]:
    """What keeps an architecture from an image size, and its own numbers from each other."""
    found = []
    if image_size % config.patch:
        found.append(f"--config.data.image_size={image_size}: must be a multiple of the patch size {config.patch}")
    if isinstance(config, ViTConfig):
        if config.heads < 1 or config.width % config.heads:
            found.append(f"--config.backbone.heads={config.heads}: must divide the width {config.width}")
        return found
    widths = [config.width * 2**stage for stage in range(len(config.depths))]
    return found + [
        f"the bias tables of stage {stage} are for {heads} heads, which do not divide its width {width}"
        for stage, (heads, width) in enumerate(zip(config.heads, widths))
        if heads and width % heads  # 0: that table is missing, and listed so
    ]
