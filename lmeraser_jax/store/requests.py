"""Erasure requests as the catalog keeps them: accepted in one transaction, followed to the purge.

Accepting needs no writer lock: a person's request is durable, and with quarantine in force, while another
process trains. Nothing here loads JAX.
"""

import dataclasses
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from lmeraser_jax.digests import digest
from lmeraser_jax.errors import UserError, raise_all, some
from lmeraser_jax.records.ids import lookalikes
from lmeraser_jax.store.catalog import Catalog

STATES = ("accepted", "planned", "re-tuning", "published", "purged")
LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST_TEXT = 500  # characters of a requester or a reason
EMPTY: dict[str, Any] = {
    **{"asked": "", "requester": "", "reason": "", "owner": "", "quarantine": False},
    **{"records": [], "erased_before": [], "shared": [], "members": {}, "states": []},
}


@dataclasses.dataclass(frozen=True)
class Targets:
    """The records that a request names.

    Attributes:
        live: ids that are erased with it.
        erased: ids that were erased before: nothing to do for them.
        pending: ids that another request, accepted before, erases.
        owner: the owner it names, "" for none.
    """

    live: tuple[str, ...]
    erased: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    owner: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """One erasure request.

    Attributes:
        id: given by whoever asked, or made up; the name of its receipt.
        created: seconds since the epoch.
        state: one of `STATES`.
        body: what the receipt will say; grows from state to state, holds salted hashes instead of ids.
    """

    id: str
    created: float
    state: str
    body: dict[str, Any]

    @property
    def open(self) -> bool:
        return self.state != "purged"


def resolve(catalog: Catalog, ids: Sequence[str], owner: str = "") -> Targets:
    """Looks up what a request names.

    Args:
        catalog: of the workdir.
        ids: record ids.
        owner: also all records of this owner, hold-out and test images included.

    Raises:
        UserError: lists every unknown id; nothing is erased then.
    """
    names = list(dict.fromkeys(ids))
    if owner:
        owned = catalog.owned(owner)
        if not owned and not catalog.is_tombstoned(owner, "owner"):
            raise UserError(f"--owner={owner}: owns no live record (unknown, or erased before); nothing is erased now")
        names = list(dict.fromkeys([*names, *owned]))
    known = catalog.known(names)
    erased = [name for name in names if name not in known and catalog.is_tombstoned(name)]
    pending = [name for name in names if name in known and known[name][3]]
    unknown = [name for name in names if name not in known and name not in set(erased)]
    public = [name for name in known if known[name][0] == "public"]
    if unknown:
        raise UserError(_unknown(catalog, unknown))
    if public:
        raise UserError(f"public records, which the backbone was trained on, cannot be erased: {some(public, 50)}")
    gone = {*erased, *pending}
    return Targets(tuple(name for name in names if name not in gone), tuple(erased), tuple(pending), owner)


def _unknown(catalog: Catalog, unknown: Sequence[str]) -> str:
    everyone = (row[0] for row in catalog.db.execute("SELECT id FROM records WHERE split!='public'"))
    near = [
        f"did you mean {some(known, 3)} (another Unicode form)?" for known in lookalikes(unknown, everyone).values()
    ]
    hint = " ".join([*near[:5], "(lmeraser inspect --records lists the ids)"])
    return f"unknown records: {some(unknown, 50)}; nothing is erased {hint}"


def accept(
    catalog: Catalog,
    ids: Sequence[str] = (),
    owner: str = "",
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
) -> Request:
    """Accepts an erasure in one transaction: its records are erased for every later build, and for good.

    Args:
        catalog: of the workdir; the writer lock is not needed.
        ids: record ids.
        owner: also everything of this owner; their later images are refused, too.
        request: an id that makes asking twice the same as asking once; made up where empty.
        requester, reason: kept in the receipt for good, so no personal data belongs here.
        quarantine: take the clusters of these records out of routing from this moment on.

    Returns:
        The request; the earlier one if its id was used before for the same erasure.

    Raises:
        UserError: unknown records, nothing named, an id in use for another erasure. Nothing is changed then.
    """
    raise_all(_illegal(ids, owner, request, requester, reason))
    name = request or f"r-{uuid.uuid4().hex[:20]}"
    asked = catalog.salted("asked", digest([sorted(set(ids)), owner]))
    with catalog.transaction():
        earlier = get(catalog, name)
        if earlier is not None:
            if earlier.body.get("asked") != asked:
                raise UserError(f"--request={name}: was used for another erasure; give this one another id, or none")
            return earlier
        targets = resolve(catalog, ids, owner)
        clusters = catalog.clusters_of(targets.live)
        body = EMPTY | {
            "asked": asked,
            "requester": requester,
            "reason": reason,
            "quarantine": quarantine,
            "records": [catalog.salted("tombstone", record) for record in targets.live],
            "erased_before": [catalog.salted("tombstone", record) for record in targets.erased],
            "shared": [catalog.salted("tombstone", record) for record in targets.pending],
            "owner": catalog.salted("owner", owner) if owner else "",
            "members": dict(sorted(Counter(clusters.values()).items())),
        }
        catalog.erase(targets.live, name)
        if owner:
            catalog.bury("owner", owner)
        if quarantine:
            touched = set(clusters.values()) | set(catalog.clusters_of(targets.pending).values())
            catalog.db.executemany("INSERT INTO quarantine VALUES(?,?)", [(key, name) for key in sorted(touched)])
        return _write(catalog, Request(name, time.time(), "accepted", body))


def _illegal(ids: Sequence[str], owner: str, request: str, requester: str, reason: str) -> list[str]:
    found = []
    if not ids and not owner:
        found.append("say what to erase: --records=ID,ID, --records_file=FILE, --like=IMAGE or --owner=NAME")
    if request and not LEGAL_NAME.fullmatch(request):
        legal = "1 to 64 letters, digits, dots, underscores and hyphens, starting with a letter or digit"
        found.append(f"--request={ascii(request[:80])}: must be {legal}")
    for flag, text in (("requester", requester), ("reason", reason)):
        if len(text) > LONGEST_TEXT or not text.isprintable():
            found.append(
                f"--{flag}={ascii(text[:80])}: must be one line of at most {LONGEST_TEXT} printable characters"
            )
    return found


def get(catalog: Catalog, name: str) -> Request | None:
    row = catalog.db.execute("SELECT id,created,state,body FROM requests WHERE id=?", (name,)).fetchone()
    return _request(row) if row else None


def listed(catalog: Catalog, only_open: bool = False) -> list[Request]:
    """All requests, or those that are not purged yet, oldest first."""
    where = "WHERE state!='purged'" if only_open else ""
    rows = catalog.db.execute(f"SELECT id,created,state,body FROM requests {where} ORDER BY created,id")
    return [_request(row) for row in rows.fetchall()]


def any_open(catalog: Catalog) -> bool:
    """Whether an accepted erasure is not finished."""
    return bool(catalog.db.execute("SELECT 1 FROM requests WHERE state!='purged' LIMIT 1").fetchone())


def advance(catalog: Catalog, names: Iterable[str], state: str, facts: Collection[tuple[str, Any]] = ()) -> None:
    """Brings requests to a later state; one that is there already, or further, stays as it is.

    Args:
        catalog: of the workdir.
        names: request ids.
        state: one of `STATES`.
        facts: what this step adds to their bodies.
    """
    with catalog.transaction():
        for name in names:
            request = get(catalog, name)
            if request is not None and STATES.index(request.state) < STATES.index(state):
                _write(catalog, dataclasses.replace(request, state=state, body=request.body | dict(facts)))


def lift_quarantine(catalog: Catalog, names: Iterable[str]) -> None:
    """Lets predictions use the clusters again that these requests kept out."""
    catalog.db.executemany("DELETE FROM quarantine WHERE request=?", [(name,) for name in names])


def _write(catalog: Catalog, request: Request) -> Request:
    states = [*request.body["states"], [request.state, time.time()]]
    request = dataclasses.replace(request, body=request.body | {"states": states})
    text = json.dumps(request.body, sort_keys=True)
    catalog.db.execute(
        "INSERT INTO requests VALUES(?,?,?,?) ON CONFLICT(id) DO UPDATE SET state=excluded.state,body=excluded.body",
        (request.id, request.created, request.state, text),
    )
    catalog.event("request", request=request.id, state=request.state)
    return request


def _request(row: tuple[Any, ...]) -> Request:
    return Request(*row[:3], body=EMPTY | json.loads(row[3]))
