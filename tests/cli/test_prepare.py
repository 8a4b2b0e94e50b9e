"""Finding prepared data sets of TFDS, and `lmeraser prepare`, which writes them; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import pytest
import requests
import tensorflow_datasets as tf_datasets
from tfds_sets import KINDS, encoded, labelled, load, pixels_of, refusal, write, write_standard

from lmeraser_jax.cli import prepare
from lmeraser_jax.cli.main import main
from lmeraser_jax.config import Data
from lmeraser_jax.data import tfds, tfds_paths
from lmeraser_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """TFDS's data folder with the sets `plain` and `named`."""
    root = tmp_path_factory.mktemp("tfds")
    write_standard(root)
    return root


# folders
def test_sets_that_are_not_prepared_or_unknown_are_named(tmp_path, folder, monkeypatch):
    message = refusal(tmp_path, "cifar10")
    assert message == (
        f"--config.data.dataset=cifar10 is not prepared in {tmp_path}; prepare it with:"
        f" lmeraser prepare --dataset=cifar10 --data_dir={tmp_path}"
    )
    message = refusal(tmp_path, "cifar11")
    assert f"cifar11: TFDS has no such data set and {tmp_path} holds none; did you mean" in message
    assert "cifar10, " in message and "(TFDS knows " in message
    assert "did you mean cifar10," in refusal(tmp_path, "CIFAR10")
    assert "must be NAME, NAME/CONFIG or NAME/CONFIG:VERSION" in refusal(tmp_path, "../cifar10")
    assert "; prepared there: plain:1.2.0" in refusal(folder, "plain:2.0.0")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere; prepare it with: lmeraser prepare --dataset=cifar10$"):
        tfds.load(Data(source="tfds", dataset="cifar10"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert tfds.load(Data(source="tfds", dataset="plain")).name == "plain/1.2.0"


def test_the_newest_version_and_the_default_config_are_found(tmp_path):
    def prepared_set(*folders: str) -> Path:
        for name in folders:
            (tmp_path / name).mkdir(parents=True)
            for file in ("dataset_info.json", "features.json"):
                (tmp_path / name / file).write_text("{}")
        return tmp_path

    root = prepared_set("a/1.2.0", "a/1.10.0", "a/2.0.1", "b/x/1.0.0", "b/y.2/3.0.0", "a/incomplete.7A_3.0.0")
    found = {name: tfds_paths.find(name, str(root)) for name in ("a", "a:1.2.0", "a:1.*.*", "a:3.*.*", "b", "b/y.2")}
    assert {name: path and path.relative_to(root).as_posix() for name, path in found.items()} == {
        "a": "a/2.0.1",
        "a:1.2.0": "a/1.2.0",
        "a:1.*.*": "a/1.10.0",  # numbers, not texts
        "a:3.*.*": None,
        "b": None,  # which one?
        "b/y.2": "b/y.2/3.0.0",
    }
    (root / "b" / ".config").mkdir()
    (root / "b" / ".config" / "metadata.json").write_text('{"default_config_name": "x"}')
    assert tfds_paths.find("b", str(root)) == root / "b" / "x" / "1.0.0"
    with pytest.raises(UserError, match="prepared there: b/x:1.0.0, b/y.2:3.0.0"):
        tfds_paths.require("b/z", str(root))


def copied(folder: Path, target: Path) -> Path:
    """A copy of `plain` to damage."""
    return Path(shutil.copytree(folder / "plain", target / "plain")) / "1.2.0"


def test_other_file_formats_are_refused(tmp_path, folder, capsys):
    info = copied(folder, tmp_path) / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    message = refusal(tmp_path)
    assert f"{info.parent} keeps plain/1.2.0 as tfrecord, which cannot be read without TensorFlow" in message
    assert message.endswith("prepare it again as array_record with: lmeraser prepare --dataset=plain")
    assert main(["prepare", "--dataset=plain", f"--data_dir={tmp_path}"]) == 2
    assert "as tfrecord" in capsys.readouterr().err


def test_damaged_sets_are_refused_by_name(tmp_path, folder):
    home = copied(folder, tmp_path)
    shard = sorted(home.glob("plain-train*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    message = refusal(tmp_path)
    assert f"plain/1.2.0 in {home} cannot be read: " in message and "train[" in message
    assert message.endswith("prepare the data set again with: lmeraser prepare --dataset=plain")
    shard.unlink()
    assert f"plain/1.2.0 in {home} cannot be read: " in refusal(tmp_path)
    (home / "dataset_info.json").write_text("{")
    assert f"{home} holds no readable TFDS data set: ParseError" in refusal(tmp_path)


# lmeraser prepare
class LmeraserTinyShapes(tf_datasets.core.GeneratorBasedBuilder):
    """A registered set, as a user would have in a module of their own."""

    VERSION = tf_datasets.core.Version("1.0.0")
    BUILDER_CONFIGS = [tf_datasets.core.BuilderConfig(name=name) for name in ("small", "other")]

    def _info(self):
        kinds = KINDS.FeaturesDict(labelled(("square", "disc")))
        return tf_datasets.core.DatasetInfo(builder=self, features=kinds, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": encoded(pixels_of("shape", i)), "label": i % 2}


SHAPES = "lmeraser_tiny_shapes"


@pytest.fixture
def can_write(monkeypatch):
    """As if TensorFlow were installed: sets whose images are files already do not use it."""
    monkeypatch.setattr(prepare, "missing", list)


def files_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prepare_writes_and_then_changes_nothing(tmp_path, capsys, can_write, monkeypatch):
    arguments = ["prepare", f"--dataset={SHAPES}", f"--data_dir={tmp_path}"]
    assert main([*arguments, "--json=-"]) == 0
    home, name = tmp_path / SHAPES / "small" / "1.0.0", f"{SHAPES}/small"  # the default config is named from now on
    following = (
        f"lmeraser train --workdir=runs/{SHAPES}-small --config.data.source=tfds --config.data.dataset={name}"
        f" --config.data.path={tmp_path} --config.backbone.weights=FILE"
    )
    assert json.loads(capsys.readouterr().out) == {
        "dataset": f"{name}/1.0.0",
        "folder": str(home),
        "new": True,
        "splits": {"train": 6, "test": 2},
        "classes": ["square", "disc"],
        "next": following,
    }
    assert (home / f"{SHAPES}-train.array_record-00000-of-00001").is_file()
    source, before = load(tmp_path, SHAPES), files_in(tmp_path)
    found = {image.tobytes() for image in source.read(range(6)).rows}
    assert found == {pixels_of("shape", i).tobytes() for i in range(6)}
    monkeypatch.setattr(prepare, "missing", lambda: ["tensorflow"])  # not needed now
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name}/1.0.0 was prepared before, nothing changed: {home}",
        "  train               6 records",
        "  test                2 records",
        "  2 classes: square, disc",
        f"next: {following}",
    ]
    assert files_in(tmp_path) == before


def test_prepare_takes_the_public_set_of_the_config(tmp_path, capsys):
    examples = {"train": [{"image": encoded(pixels_of("train", 0))}]}
    write(tmp_path, "bare", {"image": KINDS.Image(shape=(8, 6, 3))}, examples, supervised=None)
    chosen = ["--config.public.source=tfds", f"--config.public.path={tmp_path}"]
    assert main(["prepare", *chosen, "--config.public.dataset=bare"]) == 0
    out = capsys.readouterr().out
    assert "0 classes: a public set for --config.pretraining.supervise=0" in out
    assert "next: lmeraser adapt --out=bare --config.public.source=tfds --config.public.dataset=bare" in out
    absent = ["adapt", *chosen, f"--config.backbone.weights={tmp_path}", f"--out={tmp_path}/out"]
    assert main(absent) == 2
    wanted = f"prepare it with: lmeraser prepare --dataset=imagenette/160px-v2 --data_dir={tmp_path}\n"
    assert capsys.readouterr().err.endswith(wanted)


def test_prepare_says_what_to_install_without_tensorflow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "NEEDED", ("json", "no_such_module", "no_such_other"))
    assert main(["prepare", "--dataset=cifar10", f"--data_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "error: writing cifar10 needs no_such_module and no_such_other: python -m pip install 'lmeraser_jax[prepare]'"
        " (reading it does not)\n"
    )
    assert not any(tmp_path.iterdir())


def test_prepare_refuses_names_configs_and_versions_that_do_not_exist(tmp_path, capsys, can_write):
    cases = [
        ("", "--dataset=NAME is missing"),
        ("cifar11", "--dataset=cifar11: TFDS has no such data set; did you mean"),
        ("cifar10/rotated", "--dataset=cifar10/rotated: cifar10 has no config rotated; it has none"),
        ("mnist_corrupted/nothing", "mnist_corrupted has no config nothing; it has identity, shot_noise,"),
        ("cifar10:1.0.0", "--dataset=cifar10:1.0.0 cannot be prepared: AssertionError: "),
        ("imdb_reviews", "imdb_reviews is no image classification set: it has no image"),
        ("a b", "--dataset=a b: must be NAME"),
    ]
    for dataset, message in cases:
        assert main(["prepare", f"--dataset={dataset}", f"--data_dir={tmp_path}"]) == 2
        assert message in capsys.readouterr().err, dataset
        assert not any(tmp_path.iterdir())


def test_prepare_reads_the_config(tmp_path, capsys, can_write):
    settings = [f"--config.data.{name}" for name in ("source=tfds", f"dataset={SHAPES}", f"path={tmp_path}")]
    assert main(["prepare", *settings]) == 0
    assert f"{SHAPES}/small/1.0.0 is prepared: {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("manual", ["", "Register at the museum,\n  then put scans.zip here."])
def test_prepare_without_a_network_says_what_to_do(tmp_path, capsys, can_write, monkeypatch, manual):
    def unreachable(self, dl_manager):
        raise requests.exceptions.ConnectionError("scans.example cannot\nbe found")

    monkeypatch.setattr(LmeraserTinyShapes, "_split_generators", unreachable)
    monkeypatch.setattr(LmeraserTinyShapes, "MANUAL_DOWNLOAD_INSTRUCTIONS", manual or None)
    assert main(["prepare", f"--dataset={SHAPES}", f"--data_dir={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    message = err[err.index("error: ") :].splitlines()
    assert message[0] == (
        f"error: {SHAPES} could not be prepared: ConnectionError: scans.example cannot be found;"
        f" run the same command again, downloads are kept in {tmp_path}"
    )
    assert message[2:] == (["  Register at the museum,", "  then put scans.zip here."] if manual else [])
    assert tfds_paths.find(SHAPES, str(tmp_path)) is None
