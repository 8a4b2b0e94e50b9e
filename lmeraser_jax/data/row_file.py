"""Flat files of fixed-size rows, memory-mapped: the private images and their features.

A row is overwritten when its record is erased; rows never move, so that a row number stays valid.
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np

PIECE = 4096  # rows looked at together


class RowFile:
    """Rows of one shape and dtype in one file, which is made when the first rows are appended."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        try:
            return self.path.stat().st_size // self.row_bytes
        except FileNotFoundError:
            return 0

    def truncate(self, rows: int) -> None:
        """Drops rows after the first `rows`, and a torn last row: what an interrupted import left behind."""
        if self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(min(rows, len(self)) * self.row_bytes)

    def append(self, rows: np.ndarray) -> None:
        """Adds rows at the end: [n, *shape]."""
        assert rows.shape[1:] == self.shape and rows.dtype == self.dtype, (rows.shape, rows.dtype)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(np.ascontiguousarray(rows).tobytes())

    def sync(self) -> None:
        """Waits until appended rows are on disk."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def view(self, mode: Literal["r", "r+"] = "r") -> np.memmap:
        """All rows as a memory map [n, *shape]; "r+" to write."""
        return np.memmap(self.path, self.dtype, mode, shape=(len(self), *self.shape))  # pyright: ignore[reportCallIssue]

    def overwrite(self, rows: np.ndarray) -> None:
        """Fills the given rows with zeros and waits until they are on disk."""
        if len(rows) and len(self):
            view = self.view("r+")
            view[rows[rows < len(view)]] = 0
            view.flush()

    def filled(self, rows: np.ndarray) -> np.ndarray:
        """int64 [m]: those of the given rows, int64 [n], that hold anything but zeros and NaN."""
        if not len(self):
            return np.zeros(0, np.int64)
        view = self.view()
        rows = rows[rows < len(view)]
        pieces = np.array_split(rows, max(1, len(rows) // PIECE))
        filled = [np.nan_to_num(view[piece]).reshape(len(piece), view[0].size).any(axis=1) for piece in pieces]
        return rows[np.concatenate(filled)]
