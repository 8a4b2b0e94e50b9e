"""Tables, arrays and settings of any content: they load, or one message says why not; nothing is ever allocated for
what only a header promises."""

import csv
import io
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeraser_jax.config import Data
from lmeraser_jax.data import label_csv, npz
from lmeraser_jax.data.source import problems
from lmeraser_jax.errors import UserError

NAMES = ["train/a.png", "train/b.png", "train/x,y.png"]
FOLDERS = ["train"] * 3


# CSV
def read_csv(path, raw: bytes, columns: str = "file,label,owner") -> dict[str, label_csv.Row] | str:
    """The rows, or the message of a refusal."""
    path.write_bytes(raw)
    try:
        return label_csv.read(str(path), columns, NAMES, FOLDERS)
    except UserError as error:
        assert len(str(error)) < 50_000
        return str(error)


cells = st.sampled_from(
    ["file", "label", "owner", "a.png", "train/a.png", "x,y.png", '"', "\0", "", "é", "1" * 200_000]
)
marks = st.sampled_from([",", ";", "\t", "\n", "\r\n", "\r", '"', "\ufeff", "\u2028"])


@settings(max_examples=200)
@given(
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"file,label,owner\n", b'"file";"label"\r\n', b"\xff\xfe"]),
    body=st.lists(cells | marks | st.text(max_size=4), max_size=14).map("".join) | st.binary(max_size=40),
)
def test_any_csv(tmp_path, start, body):
    raw = start + (body if isinstance(body, bytes) else body.encode(errors="surrogatepass"))
    found = read_csv(tmp_path / "a.csv", raw)
    if isinstance(found, dict):
        assert set(found) <= set(NAMES)


@given(
    rows=st.dictionaries(st.sampled_from(NAMES), st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=1),
    mark=st.sampled_from([",", ";", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_what_a_csv_writer_wrote_is_read(tmp_path, rows, mark, end, bom):
    """Python's writer as the reference: every cell comes back, whatever has to be quoted."""
    rows = {
        name: [cell.replace("\r", "").encode(errors="ignore").decode() for cell in row] for name, row in rows.items()
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=mark, lineterminator=end)
    writer.writerows([["file", "label", "owner"], *([name, *row] for name, row in rows.items())])
    found = read_csv(tmp_path / "a.csv", (b"\xef\xbb\xbf" if bom else b"") + buffer.getvalue().encode())
    assert found == {name: label_csv.Row(name, *(cell.strip() for cell in row)) for name, row in rows.items()}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"file,label,label\na.png,x,y\n", "several columns named label"),
        (b'file,label\na.png,"x\nb.png,y\n', "unexpected end of data"),  # else b.png would silently be gone
        (b"file,label\na.png," + b"x" * 200_000, "field larger than field limit"),
        (b"file,label\n" + b"x" * 100_000 + b",1\n", "names files that are not there"),
        (b"\xff\xfef\0i\0", "not a readable CSV in UTF-8"),
        (b"", "lacks the columns file, label"),
    ],
)
def test_hostile_csv(tmp_path, raw, why):
    found = read_csv(tmp_path / "a.csv", raw)
    assert isinstance(found, str) and why in found and len(found) < 1000


# npz
def member(array: Any = None, descr: str = "|u1", shape: object = (), body: bytes = b"") -> bytes:
    """An .npy: of an array, or with a header that says anything."""
    buffer = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
        return buffer.getvalue()
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    raw = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + body


GOOD = {
    "train_images": member(np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2)),
    "train_labels": member(np.array([0, 1, 0, 1])),
}


def read_npz(path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> str:
    """Loads, checks and reads everything; the message of a refusal, or ""."""
    with zipfile.ZipFile(path, "w", how) as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    return load_npz(path)


def load_npz(path) -> str:
    try:
        source = npz.load(str(path), own_test=False)
        found = problems(source)
        source.read(0, len(source.items))
        return "; ".join(found)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 5000
        return str(error)


def with_members(**changes: bytes) -> dict[str, bytes]:
    return {f"{key}.npy": raw for key, raw in (GOOD | changes).items()}


def test_good(tmp_path):
    assert read_npz(tmp_path / "a.npz", with_members()) == ""


HUGE = 10**15
TEXT = np.array(["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train_images": member(shape=(HUGE, 2, 2), descr="'|u1'")}, f"{HUGE * 4 + 128}"),
        ({"train_labels": member(shape=(HUGE,), descr="'<i8'")}, f"{HUGE * 8 + 128}"),
        ({"train_labels": member(shape=(-1,), descr="'<i8'")}, "its shape is (-1,)"),
        ({"train_images": member(shape=(10**18, 0, 0), descr="'|u1'")}, "pixels, are [1000000000000000000, 0, 0]"),
        ({"train_images": member(shape=(4, 0, 2), descr="'|u1'")}, "pixels, are [4, 0, 2]"),
        ({"train_ids": member(np.array([{}, {}, {}, {}], object))}, "pickle"),
        ({"train_owners": member(np.array([b"a", None, 1, 2], object))}, "pickle"),
        ({"train_labels": member(np.array([0, 1, None, 1], object))}, "must be 4 integers, are object"),
        ({"train_ids": member(np.zeros(4, "datetime64[s]"))}, "must be whole numbers or text"),
        ({"train_ids": member(np.zeros(4, [("a", "u1"), ("b", "f4")]))}, "must be whole numbers or text"),
        ({"train_ids": member(np.zeros(4, "U5000"))}, "text of 1024 bytes at most"),
        ({"train_ids": member(np.array(["a", "b", "c", "c"]))}, "ids must be unique"),
        ({"train_ids": member(np.array([b"a", b"b", b"\xff", b"d"]))}, "not text in UTF-8"),
        ({"train_ids": member(np.array(["a", "", "c", "d"]))}, "ids must not be empty"),
        ({"train_ids": member(descr="'<U1'", shape=(4,), body=b"\xff\xff\xff\x7f" * 4)}, "not a readable .npz"),
        ({"train_ids": member(descr="'<U0'", shape=(4,))}, "ids must"),
        ({"train_labels": member(descr="[]", shape=(4,))}, "train_labels must be 4 integers"),
        ({"train_labels": member(descr="{}", shape=(4,))}, "train_labels must be 4 integers"),
        ({"train_labels": member(descr="()", shape=(4,))}, "not a readable .npz"),
        ({"train_labels": member(descr="-" * 9000 + "1", shape=(4,))}, "not a readable .npz"),
        ({"train_labels": member(descr="(" * 9000, shape=(4,))}, "not a readable .npz"),
        ({"train_labels": member(descr="'<i8'", shape=(4, 10**4000), body=bytes(32))}, "not a readable .npz"),
        ({"class_names": member(np.zeros(100_001, "S1"))}, "100000 at most"),
        ({"../../train_ids": b"x", "/etc/train_ids": b"x"}, ""),
    ],
)
def test_hostile_arrays(tmp_path, changes, why):
    tracemalloc.start()
    try:
        found = read_npz(tmp_path / "a.npz", with_members(**changes))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert why in found and bool(found) == bool(why), found
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_big_endian_and_odd_integers_are_read(tmp_path):
    for kind in (">i8", "<u2", "i1"):
        assert read_npz(tmp_path / "a.npz", with_members(train_labels=member(np.array([0, 1, 0, 1], kind)))) == ""


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_share_a_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name, raw in [*with_members().items(), ("train_labels", GOOD["train_labels"])]:
            file.writestr(name, raw)
    assert "it holds train_labels twice" in load_npz(tmp_path / "a.npz")


def test_sizes_that_lie(tmp_path):
    """Header and directory agree on 8 terabytes that the file does not hold: refused before anything is allocated."""
    count, raw = 10**12, member(shape=(10**12,), descr="'<i8'")
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train_images.npy", member(np.zeros((4, 2, 2), np.uint8)))
        with file.open("train_labels.npy", "w", force_zip64=True) as stream:
            stream.write(raw)
        file.getinfo("train_labels.npy").file_size = count * 8 + len(raw)
        file.getinfo("train_labels.npy").compress_size = count * 8 + len(raw)
    found = load_npz(path)
    assert f"calls for {count * 8 + len(raw)} bytes, more than its" in found


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs(tmp_path, how):
    """A small file that really unpacks to a lot: 20 million images, or labels for them."""
    many = 20_000_000
    raw = member(shape=(many, 1, 1), descr="'|u1'") + bytes(many)
    changes = {"train_images": raw, "train_labels": member(shape=(many,), descr="'|u1'") + bytes(many)}
    with zipfile.ZipFile(tmp_path / "a.npz", "w", how) as file:
        for name, content in with_members(**changes).items():
            file.writestr(name, content)
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    tracemalloc.start()
    try:
        found = load_npz(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < (80_000_000 if how == zipfile.ZIP_LZMA else 2_000_000)
    finally:
        tracemalloc.stop()
    assert "train_images are 20000000, more than the" in found or "bytes can hold" in found


def test_images_above_the_limit(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, raw in with_members(train_images=member(np.zeros((4, 50, 50), np.uint8))).items():
            file.writestr(name, raw)
    assert npz.load(str(tmp_path / "a.npz"), own_test=False, max_pixels=2500)
    with pytest.raises(UserError, match="1 to --config.data.max_pixels=2499 pixels"):
        npz.load(str(tmp_path / "a.npz"), own_test=False, max_pixels=2499)


headers = st.binary(max_size=12) | st.text(alphabet="{}[]()'\",:0123456789<>|uifUSOVM-Leandrsw ", max_size=30).map(
    str.encode
)


@settings(max_examples=200)
@given(
    key=st.sampled_from(["train_images", "train_labels", "train_ids", "class_names"]),
    place=st.integers(0, 160),
    patch=headers,
    how=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_any_member(tmp_path, key, place, patch, how):
    """Bytes of one .npy replaced, in its header or its values; the zip around it is whole."""
    base = {"train_ids": member(TEXT), "class_names": member(TEXT[:2])} | GOOD
    raw = bytearray(base[key])
    raw[place : place + len(patch)] = patch
    read_npz(tmp_path / "a.npz", with_members(**{key: bytes(raw)}), how)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"PK\x03\x04" + tail))
def test_any_file(tmp_path, raw):
    (tmp_path / "a.npz").write_bytes(raw)
    assert load_npz(tmp_path / "a.npz")


def test_max_pixels_reaches_npz(tmp_path):
    from lmeraser_jax.data import load

    read_npz(tmp_path / "a.npz", with_members())
    data = Data(source="npz", path=str(tmp_path / "a.npz"), test_share=0.5, max_pixels=3)
    with pytest.raises(UserError, match="max_pixels=3"):
        load.load(data)
