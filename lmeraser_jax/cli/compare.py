"""lmeraser compare: methods side by side on one data set: accuracy, what an erasure costs, what is forgotten, figures.

  lmeraser compare --config=configs/digits.py --seeds=5 --workdir=runs/compare
  lmeraser compare --config=configs/digits.py --methods=lmeraser,sisa-vote,ridge --workdir=runs/compare

A method is a set of settings (lmeraser_jax/experiments/methods.py). To add your own, name a config file by its path.
The same command resumes after an interruption; a later command on the same workdir adds methods, seeds or experiments
to the report. The workdir gets results.csv, results.json, report.html, report.md and figures (docs/reproduce.md).

Of text (data.source=text) it compares how records are unlearned, exactly and approximately (docs/language.md):

  lmeraser compare --config=configs/tofu_656k.py --methods=retrain,exact-owners,newton,warm,npo --workdir=runs/tofu

Test records that have candidates, or a response that is yes or no, give a hit ratio or an AUC as well.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmeraser_jax.cli import common
from lmeraser_jax.config import Config
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.experiments import figures, methods, results, sequences
from lmeraser_jax.experiments.comparison import Comparison, Options, check
from lmeraser_jax.experiments.results import Measurement
from lmeraser_jax.storage.workdir import Layout

FLAGS = (
    common.Flag("methods", [], "names or config files FILE.py, joined by commas; empty: all"),
    common.Flag(
        "experiments", ["methods"], "some of: methods, removal (0 to 50 %), cut, epochs, sequence (of requests)"
    ),
    common.Flag("cuts", [], "experiment cut: values of clustering.cut, joined by commas"),
    common.Flag("sequences", [], "experiment sequence: uniform, burst, pareto, class, half, adaptive; empty: all"),
    common.Flag("merge", (absolute,), "folder of another comparison to include in the report; may be repeated"),
    common.Flag("seeds", 1, "number of runs of each method, with seeds 0, 1, ...", low=1),
    common.Flag("length", 10, "experiment sequence: number of batches of requests", low=1),
    common.Flag("probes", 100, "number of records whose erasure is planned, to estimate the cost of a request", low=1),
    common.Flag("requests", 2, "erasures to serve and time, of this many sampled and this many other records", low=0),
    common.Flag("edits", ["removal"], "text: some of removal, query, response (to correct either)"),
    common.Flag("owners", 12, "text: number of owners to tune on; as many others are held out, where there are", low=2),
    common.Flag("owner_records", 4, "text: records of each owner", low=1),
    common.Flag("forget", ["2"], "text: owners whose records are edited, numbers or shares such as 1%,5%,10%"),
    common.Flag("split", "test", "records to evaluate on; choose settings with holdout", choices=("test", "holdout")),
)


def stored_config(layout: Layout) -> dict[str, Any] | None:
    """The settings that a folder compares with; None where nothing was compared yet."""
    binding = results.read_binding(layout.root)
    return None if binding is None else binding["config"]


def run(arguments: common.Arguments) -> int:
    if common.config_of(arguments).is_text:
        return _compare_text(arguments)
    comparison = _comparison(arguments)
    check(comparison)
    others = {name: results.load(Path(name) / "results.json") for name in arguments["merge"]}
    results.merge(results.collect(comparison.folder), others)
    from lmeraser_jax.experiments import runner, summary

    folder, command = comparison.folder, _command()
    common.log_devices()
    rows = results.merge(runner.compare(comparison, command), others)
    results.save(folder, rows)
    titles = {method.name: method.title for method in (*methods.METHODS.values(), *comparison.methods)}
    figure_files, pictures = drawn(folder, rows.rows, titles)
    written = [*summary.write_report(folder, rows, titles, pictures), *figure_files]
    lines = [(folder / "report.md").read_text("utf-8"), *(f"wrote {os.path.relpath(path)}" for path in written)]
    common.show(arguments, "\n".join(lines), dataclasses.asdict(rows))
    return 0


def _compare_text(arguments: common.Arguments) -> int:
    """Unlearning of records of text."""
    folder, methods_, edits = (
        Path(common.workdir_of(arguments, must_exist=False)),
        arguments["methods"],
        arguments["edits"],
    )
    from lmeraser_jax.experiments import forgetting, forgetting_report, runner
    from lmeraser_jax.experiments.text_draw import EDITS, DrawOptions

    named = {"methods": (methods_, forgetting.METHODS), "edits": (edits, EDITS)}
    raise_all(
        [
            f"--{flag}={name}: must be one of {', '.join(legal)}"
            for flag, (names, legal) in named.items()
            for name in names
            if name not in legal
        ]
    )
    options = DrawOptions(arguments["owners"], arguments["owner_records"])
    forget = tuple(dict.fromkeys(owners_of(text, options.owners) for text in arguments["forget"]))
    chosen = tuple(dict.fromkeys(methods_)) or forgetting.METHODS
    config, seeds = common.config_of(arguments), arguments["seeds"]
    comparison = forgetting.Comparison(folder, config, options, forget, chosen, tuple(dict.fromkeys(edits)), seeds)
    common.log_devices()
    rows, sources = forgetting.compare(comparison, runner.source_of(_command()))
    if missing := figures.missing():
        common.warn(f"no figures: {missing}")
    written = forgetting_report.write(folder, rows, sources, pictures=not missing)
    lines = [(folder / "report.md").read_text("utf-8"), *(f"wrote {os.path.relpath(path)}" for path in written)]
    common.show(arguments, "\n".join(lines), {"rows": [dataclasses.asdict(row) for row in rows]})
    return 0


def owners_of(text: str, owners: int) -> int:
    """A number of owners, or a share of them, which is at least one. Raises `UserError` at anything else."""
    number, share = text.removesuffix("%"), text.endswith("%")
    if not re.fullmatch(r"\d+(\.\d+)?" if share else r"\d+", number, re.ASCII):
        raise UserError(f"--forget={text}: must be a number of owners, or a share such as 5%")
    return max(1, round(float(number) / 100 * owners)) if share else int(number)


def _command() -> str:
    return shlex.join(["lmeraser", "compare", *sys.argv[2:]])


def names_of(config: Config, split: str) -> dict[str, Any]:
    """What people call the data set and the backbone."""
    dataset = config.data.dataset or (Path(config.data.path).stem if config.data.path else config.data.source)
    backbone = config.backbone.name or Path(config.backbone.weights).name or "small ViT"
    return {"dataset": dataset + (", held out" if split == "holdout" else ""), "backbone": backbone}


def drawn(folder: Path, rows: Sequence[Measurement], titles: Mapping[str, str]) -> tuple[list[Path], list]:
    """The figures as `figures.write_figures` gives them; none, and a warning, without matplotlib."""
    if missing := figures.missing():
        common.warn(f"no figures: {missing}")
        return [], []
    return figures.write_figures(folder, rows, titles)


def _comparison(arguments: common.Arguments) -> Comparison:
    folder = Path(common.workdir_of(arguments, must_exist=False))  # refuses a missing one first
    config = common.config_of(arguments)
    options = Options(
        **names_of(config, arguments["split"]),
        cuts=tuple(dict.fromkeys(arguments["cuts"])),
        sequences=tuple(dict.fromkeys(arguments["sequences"])) or tuple(sequences.KINDS),
        **{name: arguments[name] for name in ("split", "probes", "requests", "length")},
    )
    return Comparison(
        folder=folder,
        config=config,
        methods=methods.load(arguments["methods"] or tuple(methods.METHODS)),
        seeds=tuple(range(arguments["seeds"])),
        experiments=tuple(dict.fromkeys(arguments["experiments"])),
        options=options,
    )
