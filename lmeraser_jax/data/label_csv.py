"""A CSV that names image files, their labels and their owners, matched to the files of a folder."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TextIO

from lmeraser_jax.data.names import shown
from lmeraser_jax.errors import UserError, join_limited, raise_all

DELIMITERS = ",;\t"
LISTED = 100  # names in a message


class Row(NamedTuple):
    """What the CSV says of one file; label and owner may be empty."""

    file: str
    label: str
    owner: str


def read(path: str, columns: str, names: Sequence[str], folders: Sequence[str]) -> dict[str, Row]:
    """Reads the CSV (comma, semicolon or tab separated, UTF-8) and finds the file of every row.

    A row's file is a path below the data folder, else below a role's folder, else a file name, else a file
    name without its suffix; whatever is matched has to be unique.

    Args:
        path: the CSV.
        columns: names of its columns for file, label and owner; the owner may be left out.
        names: image files, as paths below the data folder.
        folders: for each, its role's folder below the data folder ("." for the data folder itself).

    Returns:
        {name: row} for the files that the CSV names.

    Raises:
        UserError: no such file, wrong columns; rows that name no file, several files, or a file that another
            row names too, all at once.
    """
    rows = _rows(path, columns)
    found = []
    nameless = [f"row {number}" for number, row in enumerate(rows, 1) if not row.file]
    if nameless:
        found.append(f"{path} has rows without a file name: {join_limited(nameless, LISTED)}")
    rows = [row for row in rows if row.file]
    twice = [file for file, count in Counter(row.file for row in rows).items() if count > 1]
    if twice:
        found.append(f"{path} names files more than once: {join_limited(map(shown, twice), LISTED)}")
    places, ambiguous, unknown = _places({row.file for row in rows}, names, folders)
    if ambiguous:
        lines = [f"{shown(file)} ({' or '.join(several[:2])})" for file, several in sorted(ambiguous.items())]
        found.append(
            f"{path} names files that could be several images; give their paths: {join_limited(lines, LISTED)}"
        )
    if unknown:
        found.append(f"{path} names files that are not there: {join_limited(map(shown, sorted(unknown)), LISTED)}")
    spellings = defaultdict(list)
    for file, name in places.items():
        spellings[name].append(file)
    same = [
        f"{name} ({', '.join(map(shown, sorted(files)))})"
        for name, files in sorted(spellings.items())
        if len(files) > 1
    ]
    if same:
        found.append(f"{path} names one image in several ways: {join_limited(same, LISTED)}")
    raise_all(found, "the labels do not fit the images (--config.data.labels):" if found else "")
    return {places[row.file]: row for row in rows}


def _places(
    files: set[str], names: Sequence[str], folders: Sequence[str]
) -> tuple[dict[str, str], dict[str, list[str]], set[str]]:
    """Finds files among the names: {file: name}, {file: several names} and files that are not there."""
    places: dict[str, str] = {}
    ambiguous: dict[str, list[str]] = {}
    left = set(files)
    for way in (_whole, _below, _base, _stem):
        matches = defaultdict(list)
        for name, folder in zip(names, folders, strict=True):
            if (key := way(name, folder)) in left:
                matches[key].append(name)
        for file, several in matches.items():
            if len(several) == 1:
                places[file] = several[0]
            else:
                ambiguous[file] = several
        left -= set(matches)
        if not left:
            break
    return places, ambiguous, left


def _whole(name: str, folder: str) -> str:
    return name


def _below(name: str, folder: str) -> str:
    return name if folder == "." else name.removeprefix(folder + "/")


def _base(name: str, folder: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str, folder: str) -> str:
    return PurePosixPath(name).stem


def _rows(path: str, columns: str) -> list[Row]:
    """The rows of the CSV; cells are stripped, paths normal, empty rows left out."""
    if not Path(path).is_file():
        raise UserError(f"--config.data.labels={path}: no such file")
    wanted = [name.strip() for name in columns.split(",")]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, reader = _opened(file, wanted)
            # a CSV without owners is fine unless the config names their column
            needed = wanted[:2] if wanted[2:] == ["owner"] else wanted
            missing = [name for name in needed if name not in header]
            if missing:
                raise UserError(
                    f"{path} lacks the columns {', '.join(missing)}; it has"
                    f" {join_limited(map(shown, header)) or 'none'};"
                    f" name its columns for file,label[,owner] with --config.data.csv_columns (now {columns})"
                )
            twice = [name for name in dict.fromkeys(wanted) if header.count(name) > 1]
            if twice:
                raise UserError(f"{path} has several columns named {', '.join(twice)} (--config.data.csv_columns)")
            places = [header.index(name) if name in header else -1 for name in wanted] + [-1]
            cells = [[_cell(row, place) for place in places[:3]] for row in reader if any(map(str.strip, row))]
            return [Row(_normal(file), label, owner) for file, label, owner in cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--config.data.labels={path} is not a readable CSV in UTF-8: {error}") from error


def _opened(file: TextIO, wanted: list[str]) -> tuple[list[str], Iterator[list[str]]]:
    """The header and a reader of the rows; the delimiter is the one that finds most of the wanted columns."""
    first = file.readline()
    headers = {mark: [name.strip() for name in next(csv.reader([first], delimiter=mark), [])] for mark in DELIMITERS}
    mark = max(DELIMITERS, key=lambda mark: len(set(wanted) & set(headers[mark])))
    return headers[mark], csv.reader(file, delimiter=mark, strict=True)  # an open quote would swallow rows


def _cell(row: list[str], place: int) -> str:
    return row[place].strip() if 0 <= place < len(row) else ""


def _normal(file: str) -> str:
    """A path with slashes and without ./ in front."""
    return str(PurePosixPath(file.replace("\\", "/"))) if file else ""
