"""Rows of one array in an .npz file, read in order without ever holding the array."""

import io
import lzma
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from typing import IO, Any

import numpy as np

from lmeraser_jax.errors import UserError

PIECE = 1 << 16  # bytes asked for at a time
SMALL_PIECE = 1 << 12  # where zipfile unpacks at once whatever so many bytes of the file hold, some thousand times more
DAMAGE = (  # what NumPy and the standard library raise for a damaged file
    ValueError,
    TypeError,
    OSError,
    EOFError,
    RuntimeError,
    SyntaxError,
    OverflowError,
    LookupError,
    AttributeError,
    MemoryError,
    SystemError,  # a text of numbers that are no characters
    struct.error,
    tokenize.TokenError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
)
RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # bytes that one byte of the file can stand for
OTHER_RATIO = 10_000  # more than photographs, labels or names ever give


class Rows:
    """The rows of a member of a zip file, from the first to the last; asking for an earlier row starts again.

    Args:
        path: the zip file.
        member: name of the .npy file inside.
        file: the zip file, open; it is not kept.

    Attributes:
        shape, dtype, fortran: as the header says.

    Raises:
        One of `DAMAGE`: the header cannot be read, does not fit the size of the member, or calls for more than
            the bytes in the file can hold.
    """

    def __init__(self, path: str, member: str, file: zipfile.ZipFile):
        self.path, self.member = path, member
        info = file.getinfo(member)
        packed = min(info.compress_size, os.path.getsize(path))
        if info.file_size > packed * RATIO.get(info.compress_type, OTHER_RATIO):
            raise ValueError(f"{member} calls for {info.file_size} bytes, more than its {packed} bytes can hold")
        with file.open(member) as stream:
            self.shape, self.fortran, self.dtype, header = _header(stream)
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.piece = PIECE if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else SMALL_PIECE
        wanted = header + math.prod(self.shape) * self.dtype.itemsize
        if info.file_size != wanted and not self.dtype.hasobject:
            raise ValueError(f"{member} holds {info.file_size} bytes, its header calls for {wanted}")
        self.stream: IO[bytes] | None = None
        self.next = 0  # row that the stream stands before

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop: [stop - start, *shape[1:]]. With the last one zipfile compares checksums.

        Raises:
            UserError: the file is damaged or has changed.
        """
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        try:
            stream = self._at(start)
            self._fill(stream, rows.data.cast("B"))
            self.next = stop
            if stop == self.shape[0]:
                self.close()
        except DAMAGE as error:
            self.close()
            raise UserError(
                f"--config.data.path={self.path} is damaged: rows {start} to {stop} of {self.member}: {error}"
            ) from error
        return rows

    def whole(self) -> np.ndarray:
        """All of a small array. Raises one of `DAMAGE`; nothing is unpickled."""
        with zipfile.ZipFile(self.path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.lib.format.read_array(io.BytesIO(file.read(self.member)), allow_pickle=False)

    def close(self) -> None:
        """Lets go of the file."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        self.next = 0

    def _at(self, row: int) -> IO[bytes]:
        """The stream, standing before a row."""
        if self.stream is None or row < self.next:
            self.close()
            with zipfile.ZipFile(self.path) as file:
                self.stream = file.open(self.member)  # stays open without the zip file
            if _header(self.stream)[:3] != (self.shape, self.fortran, self.dtype):
                raise ValueError("it has changed since it was opened")
        stream = self.stream
        skipped, piece = (row - self.next) * self.row_bytes, bytearray(self.piece)
        while skipped:
            part = memoryview(piece)[: min(skipped, self.piece)]
            self._fill(stream, part)
            skipped -= len(part)
        return stream

    def _fill(self, stream: Any, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = stream.readinto(target[done : done + self.piece])
            if not count:
                raise EOFError("it ends too early")
            done += count


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and length of the header of an .npy file; the stream stands behind it."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f".npy version {version} is not known here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of headers that it reads all the same
        shape, fortran, dtype = readers[version](stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype, stream.tell()
