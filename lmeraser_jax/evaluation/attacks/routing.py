"""Routing: do the prototypes, which every prediction uses, give away who was sampled for the clustering?

A prototype is the mean feature of sampled records, so a sampled record lies nearer to one than others do. A prototype
of a single record is a private feature outright. Prototypes from public records say nothing about private ones.
"""

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.statistics import SIGNIFICANT, Separation
from lmeraser_jax.hashing import philox
from lmeraser_jax.training import clustering as clusters
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.run import Run


def routing(run: Run, seed: int) -> Finding | None:
    """Attacks the published prototypes and those that would be; changes nothing.

    The columns tell the sample from other live records by the distance to the nearest prototype: with the published
    prototypes; with those that erasing half of the sample gives, for that half; with prototypes of public records. Its
    values also count the published prototypes (`clusters`) and those that are one private record's feature (`single`).
    None where there is nothing to attack: shards have no prototypes, and without others a sample hides nothing.
    """
    manifest, config, live = run.catalog.manifest(), run.config.clustering, run.catalog.live("train")
    assert manifest is not None
    published = load_clustering(run.layout, manifest.clustering)
    sample = run.catalog.sample("train", config.sample_size)  # the one that the seed calls for where it is public
    others = live.without(frozenset(sample.ids))
    if config.partition != "adaptive" or len(sample) < 4 or len(others) < 2:
        return None
    near, far = run.features(sample), run.features(others)
    columns: list[Separation | None] = [_separation(published, near, far), None, None]
    single, origin = 0, "they are made of public records"
    if config.sample_from == "private":
        single = int((np.bincount(published.labels) == 1).sum())
        origin = f"{single} of {len(published.keys)} are the feature of one private record"
        columns[1] = _after_erasure(run, sample, others, seed)
        public = run.catalog.sample("public", config.sample_size)
        if len(public) > 1:
            columns[2] = _separation(_clustered(run, public), near, far)
    detected = tuple(column is not None and column.p < SIGNIFICANT for column in columns)
    return Finding(
        "routing",
        detected,
        smallest_p=0.0,  # there is no control to be missed
        lines=[("AUC, distance to the prototype", *("-" if column is None else str(column.auc) for column in columns))],
        values={"source": config.sample_from, "clusters": len(published.keys), "single": single}
        | dict(zip(("published", "erased", "public"), columns, strict=True)),
        note=f"the published prototypes {'tell' if detected[0] else 'do not tell'} who was sampled; {origin}",
    )


def _after_erasure(run: Run, sample: RecordTable, others: RecordTable, seed: int) -> Separation | None:
    """Erases half of the sample in memory: the next records are sampled instead, and that half should be like any."""
    order = philox(seed, "attack", "routing").permutation(len(sample))
    erased = sample.take(np.sort(order[: len(sample) // 2]))
    after = run.catalog.sample("train", run.config.clustering.sample_size, erased.ids)
    unsampled = others.without(frozenset(after.ids))
    if len(unsampled) < 2:
        return None
    return _separation(_clustered(run, after), run.features(erased), run.features(unsampled))


def _clustered(run: Run, sample: RecordTable) -> Clustering:
    return clusters.cluster(sample.ids, run.features(sample), run.config.clustering, "in memory")


def _separation(clustering: Clustering, sample: np.ndarray, others: np.ndarray) -> Separation:
    """Tells features of sampled records from those of others by the distance to the nearest prototype."""
    scores = []
    for features in (sample, others):
        nearest = clustering.prototypes[clusters.assign(features, clustering.prototypes)]
        scores.append(-np.linalg.norm(features.astype(np.float64) - nearest.astype(np.float64), axis=1))
    return statistics.separation(*scores)
