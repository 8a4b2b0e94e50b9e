"""lmeraser process: serve all erasure requests that wait, together, in one re-tuning.

  lmeraser process --workdir=DIR [--max_wait=SECONDS] [--max_batch=N] [--wait=SECONDS]

Without limits everything is served now. With limits only when the oldest request has waited for so long, or so many
wait; otherwise it says when that will be, and exits with 0 in an instant: made for cron.
"""

import dataclasses
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from lmeraser_jax.cli import common

if TYPE_CHECKING:
    from lmeraser_jax.storage.requests import Due


def define(flags: common.Flags) -> None:
    text = "serve only when the oldest request has waited for so many seconds"
    absl_flags.DEFINE_float("max_wait", None, text, lower_bound=0, flag_values=flags)
    text = "serve only when so many requests wait"
    absl_flags.DEFINE_integer("max_batch", None, text, lower_bound=1, flag_values=flags)
    common.define_wait(flags)
    common.define_profile(flags)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    from lmeraser_jax.storage import requests

    with common.catalog_of(workdir) as (layout, catalog):
        due = requests.due(catalog, arguments["max_wait"], arguments["max_batch"])
    if not due.now:
        common.show(arguments, _waiting_text(due), {"due": dataclasses.asdict(due), "served": [], "outcome": None})
        return 0
    from lmeraser_jax.training import profiling
    from lmeraser_jax.unlearning import erase
    from lmeraser_jax.unlearning.run import open_run

    print(f"{_some(due.waiting)}; the oldest is {_time(due.age)} old", file=sys.stderr)
    with (
        profiling.into(arguments["profile"]),
        open_run(workdir, config, write=True, wait=arguments["wait"], team=arguments.team) as run_,
    ):
        common.log_devices()
        outcome, finished = erase.process(run_)
    receipts = [str(layout.receipt(request.id)) for request in finished]
    lines = [f"served {len(finished)} requests", common.outcome_text(outcome)]
    lines += [f"receipt: {receipt}" for receipt in receipts]
    served = [{"request": request.id, "receipt": path} for request, path in zip(finished, receipts, strict=True)]
    values = {"due": dataclasses.asdict(due), "served": served, "outcome": dataclasses.asdict(outcome)}
    common.show(arguments, "\n".join(lines), values)
    return 0


def _waiting_text(due: "Due") -> str:
    if not due.waiting:
        return "no request waits"
    ways = [f"in {_time(due.left)}"] if due.left is not None else []
    ways += [f"when {due.room} more arrive"] if due.room is not None else []
    return f"{_some(due.waiting)}; the oldest is {_time(due.age)} old; due {' or '.join(ways)}"


def _some(count: int) -> str:
    return "1 request waits" if count == 1 else f"{count} requests wait"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
