"""Resize, crop, flip and normalise against Pillow and against every crop that could have been made."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from lmeraser_jax.data.transforms import ImageSpec, augmented, centred

# height, width, channels, size, resize: shrunk and enlarged, wide and high, with and without a border to crop
SHAPES = [(20, 20, 1, 8, 8), (30, 21, 3, 8, 8), (21, 30, 3, 12, 14), (10, 13, 1, 16, 18), (9, 25, 3, 9, 9)]
SHAPES += [(32, 32, 3, 224, 256), (256, 341, 3, 224, 256)]  # the paper's


def spec_of(height, width, channels, size, resize, **more) -> ImageSpec:
    return ImageSpec(height, width, channels, size=size, resize=resize, out_channels=channels, **more)


def pixels_of(spec: ImageSpec, count: int, seed: int = 0) -> np.ndarray:
    """Random noise on a slope: every crop differs from every other and from its mirror image."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 128, spec.width)[None, None, :, None]
    noise = rng.integers(0, 128, (count, spec.height, spec.width, spec.channels))
    return (slope + noise).astype(np.uint8)


def pillow_resized(image: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Shorter side to `spec.resize` by Pillow's BILINEAR, in floating point."""
    h, w, c = image.shape
    size = round(w * spec.resize / min(h, w)), round(h * spec.resize / min(h, w))
    planes = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(c)]
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BILINEAR)) for plane in planes], axis=-1)


def middle(image: np.ndarray, size: int) -> np.ndarray:
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def levels(output: jax.Array, spec: ImageSpec) -> np.ndarray:
    """Undoes the normalisation: back to 0..255, float64."""
    return (np.asarray(output, np.float64) * spec.std + spec.mean) * 255


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centred_is_pillows_resize_and_centre_crop(shape):
    spec = spec_of(*shape)
    images = pixels_of(spec, 3)
    got = levels(centred(images, spec), spec)
    assert got.shape == (3, spec.size, spec.size, spec.channels)
    for image, mine in zip(images, got, strict=True):
        np.testing.assert_allclose(mine, middle(pillow_resized(image, spec), spec.size), atol=2e-3)  # of 255


def test_each_channel_has_its_own_normalisation():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    spec = spec_of(21, 30, 3, 12, 14, mean=mean, std=std, augment="paper")
    plain = dataclasses.replace(spec, mean=(0.0,), std=(1.0,))
    images, key = pixels_of(spec, 4), jax.random.key(2)
    for run in (lambda spec: centred(images, spec), lambda spec: augmented(images, spec, key)):
        got, scaled = np.asarray(run(spec)), np.asarray(run(plain))
        assert np.ptp(scaled) <= 1.0
        np.testing.assert_allclose(got, (scaled - np.float32(mean)) / np.float32(std), atol=1e-5)


def test_grey_fills_three_channels():
    grey = spec_of(10, 13, 1, 8, 9, augment="paper")
    colour = dataclasses.replace(grey, out_channels=3)
    images, key = pixels_of(grey, 5), jax.random.key(3)
    for run in (lambda spec: centred(images, spec), lambda spec: augmented(images, spec, key)):
        one, three = np.asarray(run(grey)), np.asarray(run(colour))
        assert one.shape == (5, 8, 8, 1) and three.shape == (5, 8, 8, 3)
        for channel in range(3):
            np.testing.assert_array_equal(three[..., channel], one[..., 0])


def test_an_image_that_is_not_augmented_has_the_same_bits_wherever_it_stands():
    spec = spec_of(21, 30, 3, 12, 14)
    images = pixels_of(spec, 9)
    order = np.random.default_rng(1).permutation(9)
    run = jax.jit(lambda x: centred(x, spec))
    np.testing.assert_array_equal(np.asarray(run(images[order])), np.asarray(run(images))[order])
    np.testing.assert_array_equal(augmented(images, spec, jax.random.key(1)), centred(images, spec))


def candidates(image: np.ndarray, spec: ImageSpec) -> dict[tuple[int, int, bool], np.ndarray]:
    """Every output that augmentation may give: (top, left, flipped) -> pixels."""
    full = pillow_resized(image, spec)
    size, reach = spec.size, spec.size // 8
    starts = []
    for axis in (0, 1):
        slack = full.shape[axis] - size
        if spec.augment == "flip":
            starts.append([slack // 2])
        elif slack:
            starts.append(range(slack + 1))
        else:
            full = np.pad(full, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
            starts.append(range(2 * reach + 1))
    crops = {}
    for top, left in itertools.product(*starts):
        crops[top, left, False] = full[top : top + size, left : left + size]
        if spec.augment in ("flip", "paper"):
            crops[top, left, True] = crops[top, left, False][:, ::-1]
    return crops


def choices(images: np.ndarray, spec: ImageSpec, key: jax.Array) -> tuple[list[tuple[int, int, bool]], set]:
    """Which candidate each augmented image is (it must be exactly one), and all candidates' names."""
    chosen, names = [], set()
    for image, got in zip(images, levels(augmented(images, spec, key), spec), strict=True):
        crops = candidates(image, spec)
        close = [name for name, pixels in crops.items() if np.abs(pixels - got).max() < 2e-3]
        assert len(close) == 1, f"{len(close)} of {len(crops)} possible crops match"
        chosen += close
        names |= crops.keys()
    return chosen, names


@pytest.mark.parametrize("augment", ["crop", "flip", "paper"])
@pytest.mark.parametrize("shape", [(10, 13, 1, 16, 18), (20, 17, 3, 16, 16)], ids=str)
def test_augmented_images_are_possible_crops_and_all_kinds_occur(shape, augment):
    spec = spec_of(*shape, augment=augment)
    images = pixels_of(spec, 96)
    chosen, names = choices(images, spec, jax.random.key(7))
    for axis in range(3):  # top, left, flipped: the whole range is used
        assert {name[axis] for name in chosen} == {name[axis] for name in names}
    if augment != "crop":
        assert 24 < sum(flipped for _, _, flipped in chosen) < 72  # 48 expected, 5 sigma
    if augment != "flip":
        assert len(set(chosen)) > len(names) / 4


def test_the_key_decides_and_neighbours_do_not():
    spec = spec_of(10, 13, 1, 16, 18, augment="paper")
    images, others, key = pixels_of(spec, 12), pixels_of(spec, 12, seed=1), jax.random.key(5)
    first = np.asarray(augmented(images, spec, key))
    np.testing.assert_array_equal(np.asarray(augmented(images, spec, key)), first)
    assert not np.array_equal(np.asarray(augmented(images, spec, jax.random.key(6))), first)
    assert choices(images, spec, key)[0] == choices(others, spec, key)[0]  # the crop is drawn, not looked for
    mixed = others.copy()
    mixed[4] = images[4]
    np.testing.assert_array_equal(np.asarray(augmented(mixed, spec, key))[4], first[4])
