"""Queries and responses from JSON lines: rows of tokens, and what cannot be read."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from text_problem import RECORDS, line, text_config, text_folder, text_source, word_tokenizer

from lmeraser_jax.config import Text, from_dict, to_dict
from lmeraser_jax.data.text import Encoder, read_lines
from lmeraser_jax.data.text_rows import pack, unpack
from lmeraser_jax.errors import UserError

KEYS = "id,owner,query,response,split"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text"))


def refusal(path, keys=KEYS):
    with pytest.raises(UserError) as caught:
        read_lines(path, keys)
    return str(caught.value)


def written(path, *lines):
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines))
    return path


def test_a_row_holds_the_query_and_then_the_response_and_the_end_token(folder):
    source, tokenizer = text_source(text_config(folder)), word_tokenizer()
    assert [(item.id, item.split, item.label, item.owner) for item in source.items] == [
        (each["id"], each["split"], -1, each["owner"]) for each in map(line, range(RECORDS))
    ]
    rows = source.read([3, 7]).rows
    assert rows.dtype == np.int32 and source.shape == rows.shape[1:] == (14,)
    for row, i in zip(rows, (3, 7), strict=True):
        query, response = unpack(row)
        assert tokenizer.convert_ids_to_tokens(query) == ["<s>", *line(i)["query"].split(), ":"]
        assert tokenizer.convert_ids_to_tokens(response) == [*line(i)["response"].split(), "</s>"]
        assert not row[2 + len(query) + len(response) :].any()
    np.testing.assert_array_equal(pack(*unpack(rows[0]), 12), rows[0])


def test_gzip_a_byte_order_mark_numbers_as_names_and_four_keys(tmp_path):
    path = tmp_path / "lines.jsonl.gz"
    text = '﻿{"n": 7, "who": 3, "q": "w1", "r": "w2", "split": "retain"}\n\n'
    path.write_bytes(gzip.compress(text.encode()))
    (item,), pairs = read_lines(path, "n,who,q,r")
    assert item == ("7", "train", -1, "3") and pairs == [("w1", "w2")]


def test_every_line_that_cannot_be_used_is_named(tmp_path):
    good = line(0)
    message = refusal(
        written(
            tmp_path / "lines.jsonl",
            good,
            "{not json",
            "[1]",
            {**good, "query": " "},
            {key: value for key, value in good.items() if key != "response"},
            {**good, "owner": ["x"]},
            {**good, "split": "public"},
            {**good, "id": None},
            {**good, "response": "\ud800"},
            {**good, "owner": None},
        )
    )
    for expected in (
        "line 2 is no JSON: Expecting property name enclosed in double quotes in column 2",
        "line 3: is a list, not an object",
        "line 4: query is ' '; must be text, and not empty",
        "line 5: response is ''; must be text",
        "line 6: owner is ['x']",
        "line 7: split is public; must be one of train, holdout, test",
        "line 8: id is None",
        "line 9: 'utf-8' codec can't encode",
    ):
        assert expected in message
    assert "line 1:" not in message and "line 10" not in message and f"--config.text.names={KEYS}" in message
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"{}" * 99)[:20])
    assert "cannot be read" in refusal(tmp_path / "cut.gz") and "cannot be read" in refusal(tmp_path / "none")


@pytest.mark.parametrize("long", ["refuse", "cut"])
def test_longer_rows_are_refused_or_lose_the_end_of_the_response(folder, long):
    config = text_config(folder, text__context=8, text__long=long)
    contents, whole = text_source(config).read(range(RECORDS)), text_source(text_config(folder)).read(range(RECORDS))
    lengths = whole.rows[:, 1]
    too_long = np.flatnonzero(lengths > 8)
    assert 0 < len(too_long) < RECORDS
    if long == "refuse":
        assert set(contents.unreadable) == set(too_long.tolist()) and contents.converted == 0
        assert "it has 9 tokens, the context 8" in contents.unreadable[too_long[0]] or lengths[too_long[0]] != 9
    else:
        assert contents.unreadable == {} and contents.converted == len(too_long)
        np.testing.assert_array_equal(contents.rows[:, 2:], whole.rows[:, 2:10])
        np.testing.assert_array_equal(contents.rows[:, 1], np.minimum(lengths, 8))
    assert len(text_source(text_config(folder, text__context=4, text__long=long)).read([0]).unreadable) == 1


def test_templates_are_literal_and_chat_uses_the_tokenizer_s(folder):
    tokenizer = word_tokenizer()
    encoder = Encoder(tokenizer, Text(query="w5 {query} {x}", response="w6 {response}"))
    assert tokenizer.convert_ids_to_tokens(encoder.query("w1"))[:3] == ["<s>", "w5", "w1"]
    assert tokenizer.convert_ids_to_tokens(encoder.response("w1", "w2")) == ["w6", "w2", "</s>"]
    with pytest.raises(UserError, match="no chat template"):
        Encoder(tokenizer, Text(chat=True))
    tokenizer.chat_template = (
        "{% for m in messages %}w9 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
    )
    chat = Encoder(tokenizer, Text(chat=True))
    assert tokenizer.convert_ids_to_tokens(chat.query("w1"))[-3:] == ["w9", "w1", "w8"]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        Encoder(tokenizer, Text())


def test_settings_that_text_does_not_go_with_are_refused_together(folder):
    tree = to_dict(text_config(folder))
    tree["tuning"] |= {"method": "head", "lora_l2": 0.0}
    tree["common"]["method"], tree["inference"]["nearest"], tree["text"]["query"] = "ridge", 2, "no place"
    with pytest.raises(UserError) as caught:
        from_dict(tree)
    for flag in ("tuning.method", "common.method", "inference.nearest", "text.query"):
        assert f"--config.{flag}=" in str(caught.value)
    images = to_dict(dataclasses.replace(text_config(folder), data=type(text_config(folder).data)()))
    with pytest.raises(UserError, match=r"text.query='\{query\} :': must be left as it is"):
        from_dict(images)
