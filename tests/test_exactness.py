"""The contract: state(unlearn(train(D), D_u)) == state(train(D without D_u)), leaf for leaf, bit for bit.

Every other test serves this one. A deliberately coupled variant must fail the same assertion.
"""

import dataclasses
import shutil
from collections import Counter

import chex
import jax
import numpy as np
import pytest
from helpers import changed, files_of, small_config, small_run, small_source, without

from lmeraser_jax.data.source import Pixels
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.requests import any_open
from lmeraser_jax.training import jobs as jobs_module
from lmeraser_jax.training import train_step, tune
from lmeraser_jax.unlearning import erase, rollback
from lmeraser_jax.unlearning.add import add
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build

DEVICES = [1, 8]


def sample_of(run):
    return set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)


def unsampled_record(run):
    return [[next(i for i in run.catalog.live("train").ids if i not in sample_of(run))]]


def sampled_record(run):
    return [[sorted(sample_of(run))[3]]]


def whole_cluster(run):
    records = run.catalog.live("train")
    sizes = Counter(records.clusters)
    smallest = min(sizes, key=lambda key: (sizes[key], key))
    return [[i for i, key in zip(records.ids, records.clusters, strict=True) if key == smallest]]


def whole_class(run):
    records = run.catalog.live("train")
    return [[i for i, label in zip(records.ids, records.labels, strict=True) if label == 3]]


def owner(run):
    records = run.catalog.live("train")
    return [run.catalog.owned(Counter(records.owners).most_common(1)[0][0])]


def one_batch(run):
    return [[*unsampled_record(run)[0], *sampled_record(run)[0], *whole_class(run)[0]]]


def one_after_the_other(run):
    return [unsampled_record(run)[0], sampled_record(run)[0], whole_class(run)[0]]


def other_order(run):
    return one_after_the_other(run)[::-1]


KINDS = [
    unsampled_record,
    sampled_record,
    whole_cluster,
    whole_class,
    owner,
    one_batch,
    one_after_the_other,
    other_order,
]


@pytest.fixture(scope="module", params=DEVICES, ids=lambda n: f"{n}dev")
def trained(request, tmp_path_factory):
    """A trained workdir for each number of devices."""
    if len(jax.devices()) < request.param:
        pytest.skip(f"needs {request.param} devices, there are {len(jax.devices())}")
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with small_run(workdir, devices=request.param) as run:
        outcome = build(run)
        assert outcome.retuned == outcome.clusters >= 4
    return workdir, request.param


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained workdir, to erase from, and its number of devices."""
    target = tmp_path / "copy"
    shutil.copytree(trained[0], target, copy_function=shutil.copy2)
    return target, trained[1]


def trained_state(workdir, source, devices, config=None):
    with small_run(workdir, source, config, devices) as run:
        build(run)
        return state(run)


def erased_state(workdir, requests, devices, config=None, source=None):
    """Erases request by request; returns the state and the number of slices tuned and reused."""
    with small_run(workdir, source, config, devices) as run:
        outcomes = [erase.request_erasure(run, ids).outcome for ids in requests]
        return state(run), outcomes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_unlearning_equals_never_having_had_the_records(copy, tmp_path, kind):
    workdir, devices = copy
    with small_run(workdir, devices=devices) as run:
        requests, before = kind(run), run.catalog.manifest()
        files = {name: files_of(run, name) for name in before.entries.values()}
    erased = {name for ids in requests for name in ids}
    found, outcomes = erased_state(workdir, requests, devices)
    wanted = trained_state(tmp_path / "scratch", without(small_source(), erased), devices)
    assert differences(found, wanted) == []
    assert sum(o.retuned for o in outcomes) > 0
    with small_run(workdir, devices=devices) as run:
        for key, name in run.catalog.manifest().entries.items():
            if before.entries.get(key) == name:
                assert files_of(run, name) == files[name], "an untouched slice was written again"
        assert run.catalog.erased() == {} and not any_open(run.catalog)


@pytest.mark.parametrize("devices", DEVICES)
def test_with_everything_on(tmp_path, devices):
    """Stages, snapshots, records that joined later, a rollback, and requests that waited in quarantine."""
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices, there are {len(jax.devices())}")
    config = small_config(tuning__slices=2, tuning__epochs=6, checkpoints__every_epochs=1)
    late = {item.id for item in small_source().items if item.split == "train"} & {f"digit-{i:04d}" for i in range(30)}
    assert late
    with small_run(tmp_path / "run", without(small_source(), late), config, devices) as run:
        build(run)
        add(run, without(small_source(), {item.id for item in small_source().items} - late))
        key = run.catalog.clusters_of(unsampled_record(run)[0]).popitem()[1]
        version = next(v for v in rollback.versions(run, key) if "@" in v.ref)
        rollback.rollback(run, key, version.ref)
        asked = [unsampled_record(run)[0], sampled_record(run)[0], owner(run)[0]]
        for number, ids in enumerate(asked):
            erase.request_erasure(run, ids, request=f"r{number}", quarantine=True, defer=True)
        _, served = erase.process(run)
        assert len(served) == 3 and run.catalog.pins() == {} and not run.catalog.quarantined()
        found = state(run)
    gone = {name for ids in asked for name in ids}
    wanted = trained_state(tmp_path / "scratch", without(small_source(), gone), devices, config)
    assert differences(found, wanted) == []


def test_an_unsampled_record_moves_one_slice_and_nothing_upstream(copy):
    workdir, devices = copy
    with small_run(workdir, devices=devices) as run:
        before = state(run)
        ((name,),) = unsampled_record(run)
    after, (outcome,) = erased_state(workdir, [[name]], devices)
    assert (outcome.retuned, outcome.reclustered) == (1, False)
    assert before["prototypes"] == after["prototypes"] and before["sample"] == after["sample"]
    assert [key for key in before["slices"] if before["slices"][key] != after["slices"][key]] == [
        before["assignment"][name]
    ]


def test_a_sampled_record_admits_the_next_hash_and_tunes_only_changed_recipes(copy):
    workdir, devices = copy
    with small_run(workdir, devices=devices) as run:
        before = state(run)
        requests = sampled_record(run)
    after, (outcome,) = erased_state(workdir, requests, devices)
    assert outcome.reclustered
    assert len(set(after["sample"]) - set(before["sample"])) == 1
    changed_slices = set(after["slices"].values()) - set(before["slices"].values())
    assert outcome.retuned == len(changed_slices) < outcome.clusters


def test_pixels_and_labels_of_an_erased_record_change_nothing_at_all(copy, tmp_path):
    workdir, devices = copy
    with small_run(workdir, devices=devices) as run:
        requests = one_batch(run)
    other = changed(small_source(), set(requests[0]), lambda label: (label + 1) % 10)
    with small_run(tmp_path / "other", other, devices=devices) as run:
        build(run)
        assert differences(state(run), state_of(workdir, devices)) != []  # it did matter before
    found, _ = erased_state(workdir, requests, devices)
    assert differences(erased_state(tmp_path / "other", requests, devices, source=other)[0], found) == []


def state_of(workdir, devices):
    with small_run(workdir, devices=devices) as run:
        return state(run)


def test_rows_and_order_of_import_do_not_reach_the_numbers(trained, tmp_path):
    source = small_source()
    order = np.random.default_rng(1).permutation(len(source.items))
    images = source.read(0, len(source.items)).images[order]
    shuffled = dataclasses.replace(
        source, items=[source.items[i] for i in order], read=lambda start, stop: Pixels(images[start:stop])
    )
    assert differences(trained_state(tmp_path / "s", shuffled, trained[1]), state_of(*trained)) == []


def test_public_sampling_never_reclusters(tmp_path):
    config = small_config(clustering__sample_from="public")
    with small_run(tmp_path / "run", config=config) as run:
        build(run)
        before = state(run)
        requests = [list(run.catalog.live("train").ids[:40])]
    found, (outcome,) = erased_state(tmp_path / "run", requests, 1, config)
    wanted = trained_state(tmp_path / "scratch", without(small_source(), set(requests[0])), 1, config)
    assert not outcome.reclustered and before["prototypes"] == found["prototypes"]
    assert differences(found, wanted) == []


def test_erasing_everything_leaves_an_empty_state(copy, tmp_path):
    workdir, devices = copy
    with small_run(workdir, devices=devices) as run:
        everything = list(run.catalog.live("train").ids)
    found, _ = erased_state(workdir, [everything], devices)
    assert found["slices"] == found["records"] == found["prototypes"] == {}


def test_the_audit_agrees_and_sees_a_changed_bit(copy, monkeypatch):
    workdir, devices = copy
    with small_run(workdir, devices=devices) as run:
        erase.request_erasure(run, sampled_record(run)[0])
        good = audit(run)
        assert good.ok and good.checked == good.clusters
        key, name = sorted(run.catalog.manifest().entries.items())[1]
        slice_, row = tuning_slice(run, name)
        slice_["bias"] = np.nextafter(slice_["bias"], 1).astype(np.float32)
        checkpoints.save(run.layout.slice(name), slice_, {})
        run.catalog.add_slice(row._replace(params_digest=arrays_digest(slice_)), [])
        bad = audit(run)
    assert bad.differences == (f"parameters {key}",)


def tuning_slice(run, name):
    arrays, _, _ = checkpoints.load(run.layout.slice(name))
    return dict(arrays), run.catalog.slices()[name]


def test_unlearning_compiles_nothing_new(tmp_path, monkeypatch):
    """One trace for training and every request; the seed makes the problem new to this process."""
    counted = chex.assert_max_traces(train_step.device_program, n=1)
    monkeypatch.setattr(tune, "device_program", counted)
    config = small_config(seed=77)
    with small_run(tmp_path / "run", config=config) as run:
        build(run)
        for kind in (unsampled_record, sampled_record, owner):
            assert erase.request_erasure(run, kind(run)[0]).outcome.retuned > 0
        program = train_step.compiled(run.tuning_spec, run.mesh)
        assert program._cache_size() == 1


def test_a_global_step_count_fails_the_contract(tmp_path, monkeypatch):
    """Negative control: the learning rate follows the steps of all clusters together, as upstream's does."""

    def coupled(jobs, *args):
        total = sum(job.steps for job in jobs)
        for chunk in jobs_module.step_batches(jobs, *args):
            yield dataclasses.replace(chunk, total=np.full_like(chunk.total, total))

    assert not breaks_the_contract(tmp_path / "uncoupled"), "the control of the control"
    monkeypatch.setattr(tune, "step_batches", coupled)
    assert breaks_the_contract(tmp_path)


def test_a_loss_mean_over_all_lanes_fails_the_contract(tmp_path, monkeypatch):
    """Negative control: the gradient is divided by the valid images of all lanes, as one mixed batch would."""
    step = train_step.cluster_step

    def coupled(problem, params, images, labels, starts, state, batch):
        share = jax.lax.pmean(batch.valid.sum() / batch.valid.size, "lane")
        new, loss = step(problem, params, images, labels, starts, state, batch)
        mixed = jax.tree.map(lambda a, b: a + (b - a) * share, state.slice, new.slice)
        return new._replace(slice=mixed), loss

    monkeypatch.setattr(tune, "cluster_step", coupled)
    vmap = jax.vmap
    monkeypatch.setattr(jax, "vmap", lambda f, *a, **k: vmap(f, *a, **({"axis_name": "lane"} | k)))
    assert breaks_the_contract(tmp_path)


def breaks_the_contract(tmp_path) -> bool:
    """Whether the state after an erasure differs from a state trained without the record."""
    train_step.compiled.cache_clear()
    try:
        with small_run(tmp_path / "coupled") as run:
            build(run)
            ids = unsampled_record(run)[0]
        found, _ = erased_state(tmp_path / "coupled", [ids], 1)
        wanted = trained_state(tmp_path / "scratch", without(small_source(), set(ids)), 1)
    finally:
        train_step.compiled.cache_clear()
    return any(line.startswith("parameters") for line in differences(found, wanted))


def test_slices_of_another_program_are_compared_within_a_tolerance(copy):
    """Tuned on one device or many and audited on the other: near, and said so; a real change still fails."""
    workdir, devices = copy
    other = 1 if devices > 1 else 8
    if len(jax.devices()) < other:
        pytest.skip(f"needs {other} devices")
    with small_run(workdir, devices=other) as run:
        verdict = audit(run)
        assert verdict.ok and f"bit-identical: {verdict.checked - verdict.near} of" in verdict.text()
        key, name = sorted(run.catalog.manifest().entries.items())[0]
        slice_, row = tuning_slice(run, name)
        slice_["kernel"] = slice_["kernel"] * np.float32(1.5)
        checkpoints.save(run.layout.slice(name), slice_, {})
        run.catalog.add_slice(row._replace(params_digest=arrays_digest(slice_)), [])
        assert f"parameters {key}" in audit(run).differences
