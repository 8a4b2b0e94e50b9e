"""Image files or their bytes -> uint8 pixels of one size, in parallel (Pillow releases the interpreter's lock)."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lmeraser_jax.config import Data
from lmeraser_jax.data.source import Pixels
from lmeraser_jax.errors import raise_all

THREADS = min(16, os.cpu_count() or 1)
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # whatever a file's name says; others run programs
MAX_PIXELS = Data().max_pixels


def decode(
    files: Sequence[Path | bytes], height: int, width: int, channels: int, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Decodes image files, or their bytes: resized (bilinear, antialiased) to just cover height x width, then cropped.

    Args:
        channels: 1 (grey) or 3 (RGB); images of other colour modes are converted and counted.
        max_pixels: pixels of an image at most (`data.max_pixels`), compared before anything is decoded.
    """
    images = np.zeros((len(files), height, width, channels), np.uint8)
    mode = "L" if channels == 1 else "RGB"

    def fill(position: int) -> tuple[str, bool]:
        """Decodes one image in its place: (why it cannot be read or "", whether the colour mode was converted)."""
        file = files[position]
        try:
            if isinstance(file, Path) and file.exists() and not file.is_file():
                return "not a regular file", False  # a pipe would be waited for
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
                _check_size(image.size, max_pixels)
                upright = ImageOps.exif_transpose(image)  # cameras note which side was up
                fitted = _fit(_to_eight_bit(upright).convert(mode), height, width, max_pixels)
                images[position] = np.asarray(fitted).reshape(height, width, channels)
                return "", image.mode != mode
        except UnidentifiedImageError:  # its own text names the file again, or an address in memory
            return f"not an image ({', '.join(FORMATS)}), or its first bytes are damaged", False
        except Exception as error:  # Pillow's decoders raise nearly every kind over damaged files
            return str(error) or type(error).__name__, False

    with _no_pillow_limit(), warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of metadata that is not used here
        results = list(pool.map(fill, range(len(files))))
    unreadable = {position: reason for position, (reason, _) in enumerate(results) if reason}
    return Pixels(images, unreadable, sum(converted for _, converted in results))


def decode_all(
    files: Sequence[Path], height: int, width: int, channels: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """As `decode`, the images alone. Raises `UserError` naming every file that cannot be read."""
    pixels = decode(files, height, width, channels, max_pixels)
    problems = [f"{files[position]}: {reason}" for position, reason in pixels.unreadable.items()]
    raise_all(problems, "these image files cannot be read; mend or remove them:")
    return pixels.images


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of an image file that `decode` has read, with the side up that its camera noted."""
    with _no_pillow_limit(), Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


@contextlib.contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Without Pillow's limit of pixels; `data.max_pixels` stands in its place."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_size(size: tuple[int, int], max_pixels: int, condition: str = "") -> None:
    """Raises ValueError for an image of no pixels or of too many."""
    width, height = size
    if min(size) < 1:
        raise ValueError("it has no pixels")
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels{condition}, more than --config.data.max_pixels={max_pixels}"
        )


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """The image in a mode that converts to grey or RGB without loss of range; transparency is dropped later."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _fit(image: Image.Image, height: int, width: int, max_pixels: int) -> Image.Image:
    """Resizes so that the image just covers height x width, and crops the centre."""
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        _check_size(size, max(max_pixels, MAX_PIXELS), f" once it covers {width} x {height}")  # a very long, thin one
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
