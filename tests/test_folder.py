"""Images in folders: any size and mode becomes one stored shape; whatever cannot be used is named, all of it."""

import numpy as np
import pytest
from PIL import Image

from lmeraser_jax.config import Data
from lmeraser_jax.errors import UserError
from lmeraser_jax.records import folder, sources
from lmeraser_jax.records.source import Item, problems


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


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        folder.load(*args)
    return str(caught.value)


def table(tmp_path, text, encoding="utf-8") -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding=encoding)
    return str(path)


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
    source = folder.load(str(root), 8)
    assert [item.id for item in source.items] == IDS and source.class_names == ("cat", "dog")
    assert source.items[2] == Item("train/dog/c.PNG", "train", 1) and source.items[4] == Item(IDS[4], "test", 0)
    assert problems(source) == []


def test_public_split(root, rng):
    save(root / "public" / "cat" / "p.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    assert folder.load(str(root), 8).items[-1] == Item("public/cat/p.png", "public", 0)


def test_sizes(root):
    source = sources.load(Data(source="folder", path=str(root), store_size=7))
    pixels = source.read(0, 6)
    assert source.shape == (7, 7, 3) and pixels.shape == (6, 7, 7, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(source.read(2, 4), pixels[2:4])
    assert sources.load(Data(source="folder", path=str(root), image_size=12)).shape == (12, 12, 3)


def test_stored_size_keeps_pixels(root):
    with Image.open(root / "train/cat/b.png") as image:
        np.testing.assert_array_equal(folder.load(str(root), 8).read(1, 2)[0], np.asarray(image))


def test_centre_crop(tmp_path):
    """Wide and high images lose their ends, not their middle, and are not squeezed."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = np.arange(8, dtype=np.uint8)[None, :, None]
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "high.png", np.ascontiguousarray(pixels.transpose(1, 0, 2)))
    wide, high = folder.decode([tmp_path / "wide.png", tmp_path / "high.png"], 8, 8, 3)
    np.testing.assert_array_equal(wide, pixels[:, 8:16])
    np.testing.assert_array_equal(high, pixels[:, 8:16].transpose(1, 0, 2))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    """A grey image is the same three channels in every mode."""
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    pixels = np.where(np.eye(8, dtype=bool), 255, 0).astype(np.uint8)
    save(file, np.stack([pixels] * 3, -1), mode)
    found = folder.decode([file], 8, 8, 3)[0]
    np.testing.assert_array_equal(found, np.stack([pixels] * 3, -1))
    np.testing.assert_array_equal(folder.decode([file], 8, 8, 1)[0, ..., 0], pixels)


def test_transparent_palette(tmp_path, rng):
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).convert("P")
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    plain, clear = folder.decode([tmp_path / "plain.png", tmp_path / "clear.png"], 8, 8, 3)
    np.testing.assert_array_equal(plain, clear)


def test_deep_pixels_refused(tmp_path):
    """16-bit and float pixels would be clipped to white or black in silence."""
    save(tmp_path / "deep.png", np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    save(tmp_path / "real.tif", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(UserError) as caught:
        folder.decode([tmp_path / "deep.png", tmp_path / "real.tif"], 8, 8, 3)
    assert str(caught.value).count("8 bits per channel") == 2


def test_corrupt_files_all_named(root):
    torn = root / "train/cat/b.png"
    torn.write_bytes(torn.read_bytes()[:60])
    (root / "train/dog/c.PNG").write_bytes(b"")
    (root / "test/dog/f.png").write_bytes(b"GIF89a no image")
    source = folder.load(str(root), 8)
    with pytest.raises(UserError) as caught:
        source.read(0, 6)
    named = [name for name in IDS if str(root / name) in str(caught.value)]
    assert named == ["train/cat/b.png", "train/dog/c.PNG", "test/dog/f.png"]
    with pytest.raises(UserError, match="b.png"):
        source.read(1, 2)
    assert source.read(0, 1).shape == (1, 8, 8, 3)


def test_no_images(tmp_path):
    assert "no such folder" in refusal(str(tmp_path / "absent"), 8)
    assert "holds no images; expected {train,test}/<class>/<file>" in refusal(str(tmp_path), 8)
    (tmp_path / "loose.png").write_bytes(b"x")
    assert "holds no images" in refusal(str(tmp_path), 8)


# labels and owners from a CSV
def test_csv_owners(root, tmp_path):
    labels = table(tmp_path, f"owner,file,label\nann,{IDS[0]},\nann,{IDS[2]},wolf\n")
    source = sources.load(Data(source="folder", path=str(root), labels=labels, store_size=8))
    assert source.class_names == ("cat", "dog", "wolf")
    assert source.items[0] == Item(IDS[0], "train", 0, "ann") and source.items[2] == Item(IDS[2], "train", 2, "ann")
    assert source.items[1].owner == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_labels_loose_files(root, tmp_path, rng, encoding):
    save(root / "train" / "loose.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    assert "no class folder and no label in the CSV (--config.data.labels): train/loose.png" in refusal(str(root), 8)
    source = folder.load(str(root), 8, table(tmp_path, "file,label\ntrain/loose.png,dög\n", encoding))
    assert source.class_names[-1] == "dög" and Item("train/loose.png", "train", 2) in source.items


def test_csv_missing_files(root, tmp_path):
    message = refusal(str(root), 8, table(tmp_path, f"file,label\ntrain/x.png,cat\n{IDS[0]},cat\ntrain/y.png\n"))
    assert "names files that are not in" in message and "train/x.png, train/y.png" in message and IDS[0] not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,owner\n", "lacks the columns label; needed: file,label[,owner]"),
        ("", "lacks the columns file, label"),
        ("train/cat/a.png,cat\n", "lacks the columns file, label"),
        ("file,label\ntrain/cat/a.png,cat\ntrain/cat/a.png,dog\n", "names files more than once: train/cat/a.png"),
    ],
)
def test_csv_refused(root, tmp_path, text, message):
    assert message in refusal(str(root), 8, table(tmp_path, text))


def test_csv_unreadable(root, tmp_path):
    assert "--config.data.labels" in refusal(str(root), 8, str(tmp_path / "absent.csv"))
    latin = table(tmp_path, "file,label\ntrain/cat/a.png,dög\n", "latin-1")
    assert "is not a readable CSV in UTF-8" in refusal(str(root), 8, latin)
