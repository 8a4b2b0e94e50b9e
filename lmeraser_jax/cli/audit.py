"""lmeraser audit: build everything again from the live records, in a scratch folder, and compare every bit.

  lmeraser audit --workdir=DIR [--sample=N]

Prints "bit-identical: K of K slices" and exits with 0, or prints what differs and exits with 1, or exits with 3 where a
file could not be read now or the build failed, so that nothing can be said. A slice that was made
under another fingerprint (library versions, kind of device, lanes) is compared within a tolerance and counted apart.
"""

import dataclasses

from lmeraser_jax.cli import common

FLAGS = (
    *common.WRITING,
    common.Flag("sample", 0, "rebuild only this many clusters, drawn at random; 0: all", low=0),
)


def run(arguments: common.Arguments) -> int:
    with common.opened(arguments, write=True) as run_:
        from lmeraser_jax.unlearning.audit import audit

        verdict = audit(run_, arguments["sample"])
    common.show(arguments, verdict.text(), {**dataclasses.asdict(verdict), "ok": verdict.ok})
    return 0 if verdict.ok else 1
