"""lmeraser doctor: say what is wrong with a workdir, and repair what can be computed again.

  lmeraser doctor --workdir=DIR [--fix] [--features=N]

Without --fix nothing is written. With it leftovers are removed and damaged slices, clusterings and features
dropped; lmeraser train makes them again with the same bits. Exit code 0 and "healthy", or 1.
"""

import dataclasses

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.unlearning import doctor

TAKES_CONFIG = False  # it may be damaged


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_bool("fix", False, "repair what can be repaired", flag_values=flags)
    text = "rows of the feature cache to compute again and compare; 0: none"
    absl_flags.DEFINE_integer("features", doctor.FEATURES, text, lower_bound=0, flag_values=flags)


def run(arguments: common.Arguments) -> int:
    diagnosis = doctor.examine(common.workdir_of(arguments), arguments["fix"], arguments["features"])
    values = {"healthy": diagnosis.healthy, "findings": [dataclasses.asdict(f) for f in diagnosis.findings]}
    common.show(arguments, diagnosis.table(), values)
    return 0 if diagnosis.healthy else 1
