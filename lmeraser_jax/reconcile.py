"""The build: given the live records, make what is missing, publish it, purge what may not exist.

Train is reconcile from empty, resume is reconcile, unlearn is "mark erased, reconcile", audit is reconcile
somewhere else and compare. A slice is addressed by the digest of its recipe, so whatever an erasure does
not touch is found again instead of made again.
"""

import contextlib
import dataclasses
import io
import time
import zipfile
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lmeraser_jax import clustering as clusters
from lmeraser_jax import slices
from lmeraser_jax.clustering import Clustering
from lmeraser_jax.digests import arrays_digest, digest, smallest_hashes
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.records.cache import RowFile
from lmeraser_jax.records.table import RecordTable
from lmeraser_jax.run import Run
from lmeraser_jax.schedule import Job, efficiency, make_job
from lmeraser_jax.slices import Slice
from lmeraser_jax.store import checkpoints
from lmeraser_jax.store.catalog import SliceRow
from lmeraser_jax.store.importing import image_file
from lmeraser_jax.store.layout import Layout, remove_others, write_bytes
from lmeraser_jax.tuning import Tuned, fingerprint, tune


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The state that some live records call for.

    Attributes:
        clustering: prototypes and keys.
        records: the private records, sorted by id.
        assignment: int32 [N], index of each record's cluster.
        digests: {cluster key: slice digest} of clusters that have members.
        missing: keys whose slice does not exist yet.
        jobs: {cluster key: job} of all clusters that have members.
        members: {cluster key: int64 positions in `records`}.
        settled: the clustering is the published one and lies on disk.
    """

    clustering: Clustering
    records: RecordTable
    assignment: np.ndarray
    digests: dict[str, str]
    missing: list[str]
    jobs: dict[str, Job]
    members: dict[str, np.ndarray]
    settled: bool

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.members.values()]

    @property
    def images_missing(self) -> int:
        """Images to pass forward and backward to make what is missing."""
        return sum(self.jobs[key].images for key in self.missing)

    @property
    def images_full(self) -> int:
        """The same for a full re-tune of every cluster."""
        return sum(job.images for job in self.jobs.values())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a reconcile did."""

    clusters: int
    retuned: int
    reused: int
    images: int
    images_full: int
    seconds: float
    efficiency: float  # real images / images processed, padding and idle lanes counted
    published: bool
    version: int
    reclustered: bool

    @property
    def ratio(self) -> float:
        """Images processed / images of a full re-tune."""
        return self.images / self.images_full if self.images_full else 0.0


def plan(run: Run, records: RecordTable) -> Plan:
    """What state the given live private records call for. Writes nothing but the feature cache."""
    clustering, settled = _clustering(run, records)
    assignment = _assignment(run, records, clustering, settled)
    members = {key: np.flatnonzero(assignment == k) for k, key in enumerate(clustering.keys) if (assignment == k).any()}
    digests = {key: digest(_recipe(run, key, records, rows)) for key, rows in members.items()}
    have = run.catalog.slices()
    missing = [key for key, name in digests.items() if name not in have or not run.layout.slice(name).is_dir()]
    jobs = {key: make_job(key, records.rows[rows], run.config.tuning) for key, rows in members.items()}
    return Plan(clustering, records, assignment, digests, missing, jobs, members, settled)


def _clustering(run: Run, records: RecordTable) -> tuple[Clustering, bool]:
    """The clustering of these records, and whether it is the published one."""
    k = run.config.clustering
    pool = records if k.sample_from == "private" else run.catalog.live("public")
    sample = tuple(smallest_hashes(run.config.seed, "sample", pool.ids, k.sample_size))
    place = {name: i for i, name in enumerate(pool.ids)}
    chosen = pool.take(np.array([place[name] for name in sample], np.int64))
    inputs = [dataclasses.asdict(k), dataclasses.asdict(run.spec), run.backbone.digest, sample, chosen.contents]
    name = digest(inputs)
    manifest = run.catalog.manifest()
    if manifest is not None and manifest.clustering == name:
        with contextlib.suppress(UserError):  # missing or damaged: made again
            return load_clustering(run.layout, name), True
    if not sample:
        width = run.backbone.config.feature_size
        return Clustering(name, (), np.zeros(0, np.int32), (), np.zeros((0, width), np.float32)), False
    return clusters.cluster(sample, run.features(chosen), k, name), False


def _assignment(run: Run, records: RecordTable, clustering: Clustering, settled: bool) -> np.ndarray:
    """Cluster index of each record: sampled ones by the tree, the others by the nearest prototype.

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


def _recipe(run: Run, key: str, records: RecordTable, rows: np.ndarray) -> dict:
    members = [(records.ids[i], records.contents[i], int(records.labels[i])) for i in rows]
    return slices.recipe(
        key, members, run.config.tuning, run.backbone.digest, run.spec, len(run.classes), run.config.seed
    )


def reconcile(run: Run, only: Collection[str] | None = None) -> Outcome:
    """Brings the workdir to the state that its live records call for.

    Order: tune what is missing, each slice on disk before it is registered; publish in one transaction;
    purge. A kill at any point leaves the old or the new state, and the next reconcile finishes.

    Args:
        run: opened for writing.
        only: tune these cluster keys only. The published state then lacks slices: for audits in a scratch
            workdir, never for one that predicts.

    Raises:
        UserError: a cluster's loss was not finite; the other clusters are kept, nothing is published.
    """
    assert run.writable, "reconcile needs a run that holds the writer lock"
    start = time.perf_counter()
    _sweep(run)
    wanted = plan(run, run.catalog.live("train"))
    missing = [key for key in wanted.missing if only is None or key in only]
    _tune_missing(run, wanted, missing)
    before = run.catalog.manifest()
    changed = before is None or (before.clustering, before.entries) != (wanted.clustering.digest, wanted.digests)
    if not wanted.settled:
        save_clustering(run.layout, wanted.clustering)
    _publish(run, wanted, changed)
    purge(run)
    after, lanes = run.catalog.manifest(), run.mesh.size * run.config.tuning.lanes
    outcome = Outcome(
        clusters=len(wanted.digests),
        retuned=len(missing),
        reused=len(wanted.digests) - len(missing),
        images=sum(wanted.jobs[key].images for key in missing),
        images_full=wanted.images_full,
        seconds=time.perf_counter() - start,
        efficiency=efficiency([wanted.jobs[key] for key in missing], lanes, run.config.tuning.batch),
        published=changed,
        version=after.version if after else 0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
    )
    run.log("reconcile", **dataclasses.asdict(outcome))
    return outcome


def _sweep(run: Run) -> None:
    """Removes what a killed writer left: unregistered slices, scratch, image rows without a record."""
    remove_others(run.layout.slices, set(run.catalog.slices()))
    remove_others(run.layout.scratch, set())
    image_file(run.layout, run.catalog).truncate(run.catalog.rows_used())


def _tune_missing(run: Run, wanted: Plan, missing: Sequence[str]) -> None:
    """Tunes clusters; each finished slice is saved and registered at once, so that a kill loses little."""
    if not missing:
        return
    labels = np.zeros(run.catalog.rows_used(), np.int32)
    labels[wanted.records.rows] = wanted.records.labels
    failed = []
    jobs = [wanted.jobs[key] for key in missing]
    for done in tune(run.problem, run.backbone, jobs, run.images, labels, run.mesh):
        if done.failed_at is not None:
            failed.append(f"cluster {done.job.key[:12]} ({len(done.job.rows)} members) at step {done.failed_at}")
        else:
            _keep(run, wanted, done)
    raise_all(
        failed,
        "the loss became infinite or not a number; nothing is published. Lower --config.tuning.prompt_rate "
        "or --config.tuning.head_rate:"
        if failed
        else "",
    )


def _keep(run: Run, wanted: Plan, done: Tuned) -> None:
    """Writes a slice to disk, then registers it."""
    key, name = done.job.key, wanted.digests[done.job.key]
    arrays = checkpoints.flatten(done.slice)
    row = SliceRow(
        digest=name,
        cluster=key,
        params=arrays_digest(arrays),
        size=len(done.job.rows),
        images=done.job.images,
        steps=done.job.steps,
        loss=done.loss,
        seconds=done.seconds,
        program=fingerprint(run.config.tuning, run.mesh),
        created=time.time(),
    )
    checkpoints.save(run.layout.slice(name), arrays, {"cluster": key, "params": row.params}, step=done.job.steps)
    with run.catalog.transaction():
        run.catalog.add_slice(row, done.job.rows)


def _publish(run: Run, wanted: Plan, changed: bool) -> None:
    """One transaction: the manifest, every record's cluster, and the open requests."""
    keys = wanted.clustering.keys
    with run.catalog.transaction():
        if changed:
            pairs = ((name, keys[k]) for name, k in zip(wanted.records.ids, wanted.assignment, strict=True))
            program = fingerprint(run.config.tuning, run.mesh)
            version = run.catalog.publish(wanted.clustering.digest, program, wanted.digests, pairs)
            run.catalog.event("publish", version=version, clusters=len(wanted.digests))
        for name, body in run.catalog.open_requests().items():
            run.catalog.set_request(name, "published", body)


def purge(run: Run) -> None:
    """Removes everything that was made with an erased record, then the record itself.

    What stays is what the surviving manifests point at: the current one, and older ones that no erased
    record was a member or a sampled record of. Files go first and the catalog last, so that a purge that was
    cut short is found again and repeated.
    """
    erased, tainted = run.catalog.erased(), set(run.catalog.tainted_slices())
    kept, dropped = [], []
    for manifest in run.catalog.manifests():
        clean = not tainted & set(manifest.entries.values()) and _readable_without(run, manifest.clustering, erased)
        (kept if clean or not kept else dropped).append(manifest)
    slices_kept = {name for manifest in kept for name in manifest.entries.values()}
    remove_others(run.layout.slices, slices_kept)
    remove_others(run.layout.clusterings, {manifest.clustering for manifest in kept})
    if erased:
        rows = np.array(sorted(erased.values()), np.int64)
        image_file(run.layout, run.catalog).overwrite(rows)
        for path in run.layout.records.glob("features-*.f32"):
            RowFile(path, (run.backbone.config.feature_size,), np.float32).overwrite(rows)
        run.layout.picture.unlink(missing_ok=True)
    with run.catalog.transaction():
        for manifest in dropped:
            run.catalog.drop_manifest(manifest.version)
        for name in set(run.catalog.slices()) - slices_kept:
            run.catalog.drop_slice(name)
        run.catalog.forget(erased)
        for name, body in run.catalog.open_requests().items():
            run.catalog.set_request(name, "purged", body)
    if erased:
        run.catalog.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _readable_without(run: Run, clustering: str, erased: Mapping[str, int]) -> bool:
    """Whether an older clustering is whole and none of the erased records was sampled for it."""
    try:
        return not set(load_clustering(run.layout, clustering).sample) & set(erased)
    except UserError:
        return False


def repair(run: Run) -> list[str]:
    """Drops published slices that are missing or damaged, so that the next reconcile tunes them again.

    Returns:
        Messages, one per dropped slice.
    """
    manifest, messages = run.catalog.manifest(), []
    for name in manifest.entries.values() if manifest else ():
        try:
            load_slice(run, name)
        except UserError as error:
            messages.append(f"{error}; it is tuned again")
            with run.catalog.transaction():
                run.catalog.drop_slice(name)
    return messages


def load_slice(run: Run, name: str) -> Slice:
    """One slice from its checkpoint, checked against the digest in the catalog.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    row = run.catalog.slice(name)
    if row is None:
        raise UserError(f"slice {name[:12]} is not in the catalog; lmeraser train on the same workdir makes it again")
    arrays, _, _ = checkpoints.load(run.layout.slice(name))
    if arrays_digest(arrays) != row.params:
        raise UserError(f"slice {name[:12]} of cluster {row.cluster[:12]} is damaged: its bytes have another digest")
    return Slice(**arrays)


def save_clustering(layout: Layout, clustering: Clustering) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        sample=np.array(clustering.sample, np.str_),
        labels=clustering.labels,
        keys=np.array(clustering.keys, np.str_),
        prototypes=clustering.prototypes,
    )
    write_bytes(layout.clustering(clustering.digest) / "clustering.npz", buffer.getvalue())


def load_clustering(layout: Layout, name: str) -> Clustering:
    """A saved clustering. Raises `UserError` when it is missing or damaged."""
    path = layout.clustering(name) / "clustering.npz"
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            sample, keys = (tuple(str(x) for x in file[field]) for field in ("sample", "keys"))
            return Clustering(name, sample, file["labels"], keys, file["prototypes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}; lmeraser train on the same workdir makes it again") from error
