"""A user's own .npz: any array that fits becomes records; what does not fit is named, nothing is unpickled, and nothing
is allocated for what only a header promises."""

import io
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest

from lmeraser_jax.config import Data
from lmeraser_jax.data import load, npz
from lmeraser_jax.data.source import Item, problems
from lmeraser_jax.errors import UserError

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def arrays(rng, shape=(5, 6, 3), count=6, **changes) -> dict:
    """The arrays of a good file; a change of None leaves one out."""
    columns = {
        "train_images": rng.integers(0, 256, (count, *shape), np.uint8),
        "train_labels": np.arange(count) % 3,
        "test_images": rng.integers(0, 256, (3, *shape), np.uint8),
        "test_labels": np.array([2, 1, 0], np.uint8),
        "class_names": np.array(["cat", "dog", "eel"]),
    }
    return {key: value for key, value in (columns | changes).items() if value is not None}


@pytest.fixture
def saved(tmp_path, rng):
    """Writes an .npz with some arrays changed and gives its path."""

    def save(**changes) -> str:
        np.savez(tmp_path / "data.npz", **arrays(rng, **changes))
        return str(tmp_path / "data.npz")

    return save


def pack(path, compression: int, columns: dict) -> None:
    """Writes an .npz with a compression of the zip format."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for key, array in columns.items():
            with file.open(f"{key}.npy", "w") as stream:
                np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        npz.load(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


# what loads
def test_the_arrays_become_items_and_pixels(tmp_path, rng):
    columns = arrays(rng)
    np.savez(tmp_path / "a.npz", **columns)
    source = load.load(Data(source="npz", path=str(tmp_path / "a.npz")))
    assert problems(source) == [] and source.shape == (5, 6, 3) and source.class_names == ("cat", "dog", "eel")
    assert source.items[:2] == [Item("train/0", "train", 0), Item("train/1", "train", 1)]
    assert source.items[6:] == [Item("test/0", "test", 2), Item("test/1", "test", 1), Item("test/2", "test", 0)]
    pixels = np.concatenate([columns["train_images"], columns["test_images"]])
    np.testing.assert_array_equal(source.read(range(9)).rows, pixels)
    np.testing.assert_array_equal(source.read(range(7, 8)).rows, pixels[7:8])


def test_ids_owners_public_images_and_names_are_optional(saved, rng):
    source = npz.load(
        saved(
            train_ids=np.array([f"ü{i}".encode() for i in range(6)]),
            test_ids=np.array([70, 71, 72]),
            train_owners=np.array(["ann", "ann", "bob", "", "", "bob"]),
            public_images=rng.integers(0, 256, (2, 5, 6, 3), np.uint8),
            public_labels=np.array([1, 1]),
            class_names=None,
        )
    )
    assert source.items[1] == Item("ü1", "train", 1, "ann") and source.items[6].id == "70"
    assert [item.split for item in source.items] == ["train"] * 6 + ["test"] * 3 + ["public"] * 2
    assert source.items[-1] == Item("public/1", "public", 1) and problems(source) == []
    assert source.class_names == ("0", "1", "2")


def test_grey_images_may_have_an_axis_for_their_channel(saved, rng):
    source = npz.load(saved(shape=(5, 6), test_images=rng.integers(0, 256, (3, 5, 6, 1), np.uint8)))
    assert source.shape == (5, 6, 1) and source.read(range(9)).rows.shape == (9, 5, 6, 1)


def test_labels_are_integers_of_any_kind_below_the_number_of_names(saved):
    for kind in (">i8", "<u2", "i1"):
        assert problems(npz.load(saved(train_labels=np.array([0, 1, 2, 0, 1, 2], kind)))) == []
    lines = problems(npz.load(saved(train_labels=np.array([0, 1, 2, 3, -1, 2]))))
    assert lines == ["labels must lie in 0..2 (the class names): train/3=3, train/4=-1"]


def test_missing_arrays_are_named_and_test_images_may_be_left_out_for_a_share(saved):
    message = refusal(saved(train_labels=None, test_images=None))
    assert (
        "lacks train_labels, test_images" in message
        and "train_images uint8 [6, 5, 6, 3], test_labels uint8 [3], class_names <U3 [3] (--" in message
    )
    path = saved(test_images=None, test_labels=None)
    assert "lacks test_images, test_labels" in refusal(path)
    source = load.load(Data(source="npz", path=path, test_share=0.5))
    assert len(source.items) == 6 and {item.split for item in source.items} == {"train"} and source.notes == ()


def test_arrays_that_are_not_used_are_named(saved, rng):
    images, labels = rng.integers(0, 256, (3, 5, 6, 3), np.uint8), np.arange(3)
    extra = {"val_images": images, "val_labels": labels, "public_labels": labels, "notes": np.array("x")}
    assert npz.load(saved(**extra)).notes == ("not used: arrays: val_images, val_labels, notes, public_labels",)
    message = refusal(saved(train_images=None, train_labels=None, x_train=images, y_train=labels))
    assert "lacks train_images, train_labels; it has test_images uint8 [3, 5, 6, 3], " in message
    assert "x_train uint8 [3, 5, 6, 3], y_train int64 [3]; rename" in message
    assert "; rename x_train to train_images, y_train to train_labels, perhaps" in message
    column = npz.load(saved(train_labels=np.arange(6)[:, None] % 3))  # as MedMNIST has them
    assert [item.label for item in column.items[:6]] == [0, 1, 2, 0, 1, 2]


# images as a stream
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_images_are_read_in_any_order_and_any_piece(tmp_path, rng, compression):
    """Also backwards, with gaps, and over the border between two splits."""
    columns = arrays(rng, count=400, test_labels=np.zeros(1, int))
    columns["test_images"] = columns["test_images"].astype(np.uint8, order="F")[:1]  # one image: both orders at once
    pack(tmp_path / "a.npz", compression, columns)
    images = np.concatenate([columns["train_images"], columns["test_images"]])
    source = npz.load(str(tmp_path / "a.npz"))
    borders = [(0, 401), (400, 401), (7, 9), (9, 300), (350, 401), (3, 3), (0, 1)]
    for start, stop in [*borders, *np.sort(rng.integers(0, 402, (20, 2))).tolist()]:
        pixels = source.read(range(start, stop))
        np.testing.assert_array_equal(pixels.rows, images[start:stop])
        assert pixels.rows.shape[1:] == (5, 6, 3) and pixels.rows.dtype == np.uint8 and pixels.unreadable == {}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_images_are_never_in_memory_together(tmp_path, rng, compression):
    stripes = rng.integers(0, 256, (500, 1, 128, 3), np.uint8)
    images = np.repeat(stripes, 128, axis=1)  # 24 MB
    columns = {"train_images": images, "train_labels": np.arange(500) % 2}
    pack(tmp_path / "a.npz", compression, columns | {"test_images": images[:2], "test_labels": np.zeros(2, int)})
    tracemalloc.start()
    try:
        source = npz.load(str(tmp_path / "a.npz"))
        for start in range(0, 500, 10):
            assert (source.read(range(start, start + 10)).rows == stripes[start : start + 10]).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 15e6, "LZMA alone keeps a window of megabytes"


def test_reading_on_does_not_start_again(tmp_path, rng, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", **arrays(rng))
    source, opened, original = npz.load(str(tmp_path / "a.npz")), [], zipfile.ZipFile.open

    def noted(self, name, *args):
        opened.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    for start in range(0, 8, 2):
        source.read(range(start, start + 2))
    assert opened == ["train_images.npy", "test_images.npy"]
    source.read(range(2, 4))
    assert opened[2:] == ["train_images.npy"]


# damage
@pytest.mark.parametrize("compression", COMPRESSIONS[:2])  # the others hide where a row lies
def test_damage_behind_the_first_images_is_named_when_it_is_read(tmp_path, rng, compression):
    columns = arrays(rng, count=400)
    pack(tmp_path / "a.npz", compression, columns)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[raw.index(columns["train_images"][399].tobytes()) + 5] ^= 1  # noise is not packed, so its bytes are in the file
    (tmp_path / "a.npz").write_bytes(raw)
    source = npz.load(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(source.read(range(200)).rows, columns["train_images"][:200])
    with pytest.raises(UserError, match=r"a\.npz is damaged: rows 200 to 400 of train_images\.npy: Bad CRC-32"):
        source.read(range(200, 400))
    np.testing.assert_array_equal(source.read(range(400, 403)).rows, columns["test_images"])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bytes_damaged_anywhere_give_a_message_or_the_same_images(tmp_path, rng, compression):
    path, columns, refused = tmp_path / "a.npz", arrays(rng), 0
    pack(path, compression, columns)
    whole, images = path.read_bytes(), np.concatenate([columns["train_images"], columns["test_images"]])
    for trial in range(60):
        torn = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        for place in rng.integers(0, len(torn), 4) if torn else ():
            torn[place] ^= 255
        path.write_bytes(torn)
        try:
            source = npz.load(str(path))
            pieces = [source.read(range(i, i + 3)).rows for i in (0, 3, 6)]
            np.testing.assert_array_equal(np.concatenate(pieces), images)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50


def test_a_file_that_changes_while_it_is_open_is_refused(saved):
    source = npz.load(saved())
    saved(shape=(4, 6, 3))
    with pytest.raises(UserError, match="it has changed since it was opened"):
        source.read(range(3))


def test_what_is_no_npz_is_refused(tmp_path, rng):
    assert "no such file" in refusal(tmp_path / "absent.npz") and "no such file" in refusal(tmp_path)
    for raw in (b"", rng.bytes(200), b"PK\x03\x04" + rng.bytes(60), b"\x80\x04K\x01.", member(np.zeros(3))):
        (tmp_path / "bad.npz").write_bytes(raw)
        assert "is not a readable .npz" in refusal(tmp_path / "bad.npz")


# wrong arrays
def test_pickles_are_refused_and_not_run(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    message = refusal(saved(class_names=np.array([Bomb(), Bomb(), Bomb()], object)))
    assert "pickle" in message and not (tmp_path / "boom").exists()


def test_wrong_shapes_and_types_are_all_named(saved):
    for changes, messages in (
        ({"train_images": np.zeros((6, 5, 6, 4), np.uint8)}, ["train_images must be [N, H, W] or [N, H, W, 1 or 3]"]),
        ({"train_images": np.zeros((6, 90), np.uint8)}, ["train_images must be [N, H, W]", "are [6, 90]"]),
        ({"train_images": np.zeros((3, 6, 5, 6), np.uint8).T}, ["Fortran order; save np.ascontiguousarray(train_"]),
        ({"train_images": np.full((6, 5, 6, 3), None)}, ["train_images must be uint8, are object"]),
        ({"train_images": np.uint8(3)}, ["train_images must be [N, H, W]", "are []"]),
        ({"test_images": np.zeros((3, 5, 5, 3), np.uint8)}, ["must have one shape", "(5, 6, 3)", "(5, 5, 3)"]),
        ({"train_labels": np.zeros(5, int)}, ["train_labels must be 6 integers, are int64 [5]"]),
        ({"train_labels": np.zeros((6, 1))}, ["train_labels must be 6 integers, are float64 [6, 1]"]),
        ({"train_ids": np.arange(5)}, ["train_ids must have 6 entries, has shape [5]"]),
        ({"train_owners": np.array("ann")}, ["train_owners must have 6 entries, has shape []"]),
        ({"public_images": np.zeros((1, 5, 6, 3), np.uint8)}, ["public_labels is missing"]),
        ({"class_names": np.array("cat")}, ["class_names must be a list, has shape []"]),
        ({"train_images": np.zeros((6, 5, 6, 2)), "test_labels": np.zeros(9)}, ["uint8", "1 or 3]", "be 3 integers"]),
    ):
        message = refusal(saved(**changes))
        assert all(words in message for words in messages), message


# files made to do harm
def member(array: Any = None, descr: str = "'|u1'", shape: object = (), body: bytes = b"") -> bytes:
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
HUGE = 10**15


def message_of(path, compression: int = zipfile.ZIP_STORED, max_pixels: int = 10**6, **changes: bytes) -> str:
    """Writes (if any array is given), loads, checks and reads a file; a refusal's message, or "", in little memory."""
    if changes:
        with zipfile.ZipFile(path, "w", compression) as file:
            for key, raw in (GOOD | changes).items():
                file.writestr(f"{key}.npy", raw)
    tracemalloc.start()
    try:
        source = npz.load(str(path), own_test=False, max_pixels=max_pixels)
        lines = problems(source)
        source.read(range(len(source.items)))
        return "; ".join(lines)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 5000
        return str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000


def test_hostile_arrays_are_refused_in_few_words_and_little_memory(tmp_path):
    path = tmp_path / "a.npz"
    assert message_of(path, **{"../../train_ids": b"x", "/etc/train_ids": b"x"}) == ""
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    for key, raw, reason in (
        ("train_images", member(shape=(HUGE, 2, 2)), f"its header calls for {HUGE * 4 + 128}"),
        ("train_labels", member(shape=(HUGE,), descr="'<i8'"), f"its header calls for {HUGE * 8 + 128}"),
        ("train_images", member(shape=(3, 2, 2), body=bytes(16)), "its header calls for 140"),
        ("train_labels", member(shape=(-1,), descr="'<i8'"), "its shape is (-1,)"),
        ("train_images", member(shape=(10**18, 0, 0)), "pixels, are [1000000000000000000, 0, 0]"),
        ("train_ids", member(np.array([{}, {}, {}, {}], object)), "pickle"),
        ("train_ids", member(np.zeros(4, [("a", "u1"), ("b", "f4")])), "must be whole numbers or text"),
        ("train_ids", member(np.zeros(4, "U5000")), "text of 1024 bytes at most"),
        ("train_ids", member(np.array([b"a", b"b", b"\xff", b"d"])), "not text in UTF-8"),
        ("train_ids", member(descr="'<U1'", shape=(4,), body=b"\xff\xff\xff\x7f" * 4), "not a readable .npz"),
        ("train_ids", member(descr="'<U0'", shape=(4,)), "ids must"),
        ("train_labels", member(descr="[]", shape=(4,)), "train_labels must be 4 integers"),
        ("train_labels", member(descr="()", shape=(4,)), "not a readable .npz"),
        ("train_labels", member(descr="-" * 9000 + "1", shape=(4,)), "not a readable .npz"),
        ("train_labels", member(descr="(" * 9000, shape=(4,)), "not a readable .npz"),
        ("train_labels", member(descr="'<i8'", shape=(4, 10**4000), body=bytes(32)), "not a readable .npz"),
        ("class_names", member(np.zeros(100_001, "S1")), "100000 at most"),
    ):
        message = message_of(path, **{key: raw})
        assert reason in message and message, (key, raw[:200], message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_share_a_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name in ("train_images.npy", "train_labels.npy", "train_labels"):
            file.writestr(name, GOOD[name.removesuffix(".npy")])
    assert "it holds train_labels twice" in message_of(tmp_path / "a.npz")


def test_sizes_that_lie_are_refused_before_anything_is_allocated(tmp_path):
    """Header and directory agree on 8 terabytes that the file does not hold."""
    path, count, raw = tmp_path / "a.npz", 10**12, member(shape=(10**12,), descr="'<i8'")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train_images.npy", GOOD["train_images"])
        with file.open("train_labels.npy", "w", force_zip64=True) as stream:
            stream.write(raw)
        file.getinfo("train_labels.npy").file_size = count * 8 + len(raw)
        file.getinfo("train_labels.npy").compress_size = count * 8 + len(raw)
    assert f"calls for {count * 8 + len(raw)} bytes, more than its" in message_of(path)


def test_a_small_file_that_unpacks_to_a_lot_is_refused(tmp_path):
    many = 20_000_000
    bomb = member(shape=(many, 1, 1)) + bytes(many)
    labels = member(shape=(many,)) + bytes(many)
    message = message_of(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, train_images=bomb, train_labels=labels)
    assert "train_images are 20000000, more than the" in message


def test_the_limit_of_pixels_is_that_of_the_settings(tmp_path):
    images = member(np.zeros((4, 50, 50), np.uint8))
    assert message_of(tmp_path / "a.npz", max_pixels=2500, train_images=images) == ""
    message = message_of(tmp_path / "a.npz", max_pixels=2499, train_images=images)
    assert "1 to --config.data.max_pixels=2499 pixels" in message
    with pytest.raises(UserError, match="max_pixels=3"):
        load.load(Data(source="npz", path=str(tmp_path / "a.npz"), test_share=0.5, max_pixels=3))


def test_arrays_of_the_project_are_read_or_refused(tmp_path, rng):
    columns = arrays(rng)
    np.savez(tmp_path / "a.npz", **columns)
    for key, array in npz.read_arrays(tmp_path / "a.npz").items():
        np.testing.assert_array_equal(array, columns[key])
    whole = (tmp_path / "a.npz").read_bytes()
    for raw in (b"", whole[:-9], whole[:40] + b"xxxx" + whole[44:], b"\x93NUMPY"):
        (tmp_path / "a.npz").write_bytes(raw)
        with pytest.raises((ValueError, OSError, EOFError, zipfile.BadZipFile)):
            npz.read_arrays(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        npz.read_arrays(tmp_path / "absent.npz")
