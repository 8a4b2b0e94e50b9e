"""Damages of a workdir, shared by the tests of the doctor and of the commands."""

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout


class Damage(NamedTuple):
    apply: Callable[[Layout], object]
    component: str  # of the workdir, as the doctor names it
    words: str  # of its message
    leftover: bool = False  # by an interrupted command, and so no damage


def read(layout: Layout, query: Callable[[Catalog], Any]) -> Any:
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        return query(catalog)


def published_slice(layout: Layout, number: int = 1) -> Path:
    return layout.slice(read(layout, lambda catalog: sorted(catalog.manifest().entries.values())[number]))


def clustering_file(layout: Layout) -> Path:
    return layout.clustering(read(layout, lambda catalog: catalog.manifest().clustering)) / "clustering.npz"


def feature_file(layout: Layout) -> Path:
    (path,) = layout.records.glob("features-*.f32")
    return path


def free_row(layout: Layout) -> int:
    return int(read(layout, Catalog.free_rows)[0])


def flip(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0x10
    path.write_bytes(content)


def sql(statement: str) -> Callable[[Layout], None]:
    def damage(layout: Layout) -> None:
        with contextlib.closing(sqlite3.connect(layout.catalog)) as db, db:
            db.execute(statement)

    return damage


def setting(group: str, name: str, value: object) -> Callable[[Layout], None]:
    def damage(layout: Layout) -> None:
        tree = json.loads(layout.config.read_text())
        tree[group][name] = value
        layout.config.write_text(json.dumps(tree))

    return damage


def flip_data(folder: Path) -> None:
    """Flips a bit in every data file of a checkpoint: some of them are copies that nothing reads."""
    for path in folder.rglob("d/*"):
        flip(path)


def slice_flipped(layout: Layout) -> None:
    flip_data(published_slice(layout))


def slice_of_another_cluster(layout: Layout) -> None:
    shutil.rmtree(published_slice(layout, 0))
    shutil.copytree(published_slice(layout, 1), published_slice(layout, 0))


def slice_unregistered(layout: Layout) -> None:
    sql(f"DELETE FROM slices WHERE digest='{published_slice(layout).name}'")(layout)


def slice_unknown(layout: Layout) -> None:
    shutil.copytree(published_slice(layout), layout.slices / "f00d")


def clustering_with_another_label(layout: Layout) -> None:
    with np.load(clustering_file(layout)) as file:
        arrays = {name: file[name].copy() for name in file.files}
    arrays["labels"][0] = (arrays["labels"][0] + 1) % len(arrays["keys"])
    np.savez(clustering_file(layout), **arrays)


def feature_changed(layout: Layout) -> None:
    flip(feature_file(layout), int(read(layout, lambda catalog: catalog.live("train").rows[5])) * 64 + 9)


def feature_of_no_record(layout: Layout) -> None:
    view = np.memmap(feature_file(layout), np.float32, "r+").reshape(-1, 16)
    view[free_row(layout)] = 1
    view.flush()


def temporary_files(layout: Layout) -> None:
    (layout.root / ".config.json.tmp").write_text("{")
    (layout.slices / ".f00d.tmp").mkdir()
    (layout.clusterings / ".f00d.old").mkdir()
    (layout.scratch / "audit-1").mkdir(parents=True)
    layout.pretraining.mkdir()


def table_overwritten(table: str) -> Callable[[Layout], None]:
    """Writes over the first page of a table."""

    def damage(layout: Layout) -> None:
        with contextlib.closing(sqlite3.connect(layout.catalog)) as db:
            size = db.execute("PRAGMA page_size").fetchone()[0]
            page = db.execute("SELECT rootpage FROM sqlite_master WHERE name=?", (table,)).fetchone()[0]
        with open(layout.catalog, "r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xa5" * size)

    return damage


def link(layout: Layout) -> None:
    os.replace(layout.images, layout.root.parent / "elsewhere.u8")
    layout.images.symlink_to(layout.root.parent / "elsewhere.u8")


# What can be made again, or is not needed.
REPAIRABLE = {
    "slice flipped": Damage(slice_flipped, "slices", "cannot be read"),
    "slice missing": Damage(lambda layout: shutil.rmtree(published_slice(layout)), "slices", "does not exist"),
    "slice of another cluster": Damage(slice_of_another_cluster, "slices", "another digest"),
    "slice unregistered": Damage(slice_unregistered, "slices", "not in the catalog"),
    "slice unknown": Damage(slice_unknown, "slices", "unknown to the catalog: f00d", leftover=True),
    "clustering flipped": Damage(lambda layout: flip(clustering_file(layout)), "clusterings", "cannot be read"),
    "clustering missing": Damage(lambda layout: clustering_file(layout).unlink(), "clusterings", "cannot be read"),
    "clustering changed": Damage(clustering_with_another_label, "clusterings", "keys are not the digests"),
    "feature changed": Damage(feature_changed, "features", "other numbers than the backbone gives, in 1 of"),
    "features cut": Damage(lambda layout: os.truncate(feature_file(layout), 70), "features", "not at most"),
    "features of another program": Damage(
        lambda layout: (layout.records / "features-0123456789abcdef.f32").write_bytes(b"x" * 640),
        "features",
        "another backbone, input size or program",
        leftover=True,
    ),
    "feature of no record": Damage(feature_of_no_record, "features", "rows of no record"),
    "image of no record": Damage(lambda layout: flip(layout.images, free_row(layout) * 64 + 3), "records", "no record"),
    "images too long": Damage(
        lambda layout: os.truncate(layout.images, 10**5), "records", "images.u8 has 100000 bytes", leftover=True
    ),
    "temporary files": Damage(temporary_files, "folder", "left by an interrupted command", leftover=True),
    "backbone flipped": Damage(lambda layout: flip_data(layout.backbone), "backbone", "cannot be read"),
}
# What cannot be made again.
IRREPARABLE = {
    "records overwritten": Damage(table_overwritten("records"), "catalog", "the catalog is damaged"),
    "catalog replaced": Damage(lambda layout: layout.catalog.write_bytes(b"no catalog" * 400), "catalog", "damaged"),
    "catalog too short": Damage(lambda layout: os.truncate(layout.catalog, 40), "catalog", "no SQLite file"),
    "no JSON": Damage(sql("UPDATE meta SET value='{' WHERE key='salt'"), "catalog", "1 rows of meta hold no JSON"),
    "no text": Damage(sql("UPDATE records SET owner=CAST(x'ff' AS TEXT)"), "catalog", "UTF-8"),
    "tombstones lost": Damage(sql("DELETE FROM tombstones"), "requests", "its erased ids are not remembered"),
    "rows lost": Damage(sql("UPDATE meta SET value='100' WHERE key='rows'"), "records", "records behind row 100"),
    "label changed": Damage(
        sql("UPDATE records SET label=(label+1)%10 WHERE id=(SELECT max(id) FROM records WHERE split='train')"),
        "state",
        "its slice was tuned with other ids, contents or labels",
    ),
    "config torn": Damage(lambda layout: layout.config.write_text('{"seed": '), "config", "config.json cannot be used"),
    "config illegal": Damage(setting("tuning", "epochs", -1), "config", "--config.tuning.epochs=-1"),
    "config missing": Damage(
        lambda layout: layout.config.unlink(), "config", "config.json cannot be used: it is missing"
    ),
    "tuning changed": Damage(setting("tuning", "epochs", 3), "state", "the slices were tuned with another"),
    "sample changed": Damage(setting("clustering", "sample_size", 31), "state", "made with another sample"),
    "pipe": Damage(lambda layout: os.mkfifo(published_slice(layout) / "pipe"), "folder", "pipes, sockets or devices"),
    "link": Damage(link, "folder", "holds symbolic links"),
}
