"""A plan of the touched clusters against a plan of everything, on random histories."""

import shutil

import jax
import numpy as np
import pytest
from helpers import small_run, small_source

from lmeraser_jax.data.source import Item, content_hash
from lmeraser_jax.hashing import keyed_hash
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import Tuned
from lmeraser_jax.unlearning import build as build
from lmeraser_jax.unlearning import plan
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.run import Run, open_run

EMPTY = content_hash(np.zeros((8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A workdir with records and a backbone, nothing tuned."""
    workdir = tmp_path_factory.mktemp("planning") / "run"
    with small_run(workdir, small_source(train=90)):
        return workdir


@pytest.fixture
def quick(monkeypatch):
    """Features from a record's id and slices of zeros: nothing is computed on a device."""

    def features(_, records):
        words = [np.frombuffer(keyed_hash(0, "feature", name), np.uint8)[:4] for name in records.ids]
        return np.array(words, np.float32).reshape(len(records), 4)

    def tuned(problem, backbone, jobs, images, labels, mesh):
        empty = Slice(np.zeros(1, np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
        return (Tuned(job, job.steps, empty, 0.5, None, 0.0) for job in jobs)

    monkeypatch.setattr(Run, "features", features)
    monkeypatch.setattr(tune_module, "tune", tuned)
    monkeypatch.setattr(checkpoints, "save", lambda folder, *_, **__: folder.mkdir(parents=True))


def described(plan):
    """What two plans must agree on."""
    chains = {key: [target.digest for target in chain] for key, chain in plan.missing.items()}
    labels = {key: plan.members[key].labels.tolist() for key in plan.missing}
    rows = {key: chain[-1].job.rows.tolist() for key, chain in plan.missing.items()}
    return (plan.entries, plan.sizes, chains, labels, rows, sorted(plan.moved), plan.images_full, plan.requests)


def both(run, monkeypatch, leaving=()):
    """The plan, and the one that looks at every record; and whether the first did not."""
    whole, calls = plan._whole, []
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_whole", lambda *args: calls.append(1) or whole(*args))
        found = plan.plan(run, leaving)
    with monkeypatch.context() as patch, run.catalog.snapshot():
        wanted = whole(
            run, found.clustering, found.clustering_unchanged, found.recipe_constants_digest, frozenset(leaving)
        )
    return described(found), described(wanted), not calls


def members_of_all(run, leaving):
    """What the catalog says of a cluster's members is what the table of all live records says."""
    live = run.catalog.live("train")
    for key in {"", *live.clusters}:
        wanted = live.take(np.flatnonzero(np.array(live.clusters) == key)).without(leaving)
        found = run.catalog.members(key, leaving)
        assert all(np.array_equal(value, vars(wanted)[name]) for name, value in vars(found).items())


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_of_the_touched_clusters_is_the_plan_of_everything(imported, tmp_path, quick, monkeypatch, seed):
    """Erasures, new records, lost slices and published states in random order; also with records yet to leave."""
    rng, incremental = np.random.default_rng(seed), 0
    shutil.copytree(imported, tmp_path / "run")
    with open_run(tmp_path / "run", devices=jax.devices()[:1], write=True) as run:
        build.build(run)
        for step in range(8):
            live = run.catalog.live("train").ids
            sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
            pool = [name for name in live if name not in sample] if step % 4 else list(live)
            chosen = list(rng.choice(pool, min(len(pool), int(rng.integers(1, 6))), replace=False))
            event = rng.choice(["leave", "erase", "add", "lose"])
            if event == "erase":
                requests.accept(run.catalog, chosen)
            elif event == "add":
                new = [Item(f"new-{seed}-{step}-{i}", "train", int(rng.integers(10)), "") for i in range(3)]
                rows = run.catalog.rows_used()
                with run.catalog.transaction():
                    run.catalog.add_records(new, range(rows, rows + 3), [EMPTY] * 3)
                    run.catalog.set("rows", rows + 3)
                build.image_file(run.layout, run.catalog).append(np.zeros((3, 8, 8, 1), np.uint8))
            elif event == "lose":
                run.catalog.drop_slice(rng.choice(sorted(run.catalog.manifest().entries.values())))
            members_of_all(run, frozenset(chosen))
            found, wanted, quickly = both(run, monkeypatch, chosen if event == "leave" else ())
            assert found == wanted
            incremental += quickly
            if rng.random() < 0.4:
                build.build(run)
                found, wanted, quickly = both(run, monkeypatch)
                assert found == wanted and quickly and not found[2]
        assert incremental
