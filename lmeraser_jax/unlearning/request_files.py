"""Files that name the records to erase: a list of ids, a CSV, JSON lines, or an image that a record was made from.

    ids.txt      one id a line; every character counts but spaces at both ends, so there are no comments
    ids.csv      a header with a column id, a column owner or both; comma, semicolon or tab; other columns are ignored
    ids.jsonl    {"id": "..."} or {"owner": "..."} in each line; other keys are ignored

A line names a record or an owner. One with both is refused: an owner means all of their records, and a table of
records with their owners would erase far more than its lines.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lmeraser_jax.config import Data
from lmeraser_jax.data.label_csv import read_header
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError, raise_all, shorten
from lmeraser_jax.hashing import parse_strict_json
from lmeraser_jax.storage.catalog import Catalog

LARGEST = 100_000_000  # bytes of a file
LONGEST = 4096  # characters of an id or owner
MOST = 100  # problems that a message lists
KINDS = ("id", "owner")
DECODED = ("folder", "tfds")  # sources whose images are decoded from image files


class Named(NamedTuple):
    """The ids and owners that a file names, in its order, each once."""

    ids: tuple[str, ...]
    owners: tuple[str, ...]


class _Line(NamedTuple):
    """One line: its number, counted from 1, the id and the owner ("" for none), or the problem with it."""

    number: int
    id: str = ""
    owner: str = ""
    problem: str = ""


def read(path: str) -> Named:
    """Reads a file; its suffix says its format (.csv, .jsonl, anything else: a list of ids).

    Raises:
        UserError: no such file, too large, no text in UTF-8, or lines that cannot be used: all of them, with numbers.
    """
    flag = f"--records_file={path}"
    parser = {".csv": _parse_csv, ".jsonl": _parse_jsonl}.get(Path(path).suffix.lower(), _parse_text)
    lines = list(parser(_text(Path(path), flag)))
    problems = [(line.number, line.problem or _problem(line)) for line in lines]
    problems = [f"line {number}: {problem}" for number, problem in problems if problem]
    raise_all(problems, f"{flag} cannot be used; nothing is erased:", MOST)
    if not lines:
        raise UserError(f"{flag} names nothing; nothing is erased")
    ids = dict.fromkeys(line.id for line in lines if line.id)
    owners = dict.fromkeys(line.owner for line in lines if line.owner)
    return Named(tuple(ids), tuple(owners))


def content_of(catalog: Catalog, path: str, most: int = Data().max_pixels) -> str:
    """The content hash that a record of a workdir has, or would have, whose source is an image file.

    Args:
        catalog: of a workdir with records.
        path: an image file. Where the records came from image files, it is brought to the stored size as they were;
            where they came as arrays, it must have their size.
        most: pixels of the file at most (`data.max_pixels`).

    Raises:
        UserError: no readable image, or another size.
    """
    from lmeraser_jax.data.decode import decode, upright_size  # needs Pillow

    flag, dataset = f"--like={path}", catalog.get("dataset")
    _require_file(Path(path), flag)
    if dataset is None:
        raise UserError(f"{flag}: the workdir has no records yet")
    height, width, channels = dataset["shape"]
    pixels = decode([Path(path)], height, width, channels, most)
    if pixels.unreadable:
        raise UserError(f"{flag} cannot be read: {pixels.unreadable[0]}")
    size, source = upright_size(Path(path)), dataset["settings"]["source"]
    if source not in DECODED and size != (height, width):
        legal = f"{height} x {width} pixels, as the images of {source} are stored"
        raise UserError(f"{flag} has {size[0]} x {size[1]} pixels; must have {legal}")
    return content_hash(pixels.images[0])


def _require_file(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UserError(f"{flag}: {'is no file' if path.exists() else 'no such file'}")


def _text(path: Path, flag: str) -> str:
    """The file's text without a byte order mark."""
    _require_file(path, flag)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{flag} cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST:
        raise UserError(f"{flag} is larger than {LARGEST} bytes; split it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{flag} is not UTF-8 text: {error.reason} in line {line}; save it as UTF-8") from error


def _problem(line: _Line) -> str:
    """Why a parsed line names neither a record nor an owner; empty where it names one."""
    name = line.id or line.owner
    if line.id and line.owner:
        return "names an id and an owner; leave one empty (an owner means all their records)"
    if len(name) > LONGEST:
        return f"longer than {LONGEST} characters"
    if "\0" in name:
        return f"no text: {shorten(name)}"
    return "" if name else "names neither an id nor an owner"


def _parse_text(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut ids at rarer characters
        if line.strip():
            yield _Line(number, id=line.strip())


def _parse_csv(text: str) -> Iterator[_Line]:
    stream = io.StringIO(text, newline="")
    header, line = stream.readline(), 1
    try:
        names, delimiter = read_header(header, KINDS)
        columns = [name.lower() for name in names]
        if not set(KINDS) & set(columns) or any(columns.count(kind) > 1 for kind in KINDS):
            legal = "must name one column id, one column owner, or both"
            yield _Line(1, problem=f"{legal}; is {shorten(header.strip())}")
            return
        reader = csv.reader(stream, delimiter=delimiter, strict=True)  # an open quote would swallow rows
        line = 2
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells) and len(cells) != len(columns):
                yield _Line(line, problem=f"has {len(cells)} fields, the header has {len(columns)}")
            elif any(cells):
                named = dict(zip(columns, cells, strict=True))
                yield _Line(line, named.get("id", ""), named.get("owner", ""))
            line = reader.line_num + 2  # a row may hold line breaks; the header was read before
    except csv.Error as error:  # where the next row begins is unknown
        yield _Line(line, problem=f"not CSV: {error}")


def _parse_jsonl(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parse_object(number, line)


def _parse_object(number: int, line: str) -> _Line:
    """A JSON line. Names are texts: 17 and "17", or 1e3 and 1000, must not be taken for each other."""
    try:
        values = parse_strict_json(line)
    except json.JSONDecodeError as error:
        return _Line(number, problem=f"not JSON: {error.msg}, column {error.colno}")
    except ValueError as error:
        return _Line(number, problem=f"not JSON: {error}")
    if not isinstance(values, dict):
        return _Line(number, problem='must be an object such as {"id": "..."}')
    untexted = [kind for kind in KINDS if not isinstance(values.get(kind, ""), str)]
    if untexted:
        return _Line(number, problem=f"{' and '.join(untexted)} must be text in quotes")
    return _Line(number, values.get("id", ""), values.get("owner", ""))
