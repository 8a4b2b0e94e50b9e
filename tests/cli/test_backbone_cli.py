"""lmeraser backbone: what it writes is the backbone that the original weights give, at every image size."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from commands import call, refused
from published import SWIN, VIT, hub_folder, hugging_face_swin, hugging_face_vit, settings_of

from lmeraser_jax.cli.main import main
from lmeraser_jax.config import Backbone
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, zoo
from lmeraser_jax.storage.checkpoints import flatten


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = hub_folder(tmp_path_factory.mktemp("original"), hugging_face_vit(prefix="vit."), settings_of(VIT))
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, original) -> Path:
    """The original converted by the command at the size it was published for."""
    folder = tmp_path_factory.mktemp("written") / "deep" / "vit"
    assert main(["backbone", f"--weights={original}", f"--out={folder}"]) == 0
    return folder


def load(path: Path, image_size: int = 0, **chosen) -> backbone_lib.Backbone:
    return convert.load(Backbone(weights=str(path), **chosen), image_size)[0]


def test_the_folder_gives_what_the_original_gives_and_is_a_saved_backbone(original, written):
    sizes = [{"image_size": size} for size in (0, 16, 24, 8)]
    for chosen in (*sizes, {"feature": "cls"}, {"feature": "pooler"}, {"mean": "0.7", "std": "1,2,3"}):
        assert load(written, **chosen).digest == load(original, **chosen).digest, chosen
    backbone, inputs = backbone_lib.load(written)
    assert backbone.digest == load(original).digest
    assert inputs["backbone"]["weights"] == str(original) and inputs["image_size"] == 0


def test_a_folder_written_for_another_size(capsys, tmp_path, original):
    """It holds what the original gives at that size; at a third one positions would be interpolated twice."""
    out = tmp_path / "at24"
    assert call(capsys, "backbone", f"--weights={original}", f"--out={out}", "--image_size=24")[0] == 0
    assert load(out).digest == load(out, 24).digest == load(original, 24).digest
    with pytest.raises(UserError, match="was converted for 24 px from weights for 16 px; convert the original for 40"):
        load(out, 40)
    again = tmp_path / "again"  # a folder made from the folder knows where it comes from
    assert call(capsys, "backbone", f"--weights={out}", f"--out={again}")[0] == 0
    with pytest.raises(UserError, match="from weights for 16 px"):
        load(again, 40)


def test_a_normalisation_chosen_at_conversion_stays(capsys, tmp_path, original, monkeypatch):
    """A name gives way to it, and flags still win."""
    out = tmp_path / "out"
    flags = ("--config.backbone.mean=0.3", "--config.backbone.std=0.2,0.3,0.4")
    assert call(capsys, "backbone", f"--weights={original}", f"--out={out}", *flags)[0] == 0
    entry = dataclasses.replace(zoo.ZOO["vit-b-22k"], architecture=load(original).config)
    monkeypatch.setitem(zoo.ZOO, "vit-b-22k", entry)
    named = Backbone(name="vit-b-22k", weights=str(out))
    assert convert.load(named)[0].mean == (0.3,) and convert.load(named)[0].std == (0.2, 0.3, 0.4)
    assert convert.load(dataclasses.replace(named, mean="0.7"))[0].mean == (0.7,)
    assert convert.load(dataclasses.replace(named, weights=str(original)))[0].mean == zoo.HALF[0]


def test_swin_is_the_same_at_every_size(capsys, tmp_path):
    original = hub_folder(tmp_path / "swin", hugging_face_swin(prefix="swin."), settings_of(SWIN))
    assert call(capsys, "backbone", f"--weights={original}", f"--out={tmp_path / 'out'}", "--image_size=24")[0] == 0
    for size in (24, 32, 8):
        assert load(tmp_path / "out", size).digest == load(original, size).digest


def test_architecture_digest_and_source_are_printed(capsys, tmp_path, original):
    code, out, err = call(
        capsys, "backbone", f"--weights={original}", f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'v.json'}"
    )
    assert (code, err) == (0, "")
    backbone = load(original)
    count = sum(leaf.size for leaf in flatten(backbone.params).values())
    values = json.loads((tmp_path / "v.json").read_text())
    assert values["parameters"] == count and f"{count:,}" in out
    assert values["digest"] == backbone.digest and backbone.digest in out
    assert (values["feature"], values["feature_size"]) == ("pooler", 16) and "pooler, 16 numbers" in out
    assert values["architecture"]["family"] == "vit" and values["architecture"]["heads"] == 2
    assert (values["mean"], values["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert values["source_origin"] == "Hugging Face ViT" and values["source_origin"] in out
    assert values["source_left_out"] == ["head/bias", "head/kernel"] and "head/kernel" in out
    sha256 = hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    assert values["source_sha256"] == sha256 and sha256[:12] in out
    assert f"--config.backbone.weights={tmp_path / 'out'}" in out


def test_settings_of_the_config_and_flags_go_together(capsys, tmp_path, original):
    out = tmp_path / "out"
    flags = (f"--config.backbone.weights={original}", "--config.backbone.feature=cls", f"--out={out}", "--json=-")
    code, text, _ = call(capsys, "backbone", *flags)
    assert code == 0 and load(out).config.feature == "cls" and json.loads(text)["digest"] == load(out).digest


def test_the_weights_must_be_of_the_named_backbone(capsys, tmp_path, monkeypatch, original):
    assert "is not vit-b-22k" in refused(
        capsys, "backbone", f"--weights={original}", "--name=vit-b-22k", f"--out={tmp_path}/o"
    )
    assert not (tmp_path / "o").exists()
    entry = dataclasses.replace(zoo.ZOO["vit-b-22k"], architecture=VIT)
    monkeypatch.setitem(zoo.ZOO, "vit-b-22k", entry)
    code, _, _ = call(capsys, "backbone", f"--weights={original}", "--name=vit-b-22k", f"--out={tmp_path}/o")
    assert code == 0 and load(tmp_path / "o").mean == (0.5, 0.5, 0.5)


def test_the_list_names_every_backbone(capsys):
    code, out, err = call(capsys, "backbone", "--list")
    assert (code, err) == (0, "")
    for name, entry in zoo.ZOO.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert entry.hub in line and entry.architecture.feature in line and entry.about in line
    code, out, _ = call(capsys, "backbone", "--list", "--json=-")
    rows = json.loads(out)
    assert code == 0 and rows.keys() == zoo.ZOO.keys()
    assert rows["vit-b-22k"]["revision"] == zoo.ZOO["vit-b-22k"].revision and rows["swin-t"]["licence"]


# -- what a user can get wrong --


def test_missing_flags_are_named(capsys, tmp_path, original):
    assert "--out=DIR is missing" in refused(capsys, "backbone", f"--weights={original}")
    assert "--weights is missing" in refused(capsys, "backbone", f"--out={tmp_path}/o")
    message = refused(capsys, "backbone", f"--out={tmp_path}/o", "--name=swin-b-22k")
    assert "--weights is missing" in message and zoo.ZOO["swin-b-22k"].hub in message
    assert "--out=DIR is missing" in refused(capsys, "backbone")


def test_a_folder_that_exists_is_not_written_over(capsys, tmp_path, original):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        assert f"--out={tmp_path / name} exists already" in refused(
            capsys, "backbone", f"--weights={original}", f"--out={tmp_path / name}"
        )
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert call(capsys, "backbone", f"--weights={original}", f"--out={tmp_path / 'empty'}")[0] == 0


def test_weights_sizes_and_settings_that_cannot_be(capsys, tmp_path, original):
    cases = [
        (["--weights=absent"], "no such file or folder"),
        (["--weights=absent", "--name=vit-b-1k"], "google/vit-base-patch16-224"),
        (["--weights=absent", "--name=vit-b-1"], "unknown; did you mean vit-b-1k?"),
        (["--image_size=17"], "must be a multiple of the patch size 4"),
        (["--image_size=-1"], "image_size"),
        (["--image_size=x"], "image_size"),
        (["--config.backbone.feature=x"], "auto, cls, pooler"),
        (["--config.backbone.mean=x"], "one number or three"),
        (["stray"], "name them as --weights=FILE_OR_FOLDER"),
        (["--nmae=vit-s"], "nmae"),
    ]
    for arguments, message in cases:
        given = any(argument.startswith("--weights") for argument in arguments)
        weights = [] if given else [f"--weights={original}"]
        assert message in refused(capsys, "backbone", *weights, f"--out={tmp_path}/o", *arguments), arguments
        assert not (tmp_path / "o").exists()
