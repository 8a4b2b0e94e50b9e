"""Records: the bundled digits, what makes items unusable, shares and owners, limits, rows on disk, tables."""

import collections

import numpy as np
import pytest
from imports import blank_source

from lmeraser_jax.config import Data
from lmeraser_jax.data import digits, load
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import Item, assign_split, content_hash, limit_positions, problems
from lmeraser_jax.errors import UserError


# digits
def test_the_digits_are_complete_and_no_owner_is_public_and_private():
    scans = digits.load()
    assert len(scans.items) == 1797 and len({item.id for item in scans.items}) == 1797
    assert problems(scans) == [] and len(scans.class_names) == 10 and scans.shape == (8, 8, 1)
    for split in ("train", "test", "public"):
        assert {item.label for item in scans.items if item.split == split} == set(range(10))
    public = {item.owner for item in scans.items if item.split == "public"}
    private = {item.owner for item in scans.items if item.split != "public"}
    assert public and private and not public & private and "" not in public | private
    pixels = scans.read(range(1797)).rows
    assert pixels.shape == (1797, 8, 8, 1) and pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255) and len(np.unique(pixels)) == 17
    np.testing.assert_array_equal(scans.read(range(100, 103)).rows, pixels[100:103])
    assert digits.load().items == scans.items == load.load(Data()).items


# items
GOOD = [Item("1", "train", 0), Item("2", "train", 1), Item("3", "test", 0), Item("4", "public", 1)]


def test_everything_that_makes_items_unusable_is_named():
    assert problems(blank_source(GOOD)) == []
    for items, message in (
        ([*GOOD, Item("2", "public", 0)], "ids must be unique; these occur more than once: 2"),
        ([*GOOD, Item("5", "train", 2)], "labels must lie in 0..1 (the class names): 5=2"),
        ([*GOOD, Item("5", "public", -1)], "labels must lie in 0..1 (the class names): 5=-1"),
        ([GOOD[0], GOOD[2], GOOD[3]], "only one class is present (0); a classifier needs at least 2"),
        (GOOD[2:], "there is no training record"),
        ([], "there is no training record"),
        ([*GOOD, Item("5", "test", 0, "o "), Item("6", "train", 0, "o ")], "not: owner 'o ' of 5 (has white space at"),
        ([*GOOD, Item("", "test", 0)], "ids must not be empty; these items (counted from 0) have none: 1 of test"),
    ):
        (line,) = problems(blank_source(items))
        assert message in line
    assert len(problems(blank_source([Item("1", "test", 9), Item("1", "test", 0)], shape=(2, 2, 4)))) == 4
    assert problems(blank_source([GOOD[0]]), classes=1) == []  # a later import may bring one class


def test_limits_draw_the_same_items_whatever_their_order_is(rng):
    """Of a source that is sorted by class, every class gets about its share; "by class" exactly that."""
    sizes = (1, 30, 300, 600)
    splits = ("train", "test")
    items = [Item(f"{s}/{label}/{i}", s, label) for s in splits for label in range(4) for i in range(sizes[label])]
    items += [Item(f"open/{i}", "public", 0) for i in range(5)]
    assert limit_positions(items, 0, 0) == limit_positions(items, 931, 10**6) == list(range(len(items)))
    for by in ("record", "class"):
        drawn = limit_positions(items, 93, 31, by)
        assert drawn == sorted(drawn) and len(drawn) == 93 + 31 + 5
        chosen = {items[i] for i in drawn}
        assert chosen >= {items[i] for i in limit_positions(items, 40, 10, by)}, "a smaller limit draws some of them"
        shuffled = [items[i] for i in rng.permutation(len(items))]
        assert {shuffled[i] for i in limit_positions(shuffled, 93, 31, by)} == chosen
        counts = [sum(item.split == "train" and item.label == label for item in chosen) for label in range(4)]
        assert counts[2] > 20 and counts[3] > 40
        if by == "class":
            assert counts == [1, 3, 30, 59]
            assert len({items[i].label for i in limit_positions(items, 4, 0, by) if items[i].split == "train"}) == 4


def test_equal_images_have_equal_hashes(rng):
    image = rng.integers(0, 256, (4, 6, 3), np.uint8)
    assert content_hash(image) == content_hash(image.copy()) == content_hash(np.asfortranarray(image))
    changed = image.copy()
    changed[3, 5, 2] ^= 1
    variants = [image, changed, image.reshape(6, 4, 3), image.transpose(1, 0, 2)]
    assert len({content_hash(variant) for variant in variants}) == 4


# shares
BY_OWNER = Data(test_share=0.25, holdout=0.2, split_by="owner")


def population(rng, records=3000, owners=300) -> list[Item]:
    """Owners of very different size; every tenth record has none."""
    weights = rng.pareto(1.5, owners) + 0.1
    drawn = rng.choice(owners, records, p=weights / weights.sum())
    return [Item(f"id-{i}", "train", 0, "" if i % 10 == 0 else f"owner-{o}") for i, o in enumerate(drawn)]


def splits_of(items, data, seed=0) -> dict[str, str]:
    return {item.id: assign_split(item, data, seed).split for item in items}


def in_split(splits: dict[str, str], split: str) -> set[str]:
    return {name for name, value in splits.items() if value == split}


def test_no_owner_is_on_two_sides(rng):
    items = population(rng)
    for seed in range(3):
        splits, sides = splits_of(items, BY_OWNER, seed), collections.defaultdict(set)
        for item in items:
            sides[item.owner or item.id].add(splits[item.id])
        assert all(len(side) == 1 for side in sides.values())
        counts = collections.Counter(side for (side,) in sides.values())
        assert abs(counts["test"] / len(sides) - 0.25) < 0.07
        assert abs(counts["holdout"] / len(sides) - 0.75 * 0.2) < 0.06


def test_records_that_come_or_go_move_no_other(rng):
    items = population(rng)
    before = splits_of(items, BY_OWNER)
    for _ in range(5):
        remaining = [items[i] for i in rng.permutation(len(items))[: rng.integers(1, len(items))]]
        new = [Item(f"new-{i}", "train", 0, f"owner-{i % 400}") for i in range(100)]
        after = splits_of([*new, *remaining], BY_OWNER)
        assert all(after[item.id] == before[item.id] for item in remaining)


def test_owners_do_not_matter_where_shares_are_drawn_by_record(rng):
    data, items = Data(test_share=0.25, holdout=0.2), population(rng)
    alone = [item._replace(owner="") for item in items]
    assert splits_of(items, data) == splits_of(alone, data) == splits_of(alone, BY_OWNER)
    counts = collections.Counter(splits_of(items, data).values())
    shares = [counts[split] / len(items) for split in ("test", "holdout")]
    np.testing.assert_allclose(shares, [0.25, 0.15], atol=0.025)


def test_a_larger_share_only_adds_and_the_two_shares_are_drawn_apart(rng):
    items = population(rng)
    for name, split in (("test_share", "test"), ("holdout", "holdout")):
        small, large = (in_split(splits_of(items, Data(**{name: share})), split) for share in (0.1, 0.3))
        other = in_split(splits_of(items, Data(**{name: 0.1}), seed=1), split)
        assert small < large and small != other
    both, alone = splits_of(items, Data(holdout=0.2, test_share=0.25)), splits_of(items, Data(holdout=0.2))
    assert in_split(both, "holdout") == in_split(alone, "holdout") - in_split(both, "test")


def test_only_training_records_are_drawn():
    everything = Data(holdout=1.0, test_share=1.0)
    for split in ("test", "public", "holdout"):
        assert assign_split(Item("a", split, 0), everything, 0).split == split
    item = Item("a", "train", 1, "ann")
    assert assign_split(item, Data(), 0) == item
    assert assign_split(item, Data(holdout=1.0), 0) == item._replace(split="holdout")


# settings of the source
def test_the_groups_of_a_pattern_in_an_id_are_its_owner():
    source = load.load(Data(owner_pattern=r"digit-(\d\d)1"))
    for item, before in zip(source.items, digits.load().items, strict=True):
        number = item.id.removeprefix("digit-")
        assert item == before._replace(owner=number[:2] if number[2] == "1" else before.owner)
    source = load.load(Data(owner_pattern=r"-(\d)(\d)?.*?(7)?$"))
    assert source.items[127].owner == "0/1/7" and source.items[128].owner == "0/1"
    for pattern in ("(x)", "(x*)"):  # an empty owner is none
        with pytest.raises(UserError, match="finds no owner in any id; ids look like: digit-0000") as caught:
            load.load(Data(owner_pattern=pattern))
        assert f"--config.data.owner_pattern={pattern!r}" in str(caught.value)


def test_settings_that_the_source_would_ignore_are_refused():
    for name in ("dataset", "labels", "train_split", "test_split", "holdout_split", "public_split"):
        with pytest.raises(UserError, match=rf"--config.data.{name}=\S*x: goes with data.source="):
            load.load(Data(**{name: "x"}))
    with pytest.raises(UserError) as caught:
        load.load(Data(source="npz", path="x", store_size=3, store_width=4))
    for flag in ("store_size=3", "store_width=4"):
        assert f"--config.data.{flag}: goes with data.source=folder or tfds, not npz" in str(caught.value)


# rows on disk
def test_rows_are_appended_and_seen_by_others(tmp_path, rng):
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
    for wrong in (np.zeros((3, 3), np.float32), np.zeros((3, 2, 3), np.int8)):
        with pytest.raises(AssertionError):
            file.append(wrong)


def test_rows_that_an_interrupted_import_left_behind_are_dropped(tmp_path):
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


def test_rows_of_erased_records_are_overwritten(tmp_path):
    file = RowFile(tmp_path / "rows", (2,), np.uint8)
    file.overwrite(np.array([0]))  # nothing there yet
    file.append(np.arange(1, 9, dtype=np.uint8).reshape(4, 2))
    file.overwrite(np.array([], np.int64))
    file.overwrite(np.array([2, 0, 9]))
    assert file.path.read_bytes() == bytes([0, 0, 3, 4, 0, 0, 7, 8])


# tables
def test_a_table_keeps_its_columns_together():
    rows, labels = np.array([7, 5, 6]), np.array([1, 0, 1], np.int32)
    table = RecordTable(("a", "b", "c"), rows, labels, ("", "o", "o"), ("x", "y", "z"), ("k", "", "k"))
    taken = table.take(np.array([2, 0]))
    assert len(taken) == 2 and taken.ids == ("c", "a") and taken.rows.tolist() == [6, 7]
    assert taken.labels.tolist() == [1, 1] and (taken.owners, taken.contents) == (("o", ""), ("z", "x"))
    left = table.without(frozenset({"b", "unknown"}))
    assert left.ids == ("a", "c") and left.clusters == ("k", "k") and left.rows.tolist() == [7, 6]
    joined = table.take(np.array([1])).plus(left)
    assert joined.ids == table.ids and joined.rows.tolist() == [7, 5, 6] and joined.contents == table.contents
    empty = table.without(frozenset("abc"))
    assert len(empty) == 0 and empty.rows.dtype == table.rows.dtype and empty.labels.shape == (0,)
    assert RecordTable.empty().plus(table).ids == table.ids and table.plus(empty) is table
