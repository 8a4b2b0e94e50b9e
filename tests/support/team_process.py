"""One process of several, for tests/teams.py: runs a command and notes every slice that it writes.

Arguments: a file to note in; a signal to send itself (0: none), at which slice, and whether once that is written
("after") or while it is being written ("during"); then the command's own.
"""

import os
import sys
import threading
from pathlib import Path

from lmeraser_jax.cli import main
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training import slice_files

if __name__ == "__main__":
    notes, number, at, moment = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if number:
        slice_files.WRITERS = 1  # none is tuned or written any more while the signal comes
    save, write, names, one_by_one = checkpoints.save, checkpoints._write, [], threading.Lock()

    def blow(written: int, now: str) -> None:
        if number and (written, now) == (at, moment):
            os.kill(os.getpid(), number)

    def noted(folder, *rest):
        if len(folder.name) != 64:  # a backbone
            return save(folder, *rest)
        with one_by_one:
            save(folder, *rest)
            names.append(folder.name)
            notes.write_text("\n".join(names))
            blow(len(names), "after")

    def interrupted(manager, *rest):
        if one_by_one.locked():
            blow(len(names) + 1, "during")
        write(manager, *rest)

    checkpoints.save, checkpoints._write = noted, interrupted
    sys.exit(main.main(sys.argv[5:]))
