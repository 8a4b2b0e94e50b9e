"""Where TFDS keeps prepared data sets, `<data folder>/<name>[/<config>]/<version>`; TFDS is not imported to look.

TFDS's own search imports the data sets' code, which may import TensorFlow.
"""

import difflib
import fnmatch
import json
import os
import re
import shlex
from pathlib import Path

from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError, join_limited

PATTERN = re.compile(r"([A-Za-z]\w*)(?:/([\w.+-]+))?(?::((?:\d+|\*)(?:\.(?:\d+|\*)){2}))?", re.ASCII)
VERSION = re.compile(r"\d+\.\d+\.\d+", re.ASCII)
FLAG = "--config.data.dataset"


def data_folder(path: str) -> Path:
    """TFDS's data folder: the given one, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(absolute(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def parse(dataset: str, flag: str = FLAG) -> tuple[str, str, str]:
    """(name, config, version) of NAME[/CONFIG][:VERSION]; what is not given is ""."""
    match = PATTERN.fullmatch(dataset)
    if not match:
        raise UserError(f"{flag}={dataset}: must be NAME, NAME/CONFIG or NAME/CONFIG:VERSION, such as cifar10")
    name, config, version = match.groups("")
    return name, config, version


def find(dataset: str, path: str, flag: str = FLAG) -> Path | None:
    """The folder of the newest prepared version that fits; None where there is none."""
    name, config, version = parse(dataset, flag)
    home = data_folder(path) / name
    folders = _folders(home)
    if not config and not any(folder.parent == home for folder in folders):
        config = _default_config(home)
    fitting = [f for f in folders if f.parent == home / config and fnmatch.fnmatchcase(f.name, version or "*")]
    return max(fitting, key=lambda folder: [int(number) for number in folder.name.split(".")], default=None)


def require(dataset: str, path: str) -> Path:
    """As `find`. Raises `UserError` where it is None: what to prepare, or which data sets have similar names."""
    folder = find(dataset, path)
    if folder is not None:
        return folder
    name, root = parse(dataset)[0], data_folder(path)
    prepared = [f"{version.parent.relative_to(root).as_posix()}:{version.name}" for version in _folders(root / name)]
    if not prepared:
        check_name(name, FLAG, f" and {root} holds none")
    there = f"; prepared there: {join_limited(prepared)}" if prepared else ""
    raise UserError(f"{FLAG}={dataset} is not prepared in {root}; prepare it with: {command(dataset, path)}{there}")


def command(dataset: str, path: str = "") -> str:
    """What prepares a data set."""
    return f"lmeraser prepare --dataset={dataset}" + (f" --data_dir={shlex.quote(path)}" if path else "")


def check_name(name: str, flag: str, addition: str = "") -> None:
    """Raises `UserError` with similar names where TFDS cannot prepare such a data set. No network is used."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 5)
        hint = f"did you mean {', '.join(near)}?" if near else "there is none with a similar name"
        raise UserError(f"{flag}={name}: TFDS has no such data set{addition}; {hint} (TFDS knows {len(known)})")


def _folders(home: Path) -> list[Path]:
    """The folders of all prepared configs and versions of a data set."""
    folders = [file.parent for pattern in ("*", "*/*") for file in sorted(home.glob(f"{pattern}/dataset_info.json"))]
    return [folder for folder in folders if VERSION.fullmatch(folder.name) and (folder / "features.json").is_file()]


def _default_config(home: Path) -> str:
    """The config that TFDS takes where none is named, as it wrote it down when it prepared one."""
    try:
        return str(json.loads((home / ".config" / "metadata.json").read_text("utf-8"))["default_config_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
