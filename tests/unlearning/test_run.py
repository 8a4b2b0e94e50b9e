"""What the records of a workdir were made with stays as it is: every such setting is refused when it changes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config
from PIL import Image

from lmeraser_jax.config import Config, Data, from_dict
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import Imported, import_settings
from lmeraser_jax.storage.workdir import Layout, read_config
from lmeraser_jax.unlearning.run import prepare_run

CHANGES = {"source": "npz", "dataset": "cifar10", "split_by": "owner", "owner_pattern": "(a)", "limit_by": "class"}
CHANGES |= {"train_split": "test", "holdout_split": "test", "test_split": "public", "public_split": "test"}
CHANGES |= {"test_share": 0.1, "holdout": 0.1, "csv_columns": "a,b", "store_size": 9, "store_width": 9}
CHANGES |= {"train_limit": 5, "test_limit": 5}
PLACES = {"path", "labels"}  # what lies there binds
FREE = {"skip_unreadable", "max_pixels", "image_size", "resize_size", "augment"}  # change no record and no stored pixel


def test_every_setting_that_makes_the_records_binds(tmp_path, rng):
    """Any of them changed on a workdir that has images is refused by name; a new setting has to be sorted in here."""
    assert {field.name for field in dataclasses.fields(Data)} == {*CHANGES, *FREE, *PLACES}
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
        message = rf"(?s)the import in .* was made with another config.*data\.{name}: "
        with pytest.raises(UserError, match=message), prepare_run(tmp_path / "run", with_data(**{name: value})):
            pass
    weights = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights="x.safetensors"))
    with pytest.raises(UserError, match=r"backbone.weights: '' -> "), prepare_run(tmp_path / "run", weights):
        pass
    free = with_data(skip_unreadable=True, max_pixels=10_000, augment="flip")
    with prepare_run(tmp_path / "run", free, reimport=True) as (_, imported):
        assert imported == Imported(0, 4, 0, 0)


def test_data_bind_wherever_they_lie(tmp_path, rng, monkeypatch):
    """The same images under any path are the same data; other images are refused, and the workdir keeps its place."""
    images = {f"{split}_images": rng.integers(0, 256, (8, 4, 4), np.uint8) for split in ("train", "test", "public")}
    labels = {f"{split}_labels": np.arange(8) % 2 for split in ("train", "test", "public")}
    names = {"train_ids": np.array([f"r{i}" for i in range(8)]), "train_owners": np.array([*"aabbccdd"])}
    monkeypatch.chdir(tmp_path)

    def write(name, **changes):
        np.savez(name, **images | labels | names | changes)

    def opened(path, reimport=False):
        data = dataclasses.replace(base.data, path=path)
        with prepare_run("run", dataclasses.replace(base, data=data), reimport=reimport) as (run, imported):
            return run.config.data.path, imported

    write("a.npz")
    Path("link.npz").symlink_to("a.npz")
    base = small_config(data__source="npz", data__path="a.npz", clustering__sample_size=2, clustering__cut="auto:2")
    for path in ("a.npz", "./a.npz", f"{tmp_path}/a.npz", "link.npz", "../" + tmp_path.name + "/a.npz"):
        assert opened(path)[1] == (Imported(24, 0, 0, 0) if path == "a.npz" else None), path
    fewer = {key: value[:7] for key, value in (images | labels | names).items() if key.startswith("train")}
    write("b.npz", **fewer)  # whoever deletes the file of an erased record keeps the data
    note = "1 live records are not there; they stay until unlearn: r7"
    assert opened("b.npz") == (f"{tmp_path}/b.npz", Imported(0, 23, 0, 0, notes=(note,)))
    more = {"train_ids": np.array([f"r{i}" for i in range(1, 9)]), "train_owners": np.array([*"abbccddx"])}
    more |= {key: np.roll((images | labels)[key], -1, 0) for key in ("train_images", "train_labels")}
    for changes, message in (
        ({"train_images": 255 - images["train_images"]}, "have another content or label"),
        ({"train_labels": 1 - labels["train_labels"]}, "have another content or label"),
        ({"train_ids": np.array([f"x{i}" for i in range(8)])}, "holds no training record of the workdir"),
        ({"train_owners": np.array([*"aabbccdx"])}, "another owner than in the workdir: r7"),
        (more, "1 records are not in the workdir: r8; --reimport adds them"),
    ):
        write("c.npz", **changes)
        with pytest.raises(UserError, match=message):
            opened("c.npz")
        assert read_config(Layout("run"))["data"]["path"] == f"{tmp_path}/b.npz", message
    assert opened("c.npz", reimport=True) == (f"{tmp_path}/c.npz", Imported(1, 23, 0, 1))
    Path("c.npz").rename("d.npz")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with prepare_run("../run", from_dict(read_config(Layout("../run")))) as (_, imported):
        assert imported is None, "an absolute path was noted, and nothing has to be read again"


def test_the_seed_binds_where_it_chose_records():
    for share, binds in (({}, False), ({"test_share": 0.1}, True), ({"holdout": 0.1}, True)):
        settings = [import_settings(Config(seed=seed, data=Data(**share))) for seed in (0, 1)]
        assert (settings[0] != settings[1]) == binds


def test_a_stored_size_given_or_implied_is_the_same():
    def stored(**sizes):
        return import_settings(Config(data=Data(source="folder", path="x", **sizes)))

    assert stored(image_size=16) == stored(image_size=16, store_size=16) == stored(image_size=8, store_size=16)
    assert stored(store_size=12) == stored(store_size=12, store_width=12) != stored(store_size=12, store_width=16)
