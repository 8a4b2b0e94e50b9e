"""Small data sets, really written as array_record files by TFDS itself, for the tests."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tf_datasets
from PIL import Image

from lmeraser_jax.config import Data
from lmeraser_jax.data import tfds
from lmeraser_jax.data.source import Source
from lmeraser_jax.errors import UserError

tf_datasets.disable_progress_bar()
KINDS = tf_datasets.features
NAMES = ("ant", "bee", "cat")
RECORDS = {"train": 40, "test": 12, "validation": 8}


class Written(tf_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of given features and examples; `Image` examples are given as encoded bytes."""

    VERSION = tf_datasets.core.Version("1.2.0")

    def __init__(self, name: str, features: Mapping[str, Any], examples: Mapping[str, Sequence[Any]], **kwargs: Any):
        self.name, self.given, self.examples = name, features, examples
        self.keys = kwargs.pop("supervised", ("image", "label"))
        super().__init__(**kwargs)

    def _info(self):
        kinds = KINDS.FeaturesDict(dict(self.given))
        return tf_datasets.core.DatasetInfo(
            builder=self, features=kinds, supervised_keys=self.keys, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: enumerate(examples) for split, examples in self.examples.items()}

    def _generate_examples(self):
        raise AssertionError("not called: the splits are given")


def write(root: Path, name: str, features: Mapping[str, Any], examples: Mapping[str, Any], shards=1, **kwargs) -> Path:
    """Writes a data set in order; returns its folder."""
    builder = Written(name, features, examples, data_dir=str(root), **kwargs)
    options = tf_datasets.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record", download_config=options)
    return Path(builder.data_dir)


def encoded(pixels: np.ndarray, form: str = "PNG") -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, form)
    return io.BytesIO(buffer.getvalue())


def pixels_of(split: str, index: int, shape=(8, 6, 3)) -> np.ndarray:
    return np.random.default_rng([len(split), index]).integers(0, 256, shape, np.uint8)


def labelled(names=NAMES, shape=(8, 6, 3), **more) -> dict[str, Any]:
    return {"image": KINDS.Image(shape=shape), "label": KINDS.ClassLabel(names=list(names)), **more}


def example(split: str, index: int, **more) -> dict[str, Any]:
    return {"image": encoded(pixels_of(split, index)), "label": index % 3, **more}


def write_standard(root: Path) -> None:
    """`plain` (no ids, three shards) and `named` (an id of its own, the same in all splits)."""
    plain = {split: [example(split, i) for i in range(count)] for split, count in RECORDS.items()}
    write(root, "plain", labelled(), plain, shards=3)
    named = {split: [example(split, i, id=f"img_{i}") for i in range(count)] for split, count in RECORDS.items()}
    write(root, "named", labelled(id=KINDS.Text()), named)


def data_of(folder: Path, dataset: str = "plain", **settings: Any) -> Data:
    return Data(source="tfds", dataset=dataset, path=str(folder), **settings)


def load(folder: Path, dataset: str = "plain", **settings: Any) -> Source:
    return tfds.load(data_of(folder, dataset, **settings))


def refusal(folder: Path, dataset: str = "plain", **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, dataset, **settings)
    return str(caught.value)
