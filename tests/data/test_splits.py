"""Shares and owners in an import: owners stay together, and shares do not mix with splits that the source brings."""

import contextlib

import pytest
from imports import check_pixels, refusal, with_items

from lmeraser_jax.config import Config, Data
from lmeraser_jax.data.source import Item, Source
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import import_source
from lmeraser_jax.storage.workdir import Layout


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
