"""The paths of a workdir, and the lock that lets one process write to it."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lmeraser_jax import interrupt
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.hashing import digest as digest_of
from lmeraser_jax.storage.atomic_files import entries, files_below, is_there

PRIVATE = 0o077  # permission bits that neither group nor others get: a workdir holds private images
CONFIG_BYTES = 1 << 20  # no config is larger
HOLDER_BYTES = 200  # of the lock file that a message shows
POLL = 0.1  # seconds between two attempts to get the lock


class Layout:
    """Paths below one workdir; makes nothing."""

    def __init__(self, workdir: str | Path):
        self.root = Path(absolute(workdir)).resolve()
        if any("\udc80" <= letter <= "\udcff" for letter in str(self.root)):  # how Python shows other bytes
            raise UserError(f"--workdir={str(self.root)!a}: the path is not UTF-8, as receipts are; rename it")
        self.flag = shlex.quote(f"--workdir={self.root}")  # in a command that a message tells
        self.config = self.root / "config.json"
        self.catalog = self.root / "catalog.db"
        self.backbone = self.root / "backbone"
        self.tokenizer = self.root / "tokenizer"
        self.pretraining = self.root / "pretraining"
        self.public = self.root / "public"
        self.public_sample = self.public / "sample"
        self.records = self.root / "records"
        self.images = self.records / "images.u8"
        self.clusterings = self.root / "clusterings"
        self.slices = self.root / "slices"
        self.packed = self.root / "packed"
        self.scratch = self.root / "scratch"
        self.metrics = self.root / "metrics.jsonl"
        self.picture = self.root / "clusters.png"
        self.receipts = self.root / "receipts"
        self.receipts_head = self.root / "receipts_head.json"  # signed
        self.lock = self.root / "lock"

    def features(self, digest: str) -> Path:
        return self.records / f"features-{digest[:16]}.f32"

    def feature_files(self) -> list[Path]:
        """The cached features of all backbones and programs."""
        return [path for path in entries(self.records) if path.match("features-*.f32")]

    def public_prompt(self, digest: str) -> Path:
        return self.public / f"prompt-{digest[:16]}"

    def slice(self, digest: str) -> Path:
        return self.slices / digest

    def packed_slices(self, entries: Mapping[str, str]) -> Path:
        """The file of all slices that a manifest with these entries refers to."""
        return self.packed / digest_of(entries)

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
        _make_private(self.root)

    def _refuse_without_catalog(self) -> None:
        """A workdir that lost its catalog says so, instead of looking like a foreign folder."""
        if not self.catalog.exists() and self.config.exists() and self.backbone.exists():
            raise UserError(f"{self.catalog} is missing: restore it, or start again in a new workdir")

    def require(self) -> None:
        """Raises `UserError` unless this is a workdir."""
        self._refuse_without_catalog()
        if not self.catalog.exists():
            reason = "is no workdir (it has no catalog.db)" if self.root.exists() else "does not exist"
            raise UserError(f"--workdir={self.root} {reason}; make one with: lmeraser train {self.flag}")


def read_config(layout: Layout) -> dict[str, Any] | None:
    """The settings that a workdir was made with; None before it has any. Raises `UserError` when damaged."""
    if not is_there(layout.config):
        return None
    try:
        if layout.config.stat().st_size > CONFIG_BYTES:
            raise ValueError(f"it is larger than {CONFIG_BYTES} bytes")
        values = json.loads(layout.config.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no group of settings")
        return values
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{layout.config} is damaged ({error}); delete it and run lmeraser train {layout.flag}"
            " with the experiment's --config=FILE.py"
        ) from error


def refuse_links(layout: Layout) -> None:
    """Raises `UserError` where a file or folder is a symbolic link: what is written or purged must lie inside.

    Looks at the entries of the workdir and of its folders; deeper ones are never written in place, and a removal
    does not follow links. The workdir itself may be reached through a link. Pipes are refused there, too.
    """
    entries = list(os.scandir(layout.root))
    entries += [inner for entry in entries if entry.is_dir(follow_symlinks=False) for inner in os.scandir(entry)]
    links = [ascii(os.path.relpath(entry.path, layout.root)) for entry in entries if entry.is_symlink()]
    if links:
        reason = "symbolic links, through which files outside could be overwritten or deleted"
        raise UserError(f"{layout.root} holds {reason}: {join_limited(sorted(links))}; put the files themselves there")
    _refuse(layout, [Path(entry.path) for entry in entries if not (entry.is_file() or entry.is_dir())])


def refuse_pipes(layout: Layout) -> None:
    """Raises `UserError` where a pipe, a socket or a device lies in the workdir: to open one may take for ever."""
    _refuse(layout, [path for path in files_below(layout.root) if is_there(path) and not path.is_file()])


def _refuse(layout: Layout, strange: list[Path]) -> None:
    if strange:
        listed = join_limited(sorted(ascii(str(path.relative_to(layout.root))) for path in strange))
        raise UserError(f"{layout.root} holds pipes, sockets or devices, which no command makes: {listed}; remove them")


@contextlib.contextmanager
def writer_lock(layout: Layout, wait: float = 0) -> Iterator[None]:
    """One writer at a time; the kernel frees the lock when the process ends, however it ends.

    As long as it is held, new files and folders of this process are the user's own (0600 and 0700).

    Args:
        layout: the workdir; its folder is made if need be, and closed to others.
        wait: seconds to wait for another writer.

    Raises:
        UserError: another process holds it, also after the wait, or the workdir holds symbolic links.
    """
    _make_private(layout.root)
    if layout.lock.is_symlink():
        refuse_links(layout)
    handle = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with open(handle, "r+b", buffering=0) as file:
        _acquire(layout, file, wait)
        refuse_links(layout)  # not before: the other writer may be renaming folders
        file.truncate(0)
        os.pwrite(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        mask = os.umask(PRIVATE)
        try:
            yield
        finally:
            os.umask(mask)
            file.truncate(0)


def refuse_other_writer(layout: Layout, wait: float) -> None:
    """Raises `UserError` where another process writes now and `writer_lock` would not wait for it."""
    writer = "" if wait else current_writer(layout)
    if writer:
        raise UserError(f"{layout.root} is being written by {writer}; wait for it with --wait=SECONDS")


def current_writer(layout: Layout) -> str:
    """The process that holds the writer lock now; "" for none. Waits for nothing and writes nothing."""
    if layout.lock.is_file():
        with open(layout.lock, "rb", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(file)
    return ""


def _make_private(root: Path) -> None:
    """Makes the workdir, open to its user alone; its parents are made as the user's umask says."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o777 & ~PRIVATE, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--workdir={root} cannot be made: {error.strerror} ({error.filename})") from error
    with contextlib.suppress(PermissionError):  # somebody else's folder that this user may write to
        root.chmod(root.stat().st_mode & 0o7777 & ~PRIVATE)


def _acquire(layout: Layout, file: BinaryIO, wait: float) -> None:
    """Takes the lock, or raises `UserError` when another process still holds it after so many seconds."""
    end, announced = time.monotonic() + wait, False
    while True:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        interrupt.raise_if_stopped()
        holder = f"{layout.root} is being written by {_holder(file)}"
        if time.monotonic() >= end:
            waited = f", still after {wait:g} s" if wait else ""
            raise UserError(f"{holder}{waited}; wait for it with --wait=SECONDS")
        if not announced:
            print(f"{holder}; waiting for it, {wait:g} s at most", file=sys.stderr)
            announced = True
        time.sleep(POLL)


def _holder(file: BinaryIO) -> str:
    """What the lock file says of the process that holds it, unless somebody else wrote there."""
    text = os.pread(file.fileno(), HOLDER_BYTES, 0).decode(errors="replace").strip()
    return text if text.startswith("process ") and text.isprintable() else "another process"
