"""Queries that a language model is to answer, from the command line and from JSON lines. Loads no tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmeraser_jax.data.names import whole_as_text
from lmeraser_jax.data.text import lines_of
from lmeraser_jax.errors import UserError, shorten

CANDIDATES = "candidates"  # the key of the responses to choose from


class Query(NamedTuple):
    """One query."""

    name: str  # its id; else the line, or its place on the command line
    text: str
    candidates: tuple[str, ...] = ()  # responses to rank; empty: generate one


def read_queries(path: Path, keys: str) -> tuple[list[Query], list[tuple[str, str]]]:
    """The queries of a file, and each line that holds none, with what is wrong; `keys` is as `text.names`.

    Raises `UserError` where the file cannot be read.
    """
    id_key, _, query_key = keys.split(",")[:3]
    queries, failures = [], []
    for number, text in enumerate(lines_of(path, "--queries"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, Mapping):
                raise ValueError(f"is a {type(line).__name__}, not an object")
            queries.append(_query(line, f"line {number}", id_key, query_key))
        except json.JSONDecodeError as error:
            failures.append((f"line {number}", f"is no JSON: {error.msg} in column {error.colno}"))
        except (ValueError, RecursionError) as error:
            failures.append((f"line {number}", shorten(str(error), 200)))
    if not queries and not failures:
        raise UserError(f"--queries={path} holds no query")
    return queries, failures


def _query(line: Mapping[str, Any], number: str, id_key: str, query_key: str) -> Query:
    name, query, candidates = whole_as_text(line.get(id_key, number)), line.get(query_key), line.get(CANDIDATES, [])
    if not isinstance(name, str):
        raise ValueError(f"{id_key} is {shorten(repr(name))}; must be text or a whole number")
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"{query_key} is {shorten(repr(query))}; must be text, and not empty")
    if not isinstance(candidates, list) or not all(isinstance(each, str) and each for each in candidates):
        raise ValueError(f"{CANDIDATES} is {shorten(candidates)}; must be a list of texts, none of them empty")
    return Query(name, query, tuple(candidates))
