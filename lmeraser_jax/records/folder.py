"""Images in folders, `split/class/file` with the splits train, test and public.

Ids are the paths below the folder. A CSV with the columns file,label,owner (owner may be left out) gives
owners, and labels where the folders do not. Images of any size are brought to one stored size: shorter
side resized (bilinear), centre crop.
"""

import csv
from collections import Counter
from pathlib import Path

import numpy as np

from lmeraser_jax.errors import UserError, raise_all, some
from lmeraser_jax.records.source import Item, Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
SPLITS = ("train", "test", "public")


def load(path: str, size: int, labels: str = "") -> Source:
    """Lists the folder; pixels are decoded when they are read.

    Args:
        path: the folder.
        size: side in pixels of the stored images.
        labels: optional CSV file with the columns file,label,owner.

    Raises:
        UserError: no such folder or CSV, no images, or files that the CSV names are missing.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"--config.data.path={path}: no such folder")
    files = [p for split in SPLITS for p in sorted((root / split).rglob("*")) if _is_image(p)]
    if not files:
        raise UserError(f"{path} holds no images; expected {{train,test}}/<class>/<file> ({', '.join(SUFFIXES)})")
    table = _read_csv(labels) if labels else {}
    names = [p.relative_to(root).as_posix() for p in files]
    unknown = sorted(set(table) - set(names))
    raise_all([f"{labels} names files that are not in {path}: {some(unknown)}"] if unknown else [])
    label_of = {name: table.get(name, ("", ""))[0] or _class_folder(name) for name in names}
    without = [name for name, label in label_of.items() if not label]
    raise_all([f"no class folder and no label in the CSV (--config.data.labels): {some(without)}"] if without else [])
    classes = tuple(sorted(set(label_of.values())))
    index = {label: i for i, label in enumerate(classes)}
    items = [Item(name, name.split("/")[0], index[label_of[name]], table.get(name, ("", ""))[1]) for name in names]
    channels = 3

    def read(start: int, stop: int) -> np.ndarray:
        return decode(files[start:stop], size, size, channels)

    return Source(path, classes, (size, size, channels), items, read)


def decode(files: list[Path], height: int, width: int, channels: int) -> np.ndarray:
    """Decodes image files to uint8 [n, height, width, channels]; all unreadable files are named at once."""
    from PIL import Image

    images = np.zeros((len(files), height, width, channels), np.uint8)
    problems = []
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                fitted = _fit(_eight_bit(image).convert("L" if channels == 1 else "RGB"), height, width)
            images[i] = np.asarray(fitted).reshape(height, width, channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{file}: {error}")
    raise_all(problems, "these image files cannot be read; mend or remove them:")
    return images


def _eight_bit(image):
    """The image in a mode that converts to grey or RGB without loss of range; transparency is dropped later."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _fit(image, height: int, width: int):
    """Resizes so that the image just covers height x width, and crops the centre."""
    from PIL import Image

    scale = max(height / image.height, width / image.width)
    if (image.height, image.width) != (height, width):
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _class_folder(name: str) -> str:
    parts = name.split("/")
    return parts[1] if len(parts) > 2 else ""


def _read_csv(path: str) -> dict[str, tuple[str, str]]:
    """{file: (label, owner)} from the CSV."""
    if not Path(path).is_file():
        raise UserError(f"--config.data.labels={path}: no such file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"file", "label"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path} lacks the columns {', '.join(sorted(missing))}; needed: file,label[,owner]")
            rows = [(row["file"] or "", row["label"] or "", row.get("owner") or "") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--config.data.labels={path} is not a readable CSV in UTF-8: {error}") from error
    twice = [name for name, count in Counter(name for name, _, _ in rows).items() if count > 1]
    raise_all([f"{path} names files more than once: {some(twice)}"] if twice else [])
    return {name: (label, owner) for name, label, owner in rows}
