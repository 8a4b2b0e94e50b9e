"""Records: the bundled digits, what makes items unusable, holdout and limits, rows on disk, tables."""

import numpy as np
import pytest

from lmeraser_jax.config import Data
from lmeraser_jax.data import digits, load
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import Item, Pixels, Source, assign_split, content_hash, limited, problems


# digits
@pytest.fixture(scope="module")
def scans():
    return digits.load()


def test_digits_complete(scans):
    assert len(scans.items) == 1797 and len({item.id for item in scans.items}) == 1797
    assert problems(scans) == [] and len(scans.class_names) == 10 and scans.shape == (8, 8, 1)
    for split in ("train", "test", "public"):
        assert {item.label for item in scans.items if item.split == split} == set(range(10))


def test_digits_owners_never_straddle(scans):
    public = {item.owner for item in scans.items if item.split == "public"}
    private = {item.owner for item in scans.items if item.split != "public"}
    assert public and private and not public & private and "" not in public | private


def test_digits_pixels(scans):
    pixels = scans.read(0, 1797).images
    assert pixels.shape == (1797, 8, 8, 1) and pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255) and len(np.unique(pixels)) == 17
    np.testing.assert_array_equal(scans.read(100, 103).images, pixels[100:103])


def test_digits_repeat(scans):
    assert digits.load().items == scans.items == load.load(Data()).items


# items
def source_of(items, classes=("a", "b"), shape=(2, 2, 1)) -> Source:
    return Source(
        "x", tuple(classes), shape, items, lambda start, stop: Pixels(np.zeros((stop - start, *shape), np.uint8))
    )


GOOD = [Item("1", "train", 0), Item("2", "train", 1), Item("3", "test", 0), Item("4", "public", 1)]


def test_problems_none():
    assert problems(source_of(GOOD)) == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([*GOOD, Item("2", "public", 0)], "ids must be unique; these occur more than once: 2"),
        ([*GOOD, Item("5", "train", 2)], "labels must lie in 0..1 (the class names): 5=2"),
        ([*GOOD, Item("5", "public", -1)], "labels must lie in 0..1 (the class names): 5=-1"),
        ([GOOD[0], GOOD[2], GOOD[3]], "only one class is present (0); a classifier needs at least 2"),
        (GOOD[2:], "there is no training image"),
        ([], "there is no training image"),
        ([*GOOD, Item("a\udcff", "train", 0)], "must be plain text; these are not: 'a\\udcff' (not text in UTF-8)"),
    ],
)
def test_problem_found(items, message):
    (found,) = problems(source_of(items))
    assert message in found


def test_problems_all_at_once():
    found = problems(source_of([Item("1", "test", 9), Item("1", "test", 0)], shape=(2, 2, 4)))
    assert len(found) == 4


def test_holdout_share_and_stability():
    items = [Item(f"id-{i}", "train", 0) for i in range(4000)]
    chosen = {item.id for item in items if assign_split(item, Data(holdout=0.2), 3).split == "holdout"}
    assert abs(len(chosen) / 4000 - 0.2) < 0.03
    assert chosen == {
        item.id for item in reversed(items) if assign_split(item, Data(holdout=0.2), 3).split == "holdout"
    }
    more = {item.id for item in items if assign_split(item, Data(holdout=0.4), 3).split == "holdout"}
    other = {item.id for item in items if assign_split(item, Data(holdout=0.2), 4).split == "holdout"}
    assert chosen < more and chosen != other


def test_holdout_takes_training_records_only():
    for split in ("test", "public", "holdout"):
        assert assign_split(Item("a", split, 0), Data(holdout=1.0, test_share=1.0), 0).split == split
    item = Item("a", "train", 1, "ann")
    assert assign_split(item, Data(), 0) == item and assign_split(item, Data(holdout=1.0), 0) == item._replace(
        split="holdout"
    )


def test_limited():
    items = [Item(str(i), split, 0) for i, split in enumerate(("train", "test", "public") * 4)]
    assert limited(items, 0, 0) == list(range(12))
    kept = [items[i] for i in limited(items, 2, 1)]
    assert [item.id for item in kept if item.split == "train"] == ["0", "3"]
    assert [item.id for item in kept if item.split == "test"] == ["1"]
    assert sum(item.split == "public" for item in kept) == 4
    assert limited(items, 99, 99) == list(range(12))


def test_content_hash(rng):
    image = rng.integers(0, 256, (4, 6, 3), np.uint8)
    assert content_hash(image) == content_hash(image.copy()) == content_hash(np.asfortranarray(image))
    changed = image.copy()
    changed[3, 5, 2] ^= 1
    variants = [image, changed, image.reshape(6, 4, 3), image.transpose(1, 0, 2)]
    assert len({content_hash(variant) for variant in variants}) == 4


# rows on disk
def test_rows_append_and_view(tmp_path, rng):
    file = RowFile(tmp_path / "new" / "rows", (2, 3), np.float32)
    assert len(file) == 0
    rows = rng.normal(size=(5, 2, 3)).astype(np.float32)
    file.append(rows[:2])
    file.append(rows[2:])
    file.sync()
    again = RowFile(file.path, (2, 3), np.float32)
    assert len(again) == 5
    np.testing.assert_array_equal(again.view(), rows)
    with pytest.raises(ValueError):
        again.view()[0] = 0


def test_rows_refuse_another_shape(tmp_path):
    file = RowFile(tmp_path / "rows", (2,), np.uint8)
    for rows in (np.zeros((3, 3), np.uint8), np.zeros((3, 2), np.int8)):
        with pytest.raises(AssertionError):
            file.append(rows)
    assert not file.path.exists()


def test_rows_truncate(tmp_path):
    file = RowFile(tmp_path / "rows", (4,), np.uint8)
    file.truncate(3)
    assert not file.path.exists()
    file.append(np.arange(20, dtype=np.uint8).reshape(5, 4))
    with open(file.path, "ab") as raw:
        raw.write(b"\xff\xff")  # a torn row
    for rows, left in ((9, 5), (5, 5), (2, 2), (2, 2), (0, 0)):
        file.truncate(rows)
        assert file.path.stat().st_size == left * 4
    file.append(np.full((1, 4), 7, np.uint8))
    np.testing.assert_array_equal(file.view(), [[7, 7, 7, 7]])


def test_rows_overwrite(tmp_path):
    file = RowFile(tmp_path / "rows", (2,), np.uint8)
    file.overwrite(np.array([0]))  # nothing there yet
    file.append(np.arange(1, 9, dtype=np.uint8).reshape(4, 2))
    file.overwrite(np.array([], np.int64))
    file.overwrite(np.array([2, 0, 9]))
    assert file.path.read_bytes() == bytes([0, 0, 3, 4, 0, 0, 7, 8])


# tables
def test_table():
    table = RecordTable(
        ("a", "b", "c"),
        np.array([7, 5, 6]),
        np.array([1, 0, 1], np.int32),
        ("", "o", "o"),
        ("x", "y", "z"),
        ("k", "", "k"),
    )
    taken = table.take(np.array([2, 0]))
    assert len(taken) == 2 and taken.ids == ("c", "a") and taken.rows.tolist() == [6, 7]
    assert taken.labels.tolist() == [1, 1] and (taken.owners, taken.contents) == (("o", ""), ("z", "x"))
    left = table.without(frozenset({"b", "unknown"}))
    assert left.ids == ("a", "c") and left.clusters == ("k", "k") and left.rows.tolist() == [7, 6]
    empty = table.without(frozenset("abc"))
    assert len(empty) == 0 and empty.rows.dtype == table.rows.dtype and empty.labels.shape == (0,)
