"""Sequences of erasure requests: who asks, and in which order. Each batch is served before the next one comes.

Every kind but `adaptive` is decided before the first request. The adaptive one looks at the model that was published
after the batch before, which breaks the guarantees of methods that are exact in distribution only.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning.run import Run

BATCH = 5  # records of a batch, where the kind of sequence does not decide that
PARETO_EXPONENT = 1.16  # a fifth of the owners asks for four fifths of the records


def uniform(run: Run, count: int) -> Iterator[list[str]]:
    """Records drawn uniformly."""
    ids = run.catalog.live("train").ids
    order = philox(run.config.seed, "sequence", "uniform").permutation(len(ids))[: count * BATCH]
    yield from _split([ids[i] for i in order], count)


def burst(run: Run, count: int) -> Iterator[list[str]]:
    """Records of the largest cluster."""
    records = run.catalog.live("train")
    largest = min(Counter(records.clusters).items(), key=lambda pair: (-pair[1], pair[0]))[0]
    ids = [name for name, key in zip(records.ids, records.clusters, strict=True) if key == largest]
    order = philox(run.config.seed, "sequence", "burst").permutation(len(ids))[: min(count * BATCH, len(ids) - 1)]
    yield from _split([ids[i] for i in order], count)


def pareto(run: Run, count: int) -> Iterator[list[str]]:
    """Records of one owner at a time, the owner of a record that is drawn uniformly.

    The owners are invented: each has neighbours in a cluster, and the numbers of their records are Pareto distributed.
    """
    records = run.catalog.live("train")
    random = philox(run.config.seed, "sequence", "pareto")
    owner_of = dict(zip(records.ids, pareto_owners(records.clusters, random), strict=True))
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


def pareto_owners(clusters: Sequence[str], random: np.random.Generator) -> list[str]:
    """Invents the owners of N records, whose clusters are given: each owns a run of records in cluster order."""
    order = np.lexsort((random.permutation(len(clusters)), np.array(clusters, np.str_)))
    ends = np.cumsum(np.ceil(random.pareto(PARETO_EXPONENT, len(order)) + 1))
    owners = np.empty(len(order), np.int64)
    owners[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return [f"owner {number}" for number in owners.tolist()]


def by_class(run: Run, count: int) -> Iterator[list[str]]:
    """A whole class at a time; one class remains."""
    records = run.catalog.live("train")
    classes = np.unique(records.labels)
    for label in philox(run.config.seed, "sequence", "class").permutation(classes)[: min(count, len(classes) - 1)]:
        yield [records.ids[i] for i in np.flatnonzero(records.labels == label)]


def half(run: Run, count: int) -> Iterator[list[str]]:
    """Half of all records, in batches of one size."""
    ids = run.catalog.live("train").ids
    order = philox(run.config.seed, "sequence", "half").permutation(len(ids))[: len(ids) // 2]
    yield from _split([ids[i] for i in order], count)


def adaptive(run: Run, count: int) -> Iterator[list[str]]:
    """The records that the published model is surest of, as if those whom it recognises best ask to be forgotten."""
    for _ in range(count):
        records = run.catalog.live("train")
        if len(records) <= BATCH:
            return
        yield [records.ids[i] for i in np.argsort(-_certainty(run, records), kind="stable")[:BATCH]]


KINDS: dict[str, Callable[[Run, int], Iterator[list[str]]]] = {
    "uniform": uniform,
    "burst": burst,
    "pareto": pareto,
    "class": by_class,
    "half": half,
    "adaptive": adaptive,
}


def _certainty(run: Run, records: RecordTable) -> np.ndarray:
    """Probability that the published state gives to each record's own label: float32 [N]."""
    predictions = predict(load_model(run), run.images[records.rows])
    return predictions.probabilities[np.arange(len(records)), records.labels]


def _split(ids: list[str], count: int) -> Iterator[list[str]]:
    """At most `count` batches of nearly one size."""
    for batch in np.array_split(np.array(ids, np.str_), count):
        if len(batch):
            yield [str(name) for name in batch]
