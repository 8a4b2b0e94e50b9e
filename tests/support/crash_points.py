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
    """Calls `reached(label, half)` before, halfway through and after everything that changes the workdir `root`.

    `reached` notes the point, copies the workdir, or raises what the operating system would report.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, reached: Callable[[str, Half | None], None]):
        self.root, self.reached = root, reached
        self.in_order = threading.Lock()  # slices are written by several threads
        self.halves = {"write_bytes": self._half_written, "append": self._half_appended}
        self.halves |= {"overwrite": self._half_overwritten, "rmtree": self._half_removed}
        files = atomic_files
        for function in (checkpoints.save, files.publish_folder, files.write_bytes, files.remove_others):
            wrapper = self._around(function)
            for module in [module for name, module in sys.modules.items() if name.startswith("lmeraser_jax")]:
                for name in [name for name, value in vars(module).items() if value is function]:
                    patch.setattr(module, name, wrapper)
        names = {RowFile: "append overwrite truncate sync", Catalog: "flush", os: "replace unlink", shutil: "rmtree"}
        for owner, listed in names.items():
            for name in listed.split():
                patch.setattr(owner, name, self._around(getattr(owner, name)))
        patch.setattr(Catalog, "transaction", self._transaction(Catalog.transaction))

    def _point(self, label: str, half: Half | None = None) -> None:
        with self.in_order:
            self.reached(label, half)

    def _inside(self, argument: Any) -> bool:
        return self.root in (argument.path if isinstance(argument, RowFile | Catalog) else Path(argument)).parents

    def _around(self, function: Callable) -> Callable:
        half = self.halves.get(function.__name__)

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
