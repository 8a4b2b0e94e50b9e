"""lmeraser doctor: report what is damaged in a workdir, and drop what can be made again.

  lmeraser doctor --workdir=DIR [--fix]

Without --fix the doctor writes nothing. With --fix it removes leftovers and drops damaged slices, clusterings and
features; lmeraser train then makes them again with the same bits. Damage is only what is missing or holds something
else than was written; what could not be looked at is "not checked", and --fix leaves it alone. Exit code 0: the workdir
is healthy; 1: something is damaged, or was dropped and must be made again; 3: the doctor found no damage but could not
check something.
"""

from lmeraser_jax.cli import common
from lmeraser_jax.unlearning import doctor

TAKES_CONFIG = False  # it may be damaged
FLAGS = (common.Flag("fix", False, "remove leftovers, and drop what lmeraser train can make again"),)
DAMAGED, UNCHECKED = 1, 3  # exit codes


def run(arguments: common.Arguments) -> int:
    diagnosis = doctor.examine(common.workdir_of(arguments, must_exist=False), arguments["fix"])
    names = ("component", "message", "remedy", "state")
    problems = [{name: getattr(problem, name) for name in names} for problem in diagnosis.problems]
    common.show(arguments, diagnosis.table(), {"healthy": diagnosis.healthy, "problems": problems})
    if diagnosis.healthy:
        return 0
    return DAMAGED if diagnosis.damaged else UNCHECKED
