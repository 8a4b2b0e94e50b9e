"""A trace of a few calls of the tuning program, for TensorBoard or Perfetto, written where `--profile=DIR` says."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from lmeraser_jax.errors import UserError

FIRST, CALLS = 1, 2  # the first call compiles; the ones after it are alike
_folders: list[Path] = []  # where the next tuning is traced to; empty: nowhere


@contextlib.contextmanager
def into(folder: str) -> Iterator[None]:
    """Inside, the next tuning that makes enough calls is traced into the folder; nothing happens with "".

    Raises:
        UserError: nothing can be written there; raised before the work, not after it.
    """
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"--profile={folder} cannot be written: {error.strerror}") from error
    _folders[:] = [Path(folder)] if folder else []
    try:
        yield
        if _folders:
            advice = "too few calls of the tuning program; lower --config.tuning.scan_steps"
            print(f"warning: --profile={folder}: {advice}", file=sys.stderr)
    finally:
        _folders.clear()


class Trace:
    """Counts the calls of a tuning, which is its block, and, inside `into`, traces a few of them."""

    def __init__(self):
        self.calls, self.running = 0, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def next_call(self) -> None:
        """To be called before each call, when the results of the call before the last are on the host."""
        if _folders and self.calls == FIRST:
            with _failure_is_a_warning():
                jax.profiler.start_trace(_folders.pop())
                self.running = True
        if self.calls == FIRST + CALLS + 1:  # results come one call late
            self.stop()
        self.calls += 1

    def stop(self) -> None:
        """Writes the trace, if one is running."""
        if self.running:
            self.running = False
            with _failure_is_a_warning():
                jax.profiler.stop_trace()


@contextlib.contextmanager
def _failure_is_a_warning() -> Iterator[None]:
    """The work goes on when its trace fails."""
    try:
        yield
    except Exception as error:  # the profiler raises RuntimeError, OSError and more
        print(f"warning: --profile: no trace was written: {error}", file=sys.stderr)
