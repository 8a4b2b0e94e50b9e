"""Images in folders: a subfolder for each role, `<role>/<class>/.../<file>`, and a CSV of labels and owners if wanted.

Ids are the paths below `data.path`. Names that start with a dot and other kinds of files are passed over and counted.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from lmeraser_jax.config import Data
from lmeraser_jax.data import label_csv
from lmeraser_jax.data.decode import decode
from lmeraser_jax.data.names import similar
from lmeraser_jax.data.source import Contents, Item, Source, not_used
from lmeraser_jax.errors import UserError, join_limited, raise_all

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
DEFAULTS = {"train": "train", "test": "test", "holdout": "", "public": "public"}
CHANNELS = 3


def load(data: Data, labelled: bool = True) -> Source:
    """Lists the folder and reads the CSV. Raises `UserError` where images are missing or roles overlap.

    Also where labels are missing, if `labelled`.
    """
    root = Path(data.path)
    if not root.is_dir():
        raise UserError(f"--config.data.path={data.path}: no such folder")
    roles = _roles(root, data)
    names, splits, notes = _list_roles(root, roles, data)
    folders = [roles[split] for split in splits]
    rows = label_csv.read(data.labels, data.csv_columns, names, folders, data.path) if data.labels else {}
    labels = _labels(data, names, folders, rows, labelled)
    classes, numbers = _number_classes(set(labels) - {""})
    items = [
        Item(name, split, numbers.get(label, -1), rows[name].owner if name in rows else "")
        for name, split, label in zip(names, splits, labels, strict=True)
    ]
    height = data.store_size or data.image_size
    width = data.store_width or height

    def read(positions: Sequence[int]) -> Contents:
        return decode([root / names[position] for position in positions], height, width, CHANNELS, data.max_pixels)

    if len(classes) < len(numbers):
        notes += (f"class names that are one number, and so one class: {join_limited(similar(numbers))}",)
    if any(row.owner for row in rows.values()) and len(rows) < len(names):
        notes += (f"{len(names) - len(rows)} images have no row in {data.labels}, and so no owner",)
    return Source(data.path, classes, (height, width, CHANNELS), items, read, notes)


def _list_roles(root: Path, roles: Mapping[str, str], data: Data) -> tuple[list[str], list[str], tuple[str, ...]]:
    """The images of all roles: their paths below the root, the split of each, and a note of what is not used."""
    names, splits, others, empty = [], [], Counter(), []
    for split, folder in roles.items():
        images, passed = list_images(root / folder)
        if not images and (split == "train" or getattr(data, f"{split}_split")):
            raise UserError(
                f"--config.data.{split}_split={folder} holds no images in {data.path}; expected"
                f" {folder}/<class>/<file> ({', '.join(SUFFIXES)}); it holds {count_files(passed) or 'nothing'}"
            )
        names += [str(PurePosixPath(folder, name)) for name in images]
        splits += [split] * len(images)
        others += passed
        if not images:
            empty.append(folder)
        with_images = {name.partition("/")[0] for name in images}
        empty += [str(PurePosixPath(folder, name)) for name in _subfolders(root / folder) if name not in with_images]
    if "." not in roles.values():
        beside = [path.suffix.lower() for path in root.iterdir() if path.is_file() and path.name[0] != "."]
        others += Counter(suffix for suffix in beside if suffix in SUFFIXES)
    kinds = {"class folders without images": empty, "folders without a role": _without_role(root, roles.values())}
    return names, splits, not_used(kinds, count_files(others))


def list_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """The images in a folder and its subfolders, and what else lies there.

    Returns paths below the folder, sorted by their parts, and {suffix, "hidden" or "without a suffix": number of
    files}. Links are followed, unless one leads back to a folder on the way to it: that would never end.
    """
    images, others = [], Counter()
    waiting: list[tuple[str, tuple[Path, ...]]] = [("", (folder.resolve(),))]  # with the real folders on the way
    while waiting:
        below, way = waiting.pop()
        for entry in os.scandir(folder / below):
            name = below + entry.name
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                real = Path(entry.path).resolve()
                if not any(above.is_relative_to(real) for above in way):
                    waiting.append((f"{name}/", (*way, real)))
            elif name.lower().endswith(SUFFIXES):
                images.append(name)
            else:
                others[PurePosixPath(name).suffix.lower() or "without a suffix"] += 1
    return sorted(images, key=lambda name: name.split("/")), others


def count_files(others: Mapping[str, int]) -> str:
    """The files that `list_images` passed over, in words; "" for none."""
    kinds = join_limited(f"{others[kind]} {kind}" for kind in sorted(others, key=lambda kind: (-others[kind], kind)))
    return f"{sum(others.values())} files ({kinds})" if others else ""


def _subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _without_role(root: Path, roles: Collection[str]) -> list[str]:
    """Folders below the root that neither are a role's, lie in one nor hold one, as paths below the root."""
    on_the_way = {str(path) for folder in roles for path in (PurePosixPath(folder), *PurePosixPath(folder).parents)}
    beside = {str(PurePosixPath(path, name)) for path in on_the_way - {*roles} for name in _subfolders(root / path)}
    return sorted(beside - on_the_way)


def _roles(root: Path, data: Data) -> dict[str, str]:
    """{split: folder below the root}; "." is the root. Raises `UserError` for folders that are missing or overlap."""
    roles, problems = {}, []
    for split, default in DEFAULTS.items():
        given = getattr(data, f"{split}_split")
        if not given and (not default or (split != "train" and not (root / default).is_dir())):
            continue
        folder = PurePosixPath((given or default).replace("\\", "/"))
        flag = f"--config.data.{split}_split={given or default}"
        if folder.is_absolute() or ".." in folder.parts:
            problems.append(f'{flag}: must be a folder below --config.data.path, or "." for the whole of it')
        elif not (root / folder).is_dir():
            inside = join_limited(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folders"
            problems.append(f'{flag}: no such folder in {data.path}; it holds {inside} ("." takes the whole folder)')
        else:
            roles[split] = str(folder)
    raise_all(problems)
    real = {split: (root / folder).resolve() for split, folder in roles.items()}
    for first, second in itertools.combinations(roles, 2):
        inner, outer = (second, first) if real[second].is_relative_to(real[first]) else (first, second)
        if real[inner].is_relative_to(real[outer]):
            default = "" if getattr(data, f"{inner}_split") else f" (a folder named {roles[inner]} is taken for it)"
            flags = (f"--config.data.{split}_split={roles[split]}" for split in (inner, outer))
            problems.append(" lies in ".join(flags) + default)
    raise_all(problems, "images can have one role only; name folders that do not overlap:")
    return roles


def _labels(
    data: Data, names: list[str], folders: list[str], rows: Mapping[str, label_csv.Row], labelled: bool
) -> list[str]:
    """For each image the label in the CSV, else the name of its class folder.

    One that has neither gets "" or, if `labelled`, raises `UserError`.

    Beside a CSV with labels the subfolders of the whole folder may be parts of an archive: they are no classes.
    """
    labels = []
    for name, folder in zip(names, folders, strict=True):
        class_folder, slash, _ = label_csv.path_below(name, folder).partition("/")
        labels.append((rows[name].label if name in rows else "") or (class_folder if slash else ""))
    if not labelled:
        return labels
    unnamed = [name for name, folder in zip(names, folders, strict=True) if folder == "." and name not in rows]
    if unnamed and any(row.label for row in rows.values()):
        raise UserError(
            f"{data.labels} (--config.data.labels) has labels, but none for these images: {join_limited(unnamed)}"
        )
    without = [name for name, label in zip(names, labels, strict=True) if not label]
    if len(without) == len(names):
        train = data.train_split or DEFAULTS["train"]
        raise UserError(
            f"{data.path} has no labels: there are no class folders ({train}/<class>/<file>)"
            f" and {'none in the CSV' if data.labels else 'no CSV'} (--config.data.labels)"
        )
    if without:
        raise UserError(f"no class folder and no label in the CSV (--config.data.labels): {join_limited(without)}")
    return labels


def _number_classes(labels: Collection[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in order, and {label: number}; where all are whole numbers, 00014 and 14 are one class."""
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    names = {label: str(int(label)) if numeric else label for label in labels}
    classes = sorted(set(names.values()), key=int if numeric else str)
    place = {name: number for number, name in enumerate(classes)}
    return tuple(classes), {label: place[name] for label, name in names.items()}
