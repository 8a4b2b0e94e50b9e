"""Approximate slices: what they change, how they are marked, and that nothing of them is left in the exact state."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from commands import call, refused
from helpers import rectified, small_config, small_run, small_source, without
from test_exactness import owner, sample_of, sampled_record, train_from_scratch, unsampled_record
from text_problem import text_config, text_folder, text_run, text_source

from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import overview
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.storage import requests
from lmeraser_jax.training.tasks import TextRows, row_losses
from lmeraser_jax.unlearning import approximate, erase, influence
from lmeraser_jax.unlearning import build as build_module
from lmeraser_jax.unlearning.approximate import publish_approximate
from lmeraser_jax.unlearning.artifacts import is_approximate, load_slice
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.influence import Problem, Rows, Settings
from lmeraser_jax.unlearning.rectify import Change, request_rectification
from lmeraser_jax.unlearning.verify import verify_all


def losses(run, ref, rows):
    """Of a slice on the records in some image rows, float32 [n]."""
    spec = run.tuning_spec
    inputs = np.asarray(run.images[rows])
    values = TextRows(inputs) if spec.is_text else inputs
    known = {row: label for row, label in run.catalog.db.execute("SELECT row,label FROM records")}
    labels = np.array([known[row] for row in rows.tolist()], np.int32)
    outputs = approximate.objective_of(spec).outputs(load_slice(run, ref), run.backbone.params, values)
    targets = approximate.targets_of(spec, values, labels)
    return np.asarray(row_losses(outputs, targets))


@pytest.fixture
def accepted(trained_workdir):
    """An opened run with an accepted erasure of one unsampled record: (run, id, key of its cluster, image row)."""
    with small_run(trained_workdir) as run:
        ((name,),) = unsampled_record(run)
        row, key = run.catalog.rows([name])[name], run.catalog.clusters_of([name])[name]
        requests.accept(run.catalog, [name], request="first")
        yield run, name, key, row


def test_an_approximate_slice_answers_at_once_and_leaves_no_trace(accepted, tmp_path):
    run, name, key, row = accepted
    before, images = run.catalog.manifest(), run.images[:16]
    (report,) = publish_approximate(run, "newton", force=True).values()
    after = run.catalog.manifest()
    assert {k for k in after.entries if after.entries[k] != before.entries[k]} == {key}
    assert is_approximate(after.entries[key]) and after.clustering == before.clustering
    rows = np.array([row])
    assert losses(run, after.entries[key], rows) > losses(run, before.entries[key], rows)
    assert report.iterations > 0 and report.change > 0 and np.isfinite(dataclasses.astuple(report)[1:]).all()
    answers = predict(load_model(run), images)
    assert answers.approximate == {key} and (answers.clusters >= 0).all()
    marked = [row.key for row in overview.overview(run.layout, run.catalog, run.config).clusters if row.approximate]
    assert marked == [key] and requests.get(run.catalog, "first").state == "approximated"
    with pytest.raises(UserError, match="until then 1 clusters answer with approximate slices"):
        audit(run)
    assert publish_approximate(run, "newton", force=True) == {key: report}, "twice is once"
    live = run.catalog.live("train")
    other, its_key = next((name, k) for name, k in zip(live.ids, live.clusters, strict=True) if k != key)
    requests.accept(run.catalog, [other], request="second")
    assert set(publish_approximate(run, "newton", force=True, request="second")) == {its_key}
    (report,) = (r for k, r in publish_approximate(run, "warm").items() if k == key)
    approximations = after.entries[key]
    after = run.catalog.manifest()
    assert approximations != after.entries[key] and len([r for r in after.entries.values() if is_approximate(r)]) == 2
    erase.process(run)
    assert not list(run.layout.slices.glob("approximate-*")) and audit(run).ok
    expected = train_from_scratch(tmp_path / "scratch", without(small_source(), {name, other}))
    assert differences(state(run), expected) == []
    (fact,) = receipt_of(run)["approximate"]
    assert fact["mode"] == "warm", "of its own cluster alone, and the last one"
    assert fact["cluster"] == run.catalog.salted("cluster", key) and fact["change"] == report.change
    assert [entry["state"] for entry in receipt_of(run)["request"]["states"]][1] == "approximated"
    assert all(verdict.ok for verdict in verify_all(run.layout, run.catalog))


def receipt_of(run):
    return json.loads(run.layout.receipt("first").read_text())


@pytest.mark.parametrize("kind", [sampled_record, owner])
def test_clusters_of_sampled_records_and_of_owners_are_updated_too(kind, tmp_path):
    config = small_config(**({"clustering__partition": "owner"} if kind is owner else {}))
    train_from_scratch(tmp_path / "run", small_source(), config=config)
    with small_run(tmp_path / "run", config=config) as run:
        ids = kind(run)[0]  # of an owner all records, so that no slice is left
        requests.accept(run.catalog, ids)
        reports = publish_approximate(run, "newton", force=True)
        touched = set(run.catalog.clusters_of(ids).values())
        assert set(reports) == (touched if kind is sampled_record else set())
        assert (predict(load_model(run), run.images[:4]).clusters >= 0).all()
        erase.process(run)
        after = state(run)
    expected = train_from_scratch(tmp_path / "scratch", without(small_source(), set(ids)), config=config)
    assert differences(after, expected) == []


def by_hand(run, ref, before, after, settings):
    """The update of a slice for records, (pixels, label), before and after: each has two rows in one chunk."""
    start, count = load_slice(run, ref), len(before) + len(after)
    inputs, labels = (np.stack(column) for column in zip(*before, *after, strict=True))
    weights = np.zeros((2, 1, count), np.float32)
    weights[0, 0, : len(before)], weights[1, 0, len(before) :] = 1 / len(before), 1 / len(after)
    objective, strength = approximate.objective_of(run.tuning_spec), approximate.strengths(start, run.config.tuning)
    problem = Problem(objective, run.backbone.params, Rows(inputs[None], labels[None].astype(np.int32)), strength)
    return influence.update(problem, start, *weights, settings)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["newton", "warm"])
def test_corrected_records_take_the_place_of_the_old_ones_and_leave_no_trace(trained_workdir, tmp_path, mode):
    """One has another label; the other looks like a record of another cluster, and joins that."""
    with small_run(trained_workdir) as run:
        table, sample = run.catalog.live("train"), sample_of(run)
        free = [(name, k) for name, k in zip(table.ids, table.clusters, strict=True) if name not in sample]
        (first, key), old = free[0], dict(zip(table.ids, zip(run.images[table.rows], table.labels, strict=True)))
        second = next(name for name, k in free[1:] if k == key)
        model, target = next((name, k) for name, k in free if k != key)
        changes = [Change(first, label=(int(old[first][1]) + 1) % 10), Change(second, image=old[model][0])]
        members = {k: run.catalog.members(k).ids for k in (key, target)}
        before, entries = run.catalog.manifest(), run.catalog.manifest().entries
        request_rectification(run, changes, "first", defer=True)
        reports = publish_approximate(run, mode, force=True, request="first")
        assert set(reports) == {key, target} and {report.mode for report in reports.values()} == {mode}
        after = run.catalog.manifest()
        assert {k for k, ref in after.entries.items() if is_approximate(ref)} == {key, target}
        new = old | {first: (old[first][0], changes[0].label), second: (changes[1].image, old[second][1])}
        ends = {key: [*(set(members[key]) - {second})], target: [*members[target], second]}
        settings = Settings(damp=1e-2, rounds=4, iterations=12) if mode == "newton" else Settings("warm")
        for k in (key, target):
            both = [old[name] for name in members[k]], [new[name] for name in sorted(ends[k])]
            expected = by_hand(run, entries[k], *both, settings)
            start, stored = load_slice(run, before.entries[k]), load_slice(run, after.entries[k])
            for a, b, c in zip(stored[:3], expected[:3], start[:3], strict=True):
                if np.size(a):
                    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a - c), (k, mode)
        erase.process(run)
        assert {fact["cluster"] for fact in receipt_of(run)["approximate"]} == {
            run.catalog.salted("cluster", k) for k in (key, target)
        }
        assert not list(run.layout.slices.glob("approximate-*")) and len(run.catalog.manifests()) == 1
        expected = train_from_scratch(tmp_path / "scratch", rectified(small_source(), changes))
        assert differences(state(run), expected) == []


def test_an_update_loses_no_slice_that_a_killed_build_has_tuned(accepted, monkeypatch):
    run, *_ = accepted
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            erase.process(run)
    tuned = set(run.catalog.slices())
    publish_approximate(run, "newton", force=True)
    assert tuned < set(run.catalog.slices()) and all(run.layout.slice(name).is_dir() for name in tuned)
    assert erase.process(run)[0].retuned == 0 and audit(run).ok


def test_nothing_is_published_where_the_solver_failed_or_the_process_dies(accepted, monkeypatch):
    run, _, key, _ = accepted
    before = run.catalog.manifest()
    monkeypatch.setattr(influence, "LARGEST_RESIDUAL", -1.0)
    with pytest.raises(UserError, match=r"ended at residual .* --request=ID of the request and --force"):
        publish_approximate(run, "newton")
    update = influence.update

    def infinite(*args):
        parameters, report = update(*args)
        return parameters, dataclasses.replace(report, change=np.inf)

    with monkeypatch.context() as patch:
        patch.setattr(influence, "update", infinite)
        with pytest.raises(UserError, match="an update is not finite; nothing is published; the request is accepted"):
            publish_approximate(run, "newton", force=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(run.catalog), "publish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish_approximate(run, "newton", force=True)
    assert run.catalog.manifest() == before and requests.get(run.catalog, "first").state == "accepted"
    assert key in publish_approximate(run, "newton", force=True)


def test_a_second_request_compiles_nothing_new(accepted):
    run, _, key, _ = accepted
    publish_approximate(run, "newton", force=True)
    sizes = influence._one_step._cache_size(), influence._gradient._cache_size()
    records = run.catalog.live("train")
    requests.accept(run.catalog, [next(i for i, k in zip(records.ids, records.clusters, strict=True) if k != key)])
    assert len(publish_approximate(run, "newton", force=True)) == 2
    assert (influence._one_step._cache_size(), influence._gradient._cache_size()) == sizes


@pytest.mark.slow
def test_adapters_of_a_language_model_forget_at_once_and_exactly_later(tmp_path):
    config = text_config(text_folder(tmp_path), tuning__epochs=20)
    with text_run(tmp_path / "run", config) as (run, _):
        build(run)
        ((name,),) = unsampled_record(run)
        key, row = run.catalog.clusters_of([name])[name], run.catalog.rows([name])[name]
        before = run.catalog.manifest().entries[key]
        requests.accept(run.catalog, [name], request="first")
        publish_approximate(run, "newton", force=True)
        after, rows = run.catalog.manifest().entries[key], np.array([row])
        assert is_approximate(after) and losses(run, after, rows) > losses(run, before, rows)
        erase.process(run)
        unlearned = state(run)
    with text_run(tmp_path / "scratch", config, without(text_source(config), {name})) as (run, _):
        build(run)
        assert differences(unlearned, state(run)) == []


@pytest.mark.slow
def test_the_command_says_what_answers_and_refuses_what_cannot_be(trained_workdir, capsys, tmp_path):
    at = f"--workdir={trained_workdir}"
    for flags, message in (
        (["--mode=fast"], "--mode=fast"),
        (["--mode=newton", "--defer"], "--defer accepts only, and --mode answers"),
        (["--mode=warm", "--calibrate"], "--calibrate scales the step"),
        (["--force"], "--force publishes an approximate slice: give --mode, too"),
        (["--mode=newton", "--calibrate"], "--calibrate needs held-out records"),
    ):
        assert message in refused(capsys, "unlearn", at, "--records=digit-0017", *flags), flags
    with small_run(trained_workdir) as run:
        ((name,),), (other, third) = unsampled_record(run), run.catalog.live("train").ids[-2:]
    code, shown, _ = call(capsys, "unlearn", at, f"--records={name}", "--mode=warm", "--request=r1")
    assert code == 0 and "1 clusters answer approximately, without any guarantee" in shown and "warm: " in shown
    assert "approximate: no guarantee" in call(capsys, "inspect", at)[1]
    edits, at_edits = tmp_path / "edits.jsonl", f"--edits={tmp_path / 'edits.jsonl'}"
    edits.write_text(json.dumps({"id": other, "label": "3"}) + "\n" + json.dumps({"id": third, "label": "4"}))
    assert "--defer accepts only" in refused(capsys, "rectify", at, at_edits, "--mode=warm", "--defer")
    code, shown, _ = call(capsys, "rectify", at, at_edits, "--mode=newton", "--request=r2", "--force")
    assert code == 0 and "clusters answer approximately, without any guarantee" in shown and "newton: " in shown
    assert call(capsys, "process", at)[0] == 0 and "approximate" not in call(capsys, "inspect", at)[1]
    copy = shutil.copytree(trained_workdir, tmp_path / "copy")
    assert call(capsys, "audit", f"--workdir={copy}")[0] == 0
