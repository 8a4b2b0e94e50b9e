"""Answers to queries in words: a generated response, or the likeliest of the candidates of a query."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lmeraser_jax.data.queries import CANDIDATES, Query
from lmeraser_jax.data.text_rows import pack
from lmeraser_jax.evaluation.language import Respond, Sampling, Scores, Texts, longest_query, score
from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.unlearning.run import Run

Ask = Callable[[np.ndarray, Callable[..., Any]], Any]  # as `Predictor.answer`


def answer(
    run: Run, queries: Sequence[Query], sampling: Sampling, ask: Ask | None = None
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Of each query its name, text, answer and cluster, and its candidates if it has some; or its name and why none.

    `ask` is by default that of a predictor of the run. Raises `UserError` as `load_model` does, and where the model has
    no room for so many new tokens of a response that is generated.
    """
    encoder, context, generated, ranked, failures = run.encoder, run.config.text.context, {}, {}, []
    longest = context if all(query.candidates for query in queries) else longest_query(run, sampling.new)
    for query in queries:
        before, after = encoder.query(query.text), [encoder.response(query.text, each) for each in query.candidates]
        limit, longer = (context if after else longest), len(before) + max(map(len, after), default=0)
        if longer > limit:
            failures.append((query.name, f"it has {longer} tokens; at most {limit} are possible"))
        elif after:
            ranked[query] = [pack(before, response, context) for response in after]
        else:
            generated[query] = pack(before, [], context)
    ask = ask or Predictor(run).answer
    answers = _respond(run, ask, generated, sampling) | _choose(ask, ranked)
    shown = [query for query in queries if query in answers]
    return [{"id": query.name, "query": query.text, **answers[query]} for query in shown], failures


def _respond(run: Run, ask: Ask, rows: Mapping[Query, np.ndarray], sampling: Sampling) -> dict[Query, dict[str, Any]]:
    """A generated response to each query, which has a row int32 [2 + T]."""
    if not rows:
        return {}
    texts = ask(np.stack(list(rows.values())), Respond(sampling))
    decoded = run.encoder.tokenizer.batch_decode(texts.tokens, skip_special_tokens=True)
    return {
        query: {"answer": text.strip(), **_source(texts, place)}
        for place, (query, text) in enumerate(zip(rows, decoded, strict=True))
    }


def _source(answers: Scores | Texts, place: int) -> dict[str, Any]:
    """The cluster that gave the answer at a place, and whether its slice is approximate."""
    key = answers.keys[answers.clusters[place, 0]]
    return {"cluster": key, "approximate": key in answers.approximate}


def _choose(ask: Ask, rows: Mapping[Query, list[np.ndarray]]) -> dict[Query, dict[str, Any]]:
    """The likeliest candidate of each query, which has a row int32 [2 + T] for each of them."""
    if not rows:
        return {}
    scores, answers, start = ask(np.stack([row for each in rows.values() for row in each]), score), {}, 0
    for query in rows:
        own = scores.log_likelihoods[start : start + len(query.candidates)]
        listed = [
            {"answer": text, "log_likelihood": round(float(value), 6)} for text, value in zip(query.candidates, own)
        ]
        best = query.candidates[int(own.argmax())]
        answers[query] = {"answer": best, **_source(scores, start), CANDIDATES: listed}
        start += len(own)
    return answers
