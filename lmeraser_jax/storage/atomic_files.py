"""Files and folders that are replaced or removed in one durable step, so that a crash cannot tear them.

A published folder notes the digests of its files, so that an error over one of them is never mistaken for damage.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmeraser_jax.errors import Damaged, shorten

DIGESTS = "digests.json"  # in a published folder: {path: SHA-256} of its files
SHOWN = 2000  # characters of an error in a message
THREADS = 8  # that wait for the disk, which takes milliseconds for a removed folder or a synced file


def write_json(path: Path, value: object) -> None:
    """Replaces a JSON file in one step: readers see the old or the new text."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file in one step."""
    write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes pieces, one after the other, to a file beside it, syncs, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Notes the digests of `temporary`, syncs it and renames it to `final`; an older `final` is replaced."""
    note_digests(temporary)
    replace_folder(temporary, final)


def replace_folder(new: Path, final: Path) -> None:
    """Renames a folder to `final`, in the place of an older one."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def note_digests(folder: Path) -> None:
    """Syncs all files below a folder and notes their digests beside them, for `why_unreadable`."""
    digests = _digests(folder, sync=True)
    for below, _, _ in os.walk(folder):
        sync_folder(Path(below))
    write_json(folder / DIGESTS, digests)


def _digests(folder: Path, sync: bool = False) -> dict[str, str]:
    """{path: SHA-256} of all files below a folder that are still there."""
    digests = {}
    for path in files_below(folder):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
    return digests


def why_unreadable(folder: Path, error: Exception | str) -> Exception:
    """What to raise for an error over a folder: `Damaged` where its files are not those whose digests were noted.

    Where they are, an `OSError`, whatever library raised: nobody could look. Raises the `OSError` that a file meets.
    """
    why, digests = shorten(str(error), SHOWN) or type(error).__name__, _digests(folder)
    with contextlib.suppress(FileNotFoundError, ValueError):
        noted = json.loads((folder / DIGESTS).read_bytes())
        if isinstance(noted, dict) and noted.items() <= digests.items():
            return OSError(errno.EIO, f"cannot be read now, although nothing of it has changed: {why}", str(folder))
    return Damaged(f"{folder} cannot be read: {why}")


def remove_others(folder: Path, names: Collection[str]) -> None:
    """Removes every folder and file in `folder` whose name is not among `names`, and makes that durable."""
    if not folder.exists():
        return
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(_remove, [folder / name for name in os.listdir(folder) if name not in names]))
    sync_folder(folder)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing where there is none. Raises where `Path.glob` hides that it may not look."""
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_there(path: Path) -> bool:
    """Whether a file or folder is there. Raises where newer Pythons' `Path.exists` hides that it may not look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def disk_use(path: Path) -> int:
    """Bytes of all files below a path; 0 where it is absent, and for files that a writer removes meanwhile."""
    if path.is_file():
        return path.stat().st_size
    size = 0
    for file in files_below(path):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def files_below(path: Path) -> Iterator[Path]:
    """All files below a folder. Raises the `OSError` that a folder meets, other than that it is not there."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, _, names in os.walk(path, onerror=refuse):
        yield from (Path(folder) / name for name in names)
