"""What state some live records call for, and which slices are missing for it. Tunes and publishes nothing.

A plan under the published clustering looks at touched clusters only: those with an erased or a new record,
or without a readable slice. So its cost follows the request, not the number of records.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lmeraser_jax import clustering as clusters
from lmeraser_jax import slices
from lmeraser_jax.artifacts import load_clustering, parts_of
from lmeraser_jax.clustering import Clustering
from lmeraser_jax.digests import digest
from lmeraser_jax.errors import UserError
from lmeraser_jax.records.table import RecordTable
from lmeraser_jax.run import Run
from lmeraser_jax.schedule import Job, make_job
from lmeraser_jax.store import requests
from lmeraser_jax.store.catalog import Manifest, SliceRow


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A slice that has to exist: its digest, that of the slice it starts from ("" for none), how to make it."""

    digest: str
    parent: str
    job: Job


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The state that some live records call for.

    Attributes:
        clustering: prototypes and keys.
        settled: the clustering is the published one and lies on disk.
        inputs: digest of everything but the members that a recipe depends on.
        entries: {cluster key: slice reference} of clusters that have members.
        sizes: {cluster key: members}.
        chains: {cluster key: its slices in the order of tuning} of the clusters that were looked at.
        missing: {cluster key: the end of its chain that does not exist yet}.
        labels: {cluster key: int32 [m], labels of the rows of the chain's last job}.
        moved: (record id, cluster key) of records that are in another cluster than published.
        requests: ids of the open erasure requests that it takes into account.
        images_full: images to pass forward and backward for a full re-tune of every cluster.
    """

    clustering: Clustering
    settled: bool
    inputs: str
    entries: dict[str, str]
    sizes: dict[str, int]
    chains: dict[str, tuple[Target, ...]]
    missing: dict[str, tuple[Target, ...]]
    labels: dict[str, np.ndarray]
    moved: list[tuple[str, str]]
    requests: tuple[str, ...]
    images_full: int

    @property
    def images_missing(self) -> int:
        """Images to pass forward and backward to make what is missing."""
        return sum(target.job.images for chain in self.missing.values() for target in chain)


def plan(run: Run, leaving: Collection[str] = ()) -> Plan:
    """What state the live private records call for. Writes nothing but the feature cache.

    Args:
        run: opened for writing.
        leaving: ids that count as erased already.
    """
    leaving = frozenset(leaving)
    run.catalog.rank(run.config.seed)
    with run.catalog.snapshot():
        clustering, settled = _clustering(run, leaving)
        inputs = digest(_recipe(run, "", RecordTable.empty()))
        manifest = run.catalog.manifest()
        if manifest is not None and settled and manifest.inputs == inputs:
            return _touched(run, clustering, inputs, manifest, leaving)
        return _whole(run, clustering, settled, inputs, leaving)


def _clustering(run: Run, leaving: frozenset[str]) -> tuple[Clustering, bool]:
    """The clustering of the live records, and whether it is the published one."""
    k = run.config.clustering
    private = k.sample_from == "private"
    chosen = run.catalog.sample("train" if private else "public", k.sample_size, leaving if private else ())
    name = digest(clustering_inputs(run, chosen))
    manifest = run.catalog.manifest()
    if manifest is not None and manifest.clustering == name:
        with contextlib.suppress(UserError):  # missing or damaged: made again
            return load_clustering(run.layout, name), True
    if not chosen.ids:
        width = run.backbone.config.feature_size
        return Clustering(name, (), np.zeros(0, np.int32), (), np.zeros((0, width), np.float32)), False
    return clusters.cluster(chosen.ids, run.features(chosen), k, name), False


def clustering_inputs(run: Run, sample: RecordTable) -> list[Any]:
    """Everything that the clustering of a sample depends on; its digest is the clustering's name."""
    k = run.config.clustering
    return [dataclasses.asdict(k), dataclasses.asdict(run.spec), run.backbone.digest, sample.ids, sample.contents]


def _whole(run: Run, clustering: Clustering, settled: bool, inputs: str, leaving: frozenset[str]) -> Plan:
    """A plan that looks at every record."""
    records = run.catalog.live("train").without(leaving)
    assignment = _assignment(run, records, clustering, settled)
    order = np.argsort(assignment, kind="stable")
    bounds = np.searchsorted(assignment[order], np.arange(len(clustering.keys) + 1))
    tables = {
        key: records.take(order[bounds[k] : bounds[k + 1]])
        for k, key in enumerate(clustering.keys)
        if bounds[k] < bounds[k + 1]
    }
    moved = [
        (name, clustering.keys[k])
        for name, k, old in zip(records.ids, assignment, records.clusters, strict=True)
        if clustering.keys[k] != old
    ]
    return _planned(run, clustering, settled, inputs, tables, {}, moved)


def _touched(run: Run, clustering: Clustering, inputs: str, manifest: Manifest, leaving: frozenset[str]) -> Plan:
    """A plan under the published clustering: only clusters that something happened to are looked at."""
    catalog, made = run.catalog, run.catalog.slices()
    untouched = catalog.sizes()
    untouched.pop("", None)
    fresh = catalog.members("", leaving)
    homes = [clustering.keys[k] for k in _assignment(run, fresh, clustering, True)]
    touched = catalog.touched() | set(homes) | set(catalog.clusters_of(leaving).values())
    touched |= {key for key, ref in manifest.entries.items() if not _exists(run, made, parts_of(ref)[0])}
    tables = {}
    for key in sorted(touched - {""}):
        untouched.pop(key, None)
        arrived = fresh.take(np.flatnonzero(np.array([home == key for home in homes], bool)))
        table = catalog.members(key, leaving).plus(arrived)
        if len(table):
            tables[key] = table
    return _planned(run, clustering, True, inputs, tables, untouched, list(zip(fresh.ids, homes, strict=True)))


def _planned(
    run: Run,
    clustering: Clustering,
    settled: bool,
    inputs: str,
    tables: Mapping[str, RecordTable],
    untouched: Mapping[str, int],
    moved: list[tuple[str, str]],
) -> Plan:
    """The plan for clusters with the given members, and untouched ones of the given sizes."""
    made, manifest = run.catalog.slices(), run.catalog.manifest()
    entries = {key: manifest.entries[key] for key in untouched} if manifest is not None else {}
    chains = {key: _chain(run, key, table) for key, table in tables.items()}
    entries |= {key: chain[-1].digest for key, chain in chains.items()}
    missing = {}
    for key, chain in chains.items():
        rest = _missing(run, made, chain)
        if rest:
            missing[key] = rest
    images = sum(target.job.images for chain in chains.values() for target in chain)
    images += sum(_images_of(made, entries[key]) for key in untouched)
    sizes = {key: len(table) for key, table in tables.items()} | dict(untouched)
    labels = {key: tables[key].labels for key in missing}
    served = tuple(request.id for request in requests.listed(run.catalog, only_open=True))
    return Plan(clustering, settled, inputs, entries, sizes, chains, missing, labels, moved, served, images)


def _assignment(run: Run, records: RecordTable, clustering: Clustering, settled: bool) -> np.ndarray:
    """Cluster index int32 [N] of each record: sampled ones by the tree, the others by the nearest prototype.

    Under the published clustering a record keeps its published cluster, which is what it would get again.
    """
    index = {key: k for k, key in enumerate(clustering.keys)}
    sampled = dict(zip(clustering.sample, clustering.labels, strict=True))
    found = np.array([sampled.get(name, -1) for name in records.ids], np.int32)
    if settled:
        kept = np.array([index.get(key, -1) for key in records.clusters], np.int32)
        found = np.where(found < 0, kept, found)
    open_ = np.flatnonzero(found < 0)
    if len(open_):
        found[open_] = clusters.assign(run.features(records.take(open_)), clustering.prototypes)
    return found


def _chain(run: Run, key: str, table: RecordTable) -> tuple[Target, ...]:
    """The slices of one cluster in the order of tuning; the last is the one that predicts."""
    job = make_job(key, table.rows, run.config.tuning)
    return (Target(digest(_recipe(run, key, table)), "", job),)


def _recipe(run: Run, key: str, table: RecordTable) -> dict:
    members = list(zip(table.ids, table.contents, table.labels.tolist(), strict=True))
    return slices.recipe(
        key, members, run.config.tuning, run.backbone.digest, run.spec, len(run.classes), run.config.seed
    )


def _exists(run: Run, made: Mapping[str, SliceRow], name: str) -> bool:
    return name in made and run.layout.slice(name).is_dir()


def _missing(run: Run, made: Mapping[str, SliceRow], chain: tuple[Target, ...]) -> tuple[Target, ...]:
    """The end of a chain after its last slice that exists."""
    there = [index for index, target in enumerate(chain) if _exists(run, made, target.digest)]
    return chain[there[-1] + 1 :] if there else chain


def _images_of(made: Mapping[str, SliceRow], ref: str) -> int:
    """Images that went into a slice and the slices it was tuned on from."""
    row, images = made.get(parts_of(ref)[0]), 0
    while row is not None:
        images += row.images
        row = made.get(row.parent)
    return images
