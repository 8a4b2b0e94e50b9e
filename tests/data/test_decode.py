"""Decoding: plain Pillow's pixels for any size and colour mode; what cannot be read is reported by position."""

import io

import numpy as np
import pytest
from PIL import Image

from lmeraser_jax.data import decode
from lmeraser_jax.errors import UserError


def picture(rng, height, width, mode="RGB") -> Image.Image:
    """Smooth noise, so that resampling shows and JPEG keeps it."""
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def reference(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Pillow resizes the whole image to just cover the target; the centre is cut by hand."""
    factor = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("target", [(16, 16), (10, 24), (24, 10)])
@pytest.mark.parametrize("size", [(5, 5), (8, 31), (16, 16), (40, 12), (47, 90), (10, 24)])
def test_as_plain_pillow(rng, size, target):
    image = picture(rng, *size)
    found = decode.decode([encoded(image)], *target, 3)
    assert found.images.shape == (1, *target, 3) and found.images.dtype == np.uint8
    assert found.unreadable == {} and found.converted == 0
    np.testing.assert_array_equal(found.images[0], reference(image, *target))
    grey = decode.decode([encoded(image.convert("L"))], *target, 1)
    np.testing.assert_array_equal(grey.images[0, ..., 0], reference(image.convert("L"), *target))


def test_shrinking_is_antialiased():
    """A fine chequerboard becomes even grey; point sampling would keep black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    found = decode.decode([encoded(Image.fromarray(np.stack([board] * 3, -1)))], 8, 8, 3).images
    assert abs(found.astype(int) - 128).max() < 16


def test_files_and_bytes_agree(tmp_path, rng):
    raw = [encoded(picture(rng, 20, 14)), encoded(picture(rng, 9, 33), "JPEG")]
    files = [tmp_path / "a.png", tmp_path / "b.png"]  # the content decides, not the suffix
    for file, content in zip(files, raw, strict=True):
        file.write_bytes(content)
    np.testing.assert_array_equal(decode.decode(files, 8, 8, 3).images, decode.decode(raw, 8, 8, 3).images)
    np.testing.assert_array_equal(decode.decode_all(files, 8, 8, 3), decode.decode(raw, 8, 8, 3).images)


def test_converted_modes_are_counted(rng):
    """Every mode but the wanted one counts, and a colour keeps its value."""
    flat = Image.new("RGB", (8, 8), (255, 0, 0))
    forms = {"RGB": "PNG", "L": "PNG", "P": "PNG", "RGBA": "PNG", "CMYK": "TIFF", "1": "PNG"}
    raw = {mode: encoded(flat.convert(mode), form) for mode, form in forms.items()}
    colour = decode.decode(list(raw.values()), 8, 8, 3)
    assert colour.converted == 5 and colour.unreadable == {}
    for mode, image in zip(forms, colour.images, strict=True):
        if mode not in ("L", "1"):
            assert (image == [255, 0, 0]).all(), mode
    assert decode.decode(list(raw.values()), 8, 8, 1).converted == 5
    assert [decode.decode([raw[mode]], 8, 8, 1).converted for mode in ("L", "RGB")] == [0, 1]
    assert decode.decode([raw["L"]] * 3 + [raw["RGB"]], 8, 8, 3).converted == 3


@pytest.fixture
def mixed(tmp_path, rng):
    """Good files with a torn JPEG, an empty file, a text file and a missing file among them: {position: broken}."""
    whole = encoded(picture(rng, 60, 60), "JPEG", quality=95)
    broken = {1: whole[: len(whole) // 2], 4: b"", 6: b"no image at all"}
    files = []
    for position in range(10):
        files.append(tmp_path / f"{position}.png")
        files[-1].write_bytes(broken.get(position) or (b"" if position in broken else encoded(picture(rng, 12, 9))))
    files[8].unlink()
    return files, {*broken, 8}


def test_unreadable_by_position(mixed):
    files, broken = mixed
    found = decode.decode(files, 8, 8, 3)
    assert set(found.unreadable) == broken and all(found.unreadable.values())
    assert "truncated" in found.unreadable[1] and "No such file" in found.unreadable[8]
    for position, image in enumerate(found.images):
        assert image.any() == (position not in broken)
    good = [file for position, file in enumerate(files) if position not in broken]
    np.testing.assert_array_equal(decode.decode(good, 8, 8, 3).images, found.images[sorted({*range(10)} - broken)])


def test_decoded_names_every_unreadable_file(mixed):
    files, broken = mixed
    with pytest.raises(UserError) as caught:
        decode.decode_all(files, 8, 8, 3)
    message = str(caught.value)
    assert "these image files cannot be read; mend or remove them:" in message
    assert {position for position, file in enumerate(files) if f"- {file}: " in message} == broken


def test_the_number_of_threads_does_not_matter(mixed, rng, monkeypatch):
    files = [*mixed[0], *[encoded(picture(rng, 30, 20, "L")) for _ in range(30)]]
    found = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(decode, "THREADS", threads)
        found.append(decode.decode(files, 8, 8, 3))
    for other in found[1:]:
        np.testing.assert_array_equal(other.images, found[0].images)
        assert (other.unreadable, other.converted) == (found[0].unreadable, found[0].converted)
    assert found[0].converted == 30 and len(found[0].unreadable) == 4


def test_nothing_to_decode():
    found = decode.decode([], 4, 6, 1)
    assert found.images.shape == (0, 4, 6, 1) and found.unreadable == {}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_damage_is_reported_not_raised(rng, form):
    """Flipped and torn bytes in every format: an image or a reason, never an exception."""
    whole, bad = encoded(picture(rng, 24, 24), form), []
    for trial in range(60):
        torn = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        for place in rng.integers(0, min(len(torn), 200 if trial % 2 else len(torn)), 3) if torn else ():
            torn[place] ^= int(rng.integers(1, 256))
        bad.append(bytes(torn))
    found = decode.decode(bad, 8, 8, 3)
    assert len(found.unreadable) > 5 and all(found.unreadable.values())


@pytest.mark.parametrize("side", range(1, 9))
def test_cameras_note_which_side_was_up(side):
    """EXIF orientation: all eight give the picture that a viewer shows."""
    upright = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[side]
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = side
    Image.fromarray(np.ascontiguousarray(turned)).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decode.decode([file.getvalue()], 6, 4, 3).images[0], upright)
