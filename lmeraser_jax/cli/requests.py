"""lmeraser requests: list the requests of a workdir with their states and receipts, oldest first.

lmeraser requests --workdir=DIR [--open]

A request is of the kind erase or rectify. While its state is approximated, the clusters that it touched answer with
approximate slices (lmeraser unlearn --mode).
"""

import shlex
import time
from datetime import timedelta
from typing import Any

from lmeraser_jax.cli import common
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.requests import Request
from lmeraser_jax.storage.workdir import Layout

FLAGS = (common.Flag("open", False, "only requests that are not finished"),)
COLUMNS = ("id", "kind", "state", "age", "records", "tuned", "requester", "reason", "receipt")
TEXT_WIDTH = 32  # characters of requester and reason in the table


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    with common.catalog_of(workdir) as (layout, catalog):
        rows = [_row(layout, request) for request in requests.listed(catalog, only_open=arguments["open"])]
    common.show(arguments, _table(rows), {"requests": rows})
    return 0


def _row(layout: Layout, request: Request) -> dict[str, Any]:
    """A request for --json; `tuned` counts the clusters that it reached and that exist after it."""
    body, receipt = request.body, layout.receipt(request.id)
    return {
        "id": request.id,
        "kind": body["kind"],
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
    table = [COLUMNS, *([_cell(name, row[name]) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)


def _cell(name: str, value: Any) -> str:
    if name == "age":
        return str(timedelta(seconds=round(value)))
    text = shlex.quote(value) if name == "receipt" and value else str(value)
    if name in ("requester", "reason") and len(text) > TEXT_WIDTH:
        return f"{text[: TEXT_WIDTH - 3]}..."
    return text
