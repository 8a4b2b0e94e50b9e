"""The catalog: one SQLite file that says what is live, what is published and which erasures wait.

It is the only source of truth. Files are written first; a change becomes true in one transaction here.
"""

import json
import operator
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.source import Item
from lmeraser_jax.hashing import keyed_hash
from lmeraser_jax.storage.database import Database
from lmeraser_jax.storage.rows import Edit, Manifest, ReceiptLink, SliceRow

COLUMNS = "id,row,label,owner,content,cluster"  # of a `RecordTable`; a content as bytes, a cluster as its number
CONTENT = "lower(hex(content))"
KEY = "(SELECT key FROM clusters WHERE number=cluster)"
# What these look for is few records; left to itself, SQLite may choose an index of all.
MEMBERS = "records INDEXED BY records_cluster WHERE split='train' AND erased=''"
ERASED = "records INDEXED BY records_erased WHERE erased!=''"
ERASE = "UPDATE records SET erased=? WHERE id=? AND erased=''"


class Catalog(Database):
    """What the file says of records, slices, published states and receipts."""

    # records
    def add_records(self, items: Iterable[Item], rows: Iterable[int], contents: Iterable[str]) -> None:
        """New live records. They have a rank in sampling as soon as the catalog has a seed for it (`rank`)."""
        seed = self.get("rank_seed")
        query = "INSERT INTO records(id,split,label,owner,row,content,rank) VALUES(?,?,?,?,?,?,?)"
        for item, row, content in zip(items, rows, contents, strict=True):
            rank = b"" if seed is None else sample_rank(seed, item.id)
            self.db.execute(query, (*item, row, bytes.fromhex(content), rank))

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
        return self._table(sorted(self._live(condition, split, count + len(leaving), leaving=leaving)[:count]))

    def live(self, *splits: str) -> RecordTable:
        """The live records of the given splits, sorted by id."""
        return self._table(self._live(f"split IN ({','.join('?' * len(splits))}) ORDER BY id", *splits))

    def private_ids(self) -> list[str]:
        """The ids of all live records but public ones."""
        return self._values("SELECT id FROM records WHERE erased='' AND split!='public'")

    def at(self, rows: Iterable[int], erased: bool = False) -> RecordTable:
        """The live records in the given image rows, or the erased ones, sorted by id."""
        query = f"SELECT {COLUMNS} FROM records WHERE row IN (SELECT value FROM json_each(?)) AND (erased!='')=?"
        return self._table(sorted(self.db.execute(query, (json.dumps([int(row) for row in rows]), erased))))

    def members(self, cluster: str, leaving: Collection[str] = ()) -> RecordTable:
        """The live private records of a published cluster, of "" those in none yet, sorted by id; without `leaving`."""
        condition = "split='train' AND cluster=(SELECT number FROM clusters WHERE key=?) ORDER BY id"
        return self._table(self._live(condition, cluster, leaving=leaving))

    def _live(self, condition: str, *values: object, leaving: Collection[str] = ()) -> list[tuple[Any, ...]]:
        query = f"SELECT {COLUMNS} FROM records WHERE erased='' AND {condition}"
        return [row for row in self.db.execute(query, values) if row[0] not in leaving]

    def places(self, leaving: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Where the live private records without `leaving` are: image rows int64 [N], ascending; clusters int64 [N].

        The clusters are numbers, and the dictionary has the published key of each; that of no cluster is "".
        """
        query = f"SELECT cluster,group_concat(row) FROM {MEMBERS} GROUP BY cluster"
        lists = {number: np.fromstring(text, np.int64, sep=",") for number, text in self.db.execute(query)}
        rows = np.concatenate([np.zeros(0, np.int64), *lists.values()])
        clusters = np.repeat(np.array(list(lists), np.int64), [len(rows) for rows in lists.values()])
        order = np.argsort(rows)
        order = order[~np.isin(rows[order], list(self.rows(leaving).values()))]
        return rows[order], clusters[order], dict(self.db.execute("SELECT number,key FROM clusters"))

    def touched(self) -> frozenset[str]:
        """Published clusters of the private records that are erased but not yet purged; "" among them for none."""
        return frozenset(self._values(f"SELECT DISTINCT {KEY} FROM {ERASED} AND split='train'"))

    def sizes(self) -> dict[str, int]:
        """{published cluster: live members}; "" counts records that are in none yet."""
        counts = f"SELECT cluster,count(*) AS size FROM {MEMBERS} GROUP BY cluster"
        return dict(self.db.execute(f"SELECT {KEY},size FROM ({counts})"))

    def counts(self) -> dict[str, int]:
        """{split: live records}."""
        return dict(self.db.execute("SELECT split,count(*) FROM records WHERE erased='' GROUP BY split"))

    def clusters_of(self, ids: Iterable[str]) -> dict[str, str]:
        """{id: published cluster} of those ids that are in one, erased or not."""
        return {name: row[0] for name, row in self._by_id(KEY, ids, "AND split='train' AND cluster!=0")}

    def rows_used(self) -> int:
        """Rows of the image file that belong to a record or to an erased one's place."""
        return self.get("rows") or 0

    def free_rows(self) -> np.ndarray:
        """int64 [n]: image rows that belong to no record, ascending: their records were erased and purged."""
        used = np.array(self._values("SELECT row FROM records"), np.int64)
        return np.setdiff1d(np.arange(self.rows_used()), used)

    def known(self, ids: Iterable[str]) -> dict[str, tuple[str, str, int, bool]]:
        """{id: (split, content, label, erased)} of those ids that the catalog holds; of the live version, if any."""
        records = self._by_id(f"split,{CONTENT},label,erased!=''", ids)
        return {name: (*row[:3], bool(row[3])) for name, row in records}

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
        query = "SELECT DISTINCT id FROM records WHERE owner=? AND owner!='' AND split!='public' ORDER BY id"
        return self._values(query, owner)

    def same_pixels(self, content: str) -> list[str]:
        """Ids of private records with this content hash, sorted; also erased ones that have no new version."""
        newer = "SELECT id FROM edits UNION SELECT id FROM records WHERE erased=''"
        query = f"SELECT id FROM records WHERE content=? AND split!='public' AND (erased='' OR id NOT IN ({newer}))"
        value = bytes.fromhex(content)
        return self._values(f"{query} UNION SELECT id FROM edits WHERE content=? ORDER BY id", value, content)

    def contents(self) -> list[str]:
        """The content hashes of all records."""
        return self._values(f"SELECT {CONTENT} FROM records")

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
            return dict(self.db.execute(f"SELECT row,id FROM {ERASED}"))
        query = f"SELECT row,id FROM {ERASED} AND erased=?"
        return {row: name for request in requests for row, name in self.db.execute(query, (request,))}

    def forget(self, requests: Iterable[str]) -> None:
        """Removes the rows of the records that these requests erased, and keys of clusters that no record is in.

        The records' tombstones stay.
        """
        self.db.executemany("DELETE FROM records WHERE erased=? AND erased!=''", [(name,) for name in requests])
        live, erased = f"EXISTS(SELECT 1 FROM {MEMBERS} AND cluster=number)", f"SELECT cluster FROM {ERASED}"
        self.db.execute(f"DELETE FROM clusters WHERE number!=0 AND NOT {live} AND number NOT IN ({erased})")

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
        if self._slices is not None:
            self._slices = {**self._slices, row.digest: row}
        self.db.execute(f"INSERT OR REPLACE INTO slices VALUES({','.join('?' * len(row))})", row)
        members = np.unique(np.fromiter(rows, "<i4")).tobytes()
        self.db.execute("INSERT OR REPLACE INTO members VALUES(?,?)", (row.digest, members))
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
        blobs = self._values("SELECT rows FROM members WHERE slice=?", digest)
        return np.frombuffer(b"".join(blobs), "<i4").astype(np.int64)

    def slices_of(self, rows: Iterable[int]) -> frozenset[str]:
        """Digests of slices that have a member in one of the image rows."""
        wanted = np.fromiter(rows, "<i4")
        if not len(wanted):
            return frozenset()
        slices = self.db.execute("SELECT slice,rows FROM members").fetchall()
        members = np.frombuffer(b"".join(blob for _, blob in slices), "<i4")
        ends = np.cumsum([len(blob) // members.itemsize for _, blob in slices])
        hit = np.searchsorted(ends, np.flatnonzero(np.isin(members, wanted)), side="right")
        return frozenset(slices[place][0] for place in np.unique(hit))

    def set_clustering(self, clustering: str, digests: Iterable[str]) -> None:
        """Notes that the members of these slices follow from a clustering."""
        rows = self.slices()
        others = [(clustering, name) for name in digests if name in rows and rows[name].clustering != clustering]
        if others:
            self._slices = None
        self.db.executemany("UPDATE slices SET clustering=? WHERE digest=?", others)

    def orphaned_slices(self, free_rows: np.ndarray) -> frozenset[str]:
        """Published slices that have seen one of the rows which belong to no record any more. There should be none."""
        manifest = self.manifest()
        published = {ref.partition("@")[0] for ref in manifest.entries.values()} if manifest else set()
        return self.slices_of(free_rows) & published

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
        moved = list(moved)
        keys = [(key,) for key in {key for _, key in moved}]
        self.db.executemany("INSERT OR IGNORE INTO clusters(key) VALUES(?)", keys)
        numbers = dict(self.db.execute("SELECT key,number FROM clusters"))
        changes = ((numbers[key], int(row)) for row, key in moved)
        self.db.executemany("UPDATE records SET cluster=? WHERE row=?", changes)
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

    def _table(self, records: Sequence[tuple[Any, ...]]) -> RecordTable:
        """Records, each the values of `COLUMNS`, as columns."""
        # zip(*records) is slow for long tables
        columns = (tuple(map(operator.itemgetter(i), records)) for i in range(6))
        ids, rows, labels, owners, contents, clusters = columns
        query = "SELECT number,key FROM clusters WHERE number IN (SELECT value FROM json_each(?))"
        keys = dict(self.db.execute(query, (json.dumps(list(set(clusters))),)))
        hexadecimal, published = tuple(map(bytes.hex, contents)), tuple(map(keys.__getitem__, clusters))
        return RecordTable(ids, np.array(rows, np.int64), np.array(labels, np.int32), owners, hexadecimal, published)

    def _values(self, query: str, *values: object) -> list[Any]:
        """The first column of a query's rows."""
        return [row[0] for row in self.db.execute(query, values)]


def sample_rank(seed: int, name: str) -> bytes:
    """Where an id stands in the order of sampling (paper Algorithm 1, line 3): a keyed hash, smallest first."""
    return keyed_hash(seed, "sample", name)
