"""Images in folders: roles, classes and a CSV of labels and owners; whatever cannot be used is named, all of it."""

import numpy as np
import pytest
from PIL import Image

from lmeraser_jax.config import Data
from lmeraser_jax.data import decode, folder
from lmeraser_jax.data import load as load_module
from lmeraser_jax.data.source import Item, problems
from lmeraser_jax.errors import UserError

IDS = ["train/cat/a.png", "train/cat/b.png", "train/dog/c.PNG", "train/dog/deep/d.bmp", "test/cat/e.png"]
IDS += ["test/dog/f.png"]


@pytest.fixture
def root(tmp_path, rng):
    """Two classes, two training images and a test image each, of several sizes."""
    for name, size in zip(IDS, [(20, 12), (8, 8), (9, 31), (5, 4), (8, 8), (8, 8)], strict=True):
        save(tmp_path / "images" / name, rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    return tmp_path / "images"


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tree(root, *names):
    """Small images under these names; their pixels are never looked at."""
    for name in names:
        save(root / name, np.zeros((2, 2, 3), np.uint8))


def load(root, **changes):
    return folder.load(Data(**{"source": "folder", "path": str(root), "store_size": 8, **changes}))


def refusal(root, **changes) -> str:
    with pytest.raises(UserError) as caught:
        load(root, **changes)
    return str(caught.value)


def table(tmp_path, text) -> str:
    (tmp_path / "labels.csv").write_text(text)
    return str(tmp_path / "labels.csv")


def records(source) -> dict[str, tuple[str, str, str]]:
    """{id: (split, class, owner)}."""
    return {item.id: (item.split, source.class_names[item.label], item.owner) for item in source.items}


def test_images_are_items_with_their_path_as_id(root):
    (root / "train" / "cat" / "odd.png").mkdir()
    tree(root, "train/cat/._a.png", "train/.cache/a.png", "train/cat/.thumbs/a.png")  # hidden names
    source = load(root)
    assert [item.id for item in source.items] == IDS and source.class_names == ("cat", "dog")
    assert source.items[2] == Item("train/dog/c.PNG", "train", 1) and source.items[4] == Item(IDS[4], "test", 0)
    assert problems(source) == []
    tree(root, "public/cat/p.png")
    assert load(root).items[-1] == Item("public/cat/p.png", "public", 0)


def test_every_kind_of_image_is_read_and_what_is_not_used_is_named(root):
    suffixes = sorted({*folder.SUFFIXES, ".jfif", ".jpe"})
    for i, suffix in enumerate([*suffixes, *map(str.title, suffixes)]):
        (root / f"train/cat/{i}{suffix}").write_bytes((root / IDS[0]).read_bytes())
    source = load(root)
    assert len(source.items) == len(IDS) + 2 * len(suffixes) and source.notes == ()
    assert source.read(range(len(source.items))).unreadable == {}
    others = ["train/cat/a.jp2", "train/fox/b.JP2", "train/.DS_Store", "train/cat/._a.png", "test/dog/none"]
    for name in [*others, "train/eel/deep/c.heic", "val/cat/d.png", "test/eel/e.txt", "README.md"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    assert load(root).notes == (
        "not used: 7 files (2 .jp2, 2 hidden, 1 .heic, 1 .txt, 1 without a suffix),"
        " class folders without images: train/eel, train/fox, test/eel, folders without a role: val",
    )
    message = refusal(root, test_split="test/eel")
    assert "test_split=test/eel holds no images" in message and "it holds 1 files (1 .txt)" in message
    tree(root, "parts/one/a/1.png", "parts/two/b/1.png", "parts/one/b/2.png")
    (note,) = load(root, train_split="parts/one").notes
    assert note.endswith("class folders without images: test/eel, folders without a role: parts/two, train, val")


def test_images_without_a_row_are_counted_where_rows_give_owners(root, tmp_path):
    assert load(root, labels=table(tmp_path, f"file,label\n{IDS[0]},cat\n")).notes == ()
    (note,) = load(root, labels=table(tmp_path, f"file,label,owner\n{IDS[0]},cat,ann\n")).notes
    assert note.startswith("5 images have no row in ") and note.endswith("labels.csv, and so no owner")


def test_the_order_is_that_of_the_parts_of_the_paths(tmp_path):
    tree(tmp_path, "train/a/b/x.png", "train/a/b.png", "train/a-b/c.png", "train/a/B.png")
    ids = [item.id for item in load(tmp_path).items]
    assert ids == ["train/a/B.png", "train/a/b/x.png", "train/a/b.png", "train/a-b/c.png"]


def test_links_are_followed_but_not_in_circles(root, tmp_path):
    tree(tmp_path / "elsewhere", "g.png", "more/h.png")
    (root / "train" / "eel").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "more" / "up").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "cat" / "again").symlink_to(root)
    (root / "train" / "cat" / "dogs").symlink_to(root / "train" / "dog")  # each leads to the other
    (root / "train" / "dog" / "cats").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "self").symlink_to("self")
    ids = [item.id for item in load(root).items]
    linked = ["train/eel/g.png", "train/eel/more/h.png", "train/cat/dogs/c.PNG", "train/cat/dogs/deep/d.bmp"]
    assert sorted(ids) == sorted([*IDS, *linked, "train/dog/cats/a.png", "train/dog/cats/b.png"])


# roles
def test_roles_are_folders_of_any_name(tmp_path):
    tree(tmp_path, "Final_Training/Images/a/1.png", "Final_Training/Images/b/2.png", "Final_Test/Images/a/3.png")
    tree(tmp_path, "keep/b/4.png", "open/a/5.png", "test/a/ignored.png", "public/b/ignored.png")
    roles = {"train_split": "Final_Training/Images/", "test_split": "./Final_Test/Images", "holdout_split": "keep"}
    assert records(load(tmp_path, **roles, public_split="open")) == {
        "Final_Training/Images/a/1.png": ("train", "a", ""),
        "Final_Training/Images/b/2.png": ("train", "b", ""),
        "Final_Test/Images/a/3.png": ("test", "a", ""),
        "keep/b/4.png": ("holdout", "b", ""),
        "open/a/5.png": ("public", "a", ""),
    }


def test_overlapping_roles_are_refused(tmp_path):
    tree(tmp_path, "train/a/1.png", "train/b/2.png", "train2/b/2.png", "test/a/3.png")
    (tmp_path / "link").symlink_to(tmp_path / "test")
    for roles, named in (
        ({"train_split": "."}, ["test_split=test lies in --config.data.train_split=.", "a folder named test is taken"]),
        ({"train_split": "train", "test_split": "train"}, ["test_split=train lies in --config.data.train_split=train"]),
        ({"train_split": "train/a", "test_split": "train"}, ["train_split=train/a lies in --config.data.test_split=t"]),
        ({"holdout_split": "test/a"}, ["holdout_split=test/a lies in --config.data.test_split=test"]),
        ({"public_split": "train", "holdout_split": "test/a"}, ["public_split=train", "holdout_split=test/a"]),
        ({"train_split": "link"}, ["test_split=test lies in --config.data.train_split=link"]),
    ):
        message = refusal(tmp_path, **roles)
        assert "do not overlap" in message and all(words in message for words in named), message
    assert len(load(tmp_path, test_split="train2").items) == 3  # a similar name is no overlap


def test_missing_roles_are_refused(root, tmp_path):
    message = refusal(root, train_split="Train", test_split="../images", public_split="/tmp", holdout_split="train[:5]")
    assert "--config.data.train_split=Train: no such folder in" in message and "it holds test, train" in message
    assert "--config.data.holdout_split=train[:5]: no such folder" in message
    for flag in ("test_split=../images", "public_split=/tmp"):
        assert f"--config.data.{flag}: must be a folder below --config.data.path" in message
    (root / "empty").mkdir()
    message = refusal(root, holdout_split="empty")
    assert f"holdout_split=empty holds no images in {root}; expected empty/<class>/" in message


def test_a_folder_without_images_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "train_split=train: no such folder" in refusal(tmp_path) and "holds no folders" in refusal(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "loose.png").write_bytes(b"x")
    assert f"train holds no images in {tmp_path}; expected train/<class>/<file> (.png, " in refusal(tmp_path)


# pixels
def test_pixels_have_the_stored_size(root):
    source = load(root, store_size=6, store_width=10)
    pixels = source.read(range(6)).rows
    assert source.shape == (6, 10, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, decode.decode([root / name for name in IDS], 6, 10, 3).rows)
    np.testing.assert_array_equal(source.read(range(2, 4)).rows, pixels[2:4])
    sizes = {"store_size": (7, 0, 12), "image_size": (0, 0, 12), "store_width": (0, 4, 9)}
    shapes = [load(root, store_size=s, store_width=w, image_size=i).shape for s, w, i in sizes.values()]
    assert shapes == [(7, 7, 3), (12, 12, 3), (9, 4, 3)]
    with Image.open(root / "train/cat/b.png") as image:
        np.testing.assert_array_equal(load(root).read(range(1, 2)).rows[0], np.asarray(image))


# classes
def test_numbers_are_compared_as_numbers_unless_they_stand_beside_words(tmp_path):
    tree(tmp_path, "train/00002/1.png", "train/00010/2.png", "train/1/3.png", "test/10/4.png", "test/0/x.png")
    source = load(tmp_path, labels=table(tmp_path, "file,label\ntest/0/x.png,0002\n"))
    assert source.class_names == ("1", "2", "10")
    assert [name for _, name, _ in records(source).values()] == ["2", "10", "1", "2", "10"]
    numbers = "00002 / 0002 (leading zeros), 00010 / 10 (leading zeros)"
    assert source.notes == (f"class names that are one number, and so one class: {numbers}",)
    tree(tmp_path, "train/b/3.png")
    assert load(tmp_path).class_names == ("0", "00002", "00010", "1", "10", "b")


def test_images_need_labels(root, tmp_path):
    tree(tmp_path / "flat", "train/1.png", "train/2.png")
    message = refusal(tmp_path / "flat")
    assert "flat has no labels: there are no class folders (train/<class>/<file>) and no CSV" in message
    empty = table(tmp_path, "file,label\n1.png,\n")
    assert "and none in the CSV (--config.data.labels)" in refusal(tmp_path / "flat", labels=empty)
    tree(root, "train/loose.png")
    assert "no class folder and no label in the CSV (--config.data.labels): train/loose.png" in refusal(root)


# labels and owners from a CSV
def test_labels_and_owners_come_from_a_csv_where_it_has_them(root, tmp_path):
    tree(root, "train/loose.png")
    text = f"owner,file,label\nann,{IDS[0]},\nann,{IDS[2]},wolf\n,loose.png,cat"
    source = load(root, labels=table(tmp_path, text))
    assert source.class_names == ("cat", "dog", "wolf") and source.items[1].owner == ""
    assert source.items[0] == Item(IDS[0], "train", 0, "ann") and source.items[2] == Item(IDS[2], "train", 2, "ann")
    assert Item("train/loose.png", "train", 0) in source.items


def test_gtsrb_as_published(tmp_path):
    """Class folders for training, a CSV with semicolons for the test images, tracks as owners."""
    training = [f"{c:05d}/{track:05d}_{frame:05d}.ppm" for c in (0, 14) for track in (0, 1) for frame in (0, 1)]
    tree(tmp_path, *[f"Final_Training/Images/{name}" for name in training])
    tree(tmp_path, *[f"Final_Test/Images/{i:05d}.ppm" for i in range(3)])
    rows = "".join(f"{i:05d}.ppm;53;54;6;5;48;49;{c}\n" for i, c in enumerate((14, 0, 14)))
    labels = table(tmp_path, "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)
    roles = {"train_split": "Final_Training/Images", "test_split": "Final_Test/Images"}
    columns = {"labels": labels, "csv_columns": "Filename,ClassId", "owner_pattern": r"Images/(\d+)/(\d+)_"}
    source = load_module.load(Data(source="folder", path=str(tmp_path), **roles, **columns))
    assert source.class_names == ("0", "14") and problems(source) == []
    assert [name for split, name, _ in records(source).values() if split == "test"] == ["14", "0", "14"]
    owners = {item.owner for item in source.items}
    assert owners == {"", "00000/00000", "00000/00001", "00014/00000", "00014/00001"}


def test_ham10000_as_published(tmp_path):
    """Two folders of parts, and a CSV that names files without their suffix."""
    tree(tmp_path, "HAM10000_images_part_1/ISIC_1.jpg", "HAM10000_images_part_1/ISIC_2.jpg")
    tree(tmp_path, "HAM10000_images_part_2/ISIC_3.jpg")
    text = "lesion_id,image_id,dx,dx_type\nHAM_1,ISIC_1,nv,histo\nHAM_2,ISIC_2,mel,histo\nHAM_1,ISIC_3,nv,histo\n"
    settings = {"train_split": ".", "labels": table(tmp_path, text), "csv_columns": "image_id, dx, lesion_id"}
    assert records(load(tmp_path, **settings)) == {
        "HAM10000_images_part_1/ISIC_1.jpg": ("train", "nv", "HAM_1"),
        "HAM10000_images_part_1/ISIC_2.jpg": ("train", "mel", "HAM_2"),
        "HAM10000_images_part_2/ISIC_3.jpg": ("train", "nv", "HAM_1"),
    }
    tree(tmp_path, "HAM10000_images_part_2/ISIC_4.jpg")  # the name of a part is no diagnosis
    assert "none for these images: HAM10000_images_part_2/ISIC_4.jpg" in refusal(tmp_path, **settings)
