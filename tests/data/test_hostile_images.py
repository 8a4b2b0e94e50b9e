"""Image files that were made to do harm: named as unreadable, in little time and memory, and nothing else happens."""

import contextlib
import io
import os
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from helpers import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmeraser_jax import config
from lmeraser_jax.data import decode, load
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import import_source
from lmeraser_jax.unlearning.run import prepare_run


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def why(raw: bytes, height: int = 8, width: int = 8, max_pixels: int = decode.MAX_PIXELS) -> str:
    """What is said of one file; "" where it can be read. No warning escapes (pytest turns them into errors)."""
    return decode.decode([raw], height, width, 3, max_pixels).unreadable.get(0, "")


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, with hardly any data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SAMPLE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8))


# sizes
@pytest.mark.parametrize("side", [7_072, 9_500, 20_000, 200_000])  # below and above Pillow's two limits
def test_bombs_are_refused_by_their_header(side):
    tracemalloc.start()
    try:
        message = why(png(side, side))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert message == f"it has {side} x {side} pixels, more than --config.data.max_pixels=50000000"


def test_the_limit_is_exact():
    for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"):
        raw = encoded(SAMPLE, form)
        assert why(raw, max_pixels=120) == "" and "10 x 12 pixels, more than --config.data.max_pixels=119" in why(
            raw, max_pixels=119
        )


def test_the_limit_is_ours_not_that_of_pillow(monkeypatch):
    """A higher limit is honoured, and Pillow's own is as before afterwards, also after an error."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert why(encoded(SAMPLE)) == "" and why(b"torn") and Image.MAX_IMAGE_PIXELS == 10


def test_long_thin_images_do_not_grow_without_bound():
    """Few pixels in the file, but 8 rows of 40 million once the image covers 8 x 8."""
    tracemalloc.start()
    try:
        for size in ((5_000_000, 1), (1, 5_000_000)):
            message = why(encoded(Image.new("L", size)), 64, 64)
            assert "once it covers 64 x 64, more than --config.data.max_pixels=" in message
        assert why(encoded(Image.new("L", (5_000, 1)))) == ""
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("raw", [png(0, 0), png(0, 5), b"P6 0 0 255\n", b"P6 5 0 255\n", b"P6 99999999999999 1 255\n"])
def test_without_pixels(raw):
    assert why(raw)


# kinds
def test_only_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10, 20)]
    for form in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        raw = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        found = decode.decode([raw], 8, 8, 3)
        assert found.unreadable == {} and (found.images[0] == [200, 0, 0]).all(), form


def test_modes():
    """Palette and CMYK are converted, 16 bits are refused with the remedy, none of them raises."""
    assert why(encoded(SAMPLE.convert("P"))) == "" == why(encoded(SAMPLE.convert("CMYK"), "JPEG"))
    assert why(encoded(SAMPLE.convert("RGBA"))) == "" == why(encoded(SAMPLE.convert("LA")))
    deep = Image.fromarray(np.arange(96, dtype=np.uint16).reshape(12, 8))
    assert "save it with 8 bits per channel" in why(encoded(deep)) and "8 bits" in why(encoded(deep, "TIFF"))


def test_huge_exif():
    for tag, value in ((0x010E, "x" * 60_000), (0x0112, 77), (0x0112, "side"), (0x0112, (1, 2))):
        exif = Image.Exif()
        exif[tag] = value
        with contextlib.suppress(Exception):  # what cannot be written is no test
            raw = encoded(SAMPLE, "JPEG", exif=exif)
            assert isinstance(why(raw), str)
    raw = encoded(SAMPLE, "JPEG")
    for body in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(60_000)):
        assert why(raw[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + raw[2:]) == ""


@pytest.mark.parametrize(
    "raw",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n",
        encoded(SAMPLE, "ICO"),
        encoded(SAMPLE, "TGA"),
        encoded(SAMPLE, "PDF"),
    ],
)
def test_other_kinds_are_not_even_opened(raw):
    """PostScript would start a program; a name that ends in .png does not make a picture."""
    assert "not an image (PNG, JPEG," in why(raw)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    found = decode.decode(sorted(tmp_path.iterdir()), 8, 8, 3)
    assert found.unreadable == dict.fromkeys(range(3), "not a regular file")


@settings(max_examples=150)
@given(
    form=st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]),
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=6)), max_size=6),
    end=st.integers(0, 800),
)
def test_any_bytes(form, edits, end):
    raw = bytearray(WHOLE[form][: end or None])
    for place, patch in edits:
        raw[place : place + len(patch)] = patch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(why(bytes(raw), max_pixels=10_000), str)


WHOLE = {form: encoded(SAMPLE, form) for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")}


# through the commands' own paths
def folder_config(root, **data) -> config.Config:
    group = {**SMALL, "data": {"source": "folder", "path": str(root), "image_size": 8, **data}}
    return config.from_dict({**group, "clustering": {**SMALL["clustering"], "sample_size": 8}})


def test_max_pixels_through_a_workdir(tmp_path, rng):
    """Refused by name with both flags, left out with one, read with the other; never part of what binds a workdir."""
    for i in range(24):
        split = ("train", "train", "public")[i % 3]
        path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 40 if i == 0 else 8
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    low = folder_config(tmp_path / "images", max_pixels=1000)
    with pytest.raises(UserError, match="skip_unreadable") as caught, prepare_run(tmp_path / "w", low):
        pass
    assert "- train/a/0.png: it has 40 x 40 pixels, more than --config.data.max_pixels=1000" in str(caught.value)
    lenient = folder_config(tmp_path / "images", max_pixels=1000, skip_unreadable=True)
    with prepare_run(tmp_path / "w", lenient) as (run, imported):
        assert imported is not None and imported.unreadable == ("train/a/0.png",)
        run.catalog.publish("c", "p", "i", {}, [])
    high = folder_config(tmp_path / "images", max_pixels=1600)
    with prepare_run(tmp_path / "w", high, reimport=True) as (run, imported):
        assert imported is not None and imported.added == 1
        source = load.load(high.data)
        assert import_source(run.layout, run.catalog, source, high).added == 0
    with (
        pytest.raises(UserError, match="data.test_share"),
        prepare_run(tmp_path / "w", folder_config(tmp_path / "images", test_share=0.5)),
    ):
        pass


def test_max_pixels_is_checked():
    for value in (0, -1):
        with pytest.raises(UserError, match=f"--config.data.max_pixels={value}: must be at least 1"):
            config.from_dict({"data": {"max_pixels": value}})
