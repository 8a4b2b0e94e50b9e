"""lmeraser requests: the erasure requests of a workdir, with their states and receipts, oldest first.

lmeraser requests --workdir=DIR [--open]
"""

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from lmeraser_jax.cli import common

if TYPE_CHECKING:
    from lmeraser_jax.storage.requests import Request
    from lmeraser_jax.storage.workdir import Layout

COLUMNS = ("id", "state", "age", "records", "tuned", "requester", "reason", "receipt")
LONGEST = 32  # characters of requester and reason in the table


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_bool("open", False, "only those that are not finished", flag_values=flags)


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    from lmeraser_jax.storage import requests

    with common.catalog_of(workdir) as (layout, catalog):
        rows = [_row(layout, request) for request in requests.listed(catalog, only_open=arguments["open"])]
    common.show(arguments, _table(rows), {"requests": rows})
    return 0


def _row(layout: "Layout", request: "Request") -> dict[str, Any]:
    """What is said of a request; `tuned` counts the clusters that it reached and that still existed afterwards."""
    body, receipt = request.body, layout.receipt(request.id)
    return {
        "id": request.id,
        "state": request.state,
        "age": max(0.0, round(time.time() - request.created, 3)),
        "records": len(body["records"]),
        "tuned": sum(bool(cluster["after"]) for cluster in body["clusters"]),
        "requester": body["requester"],
        "reason": body["reason"],
        "quarantine": body["quarantine"],
        "receipt": str(receipt) if receipt.is_file() else "",
        "states": [{"state": state, "at": at} for state, at in body["states"]],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no requests"
    cells = [COLUMNS, *([_cell(row, name) for name in COLUMNS] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _cell(row: dict[str, Any], name: str) -> str:
    if name == "age":
        return str(timedelta(seconds=round(row["age"])))
    text = str(row[name])
    short = name in ("requester", "reason") and len(text) > LONGEST
    return f"{text[: LONGEST - 3]}..." if short else text
