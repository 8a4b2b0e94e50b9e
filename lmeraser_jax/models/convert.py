"""Published weights -> a frozen backbone: names and layouts are translated, every mismatch is listed at once.

Steps: `translate.translate` (our names, [in, out] kernels), `published_architecture` (read off the shapes; config.json
adds what they do not show, see `weight_settings`), `fit` (to the wanted image size and feature).
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import decoder_weights, weight_settings, zoo
from lmeraser_jax.models.architectures import DecoderConfig, ImageArchitecture, SwinConfig, ViTConfig
from lmeraser_jax.models.backbone import Backbone, Params
from lmeraser_jax.models.key_maps import BY_NAME, Origin
from lmeraser_jax.models.translate import TABLE, Flat, translate
from lmeraser_jax.models.vit import interpolate_positions
from lmeraser_jax.models.weight_files import Weights, read
from lmeraser_jax.models.weight_settings import square
from lmeraser_jax.models.zoo import Normalisation
from lmeraser_jax.storage import checkpoints


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a converted backbone comes from."""

    name: str  # file or folder
    origin: str  # whose names it had
    sha256: str  # of the files that were read
    left_out: tuple[str, ...]  # arrays of the file that the backbone does not use
    published_size: int  # the image size that it was published for, in pixels
    notes: tuple[str, ...] = ()  # what was assumed, and what beside the weights was not used


def load(chosen: settings.Backbone, image_size: int = 0, note: bool = True) -> tuple[Backbone, Provenance]:
    """The backbone that the config names, for inputs of `image_size` pixels a side; 0: of its published size.

    With `note`, a line on standard error says what was assumed, and what beside the weights was not used. Raises
    `UserError` for an unknown name, unreadable weights, or anything in them that does not fit.
    """
    weights = _read(chosen)
    backbone, provenance = freeze(weights, chosen, image_size)
    if provenance.notes and note:
        print(f"note: {weights.name}: {'; '.join(provenance.notes)}", file=sys.stderr, flush=True)
    return backbone, provenance


def check_moved(folder: Path, chosen: settings.Backbone) -> None:
    """Refuses weights other than those that the backbone in a folder was made from, wherever these lay."""
    weights, provenance = _read(chosen), checkpoints.load(folder)[1]["provenance"]
    if weights.sha256 != provenance.get("sha256"):
        raise UserError(
            f"--config.backbone.weights={chosen.weights} are not the weights that {folder} was made from, which were"
            f" {provenance.get('name')}; drop the flag, or use a new --workdir"
        )


def _read(chosen: settings.Backbone) -> Weights:
    """The arrays that the config names."""
    zoo.refuse_absent(chosen)
    entry = zoo.entry(chosen.name) if chosen.name else None
    hub, revision = (entry.hub, entry.revision) if entry else ("", "")
    return read(chosen.weights, hub, revision)


def freeze(weights: Weights, chosen: settings.Backbone, image_size: int = 0) -> tuple[Backbone, Provenance]:
    """A frozen backbone from arrays; arguments and errors as in `load`."""
    if not image_size and decoder_weights.is_decoder(weights):
        config, params, origin, left_out, notes = decoder_weights.parameters(weights, chosen)
        facts = Provenance(weights.name, origin, weights.sha256, left_out, 0, notes)
        return backbone_lib.make(config, params, (), ()), facts
    config, params, provenance = parameters(weights, chosen, image_size)
    mean, std, notes = normalisation(weights, chosen, config.channels, provenance.origin)
    provenance = dataclasses.replace(provenance, notes=(*provenance.notes, *notes))
    return backbone_lib.make(config, params, mean, std), provenance


def parameters(
    weights: Weights, chosen: settings.Backbone, image_size: int = 0
) -> tuple[ImageArchitecture, Params, Provenance]:
    """Architecture and parameters, the public classifier among them; arguments and errors as in `load`."""
    if decoder_weights.is_decoder(weights):
        raise UserError(f"{weights.name} is a language model, which reads no images; take weights of a ViT or a Swin")
    assert not isinstance(weights.own, DecoderConfig)
    if weights.own:
        published, flat, origin, ignored, notes = weights.own, dict(weights.arrays), weights.origin, (), []
    else:
        names, flat, ignored = translate(weights)
        published, notes = published_architecture(weights, names, flat, chosen)
        origin = names.name
    if chosen.name:
        heading = f"{weights.name} is not {chosen.name}; use other weights, or drop --config.backbone.name:"
        raise_all(zoo.differences(chosen.name, published), heading)
    wanted = dataclasses.replace(published, image_size=image_size or published.image_size)
    if isinstance(wanted, ViTConfig):
        named = zoo.entry(chosen.name).architecture.feature if chosen.name else "auto"
        of_file = "pooler" if "pooler/kernel" in flat else "cls"
        feature = next(kind for kind in (chosen.feature, named, of_file) if kind != "auto")
        wanted = dataclasses.replace(wanted, feature=feature)
    raise_all(_setting_problems(wanted, weights, chosen), f"{weights.name} cannot be used with these settings:")
    antialias = BY_NAME[origin].antialias if origin in BY_NAME else True
    params, dropped = fit(flat, wanted, weights.name, antialias)
    unused = (*ignored, *dropped, *(name for name in flat if name.startswith("head/")))
    size = weights.published_size or published.image_size
    return wanted, params, Provenance(weights.name, origin, weights.sha256, unused, size, tuple(notes))


def _setting_problems(wanted: ImageArchitecture, weights: Weights, chosen: settings.Backbone) -> list[str]:
    """What keeps the weights from the settings of the run."""
    problems = size_problems(wanted)
    if isinstance(wanted, SwinConfig):
        if chosen.feature != "auto":
            problems.append(f"--config.backbone.feature={chosen.feature}: Swin's feature is its mean token; use auto")
        return problems
    size = weights.own.image_size if weights.own else wanted.image_size
    if size not in (wanted.image_size, weights.published_size or size):  # resized twice, positions have other numbers
        problems.append(
            f"it was converted for {size} px from weights for {weights.published_size} px; convert the"
            f" original for {wanted.image_size} px, or without --image_size, which serves every size"
        )
    return problems


def size_problems(config: ImageArchitecture) -> list[str]:
    """What keeps an architecture's numbers from each other."""
    problems = []
    if config.image_size % config.patch:
        size = f"--config.data.image_size={config.image_size}"
        near = max(1, round(config.image_size / config.patch)) * config.patch
        problems.append(f"{size}: must be a multiple of the patch size {config.patch}, such as {near}")
    if isinstance(config, ViTConfig):
        if config.heads < 1 or config.width % config.heads:
            problems.append(f"--config.backbone.heads={config.heads}: must divide the width {config.width}")
        return problems
    for stage, heads in enumerate(config.heads):
        width = config.width * 2**stage
        if heads and width % heads:  # 0: that table is missing, and listed so
            tables = f"the bias tables of stage {stage} are for {heads} heads"
            problems.append(f"{tables}, which do not divide its width {width}")
    return problems


def published_architecture(
    weights: Weights, origin: Origin, flat: Flat, chosen: settings.Backbone
) -> tuple[ImageArchitecture, list[str]]:
    """The architecture as published: from the shapes, and from config.json what shapes do not show.

    `origin` and `flat` are as `translate` returns them. Also says what was assumed and what was not used. Raises
    `UserError` where config.json contradicts the shapes or calls for what is not supported.
    """
    family, heading = origin.family, f"{weights.name} and the config.json beside it do not belong together:"
    model_type, pooled = origin.model_type or family, chosen.feature == "auto"
    stated = weight_settings.architecture_settings(weights.settings, family, model_type, pooled)
    problems = list(stated.problems)
    patch, _, channels, width = flat["embed/kernel"].shape
    shared: dict[str, Any] = {"patch": patch, "channels": channels, "width": width}
    shared["classes"] = flat["head/kernel"].shape[-1] if "head/kernel" in flat else 0
    shared |= {"gelu": stated.gelu or origin.gelu, "epsilon": float(stated.epsilon or origin.epsilon)}
    kernels = [array for name, array in weights.arrays.items() if name.endswith("query/kernel")]
    axis = next((array.shape[1] for array in kernels if array.ndim == 3), 0)  # Flax keeps heads apart
    heads = axis or stated.heads or chosen.heads
    config = _vit_of(flat, heads, shared) if family == "vit" else _swin_of(stated.image_size, flat, shared)
    for ours, (theirs, value) in stated.sizes.items():
        expected = getattr(config, ours)
        if expected != (tuple(value) if isinstance(expected, tuple) and isinstance(value, list) else square(value)):
            problems.append(f"{theirs} is {value} in config.json, {expected} in the arrays")
    biases = [array for name, array in weights.arrays.items() if re.search(r"(query|key|value|qkv)[./]bias$", name)]
    biased = any(map(np.any, biases)) if stated.qkv_bias is False else bool(biases)
    if isinstance(config, ViTConfig) and stated.heads and width % stated.heads:
        problems.append(f"{stated.heads} heads, which config.json calls for, do not divide the width {width}")
    if stated.qkv_bias not in (None, biased):
        problems.append(f"qkv_bias is {stated.qkv_bias} in config.json, {biased} in the arrays")
    raise_all(problems, heading)
    if isinstance(config, ViTConfig) and chosen.heads not in (0, config.heads):
        flag = f"--config.backbone.heads={chosen.heads}"
        raise UserError(f"{flag}: {weights.name} has {config.heads}; leave the flag out, or 0")
    notes = weight_settings.notes(weights.settings, weights.processor, family, config.image_size)
    assumed = []
    if isinstance(config, ViTConfig) and not heads and not chosen.name:
        assumed.append(f"{config.heads} heads of {config.width // config.heads} (--config.backbone.heads)")
    if not weight_settings.names_program(weights.settings):
        numerics = {f"GELU {config.gelu}": stated.gelu, f"epsilon {config.epsilon}": stated.epsilon}
        assumed += [text for text, value in numerics.items() if not value]
        known = chosen.name or stated.pooled or "pooler/kernel" in flat
        if family == "vit" and chosen.feature == "auto" and not known:
            assumed.append("the class token as the published feature")
    return config, ([f"assumed, as no config.json says it: {', '.join(assumed)}"] if assumed else []) + notes


def _vit_of(flat: Flat, heads: int, shared: Mapping[str, Any]) -> ViTConfig:
    return ViTConfig(
        image_size=math.isqrt(flat["positions"].shape[1] - 1) * shared["patch"],
        depth=1 + max(block for (block,) in _indices(flat, r"blocks/(\d+)/")),
        heads=heads or max(1, shared["width"] // 64),
        mlp=flat["blocks/0/mlp/fc1/kernel"].shape[1],
        registers=flat["registers"].shape[1] if "registers" in flat else 0,
        pre_norm="pre_norm/scale" in flat,
        **shared,
    )


def _swin_of(image_size: Any, flat: Flat, shared: Mapping[str, Any]) -> SwinConfig:
    blocks = _indices(flat, r"stages/(\d+)/blocks/(\d+)/")
    stages = range(1 + max(stage for stage, _ in blocks))
    tables = [flat.get(TABLE.format(stage), np.zeros((0, 0))) for stage in stages]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    size = square(image_size)
    return SwinConfig(
        image_size=size if isinstance(size, int) else shared["patch"] * window * 2 ** (len(stages) - 1),
        depths=tuple(1 + max((block for stage, block in blocks if stage == s), default=-1) for s in stages),
        heads=tuple(table.shape[1] for table in tables),
        window=window,
        mlp_ratio=flat["stages/0/blocks/0/mlp/fc1/kernel"].shape[1] / shared["width"],
        **shared,
    )


def _indices(flat: Flat, pattern: str) -> list[tuple[int, ...]]:
    """The numbers in every name that begins with the pattern."""
    matches = [re.match(pattern, name) for name in flat]
    return [tuple(map(int, match.groups())) for match in matches if match]


def fit(flat: Flat, wanted: ImageArchitecture, name: str, antialias: bool = True) -> tuple[Params, tuple[str, ...]]:
    """Nested parameters of `wanted`, positions resized to its grid; also the names of the arrays that were left out.

    Raises `UserError` that lists every missing, unused or misshapen array.
    """
    flat, dropped = dict(flat), ()
    flat["embed/kernel"] = flat["embed/kernel"].reshape(-1, flat["embed/kernel"].shape[-1])
    if isinstance(wanted, ViTConfig):
        flat["positions"] = interpolate_positions(flat["positions"], wanted.grid, antialias)
        if wanted.feature == "cls":
            dropped = tuple(key for key in flat if key.startswith("pooler/"))
    params = backbone_lib.from_flat(
        backbone_lib.graph(wanted)[1], {key: leaf for key, leaf in flat.items() if key not in dropped}, name
    )
    return params, dropped


def normalisation(
    weights: Weights, chosen: settings.Backbone, channels: int, origin: str
) -> tuple[tuple[float, ...], tuple[float, ...], list[str]]:
    """Mean, deviation, notes: from the config, else as a folder of ours was made, the name's, the file's, the origin's.

    Raises `UserError` for what the files beside the weights say and cannot be honoured, unless the config says both.
    """
    given = {key: settings.parse_numbers(getattr(chosen, key)) for key in ("mean", "std")}
    usual = BY_NAME[origin].normalisation if origin in BY_NAME else zoo.HALF
    stated, notes = weights.normalisation, []
    if not all(given.values()) and not weights.normalisation:
        stated = weight_settings.normalisation(
            weights.settings, weights.processor, [key for key in given if given[key]]
        )
        if chosen.name:
            usual = zoo.entry(chosen.name).normalisation
            if stated not in (None, usual):
                notes.append(f"mean and std are those of {chosen.name}, not {stated} beside the weights")
            stated = usual
        elif stated is None:
            notes.append(f"assumed, as no file beside the weights says it: mean {usual[0]}, std {usual[1]}")
    mean, std = stated or usual
    if channels == 1 and len(given["mean"] or mean) + len(given["std"] or std) > 2:
        notes.append("mean and std of the one channel are the means of those of the colours")
    return *per_channel(given["mean"] or mean, given["std"] or std, channels), notes


def per_channel(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> Normalisation:
    """(mean, std) for so many channels: one number or one each; a grey backbone takes the mean over the colours."""
    if channels == 1:
        return (float(np.mean(mean)),), (float(np.mean(std)),)
    problems = [f"{v}: the backbone has {channels} channels" for v in (mean, std) if len(v) not in (1, channels)]
    raise_all(problems, "normalisation (--config.backbone.mean, --config.backbone.std):")
    return mean, std
