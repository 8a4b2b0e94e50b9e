"""Signals. SIGTERM is noted, and long work ends at the next point where nothing is lost; Ctrl-C raises as ever.

Such points lie between calls of the device programs and between pieces of an import. The publish transaction and the
purge have none: they take no time and are finished.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_requested = threading.Event()


class Stopped(BaseException):
    """Ends a command after SIGTERM. It is no `Exception`, so that no handler of failures takes it for one.

    Its text, if any, is the command to resume with, where that is not the same command.
    """


def stop_requested() -> bool:
    """Whether this process was told to stop."""
    return _requested.is_set()


def request_stop() -> None:
    """Does what SIGTERM does."""
    _requested.set()


def wait(seconds: float) -> None:
    """Sleeps, but not longer than until this process is told to stop."""
    _requested.wait(seconds)


def raise_if_stopped() -> None:
    """Raises `Stopped` if this process was told to stop."""
    if _requested.is_set():
        raise Stopped


@contextlib.contextmanager
def handle_sigterm() -> Iterator[None]:
    """Inside, SIGTERM requests a stop instead of killing. Only the main thread can set this up; elsewhere it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _requested.clear()


def end_at_second_ctrl_c(line: str, code: int) -> None:
    """Lets a second Ctrl-C end the process with a line, where Python would print a traceback, as in `atexit`."""

    def end(*_: object) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(code)

    def raise_once(*_: object) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # shells let background processes ignore it
        signal.signal(signal.SIGINT, raise_once)
