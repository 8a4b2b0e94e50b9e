"""The catalog's tables, how its file is opened, and what is said of one that cannot be used."""

import contextlib
import json
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from lmeraser_jax.errors import UserError

VERSION = 5
SMALLEST = 512  # bytes of an SQLite file; shorter ones SQLite takes for a new, empty one
SHOWN = 5  # lines of SQLite's own check in a message
LONGEST_WAIT = 30.0  # seconds to wait for another process's transaction
TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records(
  row INTEGER PRIMARY KEY, -- of the image file
  id TEXT NOT NULL, split TEXT NOT NULL, label INTEGER NOT NULL,
  owner TEXT NOT NULL, content BLOB NOT NULL, cluster INTEGER NOT NULL DEFAULT 0,
  erased TEXT NOT NULL DEFAULT '', -- the request that erased it, or replaced it under the same id; empty: live
  rank BLOB NOT NULL DEFAULT x'', -- keyed hash that decides who is sampled
  UNIQUE(id, erased)
);
CREATE TABLE clusters(number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE); -- the published keys of records
INSERT INTO clusters VALUES(0,''); -- of records in no cluster yet
CREATE INDEX records_owner ON records(owner) WHERE owner!='';
CREATE INDEX records_content ON records(content);
CREATE INDEX records_cluster ON records( -- covers what a plan reads of a cluster's members
  cluster, id, label, owner, content
) WHERE split='train' AND erased='';
CREATE INDEX records_rank ON records(split, rank);
CREATE INDEX records_erased ON records(erased) WHERE erased!='';
CREATE TABLE edits( -- what takes the place of records that requests replaced; the next build makes it live
  id TEXT PRIMARY KEY, request TEXT NOT NULL, label INTEGER NOT NULL, content TEXT NOT NULL, bytes BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE tombstones(hash TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE slices(
  digest TEXT PRIMARY KEY, cluster TEXT NOT NULL, params_digest TEXT NOT NULL, size INTEGER NOT NULL,
  images INTEGER NOT NULL, steps INTEGER NOT NULL, loss REAL, seconds REAL NOT NULL, fingerprint TEXT NOT NULL,
  created REAL NOT NULL, tuning TEXT NOT NULL DEFAULT '',
  clustering TEXT NOT NULL DEFAULT '' -- the last one that called for it: its sample decided who the members are
) WITHOUT ROWID;
CREATE TABLE epochs(
  slice TEXT NOT NULL, step INTEGER NOT NULL, params_digest TEXT NOT NULL, PRIMARY KEY(slice, step)
) WITHOUT ROWID;
CREATE TABLE members(slice TEXT PRIMARY KEY, rows BLOB NOT NULL); -- int32 [m], image rows, ascending
CREATE TABLE manifests(
  version INTEGER PRIMARY KEY AUTOINCREMENT, created REAL NOT NULL, clustering TEXT NOT NULL, fingerprint TEXT NOT NULL,
  recipe_constants_digest TEXT NOT NULL DEFAULT ''
);
CREATE TABLE entries(
  version INTEGER NOT NULL, cluster TEXT NOT NULL, slice TEXT NOT NULL, PRIMARY KEY(version, cluster)
) WITHOUT ROWID;
CREATE INDEX entries_slice ON entries(slice);
CREATE TABLE pins(cluster TEXT PRIMARY KEY, slice TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine(cluster TEXT NOT NULL, request TEXT NOT NULL, PRIMARY KEY(cluster, request)) WITHOUT ROWID;
CREATE TABLE requests(
  id TEXT PRIMARY KEY, created REAL NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX requests_open ON requests(created) WHERE state!='purged';
CREATE TABLE receipts(sequence INTEGER PRIMARY KEY, request TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE events(at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL);
"""


def connect(path: Path) -> tuple[sqlite3.Connection, tuple[int, ...] | None]:
    """Opens a catalog; also one in a folder that this process cannot write to.

    Returns:
        The connection, and None. Where SQLite cannot follow a writer, because the index of its log cannot be made or
        read, the connection shows this moment only, and `file_stamp` stands in the place of None.

    Raises:
        UserError: a writer's log is there and cannot be read, so that the file alone would show an old state.
    """
    if not path.exists() or os.access(path.parent, os.W_OK):
        return _open(path, "rwc"), None
    db = _open(path, "ro")
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db, None
    except sqlite3.OperationalError:
        db.close()
    stamp = file_stamp(path)
    if stamp[-1]:
        raise UserError(
            f"{path} is being written by another process, and its log cannot be read in a folder that this process"
            " cannot write to; try again when the writer has finished, or get write access to the folder"
        )
    return _open(path, "ro&immutable=1"), stamp


def _open(path: Path, mode: str) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(address, uri=True, timeout=LONGEST_WAIT, isolation_level=None)


def file_stamp(path: Path) -> tuple[int, ...]:
    """Time and size of a catalog's file, size of its log."""
    file, log = path.stat(), path.with_name(f"{path.name}-wal")
    return file.st_mtime_ns, file.st_size, log.stat().st_size if log.exists() else 0


def refuse_change(path: Path, stamp: tuple[int, ...] | None) -> None:
    """Raises `UserError` where a connection shows one moment only (`connect`) and the catalog has changed since."""
    if stamp is not None and file_stamp(path) != stamp:
        raise UserError(
            f"{path} was changed; this process cannot write to its folder and so cannot follow changes: open it again,"
            " or let it write to the folder of the workdir"
        )


def create(db: sqlite3.Connection) -> None:
    """Makes all tables in one transaction, with a fresh salt for the hashes of erased ids."""
    db.execute("PRAGMA journal_mode=WAL")
    salt = f"INSERT INTO meta VALUES('salt','{json.dumps(secrets.token_hex(16))}');"
    db.executescript(f"BEGIN;{TABLES}{salt}PRAGMA user_version={VERSION};COMMIT;")


def refuse_other_version(db: sqlite3.Connection, path: Path) -> None:
    """Raises `UserError` unless a catalog has the tables of this release."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise UserError(
            f"{path} has catalog version {version}; this release reads version {VERSION} only: use the release that"
            " made the workdir, or train again in a new --workdir"
        )


def damages(path: Path) -> list[str]:
    """What is positively wrong with a catalog file, one line each. Writes nothing.

    Raises:
        OSError, sqlite3.OperationalError: the file could not be looked at, because of a lock or an error of the disk.
        UserError: it is of another release.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return [f"{path.name} is no file"]
    if path.stat().st_size < SMALLEST:
        return [f"{path.name} is no SQLite file"]
    mode = "ro" if os.access(path.parent, os.W_OK) else "ro&immutable=1"
    try:
        with contextlib.closing(_open(path, mode)) as db:
            lines = [" ".join(row[0].split()) for row in db.execute(f"PRAGMA integrity_check({SHOWN})")]
            if lines != ["ok"]:
                path.read_bytes()  # SQLite's check calls a page damaged, too, that the disk did not give
                return lines
            refuse_other_version(db, path)
            for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
                for _ in db.execute(f"SELECT * FROM {table}"):  # raises at text that is no UTF-8
                    pass
            counts = {}
            for table, column in (("meta", "value"), ("requests", "body"), ("events", "body")):
                (counts[table],) = db.execute(f"SELECT count(*) FROM {table} WHERE NOT json_valid({column})").fetchone()
            return [f"{count} rows of {table} hold no JSON" for table, count in counts.items() if count]
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "UTF-8" not in str(error):
            raise
        return [str(error)]


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says which file is damaged or locked, and what can be done, instead of SQLite's own words."""
    try:
        yield
    except sqlite3.OperationalError as error:
        locked = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in locked:  # full disk: the command line says it
            raise
        raise UserError(
            f"{path} is locked by another process, which has been writing to it for too long; let it finish or end it"
            " (lmeraser doctor names a writer of the workdir, and fuser any process that has the file open), then run"
            " the same command again: nothing was changed"
        ) from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is not a readable catalog: {error}; restore it from a copy of the workdir") from error
