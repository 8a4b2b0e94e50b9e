"""Progress: a bar on a terminal, lines elsewhere, nothing in a silent process."""

import io
import sys

from lmeraser_jax import progress as module
from lmeraser_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(monkeypatch, stream: io.StringIO) -> str:
    """The output of two of three units of work on this standard error."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress("tune", 3) as shown:
        shown.advance(1)
        shown.advance(1, "loss 0.5")
    return stream.getvalue()


def test_lines_are_printed_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # only a bar imports it
    first, second = written(monkeypatch, io.StringIO()).splitlines()
    assert first.startswith("tune: 1/3 ") and second.startswith("tune: 2/3 loss 0.5 about ")


def test_a_terminal_shows_a_bar(monkeypatch):
    text = written(monkeypatch, Terminal())
    assert "tune:" in text and "0/3" in text and "about" not in text


def test_a_silent_process_prints_nothing(monkeypatch):
    monkeypatch.setattr(module, "_silent", True)
    assert written(monkeypatch, io.StringIO()) == "" == written(monkeypatch, Terminal())
