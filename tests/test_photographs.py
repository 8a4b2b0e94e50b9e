"""Real photographs on a real ImageNet ViT-Tiny, where they lie beside the project."""

import json

import pytest

from lmeraser_jax.cli.main import main


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.slow
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
    capsys.readouterr()
    assert main(["inspect", workdir, "--records"]) == 0
    first, second, *_ = (line.split()[0] for line in capsys.readouterr().out.splitlines())
    assert main(["unlearn", workdir, f"--records={first}", f"--records={second}"]) == 0
    capsys.readouterr()
    assert main(["audit", workdir, "--sample=3"]) == 0
    assert capsys.readouterr().out.startswith("bit-identical: 3 of 3 slices")
