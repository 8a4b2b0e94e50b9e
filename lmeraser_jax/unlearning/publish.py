"""Publication: one transaction makes a planned state the current one and says what it did for each request."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from lmeraser_jax.storage import requests
from lmeraser_jax.storage.requests import Request
from lmeraser_jax.storage.rows import Manifest, SliceKind
from lmeraser_jax.unlearning.artifacts import expected_params, sample_of, slice_of, was_sampled
from lmeraser_jax.unlearning.plan import Plan
from lmeraser_jax.unlearning.purge import dropped_versions, surviving
from lmeraser_jax.unlearning.run import Run


def publish(run: Run, wanted: Plan, before: Manifest | None, changed: bool, seconds: float) -> int:
    """One transaction: the manifest, every moved record's cluster, the served requests, their quarantine.

    Every slice of the plan is registered by now. `changed` says whether the plan differs from the published state,
    `seconds` what the build took so far, for the receipts. Returns the version of the published state.
    """
    catalog, served = run.catalog, wanted.requests
    version = before.version if before else 0
    with catalog.transaction():
        if changed:
            assert catalog.slices_of(catalog.erased(served)).isdisjoint(map(slice_of, wanted.entries.values()))
            constants, entries = wanted.recipe_constants_digest, dict(wanted.entries)
            version = catalog.publish(wanted.clustering.digest, run.fingerprint, constants, entries, wanted.moved)
            catalog.set_clustering(wanted.clustering.digest, wanted.required_slices)
            catalog.event("publish", version=version, clusters=len(wanted.entries))
        opened = requests.listed(catalog, only_open=True)
        waiting = [request for request in opened if request.id in served and request.state != "published"]
        work = _work(run, wanted, waiting) | {"seconds": round(seconds, 3)}
        removed = removal_summary(run, [request.id for request in waiting])
        old, new = before.entries if before else {}, wanted.entries
        pairs = {key: (old.get(key, ""), new.get(key, "")) for key in sorted({*old, *new})}
        changed_slices = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        sample = sample_of(run.layout, before.clustering) if before and waiting else frozenset()
        for request in waiting:
            facts = {"work": work, "clusters": _changes(run, request, changed_slices, sample), "purged": removed}
            facts["manifest"] = {"before": before.version if before else 0, "after": version}
            facts["members"] = {}  # names clusters, and a cluster's name is a digest of its sampled ids
            requests.advance(catalog, [request.id], "published", **facts)
        requests.lift_quarantine(catalog, served)
        requests.relocate(catalog, served)
        catalog.unpin(wanted.unpinned)
    return version


def _work(run: Run, wanted: Plan, waiting: Sequence[Request]) -> dict[str, Any]:
    """What was tuned for these requests since the first was accepted, also by attempts that were interrupted."""
    since = min((request.created for request in waiting), default=math.inf)
    slices = run.catalog.slices()
    rows = [slices[target.digest] for target in wanted.targets.values() if target.digest in slices]
    rows = [row for row in rows if row.created >= since]
    return {
        "images": sum(row.images for row in rows),
        "steps": sum(row.steps for row in rows),
        "clusters_tuned": len({row.cluster for row in rows}),
        "images_full": wanted.images_full,
        "program": run.fingerprint,
        "batch": [request.id for request in waiting],
    }


def removal_summary(run: Run, served: Collection[str]) -> dict[str, Any]:
    """What the purge is about to remove, as receipts say it: salted hashes and counts."""
    catalog, survivors = run.catalog, surviving(run, served)
    clusterings = {path.name for path in run.layout.clusterings.iterdir()} - survivors.clusterings
    return {
        "slices": sorted(catalog.salted("slice", name) for name in set(catalog.slices()) - survivors.slices),
        "clusterings": sorted(catalog.salted("clustering", name) for name in clusterings),
        "manifests": dropped_versions(catalog, survivors),
        "rows": len(catalog.erased(served)),
    }


def _changes(
    run: Run, request: Request, changed: Mapping[str, tuple[str, str]], sample: Set[str] | None
) -> list[dict[str, Any]]:
    """The clusters that a request's records reached, why, and their slices before and after.

    All salted: digests of ids and of members must not outlive a later erasure of one of them. `changed` has all
    clusters with another slice than before, {key: (before, after)}, sorted; `sample` is that of the clustering before.
    """
    salted, members = run.catalog.salted, request.body["members"]
    names = run.catalog.erased([request.id]).values()
    sampled = was_sampled(sample, names)
    arrived = Counter(run.catalog.clusters_of(names).values())  # with their new versions, if they have any
    changes = []
    for key, (old, new) in changed.items():
        reached = len(request.body["records"]) if key == SliceKind.COMMON else members.get(key, 0) or arrived[key]
        if not (sampled or reached):
            continue
        changes.append(
            {
                "cluster": salted("cluster", key),
                "why": "member" if reached else "re-cluster",
                "records": reached,
                "before": salted("slice", old) if old else "",
                "after": salted("slice", new) if new else "",
                "params": salted("params", expected_params(run.catalog, new) or "") if new else "",
            }
        )
    return changes
