"""What a user did that cannot work: one exception type, raised once with everything that is wrong."""

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(ValueError):
    """Input that a user can mend. The command line prints the message alone and exits with code 2."""


class Conflict(UserError):
    """The name of a request was used for another one."""


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


def stand_in(file: Path | bytes) -> str:
    """What lies in the place of a file of weights or images that cannot be read; "" where it is none of these."""
    try:
        if isinstance(file, Path):
            with open(file, "rb") as stream:
                head, size = stream.read(1 << 20), file.stat().st_size
        else:
            head, size = file, len(file)
    except OSError:
        return ""
    text = head[:2000].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not size:
        return "it is empty (0 bytes); fetch it again"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "it is a Git LFS pointer, which stands for the file; fetch the file itself with: git lfs pull"
    if text[:5].lower() in (b"<!doc", b"<html", b"<head", b"<?xml", b"<body"):
        return "it is a web page (HTML or XML), perhaps of a server that wanted a login; fetch the file itself again"
    if text[:1] in (b"{", b"["):
        return f"it is JSON text, perhaps the message of a server: {shorten(text.decode(errors='replace'))}"
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file if isinstance(file, Path) else io.BytesIO(file)):
        return f"it is a zip file that is cut short: its table of contents is not in its {size} bytes; fetch it again"
    length = int.from_bytes(head[:8], "little")
    try:  # safetensors: the length of a JSON header, the header, the arrays
        ends = [entry["data_offsets"][1] for key, entry in json.loads(head[8 : 8 + length]).items() if key[:2] != "__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return f"it is cut short: it holds {size} of {wanted} bytes; fetch it again" if size < wanted else ""
