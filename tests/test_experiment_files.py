"""Experiment files: each is valid with each of its arguments, and the command line loads it from any folder."""

import importlib
import sys
from pathlib import Path

import pytest

from configs import common
from lmeraser_jax import config as settings
from lmeraser_jax.cli.main import main
from lmeraser_jax.models import zoo

SMALL = ["digits", "digits:smoke", "npz", "cifar10_vit_tiny:single", "adapt_vit_tiny", "tofu_656k"]
SMALL += [f"{data}_vit_tiny{argument}" for data in ("cifar10", "ham10000", "mnist") for argument in ("", ":frugal")]
SMALL += [
    "tofu_260k",
    "tofu_smollm2",
    *(f"{d}{arg}" for d in ("tallrec_book", "movielens") for arg in ("", ":smollm2")),
]
PAPER = [f"{data}:{b}" for data in ("cifar10", "cifar100", "svhn", "gtsrb", "ham10000") for b in common.BACKBONES]


def test_every_experiment_file_is_valid_with_each_of_its_arguments():
    for name in (*SMALL, *PAPER, "gtsrb:vit-b-22k,tfds", "cifar10:swin-t"):
        file, _, argument = name.partition(":")
        module = importlib.import_module(f"configs.{file}")
        tree = module.get_config(argument)
        if not tree.data.path and tree.data.source == "npz":
            tree.data.path = "mine.npz"
        if tree.backbone.name and not tree.backbone.weights:
            tree.backbone.weights = "hub"
        config = settings.from_dict(tree)
        assert not config.backbone.name or zoo.entry(config.backbone.name), name
        for path in (config.data.path, config.backbone.weights, config.data.labels):
            inside = path in ("", "hub") or Path(path).is_relative_to(Path.cwd())
            assert inside, f"{name} looks outside of the current folder"
        assert "lmeraser train --config=configs/" in (module.__doc__ or ""), name
        with pytest.raises(ValueError, match="argument"):
            module.get_config("nonsense")


def test_every_named_backbone_has_an_experiment():
    assert common.BACKBONES + common.OTHER_BACKBONES == tuple(zoo.ZOO)


def test_an_experiment_file_loads_from_any_current_folder(tmp_path, monkeypatch, capsys, request):
    """The project's folder is taken off the module path, as for an installed command that is started elsewhere."""
    root = request.config.rootpath
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".", str(root))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("configs.common")
    flags = [f"--config={root}/configs/cifar10_vit_tiny.py:frugal", "--config.tuning.lanes=0", "--workdir=w"]
    assert main(["train", *flags]) == 2
    assert "--config.tuning.lanes=0: must be at least 1" in capsys.readouterr().err
