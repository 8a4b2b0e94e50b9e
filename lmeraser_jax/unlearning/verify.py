"""Receipts against the workdir: is each whole, in its place, and is what it says still so?

Needs the catalog and the files, no backbone; JAX is loaded only to read slices that a receipt says are in use.
A receipt may come from anywhere and hold anything: nothing in it is ever taken for a path or a query.
"""

import datetime
import functools
import importlib.resources
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.hashing import arrays_digest, digest, parse_strict_json
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning.receipts import Link, chain, receipt_body

LARGEST = 100_000_000  # bytes of a receipt; enough for two million records
MOST = 20  # findings about the structure of one receipt
SHOWN = 200  # characters of a text that a receipt or a library gives
PIECE = 4096  # image rows looked at together


@dataclass(frozen=True)
class Verdict:
    """What was found about one receipt, or about the folder of all.

    Attributes:
        name: the file or folder.
        request: id of the request, "" where it is not known.
        findings: why the receipt does not hold; empty when it does.
        notes: what has changed since, as it may.
    """

    name: str
    request: str
    findings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings


@dataclass(frozen=True, eq=False)
class _Facts:
    """What is so in a workdir at one moment; names are salted as receipts salt them.

    Attributes:
        links: the chain of receipts.
        buried: tombstones of ids and owners.
        live: ids of live records; owners: theirs.
        slices, clusterings: {every one on disk or in the catalog: when it was made, 0 where the catalog has none}.
        versions: of the manifests.
        entries: {cluster: (slice, its reference not salted)} of the published state.
        unpurged: {request: records that it erased and that the catalog still holds}.
        filled: image rows without a record that are not empty.
        orphaned: published slices that have seen an image row without a record.
        told: {request: the parts of its receipt that the catalog knows, too}.
        params: gives the salted digest of a published slice's bytes.
    """

    links: tuple[Link, ...]
    buried: frozenset[str]
    live: frozenset[str]
    owners: frozenset[str]
    slices: Mapping[str, float]
    clusterings: Mapping[str, float]
    versions: frozenset[int]
    entries: Mapping[str, tuple[str, str]]
    unpurged: Mapping[str, int]
    filled: int
    orphaned: int
    receipt_bodies: Mapping[str, Mapping[str, Any]]
    params: Callable[[str], str]


def verify(layout: Layout, catalog: Catalog, paths: Sequence[Path]) -> list[Verdict]:
    """Checks receipts, wherever they lie.

    Raises:
        UserError: a file is not there or cannot be opened.
    """
    facts = _facts(layout, catalog)
    return [_verdict(path, facts) for path in paths]


def verify_all(layout: Layout, catalog: Catalog) -> list[Verdict]:
    """Checks every receipt of a workdir, and that folder and catalog know the same ones.

    Returns:
        A verdict on the folder, then one for each receipt in the order of the chain.
    """
    facts, found = _facts(layout, catalog), [_folder(layout, catalog)]
    for link in facts.links:
        path = layout.receipt(link.request)
        if not requests.LEGAL_NAME.fullmatch(link.request):
            found.append(Verdict(ascii(link.request), "", ("the catalog names a request that cannot exist",)))
        elif not path.is_file():
            found.append(Verdict(str(path), link.request, (f"the receipt at place {link.sequence} is missing",)))
        else:
            found.append(_verdict(path, facts, link))
    return found


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    """Checks values against receipt.schema.json."""
    text = importlib.resources.files("lmeraser_jax.unlearning").joinpath("receipt.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _facts(layout: Layout, catalog: Catalog) -> _Facts:
    with catalog.snapshot():
        manifests, made, query = catalog.manifests(), catalog.slices(), catalog.db.execute
        slices = dict.fromkeys(_names(layout.slices), 0.0) | {name: row.created for name, row in made.items()}
        clusterings = dict.fromkeys(_names(layout.clusterings), 0.0)
        clusterings |= {manifest.clustering: manifest.created for manifest in manifests[::-1]}
        return _Facts(
            links=tuple(chain(catalog)),
            buried=frozenset(row[0] for row in query("SELECT hash FROM tombstones")),
            live=_salted(catalog, "tombstone", "SELECT id FROM records WHERE erased=''"),
            owners=_salted(
                catalog, "owner", "SELECT DISTINCT owner FROM records WHERE erased='' AND owner!='' AND split!='public'"
            ),
            slices={catalog.salted("slice", name): at for name, at in slices.items()},
            clusterings={catalog.salted("clustering", name): at for name, at in clusterings.items()},
            versions=frozenset(manifest.version for manifest in manifests),
            entries={
                catalog.salted("cluster", key): (catalog.salted("slice", ref), ref)
                for key, ref in (manifests[0].entries if manifests else {}).items()
            },
            unpurged=dict(query("SELECT erased,count(*) FROM records WHERE erased!='' GROUP BY erased")),
            filled=_filled(layout, catalog),
            orphaned=len(catalog.orphaned_slices()),
            receipt_bodies={r.id: receipt_body(r) for r in requests.listed(catalog) if not r.open},
            params=functools.cache(lambda reference: catalog.salted("params", _params(layout, reference))),
        )


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _salted(catalog: Catalog, purpose: str, query: str) -> frozenset[str]:
    return frozenset(catalog.salted(purpose, row[0]) for row in catalog.db.execute(query))


def _filled(layout: Layout, catalog: Catalog) -> int:
    """Image rows that belong to no record and still hold something."""
    file = image_file(layout, catalog) if catalog.get("dataset") else None
    if file is None or not len(file):
        return 0
    view = file.view()
    free = np.ones(min(len(view), catalog.rows_used()), bool)
    used = np.array([row[0] for row in catalog.db.execute("SELECT row FROM records")], np.int64)
    free[used[used < len(free)]] = False
    rows = np.flatnonzero(free)
    pieces = (view[rows[first : first + PIECE]] for first in range(0, len(rows), PIECE))
    return sum(int(piece.reshape(len(piece), -1).any(axis=1).sum()) for piece in pieces)


def _params(layout: Layout, reference: str) -> str:
    """Digest of a slice's parameters. Raises `UserError` when they cannot be read."""
    from lmeraser_jax.storage import checkpoints

    name, _, step = reference.partition("@")
    return arrays_digest(checkpoints.load(layout.slice(name), int(step) if step else None)[0])


def _folder(layout: Layout, catalog: Catalog) -> Verdict:
    """What the folder of receipts and the catalog say of each other."""
    links, known = chain(catalog), {request.id: request for request in requests.listed(catalog)}
    findings, notes = [], []
    if [link.sequence for link in links] != list(range(1, len(links) + 1)):
        findings.append(f"the catalog's chain has gaps: {join_limited(link.sequence for link in links)}")
    linked = {link.request for link in links}
    purged = [name for name, request in known.items() if "purged" in dict(request.body["states"])]
    without = sorted(set(purged) - linked)
    if without:
        findings.append(f"finished requests without a receipt in the catalog: {join_limited(without)}")
    if links and not layout.receipts.is_dir():
        findings.append("the folder is missing")
    for name in sorted(_names(layout.receipts)):
        request = known.get(name.removesuffix(".json"))
        if name.startswith(".") or name in {f"{link}.json" for link in linked}:
            continue  # being written, or checked on its own
        if request is not None and request.open:
            notes.append(f"{name} belongs to a request that is not finished yet")
        else:
            findings.append(f"{ascii(name)} is not in the catalog")
    return Verdict(str(layout.receipts), "", tuple(findings), tuple(notes))


def _verdict(path: Path, facts: _Facts, expected: Link | None = None) -> Verdict:
    """Checks one file; `expected` is the receipt that it should be, None for any of the workdir."""
    try:
        values = _read(path)
        findings = _structure(values)
    except _Unreadable as error:
        return Verdict(str(path), "", (str(error),))
    if findings:
        return Verdict(str(path), "", tuple(findings))
    name, sequence = values["request"]["id"], values["sequence"]
    if expected is not None and (name, sequence) != (expected.request, expected.sequence):
        findings.append(f"holds the receipt of {ascii(name)} at place {sequence}, not that of its own request")
    purged_at, wrong = _states(values)
    current, notes = _current(values, facts)
    findings += _chained(values, facts) + wrong + _as_told(values, facts) + _erased(values, facts) + current
    findings += _purged(values, facts, purged_at)
    return Verdict(str(path), name, tuple(findings), tuple(notes))


class _Unreadable(ValueError):
    """A file that holds no receipt."""


def _read(path: Path) -> Any:
    """The values in a file. Raises `UserError` when there is none, `_Unreadable` when it holds no plain JSON."""
    if not path.is_file():
        raise UserError(f"{path} is no file" if path.exists() else f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST:
        raise _Unreadable(f"is larger than {LARGEST} bytes")
    try:
        return parse_strict_json(raw.decode())
    except ValueError as error:
        raise _Unreadable(f"is not JSON: {_short(error)}") from None


def _structure(values: Any) -> list[str]:
    """How the values differ from what a receipt looks like."""
    try:
        errors = itertools.islice(validator().iter_errors(values), MOST)
        return [f"{_short(error.json_path)}: {_short(error.message)}" for error in errors]
    except RecursionError:
        raise _Unreadable("is nested too deeply") from None


def _short(text: object) -> str:
    whole = str(text)
    return ascii(whole[:SHOWN])[1:-1] + ("..." if len(whole) > SHOWN else "")


def _chained(values: Mapping[str, Any], facts: _Facts) -> list[str]:
    """Whether a receipt is unchanged and in its place."""
    sequence, name, found = values["sequence"], values["request"]["id"], []
    if digest({key: value for key, value in values.items() if key != "digest"}) != values["digest"]:
        found.append("was edited: its content has another digest than it says")
    links = {link.sequence: link for link in facts.links}
    link, before = links.get(sequence), links.get(sequence - 1)
    if link is None or link.request != name:
        there = f"the receipt of {link.request}" if link else "none"
        found.append(f"is not of this workdir or not in its place: the catalog has {there} at place {sequence}")
    elif link.digest != values["digest"]:
        found.append("was replaced: the catalog knows it by another digest")
    if values["previous"] != (before.digest if before else ""):
        found.append("does not follow the receipt that the catalog has before it")
    return found


def _as_told(values: Mapping[str, Any], facts: _Facts) -> list[str]:
    """Whether the catalog says the same of the request. It notes the last state a moment later than the receipt."""
    known = facts.receipt_bodies.get(values["request"]["id"])
    if known is None:
        return ["the catalog knows no finished request of this id"]
    both = [{**one, "request": one["request"] | {"states": one["request"]["states"][:-1]}} for one in (values, known)]
    return [f"says another {part} than the catalog" for part in known if both[0][part] != both[1][part]]


def _states(values: Mapping[str, Any]) -> tuple[float, list[str]]:
    """When the purge was finished, and what is wrong with the states."""
    states = values["request"]["states"]
    try:
        times = [datetime.datetime.fromisoformat(state["at"]).timestamp() for state in states]
    except ValueError as error:
        return 0.0, [f"has a time that does not exist: {_short(error)}"]
    order, found = [requests.STATES.index(state["state"]) for state in states], []
    if order != sorted(set(order)) or order[-1] != len(requests.STATES) - 1:
        found.append(f"has states out of order: {join_limited(state['state'] for state in states)}")
    if times != sorted(times):
        found.append("has states whose times run backwards")
    return times[-1], found


def _erased(values: Mapping[str, Any], facts: _Facts) -> list[str]:
    """Whether everything that it erased stays erased."""
    records = [name for names in values["records"].values() for name in names]
    found = []
    for what, names, live in (
        ("records", records, facts.live),
        ("owners", values["request"]["owners"], facts.owners),
    ):
        unburied, back = [name not in facts.buried for name in names], [name in live for name in names]
        if any(unburied):
            found.append(f"{sum(unburied)} of its {what} left no tombstone, so that an import could bring them back")
        if any(back):
            found.append(f"{sum(back)} of its {what} {'are' if what == 'records' else 'have records that are'} live")
    left = facts.unpurged.get(values["request"]["id"], 0)
    return found + ([f"{left} of its records are still in the catalog"] if left else [])


def _purged(values: Mapping[str, Any], facts: _Facts, purged_at: float) -> list[str]:
    """Whether everything that it says was removed is gone.

    A slice or clustering of live records only may be made again, bit for bit, by a later build; that one is younger.
    """
    purged, found = values["purged"], []
    for what, there in (("slices", facts.slices), ("clusterings", facts.clusterings)):
        old = [name for name in purged[what] if name in there and there[name] < purged_at]
        if old:
            found.append(f"{len(old)} of the {what} that were removed are there: {join_limited(old)}")
    kept = sorted(facts.versions.intersection(purged["manifests"]))
    if kept:
        found.append(f"manifests that were removed are there: {join_limited(kept)}")
    if facts.orphaned:
        found.append(f"{facts.orphaned} published slices were made with records that are erased")
    if purged["rows"] and facts.filled:
        found.append(f"{facts.filled} image rows that belong to no record are not empty")
    return found


def _current(values: Mapping[str, Any], facts: _Facts) -> tuple[list[str], list[str]]:
    """Whether slices that it made and that still predict have the bytes that it says: findings and notes."""
    found, replaced = [], 0
    made = [cluster for cluster in values["clusters"] if cluster["after"]]
    for cluster in made:
        key = cluster["cluster"]
        name, reference = facts.entries.get(key, ("", ""))
        if name != cluster["after"]:
            replaced += 1
            continue
        try:
            if facts.params(reference) != cluster["params"]:
                found.append(f"the slice of cluster {key[:12]} has other bytes than it says")
        except UserError as error:
            found.append(f"the slice of cluster {key[:12]} cannot be read: {error}")
    note = f"{replaced} of its {len(made)} slices were replaced by a later request or publication"
    return found, [note] if replaced else []
