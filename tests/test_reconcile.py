"""Reconcile as a build: resume, nothing to do, failures that lose nothing, what a purge leaves."""

import errno
import sqlite3

import jax
import pytest
from helpers import small_config, small_run, small_source, without

from lmeraser_jax import reconcile as build
from lmeraser_jax import unlearning
from lmeraser_jax.audit import differences, state
from lmeraser_jax.errors import UserError
from lmeraser_jax.reconcile import load_clustering, plan, reconcile
from lmeraser_jax.run import opened, prepared
from lmeraser_jax.store import checkpoints


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The state of an undisturbed training."""
    with small_run(tmp_path_factory.mktemp("wanted") / "run") as run:
        reconcile(run)
        return state(run)


def stop_after(monkeypatch, count, error):
    """Lets so many slices be saved, then raises."""
    keep, saved = build._keep, []

    def limited(*args):
        if len(saved) == count:
            raise error
        saved.append(keep(*args))

    monkeypatch.setattr(build, "_keep", limited)


def test_a_second_train_has_nothing_to_do(tmp_path, wanted):
    with small_run(tmp_path / "run") as run:
        first = reconcile(run)
    with small_run(tmp_path / "run") as run:
        second = reconcile(run)
        assert differences(state(run), wanted) == []
    assert (first.published, second.published) == (True, False)
    assert (second.retuned, second.reused, second.version) == (0, first.clusters, first.version)


def test_an_interrupted_train_goes_on_where_it_stopped(tmp_path, monkeypatch, wanted):
    with small_run(tmp_path / "run") as run:
        with monkeypatch.context() as patch:
            stop_after(patch, 2, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                reconcile(run)
        assert run.catalog.manifest() is None, "nothing is published halfway"
    with small_run(tmp_path / "run") as run:
        outcome = reconcile(run)
        assert outcome.reused == 2 and outcome.retuned == outcome.clusters - 2
        assert differences(state(run), wanted) == []


def test_an_interrupted_erasure_is_finished_by_the_next_command(tmp_path, monkeypatch):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        before = run.catalog.manifest()
        ids = list(run.catalog.live("train").ids[:5])
        with monkeypatch.context() as patch:
            stop_after(patch, 0, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                unlearning.erase(run, unlearning.resolve(run, ids))
        assert run.catalog.manifest() == before and len(run.catalog.open_requests()) == 1
        assert set(run.catalog.live("train").ids).isdisjoint(ids)
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        found = state(run)
        assert run.catalog.open_requests() == {} and run.catalog.erased() == {}
    with small_run(tmp_path / "scratch", without(small_source(), set(ids))) as run:
        reconcile(run)
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
                reconcile(run)
        assert run.catalog.manifest() is None and len(run.catalog.slices()) == 1
        assert reconcile(run).reused == 1
        assert differences(state(run), wanted) == []


def test_a_loss_that_is_not_finite_publishes_nothing_and_names_the_clusters(tmp_path):
    config = small_config(tuning__optimizer="sgd", tuning__head_rate=1e38, tuning__prompt_rate=1e38)
    with small_run(tmp_path / "run", config=config) as run:
        with pytest.raises(UserError, match=r"(?s)--config.tuning.prompt_rate.*cluster \w{12} \(\d+ members\) at step"):
            reconcile(run)
        assert run.catalog.manifest() is None and run.catalog.slices() == {}


def test_a_deleted_slice_is_made_again(tmp_path, wanted):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        name = next(iter(run.catalog.manifest().entries.values()))
        build.shutil.rmtree(run.layout.slice(name))
        assert reconcile(run).retuned == 1
        assert differences(state(run), wanted) == []


def test_unregistered_leftovers_are_swept(tmp_path):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        (run.layout.slices / "f00d").mkdir()
        (run.layout.slices / ".f00d.tmp").mkdir()
        reconcile(run)
        assert {p.name for p in run.layout.slices.iterdir()} == set(run.catalog.slices())


def test_a_purge_leaves_no_row_pixel_feature_or_tainted_slice(tmp_path):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        name, before = sample[0], run.catalog.manifest()
        records = run.catalog.live("train")
        place = records.ids.index(name)
        row, pixels, key = int(records.rows[place]), bytes(run.images[records.rows[place]]), records.clusters[place]
        tainted = before.entries[key]
        unlearning.erase(run, unlearning.resolve(run, [name]))
        assert not run.images[row].any() and not run.layout.slice(tainted).exists()
        assert tainted not in run.catalog.slices() and run.catalog.manifest_count() == 1
        for file in run.layout.root.rglob("*"):
            if file.is_file() and file.name != "catalog.db-shm":
                content = file.read_bytes()
                assert pixels not in content and name.encode() not in content, file
        assert run.catalog.is_tombstoned(name)
    with sqlite3.connect(run.layout.catalog) as db:
        assert name not in "\n".join(db.iterdump())
    db.close()


def reimported(workdir):
    """The run after its source was read again, on one device as before: other programs give other bits."""
    return prepared(workdir, small_config(), jax.devices()[:1], small_source(), reimport=True)


def test_an_erased_record_cannot_come_back(tmp_path):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        ids = list(run.catalog.live("train").ids[:2])
        unlearning.erase(run, unlearning.resolve(run, ids))
        after = state(run)
    with reimported(tmp_path / "run") as (run, imported):
        assert (imported.added, imported.erased) == (0, 2)
        reconcile(run)
        assert differences(state(run), after) == []
        again = unlearning.resolve(run, ids)
        assert again.live == () and set(again.erased) == set(ids)


def test_new_records_join_by_a_reimport(tmp_path):
    with small_run(tmp_path / "run", small_source(train=80)) as run:
        reconcile(run)
    with reimported(tmp_path / "run") as (run, imported):
        assert imported.added == 20
        outcome = reconcile(run)
        assert outcome.retuned > 0
        found = state(run)
    with small_run(tmp_path / "scratch") as run:
        reconcile(run)
        assert differences(found, state(run)) == []


def test_resolve_lists_everything_unknown_and_knows_owners(tmp_path):
    with small_run(tmp_path / "run") as run:
        with pytest.raises(UserError, match="unknown records: nobody, nothing; nothing is erased"):
            unlearning.resolve(run, ["nobody", run.catalog.live("train").ids[0], "nothing"])
        with pytest.raises(UserError, match="--owner=stranger: no live record"):
            unlearning.resolve(run, [], "stranger")
        with pytest.raises(UserError, match="public records"):
            unlearning.resolve(run, [run.catalog.live("public").ids[0]])
        records = run.catalog.live("train")
        owner = records.owners[0]
        assert set(unlearning.resolve(run, [], owner).live) == {
            i for i, o in zip(records.ids, records.owners, strict=True) if o == owner
        }
        assert unlearning.resolve(run, [records.ids[0]] * 2).live == (records.ids[0],)


def test_an_estimate_changes_nothing_and_says_what_erase_then_does(tmp_path):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
        before = state(run)
        targets = unlearning.resolve(run, run.catalog.live("train").ids[:3])
        estimate = unlearning.estimate(run, targets)
        assert differences(state(run), before) == [] and run.catalog.open_requests() == {}
        done = unlearning.erase(run, targets).outcome
        assert (estimate.images, len(estimate.clusters)) == (done.images, done.retuned)
        assert estimate.reclustered == done.reclustered and estimate.seconds > 0


def test_holdout_records_are_never_tuned_on(tmp_path):
    config = small_config(data__holdout=0.3)
    with small_run(tmp_path / "run", config=config) as run:
        held = set(run.catalog.live("holdout").ids)
        wanted = plan(run, run.catalog.live("train"))
        assert 15 < len(held) < 45 and held.isdisjoint(wanted.records.ids)


def test_another_config_on_the_same_workdir_is_refused(tmp_path):
    with small_run(tmp_path / "run") as run:
        reconcile(run)
    other = small_config(tuning__epochs=9, seed=4)
    for attempt in (lambda: prepared(tmp_path / "run", other), lambda: opened(tmp_path / "run", other)):
        with pytest.raises(UserError, match=r"(?s)seed: 0 -> 4.*tuning.epochs: 2 -> 9"), attempt():
            pass
    with opened(tmp_path / "run", small_config(inference__nearest=2)) as run:
        assert run.config.inference.nearest == 2
