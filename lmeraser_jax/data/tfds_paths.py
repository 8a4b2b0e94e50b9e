"""Where TFDS keeps prepared data sets, `<data folder>/<name>[/<config>]/<version>`; found without importing TFDS."""

import difflib
import json
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from lmeraser_jax.errors import UserError, join_limited

PATTERN = re.compile(r"(?P<name>[A-Za-z]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?", re.ASCII)
VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
FLAG = "--config.data.dataset"


class Variant(NamedTuple):
    """One prepared config ("" where the set has none) and version."""

    config: str
    version: tuple[int, ...]
    folder: Path


def root(data_dir: str) -> Path:
    """TFDS's data folder: the given one, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def parsed(dataset: str, flag: str = FLAG) -> tuple[str, str, str]:
    """(name, config, version) of NAME[/CONFIG][:VERSION]; what is not given is ""."""
    match = PATTERN.fullmatch(dataset)
    if not match:
        raise UserError(f"{flag}={dataset}: must be NAME, NAME/CONFIG or NAME/CONFIG:VERSION, such as cifar10")
    return match["name"], match["config"] or "", match["version"] or ""


def located(dataset: str, data_dir: str, flag: str = FLAG) -> Path | None:
    """The folder of the newest prepared version that fits; None where there is none."""
    name, config, version = parsed(dataset, flag)
    home = root(data_dir) / name
    variants = _variants(home)
    if not config and not any(variant.config == "" for variant in variants):
        config = _default_config(home)
    fitting = [found for found in variants if found.config == config and _fits(found.version, version)]
    return max(fitting, key=lambda variant: variant.version).folder if fitting else None


def required(dataset: str, data_dir: str) -> Path:
    """As `located`. Raises `UserError` where it is None: what to prepare, or which data sets have similar names."""
    folder = located(dataset, data_dir)
    if folder is not None:
        return folder
    name, where = parsed(dataset)[0], root(data_dir)
    there = [f"{name}{'/' if found.config else ''}{found.config}:{_dotted(found)}" for found in _variants(where / name)]
    known = known_names()
    if name not in known and not there:
        raise unknown(name, FLAG, f" and {where} holds none", known)
    raise UserError(
        f"{FLAG}={dataset} is not prepared in {where}; prepare it with: {command(dataset, data_dir)}"
        + (f"; prepared there: {join_limited(there)}" if there else "")
    )


def command(dataset: str, data_dir: str = "") -> str:
    """What prepares a data set."""
    return f"lmeraser prepare --dataset={dataset}" + (f" --data_dir={shlex.quote(data_dir)}" if data_dir else "")


def known_names() -> list[str]:
    """The names of all data sets that TFDS can prepare; nothing is asked of the network."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def unknown(name: str, flag: str, more: str, known: list[str]) -> UserError:
    """Says which data sets have similar names."""
    near = difflib.get_close_matches(name.lower(), known, 5)
    hint = f"did you mean {', '.join(near)}?" if near else "there is none with a similar name"
    return UserError(f"{flag}={name}: TFDS has no such data set{more}; {hint} (TFDS knows {len(known)})")


def _variants(home: Path) -> list[Variant]:
    """All prepared configs and versions of a data set."""
    found = []
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        for folder in sorted(file.parent for file in home.glob(pattern)):
            config = "" if folder.parent == home else folder.parent.name
            if VERSION.fullmatch(folder.name) and (folder / "features.json").is_file():
                found.append(Variant(config, tuple(map(int, folder.name.split("."))), folder))
    return found


def _default_config(home: Path) -> str:
    """The config that TFDS takes where none is named, as it wrote it down when it prepared one."""
    try:
        return str(json.loads((home / ".config" / "metadata.json").read_text("utf-8"))["default_config_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _fits(version: tuple[int, ...], wanted: str) -> bool:
    parts = wanted.split(".") if wanted else ["*"] * len(version)
    return all(part in ("*", str(number)) for part, number in zip(parts, version, strict=True))


def _dotted(variant: Variant) -> str:
    return ".".join(map(str, variant.version))
