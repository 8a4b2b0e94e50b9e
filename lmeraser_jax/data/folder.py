"""Images in folders: a subfolder for each role, `<role>/<class>/.../<file>`, and a CSV of labels and owners if wanted.

Ids are the paths below `data.path`. Names that start with a dot are passed over. Pixels are decoded when they are
read and brought to one stored size (`records.decode`).
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from lmeraser_jax.config import Data
from lmeraser_jax.data import label_csv
from lmeraser_jax.data.source import Item, Pixels, Source
from lmeraser_jax.errors import UserError, join_limited, raise_all

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DEFAULTS = {"train": "train", "test": "test", "holdout": "", "public": "public"}
CHANNELS = 3


def load(data: Data) -> Source:
    """Lists the folder and reads the CSV.

    Args:
        data: `path`, the four `*_split` folders, `labels`, `csv_columns` and the stored size.

    Raises:
        UserError: no such folder, no images or no labels, roles that overlap, or a CSV that does not fit.
    """
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(f"--config.data.path={data.path}: no such folder")
    roles = _roles(root, data)
    names, splits = [], []
    for split, folder in roles.items():
        found = _images(root, folder)
        if not found and (split == "train" or getattr(data, f"{split}_split")):
            raise UserError(
                f"--config.data.{split}_split={folder} holds no images in {data.path}; expected"
                f" {folder}/<class>/<file> ({', '.join(SUFFIXES)})"
            )
        names += found
        splits += [split] * len(found)
    rows = (
        label_csv.read(data.labels, data.csv_columns, names, [roles[split] for split in splits]) if data.labels else {}
    )
    texts = [
        (name in rows and rows[name].label) or _class_folder(_below(name, roles[split]))
        for name, split in zip(names, splits, strict=True)
    ]
    if any(row.label for row in rows.values()):
        _refuse_loose([n for n, split in zip(names, splits) if roles[split] == "." and n not in rows], data.labels)
    _refuse_unlabelled(names, texts, data, roles["train"])
    classes, index = _numbered(texts)
    items = [
        Item(name, split, index[text], rows[name].owner if name in rows else "")
        for name, split, text in zip(names, splits, texts, strict=True)
    ]
    height = data.store_size or data.image_size
    width = data.store_width or height

    def read(start: int, stop: int) -> Pixels:
        from lmeraser_jax.data.decode import decode  # needs Pillow

        return decode([root / name for name in names[start:stop]], height, width, CHANNELS, data.max_pixels)

    return Source(data.path, classes, (height, width, CHANNELS), items, read)


def _roles(root: Path, data: Data) -> dict[str, str]:
    """{split: folder below the root}; "." is the root. Raises `UserError` for folders that are missing or overlap."""
    roles, found = {}, []
    for split, default in DEFAULTS.items():
        given = getattr(data, f"{split}_split")
        if not given and (not default or (split != "train" and not (root / default).is_dir())):
            continue
        folder = PurePosixPath((given or default).replace("\\", "/"))
        flag = f"--config.data.{split}_split={given or default}"
        if folder.is_absolute() or ".." in folder.parts:
            found.append(f'{flag}: must be a folder below --config.data.path, or "." for the whole of it')
        elif not (root / folder).is_dir():
            inside = join_limited(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folders"
            found.append(f'{flag}: no such folder in {data.path}; it holds {inside} ("." takes the whole folder)')
        else:
            roles[split] = str(folder)
    raise_all(found)
    real = {split: (root / folder).resolve() for split, folder in roles.items()}
    overlaps = [
        f"--config.data.{inner}_split={roles[inner]} lies in --config.data.{outer}_split={roles[outer]}"
        + ("" if getattr(data, f"{inner}_split") else f" (a folder named {roles[inner]} is taken for it)")
        for position, one in enumerate(roles)
        for other in list(roles)[position + 1 :]
        for inner, outer in [(other, one) if real[other].is_relative_to(real[one]) else (one, other)]
        if real[inner].is_relative_to(real[outer])
    ]
    raise_all(overlaps, "images can have one role only; name folders that do not overlap:" if overlaps else "")
    return roles


def _images(root: Path, folder: str) -> list[str]:
    """Paths below the root of the images in a folder, sorted by their parts; links are followed, loops are not."""
    found = []
    for here, folders, files in os.walk(root / folder, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [name for name in folders if name[0] != "." and not real.is_relative_to(_target(here, name, real))]
        prefix = Path(here).relative_to(root).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        found += [prefix + name for name in files if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda name: name.split("/"))


def _target(here: str, name: str, real: Path) -> Path:
    """Where a folder really is; only links cost a look at the disk."""
    path = os.path.join(here, name)
    return Path(path).resolve() if os.path.islink(path) else real / name


def _below(name: str, folder: str) -> str:
    """A path below the root as a path below a role's folder."""
    return name if folder == "." else name.removeprefix(folder + "/")


def _class_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def _refuse_loose(loose: list[str], table: str) -> None:
    """Beside a CSV the subfolders of the whole folder may be parts of an archive, so they are not taken for classes."""
    if loose:
        raise UserError(f"{table} (--config.data.labels) has labels, but none for these images: {join_limited(loose)}")


def _refuse_unlabelled(names: list[str], texts: list[str], data: Data, train: str) -> None:
    """Every image needs a class."""
    without = [name for name, text in zip(names, texts, strict=True) if not text]
    if without and len(without) == len(names):
        raise UserError(
            f"{data.path} has no labels: there are no class folders ({train}/<class>/<file>)"
            f" and {'none in the CSV' if data.labels else 'no CSV'} (--config.data.labels)"
        )
    raise_all(
        [f"no class folder and no label in the CSV (--config.data.labels): {join_limited(without)}"] if without else []
    )


def _numbered(texts: list[str]) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Class names in order, and {text: label}; where all are whole numbers, 00014 and 14 are one class."""
    distinct = set(texts)
    key: Callable[[str], int | str] = str
    if all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in distinct):
        key = int
    ranked = sorted({key(text) for text in distinct})  # pyright: ignore[reportArgumentType]
    place = {value: label for label, value in enumerate(ranked)}
    return tuple(str(value) for value in ranked), {text: place[key(text)] for text in distinct}
