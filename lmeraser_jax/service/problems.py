"""Errors as problem documents (RFC 9457), with the messages of the command line and without any path."""

import http
import logging
import sqlite3
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lmeraser_jax.errors import Conflict, UserError
from lmeraser_jax.storage.workdir import Layout

MEDIA_TYPE = "application/problem+json"
MOST = 20  # places in a body that a problem document names
TERMS = (  # what messages of the command line call by its flags -> the fields of a body
    ("--records=ID, --owner=NAME, --records_file=FILE or --like=IMAGE", "records, owners, images or texts"),
    ("--like: ", "images or texts: "),
    ("--owner=", "owners: "),
    ("--request=", "request "),
    ("; lmeraser inspect --records lists all names", ""),
)
BUSY = {"Retry-After": "1"}
EXPECTED = (HTTPException, RequestValidationError, UserError, sqlite3.DatabaseError)  # any other is a fault of ours
log = logging.getLogger("lmeraser_jax.service")


class Problem(HTTPException):
    """Ends a request with a status, one sentence, and perhaps the places in the body that are wrong."""

    def __init__(
        self, status: int, detail: str, errors: Sequence[Mapping[str, str]] = (), headers: dict[str, str] | None = None
    ):
        super().__init__(status, detail, headers)
        self.errors = errors


class Unavailable(UserError):
    """The state of the workdir allows no answer now; a later call may succeed."""


def response(problem: Problem) -> JSONResponse:
    """A problem document."""
    status = problem.status_code
    content: dict[str, Any] = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status}
    content |= {"detail": problem.detail, **({"errors": list(problem.errors)} if problem.errors else {})}
    return JSONResponse(content, status, problem.headers, MEDIA_TYPE)


def problem_of(layout: Layout, error: Exception) -> Problem:
    """What a caller is told about an error, one of `EXPECTED`."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return Problem(error.status_code, error.detail, headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return unfit(error.errors())
    if isinstance(error, UserError):
        status = status_of(error)
        return Problem(status, public_text(layout, error), headers=BUSY if status == 503 else None)
    assert isinstance(error, sqlite3.DatabaseError)
    return Problem(503, f"the catalog cannot be written or read now: {error}", headers=BUSY)


def unfit(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Where a body is wrong, and why: the first places only, and never the value, which may be personal."""
    rows = []
    for each in errors[:MOST]:
        place = each["loc"][1:] if each["loc"][:1] == ("body",) else each["loc"]
        steps = [str(step).replace("~", "~0").replace("/", "~1") for step in place]  # RFC 6901
        rows.append({"pointer": "".join(f"/{step}" for step in steps), "detail": each["msg"]})
    status = 400 if any(each["type"] == "json_invalid" for each in errors) else 422
    return Problem(status, "the request does not fit what this address takes", rows)


def status_of(error: UserError) -> int:
    """The status of an answer to a call that a `UserError` ended."""
    if isinstance(error, Unavailable):
        return 503
    return 409 if isinstance(error, Conflict) else 422


def public_text(layout: Layout, error: Exception) -> str:
    """The message of an error without the workdir's path, which is nobody's business outside."""
    text = str(error)
    for ours, theirs in TERMS:
        text = text.replace(ours, theirs)
    text = text.replace(layout.flag, "--workdir=DIR").replace(f"--workdir={layout.root}", "--workdir=DIR")
    return text.replace(str(layout.root), "the workdir")


def place_of(error: Exception) -> str:
    """Where an unexpected error came from, for the log: not its message, which may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-4:]))
    return f"{type(error).__name__} in {where}"


def install(app: FastAPI, layout: Layout) -> None:
    """Makes every expected error of an app a problem document; `limits.Gate` answers for the others."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return response(problem_of(layout, error))

    for kind in EXPECTED:
        app.add_exception_handler(kind, answer)
