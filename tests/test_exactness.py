"""The contract: state(unlearn(train(D), D_u)) == state(train(D without D_u)), leaf for leaf, bit for bit.

Every other test serves this one. Two deliberately coupled variants must fail the same assertion.
"""

import dataclasses
import functools
import shutil
from collections import Counter

import chex
import jax
import numpy as np
import pytest
from helpers import changed, files_of, small_config, small_run, small_source, without

from lmeraser_jax.data.source import Contents
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.requests import any_open
from lmeraser_jax.training import train_step, tune
from lmeraser_jax.unlearning import erase, rollback
from lmeraser_jax.unlearning.add import add
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.rectify import Change, request_rectification


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


def batch_of_requests(run):
    return [[*unsampled_record(run)[0], *sampled_record(run)[0], *whole_class(run)[0]]]


def request_by_request(run):
    return [unsampled_record(run)[0], sampled_record(run)[0], whole_class(run)[0]]


def other_order(run):
    return request_by_request(run)[::-1]


KINDS = [
    unsampled_record,
    sampled_record,
    whole_cluster,
    whole_class,
    owner,
    batch_of_requests,
    request_by_request,
    other_order,
]


def cases():
    """Every kind of request on one device and on two; one kind on two is enough for every day."""
    for devices in (1, 2):
        for kind in KINDS:
            quick = devices == 1 or kind == request_by_request
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(kind, devices, marks=marks, id=f"{kind.__name__}-{devices}dev")


def train_from_scratch(workdir, source, devices=1, config=None):
    """The state of a workdir that was trained on a source."""
    with small_run(workdir, source, config, devices) as run:
        build(run)
        return state(run)


@pytest.fixture(scope="module")
def trained(trained_template, tmp_path_factory):
    """A trained workdir, given a number of devices. Tests copy it."""

    @functools.cache
    def workdir(devices):
        if devices == 1:
            return trained_template
        if len(jax.devices()) < devices:
            pytest.skip(f"needs {devices} devices, there are {len(jax.devices())}")
        folder = tmp_path_factory.mktemp("trained") / "run"
        train_from_scratch(folder, small_source(), devices)
        return folder

    return workdir


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The state of a training on one device that never had some records, given their ids."""

    @functools.cache
    def state_without(ids):
        return train_from_scratch(tmp_path_factory.mktemp("scratch") / "run", without(small_source(), ids))

    return state_without


def erase_requests(workdir, requests, devices=1, config=None, source=None):
    """Erases request by request; returns the state and the reports of the builds."""
    with small_run(workdir, source, config, devices) as run:
        reports = [erase.request_erasure(run, ids).outcome for ids in requests]
        return state(run), reports


@pytest.mark.parametrize(("kind", "devices"), list(cases()))
def test_unlearning_equals_never_having_had_the_records(trained, scratch, tmp_path, kind, devices):
    workdir = shutil.copytree(trained(devices), tmp_path / "run")
    with small_run(workdir, devices=devices) as run:
        requests, before = kind(run), run.catalog.manifest()
        files = {name: files_of(run, name) for name in before.entries.values()}
    unlearned, reports = erase_requests(workdir, requests, devices)
    erased = frozenset(name for ids in requests for name in ids)
    assert differences(unlearned, scratch(erased)) == []
    assert sum(report.retuned for report in reports) > 0
    with small_run(workdir, devices=devices) as run:
        for key, name in run.catalog.manifest().entries.items():
            if before.entries.get(key) == name:
                assert files_of(run, name) == files[name], "an untouched slice was written again"
        assert run.catalog.erased() == {} and not any_open(run.catalog)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_contract_holds_with_everything_on(trained, scratch, tmp_path, devices):
    """Snapshots, records that joined later, a rollback, and requests that waited in quarantine."""
    trained(devices)  # skips where there are fewer
    config = small_config(tuning__epochs=6, checkpoints__every_epochs=1)
    late = {item.id for item in small_source().items if item.split == "train"} & {f"digit-{i:04d}" for i in range(30)}
    assert late
    with small_run(tmp_path / "run", without(small_source(), late), config, devices) as run:
        build(run)
        add(run, without(small_source(), {item.id for item in small_source().items} - late))
        key = run.catalog.clusters_of(unsampled_record(run)[0]).popitem()[1]
        version = next(version for version in rollback.versions(run.catalog, key) if "@" in version.ref)
        rollback.rollback(run, key, version.ref)
        requests = [unsampled_record(run)[0], sampled_record(run)[0], owner(run)[0]]
        for number, ids in enumerate(requests):
            erase.request_erasure(run, ids, request=f"r{number}", quarantine=True, defer=True)
        _, served = erase.process(run)
        assert len(served) == 3 and run.catalog.pins() == {} and not run.catalog.quarantined()
        unlearned = state(run)
    rest = without(small_source(), {name for ids in requests for name in ids})
    assert differences(unlearned, train_from_scratch(tmp_path / "scratch", rest, config=config)) == []


def test_an_unsampled_record_changes_one_slice_and_a_sampled_one_what_the_next_hash_changes(trained_workdir):
    with small_run(trained_workdir) as run:
        trained_state, unsampled, sampled = state(run), unsampled_record(run), sampled_record(run)
    before, (report,) = erase_requests(trained_workdir, unsampled)
    assert (report.retuned, report.reclustered) == (1, False)
    assert trained_state["prototypes"] == before["prototypes"] and trained_state["sample"] == before["sample"]
    other = [key for key, bits in trained_state["slices"].items() if before["slices"][key] != bits]
    assert other == [trained_state["assignment"][unsampled[0][0]]], "nothing upstream, and one slice"
    after, (report,) = erase_requests(trained_workdir, sampled)
    assert report.reclustered and len(set(after["sample"]) - set(before["sample"])) == 1
    new_slices = set(after["slices"].values()) - set(before["slices"].values())
    assert report.retuned == len(new_slices) < report.clusters


def test_pixels_and_labels_of_an_erased_record_change_nothing_at_all(trained_template, scratch, tmp_path):
    with small_run(shutil.copytree(trained_template, tmp_path / "run")) as run:
        requests, before = batch_of_requests(run), state(run)
    source = changed(small_source(), set(requests[0]), lambda label: (label + 1) % 10)
    assert differences(train_from_scratch(tmp_path / "other", source), before) != [], "they did matter"
    unlearned, _ = erase_requests(tmp_path / "other", requests, source=source)
    assert differences(unlearned, scratch(frozenset(requests[0]))) == []


def test_rows_and_order_of_import_do_not_reach_the_numbers(scratch, tmp_path):
    source = small_source()
    order = np.random.default_rng(1).permutation(len(source.items))
    images = source.read(range(len(source.items))).rows[order]
    shuffled = dataclasses.replace(
        source, items=[source.items[i] for i in order], read=lambda positions: Contents(images[list(positions)])
    )
    assert differences(train_from_scratch(tmp_path / "run", shuffled), scratch(frozenset())) == []


@pytest.mark.parametrize(
    "own_set",
    [pytest.param(False, id="of the data"), pytest.param(True, id="a set of its own", marks=pytest.mark.slow)],
)
def test_public_sampling_never_reclusters(tmp_path, own_set):
    """A set of its own has images of another size, and its own classes and ids; prompts may begin with it, too."""
    overrides = {"clustering__sample_from": "public"}
    if own_set:
        images, ids = np.random.default_rng(0).integers(0, 256, (40, 12, 10)), [f"digit-{i:04d}" for i in range(40)]
        columns = {"train_images": images.astype(np.uint8), "train_labels": np.arange(40) % 3, "train_ids": ids}
        np.savez(tmp_path / "public.npz", **columns)
        overrides |= {"public__source": "npz", "public__path": f"{tmp_path}/public.npz", "tuning__start": "public"}
    config = small_config(**overrides)
    before = train_from_scratch(tmp_path / "run", small_source(), config=config)
    erased = list(before["records"])[:40]
    after, (report,) = erase_requests(tmp_path / "run", [erased], config=config)
    expected = train_from_scratch(tmp_path / "scratch", without(small_source(), set(erased)), config=config)
    assert not report.reclustered and before["prototypes"] == after["prototypes"]
    assert differences(after, expected) == []


def test_owners_have_clusters_of_their_own(tmp_path):
    """One record of an owner, a whole owner, and both in turn; no other owner's slice or prototype changes."""
    config = small_config(clustering__partition="owner")
    before = train_from_scratch(tmp_path / "run", small_source(), config=config)
    with small_run(tmp_path / "run", config=config) as run:
        records = run.catalog.live("train")
        requests = [[records.ids[0]], owner(run)[0]]
        assert len(set(records.owners)) == len(before["slices"]) > 3
        for ids in requests:
            key = run.catalog.clusters_of(ids).popitem()[1]
            former, report = state(run), erase.request_erasure(run, ids).outcome
            assert report.retuned <= 1 and report.reclustered
            for kind in ("slices", "prototypes"):
                changes = {name for name in former[kind] if state(run)[kind].get(name) != former[kind][name]}
                assert changes == {key}
        after = state(run)
    rest = without(small_source(), {name for ids in requests for name in ids})
    assert differences(after, train_from_scratch(tmp_path / "scratch", rest, config=config)) == []
    nobody = dataclasses.replace(small_source(), items=[item._replace(owner="") for item in small_source().items])
    with pytest.raises(UserError, match="clustering.partition=owner: training records without an owner: digit-0016, "):
        train_from_scratch(tmp_path / "nobody", nobody, config=config)


def test_rectifying_equals_having_had_the_corrected_records(tmp_path):
    """Other pixels and labels for a sampled and another record, beside a common head whose sums were kept."""
    config = small_config(common__method="ridge")
    with small_run(tmp_path / "run", config=config) as run:
        build(run)
        names = {unsampled_record(run)[0][0], sampled_record(run)[0][0]}
        source = changed(small_source(), names, lambda label: (label + 1) % 10)
        rows = source.read(range(len(source.items))).rows
        places = {item.id: place for place, item in enumerate(source.items)}
        changes = [Change(name, source.items[places[name]].label, rows[places[name]]) for name in sorted(names)]
        request_rectification(run, changes)
        corrected = state(run)
        erase.request_erasure(run, [changes[0].id])
        erased = state(run)
    assert differences(corrected, train_from_scratch(tmp_path / "scratch", source, config=config)) == []
    rest = without(source, {changes[0].id})
    assert differences(erased, train_from_scratch(tmp_path / "rest", rest, config=config)) == []


def test_erasing_everything_leaves_an_empty_state(trained_workdir):
    with small_run(trained_workdir) as run:
        ids = list(run.catalog.live("train").ids)
    after, _ = erase_requests(trained_workdir, [ids])
    assert after["slices"] == after["records"] == after["prototypes"] == {}


def change_slice(run, position, field, change):
    """Puts another array into the so many-th published slice, on disk and in the catalog; returns its cluster."""
    key, name = sorted(run.catalog.manifest().entries.items())[position]
    arrays = dict(checkpoints.load(run.layout.slice(name))[0])
    arrays[field] = change(arrays[field])
    checkpoints.save(run.layout.slice(name), arrays, {})
    run.catalog.add_slice(run.catalog.slices()[name]._replace(params_digest=arrays_digest(arrays)), [])
    return key


def test_the_audit_agrees_and_sees_a_changed_bit(erased_workdir):
    with small_run(erased_workdir) as run:
        verdict = audit(run)
        assert verdict.ok and verdict.checked == verdict.clusters
        key = change_slice(run, 1, "bias", lambda bias: np.nextafter(bias, 1).astype(np.float32))
        assert audit(run).differences == (f"parameters {key}",)


def test_a_workdir_of_one_device_is_audited_bit_for_bit_on_two_and_the_other_way_round(
    trained, scratch, trained_workdir
):
    for workdir, devices in ((trained_workdir, 2), (trained(2), 1)):
        with small_run(workdir, devices=devices) as run:
            verdict = audit(run)
            assert verdict.ok and verdict.identical == verdict.clusters > 3
            assert differences(state(run), scratch(frozenset())) == []


def test_slices_of_another_program_are_compared_within_a_tolerance(trained_workdir, monkeypatch):
    """Other bits count as near, and the verdict says so; a real change still fails."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # part of the fingerprint, harmless to a CPU
    with small_run(trained_workdir) as run:
        change_slice(run, 1, "bias", lambda bias: np.nextafter(bias, 1).astype(np.float32))
        verdict = audit(run)
        assert verdict.ok and verdict.near == 1 and "equal within 0.01: 1 slices" in verdict.text()
        key = change_slice(run, 0, "kernel", lambda kernel: kernel * np.float32(1.5))
        assert f"parameters {key}" in audit(run).differences


def test_unlearning_compiles_nothing_new(tmp_path, monkeypatch):
    """One trace for training and every request; the seed makes the program new to this process."""
    chex.clear_trace_counter()
    monkeypatch.setattr(train_step, "device_program", chex.assert_max_traces(train_step.device_program, n=1))
    with small_run(tmp_path / "run", config=small_config(seed=77)) as run:
        build(run)
        for kind in (unsampled_record, sampled_record, owner):
            assert erase.request_erasure(run, kind(run)[0]).outcome.retuned > 0
        assert train_step.compiled(run.tuning_spec, run.mesh)._cache_size() == 1


def breaks_the_contract(tmp_path) -> bool:
    """Whether the state after an erasure differs from a state trained without the record."""
    with small_run(tmp_path / "coupled") as run:
        build(run)
        requests = unsampled_record(run)
    after, _ = erase_requests(tmp_path / "coupled", requests)
    expected = train_from_scratch(tmp_path / "scratch", without(small_source(), set(requests[0])))
    return any(line.startswith("parameters") for line in differences(after, expected))


def test_a_global_step_count_fails_the_contract(tmp_path, monkeypatch):
    """Negative control: the learning rate follows the steps of all clusters together, as upstream's does."""
    step_batches = tune.step_batches

    def coupled(jobs, *args):
        total = sum(job.steps for job in jobs)
        for call in step_batches(jobs, *args):
            yield dataclasses.replace(call, total=np.full_like(call.total, total))

    monkeypatch.setattr(tune, "step_batches", coupled)
    assert breaks_the_contract(tmp_path)


def test_a_lane_that_reads_its_neighbours_fails_the_contract(tmp_path, monkeypatch):
    """Negative control: the step is scaled by the valid images of all lanes, as in one mixed batch."""
    cluster_step, vmap = train_step.cluster_step, jax.vmap

    def coupled(spec, params, images, labels, state, batch):
        share = jax.lax.pmean(batch.valid.sum() / batch.valid.size, "lane")
        new, loss = cluster_step(spec, params, images, labels, state, batch)
        mixed = jax.tree.map(lambda old, new: old + (new - old) * share, state.slice, new.slice)
        return new._replace(slice=mixed), loss

    train_step.compiled.cache_clear()
    monkeypatch.setattr(train_step, "cluster_step", coupled)
    monkeypatch.setattr(jax, "vmap", lambda f, *args, **options: vmap(f, *args, **({"axis_name": "lane"} | options)))
    try:
        assert breaks_the_contract(tmp_path)
    finally:
        train_step.compiled.cache_clear()
