"""lmeraser process: serve all waiting erasure requests in one build.

  lmeraser process --workdir=DIR [--max_wait=SECONDS] [--max_batch=N] [--wait=SECONDS]

Without limits the command serves all requests now. With limits it serves them only if the oldest has waited for
--max_wait seconds or if --max_batch requests wait; otherwise it says when they are due and exits at once with 0, so
that cron can call it often.
"""

import dataclasses
import shlex
import sys
from datetime import timedelta

from lmeraser_jax.cli import common
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.requests import Due

FLAGS = (
    common.Flag("max_wait", float, "serve if the oldest request has waited for this many seconds", low=0),
    common.Flag("max_batch", int, "serve if this many requests wait", low=1),
    common.SIGNING_KEY,
    *common.WRITING,
    *common.SHARED,
)


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    common.config_of(arguments)  # refuses illegal settings, and a key that cannot be used, although nothing may be due
    common.signing_key_of(arguments)
    with common.catalog_of(workdir) as (layout, catalog):
        due = requests.due(catalog, arguments["max_wait"], arguments["max_batch"])
    if not due.now:
        values = {"due": dataclasses.asdict(due), "served": [], "outcome": None}
        common.show(arguments, _waiting_text(due), values)
        return 0
    print(_queue_text(due), file=sys.stderr)
    with common.opened(arguments, write=True) as run_:
        from lmeraser_jax.unlearning import erase

        report, finished = erase.process(run_)
    served = [{"request": request.id, "receipt": str(layout.receipt(request.id))} for request in finished]
    lines = [f"served {len(served)} requests", common.build_text(report)]
    lines += [f"receipt: {shlex.quote(row['receipt'])}" for row in served]
    values = {"due": dataclasses.asdict(due), "served": served, "outcome": dataclasses.asdict(report)}
    common.show(arguments, "\n".join(lines), values)
    return 0


def _waiting_text(due: Due) -> str:
    """When the requests that wait will be served."""
    if not due.waiting:
        return "no request waits"
    conditions = []
    if due.left is not None:
        conditions.append(f"in {timedelta(seconds=round(due.left))}")
    if due.room is not None:
        conditions.append(f"when {due.room} more arrive")
    return f"{_queue_text(due)}; due {' or '.join(conditions)}"


def _queue_text(due: Due) -> str:
    count = "1 request waits" if due.waiting == 1 else f"{due.waiting} requests wait"
    return f"{count}; the oldest is {timedelta(seconds=round(due.age))} old"
