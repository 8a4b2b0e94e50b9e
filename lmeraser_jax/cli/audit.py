"""lmeraser audit: rebuild from scratch from the live records, in a temporary place, and compare every bit.

  lmeraser audit --workdir=DIR [--sample=N]

Exit code 0 and "bit-identical: K of K slices", or 1 and the names of what differs. Slices that another
program made (library version, device kind, one device instead of many) are compared within a tolerance
and counted apart.
"""

import dataclasses

from absl import flags as absl_flags

from lmeraser_jax.cli import common


def define(flags: common.Flags) -> None:
    common.define_wait(flags)
    absl_flags.DEFINE_integer(
        "sample", 0, "rebuild the slices of so many clusters only; 0: all", lower_bound=0, flag_values=flags
    )


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    from lmeraser_jax.unlearning.audit import audit
    from lmeraser_jax.unlearning.run import open_run

    common.log_devices()
    with open_run(workdir, config, write=True, wait=arguments["wait"]) as run_:
        verdict = audit(run_, arguments["sample"])
    common.show(arguments, verdict.text(), {**dataclasses.asdict(verdict), "ok": verdict.ok})
    return 0 if verdict.ok else 1
