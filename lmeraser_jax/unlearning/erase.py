"""Erasure requests: what one would cost, and serving those that were accepted (paper 4.3 and 5.3).

Erasing is two things: records are marked erased in one transaction (`store.requests.accept`), and the workdir
is reconciled with the records that are left. Requests that wait are served together, in one reconcile.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lmeraser_jax.storage import requests
from lmeraser_jax.storage.requests import Request, Targets
from lmeraser_jax.storage.rows import SliceKind
from lmeraser_jax.unlearning.build import BuildReport, build
from lmeraser_jax.unlearning.plan import plan
from lmeraser_jax.unlearning.run import Run


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
    """A request, its receipt, and what serving it did; `outcome` is None while it waits, or if it was served before."""

    request: Request
    outcome: BuildReport | None
    receipt: Path

    @property
    def records(self) -> int:
        """Records that this request erased."""
        return len(self.request.body["records"])

    @property
    def erased_before(self) -> int:
        return len(self.request.body["erased_before"])


def estimate(run: Run, targets: Targets) -> Estimate:
    """What erasing the targets would cost. Changes nothing but the feature cache."""
    wanted = plan(run, targets.live)
    rows = run.catalog.slices().values()
    images, seconds = sum(row.images for row in rows), sum(row.seconds for row in rows)
    before, devices = run.catalog.manifest(), run.team.size * run.mesh.size
    return Estimate(
        records=len(targets.live),
        clusters=tuple(sorted(set(wanted.missing) - {SliceKind.COMMON})),
        vanishing=tuple(sorted(set(before.clusters) - set(wanted.entries))) if before else (),
        images=wanted.images_missing,
        images_full=wanted.images_full,
        seconds=wanted.images_missing * seconds / images / devices if images else 0.0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
    )


def request_erasure(
    run: Run,
    ids: Sequence[str] = (),
    owners: Sequence[str] = (),
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
    defer: bool = False,
    contents: Sequence[str] = (),
) -> Erasure:
    """Erases records and brings the workdir to the state of never having had them.

    Args:
        run: opened; for writing unless `defer`.
        ids, owners, request, requester, reason, quarantine, contents: see `store.requests.accept`.
        defer: only accept; `process` serves all that wait.

    Raises:
        UserError: the request cannot be accepted, or a cluster's loss was not finite (the request stays open).
    """
    assert run.writable or defer, "serving a request needs a run that holds the writer lock"
    accepted = requests.accept(run.catalog, ids, owners, request, requester, reason, quarantine, contents)
    return Erasure(accepted, None, run.layout.receipt(accepted.id)) if defer else serve(run, accepted.id)


def serve(run: Run, name: str) -> Erasure:
    """Serves an accepted request, and with it all others that wait; one that was served before stays as it is.

    Raises:
        UserError: a cluster's loss was not finite; the request stays open.
    """
    request = requests.get(run.catalog, name)
    assert request is not None, f"{name} was not accepted"
    if not request.open:
        return Erasure(request, None, run.layout.receipt(name))
    outcome, finished = process(run)
    return Erasure(next(done for done in finished if done.id == name), outcome, run.layout.receipt(name))


def process(run: Run) -> tuple[BuildReport, list[Request]]:
    """Serves every request that waits, in one reconcile (paper 5.3, batch unlearning).

    Returns:
        What was done, and the requests that it finished, oldest first.
    """
    known = len(run.catalog.receipts())
    outcome = build(run)
    finished = [requests.get(run.catalog, link.request) for link in run.catalog.receipts()[known:]]
    return outcome, [request for request in finished if request is not None]
