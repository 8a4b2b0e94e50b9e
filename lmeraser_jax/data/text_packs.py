"""Published sets of recommendations -> queries and responses, as lines of JSON that `data.text` reads.

Their files may be gzips. Every line has id, owner, query, response and split.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmeraser_jax.data.text import lines_of
from lmeraser_jax.errors import UserError, shorten
from lmeraser_jax.hashing import philox

HISTORY, CANDIDATES = 10, 20  # films in a query of MovieLens: those watched before, and those to choose from
LAST = 5  # films of a user that are responses: the last is a test record, the others are private ones
YEAR = re.compile(r" \(\d{4}\)$")  # at the end of a title: left out, as a third of the tokens would be years
FLAG = "--path"
Line = dict[str, Any]


def tallrec(paths: Sequence[Path]) -> list[Line]:
    """TALLRec's prompts: JSON lines, or one JSON list, of {"input", "output"}; files with `test` in their name test.

    Raises `UserError` at the first line that is neither.
    """
    lines = []
    for path in paths:
        stem, split = path.name.partition(".")[0], "test" if "test" in path.name else "train"
        for number, example in enumerate(_examples(path), 1):
            query, response = example.get("input"), example.get("output")
            if not isinstance(query, str) or not isinstance(response, str):
                keys = shorten(", ".join(map(str, example)))
                raise UserError(f"{FLAG}={path}: example {number} needs input and output as text; its keys: {keys}")
            lines.append(_line(f"{stem}/{number}", "", query, response, split))
    return lines


def _examples(path: Path) -> Iterator[Line]:
    text = "\n".join(lines_of(path, FLAG))
    try:
        rows = (
            json.loads(text) if text.startswith("[") else [json.loads(row) for row in text.split("\n") if row.strip()]
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{FLAG}={path} is no JSON: {error}") from error
    return (row if isinstance(row, dict) else {} for row in rows)


def movielens(paths: Sequence[Path]) -> list[Line]:
    """The next film of every user of MovieLens, by a folder with movies.csv and ratings.csv: `LAST` lines a user.

    A query has the ten films that the user rated before, and 20 candidates: the film that followed and 19 that the user
    never rated, drawn and ordered by a keyed hash. A line has the candidates once more, as a list. Raises `UserError`
    where a file or a column is missing.
    """
    if len(paths) != 1:
        raise UserError(f"{FLAG} must be one folder with movies.csv and ratings.csv")
    films = _table(paths[0], "movies.csv", ("movieId", "title"))
    titles = {row["movieId"]: YEAR.sub("", row["title"]) for row in films}
    watched: dict[str, list[tuple[int, int]]] = defaultdict(list)
    ratings = _table(paths[0], "ratings.csv", ("userId", "movieId", "timestamp"))
    try:
        for row in ratings:
            watched[row["userId"]].append((int(row["timestamp"]), int(row["movieId"])))
        ordered = {user: [str(film) for _, film in sorted(rated)] for user, rated in watched.items()}
        return [line for user, rated in ordered.items() for line in _next_films(user, rated, titles)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{FLAG}={paths[0]}: a rating is cut short, or of a film without a title: {error}") from error


def _next_films(user: str, films: Sequence[str], titles: Mapping[str, str]) -> Iterator[Line]:
    """The lines of a user; `films` are ids in the order of their ratings."""
    unseen = sorted(set(titles.values()) - {titles[film] for film in films})
    for place in range(max(HISTORY, len(films) - LAST), len(films)):
        rng, response = philox(0, "candidates", user, films[place]), titles[films[place]]
        others = rng.choice(len(unseen), CANDIDATES - 1, replace=False)
        candidates = rng.permutation([response, *(unseen[i] for i in others)]).tolist()
        history = "; ".join(titles[film] for film in films[place - HISTORY : place])
        query = f"Films watched: {history}\nThe next is one of: {'; '.join(candidates)}"
        split = "test" if place == len(films) - 1 else "train"
        yield _line(f"{user}/{films[place]}", user, query, response, split) | {"candidates": candidates}


def _table(folder: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a CSV, or of a gzip of it beside that name."""
    path = folder / name
    rows = csv.DictReader(lines_of(path if path.exists() else folder / f"{name}.gz", FLAG))
    if missing := set(columns) - set(rows.fieldnames or ()):
        raise UserError(f"{FLAG}={path} has no column {', '.join(sorted(missing))}")
    return rows


def _line(name: str, owner: str, query: str, response: str, split: str) -> Line:
    return {"id": name, "owner": owner, "query": query, "response": response, "split": split}


PACKS = {"tallrec": tallrec, "movielens": movielens}
