"""Requests over HTTP: to erase or rectify records, their states and receipts, and what one would cost.

A request is durable, and its quarantine in force, when the answer 202 is sent. The worker serves it.
"""

import dataclasses
import time
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictStr

from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import Conflict, UserError, join_limited
from lmeraser_jax.service.auth import Caller
from lmeraser_jax.service.context import Service
from lmeraser_jax.service.predictions import from_base64
from lmeraser_jax.service.problems import BUSY, Problem
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.requests import Request, Targets
from lmeraser_jax.unlearning import erase, rectify, request_files
from lmeraser_jax.unlearning.receipts import iso_time, receipt_body

PAGE = 50  # requests of a page by default
KINDS = {"erasures": "erase", "rectifications": "rectify"}
Names = Annotated[list[StrictStr], FailFast()]  # the first wrong element ends the check: a body may have millions
Mode = Literal["exact", "newton", "paper", "warm"]


class Details(BaseModel):
    """What a request says besides its records."""

    model_config = ConfigDict(extra="forbid")
    request: StrictStr = Field("", description="an id of yours; the same request sent twice is accepted once")
    requester: StrictStr = Field("", description="kept in the receipt for good: no personal data")
    reason: StrictStr = Field("", description="kept in the receipt for good: no personal data")
    quarantine: bool = Field(False, description="take the clusters out of predictions from now on")
    mode: Mode = Field("exact", description="answer approximately, without any guarantee, until the exact slices exist")


class Pair(BaseModel):
    """A text as it was imported."""

    model_config = ConfigDict(extra="forbid")
    query: StrictStr
    response: StrictStr


class Named(BaseModel):
    """Records: by id, by owner, or by their exact contents."""

    model_config = ConfigDict(extra="forbid")
    records: Names = []
    owners: Names = Field([], description="all their records; later ones are refused, too")
    images: Names = Field([], description="image files in base64: all records with exactly these pixels")
    texts: Annotated[list[Pair], FailFast()] = Field([], description="all records with exactly these tokens")


class ErasureBody(Named, Details):
    """A request to erase."""


class Edit(BaseModel):
    """The corrected version of a record; what it does not name stays as it is."""

    model_config = ConfigDict(extra="forbid")
    id: StrictStr
    label: StrictStr | None = None
    image: StrictStr | None = Field(None, description="an image file in base64")
    query: StrictStr | None = None
    response: StrictStr | None = None


class RectificationBody(Details):
    """A request to rectify."""

    edits: Annotated[list[Edit], FailFast()] = Field(min_length=1)


def router(service: Service) -> APIRouter:
    """The routes of requests."""
    routes = APIRouter(tags=["requests"])
    erases, sees = service.guard.require("erase"), service.guard.require("erase", "read")
    layout = service.settings.layout

    @routes.post("/v1/erasures", status_code=202)
    def _(body: ErasureBody, response: Response, _: Annotated[Caller, Depends(erases)]) -> dict[str, Any]:
        """Accepts an erasure; it is in force, and durable, from the answer on."""
        with service.catalog() as catalog:
            accepted = accept_erasure(service, catalog, body)
        return _entered(accepted, response)

    @routes.post("/v1/rectifications", status_code=202)
    def _(body: RectificationBody, response: Response, _: Annotated[Caller, Depends(erases)]) -> dict[str, Any]:
        """Accepts a rectification; edits that change nothing are left out, and 200 without an id says that all did."""
        with service.catalog() as catalog:
            accepted = _accept_rectification(service, catalog, body)
        if accepted is None:
            response.status_code = 200
            return {"id": None, "detail": "no edit changes anything: nothing to do"}
        return _entered(accepted, response)

    @routes.post("/v1/erasures/estimate")
    def _(body: Named, _: Annotated[Caller, Depends(erases)]) -> dict[str, Any]:
        """What erasing these records would cost; nothing is changed."""
        return dataclasses.asdict(estimate(service, body))

    def add_reading(group: str, kind: str) -> None:
        @routes.get(f"/v1/{group}")
        def _(
            _: Annotated[Caller, Depends(sees)],
            state: Annotated[list[str] | None, Query(description="only these; may be repeated")] = None,
            after: Annotated[str, Query(description="the last id of the page before")] = "",
            count: Annotated[int, Query(ge=1, le=500)] = PAGE,
        ) -> dict[str, Any]:
            """Requests, newest first, a page at a time."""
            strange = set(state or ()) - set(requests.STATES)
            if strange:
                raise Problem(422, f"state is {join_limited(sorted(strange))}; legal: {', '.join(requests.STATES)}")
            with service.catalog() as catalog:
                rows = requests.page(catalog, [kind], state or requests.STATES, after, count)
            more = [("state", each) for each in state or ()] + [("after", each.id) for each in rows[-1:]]
            link = f"/v1/{group}?{urlencode([*more, ('count', count)])}" if len(rows) == count else None
            return {group: [describe(each) for each in rows], "next": link}

        @routes.get(f"/v1/{group}/{{request}}")
        def _(request: str, _: Annotated[Caller, Depends(sees)]) -> dict[str, Any]:
            """The state and the age of a request."""
            with service.catalog() as catalog:
                return describe(find(catalog, request, kind))

        @routes.get(f"/v1/{group}/{{request}}/receipt", response_class=FileResponse)
        def _(request: str, _: Annotated[Caller, Depends(sees)]) -> FileResponse:
            """The receipt of a finished request, byte for byte."""
            with service.catalog() as catalog:
                entered = find(catalog, request, kind)
            path = layout.receipt(entered.id)
            if entered.open or not path.is_file():
                raise Problem(404, f"the request is {entered.state}; its receipt follows when it is purged")
            return FileResponse(path, media_type="application/json", filename=path.name)

    for group, kind in KINDS.items():
        add_reading(group, kind)
    return routes


def find(catalog: Catalog, name: str, kind: str = "") -> Request:
    """A request of a kind, or of any. Raises `Problem` 404 where there is none."""
    entered = requests.get(catalog, name)
    if entered is None or kind not in ("", entered.body["kind"]):
        raise Problem(404, "there is no such request")
    return entered


def group_of(request: Request) -> str:
    """The part of the request's address that says its kind."""
    return next(group for group, kind in KINDS.items() if kind == request.body["kind"])


def describe(request: Request) -> dict[str, Any]:
    """A request as JSON: its state and age, and what its receipt will say, as far as that is known."""
    body = receipt_body(request)
    return {
        "id": request.id,
        "kind": request.body["kind"],
        "state": request.state,
        "mode": request.body["mode"],
        "created": iso_time(request.created),
        "age": max(0.0, round(time.time() - request.created, 3)),  # a clock may be set back
        "records": len(request.body["records"]),
        "erased_before": len(request.body["erased_before"]),
        "shared": len(request.body["shared"]),
        "problem": request.body.get("problem", ""),
        **{name: body["request"][name] for name in ("requester", "reason", "quarantine", "states")},
        **{name: body[name] for name in ("approximate", "clusters", "work", "manifest")},
    }


def _entered(request: Request, response: Response) -> dict[str, Any]:
    """The answer to whoever asked for it: 202 and where to look, or 200 where it was finished before."""
    response.headers["Location"] = f"/v1/{group_of(request)}/{request.id}"
    response.status_code = 202 if request.open else 200
    return describe(request)


def accept_erasure(service: Service, catalog: Catalog, body: ErasureBody) -> Request:
    """Accepts an erasure as `storage.requests.accept`; raises as that does."""
    _check_mode(service, catalog, body)
    contents = _contents(service, catalog, body)
    with catalog.transaction():
        accepted = requests.accept(catalog, body.records, body.owners, contents=contents, **_details(body))
        return _with_mode(catalog, accepted, body.mode)


def _accept_rectification(service: Service, catalog: Catalog, body: RectificationBody) -> Request | None:
    _check_mode(service, catalog, body)
    settings = service.settings
    given = [each.model_dump(exclude_none=True) for each in body.edits]
    images = {f"/edits/{n}/image": each["image"] for n, each in enumerate(given) if "image" in each}
    for raw, each in zip(from_base64(images), (each for each in given if "image" in each), strict=True):
        each["image"] = raw
    lines = [(f"edit {number}", each) for number, each in enumerate(given, 1)]
    changes = rectify.changes_of(catalog, lines, most=settings.config.data.max_pixels)
    encoder = service.answering.ready_run().encoder if settings.config.is_text else None
    with catalog.transaction():
        accepted = rectify.accept(settings.layout, catalog, changes, encoder, **_details(body))
        return accepted and _with_mode(catalog, accepted, body.mode)


def _details(body: Details) -> dict[str, Any]:
    return {name: getattr(body, name) for name in ("request", "requester", "reason", "quarantine")}


def _check_mode(service: Service, catalog: Catalog, body: Details) -> None:
    """Refuses an approximate mode where no slice could stand in, before anything is accepted."""
    earlier = requests.get(catalog, body.request) if requests.LEGAL_NAME.fullmatch(body.request) else None
    before = earlier.body if earlier is not None else {"mode": body.mode, "quarantine": False}
    mode = before["mode"] if body.mode == "exact" else body.mode  # a repetition may leave it out
    if mode != before["mode"] and "problem" not in before:  # with a problem the worker has given the mode up
        raise Conflict(f"--request={body.request}: was used with the mode {before['mode']}; give this one another id")
    if mode == "exact":
        return
    if body.quarantine or before["quarantine"]:
        raise UserError("quarantine keeps the clusters out of predictions, and an approximate mode answers with them")
    from lmeraser_jax.unlearning import approximate, binding

    config = binding.stored_config(service.settings.layout)  # that of the start may be an earlier one
    assert config is not None
    approximate.refuse_unless_applicable(catalog, config.tuning, calibrate=False)


def _with_mode(catalog: Catalog, request: Request, mode: str) -> Request:
    """A request with the mode that the worker is to answer by; one that is served already stays as it is."""
    if mode in ("exact", request.body["mode"]) or request.state != "accepted" or "problem" in request.body:
        return request
    requests.note(catalog, request.id, mode=mode)
    return find(catalog, request.id)


def _contents(service: Service, catalog: Catalog, body: Named) -> list[str]:
    """The content hashes of the images and texts that a request gives as examples."""
    raws = from_base64({f"/images/{n}": text for n, text in enumerate(body.images)})
    most = service.settings.config.data.max_pixels
    contents = [request_files.content_of(catalog, raw, f"images[{n}]", most) for n, raw in enumerate(raws)]
    if body.texts and not service.settings.config.is_text:
        raise Problem(422, "this workdir holds images, so that no record has a text")
    for n, pair in enumerate(body.texts):
        row, reason = service.answering.ready_run().encoder.row(pair.query, pair.response)
        if row is None:
            raise Problem(422, f"texts[{n}]: {reason}")
        contents.append(content_hash(row))
    return contents


def _targets(service: Service, catalog: Catalog, body: Named) -> Targets:
    return requests.resolve(catalog, body.records, body.owners, _contents(service, catalog, body))


def estimate(service: Service, body: Named) -> erase.Estimate:
    """What erasing these records would cost, computed beside predictions on a run of its own, one at a time."""
    from lmeraser_jax.unlearning.run import open_run

    with service.catalog() as catalog:
        targets = _targets(service, catalog, body)
    if not service.estimating.acquire(timeout=service.settings.limits.seconds):
        raise Problem(503, "other estimates are being made; try again in a moment", headers=BUSY)
    try:
        with open_run(service.settings.layout.root) as run:
            return erase.estimate(run, targets)
    finally:
        service.estimating.release()
