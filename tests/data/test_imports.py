"""An import: unreadable images are refused or left out, owners stay together, shares do not mix with other splits."""

import dataclasses
import json

import fakes
import numpy as np
import pytest
from helpers import SMALL
from imports import check_pixels, numbered_source, refusal, with_items
from PIL import Image

from lmeraser_jax.config import Config, Data
from lmeraser_jax.data.source import Contents, Item, Source, limit_positions
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import ingest
from lmeraser_jax.storage.ingest import Imported, import_source


def unreadable(source, broken, converted=0) -> Source:
    """The source with some ids unreadable, and so many converted images in every piece."""

    def read(positions):
        found = {place: "torn" for place, i in enumerate(positions) if source.items[i].id in broken}
        return Contents(source.read(positions).rows, found, converted)

    return dataclasses.replace(source, read=read)


SKIP = Config(data=Data(skip_unreadable=True))
TORN = ("id-00003", "id-00008", "id-00009", "id-00021")


def test_unreadable_images_can_be_left_out(new_workdir, monkeypatch):
    monkeypatch.setattr(ingest, "PIECE", 8)
    layout, catalog = new_workdir
    imported = import_source(layout, catalog, unreadable(numbered_source(), TORN, converted=2), SKIP)
    assert imported == Imported(26, 0, 0, 0, TORN, 8)
    assert not {*TORN} & {*catalog.live("train", "test", "public").ids} and catalog.rows_used() == 26
    check_pixels(layout, catalog)
    ((kind, body),) = catalog.db.execute("SELECT kind, body FROM events")
    assert kind == "import" and json.loads(body)["unreadable"] == 4 and json.loads(body)["converted"] == 8
    assert "id-" not in body  # events outlive erasures
    mended = import_source(layout, catalog, unreadable(numbered_source(), TORN[:1]), SKIP)
    assert mended == Imported(3, 26, 0, 0, TORN[:1]) and catalog.rows_used() == 29
    check_pixels(layout, catalog)
    assert import_source(layout, catalog, numbered_source(), Config()) == Imported(1, 29, 0, 0)


def test_records_of_the_workdir_need_no_readable_file(new_workdir):
    """A record keeps its pixels; an erased one needs no file; without the flag a known one is refused."""
    layout, catalog = new_workdir
    import_source(layout, catalog, numbered_source(), Config())
    catalog.erase(["id-00003"], "r")
    catalog.forget(["r"])
    source = unreadable(numbered_source(32), ("id-00003", "id-00004", "id-00031"))
    message = refusal(new_workdir, source)
    assert "id-00003" not in message and "- id-00004: torn" in message and "- id-00031: torn" in message
    assert import_source(layout, catalog, source, SKIP) == Imported(1, 29, 1, 0, ("id-00031",))
    check_pixels(layout, catalog)


def test_an_import_needs_two_classes_that_can_be_read(new_workdir):
    names = {item.id for item in numbered_source().items if item.split == "train" and item.label}
    message = refusal(new_workdir, unreadable(numbered_source(), names), SKIP)
    assert (
        f"{len(names)} records that cannot be read leave 1 of 3 classes to train on; at least 2 are needed" in message
    )
    message = refusal(new_workdir, numbered_source(), Config(data=Data(holdout=0.999)))
    assert "--config.data.holdout=0.999 and 0 records that cannot be read leave 0 of 3 classes" in message


def test_only_wanted_images_are_read(new_workdir):
    """A limit leaves gaps: what lies in them may be broken, and is not counted."""
    items = [Item(f"id-{i:05d}", "train" if i < 20 else "test", i % 3) for i in range(40)]
    wanted = limit_positions(items, 6, 0)
    broken = {item.id for position, item in enumerate(items) if position not in wanted}
    source = unreadable(with_items(items), broken, converted=1)
    imported = import_source(*new_workdir, source, Config(data=Data(train_limit=6)))
    assert imported == Imported(26, 0, 0, 0, (), 1) and len(broken) == 14
    check_pixels(*new_workdir)


def test_damage_found_while_streaming_leaves_the_workdir(new_workdir, monkeypatch):
    """A source that fails behind its first pieces, for a new workdir and for one with records."""
    monkeypatch.setattr(ingest, "PIECE", 8)

    def read(positions):
        if positions[0] >= 32:
            raise UserError("a.npz is damaged")
        return numbered_source(40).read(positions)

    for count in (20, 40):
        assert "a.npz is damaged" in refusal(new_workdir, numbered_source(40, read=read))
        import_source(*new_workdir, numbered_source(count), Config())
    check_pixels(*new_workdir)


def test_the_command_names_what_it_left_out(tmp_path, rng, capsys, monkeypatch):
    """Refused with both flags named; with the flag they are left out, named and counted; once readable they join."""
    from lmeraser_jax.cli.main import main

    fakes.fast_fakes(monkeypatch)
    sizes = {"train": 30, "test": 10, "public": 8}
    names = [f"{split}/{'ab'[i % 2]}/{i:02d}.png" for split in sizes for i in range(sizes[split])]
    for i, name in enumerate(names):
        file, side = tmp_path / "images" / name, 40 if i == 0 else 8
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        image.convert("L" if i > 38 else "RGB").save(file)
    for name in names[1:12]:
        (tmp_path / "images" / name).write_bytes(b"torn")
    small = {f"{group}.{name}": value for group, values in SMALL.items() for name, value in values.items()}
    small |= {"clustering.sample_size": 15, "clustering.cut": "auto:2", "clustering.min_members": 0}
    small |= {"data.source": "folder", "data.path": tmp_path / "images", "data.max_pixels": 1000}
    flags = ["train", f"--workdir={tmp_path / 'w'}", *(f"--config.{name}={value}" for name, value in small.items())]
    assert main(flags) == 2
    message = capsys.readouterr().err
    assert "--config.data.skip_unreadable" in message and message.count("- train/") == 12
    assert "train/a/00.png: it has 40 x 40 pixels, more than --config.data.max_pixels=1000" in message
    assert main([*flags, "--config.data.skip_unreadable", f"--json={tmp_path / 'out.json'}"]) == 0
    out, err = capsys.readouterr()
    assert "imported 36 records, 9 converted from another colour mode\n" in out
    warning = next(line for line in err.splitlines() if "could not be read and were left out" in line)
    assert warning.startswith("warning: 12 records") and warning.count(".png") == 12
    imported = json.loads((tmp_path / "out.json").read_text())["imported"]
    assert (len(imported["unreadable"]), imported["added"], imported["converted"]) == (12, 36, 9)
    # neither flag binds a workdir: both only say what to do with files that cannot be read
    assert main([*flags, "--reimport", "--config.data.skip_unreadable", "--config.data.max_pixels=1600"]) == 0
    assert "imported 1 records" in capsys.readouterr().out


# shares and owners
def plain(count=300, owners=30) -> Source:
    items = [Item(f"id-{i:05d}", "train", i % 3, f"o{i % owners}" if owners else "") for i in range(count)]
    return with_items(items)


def test_owners_stay_together(new_workdir):
    layout, catalog = new_workdir
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


def test_split_by_owner_needs_owners(new_workdir):
    data = Data(test_share=0.2, split_by="owner")
    message = refusal(new_workdir, plain(owners=0), Config(data=data))
    assert "--config.data.split_by=owner: training records without an owner: id-00000, " in message
    assert "--config.data.owner_pattern" in message and "--config.data.labels" in message
    some = [*plain().items[:-2], *(item._replace(owner="") for item in plain().items[-2:])]
    message = refusal(new_workdir, with_items(some), Config(data=data))
    assert "training records without an owner: id-00298, id-00299;" in message


def test_no_owner_is_in_two_splits_of_the_source(new_workdir):
    """Splits that a source brings are not drawn, so an owner on both sides can only be refused."""
    items = [item._replace(split="test") if item.id >= "id-00295" else item for item in plain().items]
    items += [Item("id-00999", "public", 0, "o3")]  # public images are nobody's test
    message = refusal(new_workdir, with_items(items), Config(data=Data(split_by="owner", holdout=0.2)))
    drawn, as_it_is = message.count("(holdout and test)"), message.count("(test and train)")
    assert "owners in two splits of the workdir and the source: o25 (" in message and drawn + as_it_is == 5
    assert "o3 (" not in message
    import_source(*new_workdir, with_items(items), Config(data=Data(holdout=0.2)))  # as asked for


@pytest.mark.parametrize(("split", "share"), [("test", "test_share"), ("holdout", "holdout")])
def test_shares_do_not_mix_with_the_sources_own(new_workdir, split, share):
    items = [*plain(30).items, *(Item(f"id-{90 + i}", split, 0) for i in range(7))]
    for source, named in (("folder", f" (--config.data.{split}_split=there)"), ("npz", "")):
        data = Data(source=source, **{share: 0.2, f"{split}_split": "there"})
        message = refusal(new_workdir, with_items(items), Config(data=data))
        assert f"--config.data.{share}=0.2 would mix drawn records with the 7 {split} records" in message
        assert f"that the source has{named}; use one of them" in message
