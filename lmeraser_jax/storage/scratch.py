"""Where the other processes of a command write their slices.

Process 0, which holds the writer lock, makes a folder for a round of work, takes finished slices from it, and removes
it. The others hold on to that very folder, so once it is gone nothing that one of them still does reaches the disk:
a slice that an erased record helped to make cannot come back after the receipt, however late its process wakes up.
"""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.atomic_files import sync_folder
from lmeraser_jax.storage.workdir import Layout

PREFIX = "team-"
PATIENCE = 30.0  # seconds for a process that writes in a folder to notice that it is being removed
POLL = 0.05
WRITTEN_TO = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)  # what a removal meets then


def begin(layout: Layout) -> Path:
    """A new folder for a round of work. Only the holder of the writer lock may ask for one."""
    layout.scratch.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=layout.scratch))


def held(folder: Path) -> Path:
    """A name for this very folder as long as the process lives: once it is removed, nothing can be made below the name.

    A path would not do: Orbax and TensorStore make every folder of a path that is missing. (Linux: /proc/self/fd. The
    handle is never closed, for its number would then mean another file.)

    Raises:
        UserError: there is no such folder.
    """
    try:
        return Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)}")
    except OSError as error:
        raise UserError(f"{folder} cannot be opened ({error.strerror}); is the workdir shared?") from error


def take(layout: Layout, folder: Path, digest: str) -> None:
    """Moves a finished slice from a folder of scratch to where slices lie, for good.

    Raises:
        UserError: it is not there.
    """
    layout.slices.mkdir(exist_ok=True)
    try:
        os.replace(folder / digest, layout.slice(digest))
    except FileNotFoundError as error:
        raise UserError(f"{folder / digest} is not there; is the workdir shared?") from error
    sync_folder(layout.slices)


def settle(layout: Layout) -> None:
    """Ends all rounds of work, also those of commands that were killed: takes what is finished, removes the folders.

    Whoever goes on has to look at the slices that are not registered: some may have been made with erased records.

    Raises:
        UserError: somebody does not cease to write in one of the folders.
    """
    for folder in layout.scratch.glob(f"{PREFIX}*"):
        for path in list(folder.iterdir()):
            finished = path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
            if finished and not layout.slice(path.name).exists():
                take(layout, folder, path.name)
        _remove(folder)


def _remove(folder: Path) -> None:
    """Removes a folder in which another process may be writing."""
    end = time.monotonic() + PATIENCE
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in WRITTEN_TO:
                raise
            if time.monotonic() > end:
                raise UserError(f"{folder} cannot be removed: a process still writes there; end it") from error
            time.sleep(POLL)
