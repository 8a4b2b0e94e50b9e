"""lmeraser evaluate: measure the accuracy of the published state and of a plain linear head on its features.

  lmeraser evaluate --workdir=runs/digits [--split=test|holdout|train] [--config.inference.nearest=3]

Of a language model it measures the loss of the responses and the share of their tokens that are the likeliest, beside
the frozen model.
"""

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError

FLAGS = (
    common.Flag("split", "test", "records to evaluate on", choices=("test", "holdout", "train")),
    common.Flag("linear", True, "also fit and evaluate the plain linear head; of images"),
)


def run(arguments: common.Arguments) -> int:
    with common.opened(arguments) as run_:
        common.warn_if_unfinished(run_)
        if run_.config.is_text:
            if arguments["linear"] and arguments.flags["linear"].present:
                raise UserError("--linear fits a head to images; this workdir has a language model: leave it out")
            from lmeraser_jax.evaluation import language

            result = language.evaluate(run_, arguments["split"])
        else:
            from lmeraser_jax.evaluation import accuracy

            result = accuracy.evaluate(run_, arguments["split"], linear=arguments["linear"])
    common.show(arguments, result.table(), result.values())
    return 0
