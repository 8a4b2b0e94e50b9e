"""A CSV that names image files, their labels and their owners, matched to the files of a folder.

A cell counts as it stands; one with the delimiter or a double quote stands in double quotes, its own doubled.
"""

import codecs
import csv
import functools
import io
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from lmeraser_jax.data.names import list_lookalikes, quoted
from lmeraser_jax.errors import UserError, join_limited, raise_all, shorten

DELIMITERS = ",;\t"
LISTED = 100  # names in a message


class Row(NamedTuple):
    """What the CSV says of one file; label and owner may be empty."""

    file: str
    label: str
    owner: str = ""


def read(path: str, columns: str, names: Sequence[str], folders: Sequence[str], root: str = "") -> dict[str, Row]:
    """Reads the CSV (comma, semicolon or tab separated, UTF-8): {name of an image: its row}.

    A row's file is a path below the data folder, else below a role's folder, else a file name, else a file
    name without its suffix; it has to match one image only. What matches nothing as it stands is read as a path that
    may have backslashes or be absolute.

    Args:
        columns: names of the columns for file, label and owner; the owner may be left out.
        names: image files, as paths below the data folder `root`.
        folders: for each, its role's folder below the data folder ("." for the data folder itself).

    Raises `UserError`: no such file, wrong columns, or all rows that do not name one image of their own.
    """
    rows = _rows(path, columns)
    counts = Counter(row.file for row in rows)
    matches = dict(sorted(_matches(counts.keys() - {""}, names, folders, root).items()))
    absent = sorted(counts.keys() - {""} - matches.keys())
    spellings = defaultdict(list)
    for file, images in matches.items():
        if len(images) == 1:
            spellings[images[0]].append(quoted(file))
    offenders = {
        "has rows without a file name": [f"row {number}" for number, row in enumerate(rows, 1) if not row.file],
        "names files more than once": [quoted(file) for file in counts if file and counts[file] > 1],
        "names files that could be several images; give their paths": [
            f"{quoted(file)} ({' or '.join(map(quoted, images[:2]))})"
            for file, images in matches.items()
            if len(images) > 1
        ],
        "names files that are not there": list(map(quoted, absent)),
        "names one image in several ways": [
            f"{quoted(name)} ({', '.join(files)})" for name, files in sorted(spellings.items()) if len(files) > 1
        ],
    }
    problems = [f"{path} {fault}: {join_limited(files, LISTED)}" for fault, files in offenders.items() if files]
    alike = list_lookalikes(absent, {*names, *(PurePosixPath(name).name for name in names)}) if absent else ""
    raise_all(
        [*problems, f"did you mean {alike}?"] if alike else problems,
        "the labels do not fit the images (--config.data.labels):",
    )
    return {matches[row.file][0]: row for row in rows}


def path_below(name: str, folder: str) -> str:
    """A path below the data folder as a path below a role's folder."""
    return name if folder == "." else name.removeprefix(folder + "/")


def _matches(files: Collection[str], names: Sequence[str], folders: Sequence[str], root: str) -> dict[str, list[str]]:
    """{file: the images it may mean}; the first of the four ways to name an image that fits any image counts."""
    ways = (
        lambda name, folder: name,
        path_below,
        lambda name, folder: PurePosixPath(name).name,
        lambda name, folder: PurePosixPath(name).stem,
    )
    matches: dict[str, list[str]] = {}
    for read_file, key_of in itertools.product((str, functools.partial(_below, root)), ways):
        left, new = defaultdict(list), defaultdict(list)
        for file in set(files) - matches.keys():
            left[read_file(file)].append(file)
        for name, folder in zip(names, folders, strict=True) if left else ():
            for file in left.get(key_of(name, folder), ()):
                new[file].append(name)
        matches |= new
    return matches


def _below(root: str, file: str) -> str:
    """A path that may have backslashes; an absolute one as a path below the data folder, if it lies there."""
    path = PurePosixPath(os.path.normpath(file))
    for folder in (root, os.path.realpath(root)):
        if root and path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return str(PurePosixPath(file.replace("\\", "/")))


def _rows(path: str, columns: str) -> list[Row]:
    """The rows of the CSV, empty ones left out."""
    if not Path(path).is_file():
        raise UserError(f"--config.data.labels={path}: no such file")
    wanted = [name.strip() for name in columns.split(",")]
    try:
        stream = io.StringIO(as_text(Path(path).read_bytes()), newline="")
        header, delimiter, _ = read_header(stream, wanted)
        needed = wanted[:2] if wanted[2:] == ["owner"] else wanted  # the config's default: owners are optional
        missing = [name for name in needed if name not in header]
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(missing)}; it has {join_limited(map(shorten, header)) or 'none'};"
                f" name its columns for file,label[,owner] with --config.data.csv_columns (now {','.join(wanted)})"
            )
        twice = [name for name in dict.fromkeys(wanted) if header.count(name) > 1]
        if twice:
            raise UserError(f"{path} has several columns named {', '.join(twice)} (--config.data.csv_columns)")
        reader = csv.reader(stream, delimiter=delimiter, strict=True)  # an open quote would swallow rows
        cells = [row for row in reader if any(map(str.strip, row))]
    except (ValueError, csv.Error) as error:
        raise UserError(f"--config.data.labels={path} is not a readable CSV in UTF-8: {error}") from error
    longer = [number for number, row in enumerate(cells, 1) if any(map(str.strip, row[len(header) :]))]
    if longer:
        raise UserError(
            f"{path} has more cells in rows {join_limited(longer)} than columns in its first line ({len(header)}); put"
            " quotes around names with commas"
        )
    return [Row(*(dict(zip(header, row, strict=False)).get(name, "") for name in wanted)) for row in cells]


def as_text(raw: bytes) -> str:
    """The text of a file without its byte order mark. Raises ValueError where it is not UTF-8: what to do about it."""
    reason, wide = "", raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * raw.count(0) > len(raw) > 7
    try:
        text = raw.decode("utf-8-sig")
        if not wide:
            return text
    except UnicodeDecodeError as error:
        reason = f": {error.reason} in line {raw[: error.start].count(bytes([10])) + 1}"
    name, code = ("UTF-16, Excel's Unicode text", "UTF-16") if wide else ("Windows-1252, Excel's CSV", "CP1252")
    raise ValueError(
        f"not UTF-8 text{reason}; perhaps it is {name}: save it as CSV UTF-8, or run iconv -f {code} -t UTF-8"
    )


def read_header(stream: IO[str], wanted: Iterable[str]) -> tuple[list[str], str, int]:
    """Reads the first line of a CSV: the column names, the delimiter, and the number of lines read.

    The delimiter is what Excel's own first line `sep=;` says, else the one that finds most wanted columns. Raises
    csv.Error.
    """
    known, marks, line = {name.lower() for name in wanted}, DELIMITERS, stream.readline()
    said = re.fullmatch(r'"?sep=(.)"?\s*', line, re.IGNORECASE)
    if said:
        marks, line = said[1], stream.readline()
    headers = {mark: [name.strip() for name in next(csv.reader([line], delimiter=mark), [])] for mark in marks}
    delimiter = max(marks, key=lambda mark: len(known & {name.lower() for name in headers[mark]}))
    return headers[delimiter], delimiter, 2 if said else 1
