"""A trace of a few steps of the tuning program, for TensorBoard or Perfetto, written where `--profile=DIR` says."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from lmeraser_jax.errors import UserError

FIRST, CALLS = 1, 2  # the first call compiles; the ones after it look alike
_wanted: list[Path] = []


@contextlib.contextmanager
def into(folder: str) -> Iterator[None]:
    """Inside, the next tuning that makes enough calls is traced into the folder; nothing happens with "".

    Raises:
        UserError: nothing can be written there; said before the work, not after it.
    """
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"--profile={folder} cannot be written: {error.strerror}") from error
    _wanted[:] = [Path(folder)] if folder else []
    try:
        yield
        if _wanted:
            _warn(f"--profile={folder}: too few calls of the tuning program; lower --config.tuning.scan_steps")
    finally:
        _wanted.clear()


@contextlib.contextmanager
def tracing() -> Iterator["Trace"]:
    """The trace of one tuning, ended with it."""
    trace = Trace()
    try:
        yield trace
    finally:
        trace.stop()


class Trace:
    """Counts the calls of a tuning; traces a few of them if somebody asked for it."""

    def __init__(self):
        self.calls, self.running = 0, False

    def next_call(self) -> None:
        """To be called before each call, when the results of the one before the last are on the host."""
        if _wanted and self.calls == FIRST:
            with _extra():
                jax.profiler.start_trace(_wanted.pop())
                self.running = True
        if self.calls == FIRST + CALLS + 1:  # results come one call late
            self.stop()
        self.calls += 1

    def stop(self) -> None:
        if self.running:
            self.running = False
            with _extra():
                jax.profiler.stop_trace()


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """A trace that fails is no reason to lose the work that is traced."""
    try:
        yield
    except Exception as error:  # the profiler raises RuntimeError, OSError and more
        _warn(f"--profile: no trace was written: {error}")


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr)
