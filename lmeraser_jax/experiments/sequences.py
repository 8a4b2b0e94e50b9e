"""Sequences of erasure requests: who asks, in which order. One batch after the other; each is served before the next.

Every kind but the last is decided before the first request. The adaptive one looks at the model that was published
after the batch before, which breaks the guarantees of methods that are exact in distribution only.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning.run import Run

SIZE = 5  # records of a batch where a kind does not say
PARETO = 1.16  # exponent at which a fifth asks for four fifths


def uniform(run: Run, count: int) -> Iterator[list[str]]:
    """Any records."""
    ids = run.catalog.live("train").ids
    order = philox(run.config.seed, "sequence", "uniform").permutation(len(ids))[: count * SIZE]
    yield from _batches([ids[i] for i in order], count)


def burst(run: Run, count: int) -> Iterator[list[str]]:
    """Records of one cluster only, the largest."""
    records = run.catalog.live("train")
    largest = min(Counter(records.clusters).items(), key=lambda pair: (-pair[1], pair[0]))[0]
    ids = [name for name, key in zip(records.ids, records.clusters, strict=True) if key == largest]
    order = philox(run.config.seed, "sequence", "burst").permutation(len(ids))[: min(count * SIZE, len(ids) - 1)]
    yield from _batches([ids[i] for i in order], count)


def pareto(run: Run, count: int) -> Iterator[list[str]]:
    """Some records of one owner at a time, of whoever owns a record drawn uniformly: few own, and ask for, most.

    The owners are made up, whoever owns the records: theirs look alike, neighbours in a cluster, in numbers that are
    Pareto distributed.
    """
    records = run.catalog.live("train")
    random = philox(run.config.seed, "sequence", "pareto")
    left = dict(zip(records.ids, _made_up(records.clusters, random), strict=True))
    for _ in range(count):
        if len(left) <= SIZE:
            return
        names = sorted(left)
        asking = left[names[random.integers(len(names))]]
        own = [name for name in names if left[name] == asking]
        batch = [own[i] for i in random.permutation(len(own))[:SIZE]]
        for name in batch:
            del left[name]
        yield batch


def _made_up(clusters: Sequence[str], random: np.random.Generator) -> list[str]:
    """Owners of N records: each has a run of them in the order of their clusters."""
    order = np.lexsort((random.permutation(len(clusters)), np.array(clusters, np.str_)))
    sizes = np.ceil(random.pareto(PARETO, len(order)) + 1)
    ends = np.cumsum(sizes)  # as many owners as needed
    of_place = np.searchsorted(ends, np.arange(len(order)), side="right")
    found = np.empty(len(order), np.int64)
    found[order] = of_place
    return [f"owner {number}" for number in found.tolist()]


def by_class(run: Run, count: int) -> Iterator[list[str]]:
    """A whole class at a time; the last one stays."""
    records = run.catalog.live("train")
    classes = np.unique(records.labels)
    for label in philox(run.config.seed, "sequence", "class").permutation(classes)[: min(count, len(classes) - 1)]:
        yield [records.ids[i] for i in np.flatnonzero(records.labels == label)]


def half(run: Run, count: int) -> Iterator[list[str]]:
    """Half of all records, in batches of one size."""
    ids = run.catalog.live("train").ids
    order = philox(run.config.seed, "sequence", "half").permutation(len(ids))[: len(ids) // 2]
    yield from _batches([ids[i] for i in order], count)


def adaptive(run: Run, count: int) -> Iterator[list[str]]:
    """The records that the model of the moment is surest of, as if whoever is recognised best asks to be forgotten."""
    for _ in range(count):
        records = run.catalog.live("train")
        if len(records) <= SIZE:
            return
        yield [records.ids[i] for i in np.argsort(-_certainty(run, records), kind="stable")[:SIZE]]


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
    found = predict(load_model(run), run.images[records.rows])
    return found.probabilities[np.arange(len(records)), records.labels]


def _batches(ids: list[str], count: int) -> Iterator[list[str]]:
    """At most `count` batches of nearly one size."""
    for part in np.array_split(np.array(ids, np.str_), count):
        if len(part):
            yield [str(name) for name in part]
