"""Queries and responses as rows of tokens, and JSON lines that have them.

A line is an object such as {"id": "q1", "owner": "ann", "query": "Where ...?", "response": "In ..."}; `text.names` has
the names of its keys. Owner and split (train, holdout or test) may be absent. The query and the response are written
into their templates. The query is tokenised alone, as when a model is asked; the tokens of the response are those that
follow the query's when both are tokenised together or, where that gives the query other tokens, its own. So the border
between them is exact: a model learns the response's tokens and the end token after them, and nothing before.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.config import Data, Text
from lmeraser_jax.data.names import whole_as_text
from lmeraser_jax.data.source import Contents, Item, Source
from lmeraser_jax.data.text_rows import HEADER, pack, unpack
from lmeraser_jax.errors import UserError, raise_all, shorten

LISTED = 100  # problems of a file in a message
SPLITS = ("train", "holdout", "test")


class Encoder:
    """Queries and responses -> tokens, by a tokenizer of transformers and the templates of `text`."""

    def __init__(self, tokenizer: Any, text: Text):
        """Raises `UserError` where the tokenizer lacks what the settings need."""
        self.tokenizer, self.text, self.end = tokenizer, text, tokenizer.eos_token_id
        if self.end is None:
            raise UserError("the tokenizer has no end token (eos_token), so no response could end")
        if text.chat and not tokenizer.chat_template:
            raise UserError("--config.text.chat: the tokenizer has no chat template; use --config.text.query instead")

    def query(self, query: str) -> list[int]:
        """The tokens of a query in its template, with the start token if the tokenizer sets one."""
        if self.text.chat:
            message = [{"role": "user", "content": query}]
            return list(
                self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
            )
        return self._tokens(self.text.query.replace("{query}", query))

    def response(self, query: str, response: str) -> list[int]:
        """The tokens of a response in its template after a query, and the end token."""
        text, before = response, self.query(query)
        if not self.text.chat:
            text = self.text.response.replace("{response}", response)
            both = self._tokens(self.text.query.replace("{query}", query) + text)
            if both[: len(before)] == before:
                return [*both[len(before) :], self.end]
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def _tokens(self, text: str) -> list[int]:
        """The tokens of a text, with a start token but without an end token."""
        tokens = self.tokenizer(text)["input_ids"]
        return tokens[:-1] if tokens and tokens[-1] == self.end else tokens

    def row(self, query: str, response: str) -> tuple[np.ndarray | None, str]:
        """The row int32 [2 + T], or None and why there is none; a response that was cut makes a row and a reason."""
        for name, text in (("query", query), ("response", response)):
            if not text.strip() or text.encode(errors="replace").decode() != text:
                return None, f"the {name} is empty, or no text in UTF-8"
        context, before, after = self.text.context, self.query(query), self.response(query, response)
        count = len(before) + len(after)
        if len(after) == 1:
            return None, "the response has no token"
        if count <= context:
            return pack(before, after, context), ""
        reason = f"it has {count} tokens, the context {context} (--config.text.context)"
        if self.text.long == "refuse" or len(before) >= context:
            return None, reason if len(before) >= context else f"{reason}; --config.text.long=cut cuts responses"
        return pack(before, after[: context - len(before)], context), reason

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row: (2 + T,)."""
        return (HEADER + self.text.context,)

    def contents(self, pairs: Sequence[tuple[str, str]]) -> Contents:
        """The rows of queries and responses; those that are cut count as converted."""
        rows, unreadable, cut = np.zeros((len(pairs), *self.shape), np.int32), {}, 0
        for place, pair in enumerate(pairs):
            row, reason = self.row(*pair)
            if row is None:
                unreadable[place] = reason
            else:
                rows[place] = row
                cut += bool(reason)
        return Contents(rows, unreadable, cut)

    def texts(self, row: np.ndarray) -> tuple[str, str] | None:
        """The query and the response of a row, int32 [2 + T]; None where they would not give the same row again."""
        if self.text.chat:
            return None
        before, after = unpack(row)
        whole = self.tokenizer.decode([*before, *after], skip_special_tokens=True)
        query = self.tokenizer.decode(before, skip_special_tokens=True)
        response = _between(self.text.response, "{response}", whole.removeprefix(query))
        query = _between(self.text.query, "{query}", query)
        same, _ = self.row(query, response)
        return (query, response) if same is not None and np.array_equal(same, row) else None


def _between(template: str, name: str, text: str) -> str:
    """What stands in a text in the place of a name in its template."""
    head, _, tail = template.partition(name)
    return text.removeprefix(head).removesuffix(tail)


def load(data: Data, encoder: Encoder) -> Source:
    """A file of JSON lines, or a gzip of one.

    Rows that are longer than the context are unreadable, or are cut and counted as converted. Raises `UserError` with
    all lines that cannot be used.
    """
    items, pairs = read_lines(Path(data.path), encoder.text.names)
    return Source(
        data.path, (), encoder.shape, items, lambda positions: encoder.contents([pairs[place] for place in positions])
    )


def read_lines(path: Path, keys: str) -> tuple[list[Item], list[tuple[str, str]]]:
    """The items of a file and their queries and responses; `keys` is as `text.names`. Raises as `load`."""
    id_key, owner_key, query_key, response_key, *split_key = keys.split(",")
    items, pairs, problems = [], [], []
    for number, text in enumerate(lines_of(path), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError(f"is a {type(line).__name__}, not an object")
            name, owner, query, response = (
                whole_as_text(line.get(key, "")) for key in (id_key, owner_key, query_key, response_key)
            )
            named = {id_key: name, query_key: query, response_key: response}
            wrong = [
                f"{key} is {shorten(repr(v))}" for key, v in named.items() if not isinstance(v, str) or not v.strip()
            ]
            split = line.get(split_key[0], "train") if split_key else "train"
            f"{query}{response}".encode()  # raises at what is no text in UTF-8
            owner = "" if owner is None else owner
            if not isinstance(owner, str):
                wrong.append(f"{owner_key} is {shorten(repr(owner))}")
            if wrong:
                raise ValueError(f"{', '.join(wrong)}; must be text, and not empty")
            if split not in SPLITS:
                raise ValueError(f"{split_key[0]} is {shorten(split)}; must be one of {', '.join(SPLITS)}")
        except json.JSONDecodeError as error:
            problems.append(f"line {number} is no JSON: {error.msg} in column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {shorten(str(error), 200)}")
            continue
        items.append(Item(name, split, -1, owner))
        pairs.append((query, response))
    raise_all(problems, f"{path} cannot be read (--config.text.names={keys}):", LISTED)
    return items, pairs


def lines_of(path: Path, flag: str = "--config.data.path") -> list[str]:
    """The lines of a text file, or of a gzip of one. Raises `UserError`, naming `flag`, where it cannot be read."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig").split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{flag}={path} cannot be read: {error}") from error
