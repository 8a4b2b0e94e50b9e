"""Decoding: plain Pillow's pixels for any size and colour mode; what cannot be read is named by position, in little
time and memory, and nothing else happens."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lmeraser_jax.data import decode

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


def picture(rng, height, width, mode="RGB") -> Image.Image:
    """Smooth noise, so that resampling shows and JPEG keeps it."""
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


SAMPLE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8))
FILES = {form: encoded(SAMPLE, form) for form in FORMATS}


def reason(raw: bytes, height: int = 8, width: int = 8, max_pixels: int = decode.MAX_PIXELS) -> str:
    """Why a file cannot be read, "" where it can. No warning escapes (pytest turns them into errors)."""
    return decode.decode([raw], height, width, 3, max_pixels).unreadable.get(0, "")


def reference(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Pillow resizes the whole image to just cover the target; the centre is cut by hand."""
    factor = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


# pixels
@pytest.mark.parametrize("target", [(16, 16), (10, 24), (24, 10)])
def test_pixels_are_those_of_plain_pillow(rng, target):
    for size in [(5, 5), (8, 31), (16, 16), (40, 12), (47, 90), (10, 24)]:
        image = picture(rng, *size)
        pixels = decode.decode([encoded(image)], *target, 3)
        assert pixels.rows.shape == (1, *target, 3) and pixels.rows.dtype == np.uint8
        assert pixels.unreadable == {} and pixels.converted == 0
        np.testing.assert_array_equal(pixels.rows[0], reference(image, *target))
        grey = decode.decode([encoded(image.convert("L"))], *target, 1)
        np.testing.assert_array_equal(grey.rows[0, ..., 0], reference(image.convert("L"), *target))


def test_files_and_bytes_agree_whatever_the_suffix(tmp_path, rng):
    raw = [encoded(picture(rng, 20, 14)), encoded(picture(rng, 9, 33), "JPEG")]
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, content in zip(files, raw, strict=True):
        file.write_bytes(content)
    np.testing.assert_array_equal(decode.decode(files, 8, 8, 3).rows, decode.decode(raw, 8, 8, 3).rows)
    assert decode.decode([], 4, 6, 1).rows.shape == (0, 4, 6, 1)


def test_every_colour_mode_gives_the_same_picture_and_is_counted():
    eye = np.where(np.eye(8, dtype=bool), 255, 0).astype(np.uint8)
    image = Image.fromarray(np.stack([eye] * 3, -1))
    forms = {"RGB": "PNG", "L": "PNG", "1": "PNG", "P": "PNG", "LA": "PNG", "RGBA": "PNG", "CMYK": "TIFF"}
    raw = [encoded(image.convert(mode), form) for mode, form in forms.items()]
    for channels in (1, 3):
        pixels = decode.decode(raw, 8, 8, channels)
        np.testing.assert_array_equal(pixels.rows, np.stack([np.stack([eye] * channels, -1)] * len(raw)))
        assert pixels.converted == 6 and pixels.unreadable == {}
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    colours = decode.decode([encoded(red.convert(mode), forms[mode]) for mode in ("P", "RGBA", "CMYK")], 8, 8, 3)
    assert (colours.rows == [255, 0, 0]).all()
    palette = SAMPLE.convert("P")
    clear = encoded(palette, transparency=bytes(range(256)))
    np.testing.assert_array_equal(*decode.decode([encoded(palette), clear], 8, 8, 3).rows)


def test_deep_pixels_are_refused_with_the_remedy():
    """16-bit and float pixels would be clipped to white or black in silence."""
    deep = Image.fromarray(np.arange(96, dtype=np.uint16).reshape(12, 8))
    real = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    for raw in (encoded(deep), encoded(deep, "TIFF"), encoded(real, "TIFF")):
        assert "save it with 8 bits per channel" in reason(raw)


def test_cameras_note_which_side_was_up():
    """EXIF orientation: all eight give the picture that Pillow's `exif_transpose` and viewers show."""
    for side in range(1, 9):
        block = Image.Exif()
        block[0x0112] = side
        raw = encoded(SAMPLE, exif=block)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
        pixels = decode.decode([raw], upright.height, upright.width, 3).rows[0]
        np.testing.assert_array_equal(pixels, np.asarray(upright), err_msg=str(side))
        assert (upright.size == SAMPLE.size) == (side < 5)


def test_only_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10, 20)]
    for form in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        raw = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        pixels = decode.decode([raw], 8, 8, 3)
        assert pixels.unreadable == {} and (pixels.rows[0] == [200, 0, 0]).all(), form


# what cannot be read
def test_unreadable_images_are_reported_by_position_and_harm_no_other(tmp_path, rng):
    """Good files with a torn JPEG, an empty file, a text file and a missing file among them."""
    whole = encoded(picture(rng, 60, 60), "JPEG", quality=95)
    broken = {1: whole[: len(whole) // 2], 4: b"", 6: b"no image at all"}
    files = [tmp_path / f"{position}.png" for position in range(10)]
    for position, file in enumerate(files):
        file.write_bytes(broken.get(position, encoded(picture(rng, 12, 9))))
    files[8].unlink()
    pixels = decode.decode(files, 8, 8, 3)
    assert set(pixels.unreadable) == {*broken, 8} and all(pixels.unreadable.values())
    assert "truncated" in pixels.unreadable[1] and "No such file" in pixels.unreadable[8]
    good = [position for position in range(10) if position not in pixels.unreadable]
    np.testing.assert_array_equal(decode.decode([files[i] for i in good], 8, 8, 3).rows, pixels.rows[good])
    assert pixels.rows[good].any((1, 2, 3)).all() and not pixels.rows[sorted(pixels.unreadable)].any()


@settings(max_examples=150)
@given(
    form=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=6)), max_size=6),
    end=st.integers(0, 800),
)
def test_any_bytes_are_an_image_or_have_a_reason(form, edits, end):
    raw = bytearray(FILES[form][: end or None])
    for place, patch in edits:
        raw[place : place + len(patch)] = patch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(reason(bytes(raw), max_pixels=10_000), str)


def test_other_kinds_of_files_are_not_even_opened(tmp_path):
    """PostScript would start a program, a pipe would be waited for; a suffix makes no picture."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n"
    for raw in (postscript, *(encoded(SAMPLE, form) for form in ("ICO", "TGA", "PDF"))):
        assert "not an image (PNG, JPEG," in reason(raw)
    assert "git lfs pull" in reason(b"version https://git-lfs.github.com/spec/v1\n")
    assert "HTML" in reason(b"<html><body>404") and "is empty" in reason(b"")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    pixels = decode.decode(sorted(tmp_path.iterdir()), 8, 8, 3)
    assert pixels.unreadable == dict.fromkeys(range(3), "not a regular file")


# metadata: no reason to refuse pixels
def chunk(kind: bytes, body: bytes, crc: int = 0) -> bytes:
    """A piece of a PNG; `crc` spoils its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ crc)


def exif(tag: int = 0x11A, kind: int = 5, count: int = 1, value: int = 38, data: bytes = b"") -> bytes:
    """An EXIF block that turns the image by a quarter (6) and has another tag, by default a resolution."""
    head = struct.pack("<4sIH", b"II*\0", 8, 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    return head + struct.pack("<HHII", tag, kind, count, value) + bytes(4) + data


BIG = bytes(3_000_000)
TURNED = [exif(), exif(data=bytes(8)), exif(data=struct.pack("<II", 5, 0)), exif(kind=1), exif(kind=2)]
TURNED += [exif(tag, kind, value=30) for tag in (0x128, 0x8769, 0x8825, 0x9003, 0xA005) for kind in (1, 2, 3, 5, 7, 16)]
BROKEN = [b"", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(60_000), b"XXXXXXXX", exif()[:13]]


def odd_files() -> dict[str, list[bytes]]:
    """{what is odd: files with the sample's pixels}; those named "turned" have it turned by a quarter."""

    def png(*chunks: bytes, late: bool = False) -> bytes:
        start = -12 if late else 33  # behind the pixels or before them
        return FILES["PNG"][:start] + b"".join(chunks) + FILES["PNG"][start:]

    def jpeg(marker: int, body: bytes) -> bytes:
        return FILES["JPEG"][:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + FILES["JPEG"][2:]

    texts = [b"k\0" + BIG, b"k\0\0" + zlib.compress(BIG), b"k\0\0torn", b"k\0\x07method", b"k", b""]
    texts += [b"k\0\1\0\0\0" + zlib.compress(BIG), b"k\0\0\0\xff\0\xff\0\xff"]
    kinds = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
    small = (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tIME", b"acTL", b"fcTL", b"prVt")
    profile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n zz\nzz\n"))
    bodies = [(0xE2, b"ICC_PROFILE\0\1\5x"), (0xE2, b"MPF\0II*\0"), (0xED, b"Photoshop 3.0\x008BIM")]
    bodies += [(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff"), (0xFE, BIG[:65_000])]
    webp = {"lossless": True, "icc_profile": b"x", "xmp": b"<torn"}
    return {
        "text": [png(chunk(k, text), late=late) for k in kinds for text in texts for late in (False, True)],
        "much text": [png(*[chunk(b"tEXt", b"k\0" + BIG[:500_000])] * 150)],
        "checksum": [png(chunk(kind, b"k\0v", crc=1)) for kind in (*kinds, b"prVt", b"eXIf")],
        "short": [png(chunk(kind, b"\xff" * size)) for kind in small for size in (0, 1, 3)],
        "exif": [png(chunk(b"eXIf", block)) for block in BROKEN] + [png(profile)],
        "turned": [png(chunk(b"eXIf", block)) for block in TURNED],
        "turned, text": [png(chunk(b"eXIf", exif(), crc), chunk(b"tEXt", BIG)) for crc in (0, 1)],
        "webp": [encoded(SAMPLE, "WEBP", exif=b"Exif\0\0" + block, **webp) for block in BROKEN],
        "webp turned": [encoded(SAMPLE, "WEBP", exif=b"Exif\0\0" + block, **webp) for block in TURNED],
        "jpeg": [jpeg(marker, body) for marker, body in bodies],
        "jpeg exif": [jpeg(0xE1, b"Exif\0\0" + block) for block in BROKEN],
        "jpeg turned": [jpeg(0xE1, b"Exif\0\0" + block) for block in TURNED],
    }


def test_metadata_change_no_pixel_and_refuse_none(tmp_path):
    """Against the same picture without them; the orientation counts where it can be read, whatever stands beside it."""
    for name, files in odd_files().items():
        upright = Image.open(io.BytesIO(FILES["JPEG" if name.startswith("jpeg") else "PNG"])).convert("RGB")
        if "turned" in name:
            upright = upright.transpose(Image.Transpose.ROTATE_270)
        pixels = decode.decode(files, upright.height, upright.width, 3)
        assert pixels.unreadable == {}, name
        for position, image in enumerate(pixels.rows):
            np.testing.assert_array_equal(image, np.asarray(upright), err_msg=f"{name} {position}")
        (tmp_path / "odd").write_bytes(files[-1])
        assert decode.upright_size(tmp_path / "odd") == (upright.height, upright.width)
        assert all("max_pixels=9" in reason(raw, max_pixels=9) for raw in files)


def test_pixels_that_end_too_early_are_refused_whatever_metadata_stand_before_them():
    whole = {name: files[0] for name, files in odd_files().items()} | FILES
    for name, raw in whole.items():
        for left_out in (len(raw) // 8, len(raw) // 2) if len(raw) < 10_000 else (150, 300):
            assert reason(raw[:-left_out]), name


# sizes
def png(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, with hardly any data."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header():
    for side in (7_072, 9_500, 20_000, 200_000):  # below and above Pillow's two limits
        tracemalloc.start()
        try:
            message = reason(png(side, side))
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
        assert message == f"it has {side} x {side} pixels, more than --config.data.max_pixels=50000000"
    for raw in (png(0, 0), png(0, 5), b"P6 0 0 255\n", b"P6 5 0 255\n", b"P6 99999999999999 1 255\n"):
        assert reason(raw)


def test_the_limit_of_pixels_is_exact_and_not_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for raw in FILES.values():
        assert reason(raw, max_pixels=120) == ""
        assert "10 x 12 pixels, more than --config.data.max_pixels=119" in reason(raw, max_pixels=119)
    assert reason(b"torn") and Image.MAX_IMAGE_PIXELS == 10


def test_long_thin_images_do_not_grow_without_bound():
    """Few pixels in the file, but 8 rows of 40 million once the image covers 8 x 8."""
    for size in ((5_000_000, 1), (1, 5_000_000)):
        message = reason(encoded(Image.new("L", size)), 64, 64)
        assert "once it covers 64 x 64, more than --config.data.max_pixels=" in message
    assert reason(encoded(Image.new("L", (5_000, 1)))) == ""
