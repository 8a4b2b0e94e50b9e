"""lmeraser inspect: what a workdir holds: clusters, sizes, slices, versions, disk use.

lmeraser inspect --workdir=DIR [--records]
"""

from absl import flags as absl_flags

from lmeraser_jax.cli import common


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_bool("records", False, "list the live private records instead", flag_values=flags)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    from lmeraser_jax.evaluation import overview
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir, config) as run_:
        if arguments["records"]:
            common.show(arguments, *overview.record_list(run_))
        else:
            overview = overview.overview(run_)
            common.show(arguments, overview.table(), overview.values())
    return 0
