"""lmeraser add: new private records join a workdir, and only the clusters they touch are tuned.

  lmeraser add --workdir=DIR --source=FILE.npz|FOLDER [--labels=CSV] [--wait=SECONDS]

The source is read with the workdir's own data settings; classes must be known and the shape must fit. Its training
images join, test and public images are left out. The same command goes on after an interruption.
"""

import dataclasses

from absl import flags as absl_flags

from lmeraser_jax.cli import common

STRAY = "the images are given as --source=FILE.npz or --source=FOLDER"


def define(flags: common.Flags) -> None:
    absl_flags.DEFINE_string("source", "", ".npz file or folder with the images to add", flag_values=flags)
    absl_flags.DEFINE_string("labels", "", "CSV that names files, labels and owners of a folder", flag_values=flags)
    common.define_wait(flags)


def run(arguments: common.Arguments) -> int:
    workdir, config = common.workdir_of(arguments), common.config_of(arguments)
    from lmeraser_jax.unlearning import add
    from lmeraser_jax.unlearning.run import open_run

    with open_run(workdir, config, write=True, wait=arguments["wait"], team=arguments.team) as run_:
        source = add.open_source(run_, arguments["source"], arguments["labels"])
        common.log_devices()
        imported, outcome = add.add(run_, source)
    if imported.unreadable:
        common.warn(f"{len(imported.unreadable)} images could not be read and were left out")
    values = {"imported": dataclasses.asdict(imported), **dataclasses.asdict(outcome)}
    common.show(arguments, _text(imported, outcome), values)
    return 0


def _text(imported, outcome) -> str:
    counts = {
        "known before": imported.known,
        "refused because they or their owner were erased": imported.erased,
        "with the pixels of another": imported.duplicates,
        "test, hold-out or public images left out": imported.left_out,
    }
    line = ", ".join(
        [f"added {imported.added} records", *(f"{count} {what}" for what, count in counts.items() if count)]
    )
    if not (outcome.retuned or outcome.published):
        return f"{line}\nnothing to do: all {outcome.clusters} clusters are tuned and published"
    again = "; a new record was sampled, so the clusters were made again" if outcome.reclustered else ""
    return (
        f"{line}\ntuned {outcome.retuned} clusters, reused {outcome.reused}; {outcome.images} images"
        f" ({outcome.ratio:.1%} of a full tuning) in {outcome.seconds:.1f} s{again}"
    )
