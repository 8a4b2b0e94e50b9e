"""What the records of a workdir were made with stays as it is: every such setting is refused when it changes."""

import dataclasses

import numpy as np
import pytest
from helpers import small_config
from PIL import Image

from lmeraser_jax.config import Config, Data
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import Imported, import_settings
from lmeraser_jax.unlearning.run import prepare_run

CHANGES = {
    "source": "npz",
    "path": "elsewhere",
    "dataset": "cifar10",
    "train_split": "test",
    "holdout_split": "test",
    "test_split": "public",
    "public_split": "test",
    "test_share": 0.1,
    "holdout": 0.1,
    "split_by": "owner",
    "owner_pattern": "(a)",
    "labels": "labels.csv",
    "csv_columns": "a,b",
    "store_size": 9,
    "store_width": 9,
    "train_limit": 5,
    "test_limit": 5,
}
FREE = {"skip_unreadable", "max_pixels", "image_size", "resize_size", "augment"}  # change no record and no stored pixel


def test_every_setting_that_makes_the_records_binds(tmp_path, rng):
    """Any of them changed on a workdir that has images is refused by name; a new setting has to be sorted in here."""
    assert {field.name for field in dataclasses.fields(Data)} == {*CHANGES, *FREE}
    for name in ("train/a/0.png", "train/b/1.png", "test/a/2.png", "public/b/3.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / name)
    images = {"data__source": "folder", "data__path": str(tmp_path / "images"), "data__store_size": 8}
    config = small_config(**images, clustering__sample_size=2, clustering__cut="auto:2")
    with prepare_run(tmp_path / "run", config):
        pass

    def with_data(**settings):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **settings))

    for name, value in CHANGES.items():
        message = rf"(?s)the images in .* was made with another config.*data\.{name}: "
        with pytest.raises(UserError, match=message), prepare_run(tmp_path / "run", with_data(**{name: value})):
            pass
    free = with_data(skip_unreadable=True, max_pixels=10_000, augment="flip")
    with prepare_run(tmp_path / "run", free, reimport=True) as (_, imported):
        assert imported == Imported(0, 4, 0, 0)


def test_the_seed_binds_where_it_chose_records():
    for share, binds in (({}, False), ({"test_share": 0.1}, True), ({"holdout": 0.1}, True)):
        settings = [import_settings(Config(seed=seed, data=Data(**share))) for seed in (0, 1)]
        assert (settings[0] != settings[1]) == binds


def test_a_stored_size_given_or_implied_is_the_same():
    def stored(**sizes):
        return import_settings(Config(data=Data(source="folder", path="x", **sizes)))

    assert stored(image_size=16) == stored(image_size=16, store_size=16) == stored(image_size=8, store_size=16)
    assert stored(store_size=12) == stored(store_size=12, store_width=12) != stored(store_size=12, store_width=16)
