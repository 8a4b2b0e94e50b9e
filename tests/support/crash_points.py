"""The labelled points around all that touches a workdir's disk, where a process may be killed or a write may fail."""

import contextlib
import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.storage import atomic_files, checkpoints
from lmeraser_jax.storage.catalog import Catalog

Half = Callable[[Path], None]  # does the first half of what comes next, in the workdir or in a copy of it


class Points:
    """Calls `reached(label, half)` before, halfway through and after everything that changes a workdir.

    Args:
        root: the workdir.
        patch: installs the points for as long as it holds.
        reached: notes the point, copies the workdir, or raises what the operating system would report.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, reached: Callable[[str, Half | None], None]):
        self.root, self.patch = root, patch
        self.in_order, self.reached = threading.Lock(), reached  # slices are written by several threads
        for function, half in (
            (checkpoints.save, None),
            (atomic_files.publish_folder, None),
            (atomic_files.write_bytes, self._half_written),
            (atomic_files.remove_others, None),
        ):
            wrapper = self._around(function, half)
            for module in [module for name, module in sys.modules.items() if name.startswith("lmeraser_jax")]:
                for name in [name for name, value in vars(module).items() if value is function]:
                    patch.setattr(module, name, wrapper)
        patch.setattr(RowFile, "append", self._around(RowFile.append, self._half_appended))
        patch.setattr(RowFile, "overwrite", self._around(RowFile.overwrite, self._half_overwritten))
        for owner, name in ((RowFile, "truncate"), (RowFile, "sync"), (Catalog, "flush"), (os, "replace")):
            patch.setattr(owner, name, self._around(getattr(owner, name)))
        patch.setattr(os, "unlink", self._around(os.unlink))
        patch.setattr(shutil, "rmtree", self._around(shutil.rmtree, self._half_removed))
        patch.setattr(Catalog, "transaction", self._transaction(Catalog.transaction))

    def _point(self, label: str, half: Half | None = None) -> None:
        with self.in_order:
            self.reached(label, half)

    def _inside(self, argument: Any) -> bool:
        return self.root in (argument.path if isinstance(argument, RowFile | Catalog) else Path(argument)).parents

    def _around(self, function: Callable, half: Callable[..., None] | None = None) -> Callable:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if not self._inside(args[0]):
                return function(*args, **kwargs)
            self._point(f"before {function.__name__}")
            if half is not None:
                self._point(f"halfway {function.__name__}", lambda root: half(root, *args))
            result = function(*args, **kwargs)
            self._point(f"after {function.__name__}")
            return result

        return wrapper

    def _transaction(self, real: Callable) -> Callable:
        @contextlib.contextmanager
        def transaction(catalog):
            if catalog.db.in_transaction or not self._inside(catalog):
                with real(catalog):
                    yield
                return
            self._point("before begin")
            with real(catalog):
                yield
                self._point("before commit")
            self._point("after commit")

        return transaction

    def _moved(self, root: Path, path: Path) -> Path:
        return root / path.relative_to(self.root)

    def _half_written(self, root: Path, path: Path, data: bytes) -> None:
        path = self._moved(root, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])

    def _half_appended(self, root: Path, file: RowFile, rows: Any) -> None:
        path = self._moved(root, file.path)
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as raw:
            raw.write(rows.tobytes()[: rows.nbytes // 2 + 1])

    def _half_overwritten(self, root: Path, file: RowFile, rows: Any) -> None:
        view = RowFile(self._moved(root, file.path), file.shape, file.dtype).view("r+")
        view[rows[: (len(rows) + 1) // 2]] = 0
        view.flush()

    def _half_removed(self, root: Path, path: Path, *_: Any, **__: Any) -> None:
        for file in [file for file in self._moved(root, Path(path)).rglob("*") if file.is_file()][::2]:
            os.remove(file)
