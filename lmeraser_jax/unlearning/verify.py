"""Checks receipts against a workdir: is each unchanged and in its place, and does what it says still hold?

Reads the catalog and the files, of copies the files alone; loads neither JAX nor Orbax. A receipt may come from
anywhere and hold anything: nothing in it is ever taken for a path or for SQL.
"""

import functools
import importlib.resources
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from lmeraser_jax.data.source import SPLITS
from lmeraser_jax.errors import Damaged, join_limited, shorten
from lmeraser_jax.hashing import arrays_digest, parse_strict_json
from lmeraser_jax.storage import checkpoints, packed, requests
from lmeraser_jax.storage.atomic_files import entries, is_there
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import image_file
from lmeraser_jax.storage.rows import ReceiptLink
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training.slice_arrays import array_problems
from lmeraser_jax.unlearning import signatures
from lmeraser_jax.unlearning.artifacts import is_approximate, slice_of, split_reference
from lmeraser_jax.unlearning.receipts import FIRST, content_digest, iso_time, receipt_body
from lmeraser_jax.unlearning.request_files import LARGEST, read_bytes
from lmeraser_jax.unlearning.signatures import NO_KEYS, PublicKeys

MOST = 20  # findings about the structure of one receipt
SHOWN = 200  # characters of a text that a receipt or a library gives


@dataclass(frozen=True)
class Verdict:
    """The result of checking one receipt, the folder of all receipts, or the head of their chain."""

    name: str  # of the file or folder
    request: str  # its id, "" where it is not known or there is none
    findings: tuple[str, ...]  # why the receipt does not hold; empty when it does
    notes: tuple[str, ...] = ()  # legal changes since the receipt was written
    signature: str = ""  # whose it is, and whether it was checked; "" where none can be

    @property
    def ok(self) -> bool:
        return not self.findings


class _Snapshot:
    """A workdir at one moment; names are salted as receipts salt them."""

    def __init__(self, layout: Layout, catalog: Catalog, keys: PublicKeys = NO_KEYS):
        self.layout, self.keys, self.salted, salted = layout, keys, catalog.salted, catalog.salted
        # Read first, so that it is not newer than the catalog's chain.
        self.head = _read(layout.receipts_head, "head") if is_there(layout.receipts_head) else None
        with catalog.snapshot():
            manifests, free_rows = catalog.manifests(), catalog.free_rows()
            on_disk = {*_names(layout.slices), *map(slice_of, packed.references(layout.packed))}
            slices = dict.fromkeys(on_disk, 0.0)  # 0: unknown to the catalog
            slices |= {name: row.created for name, row in catalog.slices().items()}
            clusterings = dict.fromkeys(_names(layout.clusterings), 0.0)
            clusterings |= {manifest.clustering: manifest.created for manifest in reversed(manifests)}
            self.links = {link.sequence: link for link in catalog.receipts()}
            self.requests = {request.id: request for request in requests.listed(catalog)}
            self.unpurged = {name: len(catalog.erased([name])) for name in self.requests}
            self.tombstones = catalog.tombstones()
            live = catalog.live(*SPLITS).ids
            self.live = {
                "records": {salted("tombstone", name) for name in live},
                "owners": {salted("owner", name) for name in catalog.owner_splits()},
            }
            self.created = {
                "slices": {salted("slice", name): iso_time(seconds) for name, seconds in slices.items()},
                "clusterings": {salted("clustering", name): iso_time(at) for name, at in clusterings.items()},
            }
            self.versions = {manifest.version for manifest in manifests}
            entries = manifests[0].entries if manifests else {}
            self.published = {salted("cluster", key): reference for key, reference in entries.items()}
            self.filled_rows = len(image_file(layout, catalog).filled(free_rows)) if len(free_rows) else 0
            self.orphaned_slices = len(catalog.orphaned_slices(free_rows))


def verify(layout: Layout, catalog: Catalog, paths: Sequence[Path], keys: PublicKeys = NO_KEYS) -> list[Verdict]:
    """Checks receipts, wherever they lie. With public keys each must be signed with one of them.

    Raises `UserError` where a file is not there or cannot be opened.
    """
    snapshot = _Snapshot(layout, catalog, keys)
    return [_verdict(path, snapshot) for path in paths]


def verify_all(layout: Layout, catalog: Catalog, keys: PublicKeys = NO_KEYS) -> list[Verdict]:
    """Checks that the folder and the catalog hold the same receipts, then each receipt in the order of the chain.

    With public keys each receipt must be signed with one of them, and so must the head of the chain.
    """
    snapshot = _Snapshot(layout, catalog, keys)
    verdicts = [_folder_verdict(layout, snapshot)]
    if snapshot.head is not None or keys:
        verdicts.append(_head_verdict(snapshot))
    return [*verdicts, *(_placed_verdict(link, snapshot) for link in snapshot.links.values())]


def verify_request(layout: Layout, catalog: Catalog, request: str, keys: PublicKeys = NO_KEYS) -> list[Verdict]:
    """Checks the receipt of a request of the workdir as `verify_all` does; nothing where it has none yet."""
    snapshot = _Snapshot(layout, catalog, keys)
    return [_placed_verdict(link, snapshot) for link in snapshot.links.values() if link.request == request]


def verify_copies(paths: Sequence[Path], keys: PublicKeys) -> list[Verdict]:
    """Checks copies of receipts, and of heads of their chain, by the signatures alone, without the workdir.

    They must also agree that one receipt is at each place of the chain. Raises as `verify`.
    """
    chain: dict[int, str] = {}  # {place: digest of the receipt there} as the files so far say
    return [_copy_verdict(path, keys, chain) for path in paths]


@functools.cache
def validator(kind: str = "receipt") -> jsonschema.Draft202012Validator:
    """Checks values against receipt.schema.json, or against its definition of a "head"."""
    text = importlib.resources.files("lmeraser_jax.unlearning").joinpath("receipt.schema.json").read_text("utf-8")
    schema = json.loads(text)
    head = {"$ref": "#/$defs/head", "$defs": schema["$defs"]}
    return jsonschema.Draft202012Validator(head if kind == "head" else schema)


def _names(folder: Path) -> list[str]:
    return [path.name for path in entries(folder)]


def _folder_verdict(layout: Layout, snapshot: _Snapshot) -> Verdict:
    """Compares the folder of receipts with the catalog."""
    findings, notes = [], []
    if list(snapshot.links) != list(range(1, len(snapshot.links) + 1)):
        findings.append(f"the catalog's chain has gaps: {join_limited(snapshot.links)}")
    linked = {link.request for link in snapshot.links.values()}
    purged = {name for name, request in snapshot.requests.items() if "purged" in dict(request.body["states"])}
    if purged - linked:
        findings.append(f"finished requests without a receipt in the catalog: {join_limited(sorted(purged - linked))}")
    if linked and not layout.receipts.is_dir():
        findings.append("the folder is missing")
    for name in _names(layout.receipts):
        request = snapshot.requests.get(name.removesuffix(".json"))
        if name.startswith(".") or name in {f"{request}.json" for request in linked}:
            continue  # being written, or checked on its own
        if request is not None and request.open:
            notes.append(f"{name} belongs to a request that is not finished yet")
        else:
            findings.append(f"{ascii(name)} is not in the catalog")
    approximate = sum(map(is_approximate, snapshot.published.values()))
    if approximate:
        notes.append(
            f"{approximate} published slices are approximate, without any guarantee, until an erasure is served"
        )
    return Verdict(str(layout.receipts), "", tuple(findings), tuple(notes))


def _placed_verdict(link: ReceiptLink, snapshot: _Snapshot) -> Verdict:
    """Checks the receipt that the catalog has at a place of the chain."""
    path = snapshot.layout.receipt(link.request)
    if not requests.LEGAL_NAME.fullmatch(link.request):
        return Verdict(ascii(link.request), "", ("the catalog names a request that cannot exist",))
    if not path.is_file():
        return Verdict(str(path), link.request, (f"the receipt at place {link.sequence} is missing",))
    return _verdict(path, snapshot, link)


def _head_verdict(snapshot: _Snapshot) -> Verdict:
    """Compares the signed head with the chain that the catalog has."""
    name = str(snapshot.layout.receipts_head)
    if snapshot.head is None:
        return Verdict(name, "", ("is missing: the next command with --signing_key writes it",))
    values, findings = snapshot.head
    if findings:
        return Verdict(name, "", tuple(findings))
    place, findings = values["sequence"], signatures.problems(values, snapshot.keys)
    link = snapshot.links.get(place) if place else FIRST
    if link is None or link.digest != values["digest"]:
        findings.append(f"names another receipt at place {place} than the catalog: the chain was changed or cut")
    notes = [f"covers {place} of {len(snapshot.links)} receipts"] if place < len(snapshot.links) else []
    return Verdict(name, "", tuple(findings), tuple(notes), signatures.description(values, snapshot.keys))


def _copy_verdict(path: Path, keys: PublicKeys, chain: dict[int, str]) -> Verdict:
    """Checks the copy of a receipt or a head, and enters what it says into the chain."""
    is_head = not _read(path, "head")[1]
    values, findings = _read(path, "head" if is_head else "receipt")
    if findings:
        return Verdict(str(path), "", tuple(findings))
    request, places = "", {values["sequence"]: values["digest"]}
    if not is_head:
        request, findings = values["request"]["id"], _check_digest(values)
        places[values["sequence"] - 1] = values["previous"]
    findings += signatures.problems(values, keys)
    for place, name in () if findings else places.items():
        if chain.setdefault(place, name) != name:
            findings.append(f"contradicts a file before: it knows another receipt at place {place} of the chain")
    return Verdict(str(path), request, tuple(findings), signature=signatures.description(values, keys))


def _verdict(path: Path, snapshot: _Snapshot, expected: ReceiptLink | None = None) -> Verdict:
    """Checks one file; `expected` is the receipt that it must be, None for any receipt of the workdir."""
    values, findings = _read(path)
    if findings:
        return Verdict(str(path), "", tuple(findings))
    request, sequence = values["request"]["id"], values["sequence"]
    if expected is not None and (request, sequence) != (expected.request, expected.sequence):
        findings.append(f"holds the receipt of {ascii(request)} at place {sequence}, not that of its own request")
    changes, notes = _check_published(values, snapshot)
    findings += _check_chain(values, snapshot) + _check_request(values, snapshot) + _check_erased(values, snapshot)
    findings += (*changes, *_check_purged(values, snapshot), *signatures.problems(values, snapshot.keys))
    description = signatures.description(values, snapshot.keys)
    return Verdict(str(path), request, tuple(findings), tuple(notes), description)


def _read(path: Path, kind: str = "receipt") -> tuple[dict[str, Any], list[str]]:
    """The values of a file that fits the schema, or why it is no receipt. Raises `UserError` if it cannot be opened."""
    raw = read_bytes(path, str(path))
    if len(raw) > LARGEST:
        return {}, [f"is larger than {LARGEST} bytes"]
    try:
        values = parse_strict_json(raw.decode())
        errors = list(itertools.islice(validator(kind).iter_errors(values), MOST))
    except ValueError as error:
        return {}, [f"is not JSON: {shorten(str(error), SHOWN)}"]
    except RecursionError:
        return {}, ["is nested too deeply"]
    return values, [f"{shorten(error.json_path, SHOWN)}: {shorten(error.message, SHOWN)}" for error in errors]


def _check_chain(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Is the receipt unchanged and in its place?"""
    sequence, findings = values["sequence"], _check_digest(values)
    link, previous = snapshot.links.get(sequence), snapshot.links.get(sequence - 1)
    if link is None or link.request != values["request"]["id"]:
        holder = f"the receipt of {link.request}" if link else "none"
        findings.append(f"is not of this workdir or not in its place: the catalog has {holder} at place {sequence}")
    elif link.digest != values["digest"]:
        findings.append("was replaced: the catalog knows it by another digest")
    if values["previous"] != (previous.digest if previous else ""):
        findings.append("does not follow the receipt that the catalog has before it")
    return findings


def _check_digest(values: Mapping[str, Any]) -> list[str]:
    edited = content_digest(values) != values["digest"]
    return ["was edited: its content has another digest than it says"] if edited else []


def _check_request(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Are the states in order and does the catalog say the same? It notes the last state a moment later."""
    states, times = ([state[field] for state in values["request"]["states"]] for field in ("state", "at"))
    findings = []
    if states != [state for state in requests.STATES if state in states] or states[-1] != requests.STATES[-1]:
        findings.append(f"has states out of order: {join_limited(states)}")
    if times != sorted(times):
        findings.append("has states whose times run backwards")
    request = snapshot.requests.get(values["request"]["id"])
    if request is None or request.open:
        return [*findings, "the catalog knows no finished request of this id"]
    body, given = receipt_body(request), dict(values)
    for fields in (body, given):
        fields["request"] = fields["request"] | {"states": fields["request"]["states"][:-1]}
    return [*findings, *(f"says another {name} than the catalog" for name in body if given[name] != body[name])]


def _check_erased(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Does everything that it erased stay erased?"""
    records, findings = list(itertools.chain(*values["records"].values())), []
    owners = values["request"]["owners"]
    for kind, names, verb in (("records", records, "are"), ("owners", owners, "have records that are")):
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


def _check_purged(values: Mapping[str, Any], snapshot: _Snapshot) -> list[str]:
    """Is everything that it says was removed still absent?

    A slice or clustering of live records may be made again, bit for bit, by a later build; that one is younger.
    """
    purged, purged_at, findings = values["purged"], values["request"]["states"][-1]["at"], []
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
        findings.append(f"{snapshot.filled_rows} stored rows that belong to no record are not empty")
    return findings


def _check_published(values: Mapping[str, Any], snapshot: _Snapshot) -> tuple[list[str], list[str]]:
    """Do slices that it published and that still predict have the bytes that it says? Returns findings and notes."""
    findings, replaced = [], 0
    tuned = [cluster for cluster in values["clusters"] if cluster["after"]]
    for cluster in tuned:
        key, ref = cluster["cluster"], snapshot.published.get(cluster["cluster"], "")
        if snapshot.salted("slice", ref) != cluster["after"]:
            replaced += 1
            continue
        name, step = split_reference(ref)
        try:
            arrays, _, _ = checkpoints.load(snapshot.layout.slice(name), step or None)
            if snapshot.salted("params", arrays_digest(arrays)) != cluster["params"]:
                findings.append(f"the slice of cluster {key[:12]} has other bytes than it says")
            problems = array_problems(arrays, has_own=True)
            findings += (f"the slice of cluster {key[:12]} cannot be used: {line}" for line in problems)
        except Damaged as error:
            findings.append(f"the slice of cluster {key[:12]} cannot be read: {error}")
    note = f"{replaced} of its {len(tuned)} slices were replaced by a later request or publication"
    return findings, [note] if replaced else []
