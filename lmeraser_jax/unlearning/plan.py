"""The plan: what state the live records call for, and which slices are missing for it.

`live_state` reads the catalog, the clustering and the features, and writes nothing but the feature cache; `plan` is a
pure function of what it read. A live state holds touched clusters only, so under the published clustering the cost of a
plan follows the request and not the number of records; under another, only numbers are read of every record.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lmeraser_jax.config import Checkpoints
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import Damaged
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import atomic_files, requests
from lmeraser_jax.storage.rows import Manifest, SliceKind, SliceRow, images_of
from lmeraser_jax.training import clustering as clustering_lib
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.training.jobs import Target, make_job, snapshot_steps
from lmeraser_jax.training.slices import RecipeConstants, recipe
from lmeraser_jax.unlearning.artifacts import Tainted, load_clustering, slice_of, tainted
from lmeraser_jax.unlearning.run import Run

PIECE = 65_536  # records whose features are in memory at a time


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LiveState:
    """Everything that a plan depends on, of one moment."""

    manifest: Manifest | None  # the published state
    slices: Mapping[str, SliceRow]  # {digest: row} of the slices in the catalog
    on_disk: frozenset[str]  # digests of those whose folder exists
    pins: Mapping[str, str]  # {cluster key: slice reference}
    tainted: Tainted  # slices that were made with a record that is leaving
    clustering: Clustering  # that the live records call for
    clustering_unchanged: bool  # it is the published one and lies on disk
    members: Mapping[str, RecordTable] = dataclasses.field(default_factory=dict)  # of the clusters to look at
    untouched: frozenset[str] = frozenset()  # keys of the others
    moved: Sequence[tuple[int, str]] = ()  # (image row, cluster key) of records in another cluster than published
    private: RecordTable | None  # all live private records where there is a common head
    constants: RecipeConstants  # what every recipe depends on beside its members
    common_constants: RecipeConstants  # the same of the common head
    checkpoints: Checkpoints  # which earlier epochs are kept
    requests: tuple[str, ...]  # ids of the open erasure requests that are taken into account


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """The state that some live records call for, and what is missing for it."""

    clustering: Clustering
    clustering_unchanged: bool
    recipe_constants_digest: str
    entries: Mapping[str, str]  # {cluster key: slice reference} of clusters with members, and of the common head
    targets: Mapping[str, Target]  # {cluster key: the slice that its records call for} of the clusters looked at
    missing: Mapping[str, Target]  # those of the targets that do not exist yet
    members: Mapping[str, RecordTable]  # {cluster key: its records} of what is missing
    slices: Mapping[str, SliceRow]  # {digest: row} of the slices in the catalog
    moved: Sequence[tuple[int, str]]
    pinned: frozenset[str]  # clusters that stay at the slice they are pinned to
    unpinned: tuple[str, ...]  # clusters whose pin ends
    requests: tuple[str, ...]
    images_full: int  # images to pass forward and backward for a full re-tune of every cluster

    @property
    def required_slices(self) -> set[str]:
        """Digests of the slices that the live records call for, pinned clusters left out."""
        unpinned = {slice_of(ref) for key, ref in self.entries.items() if key not in self.pinned}
        return unpinned | {target.digest for target in self.targets.values()}

    @property
    def images_missing(self) -> int:
        """Images to pass forward and backward to make what is missing."""
        return sum(target.job.images for target in self.missing.values())


def current_plan(run: Run, leaving: Collection[str] = ()) -> Plan:
    """The plan for the records that are live now; the ids that are leaving count as erased already."""
    return plan(live_state(run, leaving))


def live_state(run: Run, leaving: Collection[str] = ()) -> LiveState:
    """Everything that a plan depends on, of one moment."""
    ids = frozenset(leaving)
    run.catalog.rank(run.config.seed)
    with run.catalog.snapshot():
        catalog, manifest, slices = run.catalog, run.catalog.manifest(), run.catalog.slices()
        clustering, unchanged = _clustering(run, manifest, ids)
        edited = set(catalog.edited().values())  # accepted since this build began: the next one serves them
        state = LiveState(
            manifest=manifest,
            slices=slices,
            on_disk=frozenset(path.name for path in atomic_files.entries(run.layout.slices)) & slices.keys(),
            pins=catalog.pins(),
            tainted=tainted(run, catalog.erased() | {row: name for name, row in catalog.rows(ids).items()}),
            clustering=clustering,
            clustering_unchanged=unchanged,
            private=catalog.live("train").without(ids) if run.config.common.method != "none" else None,
            constants=run.recipe_constants,
            common_constants=run.common_constants,
            checkpoints=run.config.checkpoints,
            requests=tuple(r.id for r in requests.listed(catalog, only_open=True) if r.id not in edited),
        )
        same_recipes = manifest is not None and manifest.recipe_constants_digest == constants_digest(state.constants)
        if manifest is not None and same_recipes and (unchanged or run.config.clustering.has_prototypes):
            return _with_touched_clusters(run, state, manifest, ids)
        return _with_all_clusters(run, state, ids)


def sampled(run: Run, leaving: Collection[str] = ()) -> tuple[RecordTable, str]:
    """The sampled live records, and the digest of the clustering that they call for; shards have no sample.

    Clusters of owners depend on all live records: each prototype is a mean over its owner's.
    """
    config = run.config.clustering
    if not config.has_prototypes:
        return RecordTable.empty(), digest(["shards", config.parts, run.config.seed, run.backbone.digest])
    if config.partition == "owner":
        records = run.catalog.live("train").without(frozenset(leaving))
    elif run.public_sample is not None:
        records = run.public_sample.records
    else:
        private = config.sample_from == "private"
        records = run.catalog.sample("train" if private else "public", config.sample_size, leaving if private else ())
    inputs = [dataclasses.asdict(config), dataclasses.asdict(run.input_spec), run.backbone.digest]
    if config.partition == "owner":
        inputs.append(records.owners)
    return records, digest([*inputs, records.ids, records.contents])


def _clustering(run: Run, manifest: Manifest | None, leaving: frozenset[str]) -> tuple[Clustering, bool]:
    """The clustering of the live records, and whether it is the published one."""
    config, width = run.config.clustering, run.backbone.config.feature_size
    records, name = sampled(run, leaving)
    if manifest is not None and manifest.clustering == name:
        with contextlib.suppress(Damaged):  # missing or damaged: computed again
            return load_clustering(run.layout, name), True
    if not config.has_prototypes:
        return clustering_lib.shards(config.parts, width, name), False
    if not records.ids:
        return Clustering(name, (), np.zeros(0, np.int32), (), np.zeros((0, width), np.float32)), False
    features = run.public_features(run.public_sample) if run.public_sample is not None else run.features(records)
    if config.partition == "owner":
        return clustering_lib.by_owner(records.ids, records.owners, features, name), False
    return clustering_lib.cluster(records.ids, features, config, name), False


def _with_all_clusters(run: Run, state: LiveState, leaving: frozenset[str]) -> LiveState:
    """The state with the members of every cluster."""
    records, keys = run.catalog.live("train").without(leaving), state.clustering.keys
    assignment = assign_members(run, records, state.clustering, state.clustering_unchanged)
    order = np.argsort(assignment, kind="stable")
    bounds = np.searchsorted(assignment[order], np.arange(len(keys) + 1))
    rows = {key: order[bounds[k] : bounds[k + 1]] for k, key in enumerate(keys)}
    members = {key: records.take(rows[key]) for key in keys if len(rows[key])}
    assigned = zip(records.rows.tolist(), (keys[k] for k in assignment), records.clusters, strict=True)
    moved = [(row, key) for row, key, published in assigned if key != published]
    return dataclasses.replace(state, members=members, moved=moved)


def _with_touched_clusters(run: Run, state: LiveState, manifest: Manifest, leaving: frozenset[str]) -> LiveState:
    """The state with the members of the clusters whose slice may change.

    These have an erased record, one that comes from or goes to another cluster, a lost slice, or a pin.
    """
    catalog, (moved, left) = run.catalog, _moved(run, state, manifest, leaving)
    touched = catalog.touched() | left | set(moved.values()) | set(catalog.clusters_of(leaving).values())
    touched |= {key for key, ref in manifest.clusters.items() if slice_of(ref) not in state.on_disk}
    touched |= set(state.pins)  # a pin may end, and the slice called for in its place is then missing or not
    arrivals: dict[str, list[int]] = {key: [] for key in touched}
    for row, key in moved.items():
        arrivals[key].append(row)
    gone = np.zeros(catalog.rows_used(), bool)
    gone[list(moved)] = True
    members = {}
    for key in sorted(touched.intersection(state.clustering.keys)):
        records = catalog.members(key, leaving)
        if gone[records.rows].any():
            records = records.take(np.flatnonzero(~gone[records.rows]))
        records = records.plus(catalog.at(arrivals[key]))
        if len(records):
            members[key] = records
    untouched = frozenset(manifest.clusters) - touched
    return dataclasses.replace(state, members=members, untouched=untouched, moved=list(moved.items()))


def _moved(run: Run, state: LiveState, manifest: Manifest, leaving: frozenset[str]) -> tuple[dict[int, str], set[str]]:
    """{image row: cluster key} of the live records that are in another cluster than published; the keys they leave.

    Under the published clustering these are the new records. Under another, every record is assigned again, by its
    image row and cached feature alone; where its prototype stays, it is compared with new prototypes only.
    """
    catalog, clustering, keys = run.catalog, state.clustering, state.clustering.keys
    if state.clustering_unchanged:
        new = catalog.members("", leaving)
        hit = (keys[k] for k in assign_members(run, new, clustering, True))
        return dict(zip(new.rows.tolist(), hit, strict=True)), set()
    rows, clusters, published = catalog.places(leaving)
    label_of_row = np.full(catalog.rows_used(), -1, np.int32)
    row_of = catalog.rows(clustering.sample)
    for name, label in zip(clustering.sample, clustering.labels, strict=True):
        if name in row_of:
            label_of_row[row_of[name]] = label
    index = {key: k for k, key in enumerate(keys)}
    label_of_cluster = np.full(max(published) + 1, -1, np.int32)
    label_of_cluster[list(published)] = [index.get(key, -1) for key in published.values()]
    assignment, before = label_of_row[rows], label_of_cluster[clusters]
    new = _new_prototypes(run, manifest, clustering)
    unassigned = np.flatnonzero(assignment < 0)
    for start in range(0, len(unassigned), PIECE):
        piece = unassigned[start : start + PIECE]
        features = run.features_at(rows[piece])
        assignment[piece] = clustering_lib.reassign(features, clustering.prototypes, before[piece], new)
    changed = np.flatnonzero(assignment != before)
    moved = zip(rows[changed].tolist(), (keys[k] for k in assignment[changed]), strict=True)
    return dict(moved), {published[number] for number in np.unique(clusters[changed]).tolist()}


def _new_prototypes(run: Run, manifest: Manifest, clustering: Clustering) -> np.ndarray:
    """Which prototypes of a clustering the published one does not have, bit for bit: bool [K]."""
    before = {}
    with contextlib.suppress(Damaged):  # then all are new
        published = load_clustering(run.layout, manifest.clustering)
        before = dict(zip(published.keys, published.prototypes, strict=True))
    pairs = zip(clustering.keys, clustering.prototypes, strict=True)
    return np.array([key not in before or not np.array_equal(before[key], prototype) for key, prototype in pairs])


def assign_members(run: Run, records: RecordTable, clustering: Clustering, unchanged: bool) -> np.ndarray:
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
    if run.config.clustering.has_prototypes:
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
            lines.append(
                f"cluster {key[:12]}: its slice was tuned with other ids, contents or labels than its members'"
            )
    if run.config.common.method != "none":
        private = catalog.live("train")
        required = recipe_digest(SliceKind.COMMON, private, run.common_constants) if len(private) else None
        if required != manifest.entries.get(SliceKind.COMMON):
            lines.append("the common head was made with other ids, contents or labels than the records'")
    return lines


def plan(state: LiveState) -> Plan:
    """What state the live private records call for."""
    targets = {key: _target(state, key, records) for key, records in state.members.items()}
    entries = {key: target.digest for key, target in targets.items()}
    if state.manifest is not None:
        entries |= {key: state.manifest.entries[key] for key in state.untouched}
    pinned = _surviving_pins(state, entries)
    images_full = sum(target.job.images for target in targets.values())
    images_full += sum(images_of(state.slices, entries[key]) for key in state.untouched)
    entries |= pinned
    members = dict(state.members)
    if state.private is not None and len(state.private):
        targets[SliceKind.COMMON] = _target(state, SliceKind.COMMON, state.private)
        entries[SliceKind.COMMON] = targets[SliceKind.COMMON].digest
        members[SliceKind.COMMON] = state.private
    unpinned = {key: target for key, target in targets.items() if key not in pinned}
    missing = {key: target for key, target in unpinned.items() if target.digest not in state.on_disk}
    return Plan(
        clustering=state.clustering,
        clustering_unchanged=state.clustering_unchanged,
        recipe_constants_digest=constants_digest(state.constants),
        entries=entries,
        targets=targets,
        missing=missing,
        members={key: members[key] for key in missing},
        slices=state.slices,
        moved=state.moved,
        pinned=frozenset(pinned),
        unpinned=tuple(sorted(set(state.pins) - set(pinned))),
        requests=state.requests,
        images_full=images_full,
    )


def _target(state: LiveState, key: str, records: RecordTable) -> Target:
    """The slice of a cluster, or the common head, with these members."""
    constants = state.common_constants if key == SliceKind.COMMON else state.constants
    job = make_job(key, records.rows, constants.tuning)
    if key != SliceKind.COMMON:
        steps = snapshot_steps(job, state.checkpoints.every_epochs, state.checkpoints.keep)
        job = dataclasses.replace(job, snapshots=steps)
    return Target(recipe_digest(key, records, constants), job)


def recipe_digest(key: str, records: RecordTable, constants: RecipeConstants) -> str:
    """The digest of the slice of a cluster with these members."""
    members = list(zip(records.ids, records.contents, records.labels.tolist(), strict=True))
    return digest(recipe(key, members, constants))


def constants_digest(constants: RecipeConstants) -> str:
    """Digest of everything but the members that a recipe depends on."""
    return recipe_digest("", RecordTable.empty(), constants)


def _surviving_pins(state: LiveState, entries: Mapping[str, str]) -> dict[str, str]:
    """The pins that hold, {cluster key: slice reference}, given what the live records call for.

    A pin ends with its cluster, with its slice's checkpoint, and when a record leaves that was a member of the slice,
    or was sampled for the clustering that decided its members; unless the slice is called for all the same.
    """
    surviving = {}
    for key, ref in state.pins.items():
        name = slice_of(ref)
        if key not in entries or name not in state.on_disk or name in state.tainted.by_member:
            continue
        if name in state.tainted.by_sample and entries[key] != name:
            continue
        surviving[key] = ref
    return surviving
