"""Erasure requests: who is meant, what it would cost, and doing it (paper 4.3).

Erasing is two things: records are marked erased in one transaction, and the workdir is reconciled with
the records that are left.
"""

import dataclasses
import uuid
from collections.abc import Sequence

from lmeraser_jax.errors import UserError, some
from lmeraser_jax.reconcile import Outcome, plan, reconcile
from lmeraser_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Targets:
    """The records that a request names."""

    live: tuple[str, ...]
    erased: tuple[str, ...]  # erased before: nothing to do for them
    pending: tuple[str, ...]  # accepted before, not finished: done with the next reconcile


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a request would do; nothing is changed to find out."""

    records: int
    clusters: tuple[str, ...]  # keys of the clusters that would be tuned
    vanishing: tuple[str, ...]  # published keys that would no longer exist
    images: int
    images_full: int
    seconds: float
    reclustered: bool


@dataclasses.dataclass(frozen=True)
class Erasure:
    """What a request did."""

    request: str
    records: int
    erased_before: int
    outcome: Outcome


def resolve(run: Run, ids: Sequence[str], owner: str = "") -> Targets:
    """Looks up what a request names.

    Args:
        run: an opened workdir.
        ids: record ids.
        owner: also all records of this owner, hold-out and test images included.

    Raises:
        UserError: lists every unknown id; nothing is erased then.
    """
    names = list(dict.fromkeys(ids))
    if owner:
        owned = run.catalog.owned(owner)
        if not owned:
            raise UserError(f"--owner={owner}: owns no live record (unknown, or erased before); nothing is erased now")
        names = list(dict.fromkeys([*names, *owned]))
    known = run.catalog.known(names)
    pending = tuple(name for name in names if name in known and known[name][3])
    erased = tuple(name for name in names if name not in known and run.catalog.is_tombstoned(name))
    unknown = [name for name in names if name not in known and name not in erased]
    public = [name for name in known if known[name][0] == "public"]
    if unknown:
        raise UserError(
            f"unknown records: {some(unknown, 50)}; nothing is erased (lmeraser inspect --records lists the ids)"
        )
    if public:
        raise UserError(f"public records, which the backbone was trained on, cannot be erased: {some(public, 50)}")
    return Targets(tuple(name for name in names if name not in (*erased, *pending)), erased, pending)


def estimate(run: Run, targets: Targets) -> Estimate:
    """What erasing the targets would cost. Changes nothing but the feature cache."""
    wanted = plan(run, run.catalog.live("train").without(frozenset(targets.live)))
    rows = run.catalog.slices().values()
    images, seconds = sum(row.images for row in rows), sum(row.seconds for row in rows)
    before = run.catalog.manifest()
    return Estimate(
        records=len(targets.live),
        clusters=tuple(wanted.missing),
        vanishing=tuple(sorted(set(before.entries) - set(wanted.digests))) if before else (),
        images=wanted.images_missing,
        images_full=wanted.images_full,
        seconds=wanted.images_missing * seconds / images if images else 0.0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
    )


def erase(run: Run, targets: Targets) -> Erasure:
    """Erases records and brings the workdir to the state of never having had them.

    Args:
        run: opened for writing.
        targets: from `resolve`.
    """
    assert run.writable, "erase needs a run that holds the writer lock"
    request = uuid.uuid4().hex
    body = {"records": len(targets.live), "erased_before": len(targets.erased)}
    if targets.live:
        with run.catalog.transaction():
            run.catalog.set_request(request, "accepted", body)
            run.catalog.erase(targets.live)
    return Erasure(request, len(targets.live), len(targets.erased), reconcile(run))
