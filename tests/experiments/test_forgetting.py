"""Comparisons of unlearning on text: who is drawn, what the rows say, what is written; no work is done twice."""

import dataclasses
import json

import numpy as np
import pytest
from commands import refused
from text_problem import WORDS, text_config, text_folder, word_tokenizer

from lmeraser_jax.data.text import Encoder
from lmeraser_jax.errors import UserError
from lmeraser_jax.experiments import forgetting, forgetting_report, text_draw
from lmeraser_jax.experiments.forgetting import Comparison, Forgetting
from lmeraser_jax.experiments.text_draw import DrawOptions

OPTIONS = DrawOptions(owners=3, records=3, forget=1)
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
    return text_draw.draw(config, Encoder(word_tokenizer(), config.text), OPTIONS, seed=0)


def test_owners_are_edited_kept_or_held_out(config, drawn):
    owners = [record.item.owner for record in drawn.records]
    assert len(owners) == 9 and len(set(owners[:3])) == 1 and len(set(owners)) == 3
    assert drawn.edited == 3 and drawn.heldout.shape == (9, 14) and (drawn.rows[:, 0] < drawn.rows[:, 1]).all()
    assert not {row.tobytes() for row in drawn.heldout} & {row.tobytes() for row in drawn.rows}
    for seed in (0, 1):
        again = text_draw.draw(config, Encoder(word_tokenizer(), config.text), OPTIONS, seed)
        assert (again.records[0].item == drawn.records[0].item) == (seed == 0)


def test_wrong_rows_differ_from_the_right_ones_in_one_half(drawn):
    for row, query, response in zip(drawn.rows, drawn.wrong["query"], drawn.wrong["response"]):
        middle, end = row[:2] + 2
        assert (row[2:middle] == response[2:middle]).all() and (row[middle:end] != response[middle:end]).any()
        assert (row[2:middle] != query[2:middle]).any() and (row[middle:end] == query[middle:end]).all()
    assert drawn.paraphrased.shape == (3, 14) and drawn.perturbed.shape == (3, 2, 14)
    np.testing.assert_array_equal(drawn.perturbed[:, 0], drawn.wrong["response"])


@pytest.mark.parametrize("changes", [{"owners": 7}, {"records": 7}, {"forget": 3}])
def test_too_few_records_are_refused(config, changes):
    with pytest.raises(UserError, match="--owners=.*owners have so many rows that fit"):
        options = dataclasses.replace(OPTIONS, **changes)
        text_draw.draw(config, Encoder(word_tokenizer(), config.text), options, seed=0)


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


def test_unknown_methods_and_edits_are_all_named(config, tmp_path, capsys):
    flags = ["--methods=newton,lmeraser", "--edits=removal,oblivion", f"--workdir={tmp_path / 'x'}"]
    flags += ["--config.data.source=text", f"--config.data.path={config.data.path}", "--config.tuning.method=lora"]
    flags += [f"--config.backbone.weights={config.backbone.weights}", "--config.data.augment=none"]
    message = refused(capsys, "compare", *flags)
    assert "--methods=lmeraser" in message and "--edits=oblivion" in message and "newton:" not in message


@pytest.mark.slow
def test_a_comparison_measures_every_method_once(config, tmp_path, monkeypatch):
    edits = ("removal", "query", "response")
    comparison = Comparison(tmp_path / "compared", config, OPTIONS, forgetting.METHODS, edits, seeds=1)
    rows, _ = forgetting.compare(comparison, SOURCE)
    by_task = {(row.edit, row.method): row for row in rows}
    assert len(by_task) == len(rows) == 12 + 2 * 6
    for edit in edits:
        retrained, before, floor = (by_task[edit, name] for name in ("retrain", "before", "floor"))
        assert retrained.kl_edited == retrained.kl_kept == 0 and min(before.kl_edited, floor.kl_edited) > 0
    removal = {name: row for (edit, name), row in by_task.items() if edit == "removal"}
    assert removal["before"].passes == 12 and removal["retrain"].share == pytest.approx(6 / 9)
    assert removal["newton"].loss_edited > removal["before"].loss_edited
    assert removal["exact-owners"].share == 0 and removal["exact-owners"].share_record == pytest.approx(2 / 9)
    assert removal["exact-clusters"].share > 0 and removal["retrain"].forget_quality == 1
    assert by_task["query", "retrain"].loss_edited == removal["before"].loss_edited, "one model"
    monkeypatch.setattr(forgetting, "_compare_seed", None)  # must not be called again
    assert forgetting.compare(comparison, SOURCE)[0] == rows
    with pytest.raises(UserError, match=r"compares with other settings[\s\S]*--owners: 3 -> 2"):
        forgetting.compare(dataclasses.replace(comparison, options=DrawOptions(2, 3, 1)), SOURCE)
