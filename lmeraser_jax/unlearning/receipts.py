"""Receipts: one JSON file for each request to erase or rectify, chained by their digests.

A receipt names erased ids, and removed slices and clusterings, by salted hashes only; the salt stays in the catalog.
receipt.schema.json describes every field; verify.py checks receipts against the workdir.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmeraser_jax import config as settings
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.requests import Request, with_state
from lmeraser_jax.storage.rows import ReceiptLink

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.run import Run  # loads JAX, which commands that list or check receipts do without

SCHEMA = 1
PRIVATE = 0o600  # only the workdir's operator may read a receipt
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
    last, new = (links[-1] if links else ReceiptLink(0, "", "")), []
    for request in requests:
        values = _receipt(run, request, last)
        values["digest"] = digest(values)
        path = run.layout.receipt(request.id)
        write_json(path, values)
        path.chmod(PRIVATE)
        last = ReceiptLink(last.sequence + 1, request.id, values["digest"])
        new.append(last)
    return new


def _receipt(run: "Run", request: Request, last: ReceiptLink) -> dict[str, Any]:
    """The fields of a receipt, without its digest."""
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
