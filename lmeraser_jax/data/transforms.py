"""From stored uint8 pixels to the backbone's input, on the device: resize, crop, flip, normalise.

Resizing is two small matrix products with a fixed triangle filter (antialiased bilinear, as Pillow's
BILINEAR), so a crop is a choice of rows of the matrices and a flip reverses one of them.

Shapes: B batch, h w c stored image, S side of the backbone's input, C its channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How stored images, uint8 [height, width, channels], become input."""

    height: int
    width: int
    channels: int
    size: int  # side S of the input, pixels
    resize: int  # length of the shorter side after resizing, at least `size`
    out_channels: int  # C; a grey image is repeated to fill 3 channels
    mean: tuple[float, ...] = (0.5,)  # of pixels scaled to [0, 1]; one number, or one for each of the C channels
    std: tuple[float, ...] = (0.5,)
    augment: str = "none"  # none | crop | flip | paper, used by `augmented` only


@functools.lru_cache(maxsize=64)
def resize_matrix(old: int, new: int) -> np.ndarray:
    """Weights [new, old] float32 of a bilinear resize, antialiased when it shrinks (rows sum to 1)."""
    scale = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new
    distance = np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None]) / scale
    weights = np.clip(1.0 - distance, 0.0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _matrices(spec: ImageSpec) -> tuple[np.ndarray, np.ndarray]:
    """Resize matrices of both axes; the shorter side becomes `spec.resize`."""
    scale = spec.resize / min(spec.height, spec.width)
    rows, columns = (max(spec.resize, round(side * scale)) for side in (spec.height, spec.width))
    return resize_matrix(spec.height, rows), resize_matrix(spec.width, columns)


def centred(images: jax.Array, spec: ImageSpec) -> jax.Array:
    """Resize, centre crop and normalise: uint8 [B, h, w, c] -> float32 [B, S, S, C]."""
    rows, columns = _matrices(spec)
    top, left = (len(rows) - spec.size) // 2, (len(columns) - spec.size) // 2
    rows, columns = rows[top : top + spec.size], columns[left : left + spec.size]
    x = jnp.einsum("yh,bhwc->bywc", rows, images.astype(jnp.float32), precision="highest")
    x = jnp.einsum("xw,bywc->byxc", columns, x, precision="highest")
    return _normalise(x, spec)


def augmented(images: jax.Array, spec: ImageSpec, key: jax.Array) -> jax.Array:
    """As `centred`, with a random crop and flip for each image where `spec.augment` asks for them.

    Crop offsets are uniform over the resized image; when the resize leaves nothing to crop, the image is
    shifted by up to an eighth of its side instead, with edge pixels repeated.
    """
    if spec.augment == "none":
        return centred(images, spec)
    rows, columns = (jnp.asarray(matrix) for matrix in _matrices(spec))
    key_top, key_left, key_flip = jax.random.split(key, 3)
    wy = _windows(rows, spec, key_top, len(images))  # [B, S, h]
    wx = _windows(columns, spec, key_left, len(images))  # [B, S, w]
    if spec.augment in ("flip", "paper"):
        flip = jax.random.bernoulli(key_flip, 0.5, (len(images), 1, 1))
        wx = jnp.where(flip, wx[:, ::-1], wx)
    x = jnp.einsum("byh,bhwc->bywc", wy, images.astype(jnp.float32), precision="highest")
    x = jnp.einsum("bxw,bywc->byxc", wx, x, precision="highest")
    return _normalise(x, spec)


def _windows(matrix: jax.Array, spec: ImageSpec, key: jax.Array, count: int) -> jax.Array:
    """For each image the `spec.size` rows of the resize matrix that its crop keeps: [B, S, old]."""
    slack = matrix.shape[0] - spec.size
    if spec.augment == "flip":
        start = jnp.full((count,), slack // 2)
    elif slack:
        start = jax.random.randint(key, (count,), 0, slack + 1)
    else:
        start = jax.random.randint(key, (count,), -(spec.size // 8), spec.size // 8 + 1)
    index = jnp.clip(start[:, None] + jnp.arange(spec.size)[None], 0, matrix.shape[0] - 1)  # [B, S]
    return matrix[index]


def _normalise(x: jax.Array, spec: ImageSpec) -> jax.Array:
    x = jnp.repeat(x, spec.out_channels, axis=-1) if spec.channels < spec.out_channels else x
    mean, std = (np.asarray(values, np.float32).reshape(1, 1, 1, -1) for values in (spec.mean, spec.std))
    return (x / 255.0 - mean) / std
