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
BUSY = {"Retry-After": "1"}
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


def response(
    status: int, detail: str, errors: Sequence[Mapping[str, str]] = (), headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A problem document."""
    content: dict[str, Any] = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status}
    content |= {"detail": detail, **({"errors": list(errors)} if errors else {})}
    return JSONResponse(content, status, dict(headers or {}), MEDIA_TYPE)


def status_of(error: UserError) -> int:
    """The status of an answer to a call that a `UserError` ended."""
    if isinstance(error, Unavailable):
        return 503
    return 409 if isinstance(error, Conflict) else 422


def public_text(layout: Layout, error: Exception) -> str:
    """The message of an error without the workdir's path, which is nobody's business outside."""
    text = str(error).replace(layout.flag, "--workdir=DIR").replace(f"--workdir={layout.root}", "--workdir=DIR")
    return text.replace(str(layout.root), "the workdir")


def place_of(error: Exception) -> str:
    """Where an unexpected error came from, for the log: not its message, which may quote what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-4:]))
    return f"{type(error).__name__} in {where}"


def install(app: FastAPI, layout: Layout) -> None:
    """Makes every error of an app a problem document."""

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        errors = error.errors if isinstance(error, Problem) else ()
        return response(error.status_code, error.detail, errors, error.headers)

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        places = [(each["loc"], each["msg"]) for each in error.errors()]  # never the value: it may be personal
        errors = [{"pointer": "/" + "/".join(map(str, place)), "detail": text} for place, text in places]
        return response(422, "the request does not fit what this address takes", errors)

    async def on_user(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, UserError)
        status = status_of(error)
        return response(status, public_text(layout, error), headers=BUSY if status == 503 else None)

    async def on_database(_: Request, error: Exception) -> JSONResponse:
        return response(503, f"the catalog cannot be written or read now: {error}", headers=BUSY)

    async def on_any(_: Request, __: Exception) -> JSONResponse:
        return response(500, "the service failed; its log says where")

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(UserError, on_user)
    app.add_exception_handler(sqlite3.DatabaseError, on_database)
    app.add_exception_handler(Exception, on_any)
