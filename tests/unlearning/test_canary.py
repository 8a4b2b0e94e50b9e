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

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.evaluation import montage
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning import erase, influence, purge, rollback
from lmeraser_jax.unlearning.approximate import publish_approximate
from lmeraser_jax.unlearning.artifacts import is_approximate, load_clustering, split_reference, tainted
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.rectify import Change, request_rectification
from lmeraser_jax.unlearning.run import prepare_run

ID, OWNER = "canary-5f1d/Ünverwechselbar", "Grace Canary-Hopper"
pytestmark = pytest.mark.usefixtures("fast")
SNAPSHOTS = small_config(tuning__epochs=6, checkpoints__every_epochs=2)


def source_with_canary(sampled: bool):
    """The small source, one record renamed to the canary with an owner and a pattern of its own."""
    source = small_source()
    images = source.read(range(len(source.items))).rows.copy()
    place = [i for i, item in enumerate(source.items) if item.split == "train"][7]
    images[place] = np.random.default_rng(5).integers(1, 255, images[place].shape, np.uint8)
    items = list(source.items)
    items[place] = items[place]._replace(id=ID if sampled else ID + "*", owner=OWNER)
    return with_items(source, items, images), items[place].id, images[place].tobytes()


def spellings(text: str) -> list[bytes]:
    raw = [text.encode(), text.encode("utf-16-le"), text.encode("utf-32-le"), json.dumps(text)[1:-1].encode()]
    return [*raw, base64.b64encode(text.encode()).rstrip(b"=")[:-1]]


def stretches(run, slices) -> list[bytes]:
    """48 bytes from the middle of every data file of some slices that is large enough to hold a head.

    Smaller files may hold nothing but shapes, which the slice that takes the place of an erased one has too.
    """
    files = [path for path in run.layout.slices.rglob("*") if path.is_file()]
    inside = [path.read_bytes() for path in files if slices.intersection(path.parts)]
    rest = b"".join(path.read_bytes() for path in files if not slices.intersection(path.parts))
    middles = [content[len(content) // 2 :][:48] for content in inside if len(content) > 600]
    return [middle for middle in middles if middle not in rest]


def search(root, needles) -> dict[bytes, list[str]]:
    """{needle: files that contain it}; the helper file of open connections aside."""
    places: dict[bytes, list[str]] = {}
    for file in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "catalog.db-shm"):
        content = file.read_bytes()
        for needle in needles:
            if needle in content:
                places.setdefault(needle, []).append(file.name)
    return places


@pytest.mark.parametrize("kind", ["unsampled", "sampled", "owner, deferred, quarantined"])
def test_no_byte_remembers_an_erased_record(tmp_path, kind):
    sampled = kind == "sampled"
    config = small_config(clustering__sample_size=100, clustering__cut="auto:5") if sampled else SNAPSHOTS
    source, name, pixels = source_with_canary(sampled)
    if not sampled:  # an earlier state, without the canary
        with small_run(tmp_path / "run", small_source(train=40), config) as run:
            build(run)
    with prepare_run(tmp_path / "run", config, jax.devices()[:1], source, reimport=not sampled) as (run, _):
        build(run)
        montage.save_montage(run, run.layout.picture)
        manifest = run.catalog.manifest()
        assert (name in load_clustering(run.layout, manifest.clustering).sample) == sampled
        key = run.catalog.clusters_of([name])[name]
        snapshots = [version.ref for version in rollback.versions(run.catalog, key) if "@" in version.ref]
        assert bool(snapshots) != sampled
        if snapshots:
            rollback.rollback(run, key, snapshots[0])
        rows = run.catalog.rows([name])
        feature = run.features(run.catalog.at(rows.values())).tobytes()
        slices = tainted(run, {row: name for row in rows.values()}).by_member
        assert split_reference(run.catalog.manifest().entries[key])[0] in slices
        parameters = stretches(run, slices)
        needles = [*spellings(name), *spellings(OWNER), pixels, feature, *parameters]
        if sampled:
            needles += spellings(key)
        before = search(run.layout.root, needles)
        assert {name.encode(), OWNER.encode(), pixels, feature} <= before.keys()
        assert len(before.keys() & set(parameters)) >= len(slices)

        if kind.startswith("owner"):
            erase.request_erasure(run, owners=[OWNER], request="r1", quarantine=True, defer=True)
            assert key in run.catalog.quarantined()
            erase.process(run)
        else:
            erase.request_erasure(run, [name], request="r1")
        assert run.catalog.quarantined() == frozenset() and not requests.any_open(run.catalog)
        assert search(run.layout.root, needles) == {}
        assert purge.leftovers(run) == [] and audit(run).ok
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / "catalog.db")) as db:
        assert name not in "\n".join(db.iterdump())
    assert search(tmp_path / "run", needles) == {}


def test_no_byte_remembers_what_was_rectified(tmp_path, monkeypatch):
    """Neither the old image and what an approximate update made with it, nor corrections that were erased with it."""
    report = influence.Report("newton", 0.0, 0.0, 1, 0.0, 1.0, 1.0, 0.0, True)
    monkeypatch.setattr(influence, "update", lambda _, start, *__: (jax.tree.map(lambda x: x * 1.5, start), report))
    source, name, pixels = source_with_canary(False)
    first, second = np.random.default_rng(6).integers(1, 255, (2, *source.shape), np.uint8)
    with small_run(tmp_path / "run", source) as run:
        build(run)
        rows = run.catalog.rows([name])
        feature = run.features(run.catalog.at(rows.values())).tobytes()
        slices = tainted(run, {row: name for row in rows.values()}).by_member
        needles = [pixels, feature, *stretches(run, slices), *(digest.encode() for digest in slices)]
        request_rectification(run, [Change(name, image=first)], "r1", defer=True)
        assert search(run.layout.root, [first.tobytes()]), "it waits in the catalog"
        publish_approximate(run, "newton")
        approximate = {ref for ref in run.catalog.manifest().entries.values() if is_approximate(ref)}
        needles += [*stretches(run, approximate), *(ref.encode() for ref in approximate)]
        assert approximate and search(run.layout.root, needles).keys() == set(needles)
        erase.process(run)
        assert search(run.layout.root, needles) == {} and audit(run).ok
        (place,) = search(run.layout.root, [first.tobytes()]).values()
        assert place == [run.layout.images.name], "the new version is live, and waits nowhere any more"
        request_rectification(run, [Change(name, image=second)], "r2", defer=True)
        assert search(run.layout.root, [second.tobytes()])
        erase.request_erasure(run, [name])
        needles += [first.tobytes(), second.tobytes(), *spellings(name), *spellings(OWNER)]
        assert search(run.layout.root, needles) == {} and purge.leftovers(run) == []
    assert search(tmp_path / "run", needles) == {}


def test_a_purge_that_leaves_something_out_is_noticed(tmp_path, monkeypatch):
    """Negative controls: pages that SQLite has freed, its log, and the rows of features are searched, too."""

    def left_behind(number: int, needle: bytes | None = None) -> set[str]:
        source, name, _ = source_with_canary(False)
        with small_run(tmp_path / f"run-{number}", source) as run:
            build(run)
            needle = needle or run.features(run.catalog.at(run.catalog.rows([name]).values())).tobytes()
            if number == 0:
                run.catalog.db.execute("PRAGMA secure_delete=OFF")
            erase.request_erasure(run, [name])
            return {file for files in search(run.layout.root, [needle]).values() for file in files}

    assert left_behind(0, OWNER.encode()) == {"catalog.db"}
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "flush", lambda self: None)
        assert "catalog.db-wal" in left_behind(1, OWNER.encode())
    real = RowFile.overwrite
    monkeypatch.setattr(
        RowFile, "overwrite", lambda file, rows: None if file.path.suffix == ".f32" else real(file, rows)
    )
    (file,) = left_behind(2)
    assert file.startswith("features-")
