"""The doctor: what is damaged in a workdir, and the removal of what can be made again.

Only what is positively known counts as damage: something is missing, or it has another digest or shape than it must
have. What could not be looked at (a lock, an error of the disk) is reported as unchecked, and nothing is changed for
it. A repair drops what is damaged; the next `lmeraser train` makes it again, with the same bits.
"""

import contextlib
import dataclasses
import enum
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import SPLITS, content_hash
from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.hashing import digest
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import requests, schema
from lmeraser_jax.storage.atomic_files import remove_others
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.workdir import Layout, current_writer, read_config, refuse_links, writer_lock

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.run import Run  # loads JAX; a damaged catalog or config is named without

LISTED = 50  # ids in a message
FEATURES = 256  # cached features that are computed again and compared


class State(enum.StrEnum):
    DAMAGED = "damaged"
    DROPPED = "dropped"  # removed; lmeraser train makes it again
    FIXED = "fixed"
    NOTE = "note"  # nothing is wrong
    UNCHECKED = "unchecked"  # it could not be looked at, and nothing was changed


@dataclasses.dataclass(frozen=True)
class Problem:
    """What was noticed about one part of a workdir, and what to do about it or what the repair did."""

    part: str
    message: str
    remedy: str = ""
    state: State = State.DAMAGED


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
            lines.append(f"{problem.state:<10}{problem.part:<12}{problem.message}")
            if problem.remedy:
                lines.append(f"{'':22}{problem.remedy}")
        verdict = "healthy" if self.healthy else "damaged" if self.damaged else "not all of it could be checked"
        return "\n".join([*lines, verdict])


def examine(workdir: str | Path, fix: bool = False, devices: Sequence[Any] | None = None) -> Diagnosis:
    """Looks at every part of a workdir.

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
        problems = _check("folder", _leftover_files(layout, fix))
        problems += _check("config", _config(layout)) + _check("catalog", _catalog_file(layout))
        if any(problem.part in ("config", "catalog") for problem in problems):
            return Diagnosis(tuple(problems))
        catalog = stack.enter_context(contextlib.closing(Catalog(layout.catalog)))
        before = catalog.stamp()
        problems += _check("requests", _requests(layout, catalog)) + _check("images", _images(layout, catalog, fix))
        lock.close()  # what follows opens the workdir as every command does
        if not any(problem.part == "images" and problem.state == State.DAMAGED for problem in problems):
            problems += _check("backbone", _built(layout, catalog, fix, devices))
        if not fix and (current_writer(layout) or catalog.stamp() != before):
            problems = [_unchecked("lock", "another process wrote to the workdir meanwhile")]
    return Diagnosis(tuple(problems))


def _check(part: str, problems: Iterator[Problem]) -> list[Problem]:
    """The problems that a check notices; one that is cut short by an error is itself reported as unchecked."""
    noticed: list[Problem] = []
    try:
        for problem in problems:
            noticed.append(problem)
    except Exception as error:  # whatever it is, it is no finding about the workdir
        noticed.append(_unchecked(part, f"{type(error).__name__}: {error}"))
    return noticed


def _unchecked(part: str, message: str) -> Problem:
    return Problem(part, message, "run this command again; nothing was changed", State.UNCHECKED)


def _leftover(part: str, message: str, fix: bool, remove: Callable[[], object], verb: str = "remove") -> Problem:
    """What should not be there and that nothing needs; removed where that is wanted."""
    if not fix:
        return Problem(part, message, f"--fix {verb}s it")
    remove()
    return Problem(part, message, f"{verb}d", State.FIXED)


def _damaged(part: str, message: str, fix: bool, drop: Callable[[], object]) -> Problem:
    """What is damaged and can be made again; dropped where that is wanted."""
    if not fix:
        return Problem(part, message, "--fix drops it; then lmeraser train makes it again")
    drop()
    return Problem(part, message, "dropped; lmeraser train makes it again", State.DROPPED)


def _leftover_files(layout: Layout, fix: bool) -> Iterator[Problem]:
    """What a killed writer leaves: temporary files, replaced folders, scratch, a finished pretraining."""
    hidden = [*layout.root.glob(".*"), *layout.root.glob("*/.*")]
    paths = [path for path in hidden if path.suffix in (".tmp", ".old")] + list(layout.scratch.glob("*"))
    if layout.backbone.exists() and layout.pretraining.exists():
        paths.append(layout.pretraining)
    for path in paths:
        remove = shutil.rmtree if path.is_dir() else Path.unlink
        message = f"{path.relative_to(layout.root)} was left by a killed process"
        yield _leftover("folder", message, fix, lambda remove=remove, path=path: remove(path))


def _config(layout: Layout) -> Iterator[Problem]:
    remedy = "restore config.json, or delete it and run lmeraser train with the experiment's --config=FILE.py"
    try:
        tree = read_config(layout)
        if tree is None:
            yield Problem("config", "config.json is missing", remedy)
        else:
            settings.from_dict(tree)
    except UserError as error:
        yield Problem("config", f"config.json cannot be used: {error}", remedy)


def _catalog_file(layout: Layout) -> Iterator[Problem]:
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


def _images(layout: Layout, catalog: Catalog, fix: bool) -> Iterator[Problem]:
    """Every live row against its content hash, the length of the file, and rows that must be empty."""
    if catalog.get("dataset") is None:
        return
    file, rows, records = image_file(layout, catalog), catalog.rows_used(), catalog.live(*SPLITS)
    if len(records) and records.rows.max() >= rows:
        message = f"the catalog has records behind row {rows}, which it calls the last one"
        yield Problem("images", message, "restore catalog.db from a copy; write nothing before")
        return
    there, size = len(file), layout.images.stat().st_size if layout.images.exists() else 0
    view = file.view() if there else np.zeros((0, *file.shape), np.uint8)
    changed = []
    with progress("images", len(records)) as shown:
        for name, row, content in zip(records.ids, records.rows, records.contents, strict=True):
            if row >= there or content_hash(view[row]) != content:
                changed.append(name)
            shown.advance(1)
    if changed:
        message = f"pixels that are not those of the import: {join_limited(changed, LISTED)}"
        remedy = "lmeraser train --reimport reads them from the source again; or erase them with lmeraser unlearn"
        yield Problem("images", message, remedy)
    if size != rows * file.row_bytes:
        message = f"images.u8 has {size} bytes, not {rows} rows of {file.row_bytes}"
        yield _leftover("images", message, fix, lambda: _resize(layout.images, rows * file.row_bytes), "resize")
    unused = file.filled(catalog.free_rows())
    if len(unused):
        message = f"rows of no record hold pixels: {join_limited(unused)}"
        yield _leftover("images", message, fix, lambda: file.overwrite(unused), "erase")


def _resize(path: Path, size: int) -> None:
    """Cuts off what is too much and fills up with zeros what is missing."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def _built(layout: Layout, catalog: Catalog, fix: bool, devices: Sequence[Any] | None) -> Iterator[Problem]:
    """What was made from the records: backbone, features, slices, clusterings, the published state."""
    from lmeraser_jax.models import backbone
    from lmeraser_jax.unlearning import live_state
    from lmeraser_jax.unlearning.run import open_run

    if catalog.manifest() is None and not layout.backbone.exists():
        yield Problem("backbone", "the workdir is not complete yet", "lmeraser train goes on", State.NOTE)
        return
    try:
        backbone.load(layout.backbone)
    except UserError as error:
        message = f"{error}; --fix keeps it as backbone.damaged"
        yield _damaged("backbone", message, fix, lambda: _move(layout.backbone, layout.root / "backbone.damaged"))
        return
    with open_run(layout.root, devices=devices, write=fix) as run:
        problems = _check("features", _features(run, fix)) + _check("slices", _slices(run, fix))
        problems += _check("clusterings", _clusterings(run, fix)) + _check("slices", _unregistered_slices(run, fix))
        yield from problems
        if not problems:
            remedy = "restore config.json and catalog.db from a copy; if they are right, lmeraser train tunes again"
            yield from (Problem("state", line, remedy) for line in live_state.contradictions(run))


def _move(folder: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    if folder.exists():
        os.replace(folder, to)


def _features(run: "Run", fix: bool) -> Iterator[Problem]:
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
            yield _leftover("features", f"{path.name} {reason}", fix, path.unlink)


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


def _slices(run: "Run", fix: bool) -> Iterator[Problem]:
    """Every registered or published slice against its digest, by the loader that readers use."""
    from lmeraser_jax.unlearning.artifacts import load_slice, slice_of

    manifests = run.catalog.manifests()
    refs = sorted({*run.catalog.slices(), *(ref for manifest in manifests for ref in manifest.entries.values())})

    def drop(name: str) -> None:
        with run.catalog.transaction():
            run.catalog.drop_slice(name)
            for manifest in manifests[1:]:
                if name in map(slice_of, manifest.entries.values()):
                    run.catalog.drop_manifest(manifest.version)

    with progress("slices", len(refs)) as shown:
        for ref in refs:
            try:
                load_slice(run, ref)
            except UserError as error:
                yield _damaged("slices", str(error)[:300], fix, lambda ref=ref: drop(slice_of(ref)))
            shown.advance(1)


def _clusterings(run: "Run", fix: bool) -> Iterator[Problem]:
    """The clustering of every state: it can be read, and its keys are the digests of its sampled ids."""
    from lmeraser_jax.unlearning.artifacts import load_clustering
    from lmeraser_jax.unlearning.purge import referenced

    manifests = run.catalog.manifests()

    def drop(number: int) -> None:
        shutil.rmtree(run.layout.clustering(manifests[number].clustering), ignore_errors=True)
        if number:  # an older state cannot be made again
            run.catalog.drop_manifest(manifests[number].version)

    for number, manifest in enumerate(manifests):
        with contextlib.suppress(FileNotFoundError):
            (run.layout.clustering(manifest.clustering) / "clustering.npz").read_bytes()  # else it is no damage
        try:
            clustering, reason = load_clustering(run.layout, manifest.clustering), ""
            members: dict[int, list[str]] = {}
            for name, label in zip(clustering.sample, clustering.labels.tolist(), strict=True):
                members.setdefault(label, []).append(name)
            if members and tuple(digest(members[k]) for k in sorted(members)) != clustering.keys:
                reason = "its keys are not the digests of its sampled ids"
            elif len(clustering.prototypes) != len(clustering.keys) or not set(manifest.clusters) <= {*clustering.keys}:
                reason = "its keys do not fit its prototypes or the published state"
        except UserError as error:
            reason = str(error)
        if reason:
            message = f"clustering {manifest.clustering[:12]} is missing or damaged: {reason}"
            yield _damaged("clusterings", message, fix, lambda number=number: drop(number))
    wanted = referenced(run.catalog, run.catalog.manifests()).clusterings
    yield from _unknown_files(run.layout.clusterings, set(wanted), "clusterings", fix)


def _unregistered_slices(run: "Run", fix: bool) -> Iterator[Problem]:
    yield from _unknown_files(run.layout.slices, set(run.catalog.slices()), "slices", fix)


def _unknown_files(folder: Path, known: set[str], part: str, fix: bool) -> Iterator[Problem]:
    unknown = sorted({path.name[:12] for path in folder.glob("*") if path.name not in known})
    if unknown:
        message = f"{part} that the catalog does not know: {join_limited(unknown)}"
        yield _leftover(part, message, fix, lambda: remove_others(folder, known))
