"""The catalog: one SQLite file that says what is live, what is published and which erasures wait.

It is the only source of truth. Files are written first; a change becomes true in one transaction here.
"""

import contextlib
import json
import operator
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.source import Item
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import keyed_hash
from lmeraser_jax.storage import schema
from lmeraser_jax.storage.rows import Edit, Manifest, ReceiptLink, SliceRow

COLUMNS = "id,row,label,owner,content,cluster"  # of a `RecordTable`
ERASE = "UPDATE records SET erased=? WHERE id=? AND erased=''"


class Catalog:
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

    # records
    def add_records(self, items: Iterable[Item], rows: Iterable[int], contents: Iterable[str]) -> None:
        """New live records. They have a rank in sampling as soon as the catalog has a seed for it (`rank`)."""
        seed = self.get("rank_seed")
        query = "INSERT INTO records(id,split,label,owner,row,content,rank) VALUES(?,?,?,?,?,?,?)"
        for item, row, content in zip(items, rows, contents, strict=True):
            rank = b"" if seed is None else sample_rank(seed, item.id)
            self.db.execute(query, (*item, row, content, rank))

    def rank(self, seed: int) -> None:
        """Makes sure that every record has the rank in sampling that the seed gives it."""
        if self.get("rank_seed") == seed:
            return
        with self.transaction():
            ranks = [(sample_rank(seed, name), name) for name in self._values("SELECT id FROM records")]
            self.db.executemany("UPDATE records SET rank=? WHERE id=?", ranks)
            self.set("rank_seed", seed)

    def sample(self, split: str, count: int, leaving: Collection[str] = ()) -> RecordTable:
        """The `count` live records of a split with the smallest ranks, sorted by id; `leaving` counts as erased.

        Removing a record that is not among them changes nothing; removing one that is admits the next.
        """
        condition = "split=? ORDER BY rank,id LIMIT ?"
        return _table(sorted(self._live(condition, split, count + len(leaving), leaving=leaving)[:count]))

    def live(self, *splits: str) -> RecordTable:
        """The live records of the given splits, sorted by id."""
        return _table(self._live(f"split IN ({','.join('?' * len(splits))}) ORDER BY id", *splits))

    def private_ids(self) -> list[str]:
        """The ids of all live records but public ones."""
        return self._values("SELECT id FROM records WHERE erased='' AND split!='public'")

    def at(self, rows: Iterable[int], erased: bool = False) -> RecordTable:
        """The live private records in the given image rows, or the erased ones, sorted by id."""
        query = f"SELECT {COLUMNS} FROM records WHERE row=? AND split='train' AND (erased!='')=?"
        return _table(sorted(record for row in rows for record in self.db.execute(query, (int(row), erased))))

    def members(self, cluster: str, leaving: Collection[str] = ()) -> RecordTable:
        """The live private records of a published cluster, of "" those in none yet, sorted by id; without `leaving`."""
        return _table(self._live("split='train' AND cluster=? ORDER BY id", cluster, leaving=leaving))

    def _live(self, condition: str, *values: object, leaving: Collection[str] = ()) -> list[tuple[Any, ...]]:
        query = f"SELECT {COLUMNS} FROM records WHERE erased='' AND {condition}"
        return [row for row in self.db.execute(query, values) if row[0] not in leaving]

    def touched(self) -> frozenset[str]:
        """Published clusters of the private records that are erased but not yet purged; "" among them for none."""
        query = "SELECT DISTINCT cluster FROM records INDEXED BY records_erased WHERE erased!='' AND split='train'"
        return frozenset(self._values(query))

    def sizes(self) -> dict[str, int]:
        """{published cluster: live members}; "" counts records that are in none yet."""
        query = "SELECT cluster,count(*) FROM records WHERE split='train' AND erased='' GROUP BY cluster"
        return dict(self.db.execute(query))

    def counts(self) -> dict[str, int]:
        """{split: live records}."""
        return dict(self.db.execute("SELECT split,count(*) FROM records WHERE erased='' GROUP BY split"))

    def clusters_of(self, ids: Iterable[str]) -> dict[str, str]:
        """{id: published cluster} of those ids that are in one, erased or not."""
        return {name: row[0] for name, row in self._by_id("cluster", ids, "AND split='train' AND cluster!=''")}

    def rows_used(self) -> int:
        """Rows of the image file that belong to a record or to an erased one's place."""
        return self.get("rows") or 0

    def free_rows(self) -> np.ndarray:
        """int64 [n]: image rows that belong to no record, ascending: their records were erased and purged."""
        used = np.array(self._values("SELECT row FROM records"), np.int64)
        return np.setdiff1d(np.arange(self.rows_used()), used)

    def known(self, ids: Iterable[str]) -> dict[str, tuple[str, str, int, bool]]:
        """{id: (split, content, label, erased)} of those ids that the catalog holds; of the live version, if any."""
        return {name: (*row[:3], bool(row[3])) for name, row in self._by_id("split,content,label,erased!=''", ids)}

    def rows(self, ids: Iterable[str]) -> dict[str, int]:
        """{id: image row} of those ids that the catalog holds."""
        return {name: row[0] for name, row in self._by_id("row", ids)}

    def _by_id(self, columns: str, ids: Iterable[str], condition: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
        """(id, values of the columns) of those ids that the catalog holds; of the live version, if there is one."""
        query = f"SELECT {columns} FROM records WHERE id=? {condition} ORDER BY erased LIMIT 1"
        for name in ids:
            if row := self.db.execute(query, (name,)).fetchone():
                yield name, row

    def owned(self, owner: str) -> list[str]:
        """Ids of one owner's records, sorted: all but public ones; also erased ones that are not purged yet."""
        return self._values("SELECT DISTINCT id FROM records WHERE owner=? AND split!='public' ORDER BY id", owner)

    def same_pixels(self, content: str) -> list[str]:
        """Ids of private records with this content hash, sorted; also erased ones that have no new version."""
        newer = "SELECT id FROM edits UNION SELECT id FROM records WHERE erased=''"
        query = f"SELECT id FROM records WHERE content=? AND split!='public' AND (erased='' OR id NOT IN ({newer}))"
        return self._values(f"{query} UNION SELECT id FROM edits WHERE content=? ORDER BY id", content, content)

    def contents(self) -> list[str]:
        """The content hashes of all records."""
        return self._values("SELECT content FROM records")

    def copies(self) -> tuple[int, int]:
        """How many pictures are live training and test images at once, pixel for pixel; and have several labels."""
        groups = (
            "SELECT max(split='train') AND max(split='test') AS shared, count(DISTINCT label)>1 AS torn FROM records"
            " WHERE erased='' AND split!='public' GROUP BY content HAVING count(*)>1"
        )
        return self.db.execute(f"SELECT ifnull(sum(shared),0), ifnull(sum(torn),0) FROM ({groups})").fetchone()

    def owner_splits(self) -> dict[str, str]:
        """{owner of live records, public ones aside: the split of them, the first by name if there are several}."""
        query = "SELECT owner,min(split) FROM records WHERE owner!='' AND split!='public' AND erased='' GROUP BY owner"
        return dict(self.db.execute(query))

    def erase(self, ids: Iterable[str], request: str) -> None:
        """Marks records erased by a request and leaves tombstones: from here on no build may see them."""
        for name in ids:
            self.db.execute(ERASE, (request, name))
            self.db.execute("DELETE FROM edits WHERE id=?", (name,))
            self.add_tombstone("tombstone", name)

    def replace(self, edits: Iterable[Edit], request: str) -> None:
        """Marks records erased by a request that has new versions of them, and keeps these until `take_edits`."""
        for name, label, content, row in edits:
            self.db.execute(ERASE, (request, name))
            self.db.execute("INSERT INTO edits VALUES(?,?,?,?,?)", (name, request, label, content, row.tobytes()))
            self.add_tombstone("rectified", name)

    def take_edits(self, start: int, dtype: np.dtype) -> np.ndarray:
        """Makes the new versions of records live, in the image rows from `start` on; returns their bytes [n, b]."""
        versions = "edits e JOIN records r ON r.id=e.id AND r.erased=e.request ORDER BY e.id"
        edits = self.db.execute(f"SELECT e.id,split,e.label,owner,e.content,e.bytes FROM {versions}").fetchall()
        self.add_records((Item(*edit[:4]) for edit in edits), range(start, start + len(edits)), [e[4] for e in edits])
        self.db.execute("DELETE FROM edits")
        return np.array([np.frombuffer(edit[5], dtype) for edit in edits], dtype)

    def edited(self) -> dict[str, str]:
        """{id: request} of records whose new versions are not live yet."""
        return dict(self.db.execute("SELECT id,request FROM edits"))

    def erased(self, requests: Iterable[str] | None = None) -> dict[int, str]:
        """{image row: id} of records that are erased but not yet purged; of the given requests only."""
        if requests is None:
            return dict(self.db.execute("SELECT row,id FROM records WHERE erased!=''"))
        query = "SELECT row,id FROM records WHERE erased=? AND erased!=''"
        return {row: name for request in requests for row, name in self.db.execute(query, (request,))}

    def forget(self, requests: Iterable[str]) -> None:
        """Removes the rows of the records that these requests erased; their tombstones stay."""
        self.db.executemany("DELETE FROM records WHERE erased=? AND erased!=''", [(name,) for name in requests])

    def add_tombstone(self, purpose: str, name: str) -> None:
        """Leaves a salted hash that says "erased before" of an id (tombstone) or an owner without saying which."""
        self.db.execute("INSERT OR IGNORE INTO tombstones VALUES(?)", (self.salted(purpose, name),))

    def tombstones(self) -> frozenset[str]:
        """The salted hashes of all ids and owners that were erased."""
        return frozenset(self._values("SELECT hash FROM tombstones"))

    def is_tombstoned(self, name: str, purpose: str = "tombstone") -> bool:
        """Whether an id, or with purpose "owner" an owner, was erased before."""
        query = "SELECT 1 FROM tombstones WHERE hash=?"
        return bool(self.db.execute(query, (self.salted(purpose, name),)).fetchone())

    # slices and manifests
    def add_slice(self, row: SliceRow, rows: Iterable[int], epochs: Mapping[int, str] = MappingProxyType({})) -> None:
        """Registers a slice on disk, the image rows of its members, {step: digest of parameters} of earlier epochs."""
        self._slices = None
        self.db.execute(f"INSERT OR REPLACE INTO slices VALUES({','.join('?' * len(row))})", row)
        self.db.executemany("INSERT OR REPLACE INTO members VALUES(?,?)", [(row.digest, int(r)) for r in rows])
        self.db.executemany("INSERT OR REPLACE INTO epochs VALUES(?,?,?)", [(row.digest, *e) for e in epochs.items()])

    def epochs(self, digest: str) -> dict[int, str]:
        """{step: digest of the parameters' bytes} of a slice's earlier epochs."""
        return dict(self.db.execute("SELECT step,params_digest FROM epochs WHERE slice=? ORDER BY step", (digest,)))

    def slices(self) -> Mapping[str, SliceRow]:
        """{digest: row} of all registered slices; read once, and again after a change."""
        version = self.db.execute("PRAGMA data_version").fetchone()[0]  # counts the commits of other connections
        if self._slices is None or self._slices_version != version:
            self._slices = {row[0]: SliceRow(*row) for row in self.db.execute("SELECT * FROM slices")}
            self._slices_version = version
        return MappingProxyType(self._slices)

    def drop_slice(self, digest: str) -> None:
        self._slices = None
        for table, column in (("slices", "digest"), ("members", "slice"), ("epochs", "slice")):
            self.db.execute(f"DELETE FROM {table} WHERE {column}=?", (digest,))

    def rows_of(self, digest: str) -> np.ndarray:
        """int64 [m]: image rows of a slice's members, ascending."""
        return np.array(self._values("SELECT row FROM members WHERE slice=? ORDER BY row", digest), np.int64)

    def slices_of(self, rows: Iterable[int]) -> frozenset[str]:
        """Digests of slices that have a member in one of the image rows."""
        query = "SELECT slice FROM members WHERE row=?"
        return frozenset(name for row in rows for (name,) in self.db.execute(query, (int(row),)))

    def set_clustering(self, clustering: str, digests: Iterable[str]) -> None:
        """Notes that the members of these slices follow from a clustering."""
        self._slices = None
        query = "UPDATE slices SET clustering=? WHERE digest=? AND clustering!=?"
        self.db.executemany(query, ((clustering, digest, clustering) for digest in digests))

    def orphaned_slices(self) -> frozenset[str]:
        """Published slices that have seen an image row which belongs to no record any more. There should be none."""
        published = "SELECT substr(slice,1,64) FROM entries WHERE version=(SELECT max(version) FROM manifests)"
        condition = f"slice IN ({published}) AND row NOT IN (SELECT row FROM records)"
        return frozenset(self._values(f"SELECT DISTINCT slice FROM members WHERE {condition}"))

    def manifest(self) -> Manifest | None:
        """The published state, or None before the first."""
        return next(iter(self.manifests(limit=1)), None)

    def manifests(self, limit: int = -1) -> list[Manifest]:
        """The states that are still there, newest first; with a limit only so many."""
        heads = self.db.execute("SELECT * FROM manifests ORDER BY version DESC LIMIT ?", (limit,)).fetchall()
        query = "SELECT cluster,slice FROM entries WHERE version=? ORDER BY cluster"
        return [Manifest(*head, entries=dict(self.db.execute(query, head[:1]))) for head in heads]

    def publish(
        self, clustering: str, program: str, constants: str, entries: dict[str, str], moved: Iterable[tuple[int, str]]
    ) -> int:
        """Makes a state the current one; `moved` has the (image row, key) of each record that changed its cluster."""
        head = (None, time.time(), clustering, program, constants)
        version = int(self.db.execute("INSERT INTO manifests VALUES(?,?,?,?,?)", head).lastrowid or 0)
        self.db.executemany("INSERT INTO entries VALUES(?,?,?)", [(version, *e) for e in sorted(entries.items())])
        self.db.executemany("UPDATE records SET cluster=? WHERE row=?", ((key, int(row)) for row, key in moved))
        return version

    def drop_manifest(self, version: int) -> None:
        for table in ("entries", "manifests"):
            self.db.execute(f"DELETE FROM {table} WHERE version=?", (version,))

    # pins, receipts and quarantine
    def pin(self, cluster: str, ref: str) -> None:
        """Keeps a cluster at a slice, or an earlier epoch of it, whatever its recipe calls for."""
        self.db.execute("INSERT OR REPLACE INTO pins VALUES(?,?,?)", (cluster, ref, time.time()))

    def unpin(self, clusters: Iterable[str]) -> None:
        self.db.executemany("DELETE FROM pins WHERE cluster=?", [(cluster,) for cluster in clusters])

    def pins(self) -> dict[str, str]:
        """{cluster: slice reference} of pinned clusters."""
        return dict(self.db.execute("SELECT cluster,slice FROM pins ORDER BY cluster"))

    def receipts(self) -> list[ReceiptLink]:
        """The chain of receipts, oldest first."""
        return [ReceiptLink(*row) for row in self.db.execute("SELECT * FROM receipts ORDER BY sequence")]

    def add_receipts(self, links: Iterable[ReceiptLink]) -> None:
        """Makes written receipts part of the chain."""
        self.db.executemany("INSERT INTO receipts VALUES(?,?,?)", links)

    def invalidate_plan(self) -> None:
        """Makes the next plan look at every cluster."""
        self.db.execute("UPDATE manifests SET recipe_constants_digest=''")

    def quarantined(self) -> frozenset[str]:
        """Clusters that no prediction may use until the requests that touch them are published."""
        return frozenset(self._values("SELECT DISTINCT cluster FROM quarantine"))

    def _values(self, query: str, *values: object) -> list[Any]:
        """The first column of a query's rows."""
        return [row[0] for row in self.db.execute(query, values)]


def sample_rank(seed: int, name: str) -> bytes:
    """Where an id stands in the order of sampling (paper Algorithm 1, line 3): a keyed hash, smallest first."""
    return keyed_hash(seed, "sample", name)


def _table(rows: Sequence[tuple[Any, ...]]) -> RecordTable:
    """Rows of `Catalog._live` as columns."""
    # zip(*rows) is slow for long tables
    ids, image_rows, labels, owners, contents, clusters = (tuple(map(operator.itemgetter(i), rows)) for i in range(6))
    return RecordTable(ids, np.array(image_rows, np.int64), np.array(labels, np.int32), owners, contents, clusters)
