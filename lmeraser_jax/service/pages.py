"""The console: pages for the person in charge, rendered here; no script and nothing from elsewhere.

Ids of records and names of owners stand in the form alone into which somebody typed them, and in no address.
"""

import datetime
import importlib.resources
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from lmeraser_jax import __version__
from lmeraser_jax.errors import shorten
from lmeraser_jax.service.auth import Caller
from lmeraser_jax.service.context import Service
from lmeraser_jax.service.erasures import KINDS, ErasureBody, accept_erasure, estimate, find, group_of
from lmeraser_jax.service.problems import EXPECTED, Problem, problem_of
from lmeraser_jax.service.reading import check_receipts, describe_model
from lmeraser_jax.service.settings import Policy
from lmeraser_jax.storage import requests

ROWS = 20  # requests, receipts or clusters of a page
CHOICES = {  # of the filter
    "all": requests.STATES,
    "waiting": requests.STATES[:-1],
    **{state: (state,) for state in requests.STATES},
}
MEANINGS = {
    "accepted": "No later build uses these records, or their old versions.",
    "approximated": "Approximate slices answer, without any guarantee.",
    "planned": "It is known which clusters must be tuned again.",
    "re-tuning": "These clusters are tuned without the records.",
    "published": "Predictions use the new slices.",
    "purged": "Everything that was made with the records is removed, and the receipt is written.",
}


FIELDS = (  # of the form: name, label, hint
    ("records", "Records", "Ids, one a line, each exactly as it was imported."),
    ("owners", "Owners", "Names, one a line: all their records; later records of theirs are refused, too."),
    ("request", "Request id", "An id of yours, such as a ticket's; made up where it is empty."),
    ("requester", "Requester", "Optional. The receipt keeps it for good: no personal data."),
    ("reason", "Reason", "Optional. The receipt keeps it for good: no personal data."),
)


class Typed(BaseModel):
    """The form of an erasure as it was filled in, and the button that was pressed."""

    records: str = ""  # names, one a line
    owners: str = ""  # names, one a line
    request: str = ""
    requester: str = ""
    reason: str = ""
    quarantine: bool = False
    step: Literal["change", "estimate", "erase"] = "estimate"

    def body(self) -> ErasureBody:
        details = self.model_dump(include={"request", "requester", "reason", "quarantine"})
        return ErasureBody(records=_names(self.records), owners=_names(self.owners), **details)


class Page(APIRoute):
    """A route whose errors are pages, too, and whose form may fill the body that the service takes."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            settings = request.app.state.service.settings
            try:
                await request.form(max_part_size=settings.limits.body)  # kept for the handler, which would take 1 MB
                return await handle(request)
            except EXPECTED as error:
                problem = problem_of(settings.layout, error)
                return _page("problem", problem.status_code, dict(problem.headers or {}), problem=problem)

        return handle_errors


def router(service: Service) -> APIRouter:
    """The pages."""
    routes = APIRouter(include_in_schema=False, route_class=Page)
    reads, erases, sees = (service.guard.require(*roles) for roles in (["read"], ["erase"], ["erase", "read"]))
    policy = service.settings.policy

    @routes.get("/")
    def _(_: Annotated[Caller, Depends(reads)], show: str = "all", kind: str = "all", after: str = "") -> Response:
        """What waits, what the model holds, and the latest requests."""
        choices = {"show": tuple(CHOICES), "kind": ("all", *KINDS.values())}
        for name, value in (("show", show), ("kind", kind)):
            if value not in choices[name]:
                raise Problem(422, f"{name} is {shorten(value)}; legal: {', '.join(choices[name])}")
        kinds = KINDS.values() if kind == "all" else [kind]
        with service.catalog() as catalog:
            rows = requests.page(catalog, kinds, CHOICES[show], after, ROWS + 1)
            counts, due = requests.count_by_state(catalog), requests.due(catalog, policy.max_wait, policy.max_batch)
            model = describe_model(service, catalog)
        shown = {"rows": rows[:ROWS], "more": len(rows) > ROWS, "show": show, "kind": kind, "after": after}
        shown |= {"model": model, "due": due, "policy": _policy(policy), "problem": service.answering.problem}
        open_states = [(state.capitalize(), counts[state]) for state in CHOICES["waiting"] if state in counts]
        return _page("overview", open_states=open_states, choices=choices, count=ROWS, **shown)

    @routes.get("/requests/{name}")
    def _(name: str, _: Annotated[Caller, Depends(sees)], verify: bool = False) -> Response:
        """One request; the page loads itself again until it is finished."""
        with service.catalog() as catalog:
            request = find(catalog, name)
            verdicts = check_receipts(service, catalog, name) if verify else []
        receipt = f"/v1/{group_of(request)}/{name}/receipt"
        return _page("request", request=request, states=_timeline(request), receipt=receipt, verdicts=verdicts)

    @routes.get("/erase")
    def _(_: Annotated[Caller, Depends(erases)]) -> Response:
        """The form, empty."""
        return _page("erase", typed=Typed(), fields=FIELDS, cost=None, problem=None)

    @routes.post("/erase")
    def _(typed: Annotated[Typed, Form()], _: Annotated[Caller, Depends(erases)]) -> Response:
        """The form with an estimate, or, when that is confirmed, the request's page."""
        try:
            if typed.step == "erase":
                with service.catalog() as catalog:
                    accepted = accept_erasure(service, catalog, typed.body())
                return RedirectResponse(f"/requests/{accepted.id}", 303)
            cost = estimate(service, typed.body()) if typed.step == "estimate" else None
        except EXPECTED as error:
            problem = problem_of(service.settings.layout, error)
            return _page("erase", problem.status_code, typed=typed, fields=FIELDS, cost=None, problem=problem)
        if cost is not None and not typed.request:
            typed.request = requests.new_id()  # so that a confirmation that is sent twice is accepted once
        return _page("erase", typed=typed, fields=FIELDS, cost=cost, problem=None)

    @routes.get("/receipts")
    def _(_: Annotated[Caller, Depends(reads)], verify: bool = False, before: int | None = None) -> Response:
        """The receipts, newest first, and whether all of them hold."""
        with service.catalog() as catalog:
            links = catalog.receipts()
            rows = [link for link in reversed(links) if before is None or link.sequence < before]
            groups = {link.request: group_of(find(catalog, link.request)) for link in rows[:ROWS]}
            verdicts = check_receipts(service, catalog) if verify else []
        shown = {"rows": rows[:ROWS], "more": len(rows) > ROWS, "count": len(links), "before": before}
        return _page("receipts", groups=groups, verdicts=verdicts, **shown)

    @routes.get("/console.css")
    async def _() -> Response:
        style = importlib.resources.files("lmeraser_jax.service").joinpath("templates/console.css")
        return Response(style.read_text("utf-8"), media_type="text/css")

    return routes


def _names(text: str) -> list[str]:
    """The lines that are not blank, as they stand; splitlines() would cut names at rarer characters."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _timeline(request: requests.Request) -> list[tuple[str, str, float | None]]:
    """The states of a request, what each means, and when it was reached; None for those still to come."""
    reached = dict(request.body["states"])
    passed = [state for state in requests.STATES if state != "approximated" or request.body["mode"] != "exact"]
    passed = [state for state in passed if request.open or state in reached]  # it may have skipped some
    return [(state, MEANINGS[state], reached.get(state)) for state in passed]


def _policy(policy: Policy) -> str:
    """When the worker serves requests."""
    limits = [] if policy.max_wait is None else [f"once the oldest has waited for {_duration(policy.max_wait)}"]
    limits += [] if policy.max_batch is None else [f"as soon as {policy.max_batch} wait"]
    return " or ".join(limits) or "at once"


def _page(template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
    content = TEMPLATES.get_template(f"{template}.html.jinja").render(values, now=time.time(), version=__version__)
    return HTMLResponse(content, status, headers)


def _duration(seconds: float) -> str:
    """A time span for people, to two digits or so."""
    seconds = max(0.0, seconds)  # a clock may be set back
    for limit, unit, name in ((10, 1, "s"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{1 if limit == 10 else 0}f} {name}"
    return f"{seconds / 86_400:.0f} days"


def _moment(time: float | str) -> str:
    """A time in seconds, or as ISO 8601, in UTC for people."""
    moment = datetime.datetime.fromisoformat(time) if isinstance(time, str) else None
    moment = moment or datetime.datetime.fromtimestamp(float(time), datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


TEMPLATES = Environment(
    loader=PackageLoader("lmeraser_jax.service"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"duration": _duration, "moment": _moment, "count": _count}
