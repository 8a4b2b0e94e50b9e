"""lmeraser evaluate: measure the accuracy of the published state and of a plain linear head on its features.

lmeraser evaluate --workdir=runs/digits [--split=test|holdout|train] [--config.inference.nearest=3]
"""

from lmeraser_jax.cli import common

FLAGS = (
    common.Flag("split", "test", "images to evaluate on", choices=("test", "holdout", "train")),
    common.Flag("linear", True, "also fit and evaluate the plain linear head"),
)


def run(arguments: common.Arguments) -> int:
    with common.opened(arguments) as run_:
        from lmeraser_jax.evaluation import accuracy

        common.warn_if_unfinished(run_)
        result = accuracy.evaluate(run_, arguments["split"], linear=arguments["linear"])
    common.show(arguments, result.table(), result.values())
    return 0
