"""One process of several, for tests/test_distributed.py: runs a command and notes every slice that it writes.

Arguments: a file to note in, a signal to send itself and after how many slices (0: never), then the command's own.
"""

import os
import sys
from pathlib import Path

from lmeraser_jax.cli import main
from lmeraser_jax.store import checkpoints

if __name__ == "__main__":
    notes, number, after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    save, names = checkpoints.save, []

    def noted(folder, *rest):
        save(folder, *rest)
        if folder.parent.name == "slices":
            names.append(folder.name)
            notes.write_text("\n".join(names))
            if len(names) == after:
                os.kill(os.getpid(), number)

    checkpoints.save = noted
    sys.exit(main.main(sys.argv[4:]))
