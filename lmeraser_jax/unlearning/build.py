"""The build: bring a workdir to the state that its live records call for.

Train is a build from empty, resume is a build, unlearn is "mark erased, build", audit is a build somewhere else and a
comparison. A slice is addressed by the digest of its recipe, so whatever an erasure does not touch is reused.
"""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Mapping

import numpy as np

from lmeraser_jax.data.record_table import check_pixel_hashes
from lmeraser_jax.errors import Damaged, raise_all
from lmeraser_jax.hashing import arrays_digest, canonical_json
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.atomic_files import remove_others
from lmeraser_jax.storage.ingest import image_file, store_edits
from lmeraser_jax.storage.rows import Manifest, SliceKind, images_of
from lmeraser_jax.training import waves
from lmeraser_jax.training.closed_form import has_sums, load_sums, solve
from lmeraser_jax.training.jobs import Target
from lmeraser_jax.training.lanes import efficiency
from lmeraser_jax.training.slice_files import WrittenSlice, load_orphan, write_slice, write_slices
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.tune import solved
from lmeraser_jax.unlearning.artifacts import AGAIN, load_slice, pack, reference, save_clustering, slice_of
from lmeraser_jax.unlearning.plan import Plan, current_plan
from lmeraser_jax.unlearning.publish import publish
from lmeraser_jax.unlearning.purge import purge
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build did."""

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
    adopted: int  # slices that an earlier command had written, but was killed before it registered them
    images_spared: int  # of the clusters that were published and that no erased record was in; 0 if none was erased
    images_changed: int  # of these, where another slice is in the cluster's place: a new clustering's doing

    @property
    def ratio(self) -> float:
        """Images processed / images of a full re-tune."""
        return self.images / self.images_full if self.images_full else 0.0


def build(run: Run, only: Collection[str] | None = None) -> BuildReport:
    """Brings the workdir to the state that its live records call for.

    Order: tune what is missing, each slice on disk before it is registered; pack; publish in one transaction; purge. A
    kill at any point leaves the old or the new state, and the next build finishes. It serves the requests that were
    accepted when it planned; later ones wait for the next.

    Args:
        run: opened for writing.
        only: tune these cluster keys only. The published state then lacks slices: for audits in a scratch
            workdir, never for one that predicts.

    Raises:
        UserError: a cluster's loss was not finite; the other clusters are kept, nothing is published.
    """
    assert run.writable, "a build needs a run that holds the writer lock"
    start = time.perf_counter()
    remove_leftovers(run)
    before = run.catalog.manifest()
    wanted, registered = register_orphans(run, current_plan(run))
    missing = wanted.missing
    if only is not None:
        missing = {key: target for key, target in missing.items() if key in only}
    requests.advance(run.catalog, wanted.requests, "planned")
    if missing:
        requests.advance(run.catalog, wanted.requests, "re-tuning")
    tune_missing(run, wanted, missing)
    if not wanted.clustering_unchanged:
        save_clustering(run.layout, wanted.clustering)
    if only is None:
        pack(run, wanted.entries)
    report = _report(run, wanted, missing, before, registered, time.perf_counter() - start)
    version = publish(run, wanted, before, report.published, report.seconds)
    purge(run)
    report = dataclasses.replace(report, version=version, seconds=time.perf_counter() - start)
    run.log("build", **dataclasses.asdict(report))
    return report


def _report(
    run: Run, wanted: Plan, missing: Mapping[str, Target], before: Manifest | None, registered: int, seconds: float
) -> BuildReport:
    jobs = [target.job for target in missing.values()]
    clusters = wanted.entries.keys() - {SliceKind.COMMON}
    new = (wanted.clustering.digest, wanted.recipe_constants_digest, wanted.entries)
    changed = before is None or (before.clustering, before.recipe_constants_digest, before.entries) != new
    lanes = run.processes.count * run.mesh.size * run.config.tuning.lanes
    spared, altered = _spared(run, wanted, before)
    return BuildReport(
        clusters=len(clusters),
        retuned=len(missing.keys() - {SliceKind.COMMON}),
        reused=len(clusters - missing.keys()),
        images=sum(job.images for job in jobs),
        images_full=wanted.images_full,
        seconds=seconds,
        efficiency=efficiency(jobs, lanes, run.config.tuning.batch),
        published=changed or bool(wanted.moved),  # new members of a pinned cluster change no entry
        version=before.version if before else 0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
        adopted=registered,
        images_spared=spared,
        images_changed=altered,
    )


def _spared(run: Run, wanted: Plan, before: Manifest | None) -> tuple[int, int]:
    """Images of the published clusters that no erased record was in, and of those that change all the same."""
    hit = run.catalog.touched() - {""}
    if before is None or not hit:
        return 0, 0
    images = {key: images_of(wanted.slices, ref) for key, ref in before.clusters.items() if key not in hit}
    altered = (images[key] for key in images if wanted.entries.get(key) != before.entries[key])
    return sum(images.values()), sum(altered)


def remove_leftovers(run: Run) -> None:
    """Removes what a killed writer left: scratch, image rows without a record. `register_orphans` looks at slices.

    Then the corrected versions of records become live.
    """
    remove_others(run.layout.scratch, set())
    store_edits(image_file(run.layout, run.catalog), run.catalog)


def register_orphans(run: Run, wanted: Plan) -> tuple[Plan, int]:
    """Registers slices that were written but not registered, where the plan calls for them, and removes all others.

    A slice's digest names its members, so one that an erased record helped to make is never called for. Returns the
    plan without what is no longer missing, and the number of slices registered.
    """
    slices, missing = dict(wanted.slices), dict(wanted.missing)
    for key, target in wanted.missing.items():
        tuning_spec = run.common_spec if key == SliceKind.COMMON else run.tuning_spec
        orphan = load_orphan(run.layout.slices, target, run.fingerprint, tuning_spec)
        if orphan is not None:
            register(run, wanted, orphan)
            slices[orphan.row.digest] = orphan.row
            del missing[key]
    remove_others(run.layout.slices, set(slices))
    return dataclasses.replace(wanted, missing=missing, slices=slices), len(wanted.missing) - len(missing)


def register(run: Run, wanted: Plan, written: WrittenSlice) -> None:
    """Registers a slice on disk, and its snapshots. Raises `Damaged`, and registers nothing, if it cannot be read."""
    with run.catalog.transaction():
        row = written.row._replace(clustering=wanted.clustering.digest)
        run.catalog.add_slice(row, written.rows, written.epochs)
        for step in (0, *written.epochs):
            load_slice(run, reference(row.digest, step))


def tune_missing(run: Run, wanted: Plan, missing: Mapping[str, Target]) -> None:
    """Makes slices, each saved and registered at once. Raises `UserError` that names clusters with infinite numbers."""
    clusters = {key: target for key, target in missing.items() if key != SliceKind.COMMON}
    failures = _tune(run, wanted, run.tuning_spec, clusters)
    if SliceKind.COMMON in missing:
        failures += _tune(run, wanted, run.common_spec, {SliceKind.COMMON: missing[SliceKind.COMMON]})
    heading = "the loss became infinite or not a number; nothing is published. Lower --config.tuning.prompt_rate"
    raise_all(failures, f"{heading} or --config.tuning.head_rate:")


def _tune(run: Run, wanted: Plan, tuning_spec: TuningSpec, missing: Mapping[str, Target]) -> list[str]:
    """Makes the slices of one kind; returns a line for each whose numbers are not finite."""
    labels = np.zeros(run.catalog.rows_used(), np.int32)
    for key, target in missing.items():
        labels[target.job.rows] = wanted.members[key].labels
    targets = [target for target in missing.values() if not _subtract(run, wanted, tuning_spec, target, labels)]
    for target in targets:
        check_pixel_hashes(run.images, wanted.members[target.job.key])
        if tuning_spec.on_features:
            run.features(wanted.members[target.job.key])  # into the cache, which `training_rows` shows
    if not targets:
        return []
    jobs = [target.job for target in targets]
    context = {"workdir": str(run.layout.root), "fingerprint": run.fingerprint}
    tune_own = run.tune_own(tuning_spec, run.training_rows(tuning_spec), labels)
    results = waves.make_slices(run.processes, context, tuning_spec, jobs, labels, tune_own)
    failures = []
    writing = write_slices(run.layout.slices, targets, results, run.fingerprint, tuning_spec.tuning)
    with contextlib.closing(writing):
        for written in writing:
            if written.failed_at is None:
                register(run, wanted, written)
            else:
                row = written.row
                failures.append(f"cluster {row.cluster[:12]} ({row.size} members) at step {written.failed_at}")
    return failures


def _subtract(run: Run, wanted: Plan, tuning_spec: TuningSpec, target: Target, labels: np.ndarray) -> bool:
    """Makes a closed form from the sums beside the slice in its place, less the records that left.

    False where that is not possible or not exact, so that the slice has to be made from its members.
    """
    start, before, tuning = time.perf_counter(), run.catalog.manifest(), tuning_spec.tuning
    if not has_sums(tuning) or before is None:
        return False
    old = wanted.slices.get(slice_of(before.entries.get(target.job.key, "")))
    if old is None or (old.fingerprint, old.tuning) != (run.fingerprint, canonical_json(dataclasses.asdict(tuning))):
        return False  # no slice, or one of other features or settings
    sums, file = load_sums(run.layout.slice(old.digest)), run.feature_file()
    if sums is None or not len(file):
        return False
    if arrays_digest(checkpoints.flatten(solve(tuning, sums.total)[0])) != old.params_digest:
        return False
    sums = sums.without(target.job.rows, labels, file.view())
    if sums is None:
        return False
    tuned = solved(target.job, *solve(tuning, sums.total), start, sums)
    written = write_slice(run.layout.slices, target, tuned, (), run.fingerprint, tuning)
    if written.failed_at is None:
        register(run, wanted, written)
    return written.failed_at is None


def repair(run: Run) -> list[str]:
    """Drops published slices that are missing or damaged, with a message for each; the next build tunes them again."""
    manifest, messages = run.catalog.manifest(), []
    for ref in sorted(set(manifest.entries.values()) if manifest else ()):
        try:
            load_slice(run, ref)
        except Damaged as error:
            messages.append(f"{str(error).removesuffix(AGAIN)}; it is tuned again")
            with run.catalog.transaction():
                run.catalog.drop_slice(slice_of(ref))
    return messages
