"""lmeraser verify: do receipts hold: unchanged, in their place, and is everything they say is gone still gone?

  lmeraser verify RECEIPT.json ... --workdir=DIR
  lmeraser verify --all --workdir=DIR

Exit code 0 when all hold, 1 when one does not. With --all the folder of receipts is compared with the catalog, too,
so that a missing one shows. lmeraser audit goes further: it builds everything again and compares every bit.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError

if TYPE_CHECKING:
    from lmeraser_jax.unlearning.verify import Verdict

TAKES_FILES = True


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_bool("all", False, "all receipts of the workdir, and that none is missing", flag_values=flags)


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    if arguments["all"] == bool(arguments.files):
        raise UserError("name receipts or give --all: lmeraser verify RECEIPT.json ... --workdir=DIR")
    from lmeraser_jax.unlearning import verify

    with common.catalog_of(workdir) as (layout, catalog):
        if arguments["all"]:
            found = verify.verify_all(layout, catalog)
        else:
            found = verify.verify(layout, catalog, [Path(name) for name in arguments.files])
    broken = [verdict for verdict in found if not verdict.ok]
    values = {"ok": not broken, "verdicts": [{**dataclasses.asdict(verdict), "ok": verdict.ok} for verdict in found]}
    common.show(arguments, "\n".join(line for verdict in found for line in _lines(verdict)), values)
    return 1 if broken else 0


def _lines(verdict: "Verdict") -> list[str]:
    request = f" (request {verdict.request})" if verdict.request else ""
    head = f"{'holds' if verdict.ok else 'DOES NOT HOLD'}: {verdict.name}{request}"
    return [head, *(f"  - {line}" for line in verdict.findings), *(f"  note: {line}" for line in verdict.notes)]
