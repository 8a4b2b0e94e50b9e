"""The doctor names every kind of damage, repairs bit for bit what can be made again, and harms nothing else."""

import contextlib
import errno
import importlib
import itertools
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from damages import (
    IRREPARABLE,
    REPAIRABLE,
    clustering_file,
    feature_file,
    flip,
    published_slice,
    slice_flipped,
    slice_of_another_cluster,
    sql,
)
from helpers import small_config, small_run, small_source
from PIL import Image

from lmeraser_jax.cli.main import main
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import requests, schema
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import doctor, erase
from lmeraser_jax.unlearning import run as run_module
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build, repair
from lmeraser_jax.unlearning.doctor import State
from lmeraser_jax.unlearning.plan import current_plan
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import open_run, prepare_run
from lmeraser_jax.unlearning.verify import verify_all

pytestmark = pytest.mark.usefixtures("fast")
MENDED = {State.FIXED, State.DROPPED, State.LEFTOVER}
OPEN_HELPERS = ("lock", "catalog.db-shm", "catalog.db-wal")  # whoever opens a catalog makes them


@pytest.fixture(scope="module")
def template(tmp_path_factory, fast, fast_template):
    """A workdir from which one sampled record was erased, with all features, and its state."""
    folder = tmp_path_factory.mktemp("doctor") / "run"
    shutil.copytree(fast_template, folder)
    with small_run(folder) as run:
        erase.request_erasure(run, [load_clustering(run.layout, run.catalog.manifest().clustering).sample[0]])
        run.features(run.catalog.live("train", "test"))
        return folder, state(run)


@pytest.fixture
def copy(template, tmp_path):
    """Makes a fresh copy of the workdir."""
    return lambda name="run": Layout(shutil.copytree(template[0], tmp_path / name / "run"))


def examined(layout, fix=False):
    return doctor.examine(layout.root, fix, jax.devices()[:1])


def contents(layout):
    return {
        str(path.relative_to(layout.root)): path.read_bytes() if path.is_file() else b""
        for path in layout.root.rglob("*")
        if path.name not in OPEN_HELPERS
    }


def state_after_training(layout, reimport=False):
    """What the next build makes of the workdir, without the repair that lmeraser train puts before it."""
    with prepare_run(layout.root, small_config(), jax.devices()[:1], small_source(), reimport) as (run, _):
        build(run)
        assert leftovers(run) == []
        return state(run)


def test_a_healthy_workdir_stays_as_it_is(copy):
    layout = copy()
    before = contents(layout)
    for fix in (False, True):
        assert examined(layout, fix) == doctor.Diagnosis(()) and contents(layout) == before


def test_features_are_compared_under_the_settings_of_a_run(copy, monkeypatch):
    def extract(extractor, images):
        assert not jax.config.values["jax_enable_x64"]
        return real(extractor, images)

    real = run_module.Extractor.__call__
    monkeypatch.setattr(run_module.Extractor, "__call__", extract)
    with jax.enable_x64(True):
        assert examined(copy()) == doctor.Diagnosis(())


def test_damage_is_named_without_a_write_and_repaired_to_the_last_bit(copy, template):
    for kind, damage in REPAIRABLE.items():
        layout = copy(kind)
        damage.apply(layout)
        before = contents(layout)
        seen = examined(layout)
        named = [p for p in seen.problems if p.component == damage.component and damage.words in p.message]
        assert named and {seen.damaged, not seen.healthy} == {not damage.leftover}, f"{kind}: {seen.table()}"
        assert not damage.leftover or "damaged" not in seen.table(), f"{kind}: {seen.table()}"
        assert contents(layout) == before, f"{kind}: looking writes nothing"
        repaired = examined(layout, fix=True)
        assert {problem.state for problem in repaired.problems} <= MENDED, repaired.table()
        assert differences(state_after_training(layout), template[1]) == [], kind
        assert examined(layout) == doctor.Diagnosis(()), kind


def test_what_cannot_be_made_again_is_named_and_left_alone(copy):
    for kind, damage in IRREPARABLE.items():
        layout = copy(kind)
        damage.apply(layout)
        before = contents(layout)
        for fix in (False, True):
            seen = examined(layout, fix)
            named = [p for p in seen.problems if p.component == damage.component and damage.words in p.message]
            assert [problem.state for problem in named] == [State.DAMAGED] and named[0].remedy + damage.component, kind
            assert not seen.healthy and contents(layout) == before, f"{kind}: {seen.table()}"


def test_rotten_and_lost_images_are_named_and_read_from_the_source_again(copy, template):
    layout = copy()
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        records, rows = catalog.live("train", "test", "public"), catalog.rows_used()
    order = np.argsort(records.rows)
    first, last = (records.ids[i] for i in (order[3], order[-1]))
    flip(layout.images, int(records.rows[order[3]]) * 64 + 5)
    os.truncate(layout.images, (rows - 2) * 64 + 7)
    text = examined(layout).table()
    assert first in text and last in text and "lmeraser train --reimport" in text and "lmeraser unlearn" in text
    repaired = examined(layout, fix=True)
    assert repaired.damaged and layout.images.stat().st_size == rows * 64, "pixels cannot be computed again"
    assert differences(state_after_training(layout, reimport=True), template[1]) == []
    assert examined(layout).healthy


ERRORS = itertools.cycle(
    [OSError(code, os.strerror(code)) for code in (errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.EIO)]
)
OPERATIONS = {"open": "builtins.open io.open", "stat": "os.stat", "list": "os.listdir os.scandir"}
LIBRARIES = {
    "tensorstore.open": RuntimeError("no thread"),
    "numpy.load": MemoryError(),
    "jax.local_devices": AssertionError(),
    "lmeraser_jax.models.backbone.graph": RuntimeError("FAILED_PRECONDITION: No visible GPU devices"),
    "lmeraser_jax.unlearning.run.Extractor": ImportError("libcudart.so"),
    "sqlite3.connect": sqlite3.OperationalError("unable to open database file"),
}


def fault(patch, names, error, place=None) -> None:
    """Lets functions raise an error; with a place only for paths at or below it."""

    def failing(real):
        def fail(*args, **options):
            path = args[0] if args else None
            if place is None or isinstance(path, str | Path) and place in (Path(path), *Path(path).parents):
                raise error
            return real(*args, **options)

        return fail

    for name in names.split():
        module, _, function = name.rpartition(".")
        patch.setattr(name, failing(getattr(importlib.import_module(module), function)))


def faults(layout):
    """(label, what to patch, error, place): everything that can stop somebody from looking."""
    places = {"root": layout.root, "config": layout.config, "catalog": layout.catalog, "lock": layout.lock}
    places |= {"records": layout.records, "images": layout.images, "features": feature_file(layout)}
    places |= {"backbone": layout.backbone, "slices": layout.slices, "clusterings": layout.clusterings}
    places |= {"one slice": published_slice(layout), "one clustering": clustering_file(layout)}
    for (kind, place), operation in itertools.product(places.items(), OPERATIONS):
        if operation != "list" or place.is_dir():
            yield f"{operation} {kind}", OPERATIONS[operation], next(ERRORS), place
    for name, error in LIBRARIES.items():
        yield name, name, error, None


def test_what_could_not_be_looked_at_is_no_damage(copy, monkeypatch):
    """Whatever error comes, from wherever: "not checked", and --fix leaves every byte of a healthy workdir."""
    layout = copy()
    before, unchecked = contents(layout), 0
    for label, names, error, place in faults(layout):
        for fix in (False, True):
            with monkeypatch.context() as patch:
                fault(patch, names, error, place)
                try:
                    seen = doctor.examine(layout.root, fix)
                except OSError:  # not even the catalog's name can be looked up
                    assert label in ("stat root", "stat catalog"), label
                else:
                    assert {problem.state for problem in seen.problems} <= {State.UNCHECKED}, (label, seen.table())
                    unchecked += not seen.healthy
            assert contents(layout) == before, label
    assert unchecked > 50 and examined(layout) == doctor.Diagnosis(()), unchecked


def test_commands_neither_drop_nor_accuse_what_they_cannot_read(copy, template, monkeypatch):
    """Published slices, slices that wait to be registered, clusterings: kept until somebody can read them."""
    layout, devices = copy(), jax.devices()[:1]
    places = {layout.slices, layout.clusterings}
    listed = [fault_ for fault_ in faults(layout) if fault_[3] is None or places & {fault_[3], *fault_[3].parents}]

    def artifacts():
        files = {name: text for name, text in contents(layout).items() if name.startswith(("slices/", "clusterings/"))}
        return {name: text for name, text in files.items() if "/." not in name}

    before = artifacts()
    for label, names, error, place in listed:
        with open_run(layout.root, devices=devices, write=True) as run, monkeypatch.context() as patch:
            fault(patch, names, error, place)
            with contextlib.suppress(type(error), OSError):
                assert repair(run) == [], label
            with contextlib.suppress(type(error), OSError):
                assert all(verdict.ok for verdict in verify_all(layout, run.catalog)), label
        assert artifacts() == before, label
    with open_run(layout.root, devices=devices) as run, monkeypatch.context() as patch:
        fault(patch, OPERATIONS["list"], PermissionError(), layout.records)
        with pytest.raises(PermissionError):
            leftovers(run)
    for label, names, error, place in listed:
        for table in ("slices", "manifests", "entries"):  # as if nothing had been registered yet
            sql(f"DELETE FROM {table}")(layout)
        with monkeypatch.context() as patch, contextlib.suppress(type(error), OSError, UserError):
            fault(patch, names, error, place)
            assert differences(state_after_training(layout), template[1]) == [], label
        assert before.items() <= artifacts().items(), label
    assert differences(state_after_training(layout), template[1]) == []


def test_few_file_handles_or_no_device_leave_a_healthy_workdir(copy):
    layout = copy()
    before = contents(layout)
    code = "import resource, sys\nfrom lmeraser_jax.cli.main import main\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), 99))\nsys.exit(main(sys.argv[2:]))"
    for handles, environment in ((6, {}), (8, {}), (50, {"JAX_PLATFORMS": "cuda"})):
        call = [sys.executable, "-c", code, str(handles), "doctor", f"--workdir={layout.root}", "--fix"]
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 3 and "not checked" in done.stdout, (handles, environment, done)
        assert "damaged" not in done.stdout and contents(layout) == before
        assert all(name in done.stdout for name in environment.values()), done.stdout


def test_a_workdir_or_catalog_that_another_process_holds_is_not_checked(copy, monkeypatch):
    layout = copy()
    monkeypatch.setattr(schema, "LONGEST_WAIT", 0.1)
    with writer_lock(layout):
        for fix in (False, True):
            (problem,) = examined(layout, fix).problems
            assert problem.state == State.UNCHECKED
            assert f"is being written by process {os.getpid()} on {socket.gethostname()}" in problem.message
    with contextlib.closing(sqlite3.connect(layout.catalog, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        (problem,) = examined(layout).problems
        assert (problem.component, problem.state) == ("catalog", State.UNCHECKED) and "locked" in problem.message


def test_commands_name_damage_and_train_mends_it_to_the_last_bit(copy, template, tmp_path, capsys):
    layout, image = copy(), tmp_path / "image.png"
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(image)
    flag = f"--workdir={layout.root}"
    for damage, message, tuned in (
        (lambda layout: feature_file(layout).unlink(), "", 0),
        (slice_flipped, str(layout.root), 1),
        (slice_of_another_cluster, "is damaged", 1),
        (lambda layout: shutil.rmtree(published_slice(layout)), str(layout.root), 1),
        (lambda layout: shutil.rmtree(layout.clusterings), str(layout.root), 0),
    ):
        damage(layout)
        shutil.rmtree(layout.packed)  # from which predictions would go on
        capsys.readouterr()
        assert main(["predict", str(image), flag]) == (2 if message else 0)
        assert not message or message in error_line(capsys)
        assert main(["train", flag]) == 0
        out, err = capsys.readouterr()
        assert err.count("; it is tuned again") == tuned and ("tuned 1 clusters" in out) == bool(tuned)
        with open_run(layout.root) as run:
            assert differences(state(run), template[1]) == [] and leftovers(run) == []
    assert main(["predict", str(image), flag]) == 0 and main(["audit", flag]) == 0


def error_line(capsys) -> str:
    """The one error message of the last command."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_locked_catalog_or_a_deleted_receipts_folder_stops_no_erasure(copy, template, monkeypatch, capsys):
    """Somebody's sqlite3 shell holds a transaction: writers wait, then say so; readers do not care."""
    layout = copy()
    shutil.rmtree(layout.receipts)
    monkeypatch.setattr(schema, "LONGEST_WAIT", 0.1)
    with open_run(layout.root) as run:
        unlearn = ["unlearn", f"--workdir={layout.root}", f"--records={run.catalog.live('train').ids[0]}"]
    with contextlib.closing(sqlite3.connect(layout.catalog, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        assert main(unlearn) == 2 and "catalog.db is locked by another process" in error_line(capsys)
        assert main(["inspect", f"--workdir={layout.root}"]) == 0
        with open_run(layout.root) as run:
            assert differences(state(run), template[1]) == []
    assert main(unlearn) == 0 and len(list(layout.receipts.iterdir())) == 1


def test_erasures_that_wait_are_noted(copy):
    layout = copy()
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        requests.accept(catalog, [catalog.live("train").ids[0]], request="later")
    seen = examined(layout, fix=True)
    assert seen.healthy and "waiting erasures: later" in seen.table() and "lmeraser process" in seen.table()


def test_the_exit_code_tells_damage_from_what_was_not_checked(copy, capsys):
    layout = copy()
    assert main(["doctor", f"--workdir={layout.root}", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"healthy": True, "problems": []}
    with writer_lock(layout):
        assert main(["doctor", f"--workdir={layout.root}"]) == 3
    slice_flipped(layout)
    assert main(["doctor", f"--workdir={layout.root}", "--fix"]) == 1
    layout.config.write_text("{")
    assert main(["doctor", f"--workdir={layout.root}"]) == 1
    assert "config.json cannot be used" in capsys.readouterr().out
    assert main(["doctor", "--workdir=/nowhere"]) == 2


def test_a_broken_catalog_is_examined_without_jax(copy):
    layout = copy()
    IRREPARABLE["catalog replaced"].apply(layout)
    code = "import sys\nfrom lmeraser_jax.unlearning import doctor\nassert doctor.examine(sys.argv[1]).damaged\n"
    code += "assert not {'jax', 'orbax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, str(layout.root)], check=True)


def harmed(layout, wanted, features) -> bool:
    """Whether a flipped byte matters: state or features differ, a record's pixels have changed, or a reader fails."""
    try:
        with open_run(layout.root, devices=jax.devices()[:1]) as run:
            if differences(state(run), wanted) or run.features(run.catalog.live("train")).tobytes() != features:
                return True
            table, view = run.catalog.live("train", "test", "public"), image_file(layout, run.catalog).view()
            changed = [content_hash(view[row]) != text for row, text in zip(table.rows, table.contents, strict=True)]
            return any(changed) or bool(current_plan(run).missing)
    except Exception:
        return True


@pytest.mark.parametrize("files", ["slices/**/*", "clusterings/**/*", "records/*", "config.json", "catalog.db"])
@pytest.mark.parametrize("flips", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_flipped_bit_that_matters_is_never_called_healthy(copy, template, files, flips):
    layout, rng, mattered = copy(), np.random.default_rng(len(files)), 0
    with open_run(layout.root, devices=jax.devices()[:1]) as run:
        features = run.features(run.catalog.live("train")).tobytes()
    paths = sorted(path for path in layout.root.glob(files) if path.is_file())
    for _ in range(flips):
        path = paths[rng.integers(len(paths))]
        good = path.read_bytes()
        flip(path, int(rng.integers(len(good))))
        seen, matters = examined(layout), harmed(layout, template[1], features)
        assert not (matters and seen.healthy), (path, seen.table())
        mattered += matters
        path.write_bytes(good)
        for name in OPEN_HELPERS[1:]:
            (layout.root / name).unlink(missing_ok=True)
    assert examined(layout).healthy and (mattered or flips < 30), "some of them must matter, or nothing was tested"
