"""lmeraser audit: build everything again from the live records, in a temporary place, and compare every bit.

  lmeraser audit --workdir=DIR [--sample=N]

Exit code 0 and "bit-identical: K of K slices", or 1 and the names of what differs. A slice that another program made
(library version, device kind, one device instead of many) is compared within a tolerance and counted apart.
"""

import dataclasses

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag

FLAGS = (
    *common.WRITING,
    Flag("sample", 0, "build the slices of so many clusters only, drawn at random; 0: all", low=0),
)


def run(arguments: common.Arguments) -> int:
    with common.opened(arguments, write=True) as run_:
        from lmeraser_jax.unlearning.audit import audit

        verdict = audit(run_, arguments["sample"])
    common.show(arguments, verdict.text(), {**dataclasses.asdict(verdict), "ok": verdict.ok})
    return 0 if verdict.ok else 1
