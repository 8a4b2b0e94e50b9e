"""Rollback of one cluster: what it can go back to, that it stays there, and that an erasure ends it."""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from helpers import small_config, small_run, small_source, without

from lmeraser_jax.config import Tuning
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import predict
from lmeraser_jax.unlearning import erase, purge, rollback
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, split_reference
from lmeraser_jax.unlearning.audit import audit, differences, leaves, rebuild_slice, state
from lmeraser_jax.unlearning.binding import refuse_misfits
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run

EPOCHS = small_config(checkpoints__every_epochs=2, checkpoints__keep=2, tuning__epochs=7)
LATE = {f"digit-{i:04d}" for i in range(0, 60, 5)}


@pytest.fixture(scope="module")
def grown(tmp_path_factory, fast_files):
    """A workdir that was built without some records, then with them, with snapshots."""
    folder = tmp_path_factory.mktemp("rollback") / "run"
    with small_run(folder, without(small_source(), LATE), EPOCHS) as run:
        build(run)
    with prepare_run(folder, EPOCHS, jax.devices()[:1], small_source(), reimport=True) as (run, imported):
        assert imported.added > 3
        build(run)
    return folder


@pytest.fixture
def run(grown, tmp_path):
    shutil.copytree(grown, tmp_path / "run")
    with small_run(tmp_path / "run", config=EPOCHS) as opened:
        yield opened


def two_slices(run):
    """A cluster that both published states have with different slices, and the two references."""
    new, old = run.catalog.manifests()
    key = next(k for k in new.entries if k in old.entries and new.entries[k] != old.entries[k])
    return key, new.entries[key], old.entries[key]


def ids_of(run, *refs):
    """For each slice the ids of its members that were not sampled."""
    sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
    return [set(run.catalog.at(run.catalog.rows_of(ref)).ids) - sample for ref in refs]


def test_versions_are_listed_newest_first(run):
    key, new, old = two_slices(run)
    versions = rollback.versions(run.catalog, key)
    states = [manifest.version for manifest in run.catalog.manifests()]
    finished = [version for version in versions if "@" not in version.ref]
    assert [(v.ref, v.versions) for v in finished] == [(new, (states[0],)), (old, (states[1],))]
    for ref in (new, old):
        epochs = [version.epoch for version in versions if version.ref.startswith(f"{ref}@")]
        assert len(epochs) == 2 and epochs[0] > epochs[1] and all(epoch % 2 == 0 for epoch in epochs)
    assert [v.ref for v in versions if v.current] == [new] and not any(v.pinned for v in versions)


def test_rollback_pins_and_survives_a_build_until_it_is_unpinned(run):
    before = state(run)
    key, _, old = two_slices(run)
    version, outcome = rollback.rollback(run, key)
    assert version.ref == old and outcome.retuned == 0 and outcome.published
    assert run.catalog.manifest().entries == before["slices"] | {key: old}
    assert differences(state(run), before) == [f"slices {key}", f"parameters {key}"]
    again = build(run)
    assert not again.published and run.catalog.manifest().entries[key] == old
    assert rollback.unpin(run, key).retuned == 0
    assert differences(state(run), before) == [] and run.catalog.pins() == {}
    with pytest.raises(UserError, match="is not pinned"):
        rollback.unpin(run, key)


def test_every_way_to_name_a_version(run):
    key, new, old = two_slices(run)
    number = run.catalog.manifests()[1].version
    snapshot = next(version for version in rollback.versions(run.catalog, key) if version.ref.startswith(f"{new}@"))
    for to, ref in (
        (f"epoch:{snapshot.epoch}", snapshot.ref),
        (str(number), old),
        (snapshot.ref, snapshot.ref),
        ("", new),
        (old[:9], old),
    ):
        version, _ = rollback.rollback(run, key, to)
        assert version.ref == run.catalog.manifest().entries[key] == ref, to
        assert leaves(load_slice(run, ref)) == leaves(rebuild_slice(run, ref)), to
        assert [v.ref for v in rollback.versions(run.catalog, key) if v.pinned and v.current] == [ref], to


def test_the_audit_makes_pinned_slices_again(run):
    key, _, old = two_slices(run)
    snapshot = rollback.versions(run.catalog, key)[1].ref
    for to in (old, snapshot):
        rollback.rollback(run, key, to)
        verdict = audit(run)
        assert verdict.ok and verdict.identical == verdict.clusters, verdict
    name, _ = split_reference(snapshot)
    run.catalog.db.execute("UPDATE slices SET tuning=replace(tuning, '0.03', '0.04') WHERE digest=?", (name,))
    run.catalog._slices = None  # read again
    assert audit(run).differences == (f"parameters {key}",), "made with other settings than it says"


def test_another_config_can_be_taken_back(grown, tmp_path):
    workdir = shutil.copytree(grown, tmp_path / "run")
    other = small_config(tuning__epochs=7, tuning__head_rate=0.002)
    with pytest.raises(UserError, match=r"tuning.head_rate: 0.01 -> 0.002"), small_run(workdir, config=other):
        pass
    with prepare_run(workdir, other, jax.devices()[:1], retune=True) as (run, _):
        before = run.catalog.manifest()
        outcome = build(run)
        assert outcome.retuned == outcome.clusters
        key = sorted(before.entries)[0]
        version, _ = rollback.rollback(run, key)
        assert version.ref == before.entries[key] == run.catalog.manifest().entries[key]
        assert audit(run).ok
    with small_run(workdir, config=other) as run:
        assert not build(run).published
    wider = small_config(tuning__epochs=7, tuning__prompt_width=2)  # slices of two shapes cannot answer together
    with pytest.raises(UserError, match=f"cluster {key[:12]}, prompt_width: 1 -> 2"):
        with prepare_run(workdir, wider, jax.devices()[:1], retune=True):
            pass
    with small_run(workdir, config=other) as run:  # the settings are still the old ones
        rollback.unpin(run, key)
    with prepare_run(workdir, wider, jax.devices()[:1], retune=True) as (run, _):
        with pytest.raises(UserError, match="prompt_width: 1 -> 2"):  # not tuned yet
            predict.load_model(run)
        build(run)
        with pytest.raises(UserError, match=f"cluster {key[:12]}, prompt_width: 1 -> 2"):
            rollback.rollback(run, key, version.ref)
        assert not run.catalog.pins() and not build(run).published and predict.load_model(run)


def test_adapters_of_another_rank_or_scale_cannot_answer_together():
    old = Tuning(method="lora")
    row = SimpleNamespace(cluster="k", tuning=json.dumps(dataclasses.asdict(old)))
    catalog: Any = SimpleNamespace(slices=lambda: {"a": row})
    changes = [("rank", 4, "8 -> 4"), ("alpha", 8.0, "16.0 -> 8.0"), ("lora_layers", 1, "0 -> 1")]
    for name, value, change in changes:
        with pytest.raises(UserError, match=f"cluster k, {name}: {change}"):
            refuse_misfits(catalog, dataclasses.replace(old, **{name: value}), ["a"])
    with pytest.raises(UserError, match="cluster k, rank: 8 -> 0"):
        refuse_misfits(catalog, Tuning(method="head"), ["a"])
    refuse_misfits(catalog, dataclasses.replace(old, lora_rate=1.0), ["a"])


def test_an_erased_member_ends_the_rollback_and_takes_its_versions(run, tmp_path):
    key, new, old = two_slices(run)
    number = run.catalog.manifests()[1].version
    rollback.rollback(run, key, old)
    name = min(ids_of(run, old)[0])
    erase.request_erasure(run, [name], request="ticket-7")
    assert run.catalog.pins() == {} and purge.leftovers(run) == []
    assert old not in run.catalog.slices() and new not in run.catalog.slices()
    for to in (str(number), old):
        with pytest.raises(UserError, match=r"made with records that were erased \(request ticket-7\)"):
            rollback.rollback(run, key, to)
    with small_run(tmp_path / "scratch", without(small_source(), {name}), EPOCHS) as scratch:
        build(scratch)
        assert differences(state(run), state(scratch)) == []


def test_a_member_that_the_pinned_slice_never_saw_leaves_the_pin(run):
    key, new, old = two_slices(run)
    rollback.rollback(run, key, old)
    members, earlier = ids_of(run, new, old)
    outcome = erase.request_erasure(run, [min(members - earlier)]).outcome
    assert outcome.retuned == 0 and run.catalog.manifest().entries[key] == old == run.catalog.pins()[key]
    assert new not in run.catalog.slices() and audit(run).ok


def test_what_does_not_exist_is_refused_and_changes_nothing(run):
    before = run.catalog.manifest()
    key, new, _ = two_slices(run)
    for text, message in (("zzzz", "is no published cluster"), ("", "is no published cluster"), (key[:3], "is no")):
        with pytest.raises(UserError, match=f"--cluster=.*{message}"):
            rollback.cluster_key(run.catalog, text)
    assert rollback.cluster_key(run.catalog, key[:10]) == key
    for to in ("999", "epoch:1", "epoch:x", "../..", "'; DROP TABLE pins; --", "\0", f"{new}@3"):
        with pytest.raises(UserError, match="is no version of cluster"):
            rollback.rollback(run, key, to)
    broken = rollback.versions(run.catalog, key)[-1].ref
    shutil.rmtree(run.layout.slice(split_reference(broken)[0]))
    with pytest.raises(UserError, match="does not exist"):
        rollback.rollback(run, key, broken)
    assert run.catalog.pins() == {} and run.catalog.manifest() == before
