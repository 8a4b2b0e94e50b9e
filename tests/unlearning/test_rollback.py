"""Rollback of one cluster: what it can go back to, that it stays there, and that an erasure ends it."""

import shutil

import pytest
from helpers import small_config, small_run, small_source, without

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.unlearning import erase, purge, rollback
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, parts_of
from lmeraser_jax.unlearning.audit import audit, differences, leaves, remade, state
from lmeraser_jax.unlearning.build import build, repair
from lmeraser_jax.unlearning.run import prepare_run

EPOCHS = small_config(checkpoints__every_epochs=2, checkpoints__keep=2, tuning__epochs=7)
LATE = {f"digit-{i:04d}" for i in range(0, 60, 5)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that was trained without some records, then with them, with snapshots."""
    import jax

    folder = tmp_path_factory.mktemp("rollback") / "run"
    with small_run(folder, without(small_source(), LATE), EPOCHS) as run:
        build(run)
    with prepare_run(folder, EPOCHS, jax.devices()[:1], small_source(), reimport=True) as (run, imported):
        assert imported.added > 3
        build(run)
        return folder


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def grown(run):
    """A cluster that both published states have with different slices, and the two references."""
    new, old = run.catalog.manifests()
    key = next(k for k in new.entries if k in old.entries and new.entries[k] != old.entries[k])
    return key, new.entries[key], old.entries[key]


def bits(run, ref):
    return leaves(load_slice(run, ref))


def test_versions_are_listed_newest_first(copy):
    with small_run(copy, config=EPOCHS) as run:
        key, new, old = grown(run)
        found = rollback.versions(run, key)
        states = [manifest.version for manifest in run.catalog.manifests()]
        assert [v.ref for v in found if "@" not in v.ref] == [new, old]
        assert [v.versions for v in found if "@" not in v.ref] == [(states[0],), (states[1],)]
        for ref in (new, old):
            epochs = [v.epoch for v in found if v.ref.startswith(f"{ref}@")]
            assert len(epochs) == 2 and epochs[0] > epochs[1] and all(e % 2 == 0 for e in epochs)
        assert [v.ref for v in found if v.current] == [new] and not any(v.pinned for v in found)


def test_rollback_pins_and_survives_a_reconcile_until_it_is_unpinned(copy):
    with small_run(copy, config=EPOCHS) as run:
        before = state(run)
        key, new, old = grown(run)
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


@pytest.mark.parametrize("how", ["state", "epoch", "reference", "beginning"])
def test_what_to_go_back_to(copy, how):
    with small_run(copy, config=EPOCHS) as run:
        key, new, old = grown(run)
        versions = rollback.versions(run, key)
        snapshot = next(v for v in versions if v.ref.startswith(f"{new}@"))
        wanted = {"state": old, "epoch": snapshot.ref, "reference": snapshot.ref, "beginning": old}[how]
        number = run.catalog.manifests()[1].version
        to = {"state": str(number), "epoch": f"epoch:{snapshot.epoch}", "reference": snapshot.ref, "beginning": old[:9]}
        version, _ = rollback.rollback(run, key, to[how])
        assert version.ref == run.catalog.manifest().entries[key] == wanted
        assert bits(run, wanted) != bits(run, new)
        assert [v.ref for v in rollback.versions(run, key) if v.pinned and v.current] == [wanted]


def test_a_snapshot_is_the_slice_of_a_shorter_walk(copy):
    """An earlier epoch is what the same tuning gives when it is stopped there, and no part of the final bits."""
    with small_run(copy, config=EPOCHS) as run:
        key, new, _ = grown(run)
        found = state(run)
        for ref in (v.ref for v in rollback.versions(run, key)):
            assert bits(run, ref) == leaves(remade(run, ref)), ref
    plain = small_config(tuning__epochs=7)
    with small_run(copy.parent / "plain", config=plain) as run:
        build(run)
        assert differences(state(run), found) == []
        assert {len(list(path.iterdir())) for path in run.layout.slices.iterdir()} == {1}


def test_the_audit_makes_pinned_slices_again(copy):
    with small_run(copy, config=EPOCHS) as run:
        key, new, old = grown(run)
        snapshot = rollback.versions(run, key)[1].ref
        for to in (old, snapshot):
            rollback.rollback(run, key, to)
            verdict = audit(run)
            assert verdict.ok and verdict.identical == verdict.clusters, verdict
        name, step = parts_of(snapshot)
        run.catalog.db.execute("UPDATE slices SET tuning=replace(tuning, '\"momentum\"', '\"momentum\"')")
        run.catalog.db.execute("UPDATE slices SET tuning=replace(tuning, '0.03', '0.04') WHERE digest=?", (name,))
        assert audit(run).differences == (f"parameters {key}",), "made with other settings than it says"


def test_another_config_can_be_taken_back(copy):
    import jax

    other = small_config(tuning__epochs=7, tuning__head_rate=0.002)
    with pytest.raises(UserError, match=r"tuning.head_rate: 0.01 -> 0.002"), small_run(copy, config=other):
        pass
    with prepare_run(copy, other, jax.devices()[:1], retune=True) as (run, _):
        before = run.catalog.manifest()
        outcome = build(run)
        assert outcome.retuned == outcome.clusters
        key = sorted(before.entries)[0]
        version, _ = rollback.rollback(run, key)
        assert version.ref == before.entries[key] == run.catalog.manifest().entries[key]
        assert audit(run).ok
    with small_run(copy, config=other) as run:
        assert not build(run).published


def test_an_erased_member_ends_the_rollback_and_takes_its_versions(copy, tmp_path):
    with small_run(copy, config=EPOCHS) as run:
        key, new, old = grown(run)
        number = run.catalog.manifests()[1].version
        rollback.rollback(run, key, old)
        sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
        both = set(run.catalog.at(run.catalog.rows_of(old)).ids) - sample
        name = sorted(both)[0]
        erase.request_erasure(run, [name], request="ticket-7")
        assert run.catalog.pins() == {} and purge.leftovers(run) == []
        assert old not in run.catalog.slices() and new not in run.catalog.slices()
        for to in (str(number), old):
            with pytest.raises(UserError, match=r"made with records that were erased \(request ticket-7\)"):
                rollback.rollback(run, key, to)
        found = state(run)
    with small_run(tmp_path / "scratch", without(small_source(), {name}), EPOCHS) as run:
        build(run)
        assert differences(found, state(run)) == []


def test_a_member_that_the_pinned_slice_never_saw_leaves_the_pin(copy):
    with small_run(copy, config=EPOCHS) as run:
        key, new, old = grown(run)
        rollback.rollback(run, key, old)
        sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
        late = set(run.catalog.at(run.catalog.rows_of(new)).ids) - set(run.catalog.at(run.catalog.rows_of(old)).ids)
        late = sorted(late - sample)
        if not late:
            pytest.skip("every late member was sampled")
        outcome = erase.request_erasure(run, late[:1]).outcome
        assert outcome.retuned == 0 and run.catalog.manifest().entries[key] == old == run.catalog.pins()[key]
        assert new not in run.catalog.slices() and audit(run).ok


def test_what_does_not_exist_is_refused_and_changes_nothing(copy):
    with small_run(copy, config=EPOCHS) as run:
        before = run.catalog.manifest()
        key, new, _ = grown(run)
        for text, message in (("zzzz", "is no published cluster"), ("", "is no published cluster"), (key[:3], "is no")):
            with pytest.raises(UserError, match=f"--cluster=.*{message}"):
                rollback.cluster_key(run.catalog, text)
        assert rollback.cluster_key(run.catalog, key[:10]) == key
        for to in ("999", "epoch:1", "epoch:x", "../..", "'; DROP TABLE pins; --", "\0", f"{new}@3"):
            with pytest.raises(UserError, match="is no version of cluster"):
                rollback.rollback(run, key, to)
        broken = rollback.versions(run, key)[-1].ref
        shutil.rmtree(run.layout.slice(parts_of(broken)[0]))
        with pytest.raises(UserError, match="does not exist"):
            rollback.rollback(run, key, broken)
        assert run.catalog.pins() == {} and run.catalog.manifest() == before


# stages inside a cluster
STAGES = small_config(tuning__slices=3, tuning__epochs=6)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged") / "run"
    with small_run(folder, config=STAGES) as run:
        outcome = build(run)
        assert outcome.images == outcome.images_full
    return folder


def stage_of(run, name):
    """How many stages of its cluster never saw a record, and all of them."""
    (row,) = run.catalog.rows([name]).values()
    key = run.catalog.clusters_of([name])[name]
    chain, ref = [], run.catalog.manifest().entries[key]
    while ref:
        chain.append(ref)
        ref = run.catalog.slice(ref).parent
    return sum(row not in run.catalog.rows_of(ref) for ref in chain), len(chain)


def test_an_erasure_repeats_only_the_stages_that_saw_the_record(staged, tmp_path):
    shutil.copytree(staged, tmp_path / "run")
    with small_run(tmp_path / "run", config=STAGES) as run:
        sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
        names = [name for name in run.catalog.live("train").ids if name not in sample]
        late = next(name for name in names if stage_of(run, name) == (2, 3))
        early = next(name for name in names if stage_of(run, name)[0] == 0)
        kept = {path.name for path in run.layout.slices.iterdir()}
        one = erase.request_erasure(run, [late]).outcome
        assert len(kept & {path.name for path in run.layout.slices.iterdir()}) == len(kept) - 1
        two = erase.request_erasure(run, [early]).outcome
        assert one.retuned == two.retuned == 1 and 0 < one.images < two.images
        found, verdict = state(run), audit(run)
        assert verdict.ok and purge.leftovers(run) == []
    with small_run(tmp_path / "scratch", without(small_source(), {late, early}), STAGES) as run:
        build(run)
        assert differences(found, state(run)) == []


def test_a_sampled_record_and_an_owner_with_stages(staged, tmp_path):
    shutil.copytree(staged, tmp_path / "run")
    with small_run(tmp_path / "run", config=STAGES) as run:
        name = load_clustering(run.layout, run.catalog.manifest().clustering).sample[2]
        owner = run.catalog.live("train").owners[0]
        erased = {name, *run.catalog.owned(owner)}
        erase.request_erasure(run, [name], [owner])
        found = state(run)
        assert purge.leftovers(run) == []
    with small_run(tmp_path / "scratch", without(small_source(), erased), STAGES) as run:
        build(run)
        assert differences(found, state(run)) == []


def test_a_damaged_stage_is_found_and_made_again(staged, tmp_path):
    shutil.copytree(staged, tmp_path / "run")
    with small_run(tmp_path / "run", config=STAGES) as run:
        before = state(run)
        parents = sorted({row.parent for row in run.catalog.slices().values()} - {""})
        arrays, metadata, step = checkpoints.load(run.layout.slice(parents[0]))
        checkpoints.save(run.layout.slice(parents[0]), dict(arrays) | {"bias": arrays["bias"] + 1}, metadata, step)
        (message,) = repair(run)
        assert parents[0][:12] in message
        assert build(run).retuned == 1
        assert differences(state(run), before) == [] and purge.leftovers(run) == []
