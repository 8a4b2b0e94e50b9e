"""Texts of TensorFlow Datasets: the rows of a file of JSON lines with the same texts, ids that no split changes."""

import json

import numpy as np
import pytest
from commands import call
from text_problem import RECORDS, line, text_config, text_folder, text_run, text_source
from tfds_sets import KINDS, encoded, pixels_of, write

from lmeraser_jax.config import from_dict, to_dict
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import import_settings
from lmeraser_jax.unlearning.add import add, open_source
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.erase import request_erasure

FEATURES = {name: KINDS.Text() for name in ("id", "question", "answer", "author")} | {"year": KINDS.Scalar(np.int64)}


def example(i: int) -> dict:
    """Record number i of the small language problem, as a set of questions has it."""
    values = {name: line(i)[key] for name, key in (("id", "id"), ("question", "query"), ("answer", "response"))}
    return values | {"author": line(i)["owner"], "year": 1900 + i % 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, the JSON lines, and the sets `questions` and `unnamed`, which has no ids, as TFDS writes them."""
    folder = text_folder(tmp_path_factory.mktemp("texts"))
    splits = {s: [example(i) for i in range(RECORDS) if line(i)["split"] == s] for s in ("train", "test")}
    write(folder, "questions", FEATURES, splits, supervised=None)
    unnamed = {s: [{k: v for k, v in each.items() if k != "id"} for each in rows] for s, rows in splits.items()}
    write(folder, "unnamed", {k: v for k, v in FEATURES.items() if k != "id"}, unnamed, supervised=None)
    return folder


def config_of(folder, features="question,answer,author", dataset="questions", **overrides):
    place = {"data__source": "tfds", "data__path": str(folder), "data__dataset": dataset, "text__features": features}
    return text_config(folder, **(place | overrides))


def test_rows_ids_and_owners_are_those_that_were_written(folder):
    plain, source = text_source(text_config(folder)), text_source(config_of(folder))
    known = {item.id: (item, row) for item, row in zip(plain.items, plain.read(range(RECORDS)).rows)}
    for item, row in zip(source.items, source.read(range(RECORDS)).rows, strict=True):
        split, _, name = item.id.partition("/")
        expected, own_row = known[name]
        assert item == expected._replace(id=f"{split}/{name}") and split == item.split
        np.testing.assert_array_equal(row, own_row)
    years = text_source(config_of(folder, "question,answer,year", "unnamed", data__train_split="train[7:9]"))
    assert [(item.id, item.owner) for item in years.items[:2]] == [("train/7", "1903"), ("train/8", "1904")]
    assert not any(item.owner for item in text_source(config_of(folder, "question,answer")).items)
    owned = text_source(config_of(folder, "question,answer,id")).items[0]
    assert (owned.id, owned.owner) == ("train/0", "text-00"), "what owns a record names no record"
    assert import_settings(config_of(folder))["text"]["features"] == "question,answer,author", "they bind a workdir"


def test_what_is_no_text_is_named(folder, tmp_path):
    broken = [example(0) | {"answer": " "}, example(1) | {"question": b"\xff"}, example(2)]
    kinds = FEATURES | {"topic": KINDS.ClassLabel(num_classes=3)}
    write(tmp_path, "questions", kinds, {"train": [each | {"topic": 0} for each in broken]}, supervised=None)
    unreadable = text_source(config_of(folder, data__path=str(tmp_path))).read(range(3)).unreadable
    assert set(unreadable) == {0, 1} and unreadable[1] == "the query is empty, or no text in UTF-8"
    with pytest.raises(UserError, match=r"has no text or whole number as topic, nobody; its features: answer \(Text\)"):
        text_source(config_of(folder, "question,topic,nobody", data__path=str(tmp_path)))
    for source, features in (("tfds", "question"), ("tfds", "question,question"), ("text", "question,answer")):
        tree = to_dict(config_of(folder))
        tree["data"] |= {"source": source, "store_size": 8}
        tree["text"]["features"] = features
        with pytest.raises(UserError, match="(?s)config.data.store_size=8: .*texts"):
            from_dict(tree)
        with pytest.raises(UserError, match="config.text.features=.*: must be two or three features"):
            from_dict(tree)


def test_prepare_names_the_features_of_a_set_of_texts(folder, tmp_path, capsys):
    code, shown, _ = call(capsys, "prepare", "--dataset=questions", f"--data_dir={folder}")
    assert code == 0 and "features that may hold query, response and owner: answer, author, id, question, year" in shown
    assert "--config.text.features=QUERY,RESPONSE --config.tuning.method=lora" in shown
    pictures = {"train": [example(0) | {"image": encoded(pixels_of("train", 0))}]}
    write(tmp_path, "pictures", FEATURES | {"image": KINDS.Image(shape=(8, 6, 3))}, pictures, supervised=None)
    assert "a public set" in call(capsys, "prepare", "--dataset=pictures", f"--data_dir={tmp_path}")[1]


@pytest.mark.slow
def test_a_workdir_of_them_is_built_erased_and_added_to(folder, tmp_path):
    config, more = config_of(folder), tmp_path / "more.jsonl"
    more.write_text(json.dumps(line(3) | {"id": "late", "owner": "late"}))
    with text_run(tmp_path / "run", config) as (run, imported):
        assert imported.added == RECORDS and build(run).retuned > 0
        assert request_erasure(run, owners=["person-2"]).records == 6
        assert "train/text-02" not in run.catalog.live("train").ids
        assert add(run, open_source(run, str(more)))[0].added == 1
    with text_run(tmp_path / "run", config) as (run, imported):
        assert imported is None and "late" in run.catalog.live("train").ids
