"""Public adaptation of a small ViT: what it learns, what it leaves out, and that it can be stopped anywhere."""

import contextlib
import dataclasses
import functools
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tfds_sets
from flax import nnx
from PIL import Image

from lmeraser_jax import config as settings
from lmeraser_jax import interrupt
from lmeraser_jax.cli.main import main
from lmeraser_jax.data import load as sources
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import adapt, convert, pretrain, public_sets
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.models.vit import ViT, ViTConfig
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.train_step import mesh_of

SIZE, CLASSES = 8, 3  # of the adapted backbone's images; the weights are for images twice as large
MESH = mesh_of(jax.devices()[:1])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a published backbone for images of 16 pixels."""
    config = ViTConfig(image_size=2 * SIZE, patch=4, width=16, depth=1, heads=2, mlp=32, channels=3)
    params = nnx.to_pure_dict(nnx.split(ViT(config, nnx.Rngs(7)))[1])
    folder = tmp_path_factory.mktemp("weights") / "published"
    backbone_lib.save(folder, backbone_lib.make(config, params, (0.5,), (0.5,)), {}, {"origin": "the test"})
    return folder


@pytest.fixture(scope="module")
def public():
    """Images of three brightnesses, 90 of each, at the size of the weights."""
    noise = np.random.default_rng(0).integers(-40, 40, (270, 2 * SIZE, 2 * SIZE, 3))
    labels = np.arange(270, dtype=np.int32) % CLASSES
    return PublicSet((noise + 60 + 70 * labels[:, None, None, None]).astype(np.uint8), labels, CLASSES)


def config_with(weights, **pretraining):
    options = {"start": "weights", "epochs": 3, "batch": 16, "rate": 3e-3, "checkpoint_epochs": 100, "augment": "none"}
    return settings.Config(
        data=settings.Data(image_size=SIZE),
        backbone=settings.Backbone(weights=str(weights)),
        pretraining=settings.Pretraining(**options | pretraining),
    )


def features_of(backbone, pixels):
    return jax.jit(functools.partial(backbone_lib.features, backbone.config))(backbone.params, pixels)


def distance(weights, public, backbone):
    """Mean squared distance from the weights' own features at their own size, in units of their deviation."""
    teacher, _ = convert.load(settings.Backbone(weights=str(weights)))

    def features(of):
        size = of.config.image_size
        pixels = public.images / np.float32(127.5) - 1
        pixels = pixels.reshape(len(pixels), size, 2 * SIZE // size, size, 2 * SIZE // size, 3).mean((2, 4))
        return np.asarray(features_of(of, pixels.astype(np.float32)))

    target = features(teacher)
    return float(np.mean(((features(backbone) - target) / target.std(0, keepdims=True)) ** 2))


def test_labels_and_features_are_learned(tmp_path, weights, public):
    published, _ = convert.load(settings.Backbone(weights=str(weights)), SIZE)
    by_labels, facts, accuracy = adapt.adapt(tmp_path / "a", public, config_with(weights), MESH)
    assert accuracy > 0.9 and facts["adapted"]["images"] == 270 and by_labels.config == published.config
    by_features, *_ = adapt.adapt(
        tmp_path / "b", public, config_with(weights, supervise=0.0, distill=1.0, epochs=6), MESH
    )
    before, after = (distance(weights, public, each) for each in (published, by_features))
    assert after < 0.7 * before and distance(weights, public, by_labels) > after
    assert len({published.digest, by_labels.digest, by_features.digest}) == 3


def test_the_first_gradient_is_that_of_a_literal_loss(tmp_path, weights, public, monkeypatch):
    """One step of gradient descent, in the place of AdamW, over the whole set: parameters move by the gradient."""
    monkeypatch.setattr(pretrain, "optimizer", lambda *_: optax.sgd(1.0))
    config = config_with(weights, supervise=0.7, distill=0.3, epochs=1, batch=270)
    moved, *_ = adapt.adapt(tmp_path / "a", public, config, MESH)
    published, _ = convert.load(config.backbone, SIZE)
    teacher, _ = convert.load(config.backbone)
    pixels = (public.images / np.float32(127.5) - 1).astype(np.float32)
    small = centred(public.images, pretrain.image_spec(config, (16, 16, 3), 3, (0.5,), (0.5,)))
    target = np.asarray(features_of(teacher, pixels))
    deviation = target.std(0, keepdims=True)

    def loss(params):
        features = backbone_lib.features(published.config, params, small)
        away = jnp.mean(((features - target) / deviation) ** 2)
        return 0.7 * jnp.log(CLASSES) + 0.3 * away  # a head of zeros gives the backbone no gradient

    gradient = flatten(jax.jit(jax.grad(loss))(published.params))
    for name, leaf in flatten(moved.params).items():
        np.testing.assert_allclose(leaf, flatten(published.params)[name] - gradient[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_an_adaptation_that_is_stopped_anywhere_goes_on_bit_for_bit(tmp_path, weights, public, monkeypatch):
    monkeypatch.setattr(pretrain, "CALL_STEPS", 9)  # 17 steps an epoch: two calls
    config = config_with(weights, distill=0.3, epochs=2)
    whole, facts, accuracy = adapt.adapt(tmp_path / "whole", public, config, MESH)
    interrupt.request_stop()
    with pytest.raises(interrupt.Stopped):  # before the features of the published weights are there
        adapt.adapt(tmp_path / "stopped", public, config, MESH)
    shutil.copytree(tmp_path / "whole" / "features", tmp_path / "stopped" / "features")
    stops, resumed = 0, None
    while resumed is None:
        with contextlib.suppress(interrupt.Stopped):
            resumed = adapt.adapt(tmp_path / "stopped", public, config, MESH)
        stops += resumed is None
    interrupt._requested.clear()
    assert stops == 2 * 2 - 1 and resumed[0].digest == whole.digest and resumed[1:] == (facts, accuracy)


@pytest.fixture(scope="module")
def files(tmp_path_factory, public):
    """Two .npz: the public set, and private data of which a training and a test image are in the public set too."""
    folder, other = tmp_path_factory.mktemp("files"), np.random.default_rng(1)
    np.savez(folder / "public.npz", train_images=public.images, train_labels=public.labels)
    private = other.integers(0, 256, (12, 2 * SIZE, 2 * SIZE, 3)).astype(np.uint8)
    private[3], private[10] = public.images[5], public.images[9]
    labels = np.arange(12) % 2
    arrays = {"train_images": private[:8], "train_labels": labels[:8], "test_images": private[8:]}
    np.savez(folder / "private.npz", test_labels=labels[8:], **arrays)
    return folder


def test_the_command_and_a_workdir_make_the_same_backbone_without_private_images(
    tmp_path, weights, public, files, capsys
):
    given = {"public.source": "npz", "public.path": files / "public.npz", "backbone.weights": weights}
    given |= {"data.source": "npz", "data.path": files / "private.npz", "data.image_size": SIZE}
    given |= {"clustering.sample_size": 4, "clustering.cut": "auto:2", "pretraining.epochs": 1}
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    assert main(["adapt", *flags, f"--out={tmp_path}/adapted"]) == 0
    out, err = capsys.readouterr()
    assert "2 public images are private or test images too; left out: train/5, train/9" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapted"], "no checkpoint is left"
    adapted, _ = convert.load(settings.Backbone(weights=f"{tmp_path}/adapted"), SIZE)
    record = checkpoints.load(tmp_path / "adapted")[1]["provenance"]["adapted"]
    assert record["images"] == len(public.images) - 2, "they are not trained on"
    assert adapted.digest in out
    assert main(["pretrain", *flags, "--config.pretraining.start=weights", f"--workdir={tmp_path}/run"]) == 0
    assert not (tmp_path / "run" / "pretraining").exists()
    assert backbone_lib.load(tmp_path / "run" / "backbone")[0].digest == adapted.digest
    assert main(["pretrain", "--config.pretraining.epochs=2", f"--workdir={tmp_path}/run"]) == 2
    assert "pretraining.epochs: 1 -> 2" in capsys.readouterr().err


COMMAND = """
import os, signal, sys
from lmeraser_jax.models import pretrain
from lmeraser_jax.storage import checkpoints
moment, save, saves = sys.argv.pop(1), checkpoints.save_step, []
pretrain.CHECKPOINT_SECONDS, pretrain.CALL_STEPS = 0.0, 2

def save_and_die(*arguments):
    for when in ("before", "after"):
        if when == "after":
            save(*arguments)
            saves.append(arguments)
        if moment == f"{when} {len(saves)}":
            os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save_step = save_and_die
from lmeraser_jax.cli.main import main
sys.exit(main(["adapt", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path, weights, files):
    given = {"public.source": "npz", "public.path": files / "public.npz", "backbone.weights": weights}
    given |= {"data.image_size": SIZE, "pretraining.epochs": 2, "pretraining.batch": 16, "pretraining.distill": 0.3}
    flags = [f"--config.{name}={value}" for name, value in given.items()]

    def adapt(moment, name):
        command = [sys.executable, "-c", COMMAND, moment, *flags, f"--out={tmp_path}/{name}"]
        return subprocess.run(command, capture_output=True).returncode

    assert adapt("never", "whole") == 0
    for moment in ("before 0", "after 1", "before 3", "after 5"):  # of the checkpoints of this process
        assert adapt(moment, "killed") == -signal.SIGKILL, moment
    assert adapt("never", "killed") == 0
    digests = {backbone_lib.load(tmp_path / name)[0].digest for name in ("whole", "killed")}
    assert len(digests) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def write_unlabelled(source, folder, images):
    """Writes images without labels; returns the settings that name them as a public set."""
    if source == "npz":
        np.savez(folder / "a.npz", train_images=images)
        return {"path": f"{folder}/a.npz"}
    if source == "folder":
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number}.png")
        return {"path": str(folder), "split": ".", "store_size": 2 * SIZE}
    examples = [{"image": tfds_sets.encoded(image)} for image in images]
    features = {"image": tfds_sets.KINDS.Image(shape=images.shape[1:])}
    tfds_sets.write(folder, "plain", features, {"train": examples}, supervised=None)
    return {"path": str(folder), "dataset": "plain"}


@pytest.mark.parametrize("source", ["npz", "folder", "tfds"])
def test_a_public_set_needs_labels_only_where_they_are_learned(tmp_path, public, weights, source):
    images = public.images[:9]
    named = write_unlabelled(source, tmp_path, images)
    config = config_with(weights, supervise=0.0, distill=1.0)
    config = dataclasses.replace(config, public=settings.Public(source=source, **named))
    read = public_sets.read_public(config, lambda _: False, public_sets.labels_learned(config))
    np.testing.assert_array_equal(read.images, images)
    assert (read.labels == 0).all() and read.classes == 1
    supervised = dataclasses.replace(config, pretraining=settings.Pretraining())
    with pytest.raises(UserError, match="lacks the labels of 9 images.*--config.pretraining.supervise=0 --config.*=1"):
        public_sets.read_public(supervised, lambda _: False, public_sets.labels_learned(supervised))
    split = named.pop("split", "")
    with pytest.raises(UserError, match="label"):  # private records need them as before
        sources.load(settings.Data(source=source, train_split=split, image_size=SIZE, **named), own_test=False)
    wrong = dataclasses.replace(config, public=settings.Public(source=source, path=f"{tmp_path}/absent"))
    with pytest.raises(UserError, match=r"--config\.public\.(path|dataset)="):
        public_sets.read_public(wrong, lambda _: False, "")


def test_what_cannot_be_adapted_is_refused(tmp_path, weights, files, capsys):
    def refused(*flags):
        given = {"config.public.source": "npz", "config.public.path": f"{files}/public.npz", "out": f"{tmp_path}/out"}
        given |= {"config.backbone.weights": weights, "config.data.image_size": SIZE}
        given |= dict(flag.split("=", 1) for flag in flags)
        assert main(["adapt", *(f"--{name}={value}" for name, value in given.items())]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "lmeraser prepare --dataset=imagenette" in refused("config.public.source=data", "config.public.path=")
    assert "backbone.weights='': must be named for pretraining.start=weights" in refused("config.backbone.weights=")
    assert "--config.pretraining.epochs=0: must be at least 1" in refused("config.pretraining.epochs=0")
    assert "above 0, or distill is" in refused("config.pretraining.supervise=0")
    assert "16 px, which must be more than" in refused("config.data.image_size=16", "config.pretraining.distill=1")
    message = refused("config.data.source=npz", f"config.data.path={files}/public.npz")
    assert f"all 270 images of the public set {files}/public.npz are private or test images" in message
    (tmp_path / "file").write_text("mine")
    assert "exists already" in refused(f"out={tmp_path}/file")
    assert f"{tmp_path}/file is no folder" in refused(f"out={tmp_path}/file/out")
    assert "goes with public.source=folder or tfds, not npz" in refused("config.public.store_size=9")
    assert "is not vit-s" in refused("config.backbone.name=vit-s")
    assert "must be a multiple of the patch size 4" in refused("config.data.image_size=9")
    changed = shutil.copytree(weights, tmp_path / "changed")
    arrays, notes, _ = checkpoints.load(changed)
    checkpoints.save(changed, {name: leaf + 1 for name, leaf in arrays.items()}, notes)
    assert "recorded is" in refused(f"config.backbone.weights={changed}")
