"""What holds for every call: its size, its time, where it may come from, and the headers of its answer."""

import asyncio
import ipaddress
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmeraser_jax.service import problems
from lmeraser_jax.service.auth import Guard
from lmeraser_jax.service.metrics import Metrics
from lmeraser_jax.service.problems import Problem, log
from lmeraser_jax.service.settings import Limits

SAFE = ("GET", "HEAD", "OPTIONS")
METHODS = (*SAFE, "POST", "PUT", "PATCH", "DELETE")  # what else a caller makes up is "other" in figures and in the log
CLOSE = {"Connection": "close"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self';"
    " frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers post the console's forms from the origin "null"
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Gate:
    """Wraps the app: refuses what is too large, too slow or from another site, and adds the headers of every answer.

    A browser says where a request comes from (`Sec-Fetch-Site`, `Origin`), so that no form of another site can post
    here. Without tokens the service answers to names of this machine only, so that no other name can be bound to its
    address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, limits: Limits, guard: Guard, metrics: Metrics, local_only: bool):
        self.app, self.limits, self.guard, self.metrics, self.local_only = app, limits, guard, metrics, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await problems.response(refusal)(scope, receive, send_on)
        else:
            try:
                await self.app(scope, self._limited(receive), send_on)
            except Exception as error:  # uvicorn would log its message, which may quote what was sent
                log.error("%s", problems.place_of(error))
                if not status:
                    await problems.response(Problem(500, "the service failed; its log says where"))(
                        scope, receive, send_on
                    )
        route = getattr(scope.get("route"), "path", "none")  # the template: a path may hold a request's id
        method = scope["method"] if scope["method"] in METHODS else "other"
        seconds = time.perf_counter() - started
        self.metrics.seconds.labels(method, route, str(status)).observe(seconds)
        log.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)

    def _refusal(self, scope: Scope) -> Problem | None:
        """Why a call is refused by its headers alone."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.local_only and not is_local(_name_of(host)):
            reason = "without tokens the service answers to names of this machine only, such as 127.0.0.1"
            return Problem(403, reason, headers=CLOSE)
        site, origin = headers.get("sec-fetch-site", ""), headers.get("origin", "")
        foreign = site in ("cross-site", "same-site") or origin and origin.partition("://")[2] != host
        if foreign and scope["method"] not in SAFE:
            return Problem(403, "another site sent this request", headers=CLOSE)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body:
            return Problem(413, f"a request has at most {self.limits.body} bytes", headers=CLOSE)
        if scope["method"] not in SAFE:
            try:  # before a byte of the body is read: the routes look at it later
                self.guard.caller_of(headers.get("authorization", ""))
            except Problem as problem:
                return Problem(problem.status_code, problem.detail, headers={**(problem.headers or {}), **CLOSE})
        return None

    def _limited(self, receive: Receive) -> Receive:
        """The body as it arrives, as long as it is small enough and comes in time."""
        size, end, whole = 0, time.monotonic() + self.limits.seconds, False

        async def receive_on() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()  # waits for the caller to go away
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise Problem(408, "the request did not arrive in time", headers=CLOSE) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                whole = not message.get("more_body", False)
            if size > self.limits.body:
                raise Problem(413, f"a request has at most {self.limits.body} bytes", headers=CLOSE)
            return message

        return receive_on


def _name_of(host: str) -> str:
    """The name or address in a Host header; "" where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_local(host: str) -> bool:
    """Whether a name or an address is of this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def protocol_of(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, which also closes a connection whose headers do not arrive in time."""

    class Protocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Runs the timer while headers are awaited; the time of a body is for `Gate`."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self.timer is None:
                self.timer = self.loop.call_later(limits.seconds, self.transport.close)

        def _unwatch(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return Protocol
