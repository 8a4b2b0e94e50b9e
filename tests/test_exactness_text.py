"""The contract of `test_exactness`, for language models: adapters of a decoder, tuned on queries and responses."""

import functools
import shutil

import chex
import jax
import numpy as np
import pytest
from commands import call, refused
from helpers import with_items, without
from test_exactness import owner, sampled_record, unsampled_record
from text_problem import text_config, text_folder, text_run, text_source, word_tokenizer

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training import train_step
from lmeraser_jax.training.features import network_inputs
from lmeraser_jax.training.tasks import TextRows, outputs_of
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.approximate import publish_approximate
from lmeraser_jax.unlearning.artifacts import is_approximate, load_slice
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.rectify import Change, request_rectification

PREFIXED = {"tuning__lora_layers": 1}


def batch(run):
    return [[*unsampled_record(run)[0], *sampled_record(run)[0], *owner(run)[0]]]


def in_turn(run):
    return [unsampled_record(run)[0], sampled_record(run)[0]]


def in_other_turn(run):
    return in_turn(run)[::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def train(folder, tmp_path_factory):
    """The workdir and the state of a training without some ids, given settings and a number of devices."""

    @functools.cache
    def trained(ids=frozenset(), devices=1, **overrides):
        if len(jax.devices()) < devices:
            pytest.skip(f"needs {devices} devices, there are {len(jax.devices())}")
        config, workdir = text_config(folder, **overrides), tmp_path_factory.mktemp("trained") / "run"
        with text_run(workdir, config, without(text_source(config), set(ids)), devices) as (run, _):
            build(run)
            return workdir, state(run)

    return trained


KINDS = (unsampled_record, sampled_record, owner, batch, in_turn, in_other_turn)


@pytest.mark.parametrize(
    ("kind", "devices", "overrides"),
    [pytest.param(batch, 1, PREFIXED, id="batch with frozen blocks")]
    + [pytest.param(kind, n, {}, id=f"{kind.__name__}-{n}", marks=pytest.mark.slow) for kind in KINDS for n in (1, 2)],
)
def test_unlearning_equals_never_having_had_the_texts(folder, train, tmp_path, kind, devices, overrides):
    workdir = shutil.copytree(train(devices=devices, **overrides)[0], tmp_path / "run")
    with text_run(workdir, text_config(folder, **overrides), devices=devices) as (run, _):
        requests = kind(run)
        reports = [erase.request_erasure(run, ids).outcome for ids in requests]
        unlearned = state(run)
    erased = frozenset(name for ids in requests for name in ids)
    assert differences(unlearned, train(erased, **overrides)[1]) == []
    assert sum(report.retuned for report in reports) > 0


@pytest.mark.slow
def test_the_audit_agrees_and_the_texts_mattered(folder, train, tmp_path):
    workdir = shutil.copytree(train()[0], tmp_path / "run")
    with text_run(workdir, text_config(folder)) as (run, _):
        verdict = audit(run)
        assert verdict.ok and verdict.checked == verdict.clusters > 1
        (record,) = unsampled_record(run)[0]
        key = run.catalog.clusters_of([record])[record]
        slices = state(run)["slices"]
    less = train(frozenset([record]))[1]["slices"]
    assert [name for name in slices if slices[name] != less.get(name)] == [key]


def test_a_request_compiles_nothing_new(folder, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(train_step, "device_program", chex.assert_max_traces(train_step.device_program, n=1))
    with text_run(tmp_path / "run", text_config(folder, seed=78)) as (run, _):
        build(run)
        for kind in (unsampled_record, sampled_record, owner):
            assert erase.request_erasure(run, kind(run)[0]).outcome.retuned > 0


@pytest.mark.slow
def test_bits_do_not_depend_on_what_fits_into_memory(folder, train, tmp_path):
    """The states of the frozen blocks are computed once for all rows, or for each call: by one program."""
    config = text_config(folder, tuning__device_bytes=1, **PREFIXED)
    with text_run(tmp_path / "run", config) as (run, _):
        build(run)
        assert differences(state(run), train(**PREFIXED)[1]) == []


def test_states_of_frozen_blocks_give_the_outputs_of_the_whole_network(folder, train):
    """A slice of the last block alone: with the states below it, and from the tokens."""
    workdir, _ = train(**PREFIXED)
    with text_run(workdir, text_config(folder, **PREFIXED)) as (run, _):
        spec, rows = run.tuning_spec, np.array(run.images[:7])
        slice_ = load_slice(run, next(iter(run.catalog.manifest().entries.values())))
        inputs = network_inputs(spec, run.backbone.params, rows, np.arange(7), run.mesh)
        assert spec.prefix == 1 and inputs.states.shape == (7, 12, 16) and np.abs(inputs.states).max() > 0.1
        short, whole = (outputs_of(slice_, spec, run.backbone.params, each) for each in (inputs, TextRows(rows)))
        bare = outputs_of(slice_._replace(backbone=None), spec, run.backbone.params, TextRows(rows))
    np.testing.assert_allclose(short, whole, atol=1e-4)
    assert np.abs(np.asarray(whole - bare)).max() > 1e-3, "the adapters do something"


def test_an_erased_text_is_nowhere_in_the_records(folder, train, tmp_path):
    workdir = shutil.copytree(train()[0], tmp_path / "run")
    with text_run(workdir, text_config(folder)) as (run, _):
        row = run.catalog.rows(unsampled_record(run)[0]).popitem()[1]
        content = np.array(run.images[row])
        erase.request_erasure(run, unsampled_record(run)[0])
        assert not np.array(run.images[row]).any()
    assert content[1] > 0
    assert content.tobytes() not in (workdir / "records" / run.layout.images.name).read_bytes()


@pytest.mark.slow
def test_rectifying_texts_equals_having_had_them_corrected(folder, train, tmp_path):
    """A query, a response, and both, of sampled and other records; no byte of the old rows is left."""
    config, workdir = text_config(folder), shutil.copytree(train()[0], tmp_path / "run")
    source = text_source(config)
    places = {item.id: place for place, item in enumerate(source.items)}
    rows = source.read(range(len(source.items))).rows.copy()
    with text_run(workdir, config) as (run, _):
        (first,), (second,) = unsampled_record(run)[0], sampled_record(run)[0]
        third = next(name for name in run.catalog.live("train").ids if name not in (first, second))
        changes = [
            Change(first, query="w3 w30 w9"),
            Change(second, response="w2 w2"),
            Change(third, query="w4 w30", response="w31 w5"),
        ]
        needles = [row_bytes(rows[places[change.id]]) for change in changes]
        assert all(in_files(workdir, needle) for needle in needles), "the search is not blind"
        for change in changes:
            query, response = run.encoder.texts(rows[places[change.id]])
            row, _ = run.encoder.row(change.query or query, change.response or response)
            rows[places[change.id]] = row
        waiting = row_bytes(rows[places[third]])
        request_rectification(run, changes, "first", defer=True)
        assert in_files(workdir, waiting), "it waits in the catalog"
        publish_approximate(run, "newton", force=True)
        approximate = [ref.encode() for ref in run.catalog.manifest().entries.values() if is_approximate(ref)]
        assert approximate and all(in_files(workdir, needle) for needle in approximate)
        assert erase.process(run)[0].retuned > 0 and audit(run).ok
        corrected = state(run)
        assert in_files(workdir, waiting) == [run.layout.images.name], "it is live, and waits nowhere any more"
        needles += approximate
        assert request_rectification(run, changes) is None, "nothing is left to change"
        with pytest.raises(UserError, match="the context 12"):
            request_rectification(run, [Change(first, response="w1 " * 30)])
    assert not any(in_files(workdir, needle) for needle in needles)
    with text_run(tmp_path / "scratch", config, with_items(source, source.items, rows)) as (run, _):
        build(run)
        assert differences(corrected, state(run)) == []


def test_a_rectification_is_accepted_with_the_tokenizer_alone(train, tmp_path, monkeypatch, capsys):
    """The model, which takes seconds to load, is not needed."""
    workdir = shutil.copytree(train()[0], tmp_path / "run")
    (tmp_path / "edits.jsonl").write_text('{"id": "text-01", "response": "w2 w2"}')
    monkeypatch.setattr(checkpoints, "load", lambda *_: pytest.fail("the model is loaded"))
    command = ["rectify", f"--workdir={workdir}", f"--edits={tmp_path / 'edits.jsonl'}", "--defer"]
    assert "made with another config" in refused(capsys, *command, "--config.text.query={query}")
    assert "1 records, 1 clusters to tune" in call(capsys, *command)[1]


def in_files(folder, needle):
    """The files below a folder that hold some bytes."""
    return [path.name for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def row_bytes(row):
    """The tokens of a row, as its file holds them."""
    return row[: 2 + row[1]].tobytes()


def test_the_tokenizer_belongs_to_the_workdir(folder, train, tmp_path):
    """Moved data are read with the workdir's own tokenizer; one that was changed is refused."""
    workdir = shutil.copytree(train()[0], tmp_path / "run")
    moved = shutil.move(shutil.copytree(folder, tmp_path / "folder"), tmp_path / "elsewhere")
    (moved / "model" / "tokenizer.json").write_text("{}")
    with text_run(workdir, text_config(moved)) as (run, imported):
        assert imported.added == 0 and imported.known > 0
        assert run.encoder.query("w3 w3 w9") == word_tokenizer()("w3 w3 w9 :")["input_ids"]
    file = workdir / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w3"', '"w99"'))
    with (
        text_run(workdir, text_config(moved)) as (run, _),
        pytest.raises(UserError, match="is not the tokenizer that the texts were read with"),
    ):
        run.encoder.query("w3")


def test_a_failed_import_leaves_no_tokenizer_behind(folder, tmp_path):
    """Another model with other tokens may be taken in the same workdir afterwards."""
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "records.jsonl").write_text("{")
    with pytest.raises(UserError, match="is no JSON"), text_run(tmp_path / "run", text_config(other)):
        pass
    with text_run(tmp_path / "run", text_config(folder)) as (run, _):
        assert run.encoder.query("w3") == word_tokenizer()("w3 :")["input_ids"]
