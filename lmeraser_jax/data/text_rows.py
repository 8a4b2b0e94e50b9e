"""Rows of text as they are stored: a query and its response, in tokens.

A row is int32 [2 + T]: how many tokens the query has, how many both have, the tokens, zeros. Shapes: T tokens at most.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

HEADER = 2  # numbers before the tokens


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """How stored rows become input."""

    context: int  # T
    augment: str = "none"  # as of `ImageSpec`; text has no other


def pack(query: Sequence[int], response: Sequence[int], context: int) -> np.ndarray:
    """The row of a query and its response, which together have at most `context` tokens: int32 [2 + T]."""
    row, tokens = np.zeros(HEADER + context, np.int32), [*query, *response]
    assert len(tokens) <= context, (len(tokens), context)
    row[:HEADER] = len(query), len(tokens)
    row[HEADER : HEADER + len(tokens)] = tokens
    return row


def tokens_of(rows: Any) -> tuple[Any, Any, Any]:
    """Rows [..., 2 + T], NumPy or JAX -> tokens [..., T], tokens of the query [...], tokens in all [...]."""
    return rows[..., HEADER:], rows[..., 0], rows[..., 1]


def unpack(row: np.ndarray) -> tuple[list[int], list[int]]:
    """The tokens of a row's query, and of its response."""
    tokens, query, count = tokens_of(row)
    return tokens[:query].tolist(), tokens[query:count].tolist()
