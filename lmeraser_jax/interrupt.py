"""Stopping when asked: SIGTERM is noted, and long work ends at the next place where nothing is lost.

Such places are between calls of the device programs and between pieces of an import. Nothing looks during the
publish transaction and the purge: they take no time and are finished.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

_asked = threading.Event()


class Stopped(BaseException):
    """Ends a command that was asked to stop. No `Exception`: nothing on the way may take it for a failure.

    Its text, if any, is the command to resume with, where that is not the same command.
    """


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _asked.is_set()


def request_stop() -> None:
    """What SIGTERM does: long work ends at the next place where nothing is lost."""
    _asked.set()


def raise_if_stopped() -> None:
    """Raises `Stopped` if this process was asked to stop."""
    if _asked.is_set():
        raise Stopped


@contextlib.contextmanager
def handle_sigterm() -> Iterator[None]:
    """Inside, SIGTERM asks instead of killing. Outside the main thread, where no handler can be set, it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()
