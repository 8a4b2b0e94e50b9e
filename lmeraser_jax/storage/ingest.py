"""Bringing a source's images into a workdir: ids, owners, content hashes and the image file."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmeraser_jax import interrupt
from lmeraser_jax.config import Config, Data
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import Item, Pixels, Source, assign_split, content_hash, limited, problems
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.progress import progress
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout

PIECE = 512  # images in memory at a time
LISTED = 100  # records in a message
BINDING = (
    *("source", "path", "dataset", "train_split", "holdout_split", "test_split", "public_split"),
    *("test_share", "holdout", "split_by", "owner_pattern", "labels", "csv_columns", "train_limit", "test_limit"),
)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did, in records."""

    added: int
    known: int
    erased: int  # refused, because they or their owner were erased before
    duplicates: int  # new records whose pixels another record of the workdir has too
    unreadable: tuple[str, ...] = ()  # ids of images that were left out; the next import tries them again
    converted: int = 0  # images of the source that had another colour mode
    mended: int = 0  # known records whose stored pixels had rotted and were written again
    left_out: int = 0  # test, hold-out and public images of an added source


def import_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which records a workdir holds, and with which pixels."""
    data = config.data
    found = {name: getattr(data, name) for name in BINDING}
    if data.source in ("folder", "tfds"):
        found["store_size"] = data.store_size or data.image_size
        found["store_width"] = data.store_width or found["store_size"]
    if data.holdout or data.test_share:
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
    """Adds the records of the configured source that the workdir does not have yet. Erased ids stay out.

    Pixels are appended and synced first; the records become live in one transaction, so an interrupted
    import leaves nothing but bytes that the next one truncates. Rotten pixels of known records are written again.

    Raises:
        UserError: everything that makes the source unusable, or does not fit what was imported before.
    """
    kept = limited(source.items, config.data.train_limit, config.data.test_limit)
    return _import(layout, catalog, source, kept, config)


def add_source(layout: Layout, catalog: Catalog, source: Source, config: Config) -> Imported:
    """Adds the training images of another source to a workdir that has data, as `import_source` adds its own.

    The source may be small, one image of one class; limits do not apply. Shares draw hold-out and test images.

    Raises:
        UserError: as `import_source`; also an owner who would fall on both sides.
    """
    assert catalog.get("dataset") is not None, "adding joins what an import has made"
    kept = [position for position, item in enumerate(source.items) if item.split == "train"]
    imported = _import(layout, catalog, source, kept, config)
    return dataclasses.replace(imported, left_out=len(source.items) - len(kept))


def _import(layout: Layout, catalog: Catalog, source: Source, kept: list[int], config: Config) -> Imported:
    """Adds the records at the given rising positions of a source."""
    data = config.data
    dataset = {
        "settings": import_settings(config),
        "classes": list(source.class_names),
        "shape": list(source.shape),
        "name": source.name,
    }
    picked = dataclasses.replace(source, items=[source.items[i] for i in kept])
    before = catalog.get("dataset")
    heading = f"{source.name} cannot be imported:"
    wrong = problems(picked, first=before is None) + _unfit_shares(picked, data)
    raise_all(wrong + _misfits(picked, before) + _unfit_sides(catalog, picked, config), heading)
    label_of = {name: label for label, name in enumerate((before or dataset)["classes"])}
    file = RowFile(layout.images, source.shape, np.uint8)
    file.truncate(catalog.rows_used())
    start = len(file)
    check_images(layout, catalog)
    intake = _Intake(catalog, file, data.skip_unreadable)
    try:
        with progress("import", len(kept)) as shown:
            for first, stop in _pieces(kept):
                interrupt.raise_if_stopped()
                items = [assign_split(item, data, config.seed) for item in source.items[first:stop]]
                labels = [label_of[source.class_names[item.label]] for item in items]
                items = [
                    item if item.label == label else item._replace(label=label)  # a new item costs memory
                    for item, label in zip(items, labels, strict=True)
                ]
                new = intake.take(items, source.read(first, stop))
                if len(new) and not intake.wrong:
                    file.append(new)
                shown.advance(stop - first)
        if before is None:
            intake.wrong += _too_few(intake, data, len(source.class_names))
        if intake.unreadable and not data.skip_unreadable:
            heading = f"{heading[:-1]}; images that cannot be read are left out with --config.data.skip_unreadable:"
        raise_all(intake.wrong, heading)
    except UserError:
        file.truncate(start)
        raise
    file.sync()
    rows = range(start, start + len(intake.items))
    counts = {"known": intake.known, "erased": intake.erased, "converted": intake.converted, "mended": intake.mended}
    with catalog.transaction():
        late = intake.erased_meanwhile()
        file.overwrite(np.array([rows[i] for i in late], np.int64))
        counts["erased"] += len(late)
        added = [i for i in range(len(rows)) if i not in late]
        catalog.set("dataset", before or dataset)
        new = ([intake.items[i] for i in added], [rows[i] for i in added], [intake.contents[i] for i in added])
        catalog.add_records(*new)
        catalog.set("rows", rows.stop)
        skipped = len(intake.unreadable)  # only their number: events outlive erasures
        catalog.event("import", source=source.name, added=len(added), unreadable=skipped, **counts)
    return Imported(len(added), duplicates=intake.duplicates, unreadable=tuple(intake.unreadable), **counts)


def _pieces(kept: list[int]) -> Iterator[tuple[int, int]]:
    """Cuts rising positions into ranges [first, stop) without gaps, of `PIECE` images at most."""
    runs = itertools.groupby(enumerate(kept), lambda pair: (pair[1] // PIECE, pair[1] - pair[0]))
    for _, run in runs:
        positions = [position for _, position in run]
        yield positions[0], positions[-1] + 1


class _Intake:
    """Sorts arriving records into new, known, erased and unreadable ones, piece by piece."""

    def __init__(self, catalog: Catalog, file: RowFile, skip_unreadable: bool):
        self.catalog, self.file, self.skip = catalog, file, skip_unreadable
        self.seen = {row[0] for row in catalog.db.execute("SELECT content FROM records")}
        self.items: list[Item] = []
        self.contents: list[str] = []
        self.wrong: list[str] = []
        self.unreadable: list[str] = []  # ids
        self.owners: dict[str, bool] = {"": False}  # whether an owner was erased
        self.graves = catalog.tombstone_count()
        self.known = self.erased = self.duplicates = self.converted = self.mended = self.changed = 0

    def take(self, items: list[Item], pixels: Pixels) -> np.ndarray:
        """Notes the records of a piece; returns the images of those that are new."""
        have, new = self.catalog.known(item.id for item in items), []
        self.converted += pixels.converted
        for position, (item, image) in enumerate(zip(items, pixels.images, strict=True)):
            known = item.id in have
            if self.catalog.is_tombstoned(item.id) or (not known and self._of_erased_owner(item)):
                self.erased += 1
            elif position in pixels.unreadable:
                self._miss(item, pixels.unreadable[position], known)
            elif known:
                self._recognise(item, image, *have[item.id][1:3])
            else:
                content = content_hash(image)
                self.duplicates += content in self.seen
                self.seen.add(content)
                self.items.append(item)
                self.contents.append(content)
                new.append(position)
        return pixels.images[new]

    def erased_meanwhile(self) -> frozenset[int]:
        """Positions of new items that, or whose owner, an erasure named after they were read: it needs no lock."""
        if self.catalog.tombstone_count() == self.graves:
            return frozenset()
        self.owners = {"": False}
        names = enumerate(self.items)
        return frozenset(i for i, item in names if self.catalog.is_tombstoned(item.id) or self._of_erased_owner(item))

    def _of_erased_owner(self, item: Item) -> bool:
        """Whether everything of the item's owner was erased, and with it whatever may come later."""
        if item.owner not in self.owners:
            self.owners[item.owner] = self.catalog.is_tombstoned(item.owner, "owner")
        return self.owners[item.owner]

    def _recognise(self, item: Item, image: np.ndarray, content: str, label: int) -> None:
        """A record that the workdir has: it must be the same; where its stored pixels have rotted they are mended."""
        self.known += 1
        if (content, label) != (content_hash(image), item.label):
            self.changed += 1
            if self.changed <= LISTED:
                self.wrong.append(f"{item.id} has other pixels or another label than the record in the workdir")
            elif self.changed == LISTED + 1:
                self.wrong.append(f"and more than {LISTED} records in all; an id may stand for one image only")
            return
        row = self.catalog.db.execute("SELECT row FROM records WHERE id=?", (item.id,)).fetchone()[0]
        view = self.file.view("r+")
        if content_hash(view[row]) != content:
            view[row] = image
            view.flush()
            self.mended += 1

    def _miss(self, item: Item, why: str, known: bool) -> None:
        """An image that cannot be read; a record that the workdir has keeps the pixels it has."""
        if known and self.skip:
            self.known += 1
            return
        self.unreadable.append(item.id)
        if not self.skip:
            self.wrong.append(f"{item.id}: {why}")


def _unfit_shares(source: Source, data: Data) -> list[str]:
    """Shares to draw that the source's own images or owners do not allow."""
    found = []
    for split, share in (("test", "test_share"), ("holdout", "holdout")):
        own = sum(item.split == split for item in source.items)
        if own and getattr(data, share):
            given = getattr(data, f"{split}_split") or split
            where = f" (--config.data.{split}_split={given})" if data.source in ("folder", "tfds") else ""
            found.append(
                f"--config.data.{share}={getattr(data, share)} would mix drawn images with the {own} {split} images"
                f" that the source has{where}; use one of them"
            )
    return found + (_unfit_owners(source) if data.split_by == "owner" else [])


def _unfit_owners(source: Source) -> list[str]:
    """What keeps owners from being on one side each: training images without one, owners in two splits."""
    train = [item for item in source.items if item.split == "train"]
    without = [item.id for item in train if not item.owner]
    remedy = (
        "name owners with --config.data.owner_pattern or --config.data.labels, or set --config.data.split_by=record"
    )
    if len(without) == len(train):
        return [f"--config.data.split_by=owner: no training image has an owner; {remedy}"]
    found = []
    if without:
        found.append(
            f"--config.data.split_by=owner: training images without an owner: {join_limited(without)}; {remedy}"
        )
    sides: dict[str, set[str]] = {}
    for item in source.items:
        if item.owner and item.split != "public":
            sides.setdefault(item.owner, set()).add(item.split)
    both = [f"{owner} ({' and '.join(sorted(splits))})" for owner, splits in sides.items() if len(splits) > 1]
    if both:
        found.append(
            f"--config.data.split_by=owner: owners in two splits of the source: {join_limited(both)}; let"
            " --config.data.test_share or holdout draw them, or set --config.data.split_by=record"
        )
    return found


def _too_few(intake: _Intake, data: Data, classes: int) -> list[str]:
    """What shares and unreadable images may have left over: a classifier needs two classes."""
    labels = {item.label for item in intake.items if item.split == "train"}
    if intake.wrong or len(labels) > 1:
        return []
    causes = [
        f"--config.data.{name}={getattr(data, name)}" for name in ("test_share", "holdout") if getattr(data, name)
    ]
    causes += [f"{len(intake.unreadable)} images that cannot be read"] if intake.unreadable else []
    return [f"{' and '.join(causes)} leave {len(labels)} of {classes} classes to train on; at least 2 are needed"]


def _unfit_sides(catalog: Catalog, source: Source, config: Config) -> list[str]:
    """Owners whose records in the workdir lie on another side than those that arrive (`data.split_by`)."""
    if config.data.split_by != "owner":
        return []
    sides = dict(
        catalog.db.execute(
            "SELECT owner,min(split) FROM records WHERE owner!='' AND split!='public' AND erased='' GROUP BY owner"
        )
    )
    arriving = (assign_split(item, config.data, config.seed) for item in source.items if item.split != "public")
    both = {item.owner: item.split for item in arriving if sides.get(item.owner, item.split) != item.split}
    lines = [f"{owner} ({sides[owner]} in the workdir, {split} here)" for owner, split in sorted(both.items())]
    return [f"--config.data.split_by=owner: owners who would be on both sides: {join_limited(lines)}"] if lines else []


def _misfits(source: Source, old: dict | None) -> list[str]:
    """Why an import cannot be made or joined: shape and classes were fixed by the first one."""
    names = source.class_names
    found = [f"class names must be unique: {join_limited(names)}"] if len(set(names)) < len(names) else []
    if old is None:
        return found
    if list(source.shape) != old["shape"]:
        found.append(f"images are {list(source.shape)}, those of the workdir {old['shape']}")
    used = sorted({item.label for item in source.items if 0 <= item.label < len(names)})
    unknown = [names[label] for label in used if names[label] not in old["classes"]]
    if unknown:
        found.append(
            f"classes that the workdir does not have: {join_limited(unknown)}; it has {join_limited(old['classes'])}"
        )
    return found
