"""lmeraser choose: which method is best for your data when an erasure may cost so much: tried on a private hold-out.

  lmeraser choose --config=FILE.py --config.data.holdout=0.2 --budget=3% --workdir=runs/choice
  lmeraser train --config=runs/choice/chosen.py --workdir=runs/mine

The budget is a share: of the records, and of the images of a full tuning, that the mean erasure passes through the
backbone again; the larger counts, and sampled records are counted. Heads in closed form pass none. The hold-out stays
out of training, also of chosen.py's; --config.data.holdout=0 gives it back to train. Test images are not looked at. The
same command resumes after an interruption. docs/choosing.md says which method suits which data.
"""

import os
import shlex
import sys
from pathlib import Path

from lmeraser_jax.cli import common, compare
from lmeraser_jax.experiments import candidates, methods
from lmeraser_jax.experiments.comparison import Comparison, Options, check

FLAGS = (
    common.Flag("budget", str, "share of the data and of a full tuning that a mean erasure may cost, such as 3%"),
    common.Flag(
        "candidates",
        [],
        "methods of compare, lmeraser-N, shards-N, lora-shards-N, or files FILE.py, with commas; empty: by budget",
    ),
    common.Flag("by", "accuracy", "what decides on the hold-out", choices=("accuracy", "balanced")),
    common.Flag("requests", 1, "erasures to serve and time, of this many sampled and this many other records", low=0),
)
stored_config = compare.stored_config


def run(arguments: common.Arguments) -> int:
    folder = Path(common.workdir_of(arguments, must_exist=False))
    budget, config = candidates.parse_budget(arguments["budget"] or ""), common.config_of(arguments)
    common.refuse_text(config, "lmeraser compare measures texts")
    names = arguments["candidates"]
    options = Options(
        **compare.names_of(config, "holdout"), split="holdout", by=arguments["by"], requests=arguments["requests"]
    )
    comparison = Comparison(
        folder=folder,
        config=config,
        methods=candidates.load(names) if names else candidates.candidates(budget),
        seeds=(config.seed,),
        experiments=("methods",),
        options=options,
    )
    check(comparison)
    from lmeraser_jax.experiments import choosing, results

    common.log_devices()
    choice = choosing.choose(comparison, budget, shlex.join(["lmeraser", "choose", *sys.argv[2:]]), fit=not names)
    titles = {method.name: method.title for method in (*methods.METHODS.values(), *comparison.methods)}
    files, _ = compare.drawn(folder, results.collect(folder).rows, titles)
    lines = [choice.table(), *(f"wrote {os.path.relpath(path)}" for path in (*files, choice.config))]
    lines.append(f"train it with: lmeraser train --config={shlex.quote(os.path.relpath(choice.config))} --workdir=DIR")
    common.show(arguments, "\n".join(lines), choice.values())
    return 0
