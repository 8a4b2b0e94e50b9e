"""Which features of a TFDS data set are its image, its label and its id; TFDS's own definitions of well-known sets."""

from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tf_datasets
from tfds_sets import KINDS, NAMES, encoded, example, labelled, load, pixels_of, refusal, write

from lmeraser_jax.data.source import problems


def test_which_feature_is_the_id(tmp_path):
    text = KINDS.Text()
    cases = (
        ({"id": text, "file_name": text}, lambda i: {"id": f"a{i}", "file_name": f"b{i}"}, "train/a3"),
        ({"id": KINDS.Scalar(np.int64)}, lambda i: {"id": 70 + i}, "train/73"),
        ({"image/filename": text}, lambda i: {"image/filename": f"d/é{i}.jpg"}, "train/d/é3.jpg"),
        ({"id": text, "name": text}, lambda i: {"id": "", "name": f"n{i}"}, "train/n3"),
        ({"name": text}, lambda i: {"name": f"species {i % 5}"}, "train/3"),  # it names no image
        ({"id": KINDS.ClassLabel(num_classes=9)}, lambda i: {"id": 8 - i}, "train/3"),
        ({"id": KINDS.Tensor(shape=(2,), dtype=np.int64)}, lambda i: {"id": [i, i]}, "train/3"),
    )
    for number, (more, values, name) in enumerate(cases):
        dataset = f"ids{number}"
        write(tmp_path, dataset, labelled(**more), {"train": [example("train", i, **values(i)) for i in range(6)]})
        whole, cut = load(tmp_path, dataset), load(tmp_path, dataset, train_split="train[3:4]")
        assert whole.items[3].id == name == cut.items[0].id and problems(whole) == []


def test_which_features_are_image_and_label(tmp_path):
    kinds = {"photo": KINDS.Image(shape=(8, 6, 3)), "mask": KINDS.LabeledImage(shape=(8, 6, 1), labels=2)}
    mask = encoded(np.zeros((8, 6, 1), np.uint8))

    def made(i: int, **labels: int) -> dict[str, Any]:
        return {"photo": encoded(pixels_of("train", i)), "mask": mask, **labels}

    two = {"fine": KINDS.ClassLabel(names=NAMES), "coarse": KINDS.ClassLabel(num_classes=2)}
    records = {"train": [made(i, fine=i % 3, coarse=i % 2) for i in range(4)]}
    write(tmp_path, "told", kinds | two, records, supervised=("photo", "coarse"))
    source = load(tmp_path, "told")
    assert source.class_names == ("0", "1") and [item.label for item in source.items] == [0, 1, 0, 1]
    np.testing.assert_array_equal(source.read(range(1, 2)).rows[0], pixels_of("train", 1))
    write(tmp_path, "untold", kinds | two, records, supervised=None)
    assert refusal(tmp_path, "untold") == (
        "untold/1.2.0 is no image classification set: it has several features of the kind class label, none the main"
        " one; its features: coarse (ClassLabel), fine (ClassLabel), mask (LabeledImage), photo (Image)"
    )
    single = {"train": [made(i, fine=i % 3) for i in range(4)]}
    write(tmp_path, "single", kinds | {"fine": two["fine"]}, single, supervised=None)
    assert load(tmp_path, "single").class_names == NAMES


def test_other_kinds_of_sets_are_refused(tmp_path):
    text = {"text": KINDS.Text(), "label": KINDS.ClassLabel(names=NAMES)}
    write(tmp_path, "words", text, {"train": [{"text": "a", "label": 0}]}, supervised=("text", "label"))
    message = refusal(tmp_path, "words")
    assert "words/1.2.0 is no image classification set: it has no image;" in message and "text (Text)" in message
    boxes = {"image": KINDS.Image(shape=(8, 6, 3)), "mass": KINDS.Scalar(np.float32)}
    write(tmp_path, "weights", boxes, {"train": [{"image": encoded(pixels_of("a", 1)), "mass": 1.0}]}, supervised=None)
    assert "it has no class label; its features: image (Image), mass (Scalar)" in refusal(tmp_path, "weights")
    deep = labelled() | {"image": KINDS.Image(shape=(8, 6, 1), dtype=np.uint16, encoding_format="png")}
    write(tmp_path, "deep", deep, {"train": [example("train", 1)]})
    assert "its images (feature image) are uint16 [8, 6, 1]; uint8" in refusal(tmp_path, "deep")


# TFDS's own definitions
REAL = {
    "cifar10": ("id", (32, 32, 3)),
    "cifar100": ("id", (32, 32, 3)),
    "svhn_cropped": ("id", (32, 32, 3)),
    "mnist": ("", (28, 28, 1)),
    "visual_domain_decathlon/gtsrb": ("name", (None, None, 3)),
    "stanford_dogs": ("image/filename", (None, None, 3)),
    "imagenet2012": ("file_name", (None, None, 3)),
}


@pytest.mark.parametrize("dataset", REAL)
def test_well_known_sets_load_as_tfds_declares_them(tmp_path, dataset):
    """Their features with pixels of ours; what is no feature of a set is left out."""
    key, shape = REAL[dataset]
    info, size = tf_datasets.builder(dataset, data_dir=str(tmp_path)).info, [side or 20 for side in shape]

    def record(split: str, i: int) -> dict[str, Any]:
        label = -1 if split == "hidden" else i
        values = {"image": encoded(pixels_of(split, i, size)), "label": label, key: f"{i}.x", "coarse_label": 1}
        return {name: (values | {"objects": []})[name] for name in info.features}

    records = {split: [record(split, i) for i in range(4)] for split in ("train", "test", "hidden")}
    write(tmp_path, "copy", info.features, records, supervised=info.supervised_keys)
    source = load(tmp_path, "copy", image_size=20)
    assert source.class_names == tuple(info.features["label"].names) and source.shape == tuple(size)
    wanted = [(f"{split}/{i}{'.x' if key else ''}", split, i) for split in ("train", "test") for i in range(4)]
    assert [tuple(item[:3]) for item in source.items] == wanted and problems(source) == []
    for item, image in zip(source.items, source.read(range(8)).rows, strict=True):
        np.testing.assert_array_equal(image, pixels_of(item.split, item.label, size))
    assert "hides labels of its split hidden" in refusal(tmp_path, "copy", test_split="hidden")
