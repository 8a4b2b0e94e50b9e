"""Bringing a source's images into a workdir: ids, owners, content hashes and the image file."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from lmeraser_jax.config import Config
from lmeraser_jax.errors import UserError, raise_all, some
from lmeraser_jax.progress import progress
from lmeraser_jax.records.cache import RowFile
from lmeraser_jax.records.source import Item, Source, content_hash, held_out, limited, problems
from lmeraser_jax.store.catalog import Catalog
from lmeraser_jax.store.layout import Layout

PIECE = 512  # images in memory at a time


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did, in records."""

    added: int
    known: int
    erased: int  # refused, because they were erased before
    duplicates: int  # new records whose pixels another record of the workdir has too


def import_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which records a workdir holds."""
    names = ("source", "path", "labels", "train_limit", "test_limit", "holdout")
    found: dict[str, Any] = {name: getattr(config.data, name) for name in names}
    if config.data.source == "folder":
        found["store_size"] = config.data.store_size or config.data.image_size
    if config.data.holdout:
        found["seed"] = config.seed
    return found


def image_file(layout: Layout, catalog: Catalog) -> RowFile:
    """The image file of a workdir whose shape is known."""
    return RowFile(layout.images, tuple(catalog.get("dataset")["shape"]), np.uint8)


def check_images(layout: Layout, catalog: Catalog) -> None:
    """Refuses a workdir whose image file is shorter than its catalog says."""
    rows = catalog.rows_used()
    there = len(image_file(layout, catalog)) if rows else 0
    if there < rows:
        raise UserError(
            f"{layout.images} holds {there} images, the catalog {rows}: the workdir is damaged; restore the file, or"
            " start again in a new workdir"
        )


def import_source(layout: Layout, catalog: Catalog, source: Source, config: Config) -> Imported:
    """Adds the records that the workdir does not have yet. Erased ids stay out.

    Pixels are appended and synced first; the records become live in one transaction, so an interrupted
    import leaves nothing but bytes that the next one truncates.

    Raises:
        UserError: everything that makes the source unusable, or does not fit what was imported before.
    """
    kept = limited(source.items, config.data.train_limit, config.data.test_limit)
    dataset = {
        "settings": import_settings(config),
        "classes": list(source.class_names),
        "shape": list(source.shape),
        "name": source.name,
    }
    picked = dataclasses.replace(source, items=[source.items[i] for i in kept])
    before = catalog.get("dataset")
    raise_all(problems(picked) + _misfits(dataset, before), f"{source.name} cannot be imported:")
    label_of = {name: label for label, name in enumerate((before or dataset)["classes"])}
    file = RowFile(layout.images, source.shape, np.uint8)
    file.truncate(catalog.rows_used())
    start = len(file)
    check_images(layout, catalog)
    intake = _Intake(catalog)
    with progress("import", len(kept)) as shown:
        for _, group in itertools.groupby(kept, lambda position: position // PIECE):
            piece = list(group)
            items = [held_out(source.items[i], config.data.holdout, config.seed) for i in piece]
            items = [item._replace(label=label_of[source.class_names[item.label]]) for item in items]
            try:
                new = intake.take(items, source.read(piece[0], piece[-1] + 1)[np.array(piece) - piece[0]])
            except UserError as error:
                intake.wrong.append(str(error))
                continue
            if len(new) and not intake.wrong:
                file.append(new)
            shown.advance(len(piece))
    if intake.wrong:
        file.truncate(start)
        raise_all(intake.wrong, f"{source.name} cannot be imported:")
    file.sync()
    rows = range(start, start + len(intake.items))
    with catalog.transaction():
        catalog.set("dataset", before or dataset)
        catalog.add_records(intake.items, rows, intake.contents)
        catalog.set("rows", rows.stop)
        catalog.event("import", source=source.name, added=len(rows), known=intake.known, erased=intake.erased)
    return Imported(len(rows), intake.known, intake.erased, intake.duplicates)


class _Intake:
    """Sorts arriving records into new, known and erased ones, piece by piece."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.seen = {row[0] for row in catalog.db.execute("SELECT content FROM records")}
        self.items: list[Item] = []
        self.contents: list[str] = []
        self.wrong: list[str] = []
        self.known = self.erased = self.duplicates = 0

    def take(self, items: list[Item], pixels: np.ndarray) -> np.ndarray:
        """Notes the records of a piece; returns the images of those that are new."""
        have, new = self.catalog.known(item.id for item in items), []
        for position, (item, image) in enumerate(zip(items, pixels, strict=True)):
            content = content_hash(image)
            if self.catalog.is_tombstoned(item.id):
                self.erased += 1
            elif item.id in have:
                self.known += 1
                if have[item.id][1:3] != (content, item.label):
                    self.wrong.append(f"{item.id} has other pixels or another label than the record in the workdir")
            else:
                self.duplicates += content in self.seen
                self.seen.add(content)
                self.items.append(item)
                self.contents.append(content)
                new.append(position)
        return pixels[new]


def _misfits(new: dict, old: dict | None) -> list[str]:
    """Why an import cannot be made or joined: shape and classes were fixed by the first one."""
    names = new["classes"]
    found = [f"class names must be unique: {some(names)}"] if len(set(names)) < len(names) else []
    if old is None:
        return found
    if new["shape"] != old["shape"]:
        found.append(f"images are {new['shape']}, those of the workdir {old['shape']}")
    unknown = [name for name in names if name not in old["classes"]]
    if unknown:
        found.append(f"classes that the workdir does not have: {some(unknown)}; it has {some(old['classes'])}")
    return found
