"""Files of published weights -> arrays by name. Nothing here unpickles, and only a hub id touches a network.

Read are .npz, .safetensors (also in shards), Flax .msgpack, .gguf, the hub's folders, which hold one of these beside a
config.json, and folders that `lmeraser backbone` wrote.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.config.paths import home
from lmeraser_jax.errors import UserError, join_limited, raise_all, stand_in
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import gguf_files
from lmeraser_jax.models.architectures import Architecture
from lmeraser_jax.models.weight_settings import of_images
from lmeraser_jax.models.zoo import Normalisation
from lmeraser_jax.storage import checkpoints

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar", ".joblib")
IN_A_FOLDER = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
FROM_THE_HUB = ["config.json", *PROCESSORS, *TOKENIZERS, "*.safetensors", "*.safetensors.index.json"]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Arrays that were read, and what is known about them."""

    name: str  # the file or folder, for messages
    arrays: Mapping[str, np.ndarray]  # by the origin's own names
    sha256: str  # of the files that were read, one after the other
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config.json beside them, if there is one
    processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # preprocessor_config.json, likewise
    own: Architecture | None = None  # where `lmeraser backbone` wrote the folder
    origin: str = ""  # whose names the file had from which it wrote it
    published_size: int = 0  # image size of that file
    normalisation: Normalisation | None = None  # of that folder


def read(weights: str, hub_id: str = "", revision: str = "main") -> Weights:
    """Reads what `backbone.weights` names: a path, `hub:OWNER/NAME[@REVISION]`, or `hub` for the named backbone's id.

    Raises `UserError` for what is not readable, a pickle, or a hub id without a network.
    """
    try:
        path = path_of(weights, hub_id, revision)
        if (path / "0").is_dir():
            return _read_own(path)
        return _read_folder(path, file_of(path)) if path.is_dir() else _read_folder(path.parent, path)
    except UserError as error:
        raise UserError(f"--config.backbone.weights={weights}: {error}") from error


def path_of(weights: str, hub_id: str = "", revision: str = "main") -> Path:
    """Where the weights lie; arguments and errors as in `read`. What is on the hub is fetched."""
    if weights.startswith("hub:"):
        hub_id, _, revision = weights.removeprefix("hub:").partition("@")
    of_hub = weights == "hub" or weights.startswith("hub:")
    return _download(hub_id, revision or "main") if of_hub else Path(weights)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """All arrays of one file. Raises `UserError` when it cannot be read."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code while it loads, so it is not read. Take the repository's"
            " model.safetensors, or convert it where you trust it:"
            " safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    if suffix not in READERS:
        raise UserError(
            f"{path}: weights are read from {', '.join(READERS)}, .gguf and folders of them, not from {suffix!r}"
        )
    try:
        return READERS[suffix](path)
    except Exception as error:  # the libraries raise nearly every kind over damaged bytes
        reason = stand_in(path) or f"perhaps cut short: {error}"
        raise UserError(f"{path} is not a readable {suffix}: {reason}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as raw:  # np.load of a path leaves a damaged file open
        file = np.load(raw, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds a single array")
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    from flax.serialization import msgpack_restore

    tree = msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a tree of arrays")
    return checkpoints.flatten(tree)


READERS = {".safetensors": _read_safetensors, ".npz": _read_npz, ".msgpack": _read_msgpack}


def file_of(folder: Path) -> Path:
    """The file of weights, or the index of shards, in a folder of the hub's form."""
    candidates = [folder / name for name in IN_A_FOLDER if (folder / name).is_file()][:1]
    candidates = candidates or sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    if len(candidates) == 1:
        return candidates[0]
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if pickles and not candidates:
        read_file(folder / pickles[0])  # says why a pickle is not read
    raise UserError(f"{folder} must hold one of {', '.join(IN_A_FOLDER)}; it holds {join_limited(names) or 'nothing'}")


def _read_folder(folder: Path, file: Path) -> Weights:
    """A file of weights, or an index of shards, and what stands beside it."""
    files, shards = [file], [file]
    if file.name == IN_A_FOLDER[1]:
        names = _read_json(file).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{file} is damaged: weight_map must give a file for each array")
        shards = [folder / name for name in sorted(set(names.values()))]
        raise_all([f"{path} is missing; {file.name} names it" for path in shards if not path.is_file()])
        files += shards
    if file.suffix.lower() == ".gguf":
        arrays, values = gguf_files.read(file)
        return Weights(str(file), arrays, _sha256(files), values)
    arrays = {name: array for path in shards for name, array in read_file(path).items()}
    processor = {key: value for name in reversed(PROCESSORS) for key, value in _read_json(folder / name).items()}
    return Weights(str(file), arrays, _sha256(files), of_images(_read_json(folder / "config.json")), processor)


def _read_own(folder: Path) -> Weights:
    """A folder that `lmeraser backbone` wrote."""
    arrays, metadata, _ = checkpoints.load(folder)
    if "config" not in metadata or "provenance" not in metadata:
        raise UserError(f"{folder} is no backbone that lmeraser backbone wrote")
    backbone, provenance = backbone_lib.restore(folder, arrays, metadata), metadata["provenance"]
    origin, size = provenance.get("origin"), provenance.get("published_size", backbone.config.image_size)
    if not isinstance(origin, str) or not isinstance(size, int):
        raise UserError(f"{folder} is damaged: its provenance names no origin and published size")
    normalisation = backbone.mean, backbone.std
    facts = {"own": backbone.config, "origin": origin, "published_size": size, "normalisation": normalisation}
    return Weights(str(folder), arrays, backbone.digest, **facts)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {stand_in(path) or error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, holds a {type(values).__name__}")
    return values


def _sha256(paths: list[Path]) -> str:
    """Over the bytes of the files one after the other; of one file, what sha256sum prints."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: sha)
    return sha.hexdigest()


def _download(hub_id: str, revision: str) -> Path:
    """The local copy of a hub repository, downloaded if need be."""
    if hub_id.count("/") != 1:
        raise UserError(
            "the hub's names are OWNER/NAME, such as hub:google/vit-base-patch16-224-in21k;"
            " hub alone takes that of --config.backbone.name"
        )
    if not home() and not {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"} & os.environ.keys():
        raise UserError(f"no home folder is known to keep {hub_id} in; set HF_HOME to a folder")
    from huggingface_hub import snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every attempt
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=FROM_THE_HUB)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.msgpack"])
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, no access
        first = "".join(str(error).splitlines()[:1])
        raise UserError(
            f"{hub_id} could not be fetched from the hub ({type(error).__name__}: {first});"
            " fetch model.safetensors, config.json and preprocessor_config.json elsewhere into a folder and give it as"
            " --config.backbone.weights=FOLDER"
        ) from error
    return Path(folder)
