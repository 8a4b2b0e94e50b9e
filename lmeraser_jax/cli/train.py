"""lmeraser train: import images, make the backbone, cluster the records, tune every cluster.

  lmeraser train --config=configs/digits.py --config.tuning.epochs=3 --workdir=runs/digits

The same command resumes after an interruption, or says that there is nothing to do. It also serves the
erasure requests that wait.
"""

import dataclasses

from lmeraser_jax.cli import common

FLAGS = (
    common.Flag("reimport", False, "read the source again: add its new records, leave erased ones out"),
    common.Flag("retune", False, "tune every cluster with other --config.tuning settings; rollback can go back"),
    common.SIGNING_KEY,
    *common.WRITING,
    *common.SHARED,
)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.begun(arguments)
    from lmeraser_jax.evaluation import overview
    from lmeraser_jax.training import profiling
    from lmeraser_jax.unlearning.build import build, repair
    from lmeraser_jax.unlearning.run import prepare_run

    common.log_devices()
    options = {name: arguments[name] for name in ("reimport", "retune", "wait")}
    options["signing_key"] = common.signing_key_of(arguments)
    with (
        profiling.into(arguments["profile"]),
        prepare_run(workdir, config, processes=arguments.processes, **options) as (run_, imported),
    ):
        lines = [common.imported_text(imported, "lmeraser train --reimport", config.is_text)] if imported else []
        common.warn(*repair(run_))
        report = build(run_)
        summary = overview.overview(run_.layout, run_.catalog, run_.config)
    common.warn(*summary.warnings)
    lines += [common.build_text(report), summary.class_table(), summary.cost()]
    values = dataclasses.asdict(report)
    shown = summary.values()
    values |= {name: shown[name] for name in ("expected_share", "sampled_share", "classes", "imbalance")}
    values["imported"] = dataclasses.asdict(imported) if imported else None
    common.show(arguments, "\n".join(filter(None, lines)), values)
    return 0
