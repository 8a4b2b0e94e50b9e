"""Requests to erase or to rectify records: accepted in one transaction, and their states until the purge.

Accepting needs no writer lock: a request is durable, and its quarantine in force, even while another process trains.
Nothing here loads JAX.
"""

import dataclasses
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmeraser_jax.data.names import list_lookalikes, list_names
from lmeraser_jax.errors import Conflict, UserError, join_limited, raise_all, shorten
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.catalog import ERASED, KEY, Catalog
from lmeraser_jax.storage.rows import Edit

STATES = ("accepted", "approximated", "planned", "re-tuning", "published", "purged")
LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST_TEXT = 500  # characters of a requester or a reason
EMPTY: dict[str, Any] = {  # what an acceptance may leave out, and what a publication fills in
    "kind": "erase",
    "mode": "exact",
    **{name: [] for name in ("erased_before", "shared", "owners", "states", "clusters", "approximate")},
    "work": dict(images=0, images_full=0, steps=0, clusters_tuned=0, seconds=0.0, program="", batch=[]),
    "manifest": {"before": 0, "after": 0},
    "purged": {"slices": [], "clusterings": [], "manifests": [], "rows": 0},
}


@dataclasses.dataclass(frozen=True)
class Targets:
    """The records that a request names, by id."""

    live: tuple[str, ...]  # erased with it
    erased: tuple[str, ...]  # erased before: nothing to do for them
    pending: tuple[str, ...]  # another request, accepted before, erases them


@dataclasses.dataclass(frozen=True)
class Due:
    """Whether it is time to serve the requests that wait."""

    waiting: int  # requests that are not finished
    age: float  # seconds since the oldest of them was accepted
    now: bool  # a limit is reached, or none was given
    left: float | None = None  # seconds until the oldest has waited long enough; None: no limit
    room: int | None = None  # requests that may still arrive before the batch is full; None: no limit


@dataclasses.dataclass(frozen=True)
class Request:
    """One request to erase records, or to replace them under the same ids."""

    id: str  # given by the user, or made up; the name of its receipt
    created: float  # seconds since the epoch
    state: str  # one of `STATES`
    body: dict[str, Any]  # the fields of its receipt: salted hashes instead of ids

    @property
    def open(self) -> bool:
        return self.state != "purged"


def resolve(catalog: Catalog, ids: Iterable[str], owners: Iterable[str] = (), contents: Iterable[str] = ()) -> Targets:
    """Looks up what a request names (`accept`). Raises `UserError`, which lists every unknown id and owner."""
    ids, owners, contents = map(name_list, (ids, owners, contents))
    raise_all(_check_names(ids, owners, contents))
    owned = {owner: catalog.owned(owner) for owner in owners}
    alike = {content: catalog.same_pixels(content) for content in contents}
    names = list(dict.fromkeys(name for group in (ids, *owned.values(), *alike.values()) for name in group))
    known = catalog.known(names)
    absent = {name: catalog.is_tombstoned(name) for name in names if name not in known}
    unknown = [name for name, erased in absent.items() if not erased]
    strangers = [owner for owner in owned if not owned[owner] and not catalog.is_tombstoned(owner, "owner")]
    public = [name for name in known if known[name][0] == "public"]
    problems = []
    if unknown:
        problems.append(f"unknown records: {list_names(unknown)}{_hint(unknown, catalog.private_ids())}")
    if strangers:
        reason = "owns no live private record (unknown, erased record by record, or the owner of public records only)"
        problems.append(f"--owner={list_names(strangers)}: {reason}{_hint(strangers, catalog.owner_splits())}")
    if not all(alike.values()):
        problems.append("--like: no live record has exactly these pixels")
    if public:
        problems.append(f"public records trained the backbone and cannot be erased: {list_names(public)}")
    raise_all(problems, "nothing is erased:")
    live, pending = (tuple(name for name in known if known[name][3] == erased) for erased in (False, True))
    return Targets(live, tuple(absent), pending)


def accept(
    catalog: Catalog,
    ids: Iterable[str] = (),
    owners: Iterable[str] = (),
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
    contents: Iterable[str] = (),
) -> Request:
    """Accepts an erasure in one transaction: its records are erased for every later build, and for good.

    Args:
        catalog: of the workdir; the writer lock is not needed.
        ids: record ids.
        owners: also all their records, hold-out and test images included; their later images are refused, too.
        request: an id; a second request with it is the same request. Made up where empty.
        requester, reason: kept in the receipt for good, so no personal data belongs here.
        quarantine: take the clusters of these records out of routing from this moment on; a second call may add it.
        contents: also all private records whose pixels have these content hashes.

    Raises:
        UserError: unknown records, nothing named, an id in use for another erasure. Nothing is changed then.
    """
    ids, owners, contents = map(name_list, (ids, owners, contents))
    raise_all(_check_names(ids, owners, contents) + _check_request(request, requester, reason))
    given = catalog.salted("targets", digest([sorted(set(names)) for names in (ids, owners, contents)]))
    details: dict[str, Any] = {"targets": given, "requester": requester, "reason": reason, "quarantine": quarantine}

    with catalog.transaction():
        earlier = _repeated(catalog, request, details)
        if earlier is not None:
            return earlier
        targets = resolve(catalog, ids, owners, contents)
        clusters = catalog.clusters_of(targets.live)
        details |= {
            "records": [catalog.salted("tombstone", record) for record in targets.live],
            "erased_before": [catalog.salted("tombstone", record) for record in targets.erased],
            "shared": [catalog.salted("tombstone", record) for record in targets.pending],
            "owners": [catalog.salted("owner", owner) for owner in dict.fromkeys(owners)],
        }
        accepted = _enter(catalog, request, details, clusters, catalog.clusters_of(targets.pending))
        catalog.erase((*targets.live, *targets.pending), accepted.id)  # of the pending ones, their new versions
        for owner in owners:
            catalog.add_tombstone("owner", owner)
        return accepted


def accept_edits(
    catalog: Catalog,
    given: str,
    make_edits: Callable[[], Sequence[Edit]],
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
) -> Request | None:
    """Accepts a rectification in one transaction: its records are replaced for every later build, and for good.

    The old versions count as erased from then on; the new ones lie in the catalog until the next build.

    Args:
        catalog, request, requester, reason, quarantine: as of `accept`.
        given: a digest of what the request says, which tells another one from the same one.
        make_edits: called in the transaction unless the request was accepted before; raises where it cannot be.

    Returns:
        The request; None where there is no edit, so that nothing is to be done.
    """
    raise_all(_check_request(request, requester, reason))
    given = catalog.salted("targets", given)
    details: dict[str, Any] = {"targets": given, "requester": requester, "reason": reason, "quarantine": quarantine}

    with catalog.transaction():
        earlier = _repeated(catalog, request, details)
        edits = () if earlier is not None else make_edits()
        if not edits:
            return earlier
        clusters = catalog.clusters_of(edit.id for edit in edits)
        details["kind"] = "rectify"
        details["records"] = [catalog.salted("rectified", edit.id) for edit in edits]
        accepted = _enter(catalog, request, details, clusters)
        catalog.replace(edits, accepted.id)
        return accepted


def _repeated(catalog: Catalog, request: str, details: Mapping[str, Any]) -> Request | None:
    """The request that was accepted before under an id, if any; with quarantine where that is wanted now."""
    earlier = get(catalog, request)
    if earlier is None:
        return None
    _refuse_another(earlier, details["targets"], details["requester"], details["reason"])
    return _with_quarantine(catalog, earlier) if details["quarantine"] else earlier


def _enter(
    catalog: Catalog,
    request: str,
    details: dict[str, Any],
    clusters: Mapping[str, str],
    shared: Mapping[str, str] = MappingProxyType({}),
) -> Request:
    """Notes a new request, and quarantines what it hits: {id: cluster} of its own records, and of others' it shares."""
    body = EMPTY | details | {"members": dict(sorted(Counter(clusters.values()).items()))}
    entered = _write(catalog, Request(request or new_id(), time.time(), "accepted", body))
    if body["quarantine"]:
        _quarantine(catalog, entered.id, {*clusters.values(), *shared.values()})
    return entered


def new_id() -> str:
    """An id for a request that its sender gave none."""
    return f"r-{uuid.uuid4().hex[:20]}"


def _refuse_another(earlier: Request, given: str, requester: str, reason: str) -> None:
    """Refuses an id that an earlier, different request has."""
    body, remedy = earlier.body, "give this one another id, or none"
    if body["targets"] != given:
        raise Conflict(f"--request={earlier.id}: was used for another request; {remedy}")
    if (requester or body["requester"], reason or body["reason"]) != (body["requester"], body["reason"]):
        raise Conflict(f"--request={earlier.id}: was used by another requester or for another reason; {remedy}")


def _with_quarantine(catalog: Catalog, request: Request) -> Request:
    """A request that was accepted without quarantine, with it from now on; one that is published needs none."""
    if request.body["quarantine"] or STATES.index(request.state) >= STATES.index("published"):
        return request
    _quarantine(catalog, request.id, _clusters_hit(catalog, request))
    return _store(catalog, dataclasses.replace(request, body=request.body | {"quarantine": True}))


def _quarantine(catalog: Catalog, name: str, clusters: Iterable[str]) -> None:
    rows = [(key, name) for key in sorted(set(clusters) - {""})]
    catalog.db.executemany("INSERT OR IGNORE INTO quarantine VALUES(?,?)", rows)


def _clusters_hit(catalog: Catalog, request: Request) -> dict[str, int]:
    """{published cluster: its members that a request erases}; where it shares records, those of all that wait, too."""
    query = f"SELECT {KEY},sum(erased=?) FROM {ERASED} AND split='train' AND cluster!=0 GROUP BY cluster"
    counts = dict(catalog.db.execute(query, (request.id,)))
    return {key: count for key, count in sorted(counts.items()) if count or request.body["shared"]}


def relocate(catalog: Catalog, served: Collection[str]) -> None:
    """Follows the records of requests that were not served into the clusters that a publication put them in."""
    for request in listed(catalog, only_open=True):
        if request.id in served or request.state == "published":
            continue
        clusters = _clusters_hit(catalog, request)
        if request.body["quarantine"]:
            _quarantine(catalog, request.id, clusters)
        members = {key: count for key, count in clusters.items() if count}
        _store(catalog, dataclasses.replace(request, body=request.body | {"members": members}))


def quarantine_size(catalog: Catalog, name: str) -> int:
    """How many clusters a request keeps out of predictions."""
    return catalog.db.execute("SELECT count(*) FROM quarantine WHERE request=?", (name,)).fetchone()[0]


def _check_request(request: str, requester: str, reason: str) -> list[str]:
    problems = []
    if request and not LEGAL_NAME.fullmatch(request):
        legal = "1 to 64 letters, digits, dots, underscores and hyphens, starting with a letter or digit"
        problems.append(f"--request={shorten(request)}: must be {legal}")
    for flag, text in (("requester", requester), ("reason", reason)):
        if len(text) > LONGEST_TEXT or not text.isprintable():
            legal = f"one line of at most {LONGEST_TEXT} printable characters"
            problems.append(f"--{flag}={shorten(text)}: must be {legal}")
    return problems


def name_list(names: Iterable[str]) -> list[str]:
    """The names. Raises `UserError` for text or bytes: the letters of a name could be other records' ids."""
    if isinstance(names, str | bytes):
        raise UserError(f"records and owners must be lists of names, not text: {shorten(names)}")
    return list(names)


def _check_names(ids: Sequence[str], owners: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Names that no record can have: empty ones, no text, and what the shell or JSON made of bytes that are no text."""
    if not ids and not owners and not contents:
        return ["say what to erase: --records=ID, --owner=NAME, --records_file=FILE or --like=IMAGE"]
    names = [*ids, *owners]
    texts = [isinstance(name, str) and name.encode(errors="replace").decode() for name in names]
    bad = [shorten(name) or "''" for name, text in zip(names, texts, strict=True) if not text or text != name]
    return [f"ids and owners must be text in UTF-8 and not empty; these are not: {join_limited(bad)}"] if bad else []


def _hint(unknown: Sequence[str], known: Collection[str]) -> str:
    """What a request may have meant by names that are unknown."""
    known = frozenset(known)
    lists = [name for name in unknown if "," in name and known.issuperset(map(str.strip, name.split(",")))]
    hint = "; a flag or line is one name as it stands, so repeat it for each of several" if lists else ""
    alike = list_lookalikes(unknown, known)
    return f"{hint}; did you mean {alike}?" if alike else f"{hint}; lmeraser inspect --records lists all names"


def still_live(catalog: Catalog, ids: Sequence[str], owners: Sequence[str]) -> list[str]:
    """Says which live private records and owners a request does not erase although they look like what it names."""
    records = list_lookalikes(ids, catalog.private_ids()) if ids else ""
    others = list_lookalikes(owners, catalog.owner_splits()) if owners else ""
    alike = [f"{kind} that look like those of the request are live and stay: " for kind in ("records", "owners")]
    return [text + names for text, names in zip(alike, (records, others), strict=True) if names]


def get(catalog: Catalog, name: str) -> Request | None:
    return next(iter(_select(catalog, "WHERE id=?", name)), None)


def listed(catalog: Catalog, only_open: bool = False) -> list[Request]:
    """All requests, or those that are not purged yet, oldest first."""
    return _select(catalog, "WHERE state!='purged'" if only_open else "")


def page(catalog: Catalog, kinds: Collection[str], states: Collection[str], after: str, count: int) -> list[Request]:
    """At most `count` requests of some kinds and states, newest first, that came before the one with the id `after`."""
    marks, kind_marks = (",".join("?" * len(values)) for values in (states, kinds))
    condition = f"WHERE json_extract(body,'$.kind') IN ({kind_marks}) AND state IN ({marks})"
    last = get(catalog, after)
    if after and last is None:
        raise UserError(f"after={shorten(after)}: there is no such request")
    bound = [] if last is None else [last.created, last.id]
    condition += " AND (created,id)<(?,?)" if bound else ""
    return _select(catalog, condition, *kinds, *states, *bound, order=f"created DESC,id DESC LIMIT {count}")


def count_by_state(catalog: Catalog) -> dict[str, int]:
    """{state: how many requests are in it}."""
    return dict(catalog.db.execute("SELECT state,count(*) FROM requests GROUP BY state").fetchall())


def count_erased(catalog: Catalog) -> int:
    """How many records were erased: tombstones but those of owners and of the old versions of rectified records."""
    owners = "SELECT value FROM requests,json_each(body,'$.owners')"
    edited = "SELECT value FROM requests,json_each(body,'$.records') WHERE json_extract(body,'$.kind')='rectify'"
    query = f"SELECT count(*) FROM tombstones WHERE hash NOT IN ({owners} UNION {edited})"
    return catalog.db.execute(query).fetchone()[0]


def _select(catalog: Catalog, condition: str, *values: str | float, order: str = "created,id") -> list[Request]:
    rows = catalog.db.execute(f"SELECT id,created,state,body FROM requests {condition} ORDER BY {order}", values)
    return [Request(name, created, state, json.loads(body)) for name, created, state, body in rows]


def any_open(catalog: Catalog) -> bool:
    """Whether an accepted erasure is not finished."""
    return bool(catalog.db.execute("SELECT 1 FROM requests WHERE state!='purged' LIMIT 1").fetchone())


def due(catalog: Catalog, max_wait: float | None = None, max_batch: int | None = None) -> Due:
    """Whether the oldest request waits since `max_wait` seconds, `max_batch` wait, or any where neither is a limit."""
    waiting = listed(catalog, only_open=True)
    if not waiting:
        return Due(0, 0.0, False)
    age = max(0.0, time.time() - waiting[0].created)  # a clock may be set back
    left = None if max_wait is None else max(0.0, max_wait - age)
    room = None if max_batch is None else max(0, max_batch - len(waiting))
    limits = [limit for limit in (left, room) if limit is not None]
    return Due(len(waiting), age, not limits or min(limits) <= 0, left, room)


def advance(catalog: Catalog, names: Iterable[str], state: str, **facts: Any) -> None:
    """Brings requests to a later state and sets fields of their bodies; leaves those that are as far or further."""
    with catalog.transaction():
        for name in names:
            request = get(catalog, name)
            if request is not None and STATES.index(request.state) < STATES.index(state):
                _write(catalog, dataclasses.replace(request, state=state, body=request.body | facts))


def note(catalog: Catalog, name: str, **facts: Any) -> None:
    """Sets fields of an open request's body, whatever its state is."""
    request = get(catalog, name)
    if request is not None and request.open:
        _store(catalog, dataclasses.replace(request, body=request.body | facts))


def lift_quarantine(catalog: Catalog, names: Iterable[str]) -> None:
    """Lets predictions use the clusters again that these requests put into quarantine."""
    catalog.db.executemany("DELETE FROM quarantine WHERE request=?", [(name,) for name in names])


def with_state(states: list[Any], state: str) -> list[Any]:
    """The states with their times and one more, reached now; the clock may have been set back meanwhile."""
    return [*states, [state, max([time.time(), *(at for _, at in states[-1:])])]]


def _write(catalog: Catalog, request: Request) -> Request:
    states = with_state(request.body["states"], request.state)
    request = _store(catalog, dataclasses.replace(request, body=request.body | {"states": states}))
    catalog.event("request", request=request.id, state=request.state)
    return request


def _store(catalog: Catalog, request: Request) -> Request:
    text = json.dumps(request.body, sort_keys=True)
    catalog.db.execute(
        "INSERT INTO requests VALUES(?,?,?,?) ON CONFLICT(id) DO UPDATE SET state=excluded.state,body=excluded.body",
        (request.id, request.created, request.state, text),
    )
    return request
