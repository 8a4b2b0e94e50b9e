"""Bringing a source's records into a workdir: ids, owners, content hashes, and the file of their contents."""

import dataclasses
from typing import Any

import numpy as np

from lmeraser_jax import interrupt
from lmeraser_jax.config import Config, Data
from lmeraser_jax.data.names import list_names, quoted, similar
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import (
    SPLITS,
    Contents,
    Item,
    Source,
    assign_split,
    content_hash,
    dtype_of,
    is_text,
    limit_positions,
    problems,
)
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.progress import progress, warn
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout

PIECE = 512  # images in memory at a time
LISTED = 100  # changed records in a message
BINDING = (  # not the places `path` and `labels`: what lies there binds
    *("source", "dataset", "train_split", "holdout_split", "test_split", "public_split", "test_share", "holdout"),
    *("split_by", "owner_pattern", "csv_columns", "train_limit", "test_limit", "limit_by"),
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
    # What the source has that is not used, classes that look alike, exact duplicates.
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)


def import_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which records a workdir holds, and with which pixels."""
    data = config.data
    values = {name: getattr(data, name) for name in BINDING}
    if config.is_text:
        values["text"] = dataclasses.asdict(config.text)
    elif data.source in ("folder", "tfds"):
        values["store_size"] = data.store_size or data.image_size
        values["store_width"] = data.store_width or values["store_size"]
    if data.holdout or data.test_share:
        values["seed"] = config.seed
    return values


def image_file(layout: Layout, catalog: Catalog) -> RowFile:
    """The image file of a workdir whose shape is known."""
    shape = tuple(catalog.get("dataset")["shape"])
    return RowFile(layout.images, shape, dtype_of(shape))


def store_edits(file: RowFile, catalog: Catalog) -> None:
    """Makes the corrected versions of records live, in new rows of the image file; needs the writer lock.

    First it drops the rows without a record that an interrupted import, or a call of this, left.
    """
    file.truncate(catalog.rows_used())
    if not catalog.edited():
        return
    with catalog.transaction():
        start = catalog.rows_used()
        rows = catalog.take_edits(start, file.dtype).reshape(-1, *file.shape)
        file.append(rows)
        file.sync()
        catalog.set("rows", start + len(rows))


def check_images(layout: Layout, catalog: Catalog) -> None:
    """Refuses a workdir whose image file is shorter than its catalog says."""
    rows = catalog.rows_used()
    count = len(image_file(layout, catalog)) if rows else 0
    if count < rows:
        raise UserError(
            f"{layout.images} holds {count} rows, the catalog {rows}: the workdir is damaged; restore the file, or"
            " start again in a new workdir"
        )


def import_source(
    layout: Layout,
    catalog: Catalog,
    source: Source,
    config: Config,
    adding: bool = False,
    moved: bool = False,
    join: bool = True,
) -> Imported:
    """Brings in the records of a source that the workdir does not have yet. Erased ids stay out.

    Contents are appended and synced first; the records become live in one transaction, so an interrupted
    import leaves nothing but bytes that the next one truncates. Rotten pixels of known records are written again.
    Warns of what is not used.

    Args:
        layout, catalog, config: of the workdir.
        source: the configured one, or another one.
        adding: take all training images of another source and no others; limits do not apply.
        moved: the configured data lie in another place now; refuse what is not these data.
        join: let new records join data that have moved.

    Raises:
        UserError: everything that makes the source unusable, or does not fit what was imported before.
    """
    before, heading, data = catalog.get("dataset"), f"{source.name} cannot be imported:", config.data
    assert before is not None or not adding, "adding joins what an import has made"
    if adding:
        positions = [position for position, item in enumerate(source.items) if item.split == "train"]
    else:
        positions = limit_positions(source.items, data.train_limit, data.test_limit, data.limit_by)
    picked = dataclasses.replace(source, items=[source.items[i] for i in positions])
    lines = problems(picked, classes=2 if before is None else 1) + _check_shares(picked, data)
    lines += _check_owners(catalog, picked, config) + _check_dataset(picked, before)
    alike, notes = similar(source.class_names), source.notes
    if alike:
        notes += (f"class names that look alike: {join_limited(alike)}",)
    present, left = ({(item.split, item.label) for item in each.items} for each in (source, picked))
    if not adding and (dropped := sorted((split, label) for split, label in present - left if label >= 0)):
        names = join_limited(f"{source.class_names[label]} ({split})" for split, label in dropped)
        notes += (f"the limits leave no record of these classes: {names}",)
    if moved:
        lines += _check_moved(catalog, picked)
        absent = sorted({*catalog.live("train").ids} - {item.id for item in source.items})
        if absent:
            notes += (f"{len(absent)} live records are not there; they stay until unlearn: {list_names(absent)}",)
    raise_all([*lines, *notes] if lines else [], heading)
    facts = {"classes": list(source.class_names), "shape": list(source.shape), "name": source.name}
    dataset = before or {"settings": import_settings(config), **facts}
    file = RowFile(layout.images, source.shape, dtype_of(source.shape))
    store_edits(file, catalog)
    start = len(file)
    check_images(layout, catalog)
    intake = _Intake(catalog, file, config)
    try:
        intake.read(source, positions, dataset["classes"])
        classes = {item.label for item in intake.items if item.split == "train"}
        if before is None and not intake.problems and len(classes) < (1 if is_text(source.shape) else 2):
            causes = f"--config.data.test_share={data.test_share}, --config.data.holdout={data.holdout}"
            rest = f"leave {len(classes)} of {len(source.class_names)} classes to train on; at least 2 are needed"
            rest = "leave nothing to train on" if is_text(source.shape) else rest
            intake.problems.append(f"{causes} and {len(intake.unreadable)} records that cannot be read {rest}")
        if moved and not join and intake.items:
            new = join_limited(item.id for item in intake.items)
            intake.problems.append(f"{len(intake.items)} records are not in the workdir: {new}; --reimport adds them")
        if intake.unreadable and not data.skip_unreadable:
            heading = f"{heading[:-1]}; records that cannot be read are left out with --config.data.skip_unreadable:"
        raise_all(intake.problems, heading)
    except UserError:
        file.truncate(start)
        raise
    file.sync()
    imported = intake.commit(dataset, source.name, start)
    left_out = len(source.items) - len(positions) if adding else 0
    if any(copies := catalog.copies()):
        notes += (f"exact duplicates: {copies[0]} contents lie in train and test, {copies[1]} carry several labels",)
    for note in notes:
        warn(note)
    return dataclasses.replace(imported, left_out=left_out, notes=notes)


class _Intake:
    """Sorts arriving records into new, known, erased and unreadable ones, piece by piece."""

    def __init__(self, catalog: Catalog, file: RowFile, config: Config):
        self.catalog, self.file, self.config = catalog, file, config
        self.tombstones, self.hashes = catalog.tombstones(), set(catalog.contents())
        self.items: list[Item] = []  # the new ones
        self.contents: list[str] = []  # their content hashes
        self.problems: list[str] = []
        self.unreadable: list[str] = []  # ids
        self.counts = {"known": 0, "erased": 0, "duplicates": 0, "converted": 0, "mended": 0}

    def read(self, source: Source, positions: list[int], classes: list[str]) -> None:
        """Reads the images at some positions and appends the pixels of new records."""
        label_of, changed = {name: label for label, name in enumerate(classes)}, []
        with progress("import", len(positions)) as shown:
            for first in range(0, len(positions), PIECE):
                interrupt.raise_if_stopped()
                piece, items = positions[first : first + PIECE], []
                for item in (source.items[position] for position in piece):
                    label = label_of[source.class_names[item.label]] if item.label >= 0 else item.label
                    item = assign_split(item, self.config.data, self.config.seed)
                    items.append(item if item.label == label else item._replace(label=label))  # a new one costs memory
                new = self._take(items, source.read(piece), changed)
                if len(new) and not self.problems and not changed:
                    self.file.append(new)
                shown.advance(len(piece))
        if changed:
            names = list_names(changed, LISTED)
            reason = "have another content or label than in the workdir; an id may stand for one record only"
            self.problems.append(f"these records {reason}: {names}")

    def _take(self, items: list[Item], contents: Contents, changed: list[str]) -> np.ndarray:
        """Notes the records of a piece; returns the images of those that are new."""
        known, new = self.catalog.known(item.id for item in items), []
        self.counts["converted"] += contents.converted
        for position, (item, image) in enumerate(zip(items, contents.rows, strict=True)):
            reason = contents.unreadable.get(position)
            if self._is_erased(item, item.id in known):
                self.counts["erased"] += 1
            elif reason is not None and item.id in known and self.config.data.skip_unreadable:
                self.counts["known"] += 1  # it keeps the pixels that it has
            elif reason is not None:
                self.unreadable.append(item.id)
                if not self.config.data.skip_unreadable:
                    self.problems.append(f"{quoted(item.id)}: {reason}")
            elif item.id in known:
                self.counts["known"] += 1
                _, content, label, _ = known[item.id]
                if (content, label) == (content_hash(image), item.label):
                    self._mend(item.id, image, content)
                elif self.catalog.salted("rectified", item.id) not in self.tombstones:
                    changed.append(item.id)
            else:
                content = content_hash(image)
                self.counts["duplicates"] += content in self.hashes
                self.hashes.add(content)
                self.items.append(item)
                self.contents.append(content)
                new.append(position)
        return contents.rows[new]

    def _is_erased(self, item: Item, known: bool = False) -> bool:
        """Whether a record was erased, or everything of its owner and with it whatever may come later."""
        if self.catalog.salted("tombstone", item.id) in self.tombstones:
            return True
        return bool(item.owner) and not known and self.catalog.salted("owner", item.owner) in self.tombstones

    def _mend(self, name: str, image: np.ndarray, content: str) -> None:
        """Writes the pixels of a known record again where the stored ones have rotted."""
        row, view = self.catalog.rows([name])[name], self.file.view("r+")
        if content_hash(view[row]) != content:
            view[row] = image
            view.flush()
            self.counts["mended"] += 1

    def commit(self, dataset: dict[str, Any], source: str, start: int) -> Imported:
        """Makes the new records live in one transaction; their images lie in the rows from `start` on.

        An erasure needs no lock: one that named a new record, or its owner, after it was read keeps it out.
        """
        with self.catalog.transaction():
            self.tombstones = self.catalog.tombstones()
            late = frozenset(i for i, item in enumerate(self.items) if self._is_erased(item))
            self.file.overwrite(np.array([start + i for i in late], np.int64))
            self.counts["erased"] += len(late)
            added = [i for i in range(len(self.items)) if i not in late]
            self.catalog.set("dataset", dataset)
            contents = [self.contents[i] for i in added]
            self.catalog.add_records([self.items[i] for i in added], [start + i for i in added], contents)
            self.catalog.set("rows", start + len(self.items))
            skipped = len(self.unreadable)  # only their number: events outlive erasures
            self.catalog.event("import", source=source, added=len(added), unreadable=skipped, **self.counts)
        values: dict[str, Any] = {"unreadable": tuple(self.unreadable), **self.counts}
        return Imported(len(added), **values)


def _check_shares(source: Source, data: Data) -> list[str]:
    """Shares to draw where the source has images of that split itself."""
    lines = []
    for split, name in (("test", "test_share"), ("holdout", "holdout")):
        count, share = sum(item.split == split for item in source.items), getattr(data, name)
        folder = getattr(data, f"{split}_split") or split
        where = f" (--config.data.{split}_split={folder})" if data.source in ("folder", "tfds") else ""
        if count and share:
            records = f"the {count} {split} records that the source has{where}"
            lines.append(f"--config.data.{name}={share} would mix drawn records with {records}; use one of them")
    return lines


def _check_owners(catalog: Catalog, source: Source, config: Config) -> list[str]:
    """What keeps owners in one split or cluster each: training records without an owner, owners in two splits."""
    without = [item.id for item in source.items if item.split == "train" and not item.owner]
    flags = {"data.split_by": config.data.split_by, "clustering.partition": config.clustering.partition}
    lines = []
    if without:
        remedy = "name owners with --config.data.owner_pattern, --config.data.labels or --config.text.names"
        reason = f"training records without an owner: {list_names(without)}; {remedy}, or set another value"
        lines = [f"--config.{flag}=owner: {reason}" for flag, value in flags.items() if value == "owner"]
    if config.data.split_by != "owner":
        return lines
    splits = {owner: {split} for owner, split in catalog.owner_splits().items()}
    for item in source.items:
        if item.owner and item.split != "public":
            splits.setdefault(item.owner, set()).add(assign_split(item, config.data, config.seed).split)
    torn = {owner: sorted(names) for owner, names in sorted(splits.items()) if len(names) > 1}
    both = [f"{quoted(owner)} ({' and '.join(names)})" for owner, names in torn.items()]
    if both:
        reason = f"owners in two splits of the workdir and the source: {join_limited(both)}"
        remedy = "let --config.data.test_share or holdout draw them, or set another value"
        lines.append(f"--config.data.split_by=owner: {reason}; {remedy}")
    return lines


def _check_moved(catalog: Catalog, source: Source) -> list[str]:
    """What shows, before an image is read, that a source is not the data of the workdir in another place."""
    live = catalog.live(*SPLITS)
    owners = dict(zip(live.ids, live.owners, strict=True))
    if not any(item.split == "train" and item.id in owners for item in source.items):
        return ["it holds no training record of the workdir, so it is not its data; lmeraser add adds other records"]
    other = [item.id for item in source.items if owners.get(item.id, item.owner) != item.owner]  # whom an erasure names
    return [f"these records have another owner than in the workdir: {join_limited(other)}"] if other else []


def _check_dataset(source: Source, dataset: dict[str, Any] | None) -> list[str]:
    """Why an import cannot be made or joined: the first one fixed the shape and the classes."""
    names, lines = source.class_names, []
    if len(set(names)) < len(names):
        lines.append(f"class names must be unique: {join_limited(names)}")
    if dataset is None:
        return lines
    if list(source.shape) != dataset["shape"]:
        lines.append(f"contents are {list(source.shape)}, those of the workdir {dataset['shape']}")
    used = sorted({item.label for item in source.items if 0 <= item.label < len(names)})
    unknown = [names[label] for label in used if names[label] not in dataset["classes"]]
    if unknown:
        known = join_limited(dataset["classes"])
        lines.append(f"classes that the workdir does not have: {join_limited(unknown)}; it has {known}")
    return lines
