"""Import: the source's images become records completely or not at all, and what was erased never comes back."""

import contextlib
import dataclasses

import numpy as np
import pytest
from imports import check_pixels, numbered_source, pixels, refusal, snapshot, with_items

from lmeraser_jax.config import Config, Data
from lmeraser_jax.data.source import Contents, Item, limit_positions
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import ingest, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import Imported, image_file, import_source
from lmeraser_jax.storage.workdir import Layout


def test_what_the_workdir_has_stays_and_new_records_join(new_workdir):
    assert import_source(*new_workdir, numbered_source(), Config()) == Imported(30, 0, 0, 0)
    layout, catalog = new_workdir
    assert [len(catalog.live(split)) for split in ("train", "test", "public", "holdout")] == [18, 6, 6, 0]
    assert catalog.rows_used() == 30 == len(image_file(layout, catalog))
    dataset = catalog.get("dataset")
    assert (dataset["classes"], dataset["shape"], dataset["name"]) == (["a", "b", "c"], [3, 4, 1], "made")
    table = catalog.live("train")
    assert table.owners[0] == "owner-0" and table.labels[0] == 2
    check_pixels(*new_workdir)
    tables, images = snapshot(*new_workdir)
    assert import_source(*new_workdir, numbered_source(), Config()) == Imported(0, 30, 0, 0)
    again, images_again = snapshot(*new_workdir)
    assert again[:2] == tables[:2] and images_again == images
    assert import_source(*new_workdir, numbered_source(40), Config()) == Imported(10, 30, 0, 0)
    check_pixels(*new_workdir)


def test_a_source_that_does_not_fit_is_refused_with_all_reasons(new_workdir, monkeypatch):
    assert "class names must be unique: a, b, a" in refusal(new_workdir, numbered_source(class_names=("a", "b", "a")))
    twice = with_items([*numbered_source().items, Item("id-00007", "train", 1)])
    message = refusal(new_workdir, twice)
    assert message.startswith("made cannot be imported") and "these occur more than once: id-00007" in message
    import_source(*new_workdir, numbered_source(), Config())
    message = refusal(new_workdir, numbered_source(shape=(4, 3, 1), class_names=("a", "b", "d")))
    assert "contents are [4, 3, 1], those of the workdir [3, 4, 1]" in message
    assert "classes that the workdir does not have: d; it has a, b, c" in message
    layout, _ = new_workdir
    content = layout.images.read_bytes()
    layout.images.write_bytes(content[: 20 * 12])
    assert "holds 20 rows, the catalog 30: the workdir is damaged" in refusal(new_workdir, numbered_source(40))
    layout.images.write_bytes(content)


def test_records_that_have_changed_are_refused(new_workdir, monkeypatch):
    monkeypatch.setattr(ingest, "LISTED", 3)
    import_source(*new_workdir, numbered_source(), Config())

    def read(positions):
        images = numbered_source(40).read(positions).rows
        images[[3, 7], 0, 0] ^= 1
        return Contents(images)

    message = refusal(new_workdir, numbered_source(40, read=read))
    assert "have another content or label" in message and message.endswith(": id-00003, id-00007")
    relabelled = with_items([item._replace(label=(item.label + 1) % 3) for item in numbered_source().items])
    assert refusal(new_workdir, relabelled).endswith("id-00000, id-00001, id-00002, ... (30 in all)")


def test_order_of_the_source_does_not_matter(tmp_path):
    tables = []
    for name, items in (("one", numbered_source().items), ("other", numbered_source().items[::-1])):
        layout = Layout(tmp_path / name)
        layout.prepare()
        with contextlib.closing(Catalog(layout.catalog)) as catalog:
            import_source(layout, catalog, with_items(items), Config(data=Data(holdout=0.3)))
            table = catalog.live("train")
            tables.append((table.ids, table.labels.tolist(), table.owners, table.contents))
    assert tables[0] == tables[1] and len(tables[0][0]) > 5


@pytest.mark.parametrize("purged", [False, True])
def test_erased_stays_out(new_workdir, purged):
    layout, catalog = new_workdir
    import_source(layout, catalog, numbered_source(), Config())
    catalog.erase(["id-00002", "id-00003"], "r")
    if purged:
        catalog.forget(["r"])
    assert import_source(layout, catalog, numbered_source(), Config()) == Imported(0, 28, 2, 0)
    assert not {"id-00002", "id-00003"} & set(catalog.live("train").ids)
    assert import_source(layout, catalog, numbered_source(35), Config()) == Imported(5, 28, 2, 0)
    check_pixels(layout, catalog)


def test_a_source_without_an_erased_class_still_joins(new_workdir):
    """Labels are matched by class name: the files of a class may be gone."""
    import_source(*new_workdir, numbered_source(), Config())
    items = [Item("id-00100", "train", 0), Item("id-00101", "train", 1)]
    assert import_source(*new_workdir, with_items(items, class_names=("b", "c")), Config()).added == 2
    table = new_workdir[1].live("train")
    assert [table.labels[table.ids.index(item.id)] for item in items] == [1, 2]


def test_classes_that_limits_leave_out_are_named(new_workdir):
    source = numbered_source()
    imported = import_source(*new_workdir, source, Config(data=Data(train_limit=2, limit_by="class")))
    left = {source.class_names[label] for label in new_workdir[1].live("train").labels}
    lost = sorted({source.class_names[item.label] for item in source.items if item.split == "train"} - left)
    names = ", ".join(f"{name} (train)" for name in lost)
    assert lost and imported.notes[0] == f"the limits leave no record of these classes: {names}"


def test_duplicates_counted(new_workdir):
    items = list(numbered_source(10).items)

    def read(positions):
        return Contents(np.stack([pixels(items[0 if i in (4, 8) else i]) for i in positions]))

    source = numbered_source(10, read=read, class_names=("cat", "Cat", "b"), notes=("a note",))
    notes = ("a note", "class names that look alike: Cat / cat (case)")
    copies = "exact duplicates: 0 contents lie in train and test, 1 carry several labels"
    imported = import_source(*new_workdir, source, Config())  # 0 is public; 4 and 8 are train, with another label each
    assert imported == Imported(10, 0, 0, 2) and imported.notes == (*notes, copies)
    new_workdir[1].db.execute("UPDATE records SET split='test', label=1 WHERE id='id-00008'")
    assert new_workdir[1].copies() == (1, 0)
    new_workdir[1].erase(["id-00008"], "r")
    assert new_workdir[1].copies() == (0, 0)
    with pytest.raises(UserError) as caught:
        import_source(*new_workdir, with_items([], class_names=("cat", "Cat", "b"), notes=("a note",)), Config())
    assert all(note in str(caught.value) for note in notes), "what is not used may be why nothing fits"


def test_interrupted_import_leaves_nothing(new_workdir, monkeypatch):
    monkeypatch.setattr(ingest, "PIECE", 8)
    layout, catalog = new_workdir

    def read(positions):
        if positions[0] >= 16:
            raise KeyboardInterrupt
        return Contents(255 - numbered_source(40).read(positions).rows)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            import_source(layout, catalog, numbered_source(40, read=read), Config())
        assert len(catalog.live("train", "test", "public")) == 0 and catalog.get("dataset") is None
        assert layout.images.stat().st_size == 16 * 12  # bytes that nothing points at
    assert import_source(layout, catalog, numbered_source(30), Config()) == Imported(30, 0, 0, 0)
    with pytest.raises(KeyboardInterrupt):
        import_source(layout, catalog, numbered_source(40, read=lambda positions: read([16])), Config())
    assert import_source(layout, catalog, numbered_source(40), Config()) == Imported(10, 30, 0, 0)
    assert layout.images.stat().st_size == 40 * 12
    check_pixels(layout, catalog)


def test_a_rotten_row_is_mended(new_workdir):
    layout, catalog = new_workdir
    import_source(layout, catalog, numbered_source(), Config())
    view = image_file(layout, catalog).view("r+")
    view[7] ^= 1
    view[9] = 0
    del view
    imported = import_source(layout, catalog, numbered_source(), Config())
    assert (imported.added, imported.known, imported.mended) == (0, 30, 2)
    check_pixels(layout, catalog)


def test_later_images_of_an_erased_owner_stay_out(new_workdir):
    """Private ones, purged or not; what the workdir has of them, public images, stays."""
    layout, catalog = new_workdir
    import_source(layout, catalog, numbered_source(22), Config())
    requests.accept(catalog, owners=["owner-5"], request="r")  # 20 is public, 21 test, 22 and 23 train
    for _ in range(2):
        assert import_source(layout, catalog, numbered_source(24), Config()) == Imported(0, 21, 3, 0)
        catalog.forget(["r"])
    assert catalog.live("public").ids[-1] == "id-00020" and "id-00022" not in catalog.live("train").ids


def test_owners_keep_their_side(new_workdir):
    layout, catalog = new_workdir
    config = Config(data=Data(split_by="owner", holdout=0.2))
    items = [Item(f"id-{i:05d}", "train", i % 3, f"owner-{i // 4}") for i in range(40)]
    import_source(layout, catalog, with_items(items[:30]), config)
    assert import_source(layout, catalog, with_items(items), config, adding=True).added == 10
    held = set(catalog.live("holdout").owners)
    assert held and not held & set(catalog.live("train").owners)
    catalog.db.execute("UPDATE records SET split='test' WHERE owner='owner-2'")
    late = [*items, Item("id-00040", "train", 0, "owner-2")]
    with pytest.raises(UserError, match=r"owners in two splits .*: owner-2 \(test and train\);"):
        import_source(layout, catalog, with_items(late), config, adding=True)


def test_limits(new_workdir):
    config = Config(data=Data(train_limit=4, test_limit=2))
    layout, catalog = new_workdir
    assert import_source(layout, catalog, numbered_source(), config) == Imported(12, 0, 0, 0)
    drawn = {name for split in ("train", "test", "public") for name in catalog.live(split).ids}
    assert drawn == {numbered_source().items[i].id for i in limit_positions(numbered_source().items, 4, 2)}
    assert [len(catalog.live(split)) for split in ("train", "test", "public")] == [4, 2, 6]
    check_pixels(layout, catalog)
    assert import_source(layout, catalog, numbered_source(), Config()) == Imported(18, 12, 0, 0)
    check_pixels(layout, catalog)


@pytest.mark.parametrize("limit", [0, 3])
def test_pieces_are_bounded(new_workdir, limit):
    """More than one piece, none longer than PIECE, also when the limits leave wide gaps; every pixel in its row."""
    count, asked = ingest.PIECE * 2 + 30, []
    items = [Item(f"id-{i:05d}", "train" if i < count - 9 else "test", i % 3) for i in range(count)]
    source = with_items(items)

    def read(positions):
        asked.append(len(positions))
        return source.read(positions)

    config = Config(data=Data(train_limit=limit))
    imported = import_source(*new_workdir, dataclasses.replace(source, read=read), config)
    assert imported.added == (12 if limit else count) and max(asked) <= ingest.PIECE
    check_pixels(*new_workdir)
