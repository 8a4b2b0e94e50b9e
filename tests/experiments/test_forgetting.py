"""Comparisons of unlearning on text: who is drawn, what the rows say, what is written; no work is done twice."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from commands import refused
from sklearn.metrics import roc_auc_score
from text_problem import WORDS, text_config, text_folder, word_tokenizer

from lmeraser_jax.cli import compare as compare_command
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.errors import UserError
from lmeraser_jax.experiments import forgetting, forgetting_report, text_draw, text_questions
from lmeraser_jax.experiments.forgetting import Comparison, Forgetting
from lmeraser_jax.experiments.text_draw import DrawOptions
from lmeraser_jax.experiments.text_models import Laboratory

OPTIONS = DrawOptions(owners=3, records=3)
SOURCE = {"command": "lmeraser compare", "machine": "one"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Records with a paraphrase and two wrong answers, as TOFU has them."""
    folder = text_folder(tmp_path_factory.mktemp("text"))
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for line in lines:
        words = line["response"].split()
        line["paraphrased_answer"] = " ".join(reversed(words))
        line["perturbed_answer"] = [" ".join([WORDS[i], *words[1:]]) for i in (30, 31)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"tuning__epochs": 12, "tuning__min_steps": 0, "tuning__lora_rate": 0.05, "clustering__sample_size": 6}
    return text_config(folder, **changes)


@pytest.fixture(scope="module")
def drawn(config):
    return text_draw.draw(config, Encoder(word_tokenizer(), config.text), OPTIONS, forget=1, seed=0)


def test_owners_are_edited_kept_or_held_out(config, drawn):
    owners = [record.item.owner for record in drawn.records]
    assert len(owners) == 9 and len(set(owners[:3])) == 1 and len(set(owners)) == 3
    assert drawn.edited == 3 and drawn.heldout.shape == (9, 14) and (drawn.rows[:, 0] < drawn.rows[:, 1]).all()
    assert not {row.tobytes() for row in drawn.heldout} & {row.tobytes() for row in drawn.rows}
    for seed in (0, 1):
        again = text_draw.draw(config, Encoder(word_tokenizer(), config.text), OPTIONS, 2, seed)
        same = [record.item for record in again.records] == [record.item for record in drawn.records]
        assert again.edited == 6 and same == (seed == 0), "all draws of a seed have the same records"


def test_records_without_owner_are_their_own_and_rows_are_cut_where_the_config_says_so(config, tmp_path):
    lines = [json.loads(line) | {"owner": ""} for line in Path(config.data.path).read_text().splitlines()]
    lines = [line | {"response": line["response"] + " w1" * 20} for line in lines]
    data = write_lines(tmp_path, config, lines).data
    for long, count in (("refuse", 0), ("cut", 5)):
        changed = dataclasses.replace(config, data=data, text=dataclasses.replace(config.text, long=long))
        with contextlib.nullcontext() if count else pytest.raises(UserError, match="0 owners have so many rows"):
            drawn = text_draw.draw(changed, Encoder(word_tokenizer(), changed.text), DrawOptions(5, 1), 1, seed=0)
            assert len({record.item.id for record in drawn.records}) == count and drawn.edited == 1


def test_wrong_rows_differ_from_the_right_ones_in_one_half(drawn):
    for row, query, response in zip(drawn.rows, drawn.wrong["query"], drawn.wrong["response"]):
        middle, end = row[:2] + 2
        assert (row[2:middle] == response[2:middle]).all() and (row[middle:end] != response[middle:end]).any()
        assert (row[2:middle] != query[2:middle]).any() and (row[middle:end] == query[middle:end]).all()
    assert drawn.paraphrased.shape == (3, 14) and drawn.perturbed.shape == (3, 2, 14)
    np.testing.assert_array_equal(drawn.perturbed[:, 0], drawn.wrong["response"])


@pytest.mark.parametrize("options", [(7, 3, 1), (3, 7, 1), (3, 3, 3), (3, 3, 0)])
def test_too_few_records_are_refused(config, options):
    with pytest.raises(UserError, match="--owners=.*owners have so many rows that fit"):
        text_draw.draw(config, Encoder(word_tokenizer(), config.text), DrawOptions(*options[:2]), options[2], seed=0)


def test_only_json_lines_are_compared(config):
    with pytest.raises(UserError, match="config.data.source=tfds: texts are compared from JSON lines"):
        text_draw.read(dataclasses.replace(config, data=dataclasses.replace(config.data, source="tfds")))


def write_lines(folder, config, lines):
    """The config with other lines."""
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder / "lines.jsonl")))


def with_answers(config, answers_of):
    """Lines of the config; `answers_of` gives what changes in test record number i."""
    lines = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    return [line | (answers_of(i) if line["split"] == "test" else {}) for i, line in enumerate(lines)]


def candidates(i):
    return {"candidates": ["w1 w2 w3", f"w{i}", "w4 w5"], "response": f"w{i}"}


def test_the_data_decide_what_test_records_measure(config, tmp_path, rng):
    encoder = Encoder(word_tokenizer(), config.text)
    assert text_questions.questions(config, encoder) is None
    yes_no = with_answers(config, lambda i: {"response": "No." if i % 4 == 1 else "Yes."})
    for lines, choices in ((with_answers(config, candidates), 3), (yes_no, 2)):
        asked = text_questions.questions(write_lines(tmp_path, config, lines), encoder)
        assert asked.rows.shape == (8, choices, 14) and asked.yes_no == (choices == 2)
        rows = asked.rows.reshape(-1, 14)
        losses, tokens = rng.random(len(rows)), rows[:, 1] - rows[:, 0]
        total = (losses * tokens).reshape(8, choices)  # minus the log-likelihoods
        row = asked.measured(lambda given, losses=losses, rows=rows: losses if (given == rows).all() else None)
        right = [line["response"] == "Yes." for line in lines if line["split"] == "test"]
        if choices == 2:
            assert row["answer_auc"] == pytest.approx(roc_auc_score(right, total[:, 1] - total[:, 0]))
        else:
            assert row["hit_ratio"] == np.mean(total.argmin(axis=1) == 1) and len(set(tokens)) == 3
        assert row["answer_low"] <= row.get("hit_ratio", row.get("answer_auc")) <= row["answer_high"]
        assert row["questions"] == 8


def test_questions_that_cannot_be_asked_are_refused_or_counted(config, tmp_path, capsys):
    encoder = Encoder(word_tokenizer(), dataclasses.replace(config.text, long="cut"))  # no answer may be
    bad = {11: "w11", 17: ["w17", "w1"], 23: ["w23", "w2", ""], 29: ["w1", "w2", "w3"]}
    lines = with_answers(config, lambda i: candidates(i) | ({"candidates": bad[i]} if i in bad else {}))
    with pytest.raises(UserError) as error:
        text_questions.questions(write_lines(tmp_path, config, lines), encoder)
    assert [i for i in range(48) if f"text-{i:02d}:" in str(error.value)] == [*bad]
    longer = with_answers(config, lambda i: candidates(i) | ({"query": "w1 " * 9} if i < 20 else {}))
    assert len(text_questions.questions(write_lines(tmp_path, config, longer), encoder).right) == 5
    assert "5 of 8 test records fit --config.text.context=12" in capsys.readouterr().err
    none = with_answers(config, lambda i: candidates(i) | {"query": "w1 " * 9})
    with pytest.raises(UserError, match="too few test records fit"):
        text_questions.questions(write_lines(tmp_path, config, none), encoder)


def row(method, **values):
    names = [field.name for field in dataclasses.fields(Forgetting) if field.default is dataclasses.MISSING]
    numbers = dict.fromkeys(names, 0.5) | {"edit": "removal", "method": method, "seed": 0, "records": 9, "edited": 3}
    return Forgetting(**(numbers | values))


def test_the_report_has_a_line_for_each_method_and_says_what_is_missing(tmp_path):
    rows = [row("before", kl_edited=3.0), row("before", kl_edited=1.0, seed=1), row("exact-owners")]
    (table,) = forgetting_report.tables(rows)
    cells = {line[0].text: dict(zip(table.heads, (cell.text for cell in line))) for line in table.rows}
    assert cells["before the edit"]["KL, edited"] == "2.00 ± 1.41"
    assert cells["exact, a slice per owner"]["KL, edited"] == "–"
    assert "recognition" not in table.heads and "3 of 9 records, 2 seeds" in table.caption
    written = forgetting_report.write(tmp_path, rows, [SOURCE])
    assert {path.name for path in written} == {"report.html", "report.md", "forgetting.png", "forgetting.svg"}
    assert [Forgetting(**line) for line in json.loads((tmp_path / "results.json").read_text())["rows"]] == rows


def test_questions_stand_in_table_and_figure_and_each_number_of_records_apart(tmp_path):
    answers = {"hit_ratio": 0.25, "answer_low": 0.2, "answer_high": 0.3125, "questions": 90}
    rows = [row(name, edited=edited, **answers) for edited in (3, 6) for name in ("base", "before")]
    tables = forgetting_report.tables(rows)
    assert "(3 of 9 records, 1 seed, 90 questions)" in tables[0].caption and "(6 of 9" in tables[1].caption
    place = tables[0].heads.index("hit ratio at 1")
    assert [line[place].text for line in tables[0].rows] == ["0.250 [0.20, 0.31]"] * 2
    axes = forgetting_report.tradeoff(rows).axes
    assert len(axes) == 6 and axes[2].get_xlabel() == "hit ratio at 1" and "6 forgotten" in axes[3].get_ylabel()
    (table,) = forgetting_report.tables([row("base", **answers), row("base", seed=1, **answers | {"hit_ratio": 0.75})])
    assert table.rows[0][place].text == "0.500 ± 0.354"


def test_shares_of_owners_are_numbers_of_them():
    assert [compare_command.owners_of(text, 198) for text in ("2", "1%", "5%", "0.1%")] == [2, 2, 10, 1]
    for text in ("0.05", "-1", "x", "%", "5 %"):
        with pytest.raises(UserError, match=f"--forget={text}: must be a number of owners, or a share such as 5%"):
            compare_command.owners_of(text, 198)


def test_unknown_methods_and_edits_are_all_named(config, tmp_path, capsys):
    flags = ["--methods=newton,lmeraser", "--edits=removal,oblivion", f"--workdir={tmp_path / 'x'}"]
    flags += ["--config.data.source=text", f"--config.data.path={config.data.path}", "--config.tuning.method=lora"]
    flags += [f"--config.backbone.weights={config.backbone.weights}", "--config.data.augment=none"]
    message = refused(capsys, "compare", *flags)
    assert "--methods=lmeraser" in message and "--edits=oblivion" in message and "newton:" not in message


@pytest.mark.slow
def test_a_comparison_measures_every_method_once(config, tmp_path, monkeypatch):
    edits, config = ("removal", "query", "response"), write_lines(tmp_path, config, with_answers(config, candidates))
    comparison = Comparison(tmp_path / "compared", config, OPTIONS, (1,), forgetting.METHODS, edits, seeds=1)
    rows, _ = forgetting.compare(comparison, SOURCE)
    by_task = {(row.edit, row.method): row for row in rows}
    assert len(by_task) == len(rows) == 13 + 2 * 6 and {row.questions for row in rows} == {8}
    for edit in edits:
        retrained, before, floor = (by_task[edit, name] for name in ("retrain", "before", "floor"))
        assert retrained.kl_edited == retrained.kl_kept == 0 and min(before.kl_edited, floor.kl_edited) > 0
    removal = {name: row for (edit, name), row in by_task.items() if edit == "removal"}
    assert removal["before"].passes == 12 and removal["retrain"].share == pytest.approx(6 / 9)
    assert removal["newton"].loss_edited > removal["before"].loss_edited
    assert removal["exact-owners"].share == 0 and removal["exact-owners"].share_record == pytest.approx(2 / 9)
    assert removal["exact-clusters"].share > 0 and removal["retrain"].forget_quality == 1
    assert removal["base"].loss_edited > removal["before"].loss_edited and removal["base"].passes == 0
    assert by_task["query", "retrain"].loss_edited == removal["before"].loss_edited, "one model"
    monkeypatch.setattr(forgetting, "_compare_seed", None)  # must not be called again
    assert forgetting.compare(comparison, SOURCE)[0] == rows
    with pytest.raises(UserError, match=r"compares with other settings[\s\S]*--owners: 3 -> 2"):
        forgetting.compare(dataclasses.replace(comparison, options=DrawOptions(2, 3)), SOURCE)


@pytest.mark.slow
def test_an_exact_method_starts_each_request_from_the_state_before(config, tmp_path):
    encoder = Encoder(word_tokenizer(), config.text)

    def measured(folder, *counts):
        for count in counts:
            lab = Laboratory(tmp_path / folder, config, text_draw.draw(config, encoder, OPTIONS, count, seed=0))
            with lab.workdir("scorer", config, lab.draw.rows) as run:
                scorer = forgetting.scorer_of(run, 0, encoder)
            row = forgetting.measure_exact(lab, scorer, "exact-clusters")
        return dataclasses.replace(row, seconds=0.0, processor=0.0)

    alone = measured("alone", 2)
    assert alone.edited == 6 and alone.passes > 0
    assert alone == measured("alone", 2) == measured("both", 1, 2), "an interrupted try, and a smaller request before"
