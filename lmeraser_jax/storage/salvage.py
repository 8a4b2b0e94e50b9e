"""A catalog that SQLite cannot read whole: what is wrong with it, and what can be taken over into a new one.

What cannot be computed again (records, tombstones, requests, receipts, ...) is taken over only if all of it is
there. Slices and manifests can be tuned and published again, so they are left behind together if one is damaged.
"""

import contextlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from lmeraser_jax.storage import schema
from lmeraser_jax.storage.atomic_files import sync_folder

NEEDED = ("meta", "records", "tombstones", "pins", "quarantine", "requests", "receipts")
BUILT = ("slices", "epochs", "members", "manifests", "entries")
SQLITE = b"SQLite format 3\0"
SHOWN = 5  # lines of SQLite's own check in a message


def damages(path: Path) -> list[str]:
    """What is wrong with a catalog file: one line each. Reads only.

    Raises:
        UserError: another process keeps it locked.
    """
    if path.is_dir() or not path.exists():
        return [f"{path.name} is {'a folder' if path.is_dir() else 'missing'}"]
    with open(path, "rb") as file:
        if path.stat().st_size < 512 or file.read(len(SQLITE)) != SQLITE:
            return [f"{path.name} is no SQLite file"]
    try:
        with contextlib.closing(reading(path)) as db:
            return _damages(db)
    except sqlite3.Error as error:
        if schema.is_locked(error):
            with schema.readable(path):
                raise
        return [f"{path.name} cannot be read: {error}"]


def _damages(db: sqlite3.Connection) -> list[str]:
    lines = [row[0] for row in db.execute(f"PRAGMA integrity_check({SHOWN})")]
    if lines != ["ok"]:
        return [" ".join(line.split()) for line in lines]
    if db.execute("PRAGMA user_version").fetchone()[0] == 1:  # an older release's tables
        return []
    found = []
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        schema.create(fresh)
        wanted, there = dict(_objects(fresh)), dict(_objects(db))
    for name in wanted:
        if there.get(name) != wanted[name]:
            found.append(f"the definition of {name} is {'another' if name in there else 'missing'}")
    tables = [name for name in (*NEEDED, *BUILT, "events") if name in there]
    return found + [line for name in tables for line in _unreadable(db, name)] + ([] if found else _odd_meta(db))


def _objects(db: sqlite3.Connection) -> Iterator[tuple[str, object]]:
    """Tables with their columns, indexes, and the version."""
    query = "SELECT name,type FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
    for name, kind in db.execute(query).fetchall():
        yield name, db.execute(f"PRAGMA table_info({name})").fetchall() if kind == "table" else kind
    yield "the version", db.execute("PRAGMA user_version").fetchone()[0]


def _unreadable(db: sqlite3.Connection, table: str) -> list[str]:
    """Text that is none, which the check of the structure does not look at."""
    try:
        for _ in db.execute(f"SELECT * FROM {table}"):
            pass
    except sqlite3.Error as error:
        return [f"{table}: {error}"]
    return []


def _odd_meta(db: sqlite3.Connection) -> list[str]:
    """Values that every other check depends on."""
    found, values = [], {}
    for key, text in db.execute("SELECT key,value FROM meta"):
        try:
            values[key] = json.loads(text)
        except ValueError as error:
            found.append(f"meta {key} is no JSON: {error}")
    salt, rows, dataset = values.get("salt"), values.get("rows", 0), values.get("dataset")
    if not (isinstance(salt, str) and re.fullmatch("[0-9a-f]{32}", salt)):
        found.append("the salt of the erased ids' hashes is missing or not 32 hex digits")
    if type(rows) is not int or rows < 0:
        found.append(f"meta rows is {rows!r}, not a number of rows")
    if dataset is None and db.execute("SELECT 1 FROM records LIMIT 1").fetchone():
        found.append("meta dataset is missing")
    elif dataset is not None and not _sound(dataset):
        found.append("meta dataset does not hold settings, classes, shape and name")
    return found


def _sound(dataset: object) -> bool:
    if not isinstance(dataset, dict):
        return False
    shape, classes, settings = (dataset.get(key) for key in ("shape", "classes", "settings"))
    sides = isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return sides and names and isinstance(settings, dict)


def reading(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing."""
    how = "mode=ro" if os.access(path.parent, os.W_OK) else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=schema.LONGEST_WAIT)


def lost(path: Path) -> list[str]:
    """Tables of a damaged catalog that cannot be computed again and are not whole; none: it can be recovered."""
    try:
        with contextlib.closing(reading(path)) as db:
            return [name for name in NEEDED if not _whole(db, name)] or (["meta"] if _odd_meta(db) else [])
    except (sqlite3.Error, OSError):
        return list(NEEDED)


def _whole(db: sqlite3.Connection, table: str) -> bool:
    """Whether a table and its indexes are sound, all its rows can be read, and it has the columns it should have."""
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        schema.create(fresh)
        wanted = fresh.execute(f"PRAGMA table_info({table})").fetchall()
    try:
        if db.execute(f"PRAGMA table_info({table})").fetchall() != wanted:
            return False
        lines = [row[0] for row in db.execute(f"PRAGMA integrity_check({table})")]
        return lines == ["ok"] and not _unreadable(db, table)
    except sqlite3.Error:
        return False


def recover(path: Path) -> bool:
    """Makes a new catalog of what a damaged one, of which nothing is `lost`, still holds.

    The damaged file is copied beside it first; the new one takes its place in one step.

    Returns:
        Whether slices and manifests were taken over, too.
    """
    assert not lost(path)
    damaged, new = schema.damaged_of(path), path.with_name(f".{path.name}.tmp")
    for suffix in ("-wal", ""):
        source = path.with_name(path.name + suffix)
        if source.exists():
            shutil.copy2(source, damaged.with_name(damaged.name + suffix))
    sync_folder(path.parent)
    new.unlink(missing_ok=True)
    with contextlib.closing(reading(damaged)) as old, contextlib.closing(sqlite3.connect(new)) as db:
        built = all(_whole(old, name) for name in BUILT)
        schema.create(db)
        with db:
            for name in (*NEEDED, *(BUILT if built else ())):
                _copy(old, db, name)
            with contextlib.suppress(sqlite3.Error):  # events are a log: as much of it as there is
                _copy(old, db, "events")
            with contextlib.suppress(sqlite3.Error):  # receipts name versions, so no number is given twice
                for last in old.execute("SELECT seq FROM sqlite_sequence WHERE name='manifests'").fetchall():
                    db.execute("DELETE FROM sqlite_sequence WHERE name='manifests'")
                    db.execute("INSERT INTO sqlite_sequence VALUES('manifests',?)", last)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    damaged.with_name(f"{damaged.name}-shm").unlink(missing_ok=True)
    with open(new, "rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)
    return built


def _copy(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> None:
    rows = old.execute(f"SELECT * FROM {table}")
    marks = ",".join("?" * len(rows.description))
    new.executemany(f"INSERT OR REPLACE INTO {table} VALUES({marks})", rows)
