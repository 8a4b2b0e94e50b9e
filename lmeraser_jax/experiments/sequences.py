"""Sequences of erasure requests: who asks, and in which order. Each batch is served before the next one comes.

Only `adaptive` looks at the model that was published after the batch before, which breaks the guarantees of methods
that are exact in distribution only.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmeraser_jax.hashing import philox

if TYPE_CHECKING:  # it loads JAX, which refusing a kind does without
    from lmeraser_jax.unlearning.run import Run

BATCH = 5  # records of a batch, where the kind of sequence does not decide that
PARETO_EXPONENT = 1.16  # a fifth of the owners asks for four fifths of the records


def uniform(run: "Run", count: int) -> Iterator[list[str]]:
    """Records drawn uniformly."""
    return _shuffled(run, "uniform", run.catalog.live("train").ids, count * BATCH, count)


def burst(run: "Run", count: int) -> Iterator[list[str]]:
    """Records of the largest cluster."""
    records = run.catalog.live("train")
    largest = min(Counter(records.clusters).items(), key=lambda pair: (-pair[1], pair[0]))[0]
    ids = [name for name, key in zip(records.ids, records.clusters, strict=True) if key == largest]
    return _shuffled(run, "burst", ids, min(count * BATCH, len(ids) - 1), count)


def pareto(run: "Run", count: int) -> Iterator[list[str]]:
    """Records of one owner at a time, the owner of a record that is drawn uniformly.

    The owners are invented: each has neighbours in a cluster, and the numbers of their records are Pareto distributed.
    """
    records = run.catalog.live("train")
    random = philox(run.config.seed, "sequence", "pareto")
    order = np.lexsort((random.permutation(len(records)), np.array(records.clusters, np.str_)))
    ends = np.cumsum(np.ceil(random.pareto(PARETO_EXPONENT, len(order)) + 1))  # each owns a run of records
    owners = np.searchsorted(ends, np.arange(len(order)), side="right").tolist()
    owner_of = {records.ids[i]: owner for i, owner in zip(order, owners, strict=True)}
    for _ in range(count):
        if len(owner_of) <= BATCH:
            return
        names = sorted(owner_of)
        owner = owner_of[names[random.integers(len(names))]]
        own = [name for name in names if owner_of[name] == owner]
        batch = [own[i] for i in random.permutation(len(own))[:BATCH]]
        for name in batch:
            del owner_of[name]
        yield batch


def by_class(run: "Run", count: int) -> Iterator[list[str]]:
    """A whole class at a time; one class remains."""
    records = run.catalog.live("train")
    classes = np.unique(records.labels)
    for label in philox(run.config.seed, "sequence", "class").permutation(classes)[: min(count, len(classes) - 1)]:
        yield [records.ids[i] for i in np.flatnonzero(records.labels == label)]


def half(run: "Run", count: int) -> Iterator[list[str]]:
    """Half of all records, in batches of one size."""
    ids = run.catalog.live("train").ids
    return _shuffled(run, "half", ids, len(ids) // 2, count)


def adaptive(run: "Run", count: int) -> Iterator[list[str]]:
    """The records that the published model is surest of, as if those whom it recognises best ask to be forgotten."""
    from lmeraser_jax.evaluation.predict import load_model, predict

    for _ in range(count):
        records = run.catalog.live("train")
        if len(records) <= BATCH:
            return
        predictions = predict(load_model(run), run.images[records.rows])
        certainty = predictions.probabilities[np.arange(len(records)), records.labels]
        yield [records.ids[i] for i in np.argsort(-certainty, kind="stable")[:BATCH]]


KINDS: dict[str, Callable[["Run", int], Iterator[list[str]]]] = {
    "uniform": uniform,
    "burst": burst,
    "pareto": pareto,
    "class": by_class,
    "half": half,
    "adaptive": adaptive,
}


def _shuffled(run: "Run", kind: str, ids: Sequence[str], most: int, count: int) -> Iterator[list[str]]:
    """At most so many of the records, drawn uniformly, in at most `count` batches of nearly one size."""
    order = philox(run.config.seed, "sequence", kind).permutation(len(ids))[:most]
    for batch in np.array_split(order, count):
        if len(batch):
            yield [ids[int(i)] for i in batch]
