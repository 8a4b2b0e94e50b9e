"""The doctor: what is damaged in a workdir, and the removal of what the next `lmeraser train` makes again.

Only what was positively found counts as damage: something is missing, or has another digest or shape than it must have.
Whatever else a check meets (a lock, an error of the disk, no device, a library that raises) is reported as not checked,
and nothing is changed for it.
"""

import contextlib
import dataclasses
import enum
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmeraser_jax.config import Config
from lmeraser_jax.data.names import list_names
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import SPLITS, content_hash
from lmeraser_jax.errors import Damaged, UserError, join_limited, shorten
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import requests, schema
from lmeraser_jax.storage.atomic_files import entries, is_there, replace_folder, resize_file
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.rows import Manifest
from lmeraser_jax.storage.workdir import Layout, current_writer, refuse_links, refuse_pipes, writer_lock
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, pack, packed_fault, short, slice_of
from lmeraser_jax.unlearning.binding import stored_config

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.run import Run  # loads JAX; a damaged catalog or config is named without

LISTED = 50  # ids in a message
LONGEST = 500  # characters of an error
FEATURES = 256  # cached features, at most, that are computed again and compared
AGAIN = "lmeraser train makes it again"
DROP, REMOVE = f"--fix drops it; {AGAIN}", "--fix removes it"
RETRY = "nothing was changed for it, and what builds on it was not checked either; mend this and run the doctor again"
REPACK = "--fix packs the slices again, as the next command that publishes does; readers use the checkpoints till then"
ADOPT = "the next command that tunes uses what it needs and removes the rest"


class State(enum.StrEnum):
    DAMAGED = "damaged"
    DROPPED = "dropped"  # removed; lmeraser train makes it again
    FIXED = "fixed"
    LEFTOVER = "left over"  # by an interrupted command; nothing is wrong
    NOTE = "note"  # nothing is wrong
    UNCHECKED = "not checked"  # it could not be looked at, and nothing was changed


class Problem(NamedTuple):
    """What was noticed about one component, and what to do about it."""

    message: str
    remedy: str
    repair: Callable[[], object] | None = None  # what --fix does
    state: State = State.DAMAGED
    component: str = ""  # `_check` enters it


class Diagnosis(NamedTuple):
    """All problems of a workdir."""

    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything could be looked at and nothing is damaged, or nothing any more."""
        return all(problem.state in (State.FIXED, State.LEFTOVER, State.NOTE) for problem in self.problems)

    @property
    def damaged(self) -> bool:
        """Whether something is damaged, or was dropped and is to be made again."""
        return any(problem.state in (State.DAMAGED, State.DROPPED) for problem in self.problems)

    def table(self) -> str:
        """The problems for people, a line or two each, and the verdict."""
        lines = []
        for problem in self.problems:
            remedy = f"\n{'':25}{problem.remedy}" if problem.remedy else ""
            lines.append(f"{problem.state:<13}{problem.component:<12}{problem.message}{remedy}")
        verdict = "healthy" if self.healthy else "damaged" if self.damaged else "not all of it could be checked"
        return "\n".join([*lines, verdict])


@dataclasses.dataclass
class _Workdir:
    """What the checks look at; a check sets what those after it need."""

    layout: Layout
    fix: bool
    devices: Sequence[Any] | None
    opened: contextlib.ExitStack
    config: Config = dataclasses.field(init=False)
    catalog: Catalog = dataclasses.field(init=False)
    stamp: tuple[int, int] = dataclasses.field(init=False)  # of the catalog, before the checks
    run: "Run" = dataclasses.field(init=False)


Findings = Iterator[Problem]
Check = Callable[[_Workdir], Findings]


def examine(workdir: str | Path, fix: bool = False, devices: Sequence[Any] | None = None) -> Diagnosis:
    """Looks at every component of a workdir; with `fix` drops what can be made again and removes leftovers.

    Raises:
        UserError: there is no workdir, or its catalog is missing.
    """
    layout = Layout(workdir)
    layout.require()
    problems: list[Problem] = []
    sound: set[str] = set()  # components that are there as they must be, so that what builds on them can be judged
    with contextlib.ExitStack() as opened:
        examined = _Workdir(layout, fix, devices, opened)
        for component, (check, needs) in CHECKS.items():
            if sound.issuperset(needs):
                listed = _check(component, check, examined)
                problems += listed
                if {State.FIXED, State.LEFTOVER}.issuperset(problem.state for problem in listed):
                    sound.add(component)
        if "catalog" in sound and not fix and (current_writer(layout) or examined.catalog.stamp() != examined.stamp):
            return Diagnosis((_unchecked("folder", "another process wrote to the workdir meanwhile"),))
    return Diagnosis(tuple(problems))


def _check(component: str, check: Check, workdir: _Workdir) -> list[Problem]:
    """The findings of a check, repaired one by one; an error that cuts the check short is reported as such."""
    problems = []
    try:
        for problem in check(workdir):
            problems.append(problem._replace(component=component))
            if workdir.fix and problem.repair is not None:
                problem.repair()
                state, remedy = (State.DROPPED, AGAIN) if problem.remedy == DROP else (State.FIXED, "")
                problems[-1] = problems[-1]._replace(remedy=remedy, state=state)
    except Exception as error:  # it says nothing about the workdir
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        problems.append(_unchecked(component, message))
    return problems


def _unchecked(component: str, message: str) -> Problem:
    return Problem(shorten(message, LONGEST), RETRY, None, State.UNCHECKED, component)


def _folder(workdir: _Workdir) -> Findings:
    """Links, pipes, devices; and what a killed writer leaves: temporary files, old folders, scratch, a pretraining."""
    layout = workdir.layout
    writer = current_writer(layout)
    if writer:
        raise UserError(f"{layout.root} is being written by {writer}")
    try:
        refuse_links(layout)
        refuse_pipes(layout)
    except UserError as error:  # what lies behind a link or in a pipe is neither looked at nor changed
        yield Problem(str(error), "")
        return
    if workdir.fix:
        workdir.opened.enter_context(writer_lock(layout))
    top = entries(layout.root)
    hidden = [path for path in (*top, *itertools.chain(*map(entries, top))) if path.name.startswith(".")]
    paths = [path for path in hidden if path.suffix in (".tmp", ".old")] + entries(layout.scratch)
    if is_there(layout.backbone) and is_there(layout.pretraining):
        paths.append(layout.pretraining)
    for path in paths:
        remove = functools.partial(shutil.rmtree if path.is_dir() else os.unlink, path)
        message = f"{path.relative_to(layout.root)} was left by an interrupted command"
        yield Problem(message, REMOVE, remove, State.LEFTOVER)


def _config(workdir: _Workdir) -> Findings:
    try:
        config, reason = stored_config(workdir.layout), "it is missing"
    except UserError as error:
        config, reason = None, str(error)
    if config is not None:
        workdir.config = config
        return
    remedy = "restore it, or delete it and run lmeraser train with the experiment's --config=FILE.py"
    yield Problem(f"config.json cannot be used: {reason}", remedy)


def _catalog(workdir: _Workdir) -> Findings:
    path = workdir.layout.catalog
    lines = schema.damages(path)
    if lines:
        remedy = "restore catalog.db from a copy of the workdir: it cannot be computed again"
        yield Problem(f"the catalog is damaged: {'; '.join(lines)}", remedy)
        return
    workdir.catalog = workdir.opened.enter_context(contextlib.closing(Catalog(path)))
    workdir.stamp = workdir.catalog.stamp()


def _requests(workdir: _Workdir) -> Findings:
    """Erasures that wait, and those whose records left no tombstone."""
    catalog = workdir.catalog
    waiting = join_limited(request.id for request in requests.listed(catalog, only_open=True))
    if waiting:
        remedy = f"lmeraser process {workdir.layout.flag} serves them"
        yield Problem(f"waiting erasures: {waiting}", remedy, state=State.NOTE)
    tombstones = catalog.tombstones()
    for request in requests.listed(catalog):
        if not tombstones.issuperset(request.body["records"]):
            remedy = "restore catalog.db from a copy: what was erased could be imported again"
            yield Problem(f"{request.id}: its erased ids are not remembered", remedy)


def _images(workdir: _Workdir) -> Findings:
    """Every live row against its content hash, the length of the file, and rows that must be empty."""
    layout, catalog = workdir.layout, workdir.catalog
    if catalog.get("dataset") is None:
        return
    file, rows, records = image_file(layout, catalog), catalog.rows_used(), catalog.live(*SPLITS)
    if len(records) and records.rows.max() >= rows:
        message = f"the catalog has records behind row {rows}, which it calls the last one"
        yield Problem(message, "restore catalog.db from a copy; write nothing before")
        return
    size = layout.images.stat().st_size if is_there(layout.images) else 0
    pixels, changed = file.view() if len(file) else np.zeros((0, *file.shape), np.uint8), []
    with progress("records", len(records)) as shown:
        for name, row, content in zip(records.ids, records.rows, records.contents, strict=True):
            if row >= len(pixels) or content_hash(pixels[row]) != content:
                changed.append(name)
            shown.advance(1)
    if changed:
        remedy = "lmeraser train --reimport reads them from the source again; or erase them with lmeraser unlearn"
        yield Problem(f"contents that are not those of the import: {list_names(changed, LISTED)}", remedy)
    if size != rows * file.row_bytes:
        resize = functools.partial(resize_file, layout.images, rows * file.row_bytes)
        message = f"images.u8 has {size} bytes, not {rows} rows of {file.row_bytes}"
        longer = size > rows * file.row_bytes  # as an interrupted import leaves it
        yield Problem(message, "--fix resizes it", resize, State.LEFTOVER if longer else State.DAMAGED)
    unused = file.filled(catalog.free_rows())
    if len(unused):
        overwrite = functools.partial(file.overwrite, unused)
        yield Problem(f"rows of no record hold contents: {join_limited(unused)}", "--fix overwrites them", overwrite)


def _backbone(workdir: _Workdir) -> Findings:
    """The backbone; then the run that the other checks use."""
    from lmeraser_jax.models import backbone as backbone_lib
    from lmeraser_jax.training.fingerprint import pinned
    from lmeraser_jax.training.train_step import mesh_of
    from lmeraser_jax.unlearning.run import Run

    folder = workdir.layout.backbone
    if workdir.catalog.manifest() is None and not is_there(folder):
        yield Problem("the workdir is not complete yet", "lmeraser train goes on", state=State.NOTE)
        return
    try:
        backbone, _ = backbone_lib.load(folder)
    except Damaged as error:
        move = functools.partial(replace_folder, folder, folder.with_name("backbone.damaged"))
        yield Problem(str(error), DROP, move if is_there(folder) else None)
        return
    mesh = mesh_of(workdir.devices)
    workdir.opened.enter_context(pinned())
    workdir.run = Run(workdir.layout, workdir.config, workdir.catalog, backbone, mesh, workdir.fix)


def _public(workdir: _Workdir) -> Findings:
    """What a published state has of the public set: the sample of its clustering, and what prompts begin with."""
    from lmeraser_jax.models import public_sets
    from lmeraser_jax.training import public_prompt

    run, loads = workdir.run, {}
    if run.catalog.manifest() is not None and run.config.samples_public_set:
        loads[run.layout.public_sample] = public_sets.load_sample
    if run.catalog.manifest() is not None and run.config.tuning.starts_public:
        loads[run.layout.public_prompt(public_prompt.name_of(run.config, run.backbone))] = public_prompt.load
    for folder, load in loads.items():
        try:
            load(folder)
        except Damaged as error:
            yield Problem(str(error), DROP, functools.partial(shutil.rmtree, folder) if is_there(folder) else None)


def _state(workdir: _Workdir) -> Findings:
    """Checked before the slices: under another config than theirs nobody knows what they must be."""
    from lmeraser_jax.unlearning import plan

    remedy = "restore config.json and catalog.db from a copy; if they are right, lmeraser train tunes again"
    return (Problem(line, remedy) for line in plan.contradictions(workdir.run))


def _features(workdir: _Workdir) -> Findings:
    """Feature files of another backbone or program, of another length, with rows of no record, or other numbers."""
    run, slices = workdir.run, workdir.catalog.slices()
    programs = {run.fingerprint, *(row.fingerprint for row in slices.values())}
    files = {file.path: file for file in map(run.feature_file, sorted(programs))}
    for path in run.layout.feature_files():
        file, size, rows, reason = files.get(path), path.stat().st_size, run.catalog.rows_used(), ""
        if file is None:
            message = f"{path.name} belongs to another backbone, input size or program"
            yield Problem(message, REMOVE, path.unlink, State.LEFTOVER)
        elif size % file.row_bytes or len(file) > rows:
            reason = f"has {size} bytes, not at most {rows} rows of {file.row_bytes}"
        elif len(file.filled(run.catalog.free_rows())):
            reason = "holds features in rows of no record"
        elif path == run.feature_file().path:
            reason = _differing_features(run, file)
        if reason:
            yield Problem(f"{path.name} {reason}", REMOVE, path.unlink)


def _differing_features(run: "Run", file: RowFile) -> str:
    """Compares evenly spread rows of live records, bit for bit, with what the backbone gives now."""
    rows = run.catalog.live(*SPLITS).rows
    rows = rows[rows < len(file)]
    rows = rows[:: len(rows) // FEATURES + 1]
    stored = file.view()[rows]
    cached = ~np.isnan(stored).any(axis=1)
    if not cached.any():
        return ""
    computed = run.extractor(run.images[rows[cached]])
    count = (stored[cached].view(np.uint32) != computed.view(np.uint32)).any(axis=1).sum()
    return f"holds other numbers than the backbone gives, in {count} of {cached.sum()} rows" if count else ""


def _slices(workdir: _Workdir) -> Findings:
    """The slices of all states, and those that wait for their first one."""
    folder = workdir.layout.slices
    waiting = {name for name in workdir.catalog.slices() if is_there(folder / name)}
    refs = {ref for manifest in _states(workdir.catalog) for ref in manifest.entries.values()} | waiting
    return _artifacts(workdir.catalog, folder, refs, set(), functools.partial(load_slice, workdir.run))


def _packed(workdir: _Workdir) -> Findings:
    """The packed slices of the published state."""
    manifest = workdir.catalog.manifest()
    fault = manifest and packed_fault(workdir.run, manifest.entries)
    if manifest and fault:
        state = State.DAMAGED if is_there(workdir.layout.packed_slices(manifest.entries)) else State.NOTE
        yield Problem(fault, REPACK, functools.partial(pack, workdir.run, manifest.entries), state)


def _clusterings(workdir: _Workdir) -> Findings:
    names = {manifest.clustering for manifest in _states(workdir.catalog)}
    known = {row.clustering for row in workdir.catalog.slices().values()}
    load = functools.partial(load_clustering, workdir.layout)
    return _artifacts(workdir.catalog, workdir.layout.clusterings, names, known, load)


def _states(catalog: Catalog) -> list[Manifest]:
    """The manifests whose files must be there: an interrupted purge has removed some of the older ones'."""
    purging = any(request.state == "published" for request in requests.listed(catalog, only_open=True))
    return catalog.manifests(limit=1 if purging else -1)


def _artifacts(
    catalog: Catalog, folder: Path, refs: set[str], known: set[str], load: Callable[[str], object]
) -> Findings:
    """Slices or clusterings: each can be read by the loader that readers use; others were left by a killed command."""
    with progress(folder.name, len(refs)) as shown:
        for ref in sorted(refs):
            try:
                load(ref)
            except Damaged as error:
                drop = functools.partial(_drop, catalog, folder / slice_of(ref))
                yield Problem(shorten(str(error), 300), DROP, drop)
            shown.advance(1)
    names = {path.name for path in entries(folder) if path.name[0] != "."} - known - set(map(slice_of, refs))
    if names:
        listed = join_limited(sorted(map(short, names)))
        message = f"{folder.name} that an interrupted command wrote, unknown to the catalog: {listed}"
        yield Problem(message, ADOPT, state=State.LEFTOVER)


def _drop(catalog: Catalog, folder: Path) -> None:
    """Drops a slice or a clustering, and the older states that had it: they cannot be made again."""
    with catalog.transaction():
        catalog.drop_slice(folder.name)
        for manifest in catalog.manifests()[1:]:
            if folder.name in (manifest.clustering, *map(slice_of, manifest.entries.values())):
                catalog.drop_manifest(manifest.version)
    shutil.rmtree(folder, ignore_errors=True)


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {  # component: its check, what it builds on
    "folder": (_folder, ()),
    "config": (_config, ("folder",)),
    "catalog": (_catalog, ("folder",)),
    "requests": (_requests, ("catalog",)),
    "records": (_images, ("catalog",)),
    "backbone": (_backbone, ("config", "catalog")),
    "public": (_public, ("backbone",)),
    "state": (_state, ("public",)),
    "features": (_features, ("records", "state")),
    "slices": (_slices, ("state",)),
    "packed": (_packed, ("slices",)),
    "clusterings": (_clusterings, ("state",)),
}
