"""The doctor: what is damaged in a workdir, and the removal of what the next `lmeraser train` makes again.

Only what was positively found counts as damage: something is missing, or has another digest or shape than it must have.
What could not be looked at (a lock, an error of the disk) is reported as unchecked, and nothing is changed for it.
"""

import contextlib
import enum
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import SPLITS, content_hash
from lmeraser_jax.errors import UserError, join_limited, shorten
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
FEATURES = 256  # cached features, at most, that are computed again and compared
AGAIN = "lmeraser train makes it again"
DROP, REMOVE = f"--fix drops it; {AGAIN}", "--fix removes it"

Findings = Iterator[tuple[str, str, Callable[[], object] | None]]  # what is damaged, its remedy, what --fix does


class State(enum.StrEnum):
    DAMAGED = "damaged"
    DROPPED = "dropped"  # removed; lmeraser train makes it again
    FIXED = "fixed"
    NOTE = "note"  # nothing is wrong
    UNCHECKED = "unchecked"  # it could not be looked at, and nothing was changed


class Problem(NamedTuple):
    """What was noticed about one component of a workdir, and what to do about it."""

    component: str
    message: str
    remedy: str
    state: State


class Diagnosis(NamedTuple):
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
    """Looks at every component of a workdir; with `fix` drops what can be made again and removes leftovers.

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
    except UserError as error:  # what lies behind a link is neither looked at nor changed
        return Diagnosis((Problem("folder", str(error), "", State.DAMAGED),))
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.ExitStack())
        if fix:
            lock.enter_context(writer_lock(layout))
        problems = _check("folder", _leftover_files(layout), fix)
        unusable = _check("config", _config(layout), fix) + _check("catalog", _catalog(layout), fix)
        if unusable:
            return Diagnosis((*problems, *unusable))
        catalog = stack.enter_context(contextlib.closing(Catalog(layout.catalog)))
        before = catalog.stamp()
        waiting = join_limited(request.id for request in requests.listed(catalog, only_open=True))
        if waiting:
            remedy = f"lmeraser process --workdir={layout.root} serves them"
            problems.append(Problem("requests", f"waiting erasures: {waiting}", remedy, State.NOTE))
        problems += _check("requests", _requests(catalog), fix)
        images = _check("images", _images(layout, catalog), fix)
        problems += images
        lock.close()  # what follows opens the workdir as every command does
        if all(problem.state != State.DAMAGED for problem in images):
            problems += _examine_built(layout, catalog, fix, devices)
        if not fix and (current_writer(layout) or catalog.stamp() != before):
            problems = [_unchecked("lock", "another process wrote to the workdir meanwhile")]
    return Diagnosis(tuple(problems))


def _check(component: str, findings: Findings, fix: bool) -> list[Problem]:
    """The damages that a check finds, repaired one by one; an error that cuts the check short is reported as such."""
    problems = []
    try:
        for message, remedy, repair in findings:
            state = State.DAMAGED
            if fix and repair is not None:
                repair()
                state, remedy = (State.DROPPED, AGAIN) if remedy == DROP else (State.FIXED, "")
            problems.append(Problem(component, message, remedy, state))
    except Exception as error:  # it says nothing about the workdir
        problems.append(_unchecked(component, f"{type(error).__name__}: {error}"))
    return problems


def _unchecked(component: str, message: str) -> Problem:
    return Problem(component, message, "run this command again; nothing was changed", State.UNCHECKED)


def _leftover_files(layout: Layout) -> Findings:
    """What a killed writer leaves: temporary files, replaced folders, scratch, a finished pretraining."""
    hidden = [*layout.root.glob(".*"), *layout.root.glob("*/.*")]
    paths = [path for path in hidden if path.suffix in (".tmp", ".old")] + list(layout.scratch.glob("*"))
    if layout.backbone.exists():
        paths += layout.root.glob(layout.pretraining.name)
    for path in paths:
        remove = functools.partial(shutil.rmtree if path.is_dir() else os.unlink, path)
        yield f"{path.relative_to(layout.root)} was left by a killed process", REMOVE, remove


def _config(layout: Layout) -> Findings:
    try:
        tree = read_config(layout)
        settings.from_dict(tree or {})
        reason = "" if tree else "it is missing"
    except UserError as error:
        reason = str(error)
    if reason:
        remedy = "restore it, or delete it and run lmeraser train with the experiment's --config=FILE.py"
        yield f"config.json cannot be used: {reason}", remedy, None


def _catalog(layout: Layout) -> Findings:
    lines = schema.damages(layout.catalog)
    if lines:
        remedy = "restore catalog.db from a copy of the workdir: it cannot be computed again"
        yield f"the catalog is damaged: {'; '.join(lines)}", remedy, None


def _requests(catalog: Catalog) -> Findings:
    """Erasures whose records left no tombstone."""
    tombstones = catalog.tombstones()
    for request in requests.listed(catalog):
        if not tombstones.issuperset(request.body["records"]):
            remedy = "restore catalog.db from a copy: what was erased could be imported again"
            yield f"{request.id}: its erased ids are not remembered", remedy, None


def _images(layout: Layout, catalog: Catalog) -> Findings:
    """Every live row against its content hash, the length of the file, and rows that must be empty."""
    if catalog.get("dataset") is None:
        return
    file, rows, records = image_file(layout, catalog), catalog.rows_used(), catalog.live(*SPLITS)
    if len(records) and records.rows.max() >= rows:
        message = f"the catalog has records behind row {rows}, which it calls the last one"
        yield message, "restore catalog.db from a copy; write nothing before", None
        return
    size = layout.images.stat().st_size if layout.images.exists() else 0
    pixels, changed = file.view() if len(file) else np.zeros((0, *file.shape), np.uint8), []
    with progress("images", len(records)) as shown:
        for name, row, content in zip(records.ids, records.rows, records.contents, strict=True):
            if row >= len(pixels) or content_hash(pixels[row]) != content:
                changed.append(name)
            shown.advance(1)
    if changed:
        remedy = "lmeraser train --reimport reads them from the source again; or erase them with lmeraser unlearn"
        yield f"pixels that are not those of the import: {join_limited(changed, LISTED)}", remedy, None
    if size != rows * file.row_bytes:
        resize = functools.partial(resize_file, layout.images, rows * file.row_bytes)
        yield f"images.u8 has {size} bytes, not {rows} rows of {file.row_bytes}", "--fix resizes it", resize
    unused = file.filled(catalog.free_rows())
    if len(unused):
        overwrite = functools.partial(file.overwrite, unused)
        yield f"rows of no record hold pixels: {join_limited(unused)}", "--fix overwrites them", overwrite


def _examine_built(layout: Layout, catalog: Catalog, fix: bool, devices: Sequence[Any] | None) -> list[Problem]:
    """What was made from the records: backbone, features, slices, clusterings, the published state."""
    from lmeraser_jax.unlearning.run import open_run

    if catalog.manifest() is None and not layout.backbone.exists():
        return [Problem("backbone", "the workdir is not complete yet", "lmeraser train goes on", State.NOTE)]
    problems = _check("backbone", _backbone(layout), fix)
    if problems:
        return problems
    with open_run(layout.root, devices=devices, write=fix) as run:
        manifests, slices = run.catalog.manifests(), run.catalog.slices()
        refs = {ref for manifest in manifests for ref in manifest.entries.values()} | slices.keys()
        clusterings = {manifest.clustering for manifest in manifests}
        known = clusterings | {row.clustering for row in slices.values()}
        problems += _check("features", _features(run), fix)
        load = functools.partial(load_slice, run)
        problems += _check("slices", _artifacts(catalog, layout.slices, refs, slices.keys(), load), fix)
        load = functools.partial(load_clustering, layout)
        problems += _check("clusterings", _artifacts(catalog, layout.clusterings, clusterings, known, load), fix)
        return problems or _check("state", _contradictions(run), fix)


def _backbone(layout: Layout) -> Findings:
    from lmeraser_jax.models import backbone

    try:
        backbone.load(layout.backbone)
    except UserError as error:
        move = functools.partial(publish_folder, layout.backbone, layout.root / "backbone.damaged")
        yield str(error), DROP, move if layout.backbone.exists() else None


def _features(run: "Run") -> Findings:
    """Feature files of another backbone or program, of another length, with rows of no record, or other numbers."""
    programs = {run.fingerprint, *(row.fingerprint for row in run.catalog.slices().values())}
    files = {file.path: file for file in map(run.feature_file, sorted(programs))}
    for path in sorted(run.layout.records.glob("features-*.f32")):
        file, size, rows, reason = files.get(path), path.stat().st_size, run.catalog.rows_used(), ""
        if file is None:
            reason = "belongs to another backbone, image size or program"
        elif size % file.row_bytes or len(file) > rows:
            reason = f"has {size} bytes, not at most {rows} rows of {file.row_bytes}"
        elif len(file.filled(run.catalog.free_rows())):
            reason = "holds features in rows of no record"
        elif path == run.feature_file().path:
            reason = _differing_features(run, file)
        if reason:
            yield f"{path.name} {reason}", REMOVE, path.unlink


def _differing_features(run: "Run", file: RowFile) -> str:
    """Compares evenly spread rows of live records, bit for bit, with what the backbone gives now."""
    rows = run.catalog.live(*SPLITS).rows
    rows = rows[rows < len(file)]
    if not len(rows):
        return ""
    rows = rows[:: len(rows) // FEATURES + 1]
    stored = file.view()[rows]
    cached = ~np.isnan(stored).any(axis=1)
    if not cached.any():
        return ""
    computed = run.extractor(run.images[rows[cached]])
    count = (stored[cached].view(np.uint32) != computed.view(np.uint32)).any(axis=1).sum()
    return f"holds other numbers than the backbone gives, in {count} of {cached.sum()} rows" if count else ""


def _artifacts(
    catalog: Catalog, folder: Path, refs: Collection[str], known: Collection[str], load: Callable[[str], object]
) -> Findings:
    """Slices or clusterings: each can be read by the loader that readers use, and there are no unknown ones."""
    with progress(folder.name, len(refs)) as shown:
        for ref in sorted(refs):
            try:
                load(ref)
            except UserError as error:
                yield shorten(str(error), 300), DROP, functools.partial(_drop, catalog, folder / slice_of(ref))
            shown.advance(1)
    unknown = sorted({path.name[:12] for path in folder.glob("*") if path.name not in known})
    if unknown:
        remove = functools.partial(remove_others, folder, known)
        yield f"{folder.name} that the catalog does not know: {join_limited(unknown)}", REMOVE, remove


def _drop(catalog: Catalog, folder: Path) -> None:
    """Drops a slice or a clustering, and the older states that had it: they cannot be made again."""
    with catalog.transaction():
        catalog.drop_slice(folder.name)
        for manifest in catalog.manifests()[1:]:
            if folder.name in (manifest.clustering, *map(slice_of, manifest.entries.values())):
                catalog.drop_manifest(manifest.version)
    shutil.rmtree(folder, ignore_errors=True)


def _contradictions(run: "Run") -> Findings:
    from lmeraser_jax.unlearning.plan import contradictions

    for line in contradictions(run):
        yield (
            line,
            "restore config.json and catalog.db from a copy; if they are right, lmeraser train tunes again",
            None,
        )
