"""Reads what a plan depends on: catalog, clustering and features. Writes nothing but the feature cache."""

import contextlib
import dataclasses
from collections.abc import Collection

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.rows import Manifest, SliceKind
from lmeraser_jax.training import clustering as clustering_lib
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.unlearning.artifacts import load_clustering, slice_of, tainted
from lmeraser_jax.unlearning.plan import LiveState, constants_digest, recipe_digest
from lmeraser_jax.unlearning.run import Run


def live_state(run: Run, leaving: Collection[str] = ()) -> LiveState:
    """Everything that a plan depends on, of one moment; the ids that are leaving count as erased already."""
    ids = frozenset(leaving)
    run.catalog.rank(run.config.seed)
    with run.catalog.snapshot():
        catalog, manifest, slices = run.catalog, run.catalog.manifest(), run.catalog.slices()
        clustering, unchanged = _clustering(run, manifest, ids)
        state = LiveState(
            manifest=manifest,
            slices=slices,
            on_disk=frozenset(name for name in slices if run.layout.slice(name).is_dir()),
            pins=catalog.pins(),
            tainted=tainted(run, catalog.erased() | catalog.rows(ids)),
            clustering=clustering,
            clustering_unchanged=unchanged,
            members={},
            untouched={},
            moved=[],
            private=catalog.live("train").without(ids) if run.config.common.method != "none" else None,
            constants=run.recipe_constants,
            common_constants=run.common_constants,
            checkpoints=run.config.checkpoints,
            requests=tuple(request.id for request in requests.listed(catalog, only_open=True)),
        )
        same_recipes = manifest is not None and manifest.recipe_constants_digest == constants_digest(state.constants)
        if manifest is not None and unchanged and same_recipes:
            return _with_touched_clusters(run, state, manifest, ids)
        return _with_all_clusters(run, state, ids)


def sampled(run: Run, leaving: Collection[str] = ()) -> tuple[RecordTable, str]:
    """The sampled live records, and the digest of the clustering that they call for; shards have no sample."""
    config = run.config.clustering
    if config.partition != "adaptive":
        return RecordTable.empty(), digest(["shards", config.parts, run.config.seed, run.backbone.digest])
    private = config.sample_from == "private"
    records = run.catalog.sample("train" if private else "public", config.sample_size, leaving if private else ())
    inputs = [dataclasses.asdict(config), dataclasses.asdict(run.image_spec), run.backbone.digest]
    return records, digest([*inputs, records.ids, records.contents])


def _clustering(run: Run, manifest: Manifest | None, leaving: frozenset[str]) -> tuple[Clustering, bool]:
    """The clustering of the live records, and whether it is the published one."""
    config, width = run.config.clustering, run.backbone.config.feature_size
    records, name = sampled(run, leaving)
    if manifest is not None and manifest.clustering == name:
        with contextlib.suppress(UserError):  # missing or damaged: computed again
            return load_clustering(run.layout, name), True
    if config.partition != "adaptive":
        return clustering_lib.shards(config.parts, width, name), False
    if not records.ids:
        return Clustering(name, (), np.zeros(0, np.int32), (), np.zeros((0, width), np.float32)), False
    return clustering_lib.cluster(records.ids, run.features(records), config, name), False


def _with_all_clusters(run: Run, state: LiveState, leaving: frozenset[str]) -> LiveState:
    """The state with the members of every cluster."""
    records, keys = run.catalog.live("train").without(leaving), state.clustering.keys
    assignment = _assignment(run, records, state.clustering, state.clustering_unchanged)
    order = np.argsort(assignment, kind="stable")
    bounds = np.searchsorted(assignment[order], np.arange(len(keys) + 1))
    members = {}
    for k, key in enumerate(keys):
        if bounds[k] < bounds[k + 1]:
            members[key] = records.take(order[bounds[k] : bounds[k + 1]])
    moved = [
        (name, keys[k])
        for name, k, published in zip(records.ids, assignment, records.clusters, strict=True)
        if keys[k] != published
    ]
    return dataclasses.replace(state, members=members, moved=moved)


def _with_touched_clusters(run: Run, state: LiveState, manifest: Manifest, leaving: frozenset[str]) -> LiveState:
    """The state with the members of clusters to which something happened, under the published clustering.

    That is an erased or a new record, a slice that is not on disk, or a pin that may end.
    """
    catalog, keys = run.catalog, state.clustering.keys
    new = catalog.members("", leaving)
    clusters_hit = [keys[k] for k in _assignment(run, new, state.clustering, True)]
    touched = catalog.touched() | set(clusters_hit) | set(catalog.clusters_of(leaving).values())
    touched |= {key for key, ref in manifest.clusters.items() if slice_of(ref) not in state.on_disk}
    touched |= {key for key, ref in state.pins.items() if slice_of(ref) in state.tainted.all}
    members = {}
    for key in sorted(touched - {""}):
        arrivals = new.take(np.flatnonzero(np.array([hit == key for hit in clusters_hit], bool)))
        records = catalog.members(key, leaving).plus(arrivals)
        if len(records):
            members[key] = records
    untouched = {key: size for key, size in catalog.sizes().items() if key not in touched | {""}}
    moved = list(zip(new.ids, clusters_hit, strict=True))
    return dataclasses.replace(state, members=members, untouched=untouched, moved=moved)


def _assignment(run: Run, records: RecordTable, clustering: Clustering, unchanged: bool) -> np.ndarray:
    """Cluster index int32 [N] of each record: sampled ones by the tree, the others by the nearest prototype.

    Under the published clustering a record keeps its published cluster, which is what it would get again.
    """
    index = {key: k for k, key in enumerate(clustering.keys)}
    sample = dict(zip(clustering.sample, clustering.labels, strict=True))
    assignment = np.array([sample.get(name, -1) for name in records.ids], np.int32)
    if unchanged:
        published = np.array([index.get(key, -1) for key in records.clusters], np.int32)
        assignment = np.where(assignment < 0, published, assignment)
    unassigned = np.flatnonzero(assignment < 0)
    if len(unassigned):
        assignment[unassigned] = assign_clusters(run, records.take(unassigned), clustering)
    return assignment


def assign_clusters(run: Run, records: RecordTable, clustering: Clustering) -> np.ndarray:
    """Cluster index int32 [n] of records that no tree has placed: by prototype (Eq. 4), or by a hash of the id."""
    if run.config.clustering.partition == "adaptive":
        return clustering_lib.assign(run.features(records), clustering.prototypes)
    return clustering_lib.shard_of(records.ids, len(clustering.keys), run.config.seed)


def contradictions(run: Run) -> list[str]:
    """Where the published state is not what the live records and the config call for: one line each. Reads only.

    As far as it can be told without computing features. Records and requests that wait are no contradiction.
    """
    catalog, manifest = run.catalog, run.catalog.manifest()
    if manifest is None or catalog.erased() or len(catalog.members("")):
        return []
    lines = []
    if sampled(run)[1] != manifest.clustering:
        lines.append("the clustering was made with another sample, backbone or --config.clustering")
    if constants_digest(run.recipe_constants) != manifest.recipe_constants_digest:
        return [*lines, "the slices were tuned with another backbone, seed, --config.tuning or --config.data"]
    for key in sorted({*manifest.clusters, *catalog.sizes()} - set(catalog.pins())):
        members = catalog.members(key)
        required = recipe_digest(key, members, run.recipe_constants) if len(members) else None
        if required != manifest.entries.get(key):
            lines.append(f"cluster {key[:12]}: its slice was tuned with other ids, pixels or labels than its members'")
    if run.config.common.method != "none":
        private = catalog.live("train")
        required = recipe_digest(SliceKind.COMMON, private, run.common_constants) if len(private) else None
        if required != manifest.entries.get(SliceKind.COMMON):
            lines.append("the common head was made with other ids, pixels or labels than the records'")
    return lines
