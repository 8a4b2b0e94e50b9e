"""Progress of long work on standard error: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0
_silent = False


def silence() -> None:
    """Shows nothing from here on: one process of several speaks for all."""
    global _silent
    _silent = True


def warn(*messages: str) -> None:
    """Warns on standard error, while long work goes on; a line for each message."""
    for message in () if _silent else messages:
        print(f"warning: {message}", file=sys.stderr, flush=True)


class Progress:
    """Counts up to a total and shows how far it is, with a few words of the caller."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and not _silent:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True)

    def advance(self, amount: int, note: str = "") -> None:
        """Counts some more units of work."""
        self.done += amount
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif not _silent and now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            left = (now - self.start) * (self.total - self.done) / max(self.done, 1)
            print(f"{self.title}: {self.done}/{self.total} {note} about {left:.0f} s left", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """Shows the progress of `total` units of work."""
    shown = Progress(title, total)
    try:
        yield shown
    finally:
        if shown.bar is not None:
            shown.bar.close()
