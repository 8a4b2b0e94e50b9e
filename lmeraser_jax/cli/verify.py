"""lmeraser verify: check that receipts are unchanged and in their place, and that what they list as removed is gone.

  lmeraser verify RECEIPT.json ... --workdir=DIR
  lmeraser verify --all --workdir=DIR

Exit code 0: all receipts hold; 1: one does not; 3: a file could not be read now, so nothing can be said. --all also
compares the folder of receipts with the catalog, so it finds missing receipts. lmeraser audit goes further: it builds
everything again and compares every bit.
"""

import dataclasses
from pathlib import Path

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning import verify
from lmeraser_jax.unlearning.verify import Verdict

TAKES_FILES = True
FLAGS = (common.Flag("all", False, "check all receipts of the workdir, and that none is missing"),)


def run(arguments: common.Arguments) -> int:
    workdir = common.workdir_of(arguments)
    if arguments["all"] == bool(arguments.files):
        raise UserError("name receipts or give --all: lmeraser verify RECEIPT.json ... --workdir=DIR")
    with common.catalog_of(workdir) as (layout, catalog):
        if arguments["all"]:
            verdicts = verify.verify_all(layout, catalog)
        else:
            verdicts = verify.verify(layout, catalog, [Path(name) for name in arguments.files])
    ok = all(verdict.ok for verdict in verdicts)
    values = {"ok": ok, "verdicts": [{**dataclasses.asdict(verdict), "ok": verdict.ok} for verdict in verdicts]}
    common.show(arguments, "\n".join(map(_text, verdicts)), values)
    return 0 if ok else 1


def _text(verdict: Verdict) -> str:
    request = f" (request {verdict.request})" if verdict.request else ""
    lines = [f"{'holds' if verdict.ok else 'DOES NOT HOLD'}: {verdict.name}{request}"]
    lines += [f"  - {line}" for line in verdict.findings]
    lines += [f"  note: {line}" for line in verdict.notes]
    return "\n".join(lines)
