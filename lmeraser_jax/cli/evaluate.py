"""lmeraser evaluate: accuracy of the published state, beside a plain linear head on the same frozen features.

lmeraser evaluate --workdir=runs/digits [--split=test|holdout|train] [--config.inference.nearest=3]
"""

from absl import flags as absl_flags

from lmeraser_jax.cli import common


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_enum("split", "test", ["test", "holdout", "train"], "images to evaluate on", flag_values=flags)
    absl_flags.DEFINE_bool("linear", True, "also fit and evaluate the plain linear head", flag_values=flags)


def run(arguments: common.Arguments) -> int:
    with common.open_for_reading(arguments) as run_:
        from lmeraser_jax.evaluation import accuracy

        common.warn_if_unfinished(run_)
        result = accuracy.evaluate(run_, arguments["split"], linear=arguments["linear"])
    common.show(arguments, result.table(), result.values())
    return 0
