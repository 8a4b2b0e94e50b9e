"""A build: resume, failures that lose nothing, what a purge leaves. On the fast stand-ins."""

import dataclasses
import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from fakes import fake_tune
from helpers import small_config, small_run, small_source, without

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.atomic_files import write_bytes
from lmeraser_jax.storage.requests import any_open, resolve
from lmeraser_jax.training import slice_files
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.unlearning import artifacts, erase, purge
from lmeraser_jax.unlearning import build as build_module
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.plan import current_plan
from lmeraser_jax.unlearning.run import open_run

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fast):
    """A trained workdir and its state. Tests copy it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, state_from_scratch(folder, small_source())


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def expected(trained):
    """The state of an undisturbed training."""
    return trained[1]


def state_from_scratch(folder, source, config=None):
    with small_run(folder, source, config) as run:
        build(run)
        return state(run)


def sample_of(run):
    return load_clustering(run.layout, run.catalog.manifest().clustering).sample


def interrupted(run, after, action):
    """Runs an action that is interrupted when it registers another slice after so many; writes are one at a time."""
    register, registered = build_module.register, []

    def limited(*args):
        if len(registered) == after:
            raise KeyboardInterrupt
        registered.append(register(*args))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slice_files, "WRITERS", 1)
        patch.setattr(build_module, "register", limited)
        action(run)


def test_an_interrupted_train_goes_on_where_it_stopped(tmp_path, expected):
    with small_run(tmp_path / "run") as run:
        interrupted(run, 2, build)
        assert run.catalog.manifest() is None, "nothing is published halfway"
    with small_run(tmp_path / "run") as run:
        report = build(run)
        assert (report.reused, report.adopted) == (3, 1), "two were registered, one only written"
        assert report.retuned == report.clusters - 3
        assert differences(state(run), expected) == [] and purge.leftovers(run) == []
        again = build(run)
        assert (again.published, again.retuned, again.version) == (False, 0, report.version)


def test_slices_that_nobody_registered_are_registered_with_their_snapshots(tmp_path):
    config = small_config(tuning__epochs=6, checkpoints__every_epochs=1, checkpoints__keep=2)
    whole = state_from_scratch(tmp_path / "whole", small_source(), config)
    with small_run(tmp_path / "whole", config=config) as run:
        rows, epochs = run.catalog.slices(), {name: run.catalog.epochs(name) for name in run.catalog.slices()}
    with small_run(tmp_path / "run", config=config) as run:
        shutil.copytree(tmp_path / "whole" / "slices", run.layout.slices)
        report = build(run)
        assert (report.adopted, report.retuned) == (len(rows), 0)
        assert differences(state(run), whole) == [] and purge.leftovers(run) == []
        assert run.catalog.slices() == rows
        assert {name: run.catalog.epochs(name) for name in rows} == epochs and all(epochs.values())


def test_a_slice_made_with_a_record_that_is_erased_by_now_is_not_registered(workdir, tmp_path):
    with small_run(workdir) as run:
        records, sample = run.catalog.live("train"), sample_of(run)
        largest = Counter(records.clusters).most_common(1)[0][0]
        members = [name for name, key in zip(records.ids, records.clusters, strict=True) if key == largest]
        first, second = [name for name in members if name not in sample][:2]
        interrupted(run, 0, lambda run: erase.request_erasure(run, [first]))
        (orphan,) = {path.name for path in run.layout.slices.iterdir()} - set(run.catalog.slices())
        interrupted(run, 0, lambda run: erase.request_erasure(run, [second]))
        assert not run.layout.slice(orphan).exists(), "removed before anything is tuned"
        report = build(run)
        assert (report.adopted, report.retuned) == (1, 0), "the slice that was made without both"
        unlearned = state(run)
    assert differences(unlearned, state_from_scratch(tmp_path / "s", without(small_source(), {first, second}))) == []


def not_finite(*args):
    return (dataclasses.replace(tuned, failed_at=3) for tuned in fake_tune(*args))


def test_a_loss_that_is_not_finite_keeps_the_old_state_and_another_config_finishes(workdir, tmp_path, monkeypatch):
    """The way out that the message names: while an erasure is open, tuning may change; afterwards it may not."""
    gentler = small_config(tuning__head_rate=0.001)
    with pytest.raises(UserError, match="tuning.head_rate"), small_run(workdir, config=gentler):
        pass
    message = r"(?s)nothing is published.*--config.tuning.prompt_rate.*cluster \w{12} \(\d+ members\) at step 3"
    with monkeypatch.context() as patch, small_run(workdir) as run:
        patch.setattr(tune_module, "make_slices", not_finite)
        before, slices, ids = run.catalog.manifest(), run.catalog.slices(), sample_of(run)[:1]
        with pytest.raises(UserError, match=message):
            erase.request_erasure(run, ids)
        assert run.catalog.manifest() == before and run.catalog.slices() == slices
    with small_run(workdir, config=gentler) as run:
        build(run)
        unlearned = state(run)
        assert not any_open(run.catalog) and purge.leftovers(run) == []
    scratch = state_from_scratch(tmp_path / "scratch", without(small_source(), set(ids)), gentler)
    assert differences(unlearned, scratch) == []


def test_a_reader_cannot_build_or_erase(workdir):
    with open_run(workdir) as run:
        for attempt in (lambda: build(run), lambda: erase.request_erasure(run, run.catalog.live("train").ids[:1])):
            with pytest.raises(AssertionError, match="writer lock"):
                attempt()
        assert not any_open(run.catalog)


FAULTS = {
    "other bits": lambda arrays: {**arrays, "bias": arrays["bias"] + 1},
    "float64": lambda arrays: {**arrays, "bias": arrays["bias"].astype(np.float64)},
    "another shape": lambda arrays: {**arrays, "bias": arrays["bias"][None]},
    "an array is lost": lambda arrays: {"bias": arrays["bias"]},
}


def test_a_slice_that_readers_cannot_use_is_not_registered(workdir, expected, tmp_path, monkeypatch):
    def written_differently(fault):
        return lambda folder, arrays, *rest: save(folder, fault(arrays), *rest)

    def tuned_differently(fault):  # as a program in float64 would: the digest is that of what is written
        return lambda *args: [
            dataclasses.replace(tuned, slice=tuned.slice._replace(bias=fault({"bias": tuned.slice.bias})["bias"]))
            for tuned in fake_tune(*args)
        ]

    save = checkpoints.save
    with small_run(workdir) as run:
        name = next(name for name in run.catalog.live("train").ids if name not in sample_of(run))
        before, known = run.catalog.manifest(), set(run.catalog.slices())
        faults = [(checkpoints, "save", written_differently(fault)) for fault in FAULTS.values()]
        faults += [(tune_module, "make_slices", tuned_differently(FAULTS[fault])) for fault in list(FAULTS)[1:3]]
        faults += [(checkpoints, "save", lambda folder, *_: folder.mkdir())]
        for owner, attribute, fault in faults:
            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, fault)
                with pytest.raises(Damaged):
                    erase.request_erasure(run, [name], request="one")
            assert (run.catalog.manifest(), set(run.catalog.slices())) == (before, known) and any_open(run.catalog)
        erase.request_erasure(run, [name], request="one")
        unlearned = state(run)
    assert differences(unlearned, state_from_scratch(tmp_path / "scratch", without(small_source(), {name}))) == []


def test_a_backbone_clustering_or_feature_that_readers_cannot_use_is_not_used(workdir, tmp_path, monkeypatch):
    write, view = checkpoints._write, RowFile.view
    with monkeypatch.context() as patch, pytest.raises(Damaged):
        patch.setattr(checkpoints, "_write", lambda manager, step, _, m: write(manager, step, {"a": np.ones(1)}, m))
        with small_run(tmp_path / "new"):
            pass
    assert not (tmp_path / "new" / "backbone").exists()
    with small_run(workdir) as run:
        before, name = run.catalog.manifest(), sample_of(run)[0]
        (file,) = run.layout.records.glob("features-*.f32")
        file.write_bytes(b"")
        faults = [(artifacts, "write_bytes", lambda path, data: write_bytes(path, data[:-9]))]
        faults += [(RowFile, "view", lambda self, mode="r": view(self, mode).copy())]  # what is written is lost
        for owner, attribute, fault in faults:
            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, fault)
                with pytest.raises(UserError, match="clustering.npz|other features|cannot be read"):
                    erase.request_erasure(run, [name], request="one")
            assert run.catalog.manifest() == before and any_open(run.catalog)
            file.write_bytes(b"")
        erase.request_erasure(run, [name], request="one")
        assert not any_open(run.catalog) and audit(run).ok


def test_leftovers_are_reported(workdir):
    """The audit's search for what should not be there finds each kind of it."""
    with small_run(workdir) as run:
        assert purge.leftovers(run) == []
        (run.layout.slices / "f00d").mkdir()
        (run.layout.clusterings / "f00d").mkdir()
        row = int(run.catalog.live("train").rows[0])
        run.catalog.db.execute("DELETE FROM records WHERE row=?", (row,))
        lines = "\n".join(purge.leftovers(run))
    for line in ("slices/f00d", "clusterings/f00d", f"row {row} of images.u8", f"row {row} of features"):
        assert f"leftover {line}" in lines


def test_rows_of_an_interrupted_reimport_do_no_harm(workdir, tmp_path):
    with open(workdir / "records" / "images.u8", "ab") as file:
        file.write(b"x" * 64 * 700)  # appended, and killed before the catalog knew
    with small_run(workdir) as run:
        ids = run.catalog.live("train").ids[:2]
        erase.request_erasure(run, ids)
        assert purge.leftovers(run) == []
        unlearned = state(run)
    assert differences(unlearned, state_from_scratch(tmp_path / "scratch", without(small_source(), set(ids)))) == []


def test_a_reader_never_writes_the_feature_cache(workdir):
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        (file,) = run.layout.records.glob("features-*.f32")
        before, test = file.read_bytes(), run.catalog.live("test")
        features = run.features(test)
        assert features.shape == (len(test), 16) and not np.isnan(features).any()
        np.testing.assert_array_equal(features, run.features(test))
        assert file.read_bytes() == before


def test_an_estimate_changes_nothing_and_says_what_the_erasure_then_does(workdir, expected):
    with small_run(workdir) as run:
        targets = resolve(run.catalog, run.catalog.live("train").ids[:3])
        estimate = erase.estimate(run, targets)
        assert differences(state(run), expected) == [] and not any_open(run.catalog)
        report = erase.request_erasure(run, targets.live).outcome
        assert (estimate.images, len(estimate.clusters)) == (report.images, report.retuned)
        assert estimate.reclustered == report.reclustered and estimate.seconds > 0


def test_what_a_new_clustering_changes_is_counted_where_no_member_was_erased(workdir):
    """Against members: a cluster with an erased record is tuned again anyway and says nothing about the others."""

    def published(run):
        """{cluster key: (ids of its members, images of its slice)}"""
        entries = run.catalog.manifest().entries
        return {key: (run.catalog.members(key).ids, run.catalog.slices()[ref].images) for key, ref in entries.items()}

    with small_run(workdir) as run:
        sampled = run.catalog.sample("train", 30).ids
        unsampled = [name for name in run.catalog.live("train").ids if name not in sampled]
        for ids in ((unsampled[0],), (sampled[0], unsampled[1])):
            old = published(run)
            report = erase.request_erasure(run, ids).outcome
            spared = {key: images for key, (members, images) in old.items() if not set(members) & set(ids)}
            new = {key: members for key, (members, _) in published(run).items()}
            changed = [images for key, images in spared.items() if new.get(key) != old[key][0]]
            assert (report.images_spared, report.images_changed) == (sum(spared.values()), sum(changed))
            assert bool(changed) == report.reclustered == (sampled[0] in ids)
        logged = json.loads(run.layout.metrics.read_text().splitlines()[-1])
        assert logged["images_changed"] == report.images_changed < report.images, "clusters with erased ones are out"
        later = build(run)
        assert (later.images_spared, later.images_changed) == (0, 0), "no record was erased"


def test_holdout_records_are_never_tuned_on(tmp_path):
    with small_run(tmp_path / "run", config=small_config(data__holdout=0.3)) as run:
        holdout = run.catalog.live("holdout")
        rows = {row for target in current_plan(run).targets.values() for row in target.job.rows.tolist()}
        assert 15 < len(holdout) < 45 and rows == set(run.catalog.live("train").rows.tolist())
        assert rows.isdisjoint(holdout.rows.tolist())
