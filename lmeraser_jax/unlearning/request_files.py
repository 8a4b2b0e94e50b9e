"""Files that say what to erase: a list of ids, a CSV, JSON lines, or an image that looks like the records.

    ids.txt      one id a line; every character counts but spaces at both ends, so there are no comments
    ids.csv      a header with a column id, a column owner or both; comma, semicolon or tab; other columns are ignored
    ids.jsonl    {"id": "..."} or {"owner": "..."} in each line; other keys are ignored

A line names a record or an owner. One with both is refused: an owner means everything that is theirs, and a table
of records with their owners would erase far more than its lines.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lmeraser_jax.config import Data
from lmeraser_jax.data.source import content_hash
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.hashing import parse_strict_json
from lmeraser_jax.storage.catalog import Catalog

LARGEST = 100_000_000  # bytes of a file
LONGEST = 4096  # characters of an id or owner
MOST = 100  # errors that a message lists
KINDS = ("id", "owner")
DELIMITERS = ",;\t"
DECODED = ("folder", "tfds")  # sources whose images are decoded from image files


class Named(NamedTuple):
    """What a file names, in its order, each once."""

    ids: tuple[str, ...]
    owners: tuple[str, ...]


class _Line(NamedTuple):
    """What a line says: its number, counted from 1, the id and the owner ("" for none), or what is wrong with it."""

    number: int
    id: str = ""
    owner: str = ""
    wrong: str = ""


def read(path: str) -> Named:
    """Reads a file; its suffix says what it holds (.csv, .jsonl, anything else: a list of ids).

    Raises:
        UserError: no such file, too large, no text in UTF-8, or lines that cannot be used: all of them, with numbers.
    """
    flag = f"--records_file={path}"
    text = _text(Path(path), flag)
    suffix = Path(path).suffix.lower()
    lines = [_checked(line) for line in {".csv": _csv, ".jsonl": _jsonl}.get(suffix, _plain)(text)]
    wrong = [f"line {line.number}: {line.wrong}" for line in lines if line.wrong]
    if len(wrong) > MOST:
        wrong = [*wrong[:MOST], f"... ({len(wrong)} lines in all)"]
    raise_all(wrong, f"{flag} cannot be used; nothing is erased:" if wrong else "")
    if not lines:
        raise UserError(f"{flag} names nothing; nothing is erased")
    ids, owners = ((line.id for line in lines), (line.owner for line in lines))
    return Named(tuple(dict.fromkeys(filter(None, ids))), tuple(dict.fromkeys(filter(None, owners))))


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
    if not Path(path).is_file():
        raise UserError(f"{flag}: {'is no file' if Path(path).exists() else 'no such file'}")
    if dataset is None:
        raise UserError(f"{flag}: the workdir has no records yet")
    height, width, channels = dataset["shape"]
    pixels = decode([Path(path)], height, width, channels, most)
    if pixels.unreadable:
        raise UserError(f"{flag} cannot be read: {pixels.unreadable[0]}")
    found, source = upright_size(Path(path)), dataset["settings"]["source"]
    if source not in DECODED and found != (height, width):
        wanted = f"{height} x {width} pixels, as the images of {source} are stored"
        raise UserError(f"{flag} has {found[0]} x {found[1]} pixels; must have {wanted}")
    return content_hash(pixels.images[0])


def _text(path: Path, flag: str) -> str:
    """The file's text without a byte order mark."""
    if not path.is_file():
        raise UserError(f"{flag}: {'is no file' if Path(path).exists() else 'no such file'}")
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{flag} cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST:
        raise UserError(f"{flag} is larger than {LARGEST} bytes; split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{flag} is not UTF-8 text: {error.reason} in line {line}; save it as UTF-8") from error
    return text


def _checked(line: _Line) -> _Line:
    """The line, with what no name may be."""
    if line.wrong:
        return line
    if line.id and line.owner:
        return line._replace(wrong="names an id and an owner; leave one empty (an owner means all their records)")
    name = line.id or line.owner
    if len(name) > LONGEST:
        return line._replace(wrong=f"longer than {LONGEST} characters")
    if "\0" in name:
        return line._replace(wrong=f"no text: {ascii(name[:80])}")
    return line if name else line._replace(wrong="names neither an id nor an owner")


def _plain(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut ids at rarer characters
        if name := line.strip():
            yield _Line(number, id=name)


def _csv(text: str) -> Iterator[_Line]:
    stream = io.StringIO(text, newline="")
    first = stream.readline()
    try:
        mark, places, width = _header(first)
    except csv.Error as error:
        yield _Line(1, wrong=f"not CSV: {error}")
        return
    if not any(places.values()) or any(len(found) > 1 for found in places.values()):
        yield _Line(1, wrong=f"must name one column id, one column owner, or both; is {ascii(first[:200].strip())}")
        return
    reader = csv.reader(stream, delimiter=mark, strict=True)  # an open quote would swallow rows
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:  # where rows begin is no longer known
            yield _Line(reader.line_num + 1, wrong=f"not CSV: {error}")
            return
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != width:
            yield _Line(reader.line_num + 1, wrong=f"has {len(row)} fields, the header has {width}")
            continue
        cells = {kind: row[found[0]].strip() for kind, found in places.items() if found}
        yield _Line(reader.line_num + 1, **cells)


def _header(line: str) -> tuple[str, dict[str, list[int]], int]:
    """The delimiter that finds most of the wanted columns, {kind: its columns}, the number of columns."""
    best = (DELIMITERS[0], dict[str, list[int]](), 0)
    for mark in DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader([line], delimiter=mark), [])]
        places = {kind: [i for i, name in enumerate(names) if name == kind] for kind in KINDS}
        if not best[1] or sum(map(bool, places.values())) > sum(map(bool, best[1].values())):
            best = (mark, places, len(names))
    return best


def _jsonl(text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = parse_strict_json(line)
        except ValueError as error:
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield _Line(number, wrong=f"not JSON: {what}")
        else:
            yield _object(number, values)


def _object(number: int, values: Any) -> _Line:
    """A JSON line. Names are texts: 17 and "17", or 1e3 and 1000, must not be taken for each other."""
    if not isinstance(values, dict):
        return _Line(number, wrong='must be an object such as {"id": "..."}')
    wrong = [kind for kind in KINDS if not isinstance(values.get(kind, ""), str)]
    if wrong:
        return _Line(number, wrong=f"{' and '.join(wrong)} must be text in quotes")
    return _Line(number, id=values.get("id", ""), owner=values.get("owner", ""))
