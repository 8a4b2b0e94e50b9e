"""Image files or their bytes -> uint8 pixels of one size, in parallel (Pillow releases the interpreter's lock)."""

import io
import os
import struct
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lmeraser_jax.errors import raise_all
from lmeraser_jax.records.source import Pixels

THREADS = min(16, os.cpu_count() or 1)
DAMAGE = (  # what Pillow's decoders raise for damaged files
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def decode(files: Sequence[Path | bytes], height: int, width: int, channels: int) -> Pixels:
    """Decodes images; each is resized (bilinear, antialiased) to just cover height x width, then centre-cropped.

    Args:
        files: image files, or what is in them.
        height, width: wanted size in pixels.
        channels: 1 (grey) or 3 (RGB); images of other colour modes are converted and counted.

    Returns:
        Pixels of shape [len(files), height, width, channels]; those that cannot be read are named in it.
    """
    images = np.zeros((len(files), height, width, channels), np.uint8)
    mode = "L" if channels == 1 else "RGB"

    def one(position: int) -> tuple[str, bool]:
        """(what is wrong or "", whether the colour mode was converted)."""
        file = files[position]
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                upright = ImageOps.exif_transpose(image)  # cameras note which side was up
                fitted = _fit(_eight_bit(upright).convert(mode), height, width)
                images[position] = np.asarray(fitted).reshape(height, width, channels)
                return "", image.mode != mode
        except UnidentifiedImageError:  # its own text names the file again, or an address in memory
            return "not an image, or its first bytes are damaged", False
        except DAMAGE as error:
            return str(error) or type(error).__name__, False

    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of metadata that nobody reads here
        found = list(pool.map(one, range(len(files))))
    unreadable = {position: wrong for position, (wrong, _) in enumerate(found) if wrong}
    return Pixels(images, unreadable, sum(converted for _, converted in found))


def decoded(files: Sequence[Path], height: int, width: int, channels: int) -> np.ndarray:
    """As `decode`, the images alone. Raises `UserError` naming every file that cannot be read."""
    pixels = decode(files, height, width, channels)
    problems = [f"{files[position]}: {wrong}" for position, wrong in pixels.unreadable.items()]
    raise_all(problems, "these image files cannot be read; mend or remove them:")
    return pixels.images


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of an image file that `decode` could read."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.height, upright.width


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in a mode that converts to grey or RGB without loss of range; transparency is dropped later."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes so that the image just covers height x width, and crops the centre."""
    scale = max(height / image.height, width / image.width)
    if (image.height, image.width) != (height, width):
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
