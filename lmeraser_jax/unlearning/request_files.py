"""Files of requests: the records to erase as a list of ids, a CSV, JSON lines or an image file; edits as JSON lines.

    ids.txt      one id a line, as it stands: there are no quotes and no comments
    ids.csv      a header with a column id, a column owner or both; comma, semicolon or tab; other columns are ignored;
                 a name with the delimiter or a double quote stands in double quotes, its own doubled
    ids.jsonl    {"id": "..."} or {"owner": "..."} in each line, names as JSON strings or whole numbers; other keys are
                 ignored

A line names a record or an owner. One with both is refused: an owner means all of their records, and a table of
records with their owners would erase far more than its lines.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.config import Data
from lmeraser_jax.data.label_csv import as_text, read_header
from lmeraser_jax.data.names import fault, quoted, whole_as_text
from lmeraser_jax.data.source import content_hash, is_text
from lmeraser_jax.errors import UserError, raise_all, shorten
from lmeraser_jax.hashing import parse_strict_json
from lmeraser_jax.storage.catalog import Catalog

LARGEST = 100_000_000  # bytes of a file; as a receipt enough for two million records
MOST = 100  # problems that a message lists
KINDS = ("id", "owner")
DECODED = ("folder", "tfds")  # sources whose images are decoded from image files


class Named(NamedTuple):
    """The ids and owners that a file names, in its order, each once."""

    ids: tuple[str, ...]
    owners: tuple[str, ...]


_Line = tuple[int, dict[str, str] | str]  # its number, counted from 1; the id and owner in it, or the problem with it


def read(path: str) -> Named:
    """Reads a file; its suffix says its format (.csv, .jsonl, anything else: a list of ids).

    Raises:
        UserError: no such file, too large, no text in UTF-8, or lines that cannot be used: all of them, with numbers.
    """
    flag = f"--records_file={path}"
    parser = {".csv": _parse_csv, ".jsonl": _parse_jsonl}.get(Path(path).suffix.lower(), _parse_text)
    lines = list(parser(_text(Path(path), flag)))
    problems = [f"line {number}: {_problem(values)}" for number, values in lines if _problem(values)]
    raise_all(problems, f"{flag} cannot be used; nothing is erased:", MOST)
    if not lines:
        raise UserError(f"{flag} names nothing; nothing is erased")
    ids, owners = ([values.get(kind) for _, values in lines if isinstance(values, dict)] for kind in KINDS)
    ids, owners = (tuple(name for name in dict.fromkeys(names) if name) for names in (ids, owners))
    return Named(ids, owners)


def read_edits(path: str) -> list[tuple[str, dict[str, Any] | str]]:
    """Where each line of a file of JSON lines stands, and its values or what is wrong with it. Raises as `read`."""
    flag = f"--edits={path}"
    lines = [(f"line {number}", values) for number, values in _parse_jsonl(_text(Path(path), flag))]
    if not lines:
        raise UserError(f"{flag} has no edit; nothing is rectified")
    return lines


def content_of(catalog: Catalog, file: Path | bytes, name: str, most: int = Data().max_pixels) -> str:
    """The content hash that a record of a workdir has, or would have, whose source is an image file.

    Arguments and errors are as of `pixels_of`.
    """
    return content_hash(pixels_of(catalog, file, name, most))


def pixels_of(catalog: Catalog, file: Path | bytes, name: str, most: int = Data().max_pixels) -> np.ndarray:
    """The pixels uint8 [h, w, c] of a record of a workdir whose source is an image file, or the bytes of one.

    `name` is for messages.

    Where the records came from image files, it is brought to the stored size as they were; where they came as arrays,
    it must have their size. `most` is the number of pixels that a file may have (`data.max_pixels`).

    Raises:
        UserError: no readable image, or another size.
    """
    from lmeraser_jax.data.decode import decode, upright_size  # needs Pillow

    dataset = catalog.get("dataset")
    if isinstance(file, Path):
        _require_file(file, name)
    if dataset is None:
        raise UserError(f"{name}: the workdir has no records yet")
    if is_text(dataset["shape"]):
        raise UserError(f"{name}: the workdir holds text; name records with --records, or an owner with --owner")
    height, width, channels = dataset["shape"]
    pixels = decode([file], height, width, channels, most)
    if pixels.unreadable:
        raise UserError(f"{name} cannot be read: {pixels.unreadable[0]}")
    size, source = upright_size(file), dataset["settings"]["source"]
    if source not in DECODED and size != (height, width):
        legal = f"{height} x {width} pixels, as the images of {source} are stored"
        raise UserError(f"{name} has {size[0]} x {size[1]} pixels; must have {legal}")
    return pixels.rows[0]


def read_bytes(path: Path, name: str) -> bytes:
    """The first `LARGEST` + 1 bytes of a file that messages call by a name. Raises `UserError` if there is none."""
    _require_file(path, name)
    with open(path, "rb") as file:
        return file.read(LARGEST + 1)


def _require_file(path: Path, name: str) -> None:
    if not path.is_file():
        raise UserError(f"{name}: {'is no file' if path.exists() else 'no such file'}")


def _text(path: Path, flag: str) -> str:
    """The file's text without a byte order mark."""
    raw = read_bytes(path, flag)
    if len(raw) > LARGEST:
        raise UserError(f"{flag} is larger than {LARGEST} bytes; split it")
    try:
        return as_text(raw)
    except ValueError as error:
        raise UserError(f"{flag} is {error}") from error


def _problem(values: dict[str, str] | str) -> str:
    """Why a line names neither a record nor an owner; empty where it names one."""
    if isinstance(values, str):
        return values
    name = values.get("id") or values.get("owner") or ""
    if values.get("id") and values.get("owner"):
        return "names an id and an owner; leave one empty (an owner means all their records)"
    if not name:
        return "names neither an id nor an owner"
    return fault(name) and f"{quoted(name)} {fault(name)}, so that no record can have this name"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; splitlines() would cut ids at rarer characters."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _parse_text(text: str) -> Iterator[_Line]:
    return ((number, {"id": line.removesuffix("\r")}) for number, line in _lines(text))


def _parse_csv(text: str) -> Iterator[_Line]:
    stream = io.StringIO(text, newline="")
    line = 1
    try:
        names, delimiter, line = read_header(stream, KINDS)
        columns = [name.lower() for name in names]
        if not set(KINDS) & set(columns) or any(columns.count(kind) > 1 for kind in KINDS):
            yield line, f"must name one column id, one column owner, or both; is {shorten(delimiter.join(names))}"
            return
        reader = csv.reader(stream, delimiter=delimiter, strict=True)  # an open quote would swallow rows
        header_lines = line
        line += 1
        for row in reader:
            filled = any(map(str.strip, row))
            if filled and len(row) != len(columns):
                yield line, f"has {len(row)} fields, the header has {len(columns)}"
            elif filled:
                yield line, dict(zip(columns, row, strict=True))
            line = reader.line_num + header_lines + 1  # a row may hold line breaks; the header was read before
    except csv.Error as error:  # where the next row begins is unknown
        yield line, f"not CSV: {error}"


def _parse_jsonl(text: str) -> Iterator[_Line]:
    return ((number, _parse_object(line)) for number, line in _lines(text))


def _parse_object(line: str) -> dict[str, str] | str:
    """A JSON line. A whole number is a name as text, as in a file of records; 1e3 and 1000 are not the same."""
    try:
        values = parse_strict_json(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg}, column {error.colno}"
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(values, dict):
        return 'must be an object such as {"id": "..."}'
    values |= {kind: whole_as_text(values[kind]) for kind in KINDS if kind in values}
    untexted = [kind for kind in KINDS if not isinstance(values.get(kind, ""), str)]
    return f"{' and '.join(untexted)} must be text in quotes, or a whole number" if untexted else values
