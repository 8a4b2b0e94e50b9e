"""Where things lie in a workdir, how files are written so that a crash cannot tear them, and the lock."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from lmeraser_jax.errors import UserError

POLL = 0.1  # seconds between two attempts to get the lock


class Layout:
    """Paths below one workdir; makes nothing."""

    def __init__(self, workdir: str | Path):
        self.root = Path(workdir).expanduser().resolve()
        self.config = self.root / "config.json"
        self.catalog = self.root / "catalog.db"
        self.backbone = self.root / "backbone"
        self.pretraining = self.root / "pretraining"
        self.records = self.root / "records"
        self.images = self.records / "images.u8"
        self.clusterings = self.root / "clusterings"
        self.slices = self.root / "slices"
        self.scratch = self.root / "scratch"
        self.metrics = self.root / "metrics.jsonl"
        self.picture = self.root / "clusters.png"
        self.receipts = self.root / "receipts"
        self.lock = self.root / "lock"

    def features(self, digest: str) -> Path:
        return self.records / f"features-{digest[:16]}.f32"

    def slice(self, digest: str) -> Path:
        return self.slices / digest

    def clustering(self, digest: str) -> Path:
        return self.clusterings / digest

    def receipt(self, request: str) -> Path:
        return self.receipts / f"{request}.json"

    def prepare(self) -> None:
        """Makes the workdir, or refuses a folder that holds something else."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--workdir={self.root} is a file, not a folder")
        self._refuse_without_catalog()
        if self.root.is_dir() and not self.catalog.exists() and any(path != self.lock for path in self.root.iterdir()):
            raise UserError(f"--workdir={self.root} holds other files and is no workdir; name a new or an empty folder")
        self.root.mkdir(parents=True, exist_ok=True)

    def _refuse_without_catalog(self) -> None:
        """A workdir that lost its catalog says so, instead of looking like a foreign folder."""
        if not self.catalog.exists() and self.config.exists() and self.backbone.exists():
            raise UserError(f"{self.catalog} is missing: restore it, or start again in a new workdir")

    def require(self) -> None:
        """Raises `UserError` unless this is a workdir."""
        self._refuse_without_catalog()
        if not self.catalog.exists():
            what = "is no workdir (it has no catalog.db)" if self.root.exists() else "does not exist"
            raise UserError(f"--workdir={self.root} {what}; make one with: lmeraser train --workdir={self.root}")


def read_config(layout: Layout) -> dict[str, Any] | None:
    """The settings that a workdir was made with; None before it has any. Raises `UserError` when damaged."""
    if not layout.config.is_file():
        return None
    try:
        return json.loads(layout.config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{layout.config} is damaged ({error}); delete it and run lmeraser train --workdir={layout.root}"
            " with the experiment's --config=FILE.py"
        ) from error


def write_json(path: Path, value: object) -> None:
    """Replaces a JSON file in one step: readers see the old or the new text."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes to a file beside it, syncs, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Syncs everything below `temporary` and renames it to `final`; an older `final` is replaced."""
    for folder, _, files in os.walk(temporary):
        for name in files:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_others(folder: Path, kept: Collection[str]) -> None:
    """Removes every folder and file in `folder` whose name is not among `kept`, and makes that durable."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_use(path: Path) -> int:
    """Bytes of all files below a path (0 where it is absent)."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@contextlib.contextmanager
def writer_lock(layout: Layout, wait: float = 0) -> Iterator[None]:
    """One writer at a time; the kernel frees the lock when the process ends, however it ends.

    Args:
        layout: the workdir; its folder is made if need be.
        wait: seconds to wait for another writer.

    Raises:
        UserError: another process holds it, also after the wait; the message names its pid and host.
    """
    layout.root.mkdir(parents=True, exist_ok=True)
    with open(layout.lock, "a+", encoding="utf-8") as file:
        end = time.monotonic() + wait
        while not _taken(file):
            if time.monotonic() >= end:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(f"{layout.root} is being written by {holder}; wait for it with --wait=SECONDS")
            time.sleep(POLL)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
