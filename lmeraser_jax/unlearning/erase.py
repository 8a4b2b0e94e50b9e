"""Requests to erase or rectify: what one would cost, and serving those that wait (paper 4.3 and 5.3).

`storage.requests.accept` marks records erased in one transaction; this needs neither JAX nor the writer lock. Then a
build brings the workdir to the state that the remaining records call for; it serves every request that waits.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lmeraser_jax.storage import requests
from lmeraser_jax.storage.requests import Request, Targets
from lmeraser_jax.storage.rows import SliceKind

if TYPE_CHECKING:  # both load JAX, which accepting a request does without
    from lmeraser_jax.unlearning.build import BuildReport
    from lmeraser_jax.unlearning.plan import Plan
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
    """A request and what serving it did."""

    request: Request
    outcome: "BuildReport | None"  # of the build that served it; None while it waits, or if it was served before
    receipt: Path  # exists once the request is purged

    @property
    def records(self) -> int:
        """Records that this request erased or replaced."""
        return len(self.request.body["records"])


def estimate(run: "Run", targets: Targets) -> Estimate:
    """What erasing the targets would cost. Changes nothing but the feature cache."""
    from lmeraser_jax.unlearning.plan import current_plan

    return estimate_of(run, current_plan(run, targets.live), len(targets.live))


def estimate_of(run: "Run", wanted: "Plan", records: int) -> Estimate:
    """What it would cost to bring the published state to a plan for so many changed records."""
    rows = run.catalog.slices().values()
    images, seconds = sum(row.images for row in rows), sum(row.seconds for row in rows)
    before, devices = run.catalog.manifest(), run.processes.count * run.mesh.size
    return Estimate(
        records=records,
        clusters=tuple(sorted(set(wanted.missing) - {SliceKind.COMMON})),
        vanishing=tuple(sorted(set(before.clusters) - set(wanted.entries))) if before else (),
        images=wanted.images_missing,
        images_full=wanted.images_full,
        seconds=wanted.images_missing * seconds / images / devices if images else 0.0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
    )


def request_erasure(
    run: "Run",
    ids: Iterable[str] = (),
    owners: Iterable[str] = (),
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
    defer: bool = False,
    contents: Iterable[str] = (),
) -> Erasure:
    """Erases records and brings the workdir to the state of never having had them.

    Args:
        run: opened; for writing unless `defer`.
        ids, owners, request, requester, reason, quarantine, contents: see `storage.requests.accept`.
        defer: only accept; `process` serves all requests that wait.

    Raises:
        UserError: the request cannot be accepted, or a cluster's loss was not finite (the request stays open).
    """
    assert run.writable or defer, "serving a request needs a run that holds the writer lock"
    accepted = requests.accept(run.catalog, ids, owners, request, requester, reason, quarantine, contents)
    return Erasure(accepted, None, run.layout.receipt(accepted.id)) if defer else serve(run, accepted.id)


def serve(run: "Run", name: str) -> Erasure:
    """Serves an accepted request, and with it all others that wait; one that was served before stays as it is."""
    request, outcome = requests.get(run.catalog, name), None
    assert request is not None, f"{name} was not accepted"
    if request.open:
        outcome, finished = process(run)
        request = next(served for served in finished if served.id == name)
    return Erasure(request, outcome, run.layout.receipt(name))


def process(run: "Run") -> "tuple[BuildReport, list[Request]]":
    """Serves every request that waits in one build (paper 5.3, batch unlearning); also gives those that it finished."""
    from lmeraser_jax.unlearning.build import build

    known = len(run.catalog.receipts())
    outcome = build(run)
    finished = (requests.get(run.catalog, link.request) for link in run.catalog.receipts()[known:])
    return outcome, [request for request in finished if request is not None]
