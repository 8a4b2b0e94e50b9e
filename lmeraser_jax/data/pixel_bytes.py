"""Image files without their metadata: what a decoder needs for the pixels, and the EXIF block that may turn them."""

import re
import struct
from collections.abc import Iterator

PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"II*\0", b"MM\0*")
METADATA = re.compile(  # kinds of pieces: of PNG all that are optional but transparency, of WebP, of JPEG
    rb"(?!tRNS)[a-z].{3}|ICCP|EXIF|XMP |\xff[\xe1-\xed\xef\xfe]", re.DOTALL
)
JPEG_COLOUR = (b"\xff\xe0", b"\xff\xee")  # pieces that, where they are whole, say what the channels are
EXIF = re.compile(rb"(?:.{4}eXIf|EXIF.{4}|\xff\xe1.{2}Exif..).*?((?:II\*\0|MM\0\*).*)", re.DOTALL)  # a piece with it
TIFF_METADATA = frozenset((*range(269, 273), *range(280, 284), 285, *range(296, 317), 318, 319, 330))  # below 700


def pixels_only(raw: bytes) -> tuple[bytes, bytes]:
    """A PNG, JPEG, WebP or TIFF file without text, profiles, dates and the like, and its EXIF block; b"" for none.

    Other files, and TIFF files, whose orientation is a tag like any other, are returned without a block. What is
    broken stays broken: nothing that pixels are made of is left out or mended.
    """
    if raw[:4] in TIFF:
        return _bare_tiff(raw), b""
    webp = raw[:4] == b"RIFF" and raw[8:12] == b"WEBP"
    start = 12 if webp else next((len(first) for first in (PNG, JPEG) if raw.startswith(first)), len(raw))
    kept, exif = [], b""
    for kind, piece in _pieces(raw, start):
        if not METADATA.fullmatch(kind) and (kind not in JPEG_COLOUR or len(piece) >= 16):
            kept.append(piece)
        elif not exif and (match := EXIF.match(piece)):
            exif = match[1]
    body = b"".join(kept)
    return (raw[:4] + struct.pack("<I", len(body) + 4) + raw[8:12] if webp else raw[:start]) + body, exif


def _pieces(raw: bytes, start: int) -> Iterator[tuple[bytes, bytes]]:
    """(kind, bytes) of the pieces of which a file consists, one after the other; of a JPEG the scan is the last."""
    while start < len(raw):
        head = raw[start : start + 8].ljust(8, b"\0")
        if raw[:8] == PNG:
            size, kind = struct.unpack(">I4s", head)
            stop = start + 12 + size
        elif raw[:4] == b"RIFF":
            kind, size = struct.unpack("<4sI", head)
            stop = start + 8 + size + size % 2
        else:
            kind, size = struct.unpack(">2sH", head[:4])
            stop = start + 2 + size if b"\xff\xc0" <= kind < b"\xff\xff" and kind != b"\xff\xda" else len(raw)
        yield kind, raw[start:stop]
        start = stop


def _bare_tiff(raw: bytes) -> bytes:
    """A TIFF file whose first directory has the tags of pixels alone, and which has no other directory."""
    order = "<" if raw[:2] == b"II" else ">"
    (start,) = struct.unpack(f"{order}I", raw[4:8].ljust(4, b"\0"))
    (count,) = struct.unpack(f"{order}H", raw[start : start + 2].ljust(2, b"\0"))
    entries = [raw[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    tags = [struct.unpack(f"{order}H", entry[:2].ljust(2, b"\0"))[0] for entry in entries]
    entries = [entry for tag, entry in zip(tags, entries, strict=True) if tag < 700 and tag not in TIFF_METADATA]
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return raw[:start] + directory + raw[start + len(directory) :]
