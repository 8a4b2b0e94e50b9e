"""Real photographs on a real ImageNet ViT-Tiny, where they lie beside the project; every experiment file loads."""

import importlib.util
import json

import pytest

from lmeraser_jax import config as settings
from lmeraser_jax import presets
from lmeraser_jax.cli.main import main
from lmeraser_jax.models import zoo

pytest.importorskip("ml_collections", reason="experiment files need ml_collections")


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


SMALL = ["digits", "digits:smoke", "npz", *(f"{data}_vit_tiny" for data in ("cifar10", "ham10000", "mnist"))]
PAPER = [
    f"{data}:{backbone}"
    for data in ("cifar10", "cifar100", "svhn", "gtsrb", "ham10000")
    for backbone in presets.BACKBONES
]


@pytest.mark.parametrize("name", [*SMALL, "cifar10_vit_tiny:single", *PAPER, "gtsrb:vit-b-22k,tfds", "cifar10:swin-t"])
def test_experiment_files_are_valid(name, request):
    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, request.config.rootpath / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.get_config(argument)
    if not tree.data.path and tree.data.source == "npz":
        tree.data.path = "mine.npz"
    if tree.backbone.name and not tree.backbone.weights:
        tree.backbone.weights = "hub"
    assert settings.from_dict(tree)
    assert not tree.backbone.name or zoo.entry(tree.backbone.name)
    assert "lmeraser train --config=configs/" in module.__doc__
    with pytest.raises(ValueError, match="argument"):
        module.get_config("nonsense")


def test_a_users_photographs_need_three_flags_and_unlearn_exactly(shared, capsys, tmp_path):
    """configs/npz.py with the data, the weights and an image size; the other flags only make it quick."""
    workdir = f"--workdir={tmp_path}/run"
    needed = [
        "--config=configs/npz.py",
        f"--config.data.path={shared}/data/cifar10_10k_2k.npz",
        f"--config.backbone.weights={shared}/weights/vit_tiny_patch16_224_imagenet1k.npz",
        "--config.data.image_size=32",
    ]
    quick = ["data.train_limit=240", "data.test_limit=40", "tuning.epochs=1", "tuning.min_steps=1"]
    quick += ["clustering.feature_batch=8", "inference.batch=8", "tuning.batch=8", "data.augment=paper"]
    assert main(["train", *needed, *(f"--config.{flag}" for flag in quick), workdir]) == 0
    assert main(["evaluate", workdir, f"--json={tmp_path}/e.json"]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["images"] == 40 and found["linear"] > 0.2, "the frozen features of a real backbone say something"
    assert main(["unlearn", workdir, "--records=train/17,train/101"]) == 0
    capsys.readouterr()
    assert main(["audit", workdir, "--sample=3"]) == 0
    assert capsys.readouterr().out.startswith("bit-identical: 3 of 3 slices")


def test_every_named_backbone_has_an_experiment():
    assert presets.BACKBONES + presets.OTHERS == tuple(zoo.ZOO)
