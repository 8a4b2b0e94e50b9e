"""TensorFlow Datasets as a source: sets really written as array_record files are read back, without TensorFlow."""

import io
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tfds_sets import NAMES, RECORDS, encoded, example, labelled, load, pixels_of, refusal, write, write_standard

from lmeraser_jax.config import Data
from lmeraser_jax.data import load as load_module
from lmeraser_jax.data.decode import decode
from lmeraser_jax.data.source import Source, limit_positions, problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """TFDS's data folder with the sets `plain` and `named`."""
    root = tmp_path_factory.mktemp("tfds")
    write_standard(root)
    return root


def images_of(source: Source, step: int = 7) -> dict[str, np.ndarray]:
    """{id: pixels}, read in pieces that do not fit the splits."""
    pieces = [source.read(range(i, min(i + step, len(source.items)))) for i in range(0, len(source.items), step)]
    assert not any(piece.unreadable or piece.converted for piece in pieces)
    return dict(zip((item.id for item in source.items), np.concatenate([p.rows for p in pieces]), strict=True))


# what was written is what is read
def test_items_are_those_that_were_written(folder):
    source = load(folder)
    assert (source.name, source.class_names, source.shape) == ("plain/1.2.0", NAMES, (8, 6, 3))
    assert problems(source) == []
    wanted = [(f"{split}/{i}", split, i % 3, "") for split in ("train", "test") for i in range(RECORDS[split])]
    assert [tuple(item) for item in source.items] == wanted  # validation has no role unless it is given one
    assert source.notes == (f"not used: splits without a role: validation ({RECORDS['validation']})",)
    assert load(folder, holdout_split="validation").notes == ()


SLICES = [
    {"train": ("train[:25]", ["train", 0, 25]), "holdout": ("train[25:]", ["train", 25, 40])},
    {"train": ("train[30:]", ["train", 30, 40]), "public": ("train[:30]", ["train", 0, 30])},
    {"train": ("train[:50%]", ["train", 0, 20]), "public": ("train[-10:]", ["train", 30, 40])},
    {"train": ("train[80%:]", ["train", 32, 40]), "holdout": ("train[:80%]", ["train", 0, 32])},
    {
        "train": ("train[5:9]+validation[2:]+train[20:22]", ["train", 5, 9], ["validation", 2, 8], ["train", 20, 22]),
        "test": ("test[11:]+validation[:2]", ["test", 11, 12], ["validation", 0, 2]),
    },
]


def test_slices_never_change_an_id(folder):
    for dataset, roles in itertools.product(("plain", "named"), SLICES):
        source = load(folder, dataset, **{f"{role}_split": spec for role, (spec, *_) in roles.items()})
        wanted = {"test": [("test", i) for i in range(12)]}
        for role, (_, *spans) in roles.items():
            wanted[role] = [(split, i) for split, *ends in spans for i in range(*ends)]
        own = "img_" if dataset == "named" else ""
        for role, images in wanted.items():
            assert [item.id for item in source.items if item.split == role] == [f"{s}/{own}{i}" for s, i in images]
        assert len(source.items) == sum(map(len, wanted.values()))
        for name, image in images_of(source).items():
            split, _, index = name.partition("/")
            np.testing.assert_array_equal(image, pixels_of(split, int(index.removeprefix(own))))


def test_limits_are_those_of_the_import(folder):
    """Where no id has to be read, labels beyond the limits are not read either."""
    splits = {"train_split": "validation+train[5:]", "holdout_split": "train[:5]"}
    whole, cut = load(folder, **splits), load(folder, **splits, train_limit=11, test_limit=4)
    assert cut.items == [whole.items[i] for i in limit_positions(whole.items, 11, 4)] and len(cut.items) == 11 + 5 + 4
    assert load(folder, **splits, train_limit=11, test_limit=4, limit_by="class").items == whole.items
    expected = images_of(whole)
    assert all(np.array_equal(image, expected[name]) for name, image in images_of(cut).items())


# splits that cannot be
def test_an_image_has_one_role(folder):
    message = refusal(folder, train_split="train", test_split="train[80%:]", holdout_split="validation[3:]+test")
    assert message == (
        "--config.data.train_split=train and --config.data.test_split=train[80%:] share 8 records: train[32:40];"
        " a record has one role only"
    )
    message = refusal(folder, train_split="train[:20]+train[15:]", public_split="test[11:]")
    assert message.splitlines()[1:] == [
        "- --config.data.train_split=train[:20]+train[15:] names 5 records twice: train[15:20]",
        "- --config.data.test_split=test and --config.data.public_split=test[11:] share 1 records: test[11:12];"
        " a record has one role only",
    ]
    assert len(load(folder, train_split="train[:39]", holdout_split="train[39:]").items) == 40 + 12


def test_splits_that_do_not_exist_are_all_named(folder):
    message = refusal(
        folder, train_split="trian", test_split="test[:13]", holdout_split="train[", public_split="test[5:5]"
    )
    has = "plain/1.2.0 has the splits train (40), test (12), validation (8)"
    assert message.splitlines()[1:] == [
        f"- --config.data.train_split=trian cannot be used: Unknown split 'trian'; {has}",
        f"- --config.data.holdout_split=train[ cannot be used: Unrecognized split format: 'train['; {has}",
        "- --config.data.test_split=test[:13] cannot be used: Requested slice [:13] incompatible with 12 examples;"
        f" {has}",
        f"- --config.data.public_split=test[5:5] holds no record; {has}",
    ]


def test_a_set_without_a_test_split(tmp_path):
    write(tmp_path, "only", labelled(), {"train": [example("train", i) for i in range(6)]})
    assert {item.split for item in load(tmp_path, "only").items} == {"train"}
    assert "cannot be used: Unknown split 'test'" in refusal(tmp_path, "only", test_split="test")


def test_hidden_labels_are_refused(tmp_path):
    hidden = [example("test", i) | {"label": -1} for i in range(5)]
    some_hidden = [example("train", i) | {"label": -1 if i == 7 else i % 3} for i in range(9)]
    shown = [example("validation", i) for i in range(5)]
    write(tmp_path, "contest", labelled(), {"train": some_hidden, "test": hidden, "validation": shown})
    message = refusal(tmp_path, "contest", train_split="train[:7]+train[8:]")
    assert message == (
        "contest/1.2.0 hides labels of its split test (feature label is negative in 5 of 5 images);"
        " use images with labels, such as --config.data.test_split=validation"
    )
    message = refusal(tmp_path, "contest", test_split="validation")
    assert "of its split train (feature label is negative in 1 of 9 images); use images with labels, such as" in message
    roles = {"train_split": "validation", "holdout_split": "train[:7]"}
    message = refusal(tmp_path, "contest", **roles)
    assert message.endswith("training images with --config.data.test_share=0.1 and without a test_split")
    drawn = load(tmp_path, "contest", **roles, test_share=0.1)
    assert {item.split for item in drawn.items} == {"train", "holdout"}
    source = load(tmp_path, "contest", train_split="train[:7]+train[8:]", test_split="validation")
    assert len(source.items) == 8 + 5 and not any(item.label < 0 for item in source.items)


# images
def test_one_small_size_is_kept_and_a_given_size_wins(tmp_path, folder):
    sizes = [(224, 0, 0), (4, 0, 0), (16, 5, 0), (16, 5, 7)]
    found = [load(folder, image_size=size, store_size=height, store_width=width) for size, height, width in sizes]
    assert [source.shape for source in found] == [(8, 6, 3), (8, 6, 3), (5, 5, 3), (5, 7, 3)]
    files = [encoded(pixels_of("train", i)).getvalue() for i in range(2)]
    np.testing.assert_array_equal(found[3].read(range(2)).rows, decode(files, 5, 7, 3).rows)
    large = {"image": encoded(np.zeros((70, 65, 3), np.uint8)), "label": 0}
    write(tmp_path, "large", labelled(shape=(70, 65, 3)), {"train": [large]})
    assert load(tmp_path, "large", image_size=32).shape == (32, 32, 3)
    assert load(tmp_path, "large", image_size=70).shape == (70, 65, 3)


def test_corrupt_images_are_reported_not_dropped(tmp_path):
    records = [example("train", i) for i in range(6)]
    records[2]["image"] = io.BytesIO(records[2]["image"].getvalue()[:60])
    records[4]["image"] = io.BytesIO(b"no image")
    write(tmp_path, "broken", labelled(), {"train": records})
    source = load(tmp_path, "broken")
    assert len(source.items) == 6
    found = source.read(range(1, 6))
    assert sorted(found.unreadable) == [1, 3] and not found.rows[[1, 3]].any()
    assert all("0x" not in reason for reason in found.unreadable.values())
    for position in (0, 2, 4):
        np.testing.assert_array_equal(found.rows[position], pixels_of("train", position + 1))


def test_files_do_not_stay_open(tmp_path):
    """ImageNet has more files than a process may hold open."""
    write(tmp_path, "spread", labelled(), {"train": [example("train", i) for i in range(40)]}, shards=20)
    assert len(list(tmp_path.rglob("*array_record*"))) == 20
    before = len(os.listdir("/dev/fd"))
    source = load(tmp_path, "spread")
    np.testing.assert_array_equal(images_of(source)["train/33"], pixels_of("train", 33))
    assert len(os.listdir("/dev/fd")) == before


def test_nothing_needs_tensorflow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # to import it is an error
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    source = load_module.load(Data(source="tfds", dataset="named", holdout_split="validation"))
    pixels = source.read(range(len(source.items)))
    total = sum(int(pixels_of(split, i).sum()) for split, count in RECORDS.items() for i in range(count))
    assert (len(source.items), int(pixels.rows.sum()), len(pixels.unreadable)) == (60, total, 0)
