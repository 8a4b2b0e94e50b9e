"""A user's own images in one .npz file.

Keys: train_images, train_labels, test_images, test_labels (uint8 [N, H, W, 1 or 3] or [N, H, W], int [N]), class_names;
optional *_ids, *_owners, public_images, public_labels. Ids default to "train/<index>", so give ids of your own if the
file will ever lose or gain images.
"""

import contextlib
import io
import itertools
import lzma
import math
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from lmeraser_jax.config import Data
from lmeraser_jax.data.names import LONGEST, as_name
from lmeraser_jax.data.source import Contents, Item, Source, not_used
from lmeraser_jax.errors import UserError, join_limited, raise_all, shorten, stand_in

SPLITS = ("train", "test", "public")
TEXT_KEYS = {"class_names"} | {f"{split}_{column}" for split in SPLITS for column in ("ids", "owners")}
KEYS = TEXT_KEYS | {f"{split}_{column}" for split in SPLITS for column in ("images", "labels")}
CLASS_LIMIT = 100_000
IMAGE_LIMIT = 100_000  # images that a file may hold whatever its size; more only if it has a byte for each
ZIP_ERRORS = (  # what zipfile raises over a damaged file, and `_read_header` over a header
    *(BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError),
    *(ValueError, RuntimeError, OverflowError),  # over a name or size, a compression or encryption, a place in the file
)
RATIO = {ZIP_STORED: 1, ZIP_DEFLATED: 1032}  # bytes that one byte of the file can stand for, by compression
OTHER_RATIO = 10_000  # of LZMA, in which packs of photographs come, and bzip2: more than these, labels or names give
PIECE = 1 << 12  # bytes asked for at a time of these: zipfile unpacks whatever so many packed bytes hold


def load(path: str, own_test: bool = True, max_pixels: int = Data().max_pixels, labelled: bool = True) -> Source:
    """Reads the file but for its images; `own_test` requires test images, `labelled` labels. Nothing is unpickled.

    Raises `UserError`: the file is missing or no .npz, or its arrays have wrong keys, shapes or dtypes.
    """
    if not Path(path).is_file():
        raise UserError(f"--config.data.path={path}: no such file")
    with _refuse_damage(path):
        members, others = _open_members(path)
    required = [f"{split}_{column}" for split in SPLITS[: 1 + own_test] for column in ("images", "labels")]
    missing = [key for key in required if key not in members and (labelled or key.endswith("_images"))]
    if missing:
        has = _contents(path) + _renamed(others)
        raise UserError(f"{path} lacks {', '.join(missing)}; it has {has} (--config.data.path)")
    splits = [split for split in SPLITS if f"{split}_images" in members]
    problems = [line for split in splits for line in _problems_of_split(members, split, max_pixels, labelled)]
    raise_all(problems + _problems_of_texts(members), f"{path} cannot be used:")
    streams = [members[f"{split}_images"] for split in splits]
    shapes = {(*stream.shape[1:], 1)[:3] for stream in streams}  # grey images need no axis for their one channel
    if len(shapes) > 1:
        raise UserError(f"{path}: all images must have one shape; found {join_limited(sorted(shapes))}")
    with _refuse_damage(path):
        columns = {key: rows.values() for key, rows in members.items() if not key.endswith("_images")}
    items = [item for split in splits for item in _items(columns, split, members[f"{split}_images"].shape[0])]
    top = max((item.label for item in items), default=0)
    if "class_names" not in columns and top >= CLASS_LIMIT:
        raise UserError(f"{path}: a label of {top} without class_names; name the classes or number them from 0")
    names = columns.get("class_names", range(top + 1))
    ((height, width, channels),) = shapes
    shape = height, width, channels

    def read(positions: Sequence[int]) -> Contents:
        pieces, offset = [np.zeros((0, *shape), np.uint8)], 0
        for stream in streams:
            rows = [position - offset for position in positions if 0 <= position - offset < stream.shape[0]]
            for _, run in itertools.groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):  # rows without gaps
                run = [row for _, row in run]
                pieces.append(stream.read(run[0], run[-1] + 1).reshape(-1, *shape))
            offset += stream.shape[0]
        return Contents(np.concatenate(pieces))

    others += [key for key in members if key != "class_names" and key.partition("_")[0] not in splits]
    return Source(path, tuple(map(as_name, names)), shape, items, read, not_used({"arrays": others}))


@contextlib.contextmanager
def _refuse_damage(path: str) -> Iterator[None]:
    """Turns what a damaged file raises into a `UserError`."""
    try:
        yield
    except ZIP_ERRORS as error:
        reason = stand_in(Path(path)) or shorten(str(error), 1000)
        raise UserError(f"--config.data.path={path} is not a readable .npz without pickles: {reason}") from error


def _open_members(path: str) -> tuple[dict[str, "Rows"], list[str]]:
    """The arrays that have a meaning here, of which only the headers are read, and the names of the others."""
    members: dict[str, Rows] = {}
    others = []
    with ZipFile(path) as file:
        for member in file.namelist():
            key = member.removesuffix(".npy")
            if key in members:
                raise ValueError(f"it holds {key} twice")
            if key in KEYS:
                members[key] = Rows(path, member, file)
            else:
                others.append(shorten(key))
    return members, others


def _contents(path: str) -> str:
    """Name, type and shape of the arrays, and the names of what is none."""
    contents = []
    with ZipFile(path) as file:
        for member in file.namelist()[:50]:
            contents.append(shorten(member.removesuffix(".npy")))
            with contextlib.suppress(*ZIP_ERRORS):
                rows = Rows(path, member, file)
                contents[-1] += f" {rows.kind} {list(rows.shape)}"
    return join_limited(contents, 50) or "nothing"


def _renamed(others: list[str]) -> str:
    """Which unknown arrays may be which known ones, by the names that Keras and others give them."""
    kinds = dict.fromkeys(("x", "data", "images"), "images") | dict.fromkeys(("y", "labels", "targets"), "labels")
    pairs = []
    for key in others:
        words = key.lower().split("_")
        split = next((split for split in SPLITS if split in words), "" if len(words) > 1 else "train")
        kind = next((kinds[word] for word in words if word in kinds), "")
        pairs += [f"{key} to {split}_{kind}"] if split and kind else []
    return f"; rename {join_limited(pairs)}, perhaps" if pairs else ""


def _problems_of_split(members: Mapping[str, "Rows"], split: str, max_pixels: int, labelled: bool) -> list[str]:
    """What is wrong with the arrays of one split."""
    images, labels = members[f"{split}_images"], members.get(f"{split}_labels")
    problems, shape, size = [], images.shape, os.path.getsize(images.path)
    count = shape[0] if shape else 0
    if images.dtype != np.uint8:
        problems.append(f"{split}_images must be uint8, are {images.kind}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        problems.append(f"{split}_images must be [N, H, W] or [N, H, W, 1 or 3], are {list(shape)}")
    elif not 1 <= shape[1] * shape[2] <= max_pixels:
        problems.append(
            f"{split}_images must have 1 to --config.data.max_pixels={max_pixels} pixels, are {list(shape)}"
        )
    if count > max(IMAGE_LIMIT, size):
        problems.append(f"{split}_images are {count}, more than the {size} bytes of the file can tell apart")
    if images.fortran:
        problems.append(f"{split}_images is stored in Fortran order; save np.ascontiguousarray({split}_images)")
    if labels is None:
        problems += [f"{split}_labels is missing"] if labelled else []
    elif labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        problems.append(f"{split}_labels must be {count} integers, are {labels.kind} {list(labels.shape)}")
    for key in (f"{split}_ids", f"{split}_owners"):
        if key in members and members[key].shape != (count,):
            problems.append(f"{key} must have {count} entries, has shape {list(members[key].shape)}")
    return problems


def _problems_of_texts(members: Mapping[str, "Rows"]) -> list[str]:
    """What is wrong with the arrays of ids, owners and class names."""
    problems = []
    if "class_names" in members:
        shape = members["class_names"].shape
        if len(shape) != 1:
            problems.append(f"class_names must be a list, has shape {list(shape)}")
        elif shape[0] > CLASS_LIMIT:
            problems.append(f"class_names are {shape[0]}; {CLASS_LIMIT} at most are legal")
    for key in sorted(TEXT_KEYS & members.keys()):
        dtype = members[key].dtype
        if dtype.hasobject:
            problems.append(f"{key} holds Python objects, which only a pickle can store; save np.array(.., str)")
        elif dtype.kind not in "USiu" or dtype.itemsize > 4 * LONGEST:
            problems.append(f"{key} must be whole numbers or text of {LONGEST} bytes at most, is {members[key].kind}")
    return problems


def _items(columns: Mapping[str, list], split: str, count: int) -> Iterator[Item]:
    labels = columns.get(f"{split}_labels", itertools.repeat(-1, count))
    ids = columns.get(f"{split}_ids", (f"{split}/{i}" for i in range(count)))
    owners = columns.get(f"{split}_owners", itertools.repeat("", count))
    for name, label, owner in zip(ids, labels, owners, strict=True):
        yield Item(as_name(name), split, label, sys.intern(as_name(owner)))


class Rows:
    """The rows of one array of an .npz. Reading on costs the rows alone; an earlier row starts the array again."""

    def __init__(self, path: str, member: str, file: ZipFile):
        """Reads the header. Raises one of `ZIP_ERRORS` where it is damaged or does not fit the size of the member."""
        self.path, self.member, info = path, member, file.getinfo(member)
        packed = min(info.compress_size, os.path.getsize(path))
        if info.file_size > packed * RATIO.get(info.compress_type, OTHER_RATIO):
            raise ValueError(f"{member} calls for {info.file_size} bytes, more than its {packed} bytes can hold")
        with file.open(member) as stream:
            self.shape, self.fortran, self.dtype = _read_header(stream)
            self.start, self.kind = stream.tell(), shorten(str(self.dtype))
        wanted = self.start + math.prod(self.shape) * self.dtype.itemsize
        if info.file_size != wanted and not self.dtype.hasobject:
            raise ValueError(f"{member} holds {info.file_size} bytes, its header calls for {wanted}")
        self.whole_reads = info.compress_type in RATIO
        self.stream: IO[bytes] | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [stop - start, *shape[1:]]; with the last one zipfile compares checksums. Raises `UserError`: damage."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            if self.stream is None:
                with ZipFile(self.path) as file:
                    self.stream = file.open(self.member)  # stays open without the zip file
                if _read_header(self.stream) != (self.shape, self.fortran, self.dtype):
                    raise ValueError("it has changed since it was opened")
            self.stream.seek(self.start + start * row_bytes)
            count = (stop - start) * row_bytes
            pieces = [count] if self.whole_reads else [PIECE] * (count // PIECE) + [count % PIECE]
            raw = b"".join([self.stream.read(size) for size in pieces])
            if stop == self.shape[0]:
                self.close()
            return np.frombuffer(raw, self.dtype).reshape(stop - start, *self.shape[1:])  # refuses too few bytes
        except ZIP_ERRORS as error:
            self.close()
            raise UserError(
                f"--config.data.path={self.path} is damaged: rows {start} to {stop} of {self.member}: {error}"
            ) from error

    def values(self) -> list:
        """The numbers, texts or bytes of a small array. Raises one of `ZIP_ERRORS`; nothing is unpickled."""
        with ZipFile(self.path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = np.lib.format.read_array(io.BytesIO(file.read(self.member)), allow_pickle=False)
        try:
            return array.reshape(-1).tolist()
        except SystemError as error:  # NumPy's, over strings made of numbers that are no characters
            raise ValueError(f"text with numbers that are no characters: {error}") from error

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = None


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype in the header of an .npy file; the stream stands behind it afterwards."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, of headers that it reads all the same
            shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # NumPy evaluates the header as Python source, which raises nearly every kind
        raise ValueError(f"its header is damaged: {type(error).__name__}: {error}") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a small .npz that the project has written; nothing is unpickled. Raises nearly every kind."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        return dict(file)
