"""Erasure requests: what one would cost, and serving those that were accepted (paper 4.3 and 5.3).

Erasing is two things: records are marked erased in one transaction (`store.requests.accept`), and the workdir
is reconciled with the records that are left. Requests that wait are served together, in one reconcile.
"""

import dataclasses
import time
from collections.abc import Sequence

from lmeraser_jax.planning import plan
from lmeraser_jax.reconcile import Outcome, reconcile
from lmeraser_jax.run import Run
from lmeraser_jax.store import requests
from lmeraser_jax.store.requests import Request, Targets


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
    """A request and what serving it did; `outcome` is None while it waits, or if it was served before."""

    request: Request
    outcome: Outcome | None

    @property
    def records(self) -> int:
        """Records that this request erased."""
        return len(self.request.body["records"])

    @property
    def erased_before(self) -> int:
        return len(self.request.body["erased_before"])


@dataclasses.dataclass(frozen=True)
class Due:
    """Whether waiting requests are to be served now. `age` is the oldest one's, in seconds."""

    waiting: int
    age: float
    now: bool


def estimate(run: Run, targets: Targets) -> Estimate:
    """What erasing the targets would cost. Changes nothing but the feature cache."""
    wanted = plan(run, targets.live)
    rows = run.catalog.slices().values()
    images, seconds = sum(row.images for row in rows), sum(row.seconds for row in rows)
    before = run.catalog.manifest()
    return Estimate(
        records=len(targets.live),
        clusters=tuple(sorted(wanted.missing)),
        vanishing=tuple(sorted(set(before.entries) - set(wanted.entries))) if before else (),
        images=wanted.images_missing,
        images_full=wanted.images_full,
        seconds=wanted.images_missing * seconds / images if images else 0.0,
        reclustered=before is not None and before.clustering != wanted.clustering.digest,
    )


def request_erasure(
    run: Run,
    ids: Sequence[str] = (),
    owner: str = "",
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
    defer: bool = False,
) -> Erasure:
    """Erases records and brings the workdir to the state of never having had them.

    Args:
        run: opened; for writing unless `defer`.
        ids, owner, request, requester, reason, quarantine: see `store.requests.accept`.
        defer: only accept; `process` serves all that wait.

    Raises:
        UserError: the request cannot be accepted, or a cluster's loss was not finite (the request stays open).
    """
    assert run.writable or defer, "serving a request needs a run that holds the writer lock"
    accepted = requests.accept(run.catalog, ids, owner, request, requester, reason, quarantine)
    if defer or not accepted.open:
        return Erasure(accepted, None)
    outcome = reconcile(run)
    return Erasure(requests.get(run.catalog, accepted.id) or accepted, outcome)


def due(run: Run, max_wait: float = 0.0, max_batch: int = 1) -> Due:
    """Whether it is time to serve what waits.

    Args:
        run: opened.
        max_wait: seconds that the oldest request may wait.
        max_batch: serve at once when so many wait.
    """
    waiting = requests.listed(run.catalog, only_open=True)
    age = time.time() - waiting[0].created if waiting else 0.0
    return Due(len(waiting), age, bool(waiting) and (age >= max_wait or len(waiting) >= max_batch))


def process(run: Run) -> tuple[Outcome, list[Request]]:
    """Serves every request that waits, in one reconcile (paper 5.3, batch unlearning).

    Returns:
        What was done, and the requests that it finished.
    """
    names = [request.id for request in requests.listed(run.catalog, only_open=True)]
    outcome = reconcile(run)
    return outcome, [request for name in names if (request := requests.get(run.catalog, name))]
