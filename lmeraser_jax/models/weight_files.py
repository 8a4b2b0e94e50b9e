"""Files of published weights -> arrays by name. Nothing here unpickles, and only a hub id touches a network.

Read are .npz, .safetensors (also in shards), Flax .msgpack, the hub's folders, which hold one of the latter
two beside a config.json, and folders that `lmeraser backbone` wrote.
"""

import dataclasses
import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Architecture
from lmeraser_jax.storage import checkpoints

READ = (".safetensors", ".npz", ".msgpack")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar", ".joblib")
IN_A_FOLDER = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
WANTED_FROM_HUB = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What was found.

    Attributes:
        name: the file or folder, for messages.
        arrays: arrays by the origin's own names.
        sha256: over the files that were read.
        settings: config.json beside them, {} where there is none.
        own: the architecture, where `lmeraser backbone` wrote the folder.
        origin, published_size: whose names the file had from which it wrote it, and that file's image size.
        normalisation: (mean, std) that the folder records, None where it does not.
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    sha256: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: Architecture | None = None
    origin: str = ""
    published_size: int = 0
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def read(weights: str, hub_id: str = "", revision: str = "main", help_: str = "") -> Weights:
    """Reads what `backbone.weights` names.

    Args:
        weights: a path, `hub:OWNER/NAME[@REVISION]`, or `hub` for the id given next.
        hub_id, revision: where the named backbone is published; "" where there is none.
        help_: what to download and where to put it, for the message when nothing is there.

    Raises:
        UserError: not there, not readable, a pickle, or no network for a hub id.
    """
    try:
        return _read(weights, hub_id, revision, help_)
    except UserError as error:
        raise UserError(f"--config.backbone.weights={weights}: {error}") from error


def _read(weights: str, hub_id: str, revision: str, help_: str) -> Weights:
    if weights == "hub" or weights.startswith("hub:"):
        path = _fetched(weights, hub_id, revision)
    else:
        path = Path(weights)
    if path.is_dir():
        return _read_folder(path)
    if path.name in IN_A_FOLDER and path.is_file():
        return _read_folder(path.parent, path)
    if not path.exists():
        hint = help_ or f"expected a file ({', '.join(READ)}), a folder, or hub:OWNER/NAME for one of the hub's"
        raise UserError(f"no such file or folder; {hint}")
    return Weights(str(path), read_file(path), _sha256([path]))


def read_file(path: Path) -> dict[str, np.ndarray]:
    """All arrays of one file. Raises `UserError` when it cannot be read."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code while it loads, so it is not read. Take the repository's"
            " model.safetensors, or convert it where you trust it:"
            " safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".msgpack": _read_msgpack}
    if suffix not in readers:
        raise UserError(f"{path}: weights are read from {', '.join(READ)} and folders of them, not from {suffix!r}")
    return readers[suffix](path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as raw:  # np.load of a path leaves a damaged file open
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it holds a single array")
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable .npz: {error}") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable .safetensors, perhaps cut short: {error}") from error


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    from flax.serialization import msgpack_restore

    try:
        tree = msgpack_restore(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, not a tree of arrays")
        return checkpoints.flatten(tree)
    except Exception as error:  # msgpack raises many kinds for damaged bytes
        raise UserError(f"{path} is not a readable Flax .msgpack, perhaps cut short: {error}") from error


def _read_folder(folder: Path, file: Path | None = None) -> Weights:
    """A folder of the hub's form (one of its files can be chosen), or one that `lmeraser backbone` wrote."""
    if file is None and (folder / "0").is_dir():
        return _read_own(folder)
    settings = _read_json(folder / "config.json")
    normalisation = _normalisation(settings, _read_json(folder / "preprocessor_config.json"))
    found = [folder / name for name in IN_A_FOLDER if (folder / name).is_file()]
    files = [file] if file else found[:1] or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in PICKLES]
        if others and not files:
            read_file(folder / others[0])  # says why a pickle is not read
        there = join_limited(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(f"{folder} must hold one of {', '.join(IN_A_FOLDER)}; it holds {there}")
    if files[0].suffix == ".json":
        shards = _read_json(files[0]).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{files[0]} is damaged: weight_map must give a file for each array")
        files += [folder / name for name in sorted(set(shards.values()))]
        raise_all([f"{path} is missing; {files[0].name} names it" for path in files[1:] if not path.is_file()])
        arrays = {name: array for path in files[1:] for name, array in read_file(path).items()}
    else:
        arrays = read_file(files[0])
    return Weights(str(files[0]), arrays, _sha256(files), settings, normalisation=normalisation)


def _read_own(folder: Path) -> Weights:
    arrays, metadata, _ = checkpoints.load(folder)
    if "config" not in metadata or "provenance" not in metadata:
        raise UserError(f"{folder} is no backbone that lmeraser backbone wrote")
    made, told = backbone_lib.restored(folder, arrays, metadata), metadata["provenance"]
    if not isinstance(told.get("origin"), str) or type(told.get("published_size", 0)) is not int:
        raise UserError(f"{folder} is damaged: its provenance names no origin and published size")
    return Weights(
        str(folder),
        arrays,
        made.digest,
        own=made.config,
        origin=told["origin"],
        published_size=told.get("published_size", made.config.image_size),
        normalisation=(made.mean, made.std),
    )


def _normalisation(
    settings: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation, as a hub folder records them: transformers' way or timm's."""
    try:
        timm = settings.get("pretrained_cfg") or {}
        mean = preprocessor.get("image_mean") or timm.get("mean")
        std = preprocessor.get("image_std") or timm.get("std")
        return (tuple(map(float, mean)), tuple(map(float, std))) if mean and std else None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"mean and std beside the weights must be lists of numbers: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, holds a {type(found).__name__}")
    return found


def _sha256(paths: list[Path]) -> str:
    """Over the bytes of the files one after the other; of one file, what sha256sum prints."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: sha)
    return sha.hexdigest()


def _fetched(weights: str, hub_id: str, revision: str) -> Path:
    """The local copy of a hub repository, downloaded if need be."""
    if weights != "hub":
        hub_id, _, revision = weights.removeprefix("hub:").partition("@")
    if hub_id.count("/") != 1:
        raise UserError(
            "the hub's names are OWNER/NAME, such as hub:google/vit-base-patch16-224-in21k;"
            " hub alone takes that of --config.backbone.name"
        )
    from huggingface_hub import snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every attempt
    try:
        folder = snapshot_download(hub_id, revision=revision or "main", allow_patterns=list(WANTED_FROM_HUB))
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(hub_id, revision=revision or "main", allow_patterns=["*.json", "*.msgpack"])
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, no access
        first = "".join(str(error).splitlines()[:1])
        raise UserError(
            f"{hub_id} could not be fetched from the hub ({type(error).__name__}: {first});"
            " fetch model.safetensors, config.json and preprocessor_config.json elsewhere into a folder and give it as"
            " --config.backbone.weights=FOLDER"
        ) from error
    return Path(folder)
