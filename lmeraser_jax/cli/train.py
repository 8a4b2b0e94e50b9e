"""lmeraser train: from images to a tuned prompt and head for every cluster.

  lmeraser train --config=configs/digits.py --config.tuning.epochs=3 --workdir=runs/digits

Run again on the same workdir it resumes, or says that nothing is to do.
"""

import dataclasses
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import join_limited

if TYPE_CHECKING:
    from lmeraser_jax.storage.ingest import Imported
    from lmeraser_jax.unlearning.build import BuildReport

MOST_NAMED = 1000  # images in a warning; --json has all


def define(flags: common.Flags) -> None:
    text = "read the source again: new records join, erased ones stay out"
    absl_flags.DEFINE_bool("reimport", False, text, flag_values=flags)
    common.define_wait(flags)
    common.define_profile(flags)
    text = "tune every cluster with another --config.tuning; the old slices stay for lmeraser rollback"
    absl_flags.DEFINE_bool("retune", False, text, flag_values=flags)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    from lmeraser_jax.evaluation import overview
    from lmeraser_jax.training import profiling
    from lmeraser_jax.unlearning.build import build, repair
    from lmeraser_jax.unlearning.run import prepare_run

    common.log_devices()
    again = {name: arguments[name] for name in ("reimport", "retune", "wait")}
    with (
        profiling.into(arguments["profile"]),
        prepare_run(workdir, config, team=arguments.team, **again) as (opened, imported),
    ):
        lines = _imported(imported, opened.spec.channels) if imported else []
        for message in repair(opened):
            common.warn(message)
        outcome = build(opened)
        shown = overview.overview(opened.layout, opened.catalog, opened.config)
    for message in shown.warnings:
        common.warn(message)
    lines.append(_done(outcome))
    lines += [shown.class_table(), shown.cost()]
    shares = {"expected_share": shown.expected_share, "sampled_share": shown.sampled_share}
    classes = {"classes": shown.values()["classes"], "imbalance": shown.imbalance}
    values = {
        **dataclasses.asdict(outcome),
        **shares,
        **classes,
        "imported": dataclasses.asdict(imported) if imported else None,
    }
    common.show(arguments, "\n".join(lines), values)
    return 0


def _imported(imported: "Imported", channels: int) -> list[str]:
    """What an import did, for people; warns of images that could not be read."""
    erased = f", {imported.erased} refused because they were erased" if imported.erased else ""
    same = f", {imported.duplicates} with the pixels of another" if imported.duplicates else ""
    lines = [f"imported {imported.added} records{erased}{same}"]
    if imported.converted:
        lines.append(f"{imported.converted} images were not {'grey' if channels == 1 else 'RGB'} and were converted")
    if imported.mended:
        lines.append(f"{imported.mended} images had rotted and were read from the source again")
    if imported.unreadable:
        common.warn(
            f"{len(imported.unreadable)} images could not be read and were left out"
            f" ({join_limited(imported.unreadable, MOST_NAMED)}); mended ones join with lmeraser train --reimport"
        )
    return lines


def _done(outcome: "BuildReport") -> str:
    if not (outcome.retuned or outcome.published):
        return f"nothing to do: all {outcome.clusters} clusters are tuned and published"
    return (
        f"tuned {outcome.retuned} clusters, reused {outcome.reused}:"
        f" {outcome.images} images in {outcome.seconds:.1f} s, {outcome.efficiency:.0%} of the places filled"
    )
