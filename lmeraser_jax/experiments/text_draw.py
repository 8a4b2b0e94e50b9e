"""The records of a comparison of unlearning on text: whose are tuned on, edited or held out.

Rows are int32 [n, 2 + T] (`data.text_rows`). S records are edited, J are a record's wrong answers.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.config import Config
from lmeraser_jax.data.source import Item
from lmeraser_jax.data.text import Encoder, lines_of, read_lines
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import philox

EDITS = ("removal", "query", "response")
PARAPHRASE, PERTURBED = "paraphrased_answer", "perturbed_answer"  # keys of a line, where TOFU has these


@dataclasses.dataclass(frozen=True)
class DrawOptions:
    """How many records are drawn."""

    owners: int = 12  # whose records are tuned on; a record without an owner is its own
    records: int = 4  # of each of them


class Record(NamedTuple):
    """A record with its row, and the whole line that it comes from."""

    item: Item
    query: str
    response: str
    row: np.ndarray
    line: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """Records, those to edit first."""

    records: tuple[Record, ...]
    edited: int  # S
    heldout: np.ndarray  # rows of other owners; every other one calibrates, the rest evaluate
    wrong: Mapping[str, np.ndarray]  # {query or response: rows [S, 2 + T] that were tuned on by mistake}
    paraphrased: np.ndarray  # rows [S, 2 + T] of the right answer in other words; [0, 2 + T] where a line has none
    perturbed: np.ndarray  # rows [S, J, 2 + T] of wrong answers; [0, 0, 2 + T] where a line has none

    @property
    def rows(self) -> np.ndarray:
        return np.stack([record.row for record in self.records])


def read(config: Config) -> tuple[list[Item], list[tuple[str, str]], list[dict[str, Any]]]:
    """The items of `data.path`, their queries and responses, and the lines that they come from."""
    if config.data.source != "text":
        raise UserError(f"--config.data.source={config.data.source}: texts are compared from JSON lines, source=text")
    path = Path(config.data.path)
    lines = [json.loads(line) for line in lines_of(path) if line.strip()]
    return *read_lines(path, config.text.names), lines


def draw(config: Config, encoder: Encoder, options: DrawOptions, forget: int, seed: int) -> Draw:
    """Draws owners whose rows fit into the context, or are cut: tuned on, and at most as many others, held out.

    The records of the first `forget` owners are edited, so all draws of a seed have the same records. A wrong query is
    another record's; a wrong response is the first perturbed answer, or another record's. Raises `UserError` where too
    few owners have enough rows that fit.
    """
    rng, (items, pairs, lines) = philox(seed, "draw"), read(config)
    by_owner: dict[tuple[str, str], list[int]] = {}
    for place, item in enumerate(items):
        if item.split == "train":
            by_owner.setdefault((item.owner, "" if item.owner else item.id), []).append(place)
    groups: list[list[Record]] = []
    for index in rng.permutation(len(by_owner)):
        group = [(place, encoder.row(*pairs[place])) for place in list(by_owner.values())[index]]
        fitting = [
            Record(items[i], pairs[i][0], pairs[i][1], row, lines[i]) for i, (row, _) in group if row is not None
        ]
        if len(fitting) >= options.records:
            groups.append(fitting[: options.records])
        if len(groups) == 2 * options.owners:
            break
    if not 0 < forget < options.owners <= len(groups) - 2:
        raise UserError(
            f"--owners={options.owners} --owner_records={options.records} --forget={forget}: {len(groups)}"
            f" owners have so many rows that fit --config.text.context={config.text.context}; at least two must be left"
            " to hold out, and at least one is forgotten and one kept"
        )
    records = tuple(record for group in groups[: options.owners] for record in group)
    heldout = np.stack([record.row for group in groups[options.owners :] for record in group])
    edited = forget * options.records
    others = records[edited:]
    chosen = [others[i] for i in rng.integers(len(others), size=edited)]
    cutting = Encoder(encoder.tokenizer, dataclasses.replace(encoder.text, long="cut"))
    width = records[0].row.shape[0]

    def rows(pairs: list[tuple[str, str]]) -> np.ndarray:
        encoded = [cutting.row(*pair)[0] for pair in pairs]
        assert all(row is not None for row in encoded), "the queries fit, and responses are cut"
        return np.array(encoded, np.int32).reshape(-1, width)

    targets = records[:edited]
    wrong = {
        "query": rows([(other.query, record.response) for record, other in zip(targets, chosen)]),
        "response": rows(
            [(r.query, next(iter(r.line.get(PERTURBED, ())), other.response)) for r, other in zip(targets, chosen)]
        ),
    }
    paraphrased = rows([(r.query, r.line[PARAPHRASE]) for r in targets if PARAPHRASE in r.line])
    perturbed = rows([(r.query, answer) for r in targets for answer in r.line.get(PERTURBED, ())])
    answers = len(perturbed) // max(len(paraphrased), 1)
    return Draw(records, edited, heldout, wrong, paraphrased, perturbed.reshape(len(paraphrased), answers, width))
