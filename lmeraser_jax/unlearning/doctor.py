"""The doctor: what is wrong with a workdir, and the repair of whatever can be computed again.

The checks of this file need no JAX: the folder, the config, the catalog, records against images. What was built
from them is looked at in `checkup`, once they are sound. A repair drops or closes what is broken; the next
`lmeraser train` makes it again, with the same bits.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import requests, salvage, schema
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.workdir import Layout, read_config, writer_lock

OPEN_TO_OTHERS = 0o077
LISTED = 50  # ids in a message
FEATURES = 256  # rows of the feature cache that are computed again and compared


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        part: of the workdir.
        what: is wrong, in one line.
        remedy: what to do, or what the repair did.
        state: wrong | dropped (lmeraser train makes it again) | fixed | note (nothing is wrong, but to be known).
    """

    part: str
    what: str
    remedy: str = ""
    state: str = "wrong"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything that was found."""

    findings: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong, or nothing any more."""
        return all(finding.state in ("fixed", "note") for finding in self.findings)

    def table(self) -> str:
        """The findings for people, a line or two each, and the verdict."""
        lines = [f"{f.state:<8}{f.part:<12}{f.what}" + (f"\n{'':20}{f.remedy}" * bool(f.remedy)) for f in self.findings]
        return "\n".join([*lines, "healthy" if self.healthy else "not healthy"])


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A workdir whose config and catalog could be opened; `fix` if repairs are wanted."""

    layout: Layout
    config: Config
    catalog: Catalog
    fix: bool


def examine(
    workdir: str | Path, fix: bool = False, features: int = FEATURES, devices: Sequence[Any] | None = None
) -> Diagnosis:
    """Looks at every part of a workdir.

    Args:
        workdir: an existing one.
        fix: repair what can be; without it nothing is written.
        features: rows of the feature cache to compute again and compare; 0: none.
        devices: all by default.

    Raises:
        UserError: there is no workdir.
    """
    layout = Layout(workdir)
    if not (layout.root.is_dir() and any(path.exists() for path in (layout.catalog, layout.config, layout.records))):
        layout.require()
    with contextlib.ExitStack() as stack:
        busy = _busy(layout)
        if busy:
            return Diagnosis((busy,))
        found = run_check("folder", lambda: _links(layout))
        if found:
            return Diagnosis(tuple(found))  # what lies behind a link is neither looked at nor changed
        found += run_check("lock", lambda: _stale_lock(layout, fix))
        if fix:
            stack.enter_context(writer_lock(layout))
        for part, check in (("folder", _modes), ("folder", _unfinished), ("catalog", _catalog)):
            found += run_check(part, lambda check=check: check(layout, fix))
        config, more = _config(layout)
        found += more
        if any(f.part == "catalog" and f.state in ("wrong", "note") for f in found) or config is None:
            return Diagnosis(tuple(found))
        with contextlib.closing(Catalog(layout.catalog)) as catalog:
            patient, before = Workdir(layout, config, catalog, fix), catalog.stamp()
            found += _within(patient, features, devices)
            if not fix and (_busy(layout) or catalog.stamp() != before):
                found = [Problem("lock", "another process wrote to the workdir meanwhile", "run this command again")]
    return Diagnosis(tuple(found))


def _within(patient: Workdir, features: int, devices: Sequence[Any] | None) -> list[Problem]:
    """The checks that need the catalog; those of what was built only over sound records."""
    found = []
    for part, check in (("requests", _requests), ("records", _records), ("images", _images)):
        found += run_check(part, lambda check=check: check(patient))
    if any(f.part == "records" and f.state == "wrong" for f in found):
        return found
    if patient.catalog.get("dataset") is None or not patient.layout.backbone.exists():
        if patient.catalog.manifest() is None:
            return [*found, Problem("backbone", "the workdir is not complete yet", "lmeraser train goes on", "note")]
    from lmeraser_jax.unlearning import checkup

    return found + checkup.examine(patient, features, devices)


def run_check(part: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    """The findings of a check; one that damaged data stop short is a finding itself."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:  # damaged data may make a reader raise anything
        found.append(Problem(part, f"cannot be checked: {type(error).__name__}: {error}"))
    return found


def _busy(layout: Layout) -> Problem | None:
    """The writer that works in the workdir now; what is unfinished then is not damaged."""
    if not layout.lock.is_file():
        return None
    with open(layout.lock, encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "another process"
            return Problem("lock", f"the workdir is being written by {holder}", "run this command when it has ended")
    return None


def _stale_lock(layout: Layout, fix: bool) -> Iterator[Problem]:
    text = layout.lock.read_text(encoding="utf-8", errors="replace").strip() if layout.lock.is_file() else ""
    if text:
        remedy = "removed" if fix else "no harm: the next command that writes replaces it"
        yield Problem("lock", f"{text[:100]!r} has ended without closing the lock", remedy, "fixed" if fix else "note")


def _links(layout: Layout) -> Iterator[Problem]:
    for path in _inside(layout.root):
        if path.is_symlink():
            remedy = "put the file itself there: an erasure must reach what is stored"
            yield Problem("folder", f"{path.relative_to(layout.root)} is a symbolic link", remedy)


def _modes(layout: Layout, fix: bool) -> Iterator[Problem]:
    paths = [layout.root, *(path for path in _inside(layout.root) if not path.is_symlink())]
    loose = [path for path in paths if path.stat().st_mode & OPEN_TO_OTHERS]
    if loose and fix:
        for path in loose:
            path.chmod(path.stat().st_mode & 0o777 & ~OPEN_TO_OTHERS)
    if loose:
        names = join_limited([path.relative_to(layout.root) for path in loose], 3)
        remedy = "closed to them" if fix else "--fix closes them; they hold private images"
        yield Problem("folder", f"open to other users: {names}", remedy, "fixed" if fix else "note")


def _unfinished(layout: Layout, fix: bool) -> Iterator[Problem]:
    """What a killed writer leaves: temporary files, replaced folders, scratch."""
    for path in list(_inside(layout.root)):
        name = path.name
        if not (name.startswith(".") and name.endswith((".tmp", ".old"))) or path.parent.name.startswith("."):
            continue
        final = path.with_name(name[1:-4])
        if name.endswith(".old") and not final.exists():
            what = f"{path.relative_to(layout.root)} is all that is left of {final.name}"
            if fix:
                os.replace(path, final)
            yield Problem("folder", what, "put back" if fix else "--fix puts it back", "fixed" if fix else "wrong")
        else:
            yield _removed(layout, path, "left by a killed writer", fix)
    scratch = list(layout.scratch.iterdir()) if layout.scratch.is_dir() else []
    pretraining = [layout.pretraining] if layout.pretraining.exists() and layout.backbone.exists() else []
    for path in [*scratch, *pretraining]:
        yield _removed(layout, path, "left by a killed process", fix)
    for path in schema.old_copies(layout.catalog):
        if path.exists():
            what = f"{path.name} holds the records as they once were"
            yield Problem("folder", what, "the next erasure removes it; delete it when it is not needed", "note")


def _removed(layout: Layout, path: Path, why: str, fix: bool) -> Problem:
    if fix:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    what = f"{path.relative_to(layout.root)} was {why}"
    return Problem("folder", what, "removed" if fix else "--fix removes it", "fixed" if fix else "wrong")


def _inside(root: Path) -> Iterator[Path]:
    """Everything below a folder; links are not followed."""
    for folder, folders, files in os.walk(root):
        for name in sorted([*folders, *files]):
            yield Path(folder) / name


def _config(layout: Layout) -> tuple[Config | None, list[Problem]]:
    remedy = "restore config.json, or run lmeraser train with the experiment's --config=FILE.py"
    try:
        tree = read_config(layout)
        if tree is not None:
            return settings.from_dict(tree), []
        return None, [Problem("config", "config.json is missing", remedy)]
    except UserError as error:
        return None, [Problem("config", f"config.json cannot be used: {error}", f"{remedy} after deleting it")]


def _catalog(layout: Layout, fix: bool) -> Iterator[Problem]:
    damages = salvage.damages(layout.catalog)
    if not damages:
        with contextlib.closing(salvage.reading(layout.catalog)) as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
        if version != schema.VERSION and not fix:
            what = f"the catalog is an older release's (version {version})"
            yield Problem("catalog", what, "--fix or the next command that writes brings it up to this one's")
        return
    what = f"the catalog is damaged: {'; '.join(damages)}"
    lost = salvage.lost(layout.catalog)
    if lost:
        yield Problem(
            "catalog", what, f"restore it from a copy of the workdir: {join_limited(lost)} cannot be read whole"
        )
    elif not fix:
        yield Problem("catalog", what, "--fix recovers it: all that cannot be computed again is whole")
    else:
        built = salvage.recover(layout.catalog)
        remedy = f"recovered; the damaged file is {schema.damaged_of(layout.catalog).name} until the next erasure"
        remedy += "" if built else "; lmeraser train tunes and publishes again"
        yield Problem("catalog", what, remedy, "fixed" if built else "dropped")


def _requests(patient: Workdir) -> Iterator[Problem]:
    catalog = patient.catalog
    open_ = requests.listed(catalog, only_open=True)
    if open_:
        remedy = f"lmeraser process --workdir={patient.layout.root} serves them"
        yield Problem("requests", f"waiting erasures: {join_limited([r.id for r in open_])}", remedy, "note")
    buried = {row[0] for row in catalog.db.execute("SELECT hash FROM tombstones")}
    for request in requests.listed(catalog):
        if not buried.issuperset(request.body["records"]):
            remedy = "restore the catalog from a copy: what was erased could be imported again"
            yield Problem("requests", f"{request.id}: its erased ids are not remembered", remedy)
    forgotten = [name for name in catalog.erased() if not catalog.is_tombstoned(name)]
    if forgotten:
        what = f"erased records without a trace of their erasure, or another salt: {join_limited(forgotten, LISTED)}"
        yield Problem("requests", what, "restore the catalog from a copy")


def _records(patient: Workdir) -> Iterator[Problem]:
    """Values of the records table that no import writes."""
    catalog, found = patient.catalog, []
    classes = len((catalog.get("dataset") or {"classes": ()})["classes"])
    for name, label in catalog.db.execute("SELECT id,label FROM records"):
        if type(label) is not int or not 0 <= label < classes:
            found.append(f"{name}={label!r}")
    remedy = "restore the catalog from a copy, or erase these records"
    if found:
        yield Problem(
            "records", f"labels that are none of the {classes} classes: {join_limited(found, LISTED)}", remedy
        )
    beyond = [row[0] for row in catalog.db.execute("SELECT id FROM records WHERE row>=?", (catalog.rows_used(),))]
    if beyond:
        remedy = "restore the catalog from a copy; write nothing before: an import would overwrite their images"
        yield Problem("records", f"rows behind the last one that is in use: {join_limited(beyond, LISTED)}", remedy)


def _images(patient: Workdir) -> Iterator[Problem]:
    """The image file's length, every live row against its content hash, and rows that must be empty."""
    layout, catalog, fix = patient.layout, patient.catalog, patient.fix
    if catalog.get("dataset") is None:
        return
    file, rows = image_file(layout, catalog), catalog.rows_used()
    size = layout.images.stat().st_size if layout.images.exists() else 0
    if any(catalog.db.execute("SELECT 1 FROM records WHERE row>=? LIMIT 1", (rows,))):
        return  # the number of rows is wrong: nothing can be said, and nothing may be cut off
    rotten, stale = _compared(catalog, file)
    live = sum(catalog.counts().values())
    if rotten and len(rotten) == live and size:
        remedy = "restore records/images.u8 and catalog.db together from a copy of the workdir"
        yield Problem("images", "no row holds the pixels that the catalog knows", remedy)
        return
    if size > rows * file.row_bytes:
        if fix:
            file.truncate(rows)
        remedy = "removed" if fix else "--fix removes it"
        yield Problem("images", "an interrupted import left rows behind", remedy, "fixed" if fix else "wrong")
    if size < rows * file.row_bytes:
        if fix:
            _lengthened(file, rows)
        remedy = "lengthened with empty rows" if fix else "--fix lengthens it with empty rows"
        what = f"images.u8 holds {size // file.row_bytes} of {rows} rows"
        yield Problem("images", what, f"{remedy}; those that are lost are named below", "fixed" if fix else "wrong")
    if rotten:
        remedy = "lmeraser train --reimport reads them from the source again; or erase them with lmeraser unlearn"
        yield Problem("images", f"pixels that have changed since the import: {join_limited(rotten, LISTED)}", remedy)
    if stale:
        if fix:
            file.overwrite(np.array(stale, np.int64))
        remedy = "overwritten" if fix else "--fix overwrites them"
        what = f"rows of no record hold pixels: {join_limited(stale)}"
        yield Problem("images", what, remedy, "fixed" if fix else "wrong")


def _compared(catalog: Catalog, file: RowFile) -> tuple[list[str], list[int]]:
    """Ids of live records whose row is lost or has other pixels, and rows of no record that are not empty."""
    known = catalog.db.execute("SELECT row,id,content,erased FROM records ORDER BY row").fetchall()
    there, owned, rotten = len(file), {row[0] for row in known}, []
    view = file.view() if there else np.zeros((0, *file.shape), np.uint8)
    with progress("images", len(known)) as shown:
        for row, name, content, erased in known:
            if not erased and (row >= there or content_hash(view[row]) != content):
                rotten.append(name)
            shown.advance(1)
    stale = [row for row in range(min(there, catalog.rows_used())) if row not in owned and view[row].any()]
    return rotten, stale


def _lengthened(file: RowFile, rows: int) -> None:
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with open(file.path, "ab") as raw:
        raw.truncate(rows * file.row_bytes)
        os.fsync(raw.fileno())
