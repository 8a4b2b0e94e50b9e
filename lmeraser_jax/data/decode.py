"""Image files or their bytes -> uint8 pixels of one size, in parallel (Pillow releases the interpreter's lock)."""

import contextlib
import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lmeraser_jax.config import Data
from lmeraser_jax.data.source import Contents
from lmeraser_jax.errors import stand_in

THREADS = min(16, os.cpu_count() or 1)
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # whatever a file's name says; others run programs
MAX_PIXELS = Data().max_pixels
PNG = b"\x89PNG\r\n\x1a\n"  # what such a file begins with
_users: list[contextlib.ExitStack | None] = []  # what to restore, and a None for each thread that decodes
_users_lock = threading.Lock()
TURNS = dict(zip(range(2, 9), (Image.Transpose(method) for method in (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF


def decode(
    files: Sequence[Path | bytes], height: int, width: int, channels: int, max_pixels: int = MAX_PIXELS
) -> Contents:
    """Decodes image files, or their bytes: resized (bilinear, antialiased) to just cover height x width, then cropped.

    Args:
        channels: 1 (grey) or 3 (RGB); images of other colour modes are converted and counted.
        max_pixels: pixels of an image at most (`data.max_pixels`), compared before anything is decoded.
    """
    images = np.zeros((len(files), height, width, channels), np.uint8)
    mode = "L" if channels == 1 else "RGB"

    def fill(position: int) -> tuple[str, bool]:
        """Decodes one image in its place: (why it cannot be read or "", whether the colour mode was converted)."""
        try:
            image = _upright(files[position], max_pixels)
            fitted = _fit(image.convert(mode), height, width, max_pixels)  # without transparency
            images[position] = np.asarray(fitted).reshape(height, width, channels)
            return "", image.mode != mode
        except UnidentifiedImageError:  # its own text names the file again, or an address in memory
            reason = stand_in(files[position]) or "or its first bytes are damaged"
            return f"not an image ({', '.join(FORMATS)}), {reason}", False
        except Exception as error:  # Pillow's decoders raise nearly every kind over damaged files
            return str(error) or type(error).__name__, False

    def fill_share(thread: int) -> dict[int, tuple[str, bool]]:  # a task an image would cost more than a small image
        return {position: fill(position) for position in range(thread, len(files), THREADS)}

    with _quiet(), ThreadPoolExecutor(THREADS) as pool:
        results = {
            position: result for share in pool.map(fill_share, range(THREADS)) for position, result in share.items()
        }
    unreadable = {position: reason for position, (reason, _) in sorted(results.items()) if reason}
    return Contents(images, unreadable, sum(converted for _, converted in results.values()))


def upright_size(file: Path | bytes) -> tuple[int, int]:
    """Height and width in pixels of an image file, or its bytes, that `decode` has read.

    The side is up that the camera noted.
    """
    with _quiet():
        image = _upright(file, sys.maxsize)
    return image.height, image.width


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's limit of pixels, in whose place `data.max_pixels` stands, and its warnings of metadata.

    Both are settings of the process: the first thread that decodes saves them, the last one restores them.
    """
    with _users_lock:
        if not _users:
            saved = contextlib.ExitStack()
            saved.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            saved.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = None
            _users.append(saved)
        _users.append(None)
    try:
        yield
    finally:
        with _users_lock:
            _users.pop()
            if len(_users) == 1:
                saved = _users.pop()
                assert saved is not None
                saved.close()


def _upright(file: Path | bytes, max_pixels: int) -> Image.Image:
    """The first picture of a file, with the side up that its camera noted. Raises nearly every kind.

    Metadata are no reason to refuse an image: a PNG that Pillow cannot open or load is tried again without them.
    """
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise ValueError("not a regular file")  # a pipe would be waited for
    try:
        return _load(file, max_pixels)
    except Exception:
        raw = file if isinstance(file, bytes) else file.read_bytes()
        if not raw.startswith(PNG):
            raise
        return _load(_bare_png(raw), max_pixels)


def _load(file: Path | bytes, max_pixels: int) -> Image.Image:
    """Opens and decodes with Pillow, and turns the image as its EXIF block says."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
        _check_size(image.size, max_pixels)
        image.load()
        if image.mode.startswith(("I", "F")):  # a conversion would lose range
            raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
        turn = None
        with contextlib.suppress(Exception):  # a block that cannot be read; Pillow raises nearly every kind
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return image.copy() if turn is None else image.transpose(turn)


def _bare_png(raw: bytes) -> bytes:
    """A PNG without its optional chunks but for EXIF, whose checksum is mended."""
    chunks, start = [PNG], len(PNG)
    while start < len(raw):
        size, kind = struct.unpack(">I4s", raw[start : start + 8].ljust(8, b"\0"))
        chunk = raw[start : start + 12 + size]
        if kind == b"eXIf":
            chunk = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind == b"eXIf" or not kind[:1].islower():
            chunks.append(chunk)
        start += 12 + size
    return b"".join(chunks)


def _check_size(size: tuple[int, int], max_pixels: int, condition: str = "") -> None:
    """Raises ValueError for an image of no pixels or of too many."""
    width, height = size
    if min(size) < 1:
        raise ValueError("it has no pixels")
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels{condition}, more than --config.data.max_pixels={max_pixels}"
        )


def _fit(image: Image.Image, height: int, width: int, max_pixels: int) -> Image.Image:
    """Resizes so that the image just covers height x width, and crops the centre."""
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        _check_size(size, max(max_pixels, MAX_PIXELS), f" once it covers {width} x {height}")  # a very long, thin one
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
