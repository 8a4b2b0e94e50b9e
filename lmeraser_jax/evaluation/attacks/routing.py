"""Routing: do the prototypes, which every prediction uses, give away who was sampled for the clustering?

A prototype is the mean feature of sampled records, so a sampled record lies nearer to one than others do. A prototype
of a single record is a private feature outright. Prototypes from public records say nothing about private ones.
"""

import dataclasses
from typing import Any

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.statistics import DOUBT, Separation
from lmeraser_jax.hashing import philox
from lmeraser_jax.training import clustering as clusters
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class Routing:
    """How well the distance to the nearest prototype tells the sample from other live records.

    Attributes:
        source: what the published clustering was sampled from, private | public.
        clusters: published prototypes.
        single: those that are the feature of one private record.
        published: with the published prototypes; the sample that the seed calls for where they are public.
        erased: with the prototypes that erasing half of the sample gives, told by that half; None for public ones.
        public: with prototypes of public records; None where there are too few, or they are published already.
    """

    source: str
    clusters: int
    single: int
    published: Separation
    erased: Separation | None
    public: Separation | None

    name = "routing"
    least = 0.0  # there is no control to be missed

    @property
    def found(self) -> tuple[bool, ...]:
        return tuple(part is not None and part.p < DOUBT for part in (self.published, self.erased, self.public))

    def lines(self) -> list[tuple[str, ...]]:
        parts = (self.published, self.erased, self.public)
        cells = ("-" if part is None else f"{part.auc:.3f} [{part.low:.2f}, {part.high:.2f}]" for part in parts)
        return [("AUC, distance to the prototype", *cells)]

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"found": self.found}


def routing(run: Run, seed: int) -> Routing | None:
    """Attacks the published prototypes and those that would be; changes nothing.

    Returns:
        None where there is nothing to attack: shards have no prototypes, and of a sample of everybody nothing is told.
    """
    manifest, k, live = run.catalog.manifest(), run.config.clustering, run.catalog.live("train")
    assert manifest is not None
    published = load_clustering(run.layout, manifest.clustering)
    sample = run.catalog.sample("train", k.sample_size)
    others = live.without(frozenset(sample.ids))
    if k.partition != "adaptive" or len(sample) < 4 or len(others) < 2:
        return None
    near, far = (run.features(table) for table in (sample, others))
    private = k.sample_from == "private"
    public = run.catalog.sample("public", k.sample_size) if private else RecordTable.empty()
    return Routing(
        source=k.sample_from,
        clusters=len(published.keys),
        single=int((np.bincount(published.labels) == 1).sum()) if private else 0,
        published=_told(published, near, far),
        erased=_erased(run, sample, others, seed) if private else None,
        public=_told(_clustered(run, public), near, far) if len(public) > 1 else None,
    )


def _erased(run: Run, sample: RecordTable, others: RecordTable, seed: int) -> Separation | None:
    """Erases half of the sample in memory: the next records are sampled instead, and that half should be like any."""
    order = philox(seed, "attack", "routing").permutation(len(sample))
    gone = sample.take(np.sort(order[: len(sample) // 2]))
    after = run.catalog.sample("train", run.config.clustering.sample_size, gone.ids)
    left = others.without(frozenset(after.ids))
    if len(left) < 2:
        return None
    return _told(_clustered(run, after), run.features(gone), run.features(left))


def _clustered(run: Run, sample: RecordTable) -> Clustering:
    return clusters.cluster(sample.ids, run.features(sample), run.config.clustering, "in memory")


def _told(clustering: Clustering, sample: np.ndarray, others: np.ndarray) -> Separation:
    return statistics.separation(*(-distances(part, clustering.prototypes) for part in (sample, others)))


def distances(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Euclidean distance to the nearest prototype: float32 [N, D], [K, D] -> float64 [N]."""
    nearest = prototypes[clusters.assign(features, prototypes)]
    return np.linalg.norm(features.astype(np.float64) - nearest.astype(np.float64), axis=1)
