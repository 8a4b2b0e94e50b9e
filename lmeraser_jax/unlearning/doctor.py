"""The doctor: what is damaged in a workdir, and the removal of what can be made again.

Only what is positively known counts as damage: something is missing, or it has another digest or shape than it must
have. What could not be looked at (a lock, an error of the disk) is reported as unchecked, and nothing is changed for
it. A repair drops what is damaged; the next `lmeraser train` makes it again, with the same bits.
"""

import contextlib
import dataclasses
import enum
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import SPLITS, content_hash
from lmeraser_jax.errors import UserError, join_limited, shorten
from lmeraser_jax.hashing import digest
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import requests, schema
from lmeraser_jax.storage.atomic_files import publish_folder, remove_others, resize_file
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.workdir import Layout, current_writer, read_config, refuse_links, writer_lock
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, slice_of

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.run import Run  # loads JAX; a damaged catalog or config is named without

LISTED = 50  # ids in a message
FEATURES = 256  # cached features that are computed again and compared
REMOVE = "--fix removes it"
DROP = "--fix drops it; lmeraser train makes it again"


class State(enum.StrEnum):
    DAMAGED = "damaged"
    DROPPED = "dropped"  # removed; lmeraser train makes it again
    FIXED = "fixed"
    NOTE = "note"  # nothing is wrong
    UNCHECKED = "unchecked"  # it could not be looked at, and nothing was changed


@dataclasses.dataclass(frozen=True)
class Problem:
    """What was noticed about one component of a workdir, what to do about it, and how --fix does that."""

    component: str
    message: str
    remedy: str = ""
    state: State = State.DAMAGED
    repair: Callable[[], object] | None = dataclasses.field(default=None, compare=False, repr=False)

    def repaired(self) -> "Problem":
        assert self.repair is not None
        self.repair()
        state, remedy = (State.DROPPED, "lmeraser train makes it again") if self.remedy == DROP else (State.FIXED, "")
        return Problem(self.component, self.message, remedy, state)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All problems of a workdir."""

    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything could be looked at and nothing is damaged, or nothing any more."""
        return all(problem.state in (State.FIXED, State.NOTE) for problem in self.problems)

    @property
    def damaged(self) -> bool:
        """Whether something is damaged, or was dropped and is to be made again."""
        return any(problem.state in (State.DAMAGED, State.DROPPED) for problem in self.problems)

    def table(self) -> str:
        """The problems for people, a line or two each, and the verdict."""
        lines = []
        for problem in self.problems:
            lines.append(f"{problem.state:<10}{problem.component:<12}{problem.message}")
            if problem.remedy:
                lines.append(f"{'':22}{problem.remedy}")
        verdict = "healthy" if self.healthy else "damaged" if self.damaged else "not all of it could be checked"
        return "\n".join([*lines, verdict])


def examine(workdir: str | Path, fix: bool = False, devices: Sequence[Any] | None = None) -> Diagnosis:
    """Looks at every component of a workdir.

    Args:
        workdir: an existing one.
        fix: drop what is damaged and can be made again, and remove leftovers; without it nothing is written.
        devices: all by default.

    Raises:
        UserError: there is no workdir, or its catalog is missing.
    """
    layout = Layout(workdir)
    layout.require()
    writer = current_writer(layout)
    if writer:
        return Diagnosis((_unchecked("lock", f"{layout.root} is being written by {writer}"),))
    try:
        refuse_links(layout)
    except UserError as error:
        return Diagnosis((Problem("folder", str(error)),))  # what lies behind a link is neither looked at nor changed
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.ExitStack())
        if fix:
            lock.enter_context(writer_lock(layout))
        problems = _check("folder", _leftover_files(layout), fix)
        unusable = _check("catalog", _config_and_catalog(layout), fix)
        if unusable:
            return Diagnosis((*problems, *unusable))
        catalog = stack.enter_context(contextlib.closing(Catalog(layout.catalog)))
        before = catalog.stamp()
        problems += _check("requests", _requests(layout, catalog), fix)
        problems += _check("images", _images(layout, catalog), fix)
        lock.close()  # what follows opens the workdir as every command does
        if not any(problem.component == "images" and problem.state == State.DAMAGED for problem in problems):
            problems += _examine_built(layout, catalog, fix, devices)
        if not fix and (current_writer(layout) or catalog.stamp() != before):
            problems = [_unchecked("lock", "another process wrote to the workdir meanwhile")]
    return Diagnosis(tuple(problems))


def _check(component: str, problems: Iterator[Problem], fix: bool) -> list[Problem]:
    """The problems that a check notices, repaired one by one; a check that an error cuts short is one of them."""
    noticed: list[Problem] = []
    try:
        for problem in problems:
            noticed.append(problem.repaired() if fix and problem.repair else problem)
    except Exception as error:  # it says nothing about the workdir
        noticed.append(_unchecked(component, f"{type(error).__name__}: {error}"))
    return noticed


def _unchecked(component: str, message: str) -> Problem:
    return Problem(component, message, "run this command again; nothing was changed", State.UNCHECKED)


def _leftover_files(layout: Layout) -> Iterator[Problem]:
    """What a killed writer leaves: temporary files, replaced folders, scratch, a finished pretraining."""
    hidden = [*layout.root.glob(".*"), *layout.root.glob("*/.*")]
    paths = [path for path in hidden if path.suffix in (".tmp", ".old")] + list(layout.scratch.glob("*"))
    if layout.backbone.exists():
        paths += layout.root.glob(layout.pretraining.name)
    for path in paths:
        remove = functools.partial(shutil.rmtree if path.is_dir() else os.unlink, path)
        yield Problem("folder", f"{path.relative_to(layout.root)} was left by a killed process", REMOVE, repair=remove)


def _config_and_catalog(layout: Layout) -> Iterator[Problem]:
    """The two files without which nothing else can be told."""
    try:
        tree = read_config(layout)
        reason = "" if tree else "it is missing"
        settings.from_dict(tree or {})
    except UserError as error:
        reason = str(error)
    if reason:
        remedy = "restore it, or delete it and run lmeraser train with the experiment's --config=FILE.py"
        yield Problem("config", f"config.json cannot be used: {reason}", remedy)
    lines = schema.damages(layout.catalog)
    if lines:
        remedy = "restore catalog.db from a copy of the workdir: it cannot be computed again"
        yield Problem("catalog", f"the catalog is damaged: {'; '.join(lines)}", remedy)


def _requests(layout: Layout, catalog: Catalog) -> Iterator[Problem]:
    """Erasures that wait, and erasures that the catalog has forgotten."""
    waiting = [request.id for request in requests.listed(catalog, only_open=True)]
    if waiting:
        remedy = f"lmeraser process --workdir={layout.root} serves them"
        yield Problem("requests", f"waiting erasures: {join_limited(waiting)}", remedy, State.NOTE)
    tombstones = catalog.tombstones()
    for request in requests.listed(catalog):
        if not tombstones.issuperset(request.body["records"]):
            remedy = "restore catalog.db from a copy: what was erased could be imported again"
            yield Problem("requests", f"{request.id}: its erased ids are not remembered", remedy)


def _images(layout: Layout, catalog: Catalog) -> Iterator[Problem]:
    """Every live row against its content hash, the length of the file, and rows that must be empty."""
    if catalog.get("dataset") is None:
        return
    file, rows, records = image_file(layout, catalog), catalog.rows_used(), catalog.live(*SPLITS)
    if len(records) and records.rows.max() >= rows:
        message = f"the catalog has records behind row {rows}, which it calls the last one"
        yield Problem("images", message, "restore catalog.db from a copy; write nothing before")
        return
    count, size = len(file), layout.images.stat().st_size if layout.images.exists() else 0
    view = file.view() if count else np.zeros((0, *file.shape), np.uint8)
    changed = []
    with progress("images", len(records)) as shown:
        for name, row, content in zip(records.ids, records.rows, records.contents, strict=True):
            if row >= count or content_hash(view[row]) != content:
                changed.append(name)
            shown.advance(1)
    if changed:
        message = f"pixels that are not those of the import: {join_limited(changed, LISTED)}"
        remedy = "lmeraser train --reimport reads them from the source again; or erase them with lmeraser unlearn"
        yield Problem("images", message, remedy)
    if size != rows * file.row_bytes:
        message = f"images.u8 has {size} bytes, not {rows} rows of {file.row_bytes}"
        resize = functools.partial(resize_file, layout.images, rows * file.row_bytes)
        yield Problem("images", message, "--fix resizes it", repair=resize)
    unused = file.filled(catalog.free_rows())
    if len(unused):
        message = f"rows of no record hold pixels: {join_limited(unused)}"
        yield Problem("images", message, "--fix overwrites them", repair=functools.partial(file.overwrite, unused))


def _examine_built(layout: Layout, catalog: Catalog, fix: bool, devices: Sequence[Any] | None) -> list[Problem]:
    """What was made from the records: backbone, features, slices, clusterings, the published state."""
    from lmeraser_jax.unlearning.run import open_run

    if catalog.manifest() is None and not layout.backbone.exists():
        return [Problem("backbone", "the workdir is not complete yet", "lmeraser train goes on", State.NOTE)]
    problems = _check("backbone", _backbone(layout), fix)
    if problems:
        return problems
    with open_run(layout.root, devices=devices, write=fix) as run:
        for component, check in (("features", _features), ("slices", _slices), ("clusterings", _clusterings)):
            problems += _check(component, check(run), fix)
        return problems or _check("state", _contradictions(run), fix)


def _backbone(layout: Layout) -> Iterator[Problem]:
    from lmeraser_jax.models import backbone

    try:
        backbone.load(layout.backbone)
    except UserError as error:
        move = functools.partial(publish_folder, layout.backbone, layout.root / "backbone.damaged")
        yield Problem("backbone", str(error), DROP, repair=move if layout.backbone.exists() else None)


def _features(run: "Run") -> Iterator[Problem]:
    """Feature files of another backbone or program, of another length, with rows of no record, or other numbers."""
    programs = {run.fingerprint, *(row.fingerprint for row in run.catalog.slices().values())}
    files = {file.path: file for file in map(run.feature_file, sorted(programs))}
    for path in sorted(run.layout.records.glob("features-*.f32")):
        file, reason = files.get(path), ""
        if file is None:
            reason = "belongs to another backbone, image size or program"
        elif path.stat().st_size % file.row_bytes or len(file) > run.catalog.rows_used():
            reason = f"has {path.stat().st_size} bytes, not at most {run.catalog.rows_used()} rows of {file.row_bytes}"
        elif len(file.filled(run.catalog.free_rows())):
            reason = "holds features in rows of no record"
        elif path == run.feature_file().path:
            reason = _differing_features(run, file)
        if reason:
            yield Problem("features", f"{path.name} {reason}", REMOVE, repair=path.unlink)


def _differing_features(run: "Run", file: RowFile) -> str:
    """Compares evenly spread rows of live records, bit for bit, with what the backbone gives now."""
    rows = run.catalog.live(*SPLITS).rows
    rows = rows[rows < len(file)]
    rows = np.unique(rows[np.linspace(0, len(rows) - 1, min(FEATURES, len(rows))).astype(np.int64)])
    stored = np.asarray(file.view()[rows]) if len(rows) else np.zeros((0, *file.shape), np.float32)
    cached = ~np.isnan(stored).any(axis=1)
    if not cached.any():
        return ""
    computed = run.extractor(run.images[rows[cached]])
    count = (stored[cached].view(np.uint32) != computed.view(np.uint32)).any(axis=1).sum()
    return f"holds other numbers than the backbone gives, in {count} of {cached.sum()} rows" if count else ""


def _slices(run: "Run") -> Iterator[Problem]:
    """Every registered or published slice against its digest, by the loader that readers use."""
    refs = {ref for manifest in run.catalog.manifests() for ref in manifest.entries.values()}
    refs |= set(run.catalog.slices())
    with progress("slices", len(refs)) as shown:
        for ref in sorted(refs):
            try:
                load_slice(run, ref)
            except UserError as error:
                name = slice_of(ref)
                drop = functools.partial(_drop, run.catalog, name, run.layout.slice(name))
                yield Problem("slices", shorten(str(error), 300), DROP, repair=drop)
            shown.advance(1)
    yield from _unknown_files(run.layout.slices, run.catalog.slices().keys())


def _drop(catalog: Catalog, name: str, folder: Path) -> None:
    """Drops a slice or a clustering, and the older states that had it: they cannot be made again."""
    with catalog.transaction():
        catalog.drop_slice(name)
        for manifest in catalog.manifests()[1:]:
            if name in (manifest.clustering, *map(slice_of, manifest.entries.values())):
                catalog.drop_manifest(manifest.version)
    shutil.rmtree(folder, ignore_errors=True)


def _clusterings(run: "Run") -> Iterator[Problem]:
    """The clustering of every state: it can be read, and its keys are the digests of its sampled ids."""
    manifests = run.catalog.manifests()
    for manifest in manifests:
        folder, reason = run.layout.clustering(manifest.clustering), ""
        try:
            clustering, members = load_clustering(run.layout, manifest.clustering), dict[int, list[str]]()
            for name, label in zip(clustering.sample, clustering.labels.tolist(), strict=True):
                members.setdefault(label, []).append(name)
            if members and tuple(digest(members[k]) for k in sorted(members)) != clustering.keys:
                reason = "its keys are not the digests of its sampled ids"
        except UserError as error:
            reason = str(error)
        if reason:
            message = f"clustering {manifest.clustering[:12]} is missing or damaged: {reason}"
            drop = functools.partial(_drop, run.catalog, manifest.clustering, folder)
            yield Problem("clusterings", message, DROP, repair=drop)
    known = {row.clustering for row in run.catalog.slices().values()}
    yield from _unknown_files(run.layout.clusterings, known | {manifest.clustering for manifest in manifests})


def _unknown_files(folder: Path, known: Collection[str]) -> Iterator[Problem]:
    unknown = sorted({path.name[:12] for path in folder.glob("*") if path.name not in known})
    if unknown:
        message = f"{folder.name} that the catalog does not know: {join_limited(unknown)}"
        yield Problem(folder.name, message, REMOVE, repair=functools.partial(remove_others, folder, known))


def _contradictions(run: "Run") -> Iterator[Problem]:
    from lmeraser_jax.unlearning import live_state

    for line in live_state.contradictions(run):
        remedy = "restore config.json and catalog.db from a copy; if they are right, lmeraser train tunes again"
        yield Problem("state", line, remedy)
