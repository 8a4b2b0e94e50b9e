"""lmeraser add: new private records join a workdir, and only the clusters they touch are tuned.

  lmeraser add --workdir=DIR --source=FILE.npz|FOLDER [--labels=CSV] [--wait=SECONDS]

The source is read with the workdir's own data settings; its classes must be known and its shape must fit. Its training
images join; test and public images are left out. After an interruption the same command resumes.
"""

import dataclasses

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.unlearning import add

STRAY = "the images are given as --source=FILE.npz or --source=FOLDER"
FLAGS = (
    Flag("source", "", ".npz file or folder with the images to add"),
    Flag("labels", "", "CSV that names files, labels and owners of a folder"),
    *common.WRITING,
    *common.SHARED,
)


def run(arguments: common.Arguments) -> int:
    common.workdir_of(arguments)  # refuses a missing one first
    add.check_source(arguments["source"], arguments["labels"])
    with common.opened(arguments, write=True) as run_:
        source = add.open_source(run_, arguments["source"], arguments["labels"])
        imported, report = add.add(run_, source)
    text = f"{common.imported_text(imported, 'the same command')}\n{common.build_text(report)}"
    if report.reclustered:
        text += "; a new record was sampled, so the clusters were made again"
    common.show(arguments, text, {"imported": dataclasses.asdict(imported), **dataclasses.asdict(report)})
    return 0
