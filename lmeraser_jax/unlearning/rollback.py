"""Rollback of one cluster to an earlier slice of its own: another config, fewer records, an earlier epoch.

Versions that an erased record was part of are gone; asking for one names the erasure that removed it. A cluster
that was rolled back is pinned: it stays as it is until it is unpinned or one of its members is erased.
"""

import dataclasses
import json

from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.unlearning.artifacts import load_slice, reference, slice_of, tainted
from lmeraser_jax.unlearning.build import BuildReport, build
from lmeraser_jax.unlearning.run import Run

SHORTEST = 4  # characters of a cluster key or a slice digest that are enough, if no other begins with them


@dataclasses.dataclass(frozen=True)
class Version:
    """One slice that a cluster can have.

    Attributes:
        ref: slice reference.
        versions: the published states that use it, newest first.
        epoch: whole epochs that its members were seen.
        members: records that it was tuned on.
        created: seconds since the epoch.
        current: the published state uses it now.
        pinned: by a rollback.
    """

    ref: str
    versions: tuple[int, ...]
    epoch: int
    members: int
    created: float
    current: bool
    pinned: bool


def cluster_key(catalog: Catalog, text: str) -> str:
    """The published cluster that a key, or the beginning of one, means."""
    manifest = catalog.manifest()
    keys = list(manifest.clusters) if manifest else []
    if not keys:
        raise UserError("nothing is published, so there is no cluster to roll back; run: lmeraser train")
    found = [key for key in keys if key.startswith(text)] if len(text) >= SHORTEST else []
    if len(found) != 1:
        what = "means several clusters" if found else "is no published cluster"
        raise UserError(
            f"--cluster={text[:80]!r}: {what}; legal: {join_limited((key[:12] for key in found or keys), 20)}"
        )
    return found[0]


def versions(run: Run, key: str) -> list[Version]:
    """What a cluster can be rolled back to, and what it has now: newest first.

    Args:
        run: an opened workdir.
        key: a published cluster.
    """
    catalog = run.catalog
    manifests, made, pin = catalog.manifests(), catalog.slices(), catalog.pins().get(key)
    users = {}
    for manifest in manifests:
        if key in manifest.entries:
            users.setdefault(manifest.entries[key], []).append(manifest.version)
    current = manifests[0].entries.get(key) if manifests else None
    found = []
    for name in dict.fromkeys(slice_of(ref) for ref in users):
        if name not in made:
            continue
        for step in (0, *sorted(catalog.epochs(name), reverse=True)):
            ref, row = reference(name, step), made[name]
            state = (tuple(users.get(ref, ())), _epoch(row, step or row.steps), row.size, row.created)
            found.append(Version(ref, *state, current=ref == current, pinned=ref == pin))
    return found


def _epoch(row: SliceRow, step: int) -> int:
    return step * json.loads(row.tuning)["batch"] // row.size if row.tuning else row.images // row.size


def rollback(run: Run, key: str, to: str = "") -> tuple[Version, BuildReport]:
    """Pins a cluster to an earlier slice and publishes that.

    Args:
        run: opened for writing.
        key: a published cluster.
        to: number of a published state, epoch:E, or a slice reference or the beginning of one; empty: the slice
            that the cluster had before its present one.

    Raises:
        UserError: there is no such version, it was erased, or its checkpoint is damaged. Nothing is changed then.
    """
    assert run.writable, "a rollback needs a run that holds the writer lock"
    if run.config.tuning.one_head:
        raise UserError(
            f"--config.tuning.method={run.config.tuning.method}: all clusters share one slice; none can go back"
        )
    chosen = _chosen(run, key, to)
    if slice_of(chosen.ref) in tainted(run, run.catalog.erased()).all:
        waiting = join_limited((request.id for request in requests.listed(run.catalog, only_open=True)), 5)
        raise UserError(
            f"--to={to}: slice {chosen.ref[:12]} was made with records that a waiting erasure removes ({waiting});"
            " serve it first: lmeraser process"
        )
    load_slice(run, chosen.ref)
    with run.catalog.transaction():
        run.catalog.pin(key, chosen.ref)
        _note(run.catalog, "rollback", key, chosen.ref)
    outcome = build(run)
    if run.catalog.pins().get(key) != chosen.ref:
        raise UserError(
            f"cluster {key[:12]}: the rollback ended at once: an erasure that was accepted meanwhile had a part in the"
            " slice, or records that waited to join did away with the cluster"
        )
    return chosen, outcome


def unpin(run: Run, key: str) -> BuildReport:
    """Gives a pinned cluster the slice again that its records and the config call for.

    Raises:
        UserError: the cluster is not pinned.
    """
    pins = run.catalog.pins()
    if key not in pins:
        raise UserError(
            f"cluster {key[:12]} is not pinned; pinned: {join_limited((name[:12] for name in pins), 20) or 'none'}"
        )
    with run.catalog.transaction():
        run.catalog.unpin([key])
        run.catalog.invalidate_plan()
        _note(run.catalog, "unpin", key, pins[key])
    return build(run)


def _note(catalog: Catalog, kind: str, key: str, ref: str) -> None:
    """An event that outlives erasures: keys and digests are those of ids, so they are salted."""
    catalog.event(kind, cluster=catalog.salted("cluster", key), slice=catalog.salted("slice", ref))


def _chosen(run: Run, key: str, to: str) -> Version:
    known = versions(run, key)
    earlier = [version for version in known if not version.current]
    if not to:
        former = [version for version in earlier if version.versions] or earlier
        if not former:
            raise UserError(f"cluster {key[:12]} has no other version{_gone(run.catalog)}")
        return former[0]
    if to.isdecimal():
        found = [version for version in known if int(to) in version.versions]
    elif to.startswith("epoch:") and to[6:].isdecimal():
        found = [version for version in known if version.epoch == int(to[6:])]
        found = [version for version in found if slice_of(version.ref) == slice_of(found[0].ref)]
    else:
        found = [version for version in known if version.ref == to]
        found = found or [v for v in known if len(to) >= SHORTEST and v.ref.startswith(to) and "@" not in v.ref]
    if len(found) == 1:
        return found[0]
    legal = join_limited(
        (f"{','.join(map(str, v.versions)) or '-'} = {v.ref[:12]} (epoch:{v.epoch})" for v in known), 20
    )
    reason = "means several versions" if found else f"is no version of cluster {key[:12]}{_gone(run.catalog, to)}"
    raise UserError(f"--to={to[:80]}: {reason}; legal: {legal}")


def _gone(catalog: Catalog, to: str = "") -> str:
    """Which erasures removed the version asked for, or any version where none was named."""
    salted = catalog.salted("slice", slice_of(to) if "@" not in to or to.split("@")[1].isdecimal() else to)
    names = []
    for request in requests.listed(catalog):
        purged = request.body.get("purged", {})
        numbers = purged.get("manifests", [])
        if (not to and numbers) or (to.isdecimal() and int(to) in numbers) or salted in purged.get("slices", []):
            names.append(request.id)
    if not names:
        return ""
    return f": what came before was made with records that were erased (request {join_limited(names, 5)})"
