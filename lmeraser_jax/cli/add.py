"""lmeraser add: add private records to a workdir and tune only the clusters that they touch.

  lmeraser add --workdir=DIR --source=FILE.npz|FOLDER|FILE.jsonl [--labels=CSV] [--wait=SECONDS]

The command reads the source with the workdir's own data settings; the classes must be known and the image shape the
same. It adds the training images and leaves out test and public images. The same command resumes after an interruption.
"""

import dataclasses

from lmeraser_jax.cli import common
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.unlearning import add

STRAY = "records are given as --source=FILE.npz, --source=FOLDER or --source=FILE.jsonl"
FLAGS = (
    common.Flag("source", absolute, ".npz file or folder with the images to add, or JSON lines"),
    common.Flag("labels", absolute, "CSV that names files, labels and owners of a folder"),
    common.SIGNING_KEY,
    *common.WRITING,
    *common.SHARED,
)


def run(arguments: common.Arguments) -> int:
    common.workdir_of(arguments)  # refuses a missing one first
    add.check_source(arguments["source"], arguments["labels"], common.config_of(arguments).is_text)
    with common.opened(arguments, write=True) as run_:
        source = add.open_source(run_, arguments["source"], arguments["labels"])
        imported, report = add.add(run_, source)
    text = f"{common.imported_text(imported, 'the same command', run_.config.is_text)}\n{common.build_text(report)}"
    if report.reclustered:
        text += "; a new record was sampled, so the clusters were made again"
    common.show(arguments, text, {"imported": dataclasses.asdict(imported), **dataclasses.asdict(report)})
    return 0
