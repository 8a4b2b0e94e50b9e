"""What state some live records call for, and which slices are missing for it. Tunes and publishes nothing.

A plan under the published clustering looks at touched clusters only: those with an erased or a new record,
or without a readable slice. So its cost follows the request, not the number of records.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.rows import Manifest, SliceKind, SliceRow, images_of
from lmeraser_jax.training import clustering as clusters
from lmeraser_jax.training import slices
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.training.jobs import Target, make_job, snapshot_steps, stage_jobs
from lmeraser_jax.unlearning.artifacts import load_clustering, slice_of, tainted
from lmeraser_jax.unlearning.run import Run

ONE_HEAD = "one head"  # in the place of a cluster's key, where one slice is that of all clusters


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
        members: {cluster key: the records of the chain's last job} of what is missing.
        moved: (record id, cluster key) of records that are in another cluster than published.
        pinned: clusters that stay at the slice they are pinned to.
        unpinned: clusters that can no longer stay there.
        requests: ids of the open erasure requests that it takes into account.
        images_full: images to pass forward and backward for a full re-tune of every cluster.
    """

    clustering: Clustering
    clustering_unchanged: bool
    recipe_constants_digest: str
    entries: dict[str, str]
    sizes: dict[str, int]
    chains: dict[str, tuple[Target, ...]]
    missing: dict[str, tuple[Target, ...]]
    members: dict[str, RecordTable]
    moved: list[tuple[str, str]]
    pinned: frozenset[str]
    unpinned: tuple[str, ...]
    requests: tuple[str, ...]
    images_full: int

    @property
    def required_slices(self) -> set[str]:
        """Digests of the slices that the live records call for, pinned clusters left out."""
        chains = {chain[-1].digest for chain in self.chains.values()}
        return {slice_of(ref) for key, ref in self.entries.items() if key not in self.pinned} | chains

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
        if (
            manifest is not None
            and settled
            and manifest.recipe_constants_digest == inputs
            and not run.config.tuning.one_head
        ):
            found = _touched(run, clustering, inputs, manifest, leaving)
        else:
            found = _whole(run, clustering, settled, inputs, leaving)
        return _with_common_head(run, found, leaving) if run.config.common.method != "none" else found


def _clustering(run: Run, leaving: frozenset[str]) -> tuple[Clustering, bool]:
    """The clustering of the live records, and whether it is the published one."""
    k = run.config.clustering
    chosen, name = sampled(run, leaving)
    manifest = run.catalog.manifest()
    if manifest is not None and manifest.clustering == name:
        with contextlib.suppress(UserError):  # missing or damaged: made again
            return load_clustering(run.layout, name), True
    width = run.backbone.config.feature_size
    if k.partition != "adaptive":
        return clusters.shards(k.parts, width, name), False
    if not chosen.ids:
        return Clustering(name, (), np.zeros(0, np.int32), (), np.zeros((0, width), np.float32)), False
    return clusters.cluster(chosen.ids, run.features(chosen), k, name), False


def sampled(run: Run, leaving: Collection[str] = ()) -> tuple[RecordTable, str]:
    """The sampled live records, and the digest of the clustering that they call for; shards have no sample."""
    k = run.config.clustering
    if k.partition != "adaptive":
        return RecordTable.empty(), digest(["shards", k.parts, run.config.seed, run.backbone.digest])
    private = k.sample_from == "private"
    chosen = run.catalog.sample("train" if private else "public", k.sample_size, leaving if private else ())
    inputs = [dataclasses.asdict(k), dataclasses.asdict(run.spec), run.backbone.digest, chosen.ids, chosen.contents]
    return chosen, digest(inputs)


def contradictions(run: Run) -> list[str]:
    """Where the published state is not what the live records and the config call for, as far as that can be told
    without computing anything: one line each. Records and requests that wait are no contradiction. Reads only."""
    catalog, manifest = run.catalog, run.catalog.manifest()
    if manifest is None or catalog.erased() or len(catalog.members("")):
        return []
    found = []
    if sampled(run)[1] != manifest.clustering:
        found.append("the clustering was made with another sample, backbone or --config.clustering")
    if digest(_recipe(run, "", RecordTable.empty())) != manifest.recipe_constants_digest:
        return [*found, "the slices were tuned with another backbone, seed, --config.tuning or --config.data"]
    if run.config.tuning.one_head or run.config.common.method != "none":
        found += _wrong_wholes(run, manifest)
    if run.config.tuning.one_head:
        return found
    for key in sorted({*manifest.clusters, *catalog.sizes()} - set(catalog.pins())):
        members = catalog.members(key)
        wanted = _chain(run, key, members)[-1].digest if len(members) else None
        if wanted != manifest.entries.get(key):
            found.append(f"cluster {key[:12]}: its slice was tuned with other ids, pixels or labels than its members'")
    return found


def _wrong_wholes(run: Run, manifest: Manifest) -> list[str]:
    """What was made of all records and is not what they call for."""
    wanted, found = plan(run).entries, []
    if run.config.tuning.one_head and manifest.clusters != {k: v for k, v in wanted.items() if k != SliceKind.COMMON}:
        found.append("the slice of all clusters was tuned with other ids, pixels or labels than the records'")
    if wanted.get(SliceKind.COMMON) != manifest.entries.get(SliceKind.COMMON):
        found.append("the common head was made with other ids, pixels or labels than the records'")
    return found


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
    found = _planned(run, clustering, settled, inputs, tables, {}, moved, leaving)
    return _with_one_head(run, found, records, assignment) if run.config.tuning.one_head and len(records) else found


def _with_one_head(run: Run, found: Plan, records: RecordTable, assignment: np.ndarray) -> Plan:
    """The plan with one slice in the place of all: its members are all records, each with its cluster's prompt."""
    everyone = dataclasses.replace(records, labels=records.labels + np.int32(len(run.classes)) * assignment)
    chain = _chain(run, ONE_HEAD, everyone)
    missing = _missing(run, run.catalog.slices(), chain)
    return dataclasses.replace(
        found,
        entries=dict.fromkeys(found.entries, chain[-1].digest),
        chains={ONE_HEAD: chain},
        missing={ONE_HEAD: missing} if missing else {},
        members={ONE_HEAD: everyone} if missing else {},
        images_full=sum(target.job.images for target in chain),
    )


def _with_common_head(run: Run, found: Plan, leaving: frozenset[str]) -> Plan:
    """The plan with the head of all private records beside the clusters' slices."""
    records = run.catalog.live("train").without(leaving)
    if not len(records):
        return found
    made, members = run.catalog.slices(), list(zip(records.ids, records.contents, records.labels.tolist(), strict=True))
    problem, batch = run.common_spec, run.config.clustering.feature_batch
    constants = (problem.tuning, run.backbone.digest, run.spec, len(run.classes), run.config.seed)
    recipe = slices.recipe(SliceKind.COMMON, members, *constants, feature_batch=batch)
    chain = (Target(digest(recipe), "", make_job(SliceKind.COMMON, records.rows, problem.tuning)),)
    missing = _missing(run, made, chain)
    return dataclasses.replace(
        found,
        entries=found.entries | {SliceKind.COMMON: chain[-1].digest},
        chains=found.chains | {SliceKind.COMMON: chain},
        missing=found.missing | ({SliceKind.COMMON: missing} if missing else {}),
        members=found.members | ({SliceKind.COMMON: records} if missing else {}),
    )


def _touched(run: Run, clustering: Clustering, inputs: str, manifest: Manifest, leaving: frozenset[str]) -> Plan:
    """A plan under the published clustering: only clusters that something happened to are looked at."""
    catalog, made = run.catalog, run.catalog.slices()
    untouched = catalog.sizes()
    untouched.pop("", None)
    fresh = catalog.members("", leaving)
    assign_clusters = [clustering.keys[k] for k in _assignment(run, fresh, clustering, True)]
    touched = catalog.touched() | set(assign_clusters) | set(catalog.clusters_of(leaving).values())
    touched |= {key for key, ref in manifest.entries.items() if not _exists(run, made, slice_of(ref), parents=True)}
    touched |= _doubtful(run, leaving)
    tables = {}
    for key in sorted(touched - {""}):
        untouched.pop(key, None)
        arrived = fresh.take(np.flatnonzero(np.array([home == key for home in assign_clusters], bool)))
        table = catalog.members(key, leaving).plus(arrived)
        if len(table):
            tables[key] = table
    moved = list(zip(fresh.ids, assign_clusters, strict=True))
    return _planned(run, clustering, True, inputs, tables, untouched, moved, leaving)


def _planned(
    run: Run,
    clustering: Clustering,
    settled: bool,
    inputs: str,
    tables: Mapping[str, RecordTable],
    untouched: Mapping[str, int],
    moved: list[tuple[str, str]],
    leaving: frozenset[str],
) -> Plan:
    """The plan for clusters with the given members, and untouched ones of the given sizes."""
    made, manifest = run.catalog.slices(), run.catalog.manifest()
    entries = {key: manifest.entries[key] for key in untouched} if manifest is not None else {}
    chains = {key: _chain(run, key, table) for key, table in tables.items()}
    entries |= {key: chain[-1].digest for key, chain in chains.items()}
    pins = _pins(run, made, entries, leaving)
    unpinned = tuple(sorted(set(run.catalog.pins()) - set(pins)))
    ended = (frozenset(pins), unpinned)
    entries |= pins
    missing = {}
    for key, chain in chains.items():
        rest = _missing(run, made, chain)
        if rest and key not in pins:
            missing[key] = rest
    images = sum(target.job.images for chain in chains.values() for target in chain)
    images += sum(images_of(made, entries[key]) for key in untouched)
    sizes = {key: len(table) for key, table in tables.items()} | dict(untouched)
    members = {key: tables[key] for key in missing}
    served = tuple(request.id for request in requests.listed(run.catalog, only_open=True))
    return Plan(clustering, settled, inputs, entries, sizes, chains, missing, members, moved, *ended, served, images)


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
        found[open_] = assign_clusters(run, records.take(open_), clustering)
    return found


def assign_clusters(run: Run, records: RecordTable, clustering: Clustering) -> np.ndarray:
    """Cluster index int32 [n] of records that no tree has placed: by prototype (Eq. 4), or by a hash of the id."""
    if run.config.clustering.partition == "adaptive":
        return clusters.assign(run.features(records), clustering.prototypes)
    return clusters.shard_of(records.ids, len(clustering.keys), run.config.seed)


def _chain(run: Run, key: str, table: RecordTable) -> tuple[Target, ...]:
    """The slices of one cluster in the order of tuning, one for each stage; the last is the one that predicts."""
    tuning, kept = run.config.tuning, run.config.checkpoints
    chain: list[Target] = []
    for job in stage_jobs(key, table.ids, table.rows, tuning, run.config.seed):
        parent = chain[-1].digest if chain else ""
        everyone = len(job.rows) == len(table)
        members = table if everyone else table.take(np.flatnonzero(np.isin(table.rows, job.rows)))
        chain.append(Target(digest(_recipe(run, key, members, job.stage, parent)), parent, job))
    snapshots = snapshot_steps(chain[-1].job, kept.every_epochs, kept.keep)
    chain[-1] = dataclasses.replace(chain[-1], job=dataclasses.replace(chain[-1].job, snapshots=snapshots))
    return tuple(chain)


def _recipe(run: Run, key: str, table: RecordTable, stage: int = 1, parent: str = "") -> dict:
    members = list(zip(table.ids, table.contents, table.labels.tolist(), strict=True))
    constants = (run.config.tuning, run.backbone.digest, run.spec, len(run.classes), run.config.seed)
    feature_batch = run.config.clustering.feature_batch if run.tuning_spec.on_features else 0
    return slices.recipe(key, members, *constants, stage, parent, feature_batch)


def _pins(
    run: Run, made: Mapping[str, SliceRow], entries: Mapping[str, str], leaving: frozenset[str]
) -> dict[str, str]:
    """The pins that hold, {cluster: slice reference}, given what the live records call for.

    One ends with its cluster, with its slice's checkpoint, and when a record is erased that was a member of the slice,
    or was sampled for the clustering that decided its members; unless the slice is called for all the same.
    """
    pins = run.catalog.pins()
    if not pins:
        return {}
    gone, hold = tainted(run, _leaving(run, leaving)), {}
    for key, ref in pins.items():
        name = slice_of(ref)
        shaped = name in gone.by_sample and entries.get(key) != name
        if key in entries and _exists(run, made, name) and name not in gone.by_member and not shaped:
            hold[key] = ref
    return hold


def _doubtful(run: Run, leaving: frozenset[str]) -> set[str]:
    """Clusters whose pin may end, so that what their records call for has to be looked up."""
    pins = run.catalog.pins()
    gone = tainted(run, _leaving(run, leaving)).all if pins else frozenset()
    return {key for key, ref in pins.items() if slice_of(ref) in gone}


def _leaving(run: Run, leaving: frozenset[str]) -> dict[str, int]:
    """{id: image row} of the records that count as erased and are not purged yet."""
    return run.catalog.erased() | run.catalog.rows(leaving)


def _exists(run: Run, made: Mapping[str, SliceRow], name: str, parents: bool = False) -> bool:
    """Whether a slice is known and on disk, with `parents` also those that it was tuned on from."""
    there = name in made and run.layout.slice(name).is_dir()
    return there and (not parents or not made[name].parent or _exists(run, made, made[name].parent, True))


def _missing(run: Run, made: Mapping[str, SliceRow], chain: tuple[Target, ...]) -> tuple[Target, ...]:
    """The end of a chain, from its first slice that does not exist."""
    gone = [index for index, target in enumerate(chain) if not _exists(run, made, target.digest)]
    return chain[gone[0] :] if gone else ()
