"""A plan from the touched clusters against a plan from all of them, on random histories; and its purity."""

import dataclasses
import gc
import shutil
import weakref

import jax
import numpy as np
import pytest
from fakes import fast_fakes
from helpers import small_run, small_source

from lmeraser_jax.data.source import Item, content_hash
from lmeraser_jax.errors import Damaged
from lmeraser_jax.hashing import keyed_hash
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.unlearning import build as build_module
from lmeraser_jax.unlearning import plan as plan_module
from lmeraser_jax.unlearning.artifacts import load_clustering, save_clustering
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.plan import live_state, plan
from lmeraser_jax.unlearning.run import Run, open_run

EMPTY = content_hash(np.zeros((8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A workdir with records and a backbone, nothing tuned."""
    workdir = tmp_path_factory.mktemp("planning") / "run"
    with small_run(workdir, small_source(train=90)):
        return workdir


@pytest.fixture
def run(imported, tmp_path, monkeypatch):
    """A built run whose features follow from the ids; no slice is written but for its folder."""

    def features(_, records):
        words = [np.frombuffer(keyed_hash(0, "feature", name), np.uint8)[:4] for name in records.ids]
        return np.array(words, np.float32).reshape(len(records), 4)

    def features_at(run, rows):
        records = run.catalog.at(rows)
        return features(run, records.take(np.array([records.rows.tolist().index(row) for row in rows], np.int64)))

    fast_fakes(monkeypatch)
    monkeypatch.setattr(Run, "features", features)
    monkeypatch.setattr(Run, "features_at", features_at)
    monkeypatch.setattr(checkpoints, "save", lambda folder, *_, **__: folder.mkdir(parents=True))
    monkeypatch.setattr(build_module, "load_slice", lambda *_: None)
    shutil.copytree(imported, tmp_path / "run")
    with open_run(tmp_path / "run", devices=jax.devices()[:1], write=True) as opened:
        build(opened)
        yield opened


def contents(planned):
    """What two plans must agree on."""
    jobs = {key: (target.digest, target.job.rows.tolist()) for key, target in planned.missing.items()}
    labels = {key: planned.members[key].labels.tolist() for key in planned.missing}
    pins = (planned.pinned, planned.unpinned)
    return planned.entries, jobs, labels, sorted(planned.moved), pins, planned.images_full, planned.requests


def state_of_all_clusters(run, leaving=()):
    """The live state, read as if every cluster had been touched."""

    def with_all(run, state, _, ids):
        return plan_module._with_all_clusters(run, state, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_with_touched_clusters", with_all)
        return live_state(run, leaving)


def check_members(run, leaving):
    """What the catalog says of a cluster's members is what the table of all live records says."""
    live = run.catalog.live("train")
    for key in {"", *live.clusters}:
        expected = live.take(np.flatnonzero(np.array(live.clusters) == key)).without(leaving)
        members = run.catalog.members(key, leaving)
        assert all(np.array_equal(value, vars(expected)[name]) for name, value in vars(members).items())


def add_records(run, rng, prefix):
    new = [Item(f"{prefix}-{i}", "train", int(rng.integers(10)), "") for i in range(3)]
    rows = run.catalog.rows_used()
    with run.catalog.transaction():
        run.catalog.add_records(new, range(rows, rows + 3), [EMPTY] * 3)
        run.catalog.set("rows", rows + 3)
    image_file(run.layout, run.catalog).append(np.zeros((3, 8, 8, 1), np.uint8))


def test_a_plan_from_the_touched_clusters_is_the_plan_from_all(run):
    """Erasures, new records, lost slices, pins and builds in random order; also with records that are yet to leave."""
    rng, partial, clustered_anew = np.random.default_rng(0), 0, 0
    for step in range(64):
        live = run.catalog.live("train").ids
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        pool = [name for name in live if name not in sample] if step % 2 else list(live)
        ids = list(rng.choice(pool, min(len(pool), int(rng.integers(1, 6))), replace=False))
        event = rng.choice(["leave", "erase", "add", "lose", "pin"])
        published = run.catalog.manifest().entries
        if event == "erase":
            requests.accept(run.catalog, ids)
        elif event == "add":
            add_records(run, rng, f"new-{step}")
        elif event == "lose":
            run.catalog.drop_slice(rng.choice(sorted(published.values())))
        elif event == "pin":
            key = rng.choice(sorted(published))
            run.catalog.pin(key, published[key])
        leaving = frozenset(ids) if event == "leave" else frozenset()
        check_members(run, frozenset(ids))
        state = live_state(run, leaving)
        partial += bool(state.untouched)
        clustered_anew += bool(state.untouched and not state.clustering_unchanged)
        assert contents(plan(state)) == contents(plan(state_of_all_clusters(run, leaving))), f"step {step}: {event}"
        if rng.random() < 0.4:
            build(run)
            state = live_state(run)
            assert contents(plan(state)) == contents(plan(state_of_all_clusters(run))) and not plan(state).missing
            assert state.members.keys() <= state.pins.keys(), "nothing happened to any other cluster"
    assert partial > 10 and clustered_anew > 1


@pytest.mark.parametrize("offset", [0, 4], ids=["same program", "features of another program"])
def test_a_record_goes_to_a_new_prototype_that_is_nearer_than_its_own(run, offset):
    before = load_clustering(run.layout, run.catalog.manifest().clustering)
    save_clustering(run.layout, dataclasses.replace(before, prototypes=before.prototypes + np.float32(offset)))
    if offset:  # which put other records into the clusters
        run.catalog.db.execute("UPDATE records SET cluster=(SELECT max(number) FROM clusters) WHERE row%3=0")
    came_nearer = 0
    for name in before.sample:
        state = live_state(run, {name})
        assert contents(plan(state)) == contents(plan(state_of_all_clusters(run, {name})))
        published = dict(zip(run.catalog.live("train").rows.tolist(), run.catalog.live("train").clusters, strict=True))
        came_nearer += sum(published[row] in state.clustering.keys for row, _ in state.moved)
    assert came_nearer > 5


def test_a_clustering_is_read_once_and_again_after_a_change(run):
    name = run.catalog.manifest().clustering
    file, first = run.layout.clustering(name) / "clustering.npz", load_clustering(run.layout, name)
    content = file.read_bytes()
    assert load_clustering(run.layout, name) is first
    for damage in (lambda: file.write_bytes(bytes(len(content))), file.unlink):
        damage()
        with pytest.raises(Damaged):
            load_clustering(run.layout, name)
    file.write_bytes(content)
    assert load_clustering(run.layout, name).keys == first.keys


def test_a_purge_leaves_no_erased_id_in_the_process(run):
    before = weakref.ref(load_clustering(run.layout, run.catalog.manifest().clustering))
    requests.accept(run.catalog, [before().sample[0]])
    build(run)
    gc.collect()
    assert before() is None and not run.catalog.erased()


def test_a_plan_is_pure(run):
    """With the catalog closed and no workdir left it gives the same again."""
    requests.accept(run.catalog, run.catalog.live("train").ids[:3])
    state, all_clusters = live_state(run), state_of_all_clusters(run)
    run.catalog.close()
    shutil.rmtree(run.layout.root)
    first = plan(state)
    assert first.missing and contents(plan(state)) == contents(first) == contents(plan(all_clusters))
