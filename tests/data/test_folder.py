"""Images in folders: roles, classes, CSVs of every shape; whatever cannot be used is named, all of it."""

import numpy as np
import pytest
from PIL import Image

from lmeraser_jax.config import Data
from lmeraser_jax.data import decode, folder
from lmeraser_jax.data import load as load_module
from lmeraser_jax.data.source import Item, problems
from lmeraser_jax.errors import UserError


@pytest.fixture
def root(tmp_path, rng):
    """Two classes, two training images and a test image each, of several sizes."""
    for name, size in (
        ("train/cat/b.png", (8, 8)),
        ("train/cat/a.png", (20, 12)),
        ("train/dog/c.PNG", (9, 31)),
        ("train/dog/deep/d.bmp", (5, 4)),
        ("test/cat/e.png", (8, 8)),
        ("test/dog/f.png", (8, 8)),
    ):
        save(tmp_path / "images" / name, rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    return tmp_path / "images"


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


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


def table(tmp_path, text, encoding="utf-8") -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding=encoding)
    return str(path)


def shown(source) -> dict[str, tuple[str, str, str]]:
    """{id: (split, class, owner)}."""
    return {item.id: (item.split, source.class_names[item.label], item.owner) for item in source.items}


IDS = [
    "train/cat/a.png",
    "train/cat/b.png",
    "train/dog/c.PNG",
    "train/dog/deep/d.bmp",
    "test/cat/e.png",
    "test/dog/f.png",
]


def test_items(root):
    (root / "train" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "odd.png").mkdir()
    (root / "other" / "cat").mkdir(parents=True)
    source = load(root)
    assert [item.id for item in source.items] == IDS and source.class_names == ("cat", "dog")
    assert source.items[2] == Item("train/dog/c.PNG", "train", 1) and source.items[4] == Item(IDS[4], "test", 0)
    assert problems(source) == []


def test_order_is_that_of_the_parts_of_the_paths(tmp_path):
    names = ["train/a/b/x.png", "train/a/b.png", "train/a-b/c.png", "train/a/B.png"]
    tree(tmp_path, *names)
    found = [item.id for item in load(tmp_path).items]
    assert found == ["train/a/B.png", "train/a/b/x.png", "train/a/b.png", "train/a-b/c.png"]


def test_hidden_names_are_passed_over(root):
    tree(root, "train/cat/._a.png", "train/.cache/a.png", "train/cat/.thumbs/a.png")
    assert [item.id for item in load(root).items] == IDS


def test_links_are_followed_but_not_in_circles(root, tmp_path):
    tree(tmp_path / "elsewhere", "g.png", "more/h.png")
    (root / "train" / "eel").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "more" / "up").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "cat" / "again").symlink_to(root)
    found = [item.id for item in load(root).items]
    assert found == [*IDS[:4], "train/eel/g.png", "train/eel/more/h.png", *IDS[4:]]


def test_public_split(root):
    tree(root, "public/cat/p.png")
    assert load(root).items[-1] == Item("public/cat/p.png", "public", 0)


# roles
def test_named_roles(tmp_path):
    tree(tmp_path, "Final_Training/Images/a/1.png", "Final_Training/Images/b/2.png", "Final_Test/Images/a/3.png")
    tree(tmp_path, "keep/b/4.png", "open/a/5.png", "test/a/ignored.png", "public/b/ignored.png")
    roles = {"train_split": "Final_Training/Images/", "test_split": "./Final_Test/Images", "holdout_split": "keep"}
    assert shown(load(tmp_path, **roles, public_split="open")) == {
        "Final_Training/Images/a/1.png": ("train", "a", ""),
        "Final_Training/Images/b/2.png": ("train", "b", ""),
        "Final_Test/Images/a/3.png": ("test", "a", ""),
        "keep/b/4.png": ("holdout", "b", ""),
        "open/a/5.png": ("public", "a", ""),
    }


def test_whole_folder(tmp_path):
    tree(tmp_path, "a/1.png", "b/2.png")
    assert shown(load(tmp_path, train_split=".")) == {"a/1.png": ("train", "a", ""), "b/2.png": ("train", "b", "")}


@pytest.mark.parametrize(
    ("roles", "named"),
    [
        ({"train_split": "."}, ["test_split=test lies in --config.data.train_split=.", "a folder named test is taken"]),
        ({"train_split": "train", "test_split": "train"}, ["test_split=train lies in --config.data.train_split=train"]),
        (
            {"train_split": "train/a", "test_split": "train"},
            ["train_split=train/a lies in --config.data.test_split=tr"],
        ),
        ({"holdout_split": "test/a"}, ["holdout_split=test/a lies in --config.data.test_split=test"]),
        ({"public_split": "train", "holdout_split": "test/a"}, ["public_split=train", "holdout_split=test/a"]),
        ({"train_split": "link"}, ["test_split=test lies in --config.data.train_split=link"]),
    ],
)
def test_overlapping_roles_are_refused(tmp_path, roles, named):
    tree(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    (tmp_path / "link").symlink_to(tmp_path / "test")
    message = refusal(tmp_path, **roles)
    assert "do not overlap" in message and all(words in message for words in named), message


def test_a_folder_with_a_similar_name_is_no_overlap(tmp_path):
    tree(tmp_path, "train/a/1.png", "train2/b/2.png")
    assert len(load(tmp_path, test_split="train2").items) == 2


def test_missing_roles_are_refused(root, tmp_path):
    message = refusal(root, train_split="Train", test_split="../images", public_split="/tmp", holdout_split="train[:5]")
    assert "--config.data.train_split=Train: no such folder in" in message and "it holds test, train" in message
    assert "--config.data.holdout_split=train[:5]: no such folder" in message
    for flag in ("test_split=../images", "public_split=/tmp"):
        assert f"--config.data.{flag}: must be a folder below --config.data.path" in message
    (root / "empty").mkdir()
    assert f"holdout_split=empty holds no images in {root}; expected empty/<class>/" in refusal(
        root, holdout_split="empty"
    )


def test_no_images(tmp_path):
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "train_split=train: no such folder" in refusal(tmp_path) and "holds no folders" in refusal(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "loose.png").write_bytes(b"x")
    assert f"train holds no images in {tmp_path}; expected train/<class>/<file> (.png, " in refusal(tmp_path)


# pixels
def test_sizes(root):
    source = load_module.load(Data(source="folder", path=str(root), store_size=7))
    pixels = source.read(0, 6).images
    assert source.shape == (7, 7, 3) and pixels.shape == (6, 7, 7, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(source.read(2, 4).images, pixels[2:4])
    assert load_module.load(Data(source="folder", path=str(root), image_size=12)).shape == (12, 12, 3)


def test_height_and_width(root):
    source = load(root, store_size=6, store_width=10)
    files = [root / name for name in IDS]
    assert source.shape == (6, 10, 3) and load(root, store_size=0, image_size=9, store_width=4).shape == (9, 4, 3)
    np.testing.assert_array_equal(source.read(0, 6).images, decode.decode_all(files, 6, 10, 3))


def test_stored_size_keeps_pixels(root):
    with Image.open(root / "train/cat/b.png") as image:
        np.testing.assert_array_equal(load(root).read(1, 2).images[0], np.asarray(image))


def test_centre_crop(tmp_path):
    """Wide and high images lose their ends, not their middle, and are not squeezed."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = np.arange(8, dtype=np.uint8)[None, :, None]
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "high.png", np.ascontiguousarray(pixels.transpose(1, 0, 2)))
    wide, high = decode.decode_all([tmp_path / "wide.png", tmp_path / "high.png"], 8, 8, 3)
    np.testing.assert_array_equal(wide, pixels[:, 8:16])
    np.testing.assert_array_equal(high, pixels[:, 8:16].transpose(1, 0, 2))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    """A grey image is the same three channels in every mode."""
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    pixels = np.where(np.eye(8, dtype=bool), 255, 0).astype(np.uint8)
    save(file, np.stack([pixels] * 3, -1), mode)
    np.testing.assert_array_equal(decode.decode_all([file], 8, 8, 3)[0], np.stack([pixels] * 3, -1))
    np.testing.assert_array_equal(decode.decode_all([file], 8, 8, 1)[0, ..., 0], pixels)


def test_transparent_palette(tmp_path, rng):
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).convert("P")
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    plain, clear = decode.decode_all([tmp_path / "plain.png", tmp_path / "clear.png"], 8, 8, 3)
    np.testing.assert_array_equal(plain, clear)


def test_deep_pixels_refused(tmp_path):
    """16-bit and float pixels would be clipped to white or black in silence."""
    save(tmp_path / "deep.png", np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    save(tmp_path / "real.tif", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(UserError) as caught:
        decode.decode_all([tmp_path / "deep.png", tmp_path / "real.tif"], 8, 8, 3)
    assert str(caught.value).count("8 bits per channel") == 2


def test_unreadable_files_have_their_positions(root):
    torn = root / "train/cat/b.png"
    torn.write_bytes(torn.read_bytes()[:60])
    (root / "train/dog/c.PNG").write_bytes(b"")
    (root / "test/dog/f.png").write_bytes(b"GIF89a no image")
    source = load(root)
    assert set(source.read(0, 6).unreadable) == {1, 2, 5} and set(source.read(1, 2).unreadable) == {0}
    assert source.read(0, 1).unreadable == {} and source.read(0, 1).images.shape == (1, 8, 8, 3)


# class names
def test_numbers_are_compared_as_numbers(tmp_path):
    tree(tmp_path, "train/00002/1.png", "train/00010/2.png", "train/1/3.png", "test/10/4.png", "test/0/x.png")
    source = load(tmp_path, labels=table(tmp_path, "file,label\ntest/0/x.png,0002\n"))
    assert source.class_names == ("1", "2", "10")
    assert [name for _, name, _ in shown(source).values()] == ["2", "10", "1", "2", "10"]


def test_numbers_beside_words_are_words(tmp_path):
    tree(tmp_path, "train/00002/1.png", "train/2/2.png", "train/b/3.png", "train/10/4.png")
    assert load(tmp_path).class_names == ("00002", "10", "2", "b")


def test_without_labels(tmp_path):
    tree(tmp_path, "train/1.png", "train/2.png")
    message = refusal(tmp_path)
    assert f"{tmp_path} has no labels: there are no class folders (train/<class>/<file>) and no CSV" in message
    empty = table(tmp_path, "file,label\n1.png,\n")
    assert "and none in the CSV (--config.data.labels)" in refusal(tmp_path, labels=empty)


# labels and owners from a CSV
def test_csv_owners(root, tmp_path):
    labels = table(tmp_path, f"owner,file,label\nann,{IDS[0]},\nann,{IDS[2]},wolf\n")
    source = load_module.load(Data(source="folder", path=str(root), labels=labels, store_size=8))
    assert source.class_names == ("cat", "dog", "wolf")
    assert source.items[0] == Item(IDS[0], "train", 0, "ann") and source.items[2] == Item(IDS[2], "train", 2, "ann")
    assert source.items[1].owner == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_labels_loose_files(root, tmp_path, encoding, mark):
    tree(root, "train/loose.png")
    assert "no class folder and no label in the CSV (--config.data.labels): train/loose.png" in refusal(root)
    labels = table(tmp_path, "file,label\r\n train/loose.png , dög \r\n\r\n,\r\n".replace(",", mark), encoding)
    source = load(root, labels=labels)
    assert source.class_names[-1] == "dög" and Item("train/loose.png", "train", 2) in source.items


def test_csv_quoted_cells(root, tmp_path):
    tree(root, "train/a,b.png")
    labels = table(tmp_path, 'file,"label"\n"train/a,b.png","a ""b"", c"\n')
    assert shown(load(root, labels=labels))["train/a,b.png"] == ("train", 'a "b", c', "")


def test_gtsrb_as_published(tmp_path):
    """Class folders for training, a CSV with semicolons for the test images, tracks as owners."""
    training = [f"{c:05d}/{track:05d}_{frame:05d}.ppm" for c in (0, 14) for track in (0, 1) for frame in (0, 1)]
    tree(tmp_path, *[f"Final_Training/Images/{name}" for name in training])
    tree(tmp_path, *[f"Final_Test/Images/{i:05d}.ppm" for i in range(3)])
    rows = "".join(f"{i:05d}.ppm;53;54;6;5;48;49;{c}\n" for i, c in enumerate((14, 0, 14)))
    labels = table(tmp_path, "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)
    data = Data(
        source="folder",
        path=str(tmp_path),
        train_split="Final_Training/Images",
        test_split="Final_Test/Images",
        labels=labels,
        csv_columns="Filename,ClassId",
        owner_pattern=r"Images/(\d+)/(\d+)_",
    )
    source = load_module.load(data)
    assert source.class_names == ("0", "14") and problems(source) == []
    assert [name for split, name, _ in shown(source).values() if split == "test"] == ["14", "0", "14"]
    owners = {item.owner for item in source.items}
    assert owners == {"", "00000/00000", "00000/00001", "00014/00000", "00014/00001"}


def test_ham10000_as_published(tmp_path):
    """Two folders of parts, and a CSV that names files without their suffix."""
    tree(tmp_path, "HAM10000_images_part_1/ISIC_1.jpg", "HAM10000_images_part_1/ISIC_2.jpg")
    tree(tmp_path, "HAM10000_images_part_2/ISIC_3.jpg")
    text = "lesion_id,image_id,dx,dx_type\nHAM_1,ISIC_1,nv,histo\nHAM_2,ISIC_2,mel,histo\nHAM_1,ISIC_3,nv,histo\n"
    labels = table(tmp_path, text)
    source = load(tmp_path, train_split=".", labels=labels, csv_columns="image_id, dx, lesion_id")
    assert shown(source) == {
        "HAM10000_images_part_1/ISIC_1.jpg": ("train", "nv", "HAM_1"),
        "HAM10000_images_part_1/ISIC_2.jpg": ("train", "mel", "HAM_2"),
        "HAM10000_images_part_2/ISIC_3.jpg": ("train", "nv", "HAM_1"),
    }
    tree(tmp_path, "HAM10000_images_part_2/ISIC_4.jpg")  # the name of a part is no diagnosis
    message = refusal(tmp_path, train_split=".", labels=labels, csv_columns="image_id,dx,lesion_id")
    assert "none for these images: HAM10000_images_part_2/ISIC_4.jpg" in message


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        ("train/cat/a.png", "train/cat/a.png"),  # below the data folder
        ("./train//cat/a.png", "train/cat/a.png"),
        ("train\\cat\\a.png", "train/cat/a.png"),
        ("cat/b.png", "train/cat/b.png"),  # below a role's folder
        ("e.png", "test/cat/e.png"),  # a file name, which comes before a stem
        ("d", "train/dog/deep/d.bmp"),  # a stem
    ],
)
def test_csv_ways_to_name_a_file(root, tmp_path, row, meant):
    tree(root, "train/x/e.png.png")
    source = load(root, labels=table(tmp_path, f"file,label\n{row},wolf\n"))
    assert [name for name, (_, label, _) in shown(source).items() if label == "wolf"] == [meant]


def test_csv_a_path_comes_before_a_path_below_a_role(tmp_path):
    tree(tmp_path, "train/x/1.png", "train/train/x/1.png", "train/b/2.png")
    source = load(tmp_path, labels=table(tmp_path, "file,label\ntrain/x/1.png,wolf\n"))
    assert [name for name, (_, label, _) in shown(source).items() if label == "wolf"] == ["train/x/1.png"]


def test_csv_rows_that_fit_nothing_or_too_much_are_all_named(root, tmp_path):
    tree(root, "train/dog/b.png", "test/dog/b.jpg", "test/cat/b.png", "train/cat/e.gif")
    rows = ("b.png", "b", "e", "cat/b.png", "train/x.png", "y", "other/cat/a.png", "", "a.png", "train/cat/a.png")
    rows += ("c", "c")
    labels = table(tmp_path, "file,label\n" + "".join(f"{row},owl\n" for row in rows))
    message = refusal(root, labels=labels)
    several, missing, nameless, twice, same = (
        next(line for line in message.splitlines() if words in line)
        for words in ("could be several", "not there", "without a file name", "more than once", "several ways")
    )
    assert "cat/b.png (train/cat/b.png or test/cat/b.png)" in several
    assert "b.png (" in several and "b (" in several and "e (" in several and several.count("(") == 4
    assert "not there: other/cat/a.png, train/x.png, y" in missing and "row 8" in nameless
    assert twice.endswith(": c") and "train/cat/a.png (a.png, train/cat/a.png)" in same


def test_csv_missing_files_are_refused_whatever_is_skipped(root, tmp_path):
    labels = table(tmp_path, f"file,label\ntrain/x.png,cat\n{IDS[0]},cat\ntrain/y.png\n")
    for skip in (False, True):
        message = refusal(root, labels=labels, skip_unreadable=skip)
        assert "names files that are not there: train/x.png, train/y.png" in message and IDS[0] not in message


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("file,owner\n", None, "lacks the columns label; it has file, owner; name its columns"),
        ("", None, "lacks the columns file, label; it has none"),
        ("train/cat/a.png,cat\n", None, "lacks the columns file, label"),
        ("file,label\ntrain/cat/a.png,cat\ntrain/cat/a.png,dog\n", None, "more than once: train/cat/a.png"),
        ("file,label\n", "file,label,lesion", "lacks the columns lesion; it has file, label"),
        ("image;dx\n", "image,diagnosis", "(now image,diagnosis)"),
    ],
)
def test_csv_refused(root, tmp_path, text, columns, message):
    columns = {"csv_columns": columns} if columns else {}
    assert message in refusal(root, labels=table(tmp_path, text), **columns)


def test_csv_unreadable(root, tmp_path):
    assert "--config.data.labels" in refusal(root, labels=str(tmp_path / "absent.csv"))
    latin = table(tmp_path, "file,label\ntrain/cat/a.png,dög\n", "latin-1")
    assert "is not a readable CSV in UTF-8" in refusal(root, labels=latin)
