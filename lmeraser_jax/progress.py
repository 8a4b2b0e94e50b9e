"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere or without tqdm."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Something that counts up and can show a few words."""

    def advance(self, amount: int, note: str = "") -> None: ...


class _Bar:
    def __init__(self, title: str, total: int):
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True)

    def advance(self, amount: int, note: str = "") -> None:
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)

    def close(self) -> None:
        self.bar.close()


class _Nothing:
    def advance(self, amount: int, note: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        self.start = self.last = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            left = (now - self.start) * (self.total - self.done) / max(self.done, 1)
            print(f"{self.title}: {self.done}/{self.total} {note} about {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


_silent = False


def silence() -> None:
    """Shows nothing from here on: one process of several speaks for all."""
    global _silent
    _silent = True


def _best(title: str, total: int) -> _Bar | _Lines | _Nothing:
    if _silent:
        return _Nothing()
    if sys.stderr.isatty():
        try:
            return _Bar(title, total)
        except ImportError:  # a machine without tqdm
            pass
    return _Lines(title, total)


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """Shows the progress of `total` units of work on standard error."""
    shown = _best(title, total)
    try:
        yield shown
    finally:
        shown.close()
