"""A user's own .npz: any array that fits becomes records; what does not fit is named, and nothing is unpickled."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from lmeraser_jax.config import Data
from lmeraser_jax.data import load, npz
from lmeraser_jax.data.source import Item, problems
from lmeraser_jax.errors import UserError


def arrays(rng, shape=(5, 6, 3), **changes) -> dict:
    found = {
        "train_images": rng.integers(0, 256, (6, *shape), np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": rng.integers(0, 256, (3, *shape), np.uint8),
        "test_labels": np.array([2, 1, 0], np.uint8),
        "class_names": np.array(["cat", "dog", "eel"]),
    }
    found.update(changes)
    return {key: value for key, value in found.items() if value is not None}


@pytest.fixture
def saved(tmp_path, rng):
    """Writes an npz with some arrays changed (None: left out) and gives its path."""

    def save(**changes) -> str:
        np.savez(tmp_path / "data.npz", **arrays(rng, **changes))
        return str(tmp_path / "data.npz")

    return save


def pack(path, how: int, given: dict) -> None:
    """Writes an npz with a compression of the zip format's own."""
    with zipfile.ZipFile(path, "w", how) as file:
        for key, array in given.items():
            with file.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        npz.load(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


# what loads
def test_complete(tmp_path, rng):
    given = arrays(rng)
    np.savez(tmp_path / "a.npz", **given)
    source = load.load(Data(source="npz", path=str(tmp_path / "a.npz")))
    assert problems(source) == [] and source.shape == (5, 6, 3) and source.class_names == ("cat", "dog", "eel")
    assert source.items[:2] == [Item("train/0", "train", 0), Item("train/1", "train", 1)]
    assert source.items[6:] == [Item("test/0", "test", 2), Item("test/1", "test", 1), Item("test/2", "test", 0)]
    np.testing.assert_array_equal(
        source.read(0, 9).images, np.concatenate([given["train_images"], given["test_images"]])
    )
    np.testing.assert_array_equal(source.read(7, 8).images, given["test_images"][1:2])


def test_optional_keys(saved, rng):
    path = saved(
        train_ids=np.array([f"p{i}" for i in range(6)]),
        test_ids=np.array([70, 71, 72]),
        train_owners=np.array(["ann", "ann", "bob", "", "", "bob"]),
        public_images=rng.integers(0, 256, (2, 5, 6, 3), np.uint8),
        public_labels=np.array([1, 1]),
    )
    source = npz.load(path)
    assert source.items[1] == Item("p1", "train", 1, "ann") and source.items[6].id == "70"
    assert [item.split for item in source.items] == ["train"] * 6 + ["test"] * 3 + ["public"] * 2
    assert source.items[-1] == Item("public/1", "public", 1) and problems(source) == []


def test_byte_names(saved):
    ids = np.array([f"ü{i}".encode() for i in range(6)])
    source = npz.load(saved(class_names=np.array([b"cat", b"dog", b"eel"]), train_ids=ids))
    assert source.class_names == ("cat", "dog", "eel") and source.items[5].id == "ü5"


def test_grey(saved, rng):
    grey = npz.load(saved(shape=(5, 6)))
    assert grey.shape == (5, 6, 1) and grey.read(0, 9).images.shape == (9, 5, 6, 1)
    mixed = npz.load(saved(shape=(5, 6), test_images=rng.integers(0, 256, (3, 5, 6, 1), np.uint8)))
    assert mixed.shape == (5, 6, 1)


def test_without_class_names(saved):
    assert npz.load(saved(class_names=None)).class_names == ("0", "1", "2")


def test_label_beyond_names(saved):
    found = problems(npz.load(saved(train_labels=np.array([0, 1, 2, 3, -1, 2]))))
    assert found == ["labels must lie in 0..2 (the class names): train/3=3, train/4=-1"]


def test_own_test_images_may_be_left_out_for_a_share(saved):
    path = saved(test_images=None, test_labels=None)
    assert "lacks test_images, test_labels" in refusal(path)
    source = load.load(Data(source="npz", path=path, test_share=0.5))
    assert len(source.items) == 6 and {item.split for item in source.items} == {"train"}


# images as a stream
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_any_order_and_any_piece(tmp_path, rng, how):
    """Also backwards, with gaps, and over the border between two splits."""
    given = arrays(rng, train_images=rng.integers(0, 256, (400, 5, 6, 3), np.uint8), train_labels=np.arange(400) % 3)
    given["test_images"] = given["test_images"].astype(np.uint8, order="F")[:1]  # one image: both orders at once
    given["test_labels"] = given["test_labels"][:1]
    pack(tmp_path / "a.npz", how, given)
    images = np.concatenate([given["train_images"], given["test_images"]])
    source = npz.load(str(tmp_path / "a.npz"))
    for start, stop in [
        (0, 401),
        (400, 401),
        (7, 9),
        (9, 300),
        (350, 401),
        (3, 3),
        (0, 1),
        *rng.integers(0, 402, (20, 2)),
    ]:
        start, stop = sorted((int(start), int(stop)))
        found = source.read(start, stop)
        np.testing.assert_array_equal(found.images, images[start:stop])
        assert found.images.shape[1:] == (5, 6, 3) and found.images.dtype == np.uint8 and found.unreadable == {}


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_images_are_never_in_memory_together(tmp_path, rng, how):
    """24 MB of striped images that pack well: LZMA unpacks whatever a piece of the file holds at once."""
    stripes = rng.integers(0, 256, (500, 1, 128, 3), np.uint8)
    given = {"train_images": np.repeat(stripes, 128, axis=1), "train_labels": np.arange(500) % 2}
    given |= {"test_images": given["train_images"][:2], "test_labels": np.zeros(2, int)}
    pack(tmp_path / "a.npz", how, given)
    tracemalloc.start()
    try:
        source = npz.load(str(tmp_path / "a.npz"))
        for start in range(0, 500, 10):
            found = source.read(start, start + 10).images
            assert (found == stripes[start : start + 10]).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 15e6


def test_reading_on_does_not_start_again(tmp_path, rng, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays(rng))
    source, opened, whole = npz.load(str(path)), [], zipfile.ZipFile.open

    def noted(self, name, *args):
        opened.append(name)
        return whole(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    for start in range(0, 8, 2):
        source.read(start, start + 2)
    assert opened == ["train_images.npy", "test_images.npy"]
    source.read(2, 4)
    assert opened[2:] == ["train_images.npy"]


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])  # noise is not packed: a bit may flip
def test_damage_behind_the_first_images(tmp_path, rng, how):
    """The header and the first rows are fine; where the file is broken is said when it is read."""
    given = arrays(rng, train_images=rng.integers(0, 256, (400, 5, 6, 3), np.uint8), train_labels=np.arange(400) % 3)
    pack(tmp_path / "a.npz", how, given)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[raw.index(given["train_images"][399].tobytes()) + 5] ^= 1
    (tmp_path / "a.npz").write_bytes(raw)
    source = npz.load(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(source.read(0, 200).images, given["train_images"][:200])
    with pytest.raises(UserError, match=r"a\.npz is damaged: rows 200 to 400 of train_images\.npy: Bad CRC-32"):
        source.read(200, 400)
    np.testing.assert_array_equal(source.read(400, 403).images, given["test_images"])


@pytest.mark.parametrize("rows", [5, 7, 10**12])
def test_header_that_does_not_fit(tmp_path, rng, rows):
    """More or fewer images than there are bytes for: said at once, and nothing of that size is ever allocated."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for key, array in arrays(rng).items():
            with file.open(f"{key}.npy", "w") as member:
                if key == "train_images":
                    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 5, 6, 3)}
                    np.lib.format.write_array_header_1_0(member, header)  # pyright: ignore[reportArgumentType]
                    member.write(array.tobytes())
                else:
                    np.lib.format.write_array(member, array)
    message = refusal(tmp_path / "a.npz")
    assert "is not a readable .npz" in message and f"its header calls for {128 + rows * 90}" in message


def test_changed_while_open(saved, rng):
    path = saved()
    source = npz.load(path)
    saved(shape=(4, 6, 3))
    with pytest.raises(UserError, match="it has changed since it was opened"):
        source.read(0, 3)


# what does not
def test_missing(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.npz")
    assert "no such file" in refusal(tmp_path)  # a folder


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 torn", b"\x80\x04K\x01.", b"\x93NUMPY"])
def test_not_an_npz(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    assert "is not a readable .npz" in refusal(path)


def test_is_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert "is not a readable .npz" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_anywhere(tmp_path, rng, how):
    """Torn and flipped bytes give a message or the same images, never a traceback."""
    path = tmp_path / "a.npz"
    given = arrays(rng)
    pack(path, how, given)
    whole, refused = path.read_bytes(), 0
    images = np.concatenate([given["train_images"], given["test_images"]])
    for trial in range(60):
        torn = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        for place in rng.integers(0, len(torn), 4) if torn else ():
            torn[place] ^= 255
        path.write_bytes(torn)
        try:
            source = npz.load(str(path))
            found = [source.read(i, i + 3).images for i in (0, 3, 6)]
            np.testing.assert_array_equal(np.concatenate(found), images)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50


def test_pickle_refused(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    message = refusal(saved(class_names=np.array([Bomb(), Bomb(), Bomb()], object)))
    assert "pickle" in message and not (tmp_path / "boom").exists()


def test_missing_keys(saved):
    message = refusal(saved(train_labels=None, test_images=None))
    assert "lacks train_labels, test_images" in message and "train_images, test_labels, class_names" in message


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"train_images": np.zeros((6, 5, 6, 3))}, ["train_images must be uint8, are float64"]),
        ({"train_images": np.zeros((6, 5, 6, 4), np.uint8)}, ["train_images must be [N, H, W] or [N, H, W, 1 or 3]"]),
        ({"train_images": np.zeros((6, 90), np.uint8)}, ["train_images must be [N, H, W]", "are [6, 90]"]),
        (
            {"train_images": np.zeros((3, 6, 5, 6), np.uint8).T},
            ["train_images is stored in Fortran order; save np.ascontiguousarray(train_images)"],
        ),
        ({"train_images": np.full((6, 5, 6, 3), None)}, ["train_images must be uint8, are object"]),
        ({"train_images": np.uint8(3)}, ["train_images must be [N, H, W]", "are []"]),
        ({"test_images": np.zeros((3, 5, 5, 3), np.uint8)}, ["must have one shape", "(5, 6, 3)", "(5, 5, 3)"]),
        ({"train_labels": np.zeros(5, int)}, ["train_labels must be 6 integers, are int64 [5]"]),
        ({"train_labels": np.zeros(6)}, ["train_labels must be 6 integers, are float64 [6]"]),
        ({"train_labels": np.zeros((6, 1), int)}, ["train_labels must be 6 integers, are int64 [6, 1]"]),
        ({"train_ids": np.arange(5)}, ["train_ids must have 6 entries, has shape [5]"]),
        ({"train_owners": np.array("ann")}, ["train_owners must have 6 entries, has shape []"]),
        ({"public_images": np.zeros((1, 5, 6, 3), np.uint8)}, ["public_labels is missing"]),
        ({"class_names": np.array("cat")}, ["class_names must be a list, has shape []"]),
        (
            {"train_images": np.zeros((6, 5, 6, 2)), "test_labels": np.zeros(9)},
            ["train_images must be uint8", "1 or 3]", "test_labels must be 3 integers"],
        ),
    ],
)
def test_wrong_arrays(saved, changes, messages):
    found = refusal(saved(**changes))
    assert all(message in found for message in messages), found
