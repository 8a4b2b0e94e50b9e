"""Public pretraining on a few digits: it learns, resumes bit for bit, agrees across devices, and is stored safely."""

import contextlib
import functools
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from lmeraser_jax import config as settings
from lmeraser_jax import interrupt
from lmeraser_jax.data import digits
from lmeraser_jax.errors import UserError
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, pretrain
from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.models.vit import ViT, ViTConfig
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training.train_step import mesh_of

CLASSES, EPOCHS = 10, 12


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """Equal programs are compiled once for the whole file."""
    real = pretrain.optimizer

    @functools.lru_cache
    def optimizer(pretraining, steps):
        return real(settings.Config(pretraining=pretraining), steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "optimizer", lambda config, steps: optimizer(config.pretraining, steps))
        patch.setattr(pretrain, "_compiled", functools.lru_cache(pretrain._compiled))
        yield


@pytest.fixture(scope="module")
def public() -> tuple[np.ndarray, np.ndarray]:
    """390 real scans: not a multiple of the batch."""
    source = digits.load()
    rows = [i for i, item in enumerate(source.items) if item.split == "public"][:390]
    labels = np.array([source.items[i].label for i in rows], np.int32)
    return source.read(range(len(source.items))).rows[rows], labels


def config_with(seed: int = 0, **pretraining) -> settings.Config:
    options = {"epochs": EPOCHS, "batch": 16, "rate": 1e-2, "checkpoint_epochs": 100, **pretraining}
    return settings.Config(
        seed=seed,
        data=settings.Data(image_size=8),
        backbone=settings.Backbone(patch=4, width=16, depth=1, heads=2),
        pretraining=settings.Pretraining(**options),
    )


def train(folder, public, config, devices: int = 1) -> tuple[backbone_lib.Backbone, float]:
    mesh = mesh_of(jax.devices()[:devices])
    return pretrain.pretrain(Layout(folder).pretraining, PublicSet(*public, CLASSES), config, mesh)


class Whole(NamedTuple):
    """An uninterrupted training."""

    folder: Path
    backbone: backbone_lib.Backbone
    accuracy: float
    epochs: list[tuple[float, float]]  # loss and hits


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[float, float]]]:
    """Collects loss and hits of every call of the program in the block; here an epoch is one call."""
    epochs, make = [], pretrain._compiled

    def watched(*args):
        def call(*state):
            out = make(*args)(*state)
            epochs.append((float(out[1]), float(out[2])))
            return out

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_compiled", watched)
        yield epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, public) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with recorded() as epochs:
        backbone, accuracy = train(folder, public, config_with())
    backbone_lib.save(Layout(folder).backbone, backbone, {"seed": 0}, {"origin": "the test"})
    return Whole(folder, backbone, accuracy, epochs)


def logits(vit: ViTConfig, params, images) -> np.ndarray:
    pixels = (images.astype(np.float32) / 255 - 0.5) / 0.5
    return np.asarray(jax.jit(functools.partial(backbone_lib.features_and_logits, vit))(params, pixels)[1], np.float64)


def stop_after_the_first_epoch(folder: Path, public, devices: int = 1) -> None:
    interrupt.request_stop()
    with pytest.raises(interrupt.Stopped):
        train(folder, public, config_with(), devices)
    interrupt._requested.clear()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, public) -> Path:
    """The workdir of a training that was interrupted after its first epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after_the_first_epoch(folder, public)
    return folder


def test_the_loss_falls_and_the_accuracy_rises(whole):
    assert len(whole.epochs) == EPOCHS and whole.accuracy == whole.epochs[-1][1] / 390
    assert abs(whole.epochs[0][0] - np.log(CLASSES)) < 1.0  # starts at about chance
    assert whole.epochs[-1][0] < 0.8 * whole.epochs[0][0]
    assert whole.accuracy > 0.3  # chance is 0.1
    assert whole.backbone.config.classes == 0 and "head" not in whole.backbone.params


def first_epoch(folder: Path, public, config) -> int:
    """The epoch with which a training in the folder begins; it is not trained."""

    class Begun(Exception):
        pass

    def begin(seed, epoch, count, batch):
        raise Begun(epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_epoch_rows", begin)
        with pytest.raises(Begun) as caught:
            train(folder, public, config)
    return caught.value.args[0]


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, public, whole, stopped):
    layout = Layout(shutil.copytree(stopped, tmp_path / "run"))
    assert not layout.backbone.exists() and checkpoints.load(layout.pretraining)[2] == 1
    assert first_epoch(layout.root, public, config_with()) == 1
    backbone, accuracy = train(layout.root, public, config_with())
    assert (backbone.digest, accuracy) == (whole.backbone.digest, whole.accuracy)


def test_a_checkpoint_of_another_training_is_not_used(tmp_path, public, stopped):
    images, labels = public
    others = {
        "seed": (public, config_with(seed=1)),
        "images": ((images[::-1], labels), config_with()),
        "labels": ((images, labels[::-1]), config_with()),
        "rate": (public, config_with(rate=1e-3)),
    }
    for name, (data, other) in others.items():
        shutil.copytree(stopped, tmp_path / name)
        assert first_epoch(tmp_path / name, data, other) == 0, name


@pytest.mark.slow
def test_two_devices_train_as_one_does(tmp_path, public, stopped):
    """After one epoch the losses are alike to rounding, and so are the networks' answers."""
    stop_after_the_first_epoch(tmp_path, public, devices=2)
    vit = pretrain.architecture(config_with(), channels=1, classes=CLASSES)
    answers = []
    for folder in (stopped, tmp_path):
        arrays = checkpoints.load(Layout(folder).pretraining)[0]
        params = {name.removeprefix("0/"): array for name, array in arrays.items() if name.startswith("0/")}
        answers.append(
            logits(vit, backbone_lib.from_flat(backbone_lib.graph(vit)[1], params, "checkpoint"), public[0][:10])
        )
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-4)
    assert np.ptp(answers[0], axis=1).mean() > 0.1  # they differ between classes


def test_each_epoch_shows_every_image_once():
    orders = []
    for epoch in range(3):
        rows, valid = pretrain._epoch_rows(0, epoch, 70, 32)
        assert rows.shape == valid.shape == (3, 32)
        assert sorted(rows[valid]) == list(range(70)) and rows.max() < 70
        orders.append(tuple(rows[valid]))
    assert len(set(orders)) == 3


def test_a_saved_backbone_is_the_same_backbone(whole):
    backbone = whole.backbone
    read, inputs = backbone_lib.load(Layout(whole.folder).backbone)
    assert read.config == backbone.config and inputs == {"seed": 0}
    assert (read.mean, read.std) == (backbone.mean, backbone.std)
    assert read.digest == backbone.digest
    with pytest.raises(UserError, match="does not exist"):
        backbone_lib.load(Layout(whole.folder / "elsewhere").backbone)


# After a failed read Orbax leaves coroutines of a closed event loop to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_backbone_is_refused(tmp_path, whole):
    """Flips a byte in the middle of each file that holds something, one at a time."""
    original = Layout(whole.folder).backbone
    noticed = 0
    for source in sorted(path for path in original.rglob("*") if path.is_file() and path.stat().st_size):
        shutil.rmtree(tmp_path / "backbone", ignore_errors=True)
        shutil.copytree(original, tmp_path / "backbone")
        target = tmp_path / "backbone" / source.relative_to(original)
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 0x55
        target.write_bytes(content)
        try:
            read, _ = backbone_lib.load(Layout(tmp_path).backbone)
        except UserError as error:
            assert "backbone" in str(error)
            noticed += source.stat().st_size
        else:  # this byte does not reach the parameters
            assert read.digest == whole.backbone.digest
    assert noticed > sum(array.nbytes for array in flatten(whole.backbone.params).values()) / 2
    gc.collect()


def test_a_backbone_with_other_contents_under_its_digest_is_refused(tmp_path, whole):
    backbone = whole.backbone
    changed = jax.tree.map(np.copy, backbone.params)
    changed["norm"]["bias"][3] += 1e-3
    good = {"config": backbone_lib.describe(backbone.config), "mean": [0.5], "std": [0.5], "digest": backbone.digest}
    good |= {"inputs": {}, "provenance": {}}
    bare = {"digest": backbone.digest}
    for params, notes in ((changed, good), (backbone.params, good | {"mean": [0.4]}), (backbone.params, bare)):
        checkpoints.save(tmp_path / "b", flatten(params), notes)
        with pytest.raises(UserError, match="damaged"):
            backbone_lib.load(tmp_path / "b")
        with pytest.raises(UserError, match=r"--config\.backbone\.weights=.*b is (damaged|no backbone)"):
            convert.load(settings.Backbone(weights=str(tmp_path / "b")))
    checkpoints.save(tmp_path / "b", flatten(backbone.params), good)
    assert backbone_lib.load(tmp_path / "b")[0].digest == backbone.digest


def test_a_loss_that_is_not_finite_names_the_flag(tmp_path, public):
    """A label beyond the classes makes the loss nan, with the program that is compiled already."""
    labels = np.where(np.arange(390) == 7, 1000, public[1]).astype(np.int32)
    with pytest.raises(UserError, match=r"the loss is nan in epoch 0.*--config\.pretraining\.rate"):
        train(tmp_path, (public[0], labels), config_with())


@pytest.mark.slow
def test_padding_is_no_part_of_the_loss(tmp_path, public):
    """Ten images in batches of 16: the first loss is their own mean, not the padding's; then it runs away."""
    images, labels = public[0][:10], public[1][:10]
    config = config_with(rate=1e30, augment="none")
    with recorded() as epochs, pytest.raises(UserError, match="the loss is (nan|inf)"):
        train(tmp_path, (images, labels), config)
    vit = pretrain.architecture(config, channels=1, classes=CLASSES)
    answers = logits(vit, nnx.to_pure_dict(nnx.split(ViT(vit, nnx.Rngs(config.seed)), nnx.Param)[1]), images)
    losses = np.log(np.exp(answers).sum(axis=1)) - answers[np.arange(10), labels]
    assert epochs[0] == pytest.approx((losses.mean(), np.sum(answers.argmax(axis=1) == labels)), abs=1e-4)


def test_architecture_and_normalisation_are_those_of_the_settings():
    b = settings.Backbone(width=32, depth=3, patch=4, mean="0.2,0.3,0.7", std="1")
    config = settings.Config(backbone=b, data=settings.Data(image_size=12))
    sizes = {"image_size": 12, "patch": 4, "width": 32, "depth": 3, "heads": 2, "mlp": 128, "channels": 3}
    assert pretrain.architecture(config, 3, 7) == ViTConfig(**sizes, feature="cls", classes=7)
    labels = np.zeros(1, np.int32)
    grey = PublicSet(np.zeros((1, 9, 7, 1), np.uint8), labels, 7)
    spec = pretrain.from_scratch(config, grey).spec  # colours for grey images
    assert spec.mean == pytest.approx((0.4,)) and spec.std == (1.0,)
    assert (spec.height, spec.width, spec.out_channels, spec.size) == (9, 7, 1, 12)
    config = settings.Config(backbone=settings.Backbone(width=32, heads=4, mlp=48, feature="pooler"))
    made = pretrain.architecture(config, 1, 7)
    assert (made.heads, made.mlp, made.feature) == (4, 48, "pooler")
    assert pretrain.from_scratch(config, PublicSet(np.zeros((1, 8, 8, 3), np.uint8), labels, 7)).spec.mean == (0.5,)


def test_settings_from_which_nothing_can_be_trained(tmp_path, public):
    nothing = np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int32)
    with pytest.raises(UserError, match=r"no public images.*--config\.backbone\.weights"):
        train(tmp_path, nothing, config_with())
    b = settings.Backbone(patch=3, width=16, depth=1, heads=5)
    with pytest.raises(UserError) as caught:
        train(tmp_path, public, settings.Config(data=settings.Data(image_size=8), backbone=b))
    assert "--config.data.image_size=8" in str(caught.value) and "--config.backbone.heads=5" in str(caught.value)
