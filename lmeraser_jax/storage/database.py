"""A connection to the catalog's SQLite file: transactions, snapshots, single values, events, salted hashes."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import keyed_hash
from lmeraser_jax.storage import schema
from lmeraser_jax.storage.rows import SliceRow


class Database:
    """A connection to the catalog of one workdir. Readers are never blocked by the writer (WAL)."""

    def __init__(self, path: Path):
        if path.is_dir() or (path.is_file() and 0 < path.stat().st_size < schema.SMALLEST):
            raise UserError(f"{path} is not a readable catalog: it is a folder or too short")
        self.path = path
        with contextlib.ExitStack() as undo, schema.readable(path):
            self.db, self._frozen = schema.connect(path)
            undo.callback(self.db.close)
            self.db.execute("PRAGMA secure_delete=ON")
            self.db.execute("PRAGMA synchronous=FULL")
            if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():  # new, or killed while it was made
                schema.create(self.db)
            schema.refuse_other_version(self.db, path)
            self.salt: str = self.get("salt")
            self.reading = False
            self._slices: dict[str, SliceRow] | None = None  # as of `_slices_version`
            self._slices_version = 0
            undo.pop_all()

    def close(self) -> None:
        self.db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nests into an outer transaction."""
        assert not self.reading, "a snapshot is undone at its end, and what is written in it with it"
        if self.db.in_transaction:
            yield
            return
        with schema.readable(self.path):
            self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            self._slices = None
            if self.db.in_transaction:  # SQLite has rolled back by itself when the disk is full
                self.db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one moment, whatever other processes commit meanwhile. No writes."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN")
        self.reading = True
        try:
            yield
        finally:
            self.reading = False
            self.db.execute("ROLLBACK")

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """A transaction that is undone at its end, to read what a change would lead to."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            self.db.execute("ROLLBACK")

    def stamp(self) -> tuple[int, int]:
        """Changes with every commit of any connection; raises `UserError` where none can be seen (`schema.connect`)."""
        schema.refuse_change(self.path, self._frozen)
        return self.db.execute("PRAGMA data_version").fetchone()[0], self.db.total_changes

    def flush(self) -> None:
        """Empties the log, where old pages would linger. Raises `UserError` while another process keeps reading."""
        if self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise UserError(
                "another process has been reading the catalog for too long, so that old pages could not be removed yet;"
                " the erasure is published but not purged: run lmeraser process on the workdir again"
            )

    # meta and events
    def get(self, key: str) -> Any:
        """A value of the meta table, or None."""
        row = self.db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def set(self, key: str, value: object) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (key, json.dumps(value)))

    def event(self, kind: str, **body: object) -> None:
        self.db.execute("INSERT INTO events VALUES(?,?,?)", (time.time(), kind, json.dumps(body, sort_keys=True)))

    def salted(self, purpose: str, name: str) -> str:
        """A keyed hash that recognises a name without saying it: the salt never leaves the catalog."""
        return keyed_hash(self.salt, purpose, name).hex()
