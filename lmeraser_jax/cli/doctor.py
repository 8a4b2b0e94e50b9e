"""lmeraser doctor: say what is damaged in a workdir, and drop what can be made again.

  lmeraser doctor --workdir=DIR [--fix]

Without --fix nothing is written. With it leftovers are removed and damaged slices, clusterings and features are
dropped; lmeraser train makes them again with the same bits. Exit code 0: healthy; 1: something is damaged, or was
dropped and is to be made again; 3: nothing is damaged as far as could be seen, but something could not be looked at.
"""

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.unlearning import doctor

TAKES_CONFIG = False  # it may be damaged
FLAGS = (Flag("fix", False, "repair what can be repaired"),)
DAMAGED, UNCHECKED = 1, 3


def run(arguments: common.Arguments) -> int:
    diagnosis = doctor.examine(common.workdir_of(arguments, must_exist=False), arguments["fix"])
    problems = [problem._asdict() for problem in diagnosis.problems]
    common.show(arguments, diagnosis.table(), {"healthy": diagnosis.healthy, "problems": problems})
    if diagnosis.healthy:
        return 0
    return DAMAGED if diagnosis.damaged else UNCHECKED
