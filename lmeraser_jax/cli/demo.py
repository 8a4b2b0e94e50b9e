"""lmeraser demo: the whole job on scikit-learn's digits, in about 70 seconds on two cores.

  lmeraser demo [--workdir=NEW_DIR] [--json=FILE]

Pretrains a small ViT on the public half, clusters and tunes the private half, evaluates, erases (an
unsampled record, a sampled record, an owner), evaluates again and audits.
"""

import time

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.workdir import Layout


def run(arguments: common.Arguments) -> int:
    config = common.config_of(arguments)
    common.refuse_text(config, "lmeraser train, unlearn and audit do the same for texts")
    workdir = arguments["workdir"] or time.strftime("runs/demo-%Y%m%d-%H%M%S")
    if Layout(workdir).catalog.exists():
        raise UserError(f"--workdir={workdir} holds a run already; the demo erases records, so name a new folder")
    from lmeraser_jax.experiments import demo

    common.log_devices()
    result = demo.demo(workdir, config)
    common.show(arguments, result.table(), result.values())
    return 0 if result.verdict.ok else 1
