"""The catalog: it changes in whole transactions, forgets what was erased, and refuses files that are not its own."""

import contextlib
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from lmeraser_jax.data.source import Item
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import schema
from lmeraser_jax.storage.catalog import Catalog, sample_rank
from lmeraser_jax.storage.rows import SliceRow

ITEMS = [Item("b", "train", 1, "ann"), Item("a", "train", 0, "ann"), Item("é", "train", 0)]
ITEMS += [Item("Z", "holdout", 1, "ann"), Item("t", "test", 1, "ann"), Item("p", "public", 0, "ann")]


@pytest.fixture
def catalog(tmp_path):
    """A catalog with six records in rows 10, 11, ..."""
    with contextlib.closing(Catalog(tmp_path / "catalog.db")) as new:
        new.add_records(ITEMS, range(10, 16), [digest(item.id) for item in ITEMS])
        yield new


def slice_row(digest, loss=0.5) -> SliceRow:
    return SliceRow(digest, "k", "params", 2, 20, 5, loss, 0.1, "cpu", 1.0)


def test_a_transaction_is_all_or_nothing_and_readers_see_whole_states(catalog, tmp_path):
    with pytest.raises(KeyboardInterrupt), catalog.transaction():
        with catalog.transaction():  # nested ones commit together
            catalog.set("x", 1)
        catalog.erase(["a"], "r")
        assert catalog.get("x") == 1
        raise KeyboardInterrupt
    assert catalog.get("x") is None and catalog.erased() == {} and not catalog.is_tombstoned("a")
    with pytest.raises(sqlite3.OperationalError, match="full"), catalog.transaction():
        catalog.set("x", 1)
        catalog.db.execute("ROLLBACK")  # as SQLite itself does on a full disk
        raise sqlite3.OperationalError("database or disk is full")
    with catalog.transaction():
        catalog.set("y", {"deep": [1, None]})
    assert (catalog.get("x"), catalog.get("y"), catalog.db.in_transaction) == (None, {"deep": [1, None]}, False)
    with contextlib.closing(Catalog(tmp_path / "catalog.db")) as reader:
        with catalog.transaction():
            catalog.set("rows", 16)
            catalog.erase(["a"], "r")
            assert reader.live("train").ids == ("a", "b", "é") and reader.rows_used() == 0
        assert reader.live("train").ids == ("b", "é") and reader.rows_used() == 16
        assert reader.is_tombstoned("a") and reader.erased() == {11: "a"}


def test_live_records_are_sorted_by_id(catalog):
    table = catalog.live("train")
    assert table.ids == ("a", "b", "é") and table.rows.tolist() == [11, 10, 12] and table.labels.tolist() == [0, 1, 0]
    assert table.owners == ("ann", "ann", "") and table.contents == tuple(map(digest, table.ids))
    assert table.clusters == ("", "", "") and (table.rows.dtype, table.labels.dtype) == (np.int64, np.int32)
    assert catalog.live("train", "holdout").ids == ("Z", "a", "b", "é") and catalog.live("public").ids == ("p",)
    empty = catalog.live("nothing")
    assert len(empty) == len(catalog.live()) == 0 and empty.rows.shape == (0,) and empty.labels.dtype == np.int32
    for item in (Item("a", "train", 0), Item("new", "train", 0)):  # ids and rows are unique
        with pytest.raises(sqlite3.IntegrityError):
            catalog.add_records([item], [10], ["0f"])


def test_erased_records_are_kept_until_they_are_purged_and_their_tombstones_for_good(catalog, tmp_path):
    assert catalog.owned("ann") == ["Z", "a", "b", "t"] and catalog.owned("bob") == [], "all but public ones"
    catalog.erase(["a"], "first")
    catalog.erase(["é"], "second")
    assert catalog.erased() == {11: "a", 12: "é"} and catalog.live("train").ids == ("b",)
    assert catalog.erased(["second", "other"]) == {12: "é"} and catalog.erased([]) == {}
    assert catalog.owned("ann") == ["Z", "a", "b", "t"], "an erasure that is not purged can be asked for again"
    known = {"a": ("train", digest("a"), 0, True), "p": ("public", digest("p"), 0, False)}
    assert catalog.known(["a", "p", "unknown"]) == known
    catalog.forget(["first", ""])  # no request is named "": live records stay
    assert catalog.erased() == {12: "é"} and catalog.known(["a", "b"]).keys() == {"b"}
    assert [catalog.is_tombstoned(name) for name in ("a", "é", "b")] == [True, True, False]
    with contextlib.closing(Catalog(tmp_path / "other.db")) as other:
        assert other.salted("tombstone", "a") not in catalog.tombstones(), "every workdir has a salt of its own"
    catalog.set("rows", 16)
    assert catalog.free_rows().tolist() == [*range(10), 11] and len(catalog.tombstones()) == 2


def test_slices_are_found_by_the_rows_of_their_members(catalog):
    catalog.add_slice(slice_row("s1"), [10, 11])
    catalog.add_slice(slice_row("s2"), np.array([12]))
    catalog.add_slice(slice_row("s3", loss=None), [11, 12])
    assert catalog.slices_of([]) == catalog.slices_of([13]) == set()
    assert catalog.slices_of([11]) == {"s1", "s3"} and catalog.slices_of(np.array([10, 12])) == {"s1", "s2", "s3"}
    catalog.drop_slice("s1")
    assert catalog.slices_of([11]) == {"s3"}
    assert catalog.slices() == {"s2": slice_row("s2"), "s3": slice_row("s3", loss=None)}


def test_the_list_of_slices_is_read_once_and_again_after_every_change(catalog, tmp_path):
    statements = []
    with contextlib.closing(Catalog(tmp_path / "catalog.db")) as reader:
        reader.db.set_trace_callback(statements.append)
        catalog.add_slice(slice_row("s1"), [10])
        for _ in range(3):
            assert reader.slices().keys() == {"s1"}
        assert sum("FROM slices" in statement for statement in statements) == 1
        catalog.add_slice(slice_row("s2"), [11])
        assert reader.slices().keys() == catalog.slices().keys() == {"s1", "s2"}
    with pytest.raises(RuntimeError), catalog.transaction():
        catalog.drop_slice("s1")
        assert catalog.slices().keys() == {"s2"}
        raise RuntimeError
    assert catalog.slices().keys() == {"s1", "s2"}
    catalog.set_clustering("tree", ["s1"])
    assert catalog.slices()["s1"].clustering == "tree" and catalog.slices()["s2"].clustering == ""


def test_manifests_are_numbered_and_never_twice_the_same(catalog):
    assert catalog.manifest() is None and catalog.manifests() == []
    first = catalog.publish("tree1", "program", "i", {"k2": "s2", "k1": "s1"}, [(10, "k1"), (11, "k2")])
    second = catalog.publish("tree2", "other", "i", {"k1": "s3"}, [(11, "k1")])
    head = catalog.manifest()
    assert (head.version, head.clustering, head.fingerprint, head.entries) == (second, "tree2", "other", {"k1": "s3"})
    assert [manifest.version for manifest in catalog.manifests()] == [second, first] and second > first
    assert catalog.live("train").clusters == ("k1", "k1", "")
    catalog.drop_manifest(second)
    assert [manifest.version for manifest in catalog.manifests()] == [first]
    assert {row[0] for row in catalog.db.execute("SELECT version FROM entries")} == {first}
    assert catalog.publish("tree", "p", "i", {}, []) > second


def test_the_sample_is_the_smallest_keyed_hashes(catalog):
    """As a literal sort has it; the unsampled do not matter, a sampled one admits the next; ranks follow the seed."""
    items = [Item(f"r{i:03d}", "train", 0) for i in range(200)]
    catalog.add_records(items, range(100, 300), ["0f"] * 200)
    for seed in (3, 4):
        catalog.rank(seed)
        live = list(catalog.live("train").ids)
        order = sorted(live, key=lambda name: (sample_rank(seed, name), name))
        assert catalog.sample("train", 40).ids == tuple(sorted(order[:40]))
        assert catalog.sample("train", 40, order[40:90]).ids == tuple(sorted(order[:40]))
        assert catalog.sample("train", 40, order[:1]).ids == tuple(sorted(order[1:41]))
    catalog.erase(order[:2], "r")
    assert catalog.sample("train", 40).ids == tuple(sorted(order[2:42])) and catalog.sample("train", 999).ids[0] == "a"
    late = Item("late", "train", 0)
    catalog.add_records([late], [999], ["0f"])
    assert catalog.db.execute("SELECT rank FROM records WHERE id='late'").fetchone()[0] == sample_rank(4, "late")


# files that are no catalog
def test_what_is_no_catalog_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a readable catalog"):
        Catalog(tmp_path)
    path = tmp_path / "catalog.db"
    for content in (b"x", b"hello" * 100, b"hello" * 500, b"SQLite format 3\x00" + b"\xff" * 2000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a readable catalog"):
            Catalog(path)
        assert path.read_bytes() == content
    path.unlink()
    for version in (0, schema.VERSION - 1, schema.VERSION + 1):
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE IF NOT EXISTS theirs(x)")
            db.execute(f"PRAGMA user_version={version}")
        with pytest.raises(UserError, match=f"version {version}; this release reads version {schema.VERSION} only"):
            Catalog(path)


def test_a_catalog_whose_making_was_killed_is_made_again(tmp_path):
    """A kill leaves an empty file, or one that only has its journal mode."""
    for name, statement in (("empty.db", "SELECT 1"), ("wal.db", "PRAGMA journal_mode=WAL")):
        (tmp_path / name).touch()
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as db:
            db.execute(statement)
        with contextlib.closing(Catalog(tmp_path / name)) as catalog:
            assert catalog.get("salt") and len(catalog.live("train")) == 0


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.catalog import Catalog
place, seen = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "--bind", str(place), str(seen)], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", str(seen)], check=True)
reader = Catalog(seen / "catalog.db")  # nobody has it open: it shows this moment
assert reader.get("dataset") == 1 and reader.stamp() == reader.stamp()
writer = Catalog(place / "catalog.db")
writer.set("dataset", 2)
try:
    reader.stamp()
except UserError as error:
    assert "cannot follow changes" in str(error)
else:
    raise AssertionError("the change went unnoticed")
follower = Catalog(seen / "catalog.db")  # a writer has it open: its log can be followed
before = follower.stamp()
assert follower.get("dataset") == 2
writer.set("dataset", 3)
assert follower.stamp() != before and follower.get("dataset") == 3
print("followed")
"""


def test_a_read_only_file_system_can_be_read_and_never_shows_an_old_state(tmp_path):
    """Where SQLite can follow a writer it does; where it cannot, a later look is refused."""
    place, seen = tmp_path / "place", tmp_path / "seen"
    place.mkdir()
    seen.mkdir()
    Catalog(place / "catalog.db").close()
    with contextlib.closing(Catalog(place / "catalog.db")) as catalog:
        catalog.set("dataset", 1)
    call = ["unshare", "--mount", sys.executable, "-c", READ_ONLY, str(place), str(seen)]
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here: {error}")
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.stdout == "followed\n", done.stderr
