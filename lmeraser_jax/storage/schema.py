"""The catalog's tables, and how a catalog of an older release becomes one of this release."""

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from lmeraser_jax.errors import UserError

VERSION = 2
LONGEST_WAIT = 30.0  # seconds for another process's transaction
TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records(
  id TEXT PRIMARY KEY, row INTEGER NOT NULL UNIQUE, split TEXT NOT NULL, label INTEGER NOT NULL,
  owner TEXT NOT NULL, content TEXT NOT NULL, cluster TEXT NOT NULL DEFAULT '',
  erased TEXT NOT NULL DEFAULT '', -- the request that erased it; empty: live
  rank BLOB NOT NULL DEFAULT x'' -- keyed hash that decides who is sampled
) WITHOUT ROWID;
CREATE INDEX records_owner ON records(owner);
CREATE INDEX records_content ON records(content);
CREATE INDEX records_cluster ON records( -- covers what a plan reads of a cluster's members
  split, cluster, erased, id, row, label, owner, content
);
CREATE INDEX records_rank ON records(split, rank);
CREATE INDEX records_erased ON records(erased) WHERE erased!='';
CREATE TABLE tombstones(hash TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE slices(
  digest TEXT PRIMARY KEY, cluster TEXT NOT NULL, params_digest TEXT NOT NULL, size INTEGER NOT NULL,
  images INTEGER NOT NULL, steps INTEGER NOT NULL, loss REAL, seconds REAL NOT NULL, fingerprint TEXT NOT NULL,
  created REAL NOT NULL, parent TEXT NOT NULL DEFAULT '', tuning TEXT NOT NULL DEFAULT '',
  clustering TEXT NOT NULL DEFAULT '' -- the last one that called for it: its sample decided who the members are
) WITHOUT ROWID;
CREATE TABLE epochs(
  slice TEXT NOT NULL, step INTEGER NOT NULL, params_digest TEXT NOT NULL, PRIMARY KEY(slice, step)
) WITHOUT ROWID;
CREATE TABLE members(slice TEXT NOT NULL, row INTEGER NOT NULL, PRIMARY KEY(slice, row)) WITHOUT ROWID;
CREATE INDEX members_row ON members(row);
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
FROM_1 = """
ALTER TABLE records RENAME TO records_1;
ALTER TABLE slices RENAME TO slices_1;
ALTER TABLE manifests RENAME TO manifests_1;
ALTER TABLE requests RENAME TO requests_1;
DROP INDEX records_owner;
{new}
INSERT INTO records(id, row, split, label, owner, content, cluster, erased)
  SELECT id, row, split, label, owner, content, cluster, CASE erased WHEN 0 THEN '' ELSE
    coalesce((SELECT id FROM requests_1 WHERE state!='purged' ORDER BY created DESC LIMIT 1), 'before-version-2') END
  FROM records_1;
INSERT INTO slices(digest, cluster, params_digest, size, images, steps, loss, seconds, fingerprint, created)
  SELECT * FROM slices_1;
INSERT INTO manifests(version, created, clustering, fingerprint) SELECT * FROM manifests_1;
INSERT INTO requests SELECT * FROM requests_1;
DROP TABLE records_1;
DROP TABLE slices_1;
DROP TABLE manifests_1;
DROP TABLE requests_1;
"""
UNCHANGED_SINCE_1 = ("meta", "tombstones", "members", "entries", "events", "members_row")


def connect(path: Path) -> tuple[sqlite3.Connection, tuple[int, ...] | None]:
    """Opens a catalog; also one in a folder that this process cannot write to.

    Returns:
        The connection. And None; or, where SQLite cannot follow a writer because the log's index cannot be made or
        read, what `look` says of the file: the connection shows that moment only.

    Raises:
        UserError: a writer's log is there and cannot be read, so that the file alone would show an old state.
    """
    address = path.absolute().as_uri()
    if not path.exists() or os.access(path.parent, os.W_OK):
        return sqlite3.connect(address, uri=True, timeout=LONGEST_WAIT, isolation_level=None), None
    db = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=LONGEST_WAIT, isolation_level=None)
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db, None
    except sqlite3.OperationalError:
        db.close()
    seen = look(path)
    if seen[-1]:
        raise UserError(
            f"{path} is being written by another process, and its log cannot be read in a folder that this process"
            " cannot write to; try again when the writer has finished, or get write access to the folder"
        )
    return sqlite3.connect(f"{address}?mode=ro&immutable=1", uri=True, isolation_level=None), seen


def look(path: Path) -> tuple[int, ...]:
    """Time and size of a catalog's file, size of its log."""
    file, log = path.stat(), path.with_name(f"{path.name}-wal")
    return file.st_mtime_ns, file.st_size, log.stat().st_size if log.exists() else 0


def refuse_change(path: Path, seen: tuple[int, ...] | None) -> None:
    """Raises `UserError` where a connection shows one moment only (`connect`) and the catalog has changed since."""
    if seen is not None and look(path) != seen:
        raise UserError(
            f"{path} was changed; this process cannot write to its folder and so cannot follow changes: open it again,"
            " or let it write to the folder of the workdir"
        )


def create(db: sqlite3.Connection) -> None:
    """Makes all tables in one transaction, with a fresh salt for the hashes of erased ids."""
    db.execute("PRAGMA journal_mode=WAL")
    salt = f"INSERT INTO meta VALUES('salt','{json.dumps(secrets.token_hex(16))}');"
    db.executescript(f"BEGIN;{TABLES}{salt}PRAGMA user_version={VERSION};COMMIT;")


def backup_of(path: Path) -> Path:
    """Where the copy made before a migration lies; the next purge removes it."""
    return path.with_name(f"{path.name}.backup")


def damaged_of(path: Path) -> Path:
    """Where a damaged catalog lies after its records were recovered; the next purge removes it."""
    return path.with_name(f"{path.name}.damaged")


def old_copies(path: Path) -> list[Path]:
    """Files beside the catalog that hold records as they once were."""
    damaged = damaged_of(path)
    return [backup_of(path), damaged, damaged.with_name(f"{damaged.name}-wal")]


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Brings an older catalog to this release's tables in one transaction, after a copy of it was made.

    Raises:
        UserError: the catalog is of a release that is not known here.
    """
    if _version(db) == VERSION:
        return
    try:
        db.execute("BEGIN IMMEDIATE")
        version = _version(db)  # another process may have been faster
        if version == 1:
            _copy(path, backup_of(path))
            new = ";\n".join(text for text in _statements(TABLES) if not _made_by_1(text)) + ";"
            for statement in _statements(FROM_1.format(new=new)):  # executescript() would commit first
                db.execute(statement)
            db.execute(f"PRAGMA user_version={VERSION}")
            db.execute("COMMIT")
        elif version != VERSION:
            raise UserError(f"{path} has catalog version {version}; this release reads versions 1 to {VERSION}")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _copy(path: Path, to: Path) -> None:
    """A copy of a catalog as it is committed, for its owner only."""
    to.touch(mode=0o600)
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(to)) as copy:
        source.backup(copy)


def _statements(script: str) -> list[str]:
    return [text.strip() for text in script.split(";\n") if text.strip()]


def _made_by_1(statement: str) -> bool:
    name = statement.split("(")[0].split()[2]
    return name in UNCHANGED_SINCE_1


def is_locked(error: sqlite3.Error) -> bool:
    """Whether SQLite gave up waiting for another process."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says which file is damaged or locked, and what can be done, instead of SQLite's own words."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if not is_locked(error):  # full disk, not readable: the command line says it
            raise
        raise UserError(
            f"{path} is locked by another process, which has been writing to it for too long; let it finish or end it"
            " (lmeraser doctor names a writer of the workdir, and fuser any process that has the file open), then run"
            " the same command again: nothing was changed"
        ) from error
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path} is not a readable catalog: {error}; restore it from a copy of the workdir, or try"
            f" lmeraser doctor --workdir={path.parent}"
        ) from error
