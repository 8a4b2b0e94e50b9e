"""The labelled points at which a process is killed, or a write fails: around all that touches a workdir's disk."""

import contextlib
import errno
import functools
import os
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.storage import atomic_files, checkpoints
from lmeraser_jax.storage.catalog import Catalog


class Points:
    """Counts the labelled points that a process passes; at the `die_at`-th it is killed, or a write fails.

    Args:
        die_at: which; None: none.
        error: name of the error that the operating system reports; "" to be killed.
        lasting: every later point fails too.
    """

    def __init__(self, die_at: int | None = None, error: str = "", lasting: bool = False):
        self.die_at, self.error, self.lasting, self.labels = die_at, error, lasting, []
        self.one_by_one = threading.Lock()

    def __call__(self, label: str, partly: Callable[[], Any] | None = None) -> None:
        """`partly` does a part of what comes next, so that it ends in its middle."""
        with self.one_by_one:  # slices are written by several threads
            self.labels.append(label)
            passed = len(self.labels) - 1
        if self.die_at is None or passed < self.die_at or passed > self.die_at and not self.lasting:
            return
        if partly is not None and passed == self.die_at:
            partly()
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        if label.split()[-1] in ("begin", "commit", "Catalog.flush"):
            full = self.error == "ENOSPC"
            raise sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
        number = getattr(errno, self.error)
        raise OSError(number, os.strerror(number))

    def around(self, function, half=None, only_from: tuple[str, ...] = (), idle: Callable[..., bool] | None = None):
        """Points around the calls of a function, but for those from elsewhere and for idle ones."""
        name = function.__qualname__

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if only_from and not caller.startswith(only_from) or idle is not None and idle(*args):
                return function(*args, **kwargs)
            self(f"before {name}")
            if half is not None:
                self(f"halfway {name}", lambda: half(*args, **kwargs))
            result = function(*args, **kwargs)
            self(f"after {name}")
            return result

        return wrapper

    def install(self) -> None:
        """Wraps everything that writes, renames, removes or commits, in every module that uses it."""
        overwrite, rmtree = RowFile.overwrite, shutil.rmtree

        def half_append(file, rows):
            file.path.parent.mkdir(exist_ok=True)
            with open(file.path, "ab") as raw:
                raw.write(rows.tobytes()[: rows.nbytes // 2 + 1])

        def half_removed(path, *_, **__):
            for file in [one for one in Path(path).rglob("*") if one.is_file()][::2]:
                os.remove(file)

        def half_written(path, data):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])

        wrapped = [
            (checkpoints.save, None),
            (atomic_files.publish_folder, None),
            (atomic_files.write_bytes, half_written),
        ]
        wrapped += [(atomic_files.write_json, None), (atomic_files.remove_others, None)]
        modules = [module for name, module in sys.modules.items() if name.startswith("lmeraser_jax")]
        for function, half in wrapped:
            wrapper = self.around(function, half)
            for module in modules:
                for name in [name for name, value in vars(module).items() if value is function]:
                    setattr(module, name, wrapper)
        RowFile.append = self.around(RowFile.append, half_append)
        RowFile.overwrite = self.around(overwrite, lambda file, rows: overwrite(file, rows[: (len(rows) + 1) // 2]))
        RowFile.truncate, RowFile.sync = self.around(RowFile.truncate), self.around(RowFile.sync)
        Catalog.flush, Catalog.transaction = self.around(Catalog.flush), self._transaction(Catalog.transaction)
        ours = ("lmeraser_jax", "pathlib")
        os.replace, os.unlink = self.around(os.replace, None, ours), self.around(os.unlink, None, ours)
        shutil.rmtree = self.around(rmtree, half_removed, ours[:1], lambda path, *_: not Path(path).exists())

        self._trace_statements()

    def _trace_statements(self) -> None:
        """Also a point before every statement that begins, ends or is a transaction, whoever executes it."""
        real = Catalog.__init__

        def traced(catalog, path):
            real(catalog, path)

            def before(statement: str) -> None:
                verb = statement.split()[0].upper()
                alone = verb in ("INSERT", "UPDATE", "DELETE") and not catalog.db.in_transaction
                named = self.labels and self.labels[-1] in ("before begin", "before commit")
                if (verb in ("BEGIN", "COMMIT") or alone) and not named:
                    self(f"statement {verb}")

            catalog.db.set_trace_callback(before)

        Catalog.__init__ = traced

    def _transaction(self, real):
        @contextlib.contextmanager
        def transaction(catalog):
            if catalog.db.in_transaction:
                with real(catalog):
                    yield
                return
            self("before begin")
            with real(catalog):
                self("after begin")
                yield
                self("before commit")
            self("after commit")

        return transaction
