"""Test records that are questions with answers to choose from, and how well a model chooses.

The data decide which: lines with `candidates`, as MovieLens has them, give a hit ratio; responses that are yes or no,
as TALLRec has them, an AUC. Other records are no such questions.

Shapes: N questions, C answers to choose from, T tokens of a row.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lmeraser_jax.config import Config
from lmeraser_jax.data.queries import CANDIDATES
from lmeraser_jax.data.source import limit_positions
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.data.text_rows import tokens_of
from lmeraser_jax.errors import UserError, raise_all, shorten
from lmeraser_jax.evaluation import forgetting as metrics
from lmeraser_jax.experiments.text_draw import read


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Questions that a model answers by the likelihood of each answer."""

    rows: np.ndarray  # int32 [N, C, 2 + T]
    right: np.ndarray  # int [N], positions of the right answers
    yes_no: bool  # whether the answers are yes and no, in this order

    def measured(self, losses_of: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        """Fields of a row of a comparison; `losses_of` gives the mean losses [n] of rows [n, 2 + T].

        An answer's score is its log-likelihood, the sum over its tokens and the end token.
        """
        flat = self.rows.reshape(-1, self.rows.shape[-1])
        _, query, count = tokens_of(flat)
        losses = (losses_of(flat) * (count - query)).reshape(self.rows.shape[:2])
        if self.yes_no:
            name, estimate = "answer_auc", metrics.answer_auc(losses[:, 0], losses[:, 1], self.right == 0)
        else:
            name, estimate = "hit_ratio", metrics.hit_ratio(losses, self.right)
        return {
            name: estimate.value,
            "answer_low": estimate.low,
            "answer_high": estimate.high,
            "questions": len(losses),
        }


def questions(config: Config, encoder: Encoder) -> Questions | None:
    """The questions among the test records of `data.path`, at most `data.test_limit`; None where there are none.

    A question whose answers do not all fit into the context is left out, and counted on standard error. Raises
    `UserError` where none is left, or where candidates cannot be used.
    """
    items, pairs, lines = read(config)
    kept = limit_positions(items, 0, config.data.test_limit)
    places = [place for place in kept if items[place].split == "test"]
    words = {response.strip().rstrip(".").casefold(): response for _, response in (pairs[place] for place in places)}
    yes_no = False
    if any(CANDIDATES in lines[place] for place in places):
        _check({items[place].id: (lines[place], pairs[place][1]) for place in places})
        choices = [lines[place][CANDIDATES] for place in places]
    elif yes_no := words.keys() == {"yes", "no"}:
        choices = [[words["yes"], words["no"]]] * len(places)
    else:
        return None
    rows, right = [], []
    for place, answers in zip(places, choices, strict=True):
        query, response = pairs[place]
        encoded = [encoder.row(query, answer) for answer in answers]
        if not any(reason for _, reason in encoded):
            rows.append(np.stack([row for row, _ in encoded if row is not None]))
            right.append(answers.index(response))
    context = f"--config.text.context={config.text.context}"
    if len(rows) < len(places):
        print(f"{len(rows)} of {len(places)} test records fit {context} with all answers", file=sys.stderr)
    if not rows or yes_no and len(set(right)) < 2:
        raise UserError(
            f"{config.data.path}: too few test records fit {context}; a larger one, or --config.data.test_limit=0, may"
        )
    return Questions(np.stack(rows), np.array(right), yes_no)


def _check(records: Mapping[str, tuple[Mapping[str, Any], str]]) -> None:
    """Refuses candidates, {id: (line, response)}, that are no texts, lack the response or differ in number."""
    size, problems = 0, []
    for name, (line, response) in records.items():
        candidates: Sequence[Any] = line.get(CANDIDATES, [])
        usable = isinstance(candidates, list) and all(isinstance(each, str) and each for each in candidates)
        usable = usable and candidates.count(response) == 1
        size = size or len(candidates) * usable
        if not usable or len(candidates) != size:
            problems.append(f"{name}: {shorten(repr(candidates))}")
    rule = f"{CANDIDATES} of a test record must be a list of as many texts as of the others, and hold its response once"
    raise_all(problems, f"{rule}; these are not:")
