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
MOST_PIXELS = Data().max_pixels


def decode(files: Sequence[Path | bytes], height: int, width: int, channels: int, most: int = MOST_PIXELS) -> Pixels:
    """Decodes images; each is resized (bilinear, antialiased) to just cover height x width, then centre-cropped.

    Args:
        files: image files, or what is in them.
        height, width: wanted size in pixels.
        channels: 1 (grey) or 3 (RGB); images of other colour modes are converted and counted.
        most: pixels of an image at most (`data.max_pixels`), compared before anything is decoded.

    Returns:
        Pixels of shape [len(files), height, width, channels]; those that cannot be read are named in it.
    """
    images = np.zeros((len(files), height, width, channels), np.uint8)
    mode = "L" if channels == 1 else "RGB"

    def one(position: int) -> tuple[str, bool]:
        """(what is wrong or "", whether the colour mode was converted)."""
        file = files[position]
        try:
            if isinstance(file, Path) and file.exists() and not file.is_file():
                return "not a regular file", False  # a pipe would be waited for
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
                _refuse_large(image.size, most)
                upright = ImageOps.exif_transpose(image)  # cameras note which side was up
                fitted = _fit(_eight_bit(upright).convert(mode), height, width, most)
                images[position] = np.asarray(fitted).reshape(height, width, channels)
                return "", image.mode != mode
        except UnidentifiedImageError:  # its own text names the file again, or an address in memory
            return f"not an image ({', '.join(FORMATS)}), or its first bytes are damaged", False
        except Exception as error:  # Pillow's decoders raise nearly every kind over damaged files
            return str(error) or type(error).__name__, False

    with _own_limit(), warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of metadata that nobody reads here
        found = list(pool.map(one, range(len(files))))
    unreadable = {position: wrong for position, (wrong, _) in enumerate(found) if wrong}
    return Pixels(images, unreadable, sum(converted for _, converted in found))


def decoded(files: Sequence[Path], height: int, width: int, channels: int, most: int = MOST_PIXELS) -> np.ndarray:
    """As `decode`, the images alone. Raises `UserError` naming every file that cannot be read."""
    pixels = decode(files, height, width, channels, most)
    problems = [f"{files[position]}: {wrong}" for position, wrong in pixels.unreadable.items()]
    raise_all(problems, "these image files cannot be read; mend or remove them:")
    return pixels.images


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of an image file that `decode` has read, with the side up that its camera noted."""
    with _own_limit(), Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height) if lies else (height, width)


@contextlib.contextmanager
def _own_limit() -> Iterator[None]:
    """Without Pillow's limit of pixels, which is another one than `data.max_pixels`."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _refuse_large(size: tuple[int, int], most: int, when: str = "") -> None:
    """Raises ValueError for an image of no pixels or of too many."""
    width, height = size
    if min(size) < 1:
        raise ValueError("it has no pixels")
    if width * height > most:
        raise ValueError(f"it has {width} x {height} pixels{when}, more than --config.data.max_pixels={most}")


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in a mode that converts to grey or RGB without loss of range; transparency is dropped later."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _fit(image: Image.Image, height: int, width: int, most: int) -> Image.Image:
    """Resizes so that the image just covers height x width, and crops the centre."""
    scale = max(height / image.height, width / image.width)
    if (image.height, image.width) != (height, width):
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        _refuse_large(size, max(most, MOST_PIXELS), f" once it covers {width} x {height}")  # a very long, thin one
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
