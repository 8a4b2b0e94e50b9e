"""Shares drawn from the training items, by record or by owner, and owners read from ids."""

import collections
import contextlib

import numpy as np
import pytest
from imports import check_pixels, refusal, with_items

from lmeraser_jax.config import Config, Data
from lmeraser_jax.data import digits, load
from lmeraser_jax.data.source import Item, Source, assign_split
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import import_source
from lmeraser_jax.storage.workdir import Layout


def population(rng, records=3000, owners=300) -> list[Item]:
    """Owners of very different size; every tenth record has none."""
    weights = rng.pareto(1.5, owners) + 0.1
    drawn = rng.choice(owners, records, p=weights / weights.sum())
    return [Item(f"id-{i}", "train", 0, "" if i % 10 == 0 else f"owner-{o}") for i, o in enumerate(drawn)]


def splits_of(items, data, seed=0) -> dict[str, str]:
    return {item.id: assign_split(item, data, seed).split for item in items}


BY_OWNER = Data(test_share=0.25, holdout=0.2, split_by="owner")


def test_no_owner_on_two_sides(rng):
    items = population(rng)
    for seed in range(3):
        placed_at, sides = splits_of(items, BY_OWNER, seed), collections.defaultdict(set)
        for item in items:
            sides[item.owner or item.id].add(placed_at[item.id])
        assert all(len(found) == 1 for found in sides.values())
        counts = collections.Counter(side for found in sides.values() for side in found)
        groups = len(sides)
        assert abs(counts["test"] / groups - 0.25) < 0.07 and abs(counts["holdout"] / groups - 0.75 * 0.2) < 0.06


def test_records_that_come_or_go_move_nobody(rng):
    items = population(rng)
    before = splits_of(items, BY_OWNER)
    for _ in range(5):
        kept = [items[i] for i in rng.permutation(len(items))[: rng.integers(1, len(items))]]
        new = [Item(f"new-{i}", "train", 0, f"owner-{i % 400}") for i in range(100)]
        after = splits_of([*new, *kept], BY_OWNER)
        assert all(after[item.id] == before[item.id] for item in kept)


def test_by_record_owners_do_not_matter(rng):
    data = Data(test_share=0.25, holdout=0.2)
    items = population(rng)
    alone = [item._replace(owner="") for item in items]
    assert splits_of(items, data) == splits_of(alone, data) == splits_of(alone, BY_OWNER)
    counts = collections.Counter(splits_of(items, data).values())
    shares = {split: count / len(items) for split, count in counts.items()}
    np.testing.assert_allclose([shares["test"], shares["holdout"]], [0.25, 0.15], atol=0.025)


def test_a_larger_share_only_adds(rng):
    items = population(rng)
    small = {name for name, split in splits_of(items, Data(test_share=0.1)).items() if split == "test"}
    large = {name for name, split in splits_of(items, Data(test_share=0.3)).items() if split == "test"}
    other = {name for name, split in splits_of(items, Data(test_share=0.1), seed=1).items() if split == "test"}
    assert small < large and small != other


def test_the_two_shares_are_drawn_apart(rng):
    """A holdout among the items that are no test images, not the next slice of one draw."""
    items = population(rng)
    alone = {name for name, split in splits_of(items, Data(holdout=0.2)).items() if split == "holdout"}
    both = splits_of(items, Data(holdout=0.2, test_share=0.25))
    assert {name for name, split in both.items() if split == "holdout"} == {
        name for name in alone if both[name] != "test"
    }


# owners from ids
def test_owner_pattern():
    source = load.load(Data(owner_pattern=r"digit-(\d\d)1"))
    plain = digits.load().items
    for item, before in zip(source.items, plain, strict=True):
        number = item.id.removeprefix("digit-")
        assert item == before._replace(owner=number[:2] if number[2] == "1" else before.owner)


def test_owner_pattern_with_several_groups():
    source = load.load(Data(owner_pattern=r"-(\d)(\d)?.*?(7)?$"))
    assert source.items[127].owner == "0/1/7" and source.items[128].owner == "0/1"


def test_owner_pattern_that_finds_nothing():
    for pattern in ("(x)", "(x*)"):  # an empty owner is none
        with pytest.raises(UserError) as caught:
            load.load(Data(owner_pattern=pattern))
        message = str(caught.value)
        assert (
            f"--config.data.owner_pattern={pattern!r} finds no owner in any id" in message and "digit-0000" in message
        )


@pytest.mark.parametrize("name", ["dataset", "labels", "train_split", "test_split", "holdout_split", "public_split"])
def test_settings_of_other_sources_are_refused(name):
    with pytest.raises(UserError, match=f"--config.data.{name}=x: goes with data.source="):
        load.load(Data(**{name: "x"}))


def test_stored_sizes_of_other_sources_are_refused():
    with pytest.raises(UserError) as caught:
        load.load(Data(source="npz", path="x", store_size=3, store_width=4))
    for flag in ("store_size=3", "store_width=4"):
        assert f"--config.data.{flag}: goes with data.source=folder or tfds, not npz" in str(caught.value)


# shares in an import
@pytest.fixture
def workdir(tmp_path):
    layout = Layout(tmp_path / "run")
    layout.prepare()
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        yield layout, catalog


def plain(count=300, owners=30) -> Source:
    items = [Item(f"id-{i:05d}", "train", i % 3, f"o{i % owners}" if owners else "") for i in range(count)]
    return with_items(items)


def test_owners_stay_together(workdir):
    layout, catalog = workdir
    config = Config(data=Data(test_share=0.3, holdout=0.3, split_by="owner"))
    import_source(layout, catalog, plain(), config)
    tables = {split: catalog.live(split) for split in ("train", "holdout", "test")}
    owners = {split: {*table.owners} for split, table in tables.items()}
    assert sum(map(len, owners.values())) == 30 and len(set.union(*owners.values())) == 30
    assert all(owners.values()) and sum(len(table) for table in tables.values()) == 300
    check_pixels(layout, catalog)
    later = with_items([*plain().items, *(Item(f"id-{900 + i}", "train", 0, f"o{i}") for i in range(30))])
    import_source(layout, catalog, later, config)
    for split, table in tables.items():
        assert {*table.ids} < {*catalog.live(split).ids} and {*catalog.live(split).owners} == owners[split]


def test_split_by_owner_needs_owners(workdir):
    data = Data(test_share=0.2, split_by="owner")
    message = refusal(workdir, plain(owners=0), Config(data=data))
    assert "--config.data.split_by=owner: no training image has an owner" in message
    assert "--config.data.owner_pattern" in message and "--config.data.labels" in message
    some = [*plain().items[:-2], *(item._replace(owner="") for item in plain().items[-2:])]
    message = refusal(workdir, with_items(some), Config(data=data))
    assert "training images without an owner: id-00298, id-00299;" in message


def test_no_owner_is_in_two_splits_of_the_source(workdir):
    """Splits that a source brings are not drawn, so an owner on both sides can only be refused."""
    items = [item._replace(split="test") if item.id >= "id-00295" else item for item in plain().items]
    items += [Item("id-00999", "public", 0, "o3")]  # public images are nobody's test
    message = refusal(workdir, with_items(items), Config(data=Data(split_by="owner", holdout=0.2)))
    assert "owners in two splits of the source: " in message and message.count("(test and train)") == 5
    assert "o25 (test and train)" in message and "o3 (" not in message
    import_source(*workdir, with_items(items), Config(data=Data(holdout=0.2)))  # as asked for


@pytest.mark.parametrize(("split", "share"), [("test", "test_share"), ("holdout", "holdout")])
def test_shares_do_not_mix_with_the_sources_own(workdir, split, share):
    items = [*plain(30).items, *(Item(f"id-{90 + i}", split, 0) for i in range(7))]
    for source, named in (("folder", f" (--config.data.{split}_split=there)"), ("npz", "")):
        data = Data(source=source, **{share: 0.2, f"{split}_split": "there"})
        message = refusal(workdir, with_items(items), Config(data=data))
        assert f"--config.data.{share}=0.2 would mix drawn images with the 7 {split} images" in message
        assert f"that the source has{named}; use one of them" in message
