"""What a user did that cannot work: one exception type, raised once with everything that is wrong."""

from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(ValueError):
    """Input that a user can mend. The command line prints the message alone and exits with code 2."""


class Damaged(UserError):
    """A file is missing, or was read and holds something else than was written there.

    Nothing else proves damage: another error over a file says that nobody could look, and nothing is dropped for it.
    """


def raise_all(problems: Sequence[str], heading: str = "", limit: int = 1000, kind: type[UserError] = UserError) -> None:
    """Raises one error that lists every problem, `limit` of them at most; does nothing when there is none."""
    if not problems:
        return
    heading = heading or ("several things are wrong:" if len(problems) > 1 else "")
    lines = list(problems[:limit])
    if len(problems) > limit:
        lines.append(f"... ({len(problems)} lines in all)")
    raise kind("\n".join([heading, *(f"- {line}" for line in lines)] if heading else lines))


def stand_in(file: Path | bytes) -> str:
    """What a file is, by its first bytes, that a download left in place of another; "" where it is no such file."""
    first = file if isinstance(file, bytes) else b""
    if isinstance(file, Path):
        with open(file, "rb") as stream:
            first = stream.read(200)
    if first.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; git lfs pull brings the file itself"
    page = first.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))
    return "a web page; the download gave it in place of the file" if page else ""


def join_limited(values: Iterable[object], limit: int = 10) -> str:
    """The values in one line; a long list is cut after `limit` and counted."""
    values = [str(value) for value in values]
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(values[:limit]) + more


def shorten(value: object, limit: int = 80) -> str:
    """A value in one line of a message: text as it is, anything else as Python writes it.

    What is longer than `limit` characters is cut and its length named; text that would not print is escaped.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a whole number of many thousand digits, a structure of many thousand levels
        return f"a large {type(value).__name__}"
    start = text[:limit] if text[:limit].isprintable() else ascii(text[:limit])
    return start if len(text) <= limit else f"{start}... ({len(text)} characters)"
