"""Reconcile as a build: resume, nothing to do, failures that lose nothing, what a purge leaves."""

import contextlib
import dataclasses
import errno
import json
import shutil
import sqlite3
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import small_config, small_run, small_source, without

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import any_open, listed, resolve
from lmeraser_jax.training import slice_files
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.unlearning import artifacts, erase, purge, receipts
from lmeraser_jax.unlearning import build as build_module
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.plan import plan
from lmeraser_jax.unlearning.run import open_run, prepare_run


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The state of an undisturbed training."""
    with small_run(tmp_path_factory.mktemp("wanted") / "run") as run:
        build(run)
        return state(run)


def stop_after(monkeypatch, count, error):
    """Lets so many slices be saved, one at a time, then raises."""
    keep, saved = build_module._keep, []
    monkeypatch.setattr(slice_files, "WRITERS", 1)

    def limited(*args):
        if len(saved) == count:
            raise error
        saved.append(keep(*args))

    monkeypatch.setattr(build_module, "_keep", limited)


def test_a_second_train_has_nothing_to_do(tmp_path, wanted):
    with small_run(tmp_path / "run") as run:
        first = build(run)
    with small_run(tmp_path / "run") as run:
        second = build(run)
        assert differences(state(run), wanted) == []
    assert (first.published, second.published) == (True, False)
    assert (second.retuned, second.reused, second.version) == (0, first.clusters, first.version)


def test_an_interrupted_train_goes_on_where_it_stopped(tmp_path, monkeypatch, wanted):
    with small_run(tmp_path / "run") as run:
        with monkeypatch.context() as patch:
            stop_after(patch, 2, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                build(run)
        assert run.catalog.manifest() is None, "nothing is published halfway"
    with small_run(tmp_path / "run") as run:
        outcome = build(run)
        assert (outcome.reused, outcome.adopted) == (3, 1), "two were registered, one only written"
        assert outcome.retuned == outcome.clusters - 3
        assert differences(state(run), wanted) == []


def spoil(run, how: str) -> None:
    """Does something to the only slice on disk."""
    (folder,) = run.layout.slices.iterdir()
    arrays, notes, step = checkpoints.load(folder)
    arrays = dict(arrays)
    if how == "torn":
        shutil.rmtree(folder / str(step) / "arrays")
    elif how == "other bits":
        checkpoints.save(folder, arrays | {"bias": arrays["bias"] + 1}, notes, step)
    elif how == "other arrays":
        arrays["more"] = arrays["bias"]
        checkpoints.save(folder, arrays, notes | {"params": arrays_digest(arrays)}, step)
    elif how == "earlier step":
        checkpoints.save(folder, arrays, notes, step - 1)
    elif how == "other name":
        folder.rename(folder.with_name("f" * 64))
    else:
        name, _, value = how.partition("=")
        checkpoints.save(folder, arrays, notes | {name: value}, step)


@pytest.mark.parametrize(
    "how",
    [
        "",
        "torn",
        "other bits",
        "other arrays",
        "earlier step",
        "other name",
        "program=p",
        "digest=d",
        "loss=x",
        "epochs=",
    ],
)
def test_a_slice_that_was_written_but_not_registered_is_adopted_only_as_it_was_made(tmp_path, monkeypatch, wanted, how):
    with small_run(tmp_path / "run") as run:
        with monkeypatch.context() as patch:
            stop_after(patch, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                build(run)
        if how:
            spoil(run, how)
        outcome = build(run)
        assert (outcome.adopted, outcome.reused) == ((0, 0) if how else (1, 1))
        assert differences(state(run), wanted) == [] and purge.leftovers(run) == []


def test_stages_and_snapshots_are_adopted_too(tmp_path, monkeypatch):
    config = small_config(tuning__slices=2, tuning__epochs=6, checkpoints__every_epochs=1, checkpoints__keep=2)
    with small_run(tmp_path / "whole", config=config) as run:
        build(run)
        whole, made = state(run), run.catalog.slices()
        epochs = {name: run.catalog.epochs(name) for name in made}
    with small_run(tmp_path / "run", config=config) as run:
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "_keep", lambda *_: None)  # nothing is registered: the next stage has no start
            with pytest.raises(UserError, match="is not in the catalog"):
                build(run)
        first = len(list(run.layout.slices.iterdir()))
        assert build(run).adopted == first == 5
    shutil.copytree(tmp_path / "run" / "slices", tmp_path / "kept")
    with small_run(tmp_path / "again", config=config) as run:
        shutil.copytree(tmp_path / "kept", run.layout.slices)
        outcome = build(run)
        assert (outcome.adopted, outcome.retuned) == (len(made), 0)
        assert differences(state(run), whole) == [] and purge.leftovers(run) == []
        assert {name: run.catalog.epochs(name) for name in made} == epochs and any(epochs.values())
        volatile = {"seconds": 0, "created": 0}
        assert {n: r._replace(**volatile) for n, r in run.catalog.slices().items()} == {
            n: r._replace(**volatile) for n, r in made.items()
        }


def test_a_slice_made_with_a_record_that_is_erased_by_now_is_not_adopted(tmp_path, monkeypatch, trained):
    shutil.copytree(trained[0], tmp_path / "run")
    with small_run(tmp_path / "run") as run:
        records = run.catalog.live("train")
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        key = max(set(records.clusters), key=records.clusters.count)
        pairs = zip(records.ids, records.clusters, strict=True)
        one, other = [name for name, cluster in pairs if cluster == key and name not in sample][:2]
        with monkeypatch.context() as patch:
            stop_after(patch, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                erase.request_erasure(run, [one])
        (left,) = {path.name for path in run.layout.slices.iterdir()} - set(run.catalog.slices())
        with monkeypatch.context() as patch:
            stop_after(patch, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                erase.request_erasure(run, [other])
        assert not run.layout.slice(left).exists(), "gone before anything is tuned"
        outcome = build(run)
        assert (outcome.adopted, outcome.retuned) == (1, 0), "what was made without both"
        found = state(run)
    with small_run(tmp_path / "scratch", without(small_source(), {one, other})) as run:
        build(run)
        assert differences(found, state(run)) == []


def test_an_interrupted_erasure_is_finished_by_the_next_command(tmp_path, monkeypatch):
    with small_run(tmp_path / "run") as run:
        build(run)
        before = run.catalog.manifest()
        ids = list(run.catalog.live("train").ids[:5])
        with monkeypatch.context() as patch:
            stop_after(patch, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                erase.request_erasure(run, ids)
        assert run.catalog.manifest() == before and len(listed(run.catalog, only_open=True)) == 1
        assert resolve(run.catalog, ids).pending == tuple(ids)
        assert set(run.catalog.live("train").ids).isdisjoint(ids)
    with small_run(tmp_path / "run") as run:
        build(run)
        found = state(run)
        assert not any_open(run.catalog) and run.catalog.erased() == {}
    with small_run(tmp_path / "scratch", without(small_source(), set(ids))) as run:
        build(run)
        assert differences(found, state(run)) == []


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, wanted):
    with small_run(tmp_path / "run") as run:
        save, calls = checkpoints.save, []

        def full(*args, **kwargs):
            calls.append(args)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, "No space left on device", "slices")
            save(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", full)
            with pytest.raises(OSError, match="No space left"):
                build(run)
        assert run.catalog.manifest() is None and len(run.catalog.slices()) == 1
        assert build(run).reused == 1
        assert differences(state(run), wanted) == []


def test_a_loss_that_is_not_finite_publishes_nothing_and_names_the_clusters(tmp_path):
    config = small_config(tuning__optimizer="sgd", tuning__head_rate=1e38, tuning__prompt_rate=1e38)
    with small_run(tmp_path / "run", config=config) as run:
        with pytest.raises(UserError, match=r"(?s)--config.tuning.prompt_rate.*cluster \w{12} \(\d+ members\) at step"):
            build(run)
        assert run.catalog.manifest() is None and run.catalog.slices() == {}


def test_an_erasure_that_cannot_be_tuned_is_finished_with_another_config(tmp_path, monkeypatch, trained):
    """The way out that the message names: while an erasure is open, tuning may change; afterwards it may not."""
    shutil.copytree(trained[0], tmp_path / "run")
    gentler = small_config(tuning__head_rate=0.001)
    with pytest.raises(UserError, match="tuning.head_rate"), small_run(tmp_path / "run", config=gentler):
        pass
    tune = tune_module.tune
    with monkeypatch.context() as patch, small_run(tmp_path / "run") as run:
        patch.setattr(tune_module, "tune", lambda *args: (dataclasses.replace(d, failed_at=3) for d in tune(*args)))
        before = run.catalog.manifest()
        with pytest.raises(UserError, match="at step 3"):
            erase.request_erasure(run, trained[1])
        assert run.catalog.manifest() == before
    with small_run(tmp_path / "run", config=gentler) as run:
        build(run)
        found = state(run)
        assert not any_open(run.catalog) and purge.leftovers(run) == []
    with small_run(tmp_path / "scratch2", without(small_source(), set(trained[1])), gentler) as run:
        build(run)
        assert differences(found, state(run)) == []


def test_a_reader_cannot_reconcile_or_erase(tmp_path, trained):
    with open_run(trained[0]) as run:
        for attempt in (lambda: build(run), lambda: erase.request_erasure(run, trained[1])):
            with pytest.raises(AssertionError, match="writer lock"):
                attempt()
        assert not any_open(run.catalog)


def test_a_deleted_slice_is_made_again(tmp_path, wanted):
    with small_run(tmp_path / "run") as run:
        build(run)
        name = next(iter(run.catalog.manifest().entries.values()))
        shutil.rmtree(run.layout.slice(name))
        assert build(run).retuned == 1
        assert differences(state(run), wanted) == []


def test_unregistered_leftovers_are_swept(tmp_path):
    with small_run(tmp_path / "run") as run:
        build(run)
        (run.layout.slices / "f00d").mkdir()
        (run.layout.slices / ".f00d.tmp").mkdir()
        build(run)
        assert {p.name for p in run.layout.slices.iterdir()} == set(run.catalog.slices())


def test_a_purge_leaves_no_row_pixel_feature_tainted_slice_or_clustering(tmp_path):
    with small_run(tmp_path / "run") as run:
        build(run)
        before = run.catalog.manifest()
        sample = load_clustering(run.layout, before.clustering).sample
        name, records = sample[0], run.catalog.live("train")
        place = records.ids.index(name)
        row, key = int(records.rows[place]), records.clusters[place]
        pixels, feature = bytes(run.images[row]), run.features(records.take([place])).tobytes()
        spellings = [name.encode(), name.encode("utf-32-le"), key.encode(), key.encode("utf-32-le"), pixels, feature]
        run.layout.picture.write_bytes(pixels)
        erase.request_erasure(run, [name])
        after = run.catalog.manifest()
        assert not run.images[row].any() and not run.layout.slice(before.entries[key]).exists()
        assert {p.name for p in run.layout.clusterings.iterdir()} == {after.clustering}
        assert {p.name for p in run.layout.slices.iterdir()} == set(after.entries.values()) == set(run.catalog.slices())
        assert len(run.catalog.manifests()) == 1 and purge.leftovers(run) == []
        for file in run.layout.root.rglob("*"):
            if file.is_file() and file.name != "catalog.db-shm":
                content = file.read_bytes()
                assert not [s for s in spellings if s in content], file
        assert run.catalog.is_tombstoned(name)
    with contextlib.closing(sqlite3.connect(run.layout.catalog)) as db:
        assert name not in "\n".join(db.iterdump())


class Killed(BaseException):
    """A process that is killed: nothing catches it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained workdir, a sampled and an unsampled record of it, and the state without them."""
    folder = tmp_path_factory.mktemp("trained")
    with small_run(folder / "run") as run:
        build(run)
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        ids = [sample[0], next(i for i in run.catalog.live("train").ids if i not in sample)]
    with small_run(folder / "scratch", without(small_source(), set(ids))) as run:
        build(run)
        return folder / "run", ids, state(run)


STEPS = [(checkpoints, "save"), (artifacts, "write_bytes"), (purge, "remove_others"), (RowFile, "overwrite")]
STEPS += [(Catalog, "transaction"), (Catalog, "flush"), (receipts, "write_json")]


def dying_at(patch, step):
    """Every write, removal and transaction counts; the process dies before the step-th. Returns the counter."""
    calls = []

    def counted(function):
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) == step + 1:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    for owner, name in STEPS:
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return calls


@pytest.mark.parametrize("step", range(27))
def test_an_erasure_killed_before_any_step_is_finished_by_the_next_command(tmp_path, monkeypatch, trained, step):
    workdir, ids, wanted = trained
    shutil.copytree(workdir, tmp_path / "run")
    with monkeypatch.context() as patch, small_run(tmp_path / "run") as run:
        before = run.catalog.manifest()
        calls = dying_at(patch, step)
        with contextlib.suppress(Killed):
            erase.request_erasure(run, ids)
            assert len(calls) <= step, "died, and went on"
        current = run.catalog.manifest()
        assert current.entries == before.entries or set(current.entries.values()) == set(wanted["slices"].values())
    with small_run(tmp_path / "run") as run:
        erase.request_erasure(run, ids)
        assert differences(state(run), wanted) == [] and purge.leftovers(run) == []
        assert not any_open(run.catalog) and run.catalog.erased() == {}


def test_the_steps_of_an_erasure_are_all_covered(tmp_path, monkeypatch, trained):
    workdir, ids, _ = trained
    shutil.copytree(workdir, tmp_path / "run")
    with monkeypatch.context() as patch, small_run(tmp_path / "run") as run:
        calls = dying_at(patch, 10**6)
        erase.request_erasure(run, ids)
    assert {name for _, name in STEPS} == set(calls) and len(calls) <= 27


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", b"no zip at all"])
def test_a_missing_or_damaged_clustering_is_made_again(tmp_path, wanted, trained, content):
    shutil.copytree(trained[0], tmp_path / "run")
    with small_run(tmp_path / "run") as run:
        path = run.layout.clustering(run.catalog.manifest().clustering) / "clustering.npz"
        path.unlink() if content is None else path.write_bytes(content)
        (run.layout.clusterings / "half-removed").mkdir()
        assert build(run).retuned == 0
        assert differences(state(run), wanted) == [] and purge.leftovers(run) == []


def test_a_damaged_slice_is_tuned_again_by_repair(tmp_path, wanted, trained):
    shutil.copytree(trained[0], tmp_path / "run")
    with small_run(tmp_path / "run") as run:
        name = next(iter(run.catalog.manifest().entries.values()))
        arrays, metadata, step = checkpoints.load(run.layout.slice(name))
        checkpoints.save(run.layout.slice(name), dict(arrays) | {"bias": arrays["bias"] + 1}, metadata, step)
        (message,) = build_module.repair(run)
        assert name[:12] in message and build(run).retuned == 1
        assert differences(state(run), wanted) == [] and build_module.repair(run) == []


def test_rows_of_an_interrupted_reimport_do_no_harm(tmp_path, trained):
    workdir, ids, wanted = trained
    shutil.copytree(workdir, tmp_path / "run")
    with open(tmp_path / "run" / "records" / "images.u8", "ab") as file:
        file.write(b"x" * 64 * 700)  # appended, and killed before the catalog knew
    with small_run(tmp_path / "run") as run:
        erase.request_erasure(run, ids)
        assert differences(state(run), wanted) == [] and purge.leftovers(run) == []


def test_a_reader_never_writes_the_feature_cache(tmp_path, trained):
    shutil.copytree(trained[0], tmp_path / "run")
    with open_run(tmp_path / "run", devices=jax.devices()[:1]) as run:
        (file,) = run.layout.records.glob("features-*.f32")
        before = file.read_bytes()
        test = run.catalog.live("test")
        assert run.features(test).shape == (len(test), 16) and not np.isnan(run.features(test)).any()
        assert file.read_bytes() == before
        np.testing.assert_array_equal(run.features(test), run.features(test))


def test_leftovers_are_found(tmp_path, trained):
    """The audit's search for what should not be there finds each kind of it."""
    shutil.copytree(trained[0], tmp_path / "run")
    with small_run(tmp_path / "run") as run:
        assert purge.leftovers(run) == []
        (run.layout.slices / "f00d").mkdir()
        (run.layout.clusterings / "f00d").mkdir()
        row = run.catalog.live("train").rows[0]
        run.catalog.db.execute("DELETE FROM records WHERE row=?", (int(row),))
        found = "\n".join(purge.leftovers(run))
    for kind in (
        "leftover slices/f00d",
        "leftover clusterings/f00d",
        f"row {row} of images.u8",
        f"row {row} of features",
    ):
        assert kind in found


def reimported(workdir):
    """The run after its source was read again, on one device as before: other programs give other bits."""
    return prepare_run(workdir, small_config(), jax.devices()[:1], small_source(), reimport=True)


def test_an_erased_record_cannot_come_back(tmp_path):
    with small_run(tmp_path / "run") as run:
        build(run)
        ids = list(run.catalog.live("train").ids[:2])
        erase.request_erasure(run, ids)
        after = state(run)
    with reimported(tmp_path / "run") as (run, imported):
        assert (imported.added, imported.erased) == (0, 2)
        build(run)
        assert differences(state(run), after) == []
        again = resolve(run.catalog, ids)
        assert again.live == again.pending == () and set(again.erased) == set(ids)


def test_new_records_join_by_a_reimport(tmp_path):
    with small_run(tmp_path / "run", small_source(train=80)) as run:
        build(run)
    with reimported(tmp_path / "run") as (run, imported):
        assert imported.added == 20
        outcome = build(run)
        assert outcome.retuned > 0
        found = state(run)
    with small_run(tmp_path / "scratch") as run:
        build(run)
        assert differences(found, state(run)) == []


def test_resolve_lists_everything_unknown_and_knows_owners(tmp_path):
    with small_run(tmp_path / "run") as run:
        with pytest.raises(UserError, match="(?s)nothing is erased.*unknown records: nobody, nothing"):
            resolve(run.catalog, ["nobody", run.catalog.live("train").ids[0], "nothing"])
        with pytest.raises(UserError, match="--owner=stranger: owns no live private record"):
            resolve(run.catalog, [], ["stranger"])
        with pytest.raises(UserError, match="public records"):
            resolve(run.catalog, [run.catalog.live("public").ids[0]])
        records = run.catalog.live("train", "test")
        owner = Counter(records.owners).most_common(1)[0][0]
        wanted = {i for i, o in zip(records.ids, records.owners, strict=True) if o == owner}
        assert set(resolve(run.catalog, [], [owner]).live) == wanted, "test images of the owner too"
        assert resolve(run.catalog, [records.ids[0]] * 2).live == (records.ids[0],)


def test_an_estimate_changes_nothing_and_says_what_erase_then_does(tmp_path):
    with small_run(tmp_path / "run") as run:
        build(run)
        before = state(run)
        targets = resolve(run.catalog, run.catalog.live("train").ids[:3])
        estimate = erase.estimate(run, targets)
        assert differences(state(run), before) == [] and not any_open(run.catalog)
        done = erase.request_erasure(run, targets.live).outcome
        assert (estimate.images, len(estimate.clusters)) == (done.images, done.retuned)
        assert estimate.reclustered == done.reclustered and estimate.seconds > 0


def test_what_a_new_clustering_changes_is_counted_where_nobody_was_erased(tmp_path):
    """Against members: a cluster with an erased record is tuned again anyway and says nothing about the others."""
    with small_run(tmp_path / "run") as run:
        first = build(run)
        assert (first.images_spared, first.images_changed) == (0, 0), "nobody was erased"
        before, sampled = run.catalog.manifest(), run.catalog.sample("train", 30).ids[0]
        unsampled = [name for name in run.catalog.live("train").ids if name not in run.catalog.sample("train", 30).ids]
        old = {
            key: (run.catalog.members(key).ids, run.catalog.slice(ref).images) for key, ref in before.entries.items()
        }
        for names in ((unsampled[0],), (sampled, unsampled[1])):
            done = erase.request_erasure(run, names).outcome
            rest = {key: images for key, (ids, images) in old.items() if not set(ids) & set(names)}
            new = {key: run.catalog.members(key).ids for key in run.catalog.manifest().entries}
            other = [images for key, images in rest.items() if new.get(key) != old[key][0]]
            assert (done.images_spared, done.images_changed) == (sum(rest.values()), sum(other))
            assert bool(other) == done.reclustered == (sampled in names)
            entries = run.catalog.manifest().entries
            old = {key: (new[key], run.catalog.slice(ref).images) for key, ref in entries.items()}
        logged = [json.loads(line) for line in run.layout.metrics.read_text().splitlines()]
        assert logged[-1]["images_changed"] == done.images_changed < done.images, "the clusters hit are counted out"


def test_holdout_records_are_never_tuned_on(tmp_path):
    config = small_config(data__holdout=0.3)
    with small_run(tmp_path / "run", config=config) as run:
        held = set(run.catalog.live("holdout").ids)
        looked_at = {row for chain in plan(run).chains.values() for row in chain[-1].job.rows.tolist()}
        assert 15 < len(held) < 45 and looked_at == set(run.catalog.live("train").rows.tolist())
        assert looked_at.isdisjoint(run.catalog.live("holdout").rows.tolist())


def test_another_config_on_the_same_workdir_is_refused(tmp_path):
    with small_run(tmp_path / "run") as run:
        build(run)
    other = small_config(tuning__epochs=9, seed=4)
    for attempt in (lambda: prepare_run(tmp_path / "run", other), lambda: open_run(tmp_path / "run", other)):
        with pytest.raises(UserError, match=r"(?s)seed: 0 -> 4.*tuning.epochs: 2 -> 9"), attempt():
            pass
    with open_run(tmp_path / "run", small_config(inference__nearest=2)) as run:
        assert run.config.inference.nearest == 2
