"""Files and folders that are replaced or removed in one durable step, so that a crash cannot tear them."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path


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


def remove_others(folder: Path, names: Collection[str]) -> None:
    """Removes every folder and file in `folder` whose name is not among `names`, and makes that durable."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    sync_folder(folder)


def resize_file(path: Path, size: int) -> None:
    """Cuts off what is too much, or fills up with zeros what is missing, and makes that durable."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_use(path: Path) -> int:
    """Bytes of all files below a path; 0 where it is absent, and for files that a writer removes meanwhile."""
    if path.is_file():
        return path.stat().st_size
    size = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(Path(folder) / name).st_size
    return size
