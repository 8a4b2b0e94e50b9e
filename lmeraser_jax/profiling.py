"""A trace of a few steps of the tuning program, for TensorBoard or Perfetto, written where `--profile=DIR` says."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

FIRST, CALLS = 1, 2  # the first call compiles; the ones after it look alike
_wanted: list[Path] = []


@contextlib.contextmanager
def into(folder: str) -> Iterator[None]:
    """Inside, the next tuning that makes enough calls is traced into the folder; nothing happens with ""."""
    _wanted[:] = [Path(folder)] if folder else []
    try:
        yield
        if _wanted:
            what = "too few calls of the tuning program to trace; lower --config.tuning.scan_steps"
            print(f"warning: --profile={folder}: {what}", file=sys.stderr)
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
            jax.profiler.start_trace(_wanted.pop())
            self.running = True
        if self.calls == FIRST + CALLS + 1:  # results come one call late
            self.stop()
        self.calls += 1

    def stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
