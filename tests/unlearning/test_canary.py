"""A canary in every place: after its erasure no byte of the workdir remembers it, in any spelling.

What is searched for: the record's id, its owner, its pixels, its feature, the keys of clusters that it was sampled
for, and stretches of the files that held tainted parameters. Before the erasure each of them has to be found.
"""

import base64
import contextlib
import json
import sqlite3

import jax
import numpy as np
import pytest
from helpers import small_config, small_run, small_source, with_items

from lmeraser_jax.evaluation import montage
from lmeraser_jax.storage import requests
from lmeraser_jax.unlearning import erase, purge, rollback
from lmeraser_jax.unlearning.artifacts import load_clustering, parts_of, tainted
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run

ID, OWNER = "canary-5f1d/Ünverwechselbar", "Grace Canary-Hopper"
ALL_ON = small_config(tuning__slices=2, tuning__epochs=6, checkpoints__every_epochs=2)


def source_with_canary(sampled):
    """The small source, one record renamed to the canary with an owner and a pattern of its own."""
    source = small_source()
    images = source.read(0, len(source.items)).images.copy()
    rng = np.random.default_rng(5)
    private = [i for i, item in enumerate(source.items) if item.split == "train"]
    place = private[7]
    images[place] = rng.integers(1, 255, images[place].shape, np.uint8)
    items = list(source.items)
    items[place] = items[place]._replace(id=ID + ("" if sampled else "*"), owner=OWNER)
    return with_items(source, items, images), items[place].id, images[place].tobytes()


def spellings(text):
    raw = [text.encode(), text.encode("utf-16-le"), text.encode("utf-32-le"), json.dumps(text)[1:-1].encode()]
    return [*raw, base64.b64encode(text.encode()).rstrip(b"=")[:-1]]


def stretches(run, slices):
    """48 bytes from the middle of every data file of some slices, where no other slice has the same."""
    inside = [p for name in slices for p in run.layout.slice(name).rglob("*") if p.is_file()]
    others = [p for p in run.layout.slices.rglob("*") if p.is_file() and not any(n in p.parts for n in slices)]
    rest = b"".join(p.read_bytes() for p in others)
    middles = [content[len(content) // 2 :][:48] for content in (p.read_bytes() for p in inside) if len(content) > 150]
    return [middle for middle in middles if middle not in rest]


def found_in(root, needles):
    """{needle: files that contain it}, and the bytes searched; the helper file of open connections aside."""
    found, searched = {}, 0
    for file in sorted(root.rglob("*")):
        if file.is_file() and file.name != "catalog.db-shm":
            content = file.read_bytes()
            searched += len(content)
            for needle in needles:
                if needle in content:
                    found.setdefault(needle, []).append(file.name)
    return found, searched


@pytest.mark.parametrize("how", ["unsampled", "sampled", "owner, deferred, quarantined"])
def test_no_byte_remembers_an_erased_record(tmp_path, how, capsys):
    config = ALL_ON if how != "sampled" else small_config(clustering__sample_size=100, clustering__cut="auto:5")
    source, name, pixels = source_with_canary(how == "sampled")
    if how != "sampled":  # an earlier state, without the canary
        with small_run(tmp_path / "run", small_source(train=40), config) as run:
            build(run)
    with prepare_run(tmp_path / "run", config, jax.devices()[:1], source, reimport=how != "sampled") as (run, _):
        build(run)
        montage.save_montage(run, run.layout.picture)
        manifest = run.catalog.manifest()
        sample = load_clustering(run.layout, manifest.clustering).sample
        assert (name in sample) == (how == "sampled")
        key = run.catalog.clusters_of([name])[name]
        if how != "sampled" and any("@" in v.ref for v in rollback.versions(run, key)):
            rollback.rollback(run, key, next(v.ref for v in rollback.versions(run, key) if "@" in v.ref))
        rows = run.catalog.rows([name])
        row = list(rows.values())
        feature = run.features(run.catalog.at(row)).tobytes()
        slices = tainted(run, rows).by_member
        assert parts_of(run.catalog.manifest().entries[key])[0] in slices
        needles = [*spellings(name), *spellings(OWNER), pixels, feature, *stretches(run, slices)]
        needles += spellings(key) if how == "sampled" else []
        before, _ = found_in(run.layout.root, needles)
        assert {name.encode(), OWNER.encode(), pixels, feature} <= set(before)
        assert len([needle for needle in stretches(run, slices) if needle in before]) >= len(slices)

        if how.startswith("owner"):
            erase.request_erasure(run, owners=[OWNER], request="r1", quarantine=True, defer=True)
            assert key in run.catalog.quarantined()
            erase.process(run)
        else:
            erase.request_erasure(run, [name], request="r1")
        assert run.catalog.quarantined() == frozenset() and not requests.any_open(run.catalog)
        after, searched = found_in(run.layout.root, needles)
        assert after == {}, {bytes(needle[:24]): files for needle, files in after.items()}
        assert purge.leftovers(run) == [] and audit(run).ok
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "catalog.db")) as db:
        assert name not in "\n".join(db.iterdump())
    again, more = found_in(tmp_path / "run", needles)
    assert again == {}
    with capsys.disabled():
        what = f"{len(needles)} needles, {len(before)} of them found before, none in {searched + more} bytes after"
        print(f" [{how}: {what}]", end="")


def test_without_secure_delete_the_search_would_find_it(tmp_path, monkeypatch):
    """Negative control: pages that SQLite has freed are searched, too."""
    source, name, _ = source_with_canary(False)
    with small_run(tmp_path / "run", source) as run:
        build(run)
        run.catalog.db.execute("PRAGMA secure_delete=OFF")
        erase.request_erasure(run, [name])
    assert found_in(tmp_path / "run", [name.encode(), OWNER.encode()])[0] != {}


def test_without_emptying_the_log_the_search_would_find_it(tmp_path, monkeypatch):
    """Negative control: the write-ahead log is searched, too."""
    source, name, _ = source_with_canary(False)
    with small_run(tmp_path / "run", source) as run:
        build(run)
        monkeypatch.setattr(type(run.catalog), "flush", lambda self: None)
        erase.request_erasure(run, [name])
        files = {file for hits in found_in(run.layout.root, [name.encode()])[0].values() for file in hits}
        assert "catalog.db-wal" in files
