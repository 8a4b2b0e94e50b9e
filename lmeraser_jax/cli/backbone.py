"""lmeraser backbone: list published backbones, or convert weights into a folder for --config.backbone.weights.

  lmeraser backbone --list
  lmeraser backbone --weights=FILE_OR_FOLDER --out=DIR
  lmeraser backbone --name=vit-b-22k --weights=FOLDER --out=DIR [--image_size=224]

The command reads .safetensors, .gguf, .npz, Flax .msgpack and folders as on the Hugging Face hub: ViT and Swin, and the
language models Llama and Qwen2. Only hub:OWNER/NAME (or hub, with a name) uses a network. With a name the weights must
be of that backbone, whose feature and normalisation are used.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmeraser_jax import config as settings
from lmeraser_jax.cli import common
from lmeraser_jax.config.paths import absolute, absolute_weights
from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.models import architectures, zoo

if TYPE_CHECKING:
    from lmeraser_jax.models.backbone import Backbone

STRAY = "name them as --weights=FILE_OR_FOLDER"
FLAGS = (
    common.Flag("list", False, "list the published backbones that --name accepts"),
    common.Flag("name", "", "name of a published backbone"),
    common.Flag("weights", absolute_weights, "file, folder, hub:OWNER/NAME, or hub"),
    common.Flag("out", absolute, "new folder for the converted backbone"),
    common.Flag("image_size", 0, "side of the input in pixels; 0: as published", low=0),
)


def run(arguments: common.Arguments) -> int:
    if arguments["list"]:
        return _list(arguments)
    out = output_folder(arguments["out"])
    config = _backbone_settings(arguments)
    zoo.refuse_absent(config)
    common.require_device()
    from lmeraser_jax.models import backbone as backbone_lib
    from lmeraser_jax.models import convert, tokenizers
    from lmeraser_jax.models.architectures import DecoderConfig

    backbone, provenance = convert.load(config, arguments["image_size"])
    tokenizer = None
    if isinstance(backbone.config, DecoderConfig):
        try:
            tokenizer = tokenizers.beside(config.weights, backbone.config)
        except UserError as error:
            common.warn(f"no tokenizer is kept with the model: {error}")
    inputs = {"backbone": dataclasses.asdict(config), "image_size": arguments["image_size"]}
    facts = dataclasses.asdict(provenance)
    backbone_lib.save(out, backbone, inputs, facts)
    if tokenizer is not None:
        tokenizers.save(out / tokenizers.KEPT, tokenizer)
    show(arguments, out, backbone, facts)
    return 0


def show(arguments: common.Arguments, out: Path, backbone: "Backbone", provenance: Mapping[str, Any]) -> None:
    """Prints what a saved backbone is and where it comes from."""
    from lmeraser_jax.models import backbone as backbone_lib
    from lmeraser_jax.storage import checkpoints

    values = {
        "folder": str(out),
        "architecture": backbone_lib.describe(backbone.config),
        "parameters": sum(leaf.size for leaf in checkpoints.flatten(backbone.params).values()),
        "digest": backbone.digest,
        "feature": backbone.config.feature,
        "feature_size": backbone.config.feature_size,
        "mean": backbone.mean,
        "std": backbone.std,
        **{f"source_{name}": value for name, value in provenance.items()},
    }
    common.show(arguments, _text(values), values)


def _backbone_settings(arguments: common.Arguments) -> settings.Backbone:
    """The flags over the config's backbone settings. Raises `UserError` for illegal ones and missing weights."""
    tree = arguments["config"].to_dict()
    given = {**tree.get("backbone", {}), **{name: arguments[name] for name in ("name", "weights") if arguments[name]}}
    if not given.get("weights"):
        hint = zoo.download_hint(given.get("name", "")) or "a file, a folder, or hub:OWNER/NAME"
        raise UserError(f"--weights is missing: {hint}")
    return settings.from_dict({**tree, "backbone": given}).backbone


def output_folder(out: str) -> Path:
    """The folder to write. Raises `UserError` when it is missing, already holds something or cannot be made."""
    if not out:
        raise UserError("--out=DIR is missing: a new folder to write")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(f"--out={out} exists already; name a new folder")
    place = next(path for path in Path(out).parents if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--out={out} cannot be made: {place} is no folder, or may not be written to")
    return Path(out)


def _text(values: dict[str, Any]) -> str:
    sizes = [f"{k} {v}" for k, v in values["architecture"].items() if k not in ("family", "classes", "feature")]
    images = f"  normalisation  mean {values['mean']}, std {values['std']}"
    text = "  licence        unknown here; as the publisher states it"
    lines = [
        f"{values['source_name']}: {values['source_origin']}, sha256 {values['source_sha256'][:12]}",
        f"  {values['architecture']['family']}: {', '.join(sizes)}",
        f"  parameters     {values['parameters']:,}",
        f"  feature        {values['feature']}, {values['feature_size']} numbers",
        images if values["mean"] else text,
        f"  left out       {join_limited(values['source_left_out']) or 'nothing'}",
        f"  digest         {values['digest']}",
        f"use it with: --config.backbone.weights={values['folder']}",
    ]
    return "\n".join(lines)


def _list(arguments: common.Arguments) -> int:
    rows = {
        name: {
            **dataclasses.asdict(entry),
            "architecture": architectures.describe(entry.architecture),
            "feature": entry.architecture.feature,
        }
        for name, entry in zoo.ZOO.items()
    }
    lines = [f"{'name':<14}{'feature':<9}{'hub':<50}{'about'}"]
    lines += [f"{name:<14}{row['feature']:<9}{row['hub']:<50}{row['about']}" for name, row in rows.items()]
    common.show(arguments, "\n".join(lines), rows)
    return 0
