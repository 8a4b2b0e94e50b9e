"""The catalog: one SQLite file that says what is live, what is published and what was asked for.

It is the only source of truth. Files are written first; a change becomes true in one transaction here.
"""

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.digests import keyed_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.records.source import Item
from lmeraser_jax.records.table import RecordTable

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE records(
  id TEXT PRIMARY KEY, row INTEGER NOT NULL UNIQUE, split TEXT NOT NULL, label INTEGER NOT NULL,
  owner TEXT NOT NULL, content TEXT NOT NULL, cluster TEXT NOT NULL DEFAULT '', erased INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX records_owner ON records(owner);
CREATE TABLE tombstones(hash TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE slices(
  digest TEXT PRIMARY KEY, cluster TEXT NOT NULL, params TEXT NOT NULL, size INTEGER NOT NULL,
  images INTEGER NOT NULL, steps INTEGER NOT NULL, loss REAL, seconds REAL NOT NULL, program TEXT NOT NULL,
  created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE members(slice TEXT NOT NULL, row INTEGER NOT NULL, PRIMARY KEY(slice, row)) WITHOUT ROWID;
CREATE INDEX members_row ON members(row);
CREATE TABLE manifests(
  version INTEGER PRIMARY KEY AUTOINCREMENT, created REAL NOT NULL, clustering TEXT NOT NULL, program TEXT NOT NULL
);
CREATE TABLE entries(
  version INTEGER NOT NULL, cluster TEXT NOT NULL, slice TEXT NOT NULL, PRIMARY KEY(version, cluster)
) WITHOUT ROWID;
CREATE TABLE requests(
  id TEXT PRIMARY KEY, created REAL NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE events(at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL);
"""


class SliceRow(NamedTuple):
    """What the catalog knows of one trained slice."""

    digest: str
    cluster: str
    params: str  # digest of the parameters' bytes
    size: int  # members
    images: int  # passed forward and backward
    steps: int
    loss: float | None  # mean over the last epoch
    seconds: float  # its share of the device time
    program: str  # fingerprint of the program that made it
    created: float


class Manifest(NamedTuple):
    """A published state: clustering digest, fingerprint of the program, {cluster key: slice digest}."""

    version: int
    created: float
    clustering: str
    program: str
    entries: dict[str, str]


class Catalog:
    """A connection to the catalog of one workdir. Readers are never blocked by the writer (WAL)."""

    def __init__(self, path: Path):
        if path.is_dir() or (path.is_file() and 0 < path.stat().st_size < 512):  # SQLite takes that for an empty one
            raise UserError(f"{path} is not a readable catalog: it is a folder or too short")
        with contextlib.ExitStack() as undo:
            try:
                read_only = path.exists() and not os.access(path.parent, os.W_OK)
                how = "?mode=ro&immutable=1" if read_only else ""  # a file system that nobody can write to
                self.db = sqlite3.connect(path.absolute().as_uri() + how, uri=True, timeout=30, isolation_level=None)
                undo.callback(self.db.close)
                self.db.execute("PRAGMA secure_delete=ON")
                self.db.execute("PRAGMA synchronous=FULL")
                if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():  # new, or killed while it was made
                    self.db.execute("PRAGMA journal_mode=WAL")
                    salt = f"INSERT INTO meta VALUES('salt','\"{secrets.token_hex(16)}\"');"
                    self.db.executescript(f"BEGIN;{SCHEMA}{salt}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
                version = self.db.execute("PRAGMA user_version").fetchone()[0]
            except sqlite3.OperationalError:  # full disk, locked, not readable: the command line says it
                raise
            except sqlite3.DatabaseError as error:
                raise UserError(f"{path} is not a readable catalog: {error}") from error
            if version != SCHEMA_VERSION:
                raise UserError(f"{path} has catalog version {version}; this release reads version {SCHEMA_VERSION}")
            undo.pop_all()

    def close(self) -> None:
        self.db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nests into an outer transaction."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # SQLite has rolled back by itself when the disk is full
                self.db.execute("ROLLBACK")
            raise

    # meta and events
    def get(self, key: str) -> Any:
        """A value of the meta table, or None."""
        row = self.db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def set(self, key: str, value: object) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (key, json.dumps(value)))

    def event(self, kind: str, **body: object) -> None:
        self.db.execute("INSERT INTO events VALUES(?,?,?)", (time.time(), kind, json.dumps(body, sort_keys=True)))

    # records
    def add_records(self, items: Sequence[Item], rows: Sequence[int], contents: Sequence[str]) -> None:
        self.db.executemany(
            "INSERT INTO records(id,split,label,owner,row,content) VALUES(?,?,?,?,?,?)",
            [(*item, row, content) for item, row, content in zip(items, rows, contents, strict=True)],
        )

    def live(self, *splits: str) -> RecordTable:
        """The live records of the given splits, sorted by id."""
        marks = ",".join("?" * len(splits))
        found = self.db.execute(
            "SELECT id,row,label,owner,content,cluster FROM records"
            f" WHERE erased=0 AND split IN ({marks}) ORDER BY id COLLATE BINARY",
            splits,
        ).fetchall()
        ids, rows, labels, owners, contents, clusters = zip(*found, strict=True) if found else ((),) * 6
        return RecordTable(ids, np.array(rows, np.int64), np.array(labels, np.int32), owners, contents, clusters)

    def rows_used(self) -> int:
        """Rows of the image file that belong to a record or to an erased one's place."""
        return self.get("rows") or 0

    def known(self, ids: Iterable[str]) -> dict[str, tuple[str, str, int, bool]]:
        """{id: (split, content, label, erased)} of those ids that the catalog holds."""
        found = {}
        for name in ids:
            row = self.db.execute("SELECT split,content,label,erased FROM records WHERE id=?", (name,)).fetchone()
            if row:
                found[name] = (row[0], row[1], row[2], bool(row[3]))
        return found

    def owned(self, owner: str) -> list[str]:
        """Ids of one owner's records, sorted: all but public ones; also erased ones that are not purged yet."""
        query = "SELECT id FROM records WHERE owner=? AND split!='public' ORDER BY id"
        return [row[0] for row in self.db.execute(query, (owner,))]

    def erase(self, ids: Iterable[str]) -> None:
        """Marks records erased and leaves tombstones: from here on no build may see them."""
        for name in ids:
            self.db.execute("UPDATE records SET erased=1 WHERE id=?", (name,))
            self.db.execute("INSERT OR IGNORE INTO tombstones VALUES(?)", (self.tombstone(name),))

    def erased(self) -> dict[str, int]:
        """{id: row} of records that are erased but not yet purged."""
        return dict(self.db.execute("SELECT id,row FROM records WHERE erased=1"))

    def forget(self, ids: Iterable[str]) -> None:
        """Removes the rows of erased records; their tombstones stay."""
        self.db.executemany("DELETE FROM records WHERE id=? AND erased=1", [(name,) for name in ids])

    def tombstone(self, name: str) -> str:
        """Salted hash of an id: says "erased before" without saying what."""
        return keyed_hash(self.get("salt"), "tombstone", name).hex()

    def is_tombstoned(self, name: str) -> bool:
        return bool(self.db.execute("SELECT 1 FROM tombstones WHERE hash=?", (self.tombstone(name),)).fetchone())

    # slices and manifests
    def add_slice(self, row: SliceRow, rows: Iterable[int]) -> None:
        """Registers a slice whose checkpoint is on disk, with the image rows of its members."""
        self.db.execute(f"INSERT OR REPLACE INTO slices VALUES({','.join('?' * len(row))})", row)
        self.db.executemany("INSERT OR REPLACE INTO members VALUES(?,?)", [(row.digest, int(r)) for r in rows])

    def slice(self, digest: str) -> SliceRow | None:
        row = self.db.execute("SELECT * FROM slices WHERE digest=?", (digest,)).fetchone()
        return SliceRow(*row) if row else None

    def slices(self) -> dict[str, SliceRow]:
        return {row[0]: SliceRow(*row) for row in self.db.execute("SELECT * FROM slices")}

    def drop_slice(self, digest: str) -> None:
        self.db.execute("DELETE FROM slices WHERE digest=?", (digest,))
        self.db.execute("DELETE FROM members WHERE slice=?", (digest,))

    def tainted_slices(self) -> list[str]:
        """Digests of slices that an erased record was a member of."""
        query = "SELECT DISTINCT slice FROM members JOIN records USING(row) WHERE erased=1 ORDER BY slice"
        return [row[0] for row in self.db.execute(query)]

    def manifest(self) -> Manifest | None:
        """The published state, or None before the first."""
        return next(iter(self.manifests()), None)

    def manifests(self) -> list[Manifest]:
        """All states that are still kept, newest first."""
        heads = self.db.execute("SELECT version,created,clustering,program FROM manifests ORDER BY version DESC")
        query = "SELECT cluster,slice FROM entries WHERE version=? ORDER BY cluster"
        return [Manifest(*head, entries=dict(self.db.execute(query, head[:1]))) for head in heads.fetchall()]

    def publish(
        self, clustering: str, program: str, entries: dict[str, str], clusters: Iterable[tuple[str, str]]
    ) -> int:
        """Makes a state the current one: manifest entries and each record's cluster, given as (id, key)."""
        head = (time.time(), clustering, program)
        cursor = self.db.execute("INSERT INTO manifests(created,clustering,program) VALUES(?,?,?)", head)
        version = int(cursor.lastrowid or 0)
        self.db.executemany(
            "INSERT INTO entries VALUES(?,?,?)", [(version, *entry) for entry in sorted(entries.items())]
        )
        self.db.executemany("UPDATE records SET cluster=? WHERE id=?", [(key, name) for name, key in clusters])
        return version

    def drop_manifest(self, version: int) -> None:
        self.db.execute("DELETE FROM entries WHERE version=?", (version,))
        self.db.execute("DELETE FROM manifests WHERE version=?", (version,))

    # requests
    def set_request(self, name: str, state: str, body: dict[str, Any]) -> None:
        created = time.time()
        self.db.execute(
            "INSERT INTO requests VALUES(?,?,?,?)"
            " ON CONFLICT(id) DO UPDATE SET state=excluded.state,body=excluded.body",
            (name, created, state, json.dumps(body, sort_keys=True)),
        )

    def open_requests(self) -> dict[str, dict[str, Any]]:
        """Requests that are not purged yet, oldest first."""
        query = "SELECT id,body FROM requests WHERE state!='purged' ORDER BY created,id"
        return {row[0]: json.loads(row[1]) for row in self.db.execute(query)}
