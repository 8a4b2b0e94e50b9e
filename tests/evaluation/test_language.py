"""Answers of a language model's workdir: routing, mixed batches, scores, generation, quarantine, the commands."""

import functools
import json

import jax
import numpy as np
import pytest
from commands import call, refused
from flax import nnx
from helpers import merged
from text_problem import line, text_config, text_folder, text_run
from transcriptions import QUICKLY

import lmeraser_jax as lm
from lmeraser_jax.data.text_rows import pack, unpack
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import language
from lmeraser_jax.evaluation.attacks import shadows, statistics
from lmeraser_jax.evaluation.language import Sampling
from lmeraser_jax.evaluation.predict import load_model
from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.models.backbone import graph
from lmeraser_jax.storage import requests
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run

GREEDY = Sampling(6)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = text_folder(tmp_path_factory.mktemp("text"))
    config = text_config(folder, tuning__epochs=4, tuning__lora_rate=0.05, tuning__alpha=64.0)
    with text_run(folder / "run", config) as (run, _):
        build(run)
    return folder / "run"


@pytest.fixture
def run(workdir):
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        yield run


def rows_of(run, *splits):
    return np.array(run.images[run.catalog.live(*splits).rows])


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def forward(config, params, tokens):
    return jax.nn.log_softmax(nnx.merge(graph(config)[0], params)(tokens)[0])


def plain_logits(model, cluster, tokens):
    """Log probabilities [T, V] after a row's tokens, with the cluster's adapters merged into the kernels."""
    spec = model.run.tuning_spec
    own = jax.tree.map(lambda leaf: np.asarray(leaf[cluster]), model.arrays.stack.backbone)
    params = merged(model.run.backbone.params, own, spec.tuning.alpha / spec.tuning.rank)
    padded = np.zeros((1, spec.architecture.context), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(spec.architecture, params, padded))[: len(tokens)]


def test_a_batch_that_mixes_clusters_scores_each_row_with_its_own_adapters(run):
    model, rows = load_model(run), rows_of(run, "test")
    scores, base = language.score(model, rows), language.score(model, rows, adapted=False)
    features = run.features(run.catalog.live("test"))
    prototypes = np.asarray(model.arrays.prototypes)[: len(model.keys)]
    nearest = ((features[:, None] - prototypes[None]) ** 2).sum(axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(scores.clusters[:, 0], nearest)
    assert len(set(nearest)) > 1 and np.abs(scores.losses - base.losses).max() > 0.05
    for place in range(3):
        query, response = unpack(rows[place])
        logits = plain_logits(model, nearest[place], query + response)[len(query) - 1 : -1]
        np.testing.assert_allclose(
            scores.log_likelihoods[place], logits[np.arange(len(response)), response].sum(), rtol=1e-4
        )
        np.testing.assert_allclose(scores.accuracies[place], (logits.argmax(axis=1) == response).mean(), rtol=1e-6)


def test_generation_continues_each_query_with_its_own_adapters(run):
    model, rows = load_model(run), language.query_rows(rows_of(run, "test"))
    texts = language.Respond(GREEDY)(model, rows)
    end = run.encoder.end
    for place in range(3):
        tokens = unpack(pack(rows[place, 2 : 2 + rows[place, 0]], [], 12))[0]
        for new in texts.tokens[place]:
            assert new == plain_logits(model, texts.clusters[place, 0], tokens)[-1].argmax()
            tokens.append(int(new))
            if new == end:
                break


def test_what_is_drawn_depends_on_the_seed_and_the_query_alone(run):
    model, rows = load_model(run), language.query_rows(rows_of(run, "test", "train"))
    drawn = [language.Respond(Sampling(6, 2.0, seed))(model, rows).tokens for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    for places in ([11, 3, 3, 40, 7], [3], range(47, -1, -1)):
        again = language.Respond(Sampling(6, 2.0))(model, rows[list(places)]).tokens
        np.testing.assert_array_equal(again, drawn[0][list(places)])


def test_the_padding_of_a_row_depends_on_its_own_length():
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    rows = np.zeros((50, 102), np.int32)
    rows[:, 0], rows[:, 1] = np.arange(50), lengths
    widths = {}
    for places, batch in language._batches(rows):
        assert batch.shape[0] == language.AT_A_TIME and not batch[len(places) :].any()
        np.testing.assert_array_equal(batch[: len(places), 0], places)
        widths |= dict.fromkeys(places.tolist(), batch.shape[1] - 2)
    assert [widths[i] for i in range(50)] == [
        16 if n <= 16 else 32 if n <= 32 else 64 if n <= 64 else 100 for n in lengths
    ]


@pytest.mark.slow
def test_commands_answer_and_name_what_they_cannot(workdir, tmp_path, capsys):
    at, file, out = f"--workdir={workdir}", tmp_path / "queries.jsonl", tmp_path / "out.json"
    known = line(0)
    lines = [
        {"id": "a", "query": known["query"]},
        {"query": known["query"], "candidates": ["w1 w2 w3", known["response"], "w9"]},
        {"query": " "},
        ["no object"],
        {"id": "long", "query": "w1 " * 40},
        {"id": "long", "query": "w2 " * 50},
        {"id": None, "query": "w1"},
        {"id": 7, "query": "w1"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    code, shown, err = call(
        capsys, "predict", at, f"--queries={file}", "--query=w1 w1 w9", "--max_tokens=4", f"--json={out}"
    )
    values = json.loads(out.read_text())
    assert code == 1 and [row["id"] for row in values["predictions"]] == ["--query 1", "a", "line 2", "7"]
    assert [row["id"] for row in values["unreadable"]] == ["line 3", "line 4", "line 7", "line 9", "long", "long"]
    assert "long: it has 42 tokens; at most 12 are possible" in err and "must be text, and not empty" in err
    assert "long: it has 52 tokens" in err and "line 7: id is None; must be text or a whole number" in err
    ranked = values["predictions"][2]
    likelihoods = {each["answer"]: each["log_likelihood"] for each in ranked["candidates"]}
    assert ranked["answer"] == max(likelihoods, key=likelihoods.__getitem__) and len(likelihoods) == 3
    assert known["query"] in shown and "cluster " in shown
    code, shown, _ = call(capsys, "predict", at, "--query=w1 w1 w9", "--max_tokens=4", "--format=csv")
    assert code == 0 and shown.startswith("id,query,answer,cluster,approximate\n")
    answer = shown.splitlines()[1].split(",")[2]
    code, shown, err = call(capsys, "unlearn", at, "--owner=person-2", "--dry_run")
    assert code == 0 and "passes of a record: " in shown and "image" not in shown + err
    assert "name a query" in refused(capsys, "predict", at)
    assert "use --query" in refused(capsys, "predict", at, "scan.png")
    assert "must be below 32" in refused(capsys, "predict", at, "--query=w1", "--max_tokens=32")
    assert "cannot be read" in refused(capsys, "predict", at, "--queries=none.jsonl")
    file.write_text(json.dumps(lines[1]))
    assert call(capsys, "predict", at, f"--queries={file}", "--max_tokens=32")[0] == 0, "it generates nothing"
    assert "--linear fits a head to images" in refused(capsys, "evaluate", at, "--linear")
    code, shown, _ = call(capsys, "evaluate", at, f"--json={out}")
    values = json.loads(out.read_text())
    assert code == 0 and "frozen model" in shown and values["rows"] == sum(c["rows"] for c in values["clusters"]) == 8
    assert lm.evaluate(workdir).values() == values | {"clusters": tuple(values["clusters"])}
    assert [row["answer"] for row in lm.answer(workdir, ["w1 w1 w9"], max_tokens=4)] == [answer]
    with pytest.raises(UserError, match="query 2: it has 42 tokens"):
        lm.answer(workdir, ["w1", "w1 " * 40], max_tokens=4)
    with pytest.raises(UserError, match="has a language model, which answers queries"):
        lm.predict(workdir, ["scan.png"])
    code, shown, _ = call(capsys, "evaluate", at, "--split=train", f"--json={out}")
    values = json.loads(out.read_text())
    assert values["loss"] < values["base_loss"] - 0.5


def test_an_attack_reads_the_loss_that_answers_have(run):
    model, records = load_model(run), run.catalog.live("test")
    margins, right = shadows.score(run, [load_slice(run, ref) for ref in model.refs], records)
    scores, places = language.score(model, rows_of(run, "test")), np.arange(len(records))
    nearest = scores.clusters[:, 0]
    np.testing.assert_allclose(statistics.losses(margins)[nearest, places], scores.losses, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(right[nearest, places], scores.accuracies)


@pytest.mark.slow
def test_every_attack_runs_on_texts(workdir, tmp_path, capsys):
    out = tmp_path / "out.json"
    code, shown, _ = call(
        capsys, "attack", f"--workdir={workdir}", "--targets=6", "--shadows=8", "--seed=1", f"--json={out}"
    )
    assert code in (0, 1, 3) and all(name in shown for name in ("loss", "lira", "ulira", "klom", "relearn", "routing"))
    assert json.loads(out.read_text())["accuracies"]


def exported(workdir, out, capsys):
    code, shown, _ = call(capsys, "export", f"--workdir={workdir}", f"--out={out}")
    assert code == 0 and "no erasure reaches these copies" in shown
    with np.load(out / "prototypes.npz") as file:
        return tuple(file["keys"].tolist()), file["prototypes"]


def test_export_writes_every_cluster_and_its_prototype(run, workdir, tmp_path, capsys):
    keys, prototypes = exported(workdir, tmp_path / "out", capsys)
    model = load_model(run)
    assert keys == model.keys and {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
        key[:12] for key in keys
    }
    np.testing.assert_array_equal(prototypes, np.asarray(model.arrays.prototypes)[: len(keys)])
    assert "exists already" in refused(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    assert "is no published cluster" in refused(
        capsys, "export", f"--workdir={workdir}", f"--out={tmp_path / 'b'}", "--cluster=nonesuch"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # transformers about itself
def test_peft_finds_the_same_likelihoods_with_exported_adapters(run, workdir, tmp_path, capsys):
    """Routed by hand, as the help of `lmeraser export` says."""
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    keys, prototypes = exported(workdir, tmp_path / "out", capsys)
    base = run.config.backbone.weights
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = rows_of(run, "test")[:4]
    scores = language.score(load_model(run), rows)
    for row, expected, cluster in zip(rows, scores.log_likelihoods, scores.clusters[:, 0]):
        query, response = unpack(row)
        with torch.no_grad():
            feature = model(torch.tensor([query]), output_hidden_states=True).hidden_states[-1][0].mean(0).numpy()
            nearest = ((prototypes - feature) ** 2).sum(axis=1).argmin()
            assert nearest == cluster
            adapted = peft.PeftModel.from_pretrained(model, tmp_path / "out" / keys[nearest][:12])
            logits = adapted(torch.tensor([query + response])).logits[0].log_softmax(-1).numpy()
            model = adapted.unload()
        found = logits[np.arange(len(query) - 1, len(query) + len(response) - 1), response].sum()
        np.testing.assert_allclose(expected, found, rtol=1e-4)


def test_no_answer_comes_from_a_quarantined_cluster(run, workdir):
    """The last test of this workdir: its erasure stays open."""
    rows = rows_of(run, "train")
    with open_run(workdir, devices=jax.devices()[:1]) as reader:
        predictor = Predictor(reader)
        before = predictor.answer(rows, language.score)
        record = run.catalog.live("train").ids[0]
        place = before.keys.index(run.catalog.clusters_of([record])[record])
        requests.accept(run.catalog, [record], quarantine=True)
        after = predictor.answer(rows, language.score)
    assert (before.clusters == place).any() and not (after.clusters == place).any()
    same = before.clusters[:, 0] != place
    np.testing.assert_array_equal(after.losses[same], before.losses[same])
