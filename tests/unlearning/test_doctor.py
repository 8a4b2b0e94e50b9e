"""The doctor names every kind of damage, repairs bit for bit what can be made again, and harms nothing else."""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys

import jax
import numpy as np
import pytest
from damages import (
    HOPELESS,
    MENDABLE,
    flip,
    foreign_catalog,
    longer_images,
    other_rows,
    rotten_feature,
    sql,
    temporary_files,
    torn_clustering,
    torn_slice,
    torn_table,
    unknown_slice,
)
from helpers import small_config, small_run, small_source

from lmeraser_jax.cli.main import main
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import schema
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import doctor, erase
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.plan import plan
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import open_run, prepare_run

FLIPS = 5
NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, over torn arrays
HELPERS = ("lock", "catalog.db-shm", "catalog.db-wal")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained workdir from which one record was erased, closed to others, and its state."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with small_run(folder) as run:
        build(run)
        erase.request_erasure(run, [load_clustering(run.layout, run.catalog.manifest().clustering).sample[0]])
        run.features(run.catalog.live("train", "test"))
        found = state(run)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder, found


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run", copy_function=shutil.copy2)
    return Layout(tmp_path / "run")


def examined(layout, fix=False, features=10**6):
    return doctor.examine(layout.root, fix, features, jax.devices()[:1])


def contents(layout):
    return {
        str(path.relative_to(layout.root)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mode)
        for path in layout.root.rglob("*")
        if path.name not in HELPERS
    }


def state_after_training(layout, reimport=False):
    """What the next reconcile makes of the workdir, without the repair that lmeraser train puts before it."""
    with prepare_run(layout.root, small_config(), jax.devices()[:1], small_source(), reimport) as (run, _):
        build(run)
        assert leftovers(run) == []
        return state(run)


@pytest.mark.parametrize("fix", [False, True])
def test_a_healthy_workdir_stays_as_it_is(copy, fix):
    before = contents(copy)
    assert examined(copy, fix) == doctor.Diagnosis(()) and contents(copy) == before


@NOISE
def test_looking_does_not_write(copy):
    for damage in (torn_slice, torn_clustering, rotten_feature, temporary_files, unknown_slice, longer_images):
        damage(copy)
    before = contents(copy)
    assert not examined(copy).healthy and contents(copy) == before


@NOISE
@pytest.mark.parametrize("kind", MENDABLE)
def test_what_can_be_made_again_is_repaired_bit_for_bit(copy, trained, kind):
    damage, part, words = MENDABLE[kind]
    damage(copy)
    before = contents(copy)
    seen = examined(copy)
    assert contents(copy) == before, "looking writes nothing"
    assert any(f.part == part and words in f.what for f in seen.findings), seen.table()
    assert seen.healthy == (kind in ("stale lock", "open modes")), seen.table()
    mended = examined(copy, fix=True)
    assert any(f.part == part and f.state in ("fixed", "dropped") for f in mended.findings), mended.table()
    assert not any(f.state == "wrong" for f in mended.findings), mended.table()
    assert mended.healthy == all(f.state != "dropped" for f in mended.findings)
    assert differences(state_after_training(copy), trained[1]) == []
    after = examined(copy)
    assert after.healthy and all(f.part == "folder" and f.state == "note" for f in after.findings), after.table()


def test_rotten_and_lost_images_are_named_and_read_from_the_source_again(copy, trained):
    with contextlib.closing(Catalog(copy.catalog)) as catalog:
        records, rows = catalog.live("train", "test", "public"), catalog.rows_used()
    order = np.argsort(records.rows)
    first, last = (records.ids[i] for i in (order[3], order[-1]))
    flip(copy.images, int(records.rows[order[3]]) * 64 + 5)
    copy.images.write_bytes(copy.images.read_bytes()[: (rows - 2) * 64 + 7])
    seen = examined(copy)
    text = seen.table()
    assert first in text and last in text and f"images.u8 holds {rows - 2} of {rows} rows" in text
    assert "lmeraser train --reimport" in text and "lmeraser unlearn" in text
    mended = examined(copy, fix=True)
    assert not mended.healthy and copy.images.stat().st_size == rows * 64, "pixels cannot be computed again"
    assert differences(state_after_training(copy, reimport=True), trained[1]) == []
    assert examined(copy, fix=True).healthy


def test_rotten_records_can_be_erased_instead(copy):
    with contextlib.closing(Catalog(copy.catalog)) as catalog:
        table = catalog.live("train")
    flip(copy.images, int(table.rows[4]) * 64)
    assert table.ids[4] in examined(copy).table()
    with open_run(copy.root, devices=jax.devices()[:1], write=True) as run:
        erase.request_erasure(run, [table.ids[4]])
    assert not [f for f in examined(copy).findings if f.part == "images"]


@pytest.mark.parametrize("kind", HOPELESS)
def test_what_cannot_be_made_again_is_named_and_left_alone(copy, kind):
    damage, words = HOPELESS[kind]
    damage(copy)
    before = contents(copy)
    for fix in (False, True):
        seen = examined(copy, fix)
        assert not seen.healthy and words in seen.table(), seen.table()
        assert all(f.remedy for f in seen.findings), seen.table()
    assert contents(copy) == before


def test_the_images_of_rows_that_the_catalog_lost_count_of_survive(copy):
    """The number of rows is too small: nothing may be cut off the image file."""
    other_rows(copy)
    size = copy.images.stat().st_size
    assert not examined(copy, fix=True).healthy and copy.images.stat().st_size == size


def test_the_recovered_catalog_holds_everything_but_what_is_built_again(copy, trained):
    tables = ("meta", "records", "tombstones", "requests", "receipts")
    with sql(copy) as db:
        before = {name: sorted(map(repr, db.execute(f"SELECT * FROM {name}"))) for name in tables}
        version = db.execute("SELECT max(version) FROM manifests").fetchone()[0]
    torn_table("manifests")(copy)
    damaged = copy.catalog.read_bytes()
    assert not examined(copy, fix=True).healthy and schema.damaged_of(copy.catalog).read_bytes() == damaged
    with sql(copy) as db:
        assert {name: sorted(map(repr, db.execute(f"SELECT * FROM {name}"))) for name in tables} == before
    assert differences(state_after_training(copy), trained[1]) == []
    assert "holds the records as they once were" in examined(copy).table()
    with open_run(copy.root, devices=jax.devices()[:1], write=True) as run:
        assert run.catalog.manifest().version > version, "no version is given twice"
        erase.request_erasure(run, [run.catalog.live("train").ids[0]])
    assert not schema.damaged_of(copy.catalog).exists(), "the purge removes the copy"


def test_waiting_requests_and_old_copies_are_told(copy):
    with contextlib.closing(Catalog(copy.catalog)) as catalog:
        from lmeraser_jax.storage import requests

        requests.accept(catalog, [catalog.live("train").ids[0]], request="later")
    schema.backup_of(copy.catalog).write_bytes(b"old")
    seen = examined(copy)
    assert seen.healthy and {f.state for f in seen.findings} == {"note"}
    assert "waiting erasures: later" in seen.table() and "lmeraser process" in seen.table()
    assert "catalog.db.backup holds the records as they once were" in seen.table()


def test_a_running_writer_is_named(copy):
    with writer_lock(copy):
        for fix in (False, True):
            (finding,) = examined(copy, fix).findings
            assert finding.part == "lock" and f"process {os.getpid()} on {socket.gethostname()}" in finding.what


def test_a_catalog_that_another_process_keeps_locked_gives_one_message(copy, monkeypatch):
    monkeypatch.setattr(schema, "LONGEST_WAIT", 0.1)
    other = sqlite3.connect(copy.catalog, isolation_level=None)
    with contextlib.closing(other), contextlib.closing(Catalog(copy.catalog)) as catalog:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="locked by another process.*run the same command again"):
            with catalog.transaction():
                pass
        other.execute("COMMIT")
    with contextlib.closing(sqlite3.connect(copy.catalog, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="locked by another process"):
            Catalog(copy.catalog)
        (finding,) = (f for f in examined(copy).findings if f.part == "catalog")
        assert "locked by another process" in finding.what


def test_no_workdir_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no workdir|does not exist"):
            doctor.examine(path)


def test_the_command(copy, capsys):
    assert main(["doctor", f"--workdir={copy.root}", "--features=0", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"healthy": True, "findings": []}
    copy.config.write_text("{")
    assert main(["doctor", f"--workdir={copy.root}", "--fix"]) == 1
    assert "config.json cannot be used" in capsys.readouterr().out
    assert main(["doctor", "--workdir=/nowhere"]) == 2


def test_a_broken_catalog_is_examined_without_jax(copy):
    foreign_catalog(copy)
    code = "import sys\nfrom lmeraser_jax.unlearning import doctor\nassert not doctor.examine(sys.argv[1]).healthy\n"
    code += "assert 'jax' not in sys.modules and 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(copy.root)], check=True)


def rotten(layout):
    """Whether a live record's pixels are no longer those of its content hash."""
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        table, view = catalog.live("train", "test", "public"), image_file(layout, catalog).view()
        return any(content_hash(view[row]) != content for row, content in zip(table.rows, table.contents, strict=True))


def harmed(layout, wanted, features) -> bool:
    """Whether a flipped byte matters: state or features differ, a record's pixels have rotted, or a reader fails."""
    try:
        with open_run(layout.root, devices=jax.devices()[:1]) as run:
            if differences(state(run), wanted) or run.features(run.catalog.live("train")).tobytes() != features:
                return True
            reconcilable = plan(run)
        return rotten(layout) or bool(reconcilable.missing)
    except Exception:
        return True


@NOISE
@pytest.mark.parametrize("part", ["slices", "clusterings", "features", "images", "config.json", "catalog.db"])
def test_a_flipped_bit_that_matters_is_never_called_healthy(copy, trained, part):
    with open_run(copy.root, devices=jax.devices()[:1]) as run:
        features = run.features(run.catalog.live("train")).tobytes()
    rng = np.random.default_rng(sum(part.encode()))
    below = {"features": "records/features-*", "images": "records/images.u8"}.get(part, f"{part}/**/*")
    files = sorted(path for path in copy.root.glob(part if "." in part else below) if path.is_file())
    mattered = flips = 0
    while flips < FLIPS or not mattered and flips < 10 * FLIPS:  # some files are copies that nothing reads
        flips += 1
        path = files[rng.integers(len(files))]
        good = path.read_bytes()
        data = bytearray(good)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        seen, matters = examined(copy), harmed(copy, trained[1], features)
        assert not (matters and seen.healthy), (path, [i for i in range(len(good)) if good[i] != data[i]])
        mattered += matters
        path.write_bytes(good)
        for name in HELPERS[1:]:
            (copy.root / name).unlink(missing_ok=True)
    assert examined(copy).healthy and mattered > 0, "some of them must matter, or nothing was tested"
