"""A user's own .npz: any array that fits becomes records; what does not fit is named, and nothing is unpickled."""

import numpy as np
import pytest

from lmeraser_jax.config import Data
from lmeraser_jax.errors import UserError
from lmeraser_jax.records import npz, sources
from lmeraser_jax.records.source import Item, problems


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


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        npz.load(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


# what loads
def test_complete(tmp_path, rng):
    given = arrays(rng)
    np.savez(tmp_path / "a.npz", **given)
    source = sources.load(Data(source="npz", path=str(tmp_path / "a.npz")))
    assert problems(source) == [] and source.shape == (5, 6, 3) and source.class_names == ("cat", "dog", "eel")
    assert source.items[:2] == [Item("train/0", "train", 0), Item("train/1", "train", 1)]
    assert source.items[6:] == [Item("test/0", "test", 2), Item("test/1", "test", 1), Item("test/2", "test", 0)]
    np.testing.assert_array_equal(source.read(0, 9), np.concatenate([given["train_images"], given["test_images"]]))
    np.testing.assert_array_equal(source.read(7, 8), given["test_images"][1:2])


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
    assert grey.shape == (5, 6, 1) and grey.read(0, 9).shape == (9, 5, 6, 1)
    mixed = npz.load(saved(shape=(5, 6), test_images=rng.integers(0, 256, (3, 5, 6, 1), np.uint8)))
    assert mixed.shape == (5, 6, 1)


def test_without_class_names(saved):
    assert npz.load(saved(class_names=None)).class_names == ("0", "1", "2")


def test_label_beyond_names(saved):
    found = problems(npz.load(saved(train_labels=np.array([0, 1, 2, 3, -1, 2]))))
    assert found == ["labels must lie in 0..2 (the class names): train/3=3, train/4=-1"]


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


def test_damaged_anywhere(tmp_path, rng):
    """Torn and flipped bytes give a message or the same arrays, never a traceback."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays(rng))
    whole, refused = path.read_bytes(), 0
    for trial in range(60):
        torn = bytearray(whole[: rng.integers(len(whole))] if trial % 3 == 0 else whole)
        for place in rng.integers(0, len(torn), 4) if torn else ():
            torn[place] ^= 255
        path.write_bytes(torn)
        try:
            npz.load(str(path))
        except UserError:
            refused += 1
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
