"""lmeraser compare: methods side by side on one data set: accuracy, what an erasure costs, figures.

  lmeraser compare --config=configs/digits.py --seeds=5 --workdir=runs/compare
  lmeraser compare --config=configs/digits.py --methods=lmeraser,sisa-vote,ridge --workdir=runs/compare

Every method is a few changed settings (lmeraser_jax/methods/); a file of one's own is named by its path. What was
interrupted carries on; a further method, seed or experiment joins. Writes results.csv, results.json, report.html and
figures.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import raise_all


def define(flags: common.Flags) -> None:
    text = "names or FILE.py, joined by commas; empty: all"
    absl_flags.DEFINE_list("methods", [], text, flag_values=flags)
    absl_flags.DEFINE_integer("seeds", 1, "runs of each method, with seeds 0, 1, ...", flag_values=flags)
    text = "joined by commas: methods, removal (0 to 50 %), cut (of the tree), epochs, sequence (of requests)"
    absl_flags.DEFINE_list("experiments", ["methods"], text, flag_values=flags)
    absl_flags.DEFINE_list("cuts", [], "for cut: values of clustering.cut, joined by commas", flag_values=flags)
    text = "for sequence: uniform, burst, pareto, class, half, adaptive; empty: all"
    absl_flags.DEFINE_list("sequences", [], text, flag_values=flags)
    absl_flags.DEFINE_integer("length", 10, "for sequence: batches of requests", flag_values=flags)
    text = "images that are asked about: test, or holdout to choose settings by"
    absl_flags.DEFINE_string("split", "test", text, flag_values=flags)
    absl_flags.DEFINE_integer("probes", 100, "records whose erasure is planned, to know its cost", flag_values=flags)
    absl_flags.DEFINE_integer(
        "requests", 2, "erasures that are served and timed, sampled and unsampled", flag_values=flags
    )
    absl_flags.DEFINE_bool("keep", False, "keep the workdirs of the methods", flag_values=flags)
    text = "show the clusters of the first method in the report: private images, which no erasure reaches there"
    absl_flags.DEFINE_bool("montage", False, text, flag_values=flags)
    text = "folders of other comparisons whose rows join the report, joined by commas"
    absl_flags.DEFINE_list("merge", [], text, flag_values=flags)


def stored_config(workdir: str) -> dict[str, Any] | None:
    """The settings that a folder compares with; None where nothing was compared yet."""
    from lmeraser_jax.experiments.results import bound

    found = bound(Path(workdir))
    return None if found is None else found["config"]


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    counts = {"seeds": 1, "length": 1, "probes": 1, "requests": 0}
    raise_all([f"--{n}={arguments[n]}: must be at least {low}" for n, low in counts.items() if arguments[n] < low])
    from lmeraser_jax.evaluation import plotting
    from lmeraser_jax.experiments import console, methods, page, runner, sequences
    from lmeraser_jax.experiments.measure import MONTAGE, Plan
    from lmeraser_jax.experiments.results import load, save

    plotting.required()  # refuses now, not in the end
    others = {name: load(Path(name) / "results.json") for name in arguments["merge"]}
    common.log_devices()
    data = config.data
    dataset = data.dataset or (Path(data.path).stem if data.path else data.source)
    dataset += ", held out" if arguments["split"] == "holdout" else ""
    backbone = config.backbone.name or (Path(config.backbone.weights).name or "small ViT")
    kinds = tuple(dict.fromkeys(arguments["sequences"])) or tuple(sequences.KINDS)
    cuts = tuple(dict.fromkeys(arguments["cuts"]))
    counted = {name: arguments[name] for name in ("split", "probes", "requests", "length")}
    chosen = methods.load_all(arguments["methods"] or methods.names())
    comparison = runner.Comparison(
        Path(workdir),
        config,
        chosen,
        tuple(range(arguments["seeds"])),
        tuple(dict.fromkeys(arguments["experiments"])),
        Plan(dataset, backbone, cuts=cuts, sequences=kinds, montage=arguments["montage"], **counted),
        arguments["keep"],
    )
    command = shlex.join(["lmeraser", "compare", *sys.argv[2:]])
    runner.merged(runner.collected(comparison, command), others)  # refuses now, what is known now
    results = runner.compare(comparison, command)
    results = runner.merged(results, others)
    save(comparison.folder, results)
    titles = {name: methods.load(name).title for name in methods.names()} | {m.name: m.title for m in chosen}
    picture = comparison.folder / MONTAGE
    if arguments["montage"] and not picture.exists():
        row = comparison.rows_of(comparison.tasks[0])
        common.warn(f"no cluster was drawn: the first method was done without --montage; delete {row} to do it again")
    montage = picture.read_bytes() if arguments["montage"] and picture.exists() else None
    written = page.write_report(comparison.folder, results, titles, montage)
    lines = [console.table(results, titles)] + [f"wrote {os.path.relpath(path)}" for path in written]
    common.show(arguments, "\n".join(lines), results.values())
    return 0
