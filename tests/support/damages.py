"""Damages of a workdir: what the doctor can mend, what it can only name, and the words of its findings."""

import contextlib
import json
import os
import shutil
import sqlite3

import numpy as np

from lmeraser_jax.storage.catalog import Catalog


def entry(layout) -> str:
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        return sorted(catalog.manifest().entries.values())[1]


def published_clustering(layout):
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        return layout.clustering(catalog.manifest().clustering) / "clustering.npz"


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x10
    path.write_bytes(data)


def feature_file(layout):
    (path,) = layout.records.glob("features-*.f32")
    return path


def free_row(layout):
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        used = {row[0] for row in catalog.db.execute("SELECT row FROM records")}
        return next(row for row in range(catalog.rows_used()) if row not in used)


@contextlib.contextmanager
def sql(layout):
    with contextlib.closing(sqlite3.connect(layout.catalog)) as db, db:
        yield db


# what can be made again: each is known by a part and words of its finding
def torn_slice(layout):
    for path in layout.slice(entry(layout)).rglob("d/*"):  # some of them are copies that nothing reads
        flip(path)


def missing_slice(layout):
    shutil.rmtree(layout.slice(entry(layout)))


def unregistered_entry(layout):
    with sql(layout) as db:
        db.execute("DELETE FROM slices WHERE digest=?", (entry(layout),))


def other_slice(layout):
    """A whole checkpoint, but another cluster's."""
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        one, other = sorted(catalog.manifest().entries.values())[:2]
    shutil.rmtree(layout.slice(one))
    shutil.copytree(layout.slice(other), layout.slice(one))


def torn_clustering(layout):
    flip(published_clustering(layout))


def missing_clustering(layout):
    shutil.rmtree(published_clustering(layout).parent)


def changed_clustering(change):
    """A whole file that says something else."""

    def damage(layout):
        path = published_clustering(layout)
        with np.load(path) as file:
            arrays = {name: file[name].copy() for name in file.files}
        change(arrays)
        np.savez(path, **arrays)

    return damage


def one_bit_of_a_prototype(arrays):
    arrays["prototypes"][1, 2] = np.nextafter(arrays["prototypes"][1, 2], np.float32(9))


def another_label(arrays):
    arrays["labels"][0] = (arrays["labels"][0] + 1) % len(arrays["keys"])


def rotten_feature(layout):
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        row = int(catalog.live("train").rows[5])
    flip(feature_file(layout), row * 64 + 9)


def torn_features(layout):
    feature_file(layout).write_bytes(feature_file(layout).read_bytes()[:-5])


def foreign_features(layout):
    (layout.records / "features-0123456789abcdef.f32").write_bytes(b"x" * 640)


def erased_feature(layout):
    view = np.memmap(feature_file(layout), np.float32, "r+").reshape(-1, 16)
    view[free_row(layout)] = 1
    view.flush()


def erased_image(layout):
    flip(layout.images, free_row(layout) * 64 + 3)


def longer_images(layout):
    with open(layout.images, "ab") as file:
        file.write(b"x" * 150)


def temporary_files(layout):
    (layout.root / ".config.json.tmp").write_text("{")
    (layout.slices / ".f00d.tmp").mkdir()
    (layout.clusterings / ".f00d.old").mkdir()
    (layout.clusterings / "f00d").mkdir()
    (layout.scratch / "audit-1").mkdir(parents=True)
    layout.pretraining.mkdir()


def replaced_slice(layout):
    """Killed between the two renames of a replacement."""
    folder = layout.slice(entry(layout))
    os.replace(folder, folder.with_name(f".{folder.name}.old"))


def unknown_slice(layout):
    shutil.copytree(layout.slice(entry(layout)), layout.slices / "f00d")


def stale_lock(layout):
    layout.lock.write_text("process 1234567 on elsewhere")


def open_modes(layout):
    layout.catalog.chmod(0o644)
    layout.slices.chmod(0o755)


def torn_backbone(layout):
    flip(largest(layout.backbone))


def rank_seed(layout):
    with sql(layout) as db:
        db.execute("UPDATE meta SET value='8' WHERE key='rank_seed'")


def torn_table(*names):
    """Writes over the first page of tables that can be built again."""

    def damage(layout):
        with sql(layout) as db:
            size = db.execute("PRAGMA page_size").fetchone()[0]
            pages = [db.execute("SELECT rootpage FROM sqlite_master WHERE name=?", (n,)).fetchone()[0] for n in names]
        with open(layout.catalog, "r+b") as file:
            for page in pages:
                file.seek((page - 1) * size)
                file.write(b"\xa5" * size)

    return damage


MENDABLE = {
    "torn slice": (torn_slice, "slices", "missing or damaged"),
    "missing slice": (missing_slice, "slices", "missing or damaged"),
    "unregistered entry": (unregistered_entry, "slices", "not in the catalog"),
    "other slice": (other_slice, "slices", "another digest"),
    "torn clustering": (torn_clustering, "clusterings", "missing or damaged"),
    "missing clustering": (missing_clustering, "clusterings", "missing or damaged"),
    "a bit of a prototype": (changed_clustering(one_bit_of_a_prototype), "clusterings", "other prototypes"),
    "another label": (changed_clustering(another_label), "clusterings", "keys are not the digests"),
    "rotten feature": (rotten_feature, "features", "other numbers than the backbone gives"),
    "torn features": (torn_features, "features", "no whole rows"),
    "foreign features": (foreign_features, "features", "another backbone"),
    "erased feature": (erased_feature, "features", "rows of no record"),
    "erased image": (erased_image, "images", "rows of no record hold pixels"),
    "longer images": (longer_images, "images", "interrupted import"),
    "temporary files": (temporary_files, "folder", "left by a killed"),
    "replaced slice": (replaced_slice, "folder", "is all that is left of"),
    "unknown slice": (unknown_slice, "slices", "the catalog does not know: f00d"),
    "stale lock": (stale_lock, "lock", "has ended without closing the lock"),
    "open modes": (open_modes, "folder", "open to other users: catalog.db, slices"),
    "torn backbone": (torn_backbone, "backbone", "backbone"),
    "rank seed": (rank_seed, "records", "ranked for sampling with seed 8, not 0"),
    "torn members": (torn_table("members", "members_row"), "catalog", "the catalog is damaged"),
    "torn slices and manifests": (torn_table("slices", "manifests"), "catalog", "the catalog is damaged"),
    "torn events": (torn_table("events"), "catalog", "the catalog is damaged"),
}


# what cannot be computed again: it is named, nothing is made worse
def lost_records(layout):
    torn_table("records")(layout)


def short_catalog(layout):
    layout.catalog.write_bytes(b"SQLite format 3\0" + b"x" * 40)


def foreign_catalog(layout):
    layout.catalog.write_bytes(b"no catalog" * 400)


def no_catalog(layout):
    layout.catalog.unlink()


def other_label(layout):
    with sql(layout) as db:
        db.execute("UPDATE records SET label=(label+1)%10 WHERE id=(SELECT max(id) FROM records WHERE split='train')")


def illegal_label(layout):
    with sql(layout) as db:
        db.execute("UPDATE records SET label=77 WHERE id=(SELECT max(id) FROM records WHERE split='test')")


def other_rows(layout):
    with sql(layout) as db:
        db.execute("UPDATE meta SET value='100' WHERE key='rows'")


def torn_salt(layout):
    with sql(layout) as db:
        db.execute("UPDATE meta SET value='\"pepper\"' WHERE key='salt'")


def lost_tombstone(layout):
    with sql(layout) as db:
        db.execute("DELETE FROM tombstones")


def no_config(layout):
    layout.config.unlink()


def torn_config(layout):
    layout.config.write_text('{"seed": ')


def illegal_config(layout):
    changed_config(layout, "tuning", "epochs", -1)


def other_tuning(layout):
    changed_config(layout, "tuning", "epochs", 3)


def other_sample(layout):
    changed_config(layout, "clustering", "sample_size", 31)


def other_split(layout):
    changed_config(layout, "data", "holdout", 0.5)


def other_backbone(layout):
    changed_config(layout, "backbone", "depth", 2)


def changed_config(layout, group, name, value):
    tree = json.loads(layout.config.read_text())
    tree[group][name] = value
    layout.config.write_text(json.dumps(tree))


def link(layout):
    os.replace(layout.images, layout.root.parent / "elsewhere.u8")
    layout.images.symlink_to(layout.root.parent / "elsewhere.u8")


HOPELESS = {
    "records": (lost_records, "records"),
    "short catalog": (short_catalog, "no SQLite file"),
    "foreign catalog": (foreign_catalog, "no SQLite file"),
    "no catalog": (no_catalog, "catalog.db is missing"),
    "other label": (other_label, "its slice was tuned with other ids, pixels or labels"),
    "illegal label": (illegal_label, "labels that are none of the 10 classes"),
    "other rows": (other_rows, "rows behind the last one that is in use"),
    "salt": (torn_salt, "the salt of the erased ids' hashes"),
    "tombstone": (lost_tombstone, "its erased ids are not remembered"),
    "no config": (no_config, "config.json is missing"),
    "torn config": (torn_config, "config.json cannot be used"),
    "illegal config": (illegal_config, "--config.tuning.epochs=-1"),
    "other tuning": (other_tuning, "the slices were tuned with another"),
    "other sample": (other_sample, "the clustering was made with another sample"),
    "other split": (other_split, "what the images were imported with: data.holdout: 0.0 -> 0.5"),
    "other backbone": (other_backbone, "what the backbone was made with: backbone.depth: 1 -> 2"),
    "link": (link, "is a symbolic link"),
}
