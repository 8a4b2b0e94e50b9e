"""Checks receipts against a workdir: is each unchanged and in its place, and does what it says still hold?

Reads the catalog and the files; loads neither JAX nor Orbax. A receipt may come from anywhere and hold anything:
nothing in it is ever taken for a path or for SQL.
"""

import datetime
import functools
import importlib.resources
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from lmeraser_jax.errors import UserError, join_limited, shorten
from lmeraser_jax.hashing import arrays_digest, digest, parse_strict_json
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.rows import ReceiptLink
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning.artifacts import split_reference
from lmeraser_jax.unlearning.receipts import receipt_body

LARGEST = 100_000_000  # bytes of a receipt; enough for two million records
MOST = 20  # findings about the structure of one receipt
SHOWN = 200  # characters of a text that a receipt or a library gives


@dataclass(frozen=True)
class Verdict:
    """The result of checking one receipt, or the folder of all receipts."""

    name: str  # of the file or folder
    request: str  # its id, "" where it is not known
    findings: tuple[str, ...]  # why the receipt does not hold; empty when it does
    notes: tuple[str, ...] = ()  # legal changes since the receipt was written

    @property
    def ok(self) -> bool:
        return not self.findings


class _Snapshot:
    """A workdir at one moment; names are salted as receipts salt them."""

    def __init__(self, layout: Layout, catalog: Catalog):
        self._layout, self._salted, salted = layout, catalog.salted, catalog.salted
        with catalog.snapshot():
            manifests, free_rows = catalog.manifests(), catalog.free_rows()
            finished = [request for request in requests.listed(catalog) if not request.open]
            slices = dict.fromkeys(_names(layout.slices), 0.0)  # 0: on disk, and unknown to the catalog
            slices |= {name: row.created for name, row in catalog.slices().items()}
            clusterings = dict.fromkeys(_names(layout.clusterings), 0.0)
            clusterings |= {manifest.clustering: manifest.created for manifest in reversed(manifests)}
            self.links = {link.sequence: link for link in catalog.receipts()}
            self.bodies = {request.id: receipt_body(request) for request in finished}
            self.unpurged = {request.id: len(catalog.erased([request.id])) for request in finished}
            self.tombstones = catalog.tombstones()
            live = catalog.live("train", "holdout", "test", "public").ids
            self.live = {
                "records": {salted("tombstone", name) for name in live},
                "owners": {salted("owner", name) for name in catalog.owner_splits()},
            }
            self.created = {
                "slices": {salted("slice", name): seconds for name, seconds in slices.items()},
                "clusterings": {salted("clustering", name): seconds for name, seconds in clusterings.items()},
            }
            self.versions = {manifest.version for manifest in manifests}
            entries = manifests[0].entries if manifests else {}
            self.published = {salted("cluster", key): reference for key, reference in entries.items()}
            self.filled_rows = len(image_file(layout, catalog).filled(free_rows)) if len(free_rows) else 0
            self.orphaned_slices = len(catalog.orphaned_slices())

    def slice(self, cluster: str) -> str:
        """The published slice of a cluster; empty where there is none."""
        return self._salted("slice", self.published[cluster]) if cluster in self.published else ""

    def params(self, cluster: str) -> str:
        """The digest of the published slice's parameters. Raises `UserError` when they cannot be read."""
        name, step = split_reference(self.published[cluster])
        return self._salted("params", arrays_digest(checkpoints.load(self._layout.slice(name), step or None)[0]))


class _Unusable(ValueError):
    """A file that holds no receipt; the arguments are findings."""


def verify(layout: Layout, catalog: Catalog, paths: Sequence[Path]) -> list[Verdict]:
    """Checks receipts, wherever they lie.

    Raises:
        UserError: a file is not there or cannot be opened.
    """
    snapshot = _Snapshot(layout, catalog)
    return [_verdict(path, snapshot) for path in paths]


def verify_all(layout: Layout, catalog: Catalog) -> list[Verdict]:
    """Checks every receipt of a workdir, and that the folder and the catalog hold the same receipts.

    Returns:
        A verdict on the folder, then one for each receipt in the order of the chain.
    """
    snapshot, verdicts = _Snapshot(layout, catalog), [_folder_verdict(layout, catalog)]
    for link in snapshot.links.values():
        path = layout.receipt(link.request)
        if not requests.LEGAL_NAME.fullmatch(link.request):
            verdicts.append(Verdict(ascii(link.request), "", ("the catalog names a request that cannot exist",)))
        elif not path.is_file():
            verdicts.append(Verdict(str(path), link.request, (f"the receipt at place {link.sequence} is missing",)))
        else:
            verdicts.append(_verdict(path, snapshot, link))
    return verdicts


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    """Checks values against receipt.schema.json."""
    text = importlib.resources.files("lmeraser_jax.unlearning").joinpath("receipt.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _folder_verdict(layout: Layout, catalog: Catalog) -> Verdict:
    """Compares the folder of receipts with the catalog."""
    links, known = catalog.receipts(), {request.id: request for request in requests.listed(catalog)}
    findings, notes = [], []
    if [link.sequence for link in links] != list(range(1, len(links) + 1)):
        findings.append(f"the catalog's chain has gaps: {join_limited(link.sequence for link in links)}")
    linked = {link.request for link in links}
    purged = {name for name, request in known.items() if "purged" in dict(request.body["states"])}
    if purged - linked:
        findings.append(f"finished requests without a receipt in the catalog: {join_limited(sorted(purged - linked))}")
    if links and not layout.receipts.is_dir():
        findings.append("the folder is missing")
    for name in _names(layout.receipts):
        if name.startswith(".") or name in {f"{request}.json" for request in linked}:
            continue  # being written, or checked on its own
        request = known.get(name.removesuffix(".json"))
        if request is not None and request.open:
            notes.append(f"{name} belongs to a request that is not finished yet")
        else:
            findings.append(f"{ascii(name)} is not in the catalog")
    return Verdict(str(layout.receipts), "", tuple(findings), tuple(notes))


def _verdict(path: Path, snapshot: _Snapshot, expected: ReceiptLink | None = None) -> Verdict:
    """Checks one file; `expected` is the receipt that it must be, None for any receipt of the workdir."""
    try:
        values = _read(path)
        times = _times(values)
    except _Unusable as error:
        return Verdict(str(path), "", error.args)
    request, sequence = values["request"]["id"], values["sequence"]
    findings = []
    if expected is not None and (request, sequence) != (expected.request, expected.sequence):
        findings.append(f"holds the receipt of {ascii(request)} at place {sequence}, not that of its own request")
    changes, notes = _check_published(values, snapshot)
    findings += _check_chain(values, snapshot) + _check_states(values, times) + _check_body(values, snapshot)
    findings += _check_erased(values, snapshot) + changes + _check_purged(values, snapshot, times[-1])
    return Verdict(str(path), request, tuple(findings), tuple(notes))


def _read(path: Path) -> dict[str, Any]:
    """The values of a receipt that fits the schema.

    Raises:
        UserError: there is no file.
        _Unusable: it holds no receipt.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file" if path.exists() else f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > LARGEST:
        raise _Unusable(f"is larger than {LARGEST} bytes")
    try:
        values = parse_strict_json(raw.decode())
        errors = list(itertools.islice(validator().iter_errors(values), MOST))
    except ValueError as error:
        raise _Unusable(f"is not JSON: {shorten(str(error), SHOWN)}") from None
    except RecursionError:
        raise _Unusable("is nested too deeply") from None
    if errors:
        raise _Unusable(*(f"{shorten(error.json_path, SHOWN)}: {shorten(error.message, SHOWN)}" for error in errors))
    return values


def _times(values: Mapping[str, Any]) -> list[float]:
    """When the request reached each of its states, in seconds since the epoch."""
    try:
        return [datetime.datetime.fromisoformat(state["at"]).timestamp() for state in values["request"]["states"]]
    except ValueError as error:
        raise _Unusable(f"has a time that does not exist: {shorten(str(error), SHOWN)}") from None


def _check_chain(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Is the receipt unchanged and in its place?"""
    sequence, findings = values["sequence"], []
    if digest({key: value for key, value in values.items() if key != "digest"}) != values["digest"]:
        findings.append("was edited: its content has another digest than it says")
    link, previous = snapshot.links.get(sequence), snapshot.links.get(sequence - 1)
    if link is None or link.request != values["request"]["id"]:
        holder = f"the receipt of {link.request}" if link else "none"
        findings.append(f"is not of this workdir or not in its place: the catalog has {holder} at place {sequence}")
    elif link.digest != values["digest"]:
        findings.append("was replaced: the catalog knows it by another digest")
    if values["previous"] != (previous.digest if previous else ""):
        findings.append("does not follow the receipt that the catalog has before it")
    return findings


def _check_states(values: Mapping[str, Any], times: Sequence[float]) -> list[str]:
    """Are the states and their times in order, and is the purge the last one?"""
    states, findings = [state["state"] for state in values["request"]["states"]], []
    if states != [state for state in requests.STATES if state in states] or states[-1] != requests.STATES[-1]:
        findings.append(f"has states out of order: {join_limited(states)}")
    if list(times) != sorted(times):
        findings.append("has states whose times run backwards")
    return findings


def _check_body(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Does the catalog say the same of the request? It notes the last state a moment later than the receipt."""
    body = snapshot.bodies.get(values["request"]["id"])
    if body is None:
        return ["the catalog knows no finished request of this id"]
    return [
        f"says another {name} than the catalog" for name in body if _timeless(values[name]) != _timeless(body[name])
    ]


def _timeless(value: Any) -> Any:
    """A field of a receipt; the request without its last state."""
    return value | {"states": value["states"][:-1]} if "states" in value else value


def _check_erased(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Does everything that it erased stay erased?"""
    records, findings = list(itertools.chain(*values["records"].values())), []
    for kind, names, verb in (
        ("records", records, "are"),
        ("owners", values["request"]["owners"], "have records that are"),
    ):
        unmarked = sum(name not in snapshot.tombstones for name in names)
        live = sum(name in snapshot.live[kind] for name in names)
        if unmarked:
            findings.append(f"{unmarked} of its {kind} left no tombstone, so that an import could bring them back")
        if live:
            findings.append(f"{live} of its {kind} {verb} live")
    unpurged = snapshot.unpurged.get(values["request"]["id"], 0)
    if unpurged:
        findings.append(f"{unpurged} of its records are still in the catalog")
    return findings


def _check_purged(values: Mapping[str, Any], snapshot: _Snapshot, purged_at: float) -> list[str]:
    """Is everything that it says was removed still absent?

    A slice or clustering of live records may be made again, bit for bit, by a later build; that one is younger.
    """
    purged, findings = values["purged"], []
    for kind, created in snapshot.created.items():
        back = [name for name in purged[kind] if created.get(name, purged_at) < purged_at]
        if back:
            findings.append(f"{len(back)} of the {kind} that were removed are there: {join_limited(back)}")
    versions = sorted(snapshot.versions.intersection(purged["manifests"]))
    if versions:
        findings.append(f"manifests that were removed are there: {join_limited(versions)}")
    if snapshot.orphaned_slices:
        findings.append(f"{snapshot.orphaned_slices} published slices were made with records that are erased")
    if purged["rows"] and snapshot.filled_rows:
        findings.append(f"{snapshot.filled_rows} image rows that belong to no record are not empty")
    return findings


def _check_published(values: Mapping[str, Any], snapshot: _Snapshot) -> tuple[list[str], list[str]]:
    """Do slices that it published and that still predict have the bytes that it says? Returns findings and notes."""
    findings, replaced = [], 0
    tuned = [cluster for cluster in values["clusters"] if cluster["after"]]
    for cluster in tuned:
        key = cluster["cluster"]
        if snapshot.slice(key) != cluster["after"]:
            replaced += 1
            continue
        try:
            if snapshot.params(key) != cluster["params"]:
                findings.append(f"the slice of cluster {key[:12]} has other bytes than it says")
        except UserError as error:
            findings.append(f"the slice of cluster {key[:12]} cannot be read: {error}")
    note = f"{replaced} of its {len(tuned)} slices were replaced by a later request or publication"
    return findings, [note] if replaced else []
