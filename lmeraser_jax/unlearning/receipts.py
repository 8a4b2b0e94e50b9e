"""Receipts: one JSON file for each request to erase or rectify, chained by their digests, signed where there is a key.

A receipt names erased ids, and removed slices and clusterings, by salted hashes only; the salt stays in the catalog.
receipt.schema.json describes every field; verify.py checks receipts against the workdir.
"""

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmeraser_jax import config as settings
from lmeraser_jax.hashing import digest, parse_strict_json
from lmeraser_jax.storage.atomic_files import THREADS, write_json
from lmeraser_jax.storage.requests import Request, with_state
from lmeraser_jax.storage.rows import ReceiptLink
from lmeraser_jax.unlearning import signatures

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lmeraser_jax.unlearning.run import Run  # loads JAX, which commands that list or check receipts do without

SCHEMA = 1
FIRST = ReceiptLink(0, "", "")  # before the first receipt
OUT_OF_REACH = (
    "the source files that the records were imported from",
    "models, predictions and pictures exported from the workdir before",
    "copies and snapshots of the workdir made outside, and blocks that the file system or the disk has released"
    " but not overwritten",
    "processes that loaded the model before and do not follow the workdir",
    "what the requester and reason fields of this receipt say",
)


def write(run: "Run", requests: Sequence[Request]) -> list[ReceiptLink]:
    """Writes the receipts of purged requests behind those that exist; a repeated call replaces its own files.

    Returns:
        Their links, to be entered in the catalog.
    """
    links = run.catalog.receipts()
    last, new, contents = (links[-1] if links else FIRST), [], {}
    for request in requests:
        values = _receipt(run, request, last)
        last = ReceiptLink(last.sequence + 1, request.id, digest(values))
        contents[run.layout.receipt(request.id)] = {**values, "digest": last.digest, "signature": None}
        new.append(last)
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(write_json, contents.keys(), contents.values()))
    return new


def sign(run: "Run", key: "Ed25519PrivateKey") -> None:
    """Signs the receipts of the chain that are not signed yet, then its head, which says how long it is now.

    Only receipts that the catalog knows are signed: one that a killed process wrote and did not enter there is written
    again. Up to a head with this key's signature all were signed.
    """
    links, head = run.catalog.receipts(), _stored(run.layout.receipts_head)
    places = {link.digest: link.sequence for link in links}
    signed = places.get(head.get("digest", ""), 0) if head == signatures.sign(head, key) else 0
    for link in links[signed:]:
        values = _stored(run.layout.receipt(link.request))
        unsigned = values == {**values, "digest": link.digest, "signature": None}
        if unsigned and content_digest(values) == link.digest:
            write_json(run.layout.receipt(link.request), signatures.sign(values, key))
    last = links[-1] if links else FIRST
    values = {"schema": SCHEMA, "sequence": last.sequence, "digest": last.digest, "at": iso_time(time.time())}
    write_json(run.layout.receipts_head, signatures.sign(values, key))


def content_digest(values: Mapping[str, Any]) -> str:
    """What the digest of a receipt must be."""
    return digest({name: value for name, value in values.items() if name not in ("digest", "signature")})


def _stored(path: Path) -> dict[str, Any]:
    """What a file says that should hold a JSON object; empty where it is missing or damaged, which `verify` reports."""
    values = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        values = parse_strict_json(path.read_text("utf-8"))
    return values if isinstance(values, dict) else {}


def _receipt(run: "Run", request: Request, last: ReceiptLink) -> dict[str, Any]:
    """The fields of a receipt, without its digest and signature."""
    body = request.body | {"states": with_state(request.body["states"], "purged")}
    return {
        "schema": SCHEMA,
        "sequence": last.sequence + 1,
        "previous": last.digest,
        **receipt_body(dataclasses.replace(request, body=body)),
        "config": digest(settings.to_dict(run.config)),
        "backbone": run.backbone.digest,
        "out_of_reach": list(OUT_OF_REACH),
        "audit": f"lmeraser audit {run.layout.flag}",
    }


def receipt_body(request: Request) -> dict[str, Any]:
    """The fields of a receipt that the catalog's row of the request holds, too."""
    body = request.body
    return {
        "request": {
            "id": request.id,
            **{name: body[name] for name in ("kind", "requester", "reason", "owners", "quarantine")},
            "states": [{"state": state, "at": iso_time(seconds)} for state, seconds in body["states"]],
        },
        "records": {name: body[name] for name in ("records", "erased_before", "shared")},
        **{name: body[name] for name in ("approximate", "clusters", "work", "manifest", "purged")},
    }


def iso_time(seconds: float) -> str:
    """A time in UTC, in text that sorts as time does."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
