"""Rectification: other contents or labels for records, under the same ids (GDPR, article 16).

A rectification is an erasure of the old versions and an import of the new ones, in one request: the old versions count
as erased from its acceptance on, the new ones lie in the catalog until the next build gives them rows of their own. The
state that this build publishes is the one that training with the corrected records gives, and what was made with the
old versions is purged.

An edit is {"id": ..., "image": FILE, "label": CLASS}, or of text {"id": ..., "query": ..., "response": ...}; what it
does not name stays as it is.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeraser_jax.config import Data
from lmeraser_jax.config.paths import expand
from lmeraser_jax.data.names import list_names, quoted
from lmeraser_jax.data.source import content_hash, is_text
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file, store_edits
from lmeraser_jax.storage.requests import Request
from lmeraser_jax.storage.rows import Edit
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import erase, request_files
from lmeraser_jax.unlearning.erase import Erasure, Estimate

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.run import Run

MOST = 100  # problems that a message lists
REFUSED = "nothing is rectified:"
WAITING = "an open request erases or rectifies these; serve it with lmeraser process and repeat this one"
IMAGE_KEYS, TEXT_KEYS = ("id", "image", "label"), ("id", "query", "response")


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What an edit says of a record; None: that stays as it is."""

    id: str
    label: int | None = None
    image: np.ndarray | None = None  # uint8 [h, w, c]
    query: str | None = None
    response: str | None = None

    @property
    def given(self) -> list[Any]:
        """What tells it from another one."""
        image = None if self.image is None else content_hash(self.image)
        return [self.id, self.label, image, self.query, self.response]


def changes_of(
    catalog: Catalog,
    lines: Iterable[tuple[str, Mapping[str, Any] | str]],
    folder: str | Path = ".",
    most: int = Data().max_pixels,
) -> list[Change]:
    """Edits as they were read: where each stands, and its values or what is wrong with it (`request_files.read_edits`).

    Args:
        catalog: of the workdir, whose classes and image shape count.
        folder: in which image files lie that have no absolute path.
        most: pixels that an image file may have (`data.max_pixels`).

    Raises:
        UserError: all edits that cannot be used.
    """
    dataset, changes, problems = catalog.get("dataset"), [], []
    if dataset is None:
        raise UserError("the workdir has no records yet")
    keys = TEXT_KEYS if is_text(dataset["shape"]) else IMAGE_KEYS
    for place, values in lines:
        problem = _problem(values, keys, dataset["classes"])
        if problem or isinstance(values, str):
            problems.append(f"{place}: {problem}")
            continue
        values = dict(values)
        try:
            if isinstance(values.get("image"), str):
                path = Path(folder) / expand(values["image"])
                values["image"] = request_files.pixels_of(catalog, path, f"{place}: {path}", most)
            elif "image" in values:  # bytes of a file
                values["image"] = request_files.pixels_of(catalog, values["image"], f"{place}: image", most)
            if "label" in values:
                values["label"] = dataset["classes"].index(values["label"])
            changes.append(Change(**values))
        except UserError as error:
            problems.append(str(error))
    twice = [name for name, count in Counter(change.id for change in changes).items() if count > 1]
    if twice:
        problems.append(f"several edits for one record: {list_names(twice)}")
    raise_all(problems, REFUSED, MOST)
    return changes


def _problem(values: Mapping[str, Any] | str, keys: Sequence[str], classes: Sequence[str]) -> str:
    """Why an edit cannot be used; "" where nothing is wrong."""
    if isinstance(values, str):
        return values
    if strange := [str(name) for name in values if name not in keys]:
        return f"has {join_limited(strange)}; legal: {', '.join(keys)}"
    texts = {name: value for name, value in values.items() if name != "image" or not isinstance(value, bytes)}
    if wrong := [name for name, value in texts.items() if not isinstance(value, str) or not value.strip()]:
        return f"{' and '.join(wrong)} must be text in quotes, and not empty"
    if "id" not in values or len(values) == 1:
        return f"must have id, and {' or '.join(keys[1:])} or both"
    if "label" in values and values["label"] not in classes:
        return f"there is no class {quoted(values['label'])}; classes: {join_limited(classes)}"
    return ""


def accept(
    layout: Layout,
    catalog: Catalog,
    changes: Sequence[Change],
    encoder: Encoder | None = None,
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
) -> Request | None:
    """Accepts a rectification at once and for good; the writer lock is not needed.

    A change that changes nothing is left out; where none is left there is no request, and the answer is None.

    Args:
        encoder: of the workdir where its records are texts.
        request, requester, reason, quarantine: see `storage.requests.accept`.

    Raises:
        UserError: records that are unknown, erased, public or part of an open request; texts that are too long; an id
            in use for another request. Nothing is changed then.
    """
    given = digest(sorted((change.given for change in changes), key=lambda values: values[0]))
    make_edits = functools.partial(_edits, layout, catalog, changes, encoder)
    return requests.accept_edits(catalog, given, make_edits, request, requester, reason, quarantine)


def _edits(layout: Layout, catalog: Catalog, changes: Sequence[Change], encoder: Encoder | None) -> list[Edit]:
    """The new versions of the records that change. Raises as `accept`."""
    names = [change.id for change in changes]
    known, places = catalog.known(names), catalog.rows(names)
    _refuse_names(catalog, names, known)
    contents, edits, problems = image_file(layout, catalog).view(), [], []
    for change in changes:
        _, content, label, _ = known[change.id]
        row, problem = _new_row(change, np.array(contents[places[change.id]]), content, encoder)
        if row is None or problem:  # no correction is cut
            problems.append(f"{quoted(change.id)}: {problem}")
            continue
        edit = Edit(change.id, label if change.label is None else change.label, content_hash(row), row)
        if (edit.label, edit.content) != (label, content):
            edits.append(edit)
    raise_all(problems, REFUSED, MOST)
    return edits


def _refuse_names(catalog: Catalog, names: Sequence[str], known: Mapping[str, tuple[str, str, int, bool]]) -> None:
    """Raises `UserError` with all ids whose records cannot be replaced."""
    absent = [name for name in names if name not in known]
    erased = [name for name in absent if catalog.is_tombstoned(name)]
    kinds = {
        "unknown records": [name for name in absent if name not in erased],
        "erased records": erased,
        "public records trained the backbone and cannot be rectified": [n for n in known if known[n][0] == "public"],
        WAITING: [name for name in known if known[name][3]],
    }
    raise_all([f"{kind}: {list_names(group)}" for kind, group in kinds.items() if group], REFUSED)


def _new_row(change: Change, old: np.ndarray, content: str, encoder: Encoder | None) -> tuple[np.ndarray | None, str]:
    """The new row of a record, or None and why there is none, given the old row and its content hash."""
    if change.image is not None:
        return change.image, ""
    query, response = change.query, change.response
    if (query is None or response is None) and content_hash(old) != content:
        return None, "its stored content is damaged; lmeraser train --reimport reads it from the source again"
    if encoder is None:
        return old, ""
    if query is None or response is None:
        stored = encoder.texts(old)
        if stored is None:
            return None, "its stored text cannot be read back exactly; give both query and response"
        query, response = query or stored[0], response or stored[1]
    return encoder.row(query, response)


def unchanged(changes: Sequence[Change], request: Request | None) -> int:
    """How many changes were left out of a request because they change nothing."""
    return len(changes) - (len(request.body["records"]) if request is not None else 0)


def estimate(run: "Run", changes: Sequence[Change], encoder: Encoder | None = None) -> Estimate:
    """What a rectification would cost: it is accepted and planned in a transaction that is undone."""
    from lmeraser_jax.unlearning.plan import current_plan

    file = image_file(run.layout, run.catalog)
    try:
        with run.catalog.rehearsal():
            request = accept(run.layout, run.catalog, changes, encoder)
            store_edits(file, run.catalog)
            wanted = current_plan(dataclasses.replace(run, writable=False))
            return erase.estimate_of(run, wanted, len(request.body["records"]) if request is not None else 0)
    finally:
        file.truncate(run.catalog.rows_used())


def request_rectification(
    run: "Run",
    changes: Sequence[Change],
    request: str = "",
    requester: str = "",
    reason: str = "",
    quarantine: bool = False,
    defer: bool = False,
) -> Erasure | None:
    """Replaces records and brings the workdir to the state of having had the new versions from the start.

    Arguments and errors are as of `erase.request_erasure`. None where no change changes anything.
    """
    assert run.writable or defer, "serving a request needs a run that holds the writer lock"
    encoder = run.encoder if run.config.is_text else None
    accepted = accept(run.layout, run.catalog, changes, encoder, request, requester, reason, quarantine)
    if accepted is None:
        return None
    return Erasure(accepted, None, run.layout.receipt(accepted.id)) if defer else erase.serve(run, accepted.id)
