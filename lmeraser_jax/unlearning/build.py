"""The build: bring a workdir to the state that its live records call for.

Train is reconcile from empty, resume is reconcile, unlearn is "mark erased, reconcile", audit is
reconcile somewhere else and compare. A slice is addressed by the digest of its recipe, so whatever an
erasure does not touch is found again instead of made again.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lmeraser_jax.data.record_table import check_pixel_hashes
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.hashing import arrays_digest, canonical_json
from lmeraser_jax.storage import checkpoints, requests, scratch
from lmeraser_jax.storage.atomic_files import remove_others
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.requests import Request
from lmeraser_jax.storage.rows import Manifest, SliceKind, images_of
from lmeraser_jax.training.closed_form import head, load_sums
from lmeraser_jax.training.fingerprint import fingerprint
from lmeraser_jax.training.jobs import Target, efficiency
from lmeraser_jax.training.making import solved
from lmeraser_jax.training.slice_files import Made, SliceTask, load_orphan, share_slices, written
from lmeraser_jax.training.tune import TuningSpec
from lmeraser_jax.unlearning.artifacts import (
    AGAIN,
    expected_params,
    load_slice,
    save_clustering,
    slice_of,
    tainted,
    was_sampled,
)
from lmeraser_jax.unlearning.plan import Plan, plan
from lmeraser_jax.unlearning.purge import purge, surviving, with_parents
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class BuildReport:
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
    adopted: int  # slices that an earlier command had written, but was killed before it registered them
    images_spared: int  # of the clusters that were published and that no erased record was in; 0 if none was erased
    images_changed: int  # of these, where another slice is in the cluster's place: a new clustering's doing

    @property
    def ratio(self) -> float:
        """Images processed / images of a full re-tune."""
        return self.images / self.images_full if self.images_full else 0.0


def build(run: Run, only: Collection[str] | None = None) -> BuildReport:
    """Brings the workdir to the state that its live records call for.

    Order: tune what is missing, each slice on disk before it is registered; wait for every process; publish in one
    transaction; purge. A kill at any point leaves the old or the new state, and the next reconcile finishes. It
    serves the requests that were accepted when it planned; later ones wait for the next.

    Args:
        run: opened for writing.
        only: tune these cluster keys only. The published state then lacks slices: for audits in a scratch
            workdir, never for one that predicts.

    Raises:
        UserError: a cluster's loss was not finite; the other clusters are kept, nothing is published.
    """
    assert run.writable, "reconcile needs a run that holds the writer lock"
    start = time.perf_counter()
    sweep(run)
    before = run.catalog.manifest()
    wanted, adopted = register_orphans(run, plan(run))
    served = wanted.requests
    requests.advance(run.catalog, served, "planned")
    missing = {key: chain for key, chain in wanted.missing.items() if only is None or key in only}
    jobs = [target.job for chain in missing.values() for target in chain]
    if jobs:
        requests.advance(run.catalog, served, "re-tuning")
    _tune_missing(run, wanted, missing)
    if not wanted.clustering_unchanged:
        save_clustering(run.layout, wanted.clustering)
    changed = before is None or (before.clustering, before.recipe_constants_digest, before.entries) != (
        wanted.clustering.digest,
        wanted.recipe_constants_digest,
        wanted.entries,
    )
    changed = changed or bool(wanted.moved)  # new members of a pinned cluster change no entry
    lanes = run.team.size * run.mesh.size * run.config.tuning.lanes
    spared, altered = _spared(run, wanted, before)
    outcome = BuildReport(
        clusters=len(wanted.entries.keys() - {SliceKind.COMMON}),
        retuned=len(missing.keys() - {SliceKind.COMMON}),
        reused=len(wanted.entries.keys() - missing.keys() - {SliceKind.COMMON}),
        images=sum(job.images for job in jobs),
        images_full=wanted.images_full,
        seconds=time.perf_counter() - start,
        efficiency=efficiency(jobs, lanes, run.config.tuning.batch),
        published=changed,
        version=before.version if before else 0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
        adopted=adopted,
        images_spared=spared,
        images_changed=altered,
    )
    version = _publish(run, wanted, before, outcome, served)
    purge(run)
    outcome = dataclasses.replace(outcome, version=version, seconds=time.perf_counter() - start)
    run.log("reconcile", **dataclasses.asdict(outcome))
    return outcome


def sweep(run: Run) -> None:
    """Removes what a killed writer left: scratch, image rows without a record. `register_orphans` looks at slices.

    Afterwards no process of a command that is over can write into this workdir.
    """
    scratch.settle(run.layout)
    remove_others(run.layout.scratch, set())
    image_file(run.layout, run.catalog).truncate(run.catalog.rows_used())


def register_orphans(run: Run, wanted: Plan) -> tuple[Plan, int]:
    """Registers slices that were written but not registered, where the plan calls for them, and removes all others.

    A slice's digest names its members, so one that an erased record helped to make is never called for.

    Returns:
        The plan without what is no longer missing, and the number of slices registered.
    """
    missing, adopted = {}, 0
    program = fingerprint(run.config.tuning, run.mesh)
    for key, chain in wanted.missing.items():
        rest, problem = list(chain), run.common_spec if key == SliceKind.COMMON else run.tuning_spec
        while rest and (made := load_orphan(run.layout.root, rest[0], program, problem)) is not None:
            _keep(run, wanted, made)
            rest.pop(0)
        adopted += len(chain) - len(rest)
        if rest:
            missing[key] = tuple(rest)
    remove_others(run.layout.slices, set(run.catalog.slices()))
    return dataclasses.replace(wanted, missing=missing), adopted


def _spared(run: Run, wanted: Plan, before: Manifest | None) -> tuple[int, int]:
    """Images of the published clusters that no erased record was in, and of those that change all the same."""
    hit = set(run.catalog.clusters_of(run.catalog.erased(wanted.requests)).values())
    if before is None or not hit:
        return 0, 0
    made = run.catalog.slices()
    images = {key: images_of(made, ref) for key, ref in before.clusters.items() if key not in hit}
    altered = (images[key] for key in images if wanted.entries.get(key) != before.entries[key])
    return sum(images.values()), sum(altered)


def _tune_missing(run: Run, wanted: Plan, missing: Mapping[str, tuple[Target, ...]]) -> None:
    """Makes slices; each finished one is saved and registered at once, so that a kill loses little."""
    problem, common = run.tuning_spec, {key: chain for key, chain in missing.items() if key == SliceKind.COMMON}
    if run.config.tuning.one_head:
        problem = dataclasses.replace(problem, prompts=len(wanted.clustering.keys))
    failed = _make(run, wanted, problem, {key: chain for key, chain in missing.items() if key != SliceKind.COMMON})
    failed += _make(run, wanted, run.common_spec, common) if common else []
    raise_all(
        failed,
        "the loss became infinite or not a number; nothing is published. Lower --config.tuning.prompt_rate "
        "or --config.tuning.head_rate:"
        if failed
        else "",
    )


def _make(run: Run, wanted: Plan, problem: TuningSpec, missing: Mapping[str, tuple[Target, ...]]) -> list[str]:
    """Makes the slices of one kind; returns a line for each whose numbers are not finite."""
    labels, inputs, failed = np.zeros(run.catalog.rows_used(), np.int32), run.images, list[str]()
    for key, chain in missing.items():
        labels[chain[-1].job.rows] = wanted.members[key].labels
    program = fingerprint(run.config.tuning, run.mesh)
    features = run.feature_file(program).path if problem.on_features else None
    place = (run.layout.root, run.layout.slices)
    whole = SliceTask(*place, problem, run.backbone.digest, program, features, labels, ())
    if problem.tuning.closed:
        missing = {key: chain for key, chain in missing.items() if not _subtracted(run, wanted, whole, chain[-1])}
    for key in missing:
        check_pixel_hashes(run.images, wanted.members[key])
        inputs = run.training_data(wanted.members[key], problem)
    waiting: dict[str, tuple[Target, ...]] = dict(missing)
    while waiting:  # once, or once for each stage: a stage starts from the slice of the one before
        task = dataclasses.replace(whole, targets=tuple(_started(run, chain[0]) for chain in waiting.values()))
        with contextlib.closing(share_slices(run.team, task, run.backbone, inputs, run.mesh)) as shared:
            for made in shared:
                if made.failed_at is None:
                    _keep(run, wanted, made)
                else:
                    failed.append(f"cluster {made.row.cluster[:12]} ({made.row.size} members) at step {made.failed_at}")
                    waiting[made.row.cluster] = ()  # its later stages have nothing to start from
        waiting = {key: chain[1:] for key, chain in waiting.items() if len(chain) > 1}
    return failed


def _subtracted(run: Run, wanted: Plan, task: SliceTask, target: Target) -> bool:
    """Makes a closed form of the sums beside the slice in its place, less whoever left, where that is exact."""
    start, before, how = time.perf_counter(), run.catalog.manifest(), task.problem.tuning
    old = run.catalog.slice(slice_of(before.entries.get(target.job.key, ""))) if before is not None else None
    if old is None or (old.fingerprint, old.tuning) != (task.program, canonical_json(dataclasses.asdict(how))):
        return False  # no slice, or one of other features or settings
    surviving, file = load_sums(run.layout.slice(old.digest)), run.feature_file(task.program)
    if (
        surviving is None
        or arrays_digest(checkpoints.flatten(head(how, surviving.total)[0])) != old.params_digest
        or not len(file)
    ):
        return False
    surviving = surviving.without(target.job.rows, task.labels, file.view())
    if surviving is None:
        return False
    made = written(task, target, solved(target.job, *head(how, surviving.total), start, surviving), ())
    if made.failed_at is None:
        _keep(run, wanted, made)
    return made.failed_at is None


def _started(run: Run, target: Target) -> Target:
    """The target with the slice that it carries on from."""
    start = load_slice(run, target.parent) if target.parent else None
    return dataclasses.replace(target, job=dataclasses.replace(target.job, start=start))


def _keep(run: Run, wanted: Plan, made: Made) -> None:
    """Registers a slice that is on disk, and its snapshots."""
    with run.catalog.transaction():
        run.catalog.add_slice(made.row._replace(clustering=wanted.clustering.digest), made.rows)
        run.catalog.add_epochs(made.row.digest, made.epochs)


def _publish(run: Run, wanted: Plan, before: Manifest | None, outcome: BuildReport, served: Collection[str]) -> int:
    """One transaction: the manifest, every moved record's cluster, the served requests, their quarantine."""
    catalog, program = run.catalog, fingerprint(run.config.tuning, run.mesh)
    version = outcome.version
    with catalog.transaction():
        if outcome.published:
            assert tainted(run, catalog.erased(served)).by_member.isdisjoint(map(slice_of, wanted.entries.values()))
            version = catalog.publish(
                wanted.clustering.digest, program, wanted.recipe_constants_digest, wanted.entries, wanted.moved
            )
            catalog.set_clustering(wanted.clustering.digest, wanted.required_slices)
            catalog.event("publish", version=version, clusters=len(wanted.entries))
        waiting = [request for request in requests.listed(catalog, only_open=True) if request.id in served]
        waiting = [request for request in waiting if request.state != "published"]
        work = _work(run, wanted, waiting) | {
            "images_full": outcome.images_full,
            "seconds": round(outcome.seconds, 3),
            "program": program,
            "batch": [request.id for request in waiting],
        }
        purged = _removal_summary(run, [request.id for request in waiting])
        for request in waiting:
            facts = {"work": work, "clusters": _changes(run, request, wanted, before), "purged": purged}
            facts["manifest"] = {"before": before.version if before else 0, "after": version}
            facts["members"] = {}  # names clusters, and a cluster's name is a digest of its sampled ids
            requests.advance(catalog, [request.id], "published", list(facts.items()))
        requests.lift_quarantine(catalog, served)
        requests.relocate(catalog, served)
        catalog.unpin(wanted.unpinned)
    return version


def _work(run: Run, wanted: Plan, served: Sequence[Request]) -> dict[str, int]:
    """What was tuned for these requests since the first was accepted, also by attempts that were interrupted."""
    since = min((request.created for request in served), default=math.inf)
    made = run.catalog.slices()
    found = [made.get(target.digest) for chain in wanted.chains.values() for target in chain]
    rows = [row for row in found if row is not None and row.created >= since]
    images, steps = sum(row.images for row in rows), sum(row.steps for row in rows)
    return {"images": images, "steps": steps, "clusters_tuned": len({row.cluster for row in rows})}


def _removal_summary(run: Run, served: list[str]) -> dict[str, Any]:
    """What the purge is about to remove, as receipts say it: salted hashes and counts."""
    catalog, stays = run.catalog, surviving(run, served)
    versions = {manifest.version for manifest in stays.manifests}
    dropped = [manifest for manifest in catalog.manifests() if manifest.version not in versions]
    clusterings = {path.name for path in run.layout.clusterings.iterdir()} - stays.clusterings
    return {
        "slices": sorted(catalog.salted("slice", name) for name in set(catalog.slices()) - stays.slices),
        "clusterings": sorted(catalog.salted("clustering", name) for name in clusterings),
        "manifests": sorted(manifest.version for manifest in dropped),
        "rows": len(catalog.erased(served)),
    }


def _changes(run: Run, request: Request, wanted: Plan, before: Manifest | None) -> list[dict[str, Any]]:
    """The clusters that a request's records reached, why, and their slices before and after.

    All salted: digests of ids and of members must not outlive a later erasure of one of them.
    """
    salted = run.catalog.salted
    old, members = (before.entries if before else {}), request.body["members"]
    sampled = before is not None and was_sampled(run.layout, before.clustering, run.catalog.erased([request.id]))
    found = []
    for key in sorted(set(old) | set(wanted.entries)):
        new = wanted.entries.get(key, "")
        reached = len(request.body["records"]) if key == SliceKind.COMMON else members.get(key, 0)
        if old.get(key, "") == new or not (sampled or reached):
            continue
        found.append(
            {
                "cluster": salted("cluster", key),
                "why": "member" if reached else "re-cluster",
                "records": reached,
                "before": salted("slice", old[key]) if key in old else "",
                "after": salted("slice", new) if new else "",
                "params": salted("params", expected_params(run.catalog, new) or "") if new else "",
            }
        )
    return found


def repair(run: Run) -> list[str]:
    """Drops published slices that are missing or damaged, so that the next reconcile tunes them again.

    Returns:
        Messages, one per dropped slice.
    """
    manifest, messages = run.catalog.manifest(), []
    published = set(manifest.entries.values()) if manifest else set()
    for ref in sorted(published | with_parents(run.catalog, {slice_of(ref) for ref in published})):
        try:
            load_slice(run, ref)
        except UserError as error:
            messages.append(f"{str(error).removesuffix(AGAIN)}; it is tuned again")
            with run.catalog.transaction():
                run.catalog.drop_slice(slice_of(ref))
    return messages
