"""Rollback of one cluster to an earlier slice of its own: from another config, fewer records, or an earlier epoch.

A rollback pins the cluster: it keeps the slice until it is unpinned or a record that the slice depends on is erased.
Versions that an erased record was part of have been purged; asking for one names the erasure that removed it.
"""

import dataclasses
import json
from typing import TYPE_CHECKING

from lmeraser_jax.errors import UserError, join_limited, shorten
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning.artifacts import load_slice, reference, slice_of, tainted
from lmeraser_jax.unlearning.binding import refuse_misfits

if TYPE_CHECKING:  # both load JAX, which refusing a flag does without
    from lmeraser_jax.unlearning.build import BuildReport
    from lmeraser_jax.unlearning.run import Run

SHORTEST = 4  # characters of a cluster key or a slice digest that are enough, if no other begins with them


@dataclasses.dataclass(frozen=True)
class Version:
    """One slice that a cluster can have."""

    ref: str  # slice reference
    versions: tuple[int, ...]  # the published states that use it, newest first
    epoch: int  # whole epochs that its members were seen
    members: int  # records that it was tuned on
    created: float  # seconds since 1970
    current: bool  # the published state uses it now
    pinned: bool  # by a rollback


def cluster_key(catalog: Catalog, text: str) -> str:
    """The published cluster that a key, or the beginning of one, means."""
    manifest = catalog.manifest()
    keys = list(manifest.clusters) if manifest else []
    if not keys:
        raise UserError("nothing is published, so there is no cluster to roll back; run: lmeraser train")
    matches = [key for key in keys if key.startswith(text)] if len(text) >= SHORTEST else []
    if len(matches) == 1:
        return matches[0]
    problem = "means several clusters" if matches else "is no published cluster"
    legal = join_limited((key[:12] for key in matches or keys), 20)
    raise UserError(f"--cluster={shorten(text)!r}: {problem}; legal: {legal}")


def versions(catalog: Catalog, key: str) -> list[Version]:
    """What a published cluster can be rolled back to, and what it has now: newest first."""
    manifests, rows, pin = catalog.manifests(), catalog.slices(), catalog.pins().get(key)
    current = manifests[0].entries.get(key) if manifests else None
    users: dict[str, list[int]] = {}
    for manifest in manifests:
        if key in manifest.entries:
            users.setdefault(manifest.entries[key], []).append(manifest.version)
    listed = []
    for name in dict.fromkeys(slice_of(ref) for ref in users if slice_of(ref) in rows):
        row, batch = rows[name], json.loads(rows[name].tuning)["batch"]
        for step in (0, *sorted(catalog.epochs(name), reverse=True)):
            ref, epoch = reference(name, step), (step or row.steps) * batch // row.size
            states = tuple(users.get(ref, ()))
            listed.append(Version(ref, states, epoch, row.size, row.created, ref == current, ref == pin))
    return listed


def rollback(run: "Run", key: str, to: str = "") -> "tuple[Version, BuildReport]":
    """Pins a cluster to an earlier slice and publishes that.

    Args:
        run: opened for writing.
        key: a published cluster.
        to: number of a published state, epoch:E, or a slice reference or the beginning of one; empty: the slice
            that the cluster had before its present one.

    Raises:
        UserError: there is no such version, it was erased, has another shape than the slices of the other clusters, or
            its checkpoint is damaged. Nothing is changed then.
    """
    from lmeraser_jax.unlearning.build import build

    assert run.writable, "a rollback needs a run that holds the writer lock"
    version = choose(run.catalog, key, to)
    if slice_of(version.ref) in tainted(run, run.catalog.erased()).all:
        waiting = join_limited((request.id for request in requests.listed(run.catalog, only_open=True)), 5)
        reason = f"was made with records that a waiting erasure removes ({waiting}); serve it first: lmeraser process"
        raise UserError(f"--to={to}: slice {version.ref[:12]} {reason}")
    refuse_misfits(run.catalog, run.config.tuning, [version.ref])
    load_slice(run, version.ref)
    with run.catalog.transaction():
        run.catalog.pin(key, version.ref)
        _add_event(run.catalog, "rollback", key, version.ref)
    outcome = build(run)
    if run.catalog.pins().get(key) != version.ref:
        raise UserError(
            f"cluster {key[:12]}: the rollback ended at once, because an erasure that was accepted meanwhile reaches"
            " the slice, or records that waited to join removed the cluster"
        )
    return version, outcome


def unpin(run: "Run", key: str) -> "BuildReport":
    """Gives a pinned cluster the slice again that its records and the config call for. Raises as `pinned` does."""
    from lmeraser_jax.unlearning.build import build

    ref = pinned(run.catalog, key)
    with run.catalog.transaction():
        run.catalog.unpin([key])
        run.catalog.invalidate_plan()
        _add_event(run.catalog, "unpin", key, ref)
    return build(run)


def pinned(catalog: Catalog, key: str) -> str:
    """The reference that a cluster is pinned to. Raises `UserError` where it is not pinned."""
    pins = catalog.pins()
    if key not in pins:
        others = join_limited((name[:12] for name in pins), 20) or "none"
        raise UserError(f"cluster {key[:12]} is not pinned; pinned: {others}")
    return pins[key]


def _add_event(catalog: Catalog, kind: str, key: str, ref: str) -> None:
    """Events outlive erasures; keys and digests depend on ids, so they are salted."""
    catalog.event(kind, cluster=catalog.salted("cluster", key), slice=catalog.salted("slice", ref))


def choose(catalog: Catalog, key: str, to: str) -> Version:
    """The version that `--to` names; without one the newest that is not current. Raises `UserError` otherwise."""
    known = versions(catalog, key)
    matches = _matches(known, to)
    if len(matches) == 1 or matches and not to:
        return matches[0]
    if not to:
        raise UserError(f"cluster {key[:12]} has no other version{_erased_by(catalog, to)}")
    legal = (f"{','.join(map(str, v.versions)) or '-'} = {v.ref[:12]} (epoch:{v.epoch})" for v in known)
    problem = "means several versions"
    if not matches:
        problem = f"is no version of cluster {key[:12]}{_erased_by(catalog, to)}"
    raise UserError(f"--to={shorten(to)}: {problem}; legal: {join_limited(legal, 20)}")


def _matches(known: list[Version], to: str) -> list[Version]:
    """The versions that a state's number, epoch:E, or a reference or the beginning of one names."""
    if not to:
        earlier = [version for version in known if not version.current]
        return [version for version in earlier if version.versions] or earlier
    if to.isdecimal():
        return [version for version in known if int(to) in version.versions]
    if to.startswith("epoch:") and to[6:].isdecimal():
        matches = [version for version in known if version.epoch == int(to[6:])]
        return [version for version in matches if slice_of(version.ref) == slice_of(matches[0].ref)]
    exact = [version for version in known if version.ref == to]
    if exact or len(to) < SHORTEST:
        return exact
    return [version for version in known if version.ref.startswith(to) and "@" not in version.ref]


def _erased_by(catalog: Catalog, to: str) -> str:
    """Which erasures removed the version that `--to` names, or any version where it names none."""
    slice_, names = catalog.salted("slice", to.partition("@")[0]), []
    for request in requests.listed(catalog):
        states, slices = request.body["purged"]["manifests"], request.body["purged"]["slices"]
        if (states and not to) or (to.isdecimal() and int(to) in states) or slice_ in slices:
            names.append(request.id)
    reason = f": what came before was made with records that were erased (request {join_limited(names, 5)})"
    return reason if names else ""
