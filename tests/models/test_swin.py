"""Swin against a transcription with explicit windows and pairs, through the path that published weights take."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import SWIN, hub_folder, hugging_face_swin, settings_of
from transcriptions import TOLERANCE, Swin, apart, features, outputs, pictures, scalar

from lmeraser_jax.config import Backbone
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import convert, swin, weight_files
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.features import Extractor
from lmeraser_jax.training.tune import mesh_of

# window == grid in the last stage | padding, a padded shift, an odd grid to merge | grids below the window
SIZES = [32, 36, 16]
SLOPE = 36
SMALL = dataclasses.replace(SWIN, image_size=12, depths=(3, 2), heads=(2, 1), window=2, classes=0)
TINY = dataclasses.replace(SMALL, depths=(2,), heads=(2,))


@pytest.fixture(scope="session")
def arrays() -> dict[str, np.ndarray]:
    return hugging_face_swin(SWIN, prefix="swin.")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, arrays) -> Path:
    return hub_folder(tmp_path_factory.mktemp("swin"), arrays, settings_of(SWIN))


def plain(arrays):
    return {name.removeprefix("swin."): array for name, array in arrays.items()}


@functools.cache
def ours(folder: Path, size: int):
    config, params, _ = convert.parameters(weight_files.read(str(folder)), Backbone(weights=str(folder)), size)
    return config, params, jax.device_get(outputs(config, params, pictures(2, size), size == SLOPE))


@pytest.mark.parametrize("size", SIZES)
def test_states_and_features_match_the_transcription(folder, arrays, size):
    config, _, got = ours(folder, size)
    assert config == dataclasses.replace(SWIN, image_size=size)
    reference = Swin(plain(arrays), SWIN)
    for row, image in enumerate(pictures(2, size)):
        states, feature = reference(image)
        for index, (have, want) in enumerate(zip(got["states"], states, strict=True)):
            assert apart(have[row], want) < TOLERANCE, index
        assert apart(got["features"][row], feature) < TOLERANCE
        logits = arrays["classifier.weight"] @ feature + arrays["classifier.bias"]
        assert apart(got["logits"][row], logits) < TOLERANCE


def test_gradient_with_respect_to_the_image(folder, arrays):
    """A directional derivative against central differences of the transcription."""
    gradient, image = ours(folder, SLOPE)[2]["gradient"][0], pictures(2, SLOPE)[0].astype(np.float64)
    reference, weight_files = Swin(plain(arrays), SWIN), scalar(2, SWIN.feature_size)[0]
    direction = np.random.default_rng(3).normal(size=image.shape)
    ahead, behind = (reference(image + sign * 1e-5 * direction)[1] for sign in (1, -1))
    np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) @ weight_files / 2e-5, rtol=1e-3)


def test_every_parameter_matters():
    """Each array reaches the features."""
    params = converted(SMALL, hugging_face_swin(SMALL))
    images = pictures(1, SMALL.image_size)
    base = np.asarray(features(SMALL, params, images))
    leaves, structure = jax.tree.flatten(params)
    for i, name in enumerate(flatten(params)):
        changed = jax.tree.unflatten(structure, [*leaves[:i], leaves[i] * np.float32(1.5), *leaves[i + 1 :]])
        moved = np.abs(np.asarray(features(SMALL, changed, images)) - base).max()
        assert moved > 1e-3, name


def converted(wanted, arrays):
    found = weight_files.Weights("weights", arrays, "", settings_of(wanted))
    config, params, _ = convert.parameters(found, Backbone())
    assert config == wanted
    return params


# -- planted bugs: each fits all shapes, and the comparison with the transcription shows it --


def swapped_queries(real):
    def renamed(name):
        return name.replace("/query/", "/?/").replace("/key/", "/query/").replace("/?/", "/key/")

    return lambda flat: real({renamed(name): array for name, array in flat.items()})


def kernels_left_alone(real):
    return lambda name, array, torch: real(name, array, torch and not name.endswith("attention/out/kernel"))


def rows_for_columns(real):
    def laid_out(name, array, torch):
        found = real(name, array, torch)
        return found.transpose(1, 0, 2, 3) if name == "embed/kernel" else found

    return laid_out


def colours_first(real):
    def laid_out(name, array, torch):
        if name == "embed/kernel":
            o, i, h, w = array.shape
            return array.transpose(1, 2, 3, 0).reshape(h, w, i, o)
        return real(name, array, torch)

    return laid_out


def corners_row_by_row(real):
    def call(self, x):
        corners = [x[:, row::2, column::2] for row in range(2) for column in range(2)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))

    return call


def no_mask(real):
    return lambda *args: np.zeros_like(real(*args))


def pairs_transposed(real):
    return lambda side, window: real(side, window).T


def columns_before_rows(real):
    def distances(side, window):
        rows = 2 * window - 1
        return real(side, window) % rows * rows + real(side, window) // rows

    return distances


def shifted_back_wrongly(real):
    def attention(self, x):
        return jnp.roll(real(self, x), (1, 1), (1, 2)) if self.shifted else real(self, x)

    return attention


BUGS = {
    "queries and keys swapped": (convert, "_join_attention", swapped_queries),
    "kernels not transposed": (convert, "_input_first", kernels_left_alone),
    "patches transposed": (convert, "_input_first", rows_for_columns),
    "OIHW read as IHWO": (convert, "_input_first", colours_first),
    "corners in another order": (swin.Merging, "__call__", corners_row_by_row),
    "no shift mask": (swin, "shift_mask", no_mask),
    "bias table transposed": (swin, "distances", pairs_transposed),
    "bias table by columns": (swin, "distances", columns_before_rows),
    "shifted back wrongly": (swin.Block, "_attention", shifted_back_wrongly),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_the_transcription_shows_bugs(monkeypatch, bug):
    config, run = SMALL, features
    if bug:
        where, name, make = BUGS[bug]
        monkeypatch.setattr(where, name, make(getattr(where, name)))
        if where is not convert:  # traced anew, with the bug
            config = SMALL if where is swin.Merging else TINY
            run = jax.jit(lambda config, *args: backbone_lib.features(config, *args), static_argnums=0)
    arrays, image = hugging_face_swin(config), pictures(1, config.image_size)
    error = apart(run(config, converted(config, arrays), image)[0], Swin(arrays, config)(image[0])[1])
    assert error > 50 * TOLERANCE if bug else error < TOLERANCE


# -- the rest --


def test_bfloat16_parameters_give_float32_features_close_by():
    arrays = hugging_face_swin(TINY)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), converted(TINY, arrays))
    image = pictures(1, TINY.image_size)
    got = features(TINY, low, image)
    assert got.dtype == jnp.float32
    assert 1e-4 < apart(got[0], Swin(arrays, TINY)(image[0])[1]) < 0.1


def test_a_records_feature_has_the_same_bits_wherever_it_stands():
    backbone = backbone_lib.make(TINY, converted(TINY, hugging_face_swin(TINY)), (0.5,), (0.5,))
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (21, 12, 12, 3)).astype(np.uint8)
    spec = ImageSpec(12, 12, 3, size=12, resize=12, out_channels=3)
    get = Extractor(backbone, spec, 2, mesh_of(jax.devices()), jnp.dtype("float32"))
    found = get(images)
    assert found.shape == (21, TINY.feature_size)
    for chosen in (rng.permutation(21), [13], [20, 0, 5]):
        np.testing.assert_array_equal(get(images[chosen]), found[chosen])


def test_the_mask_parts_what_only_the_shift_brought_together():
    """A grid of 4 with windows of 2, shifted by 1: the last row and column are torn off."""
    mask = swin.shift_mask(4, 4, 2, 1)
    assert mask.shape == (4, 4, 4) and mask.dtype == np.float32
    assert not mask[0].any()
    np.testing.assert_array_equal(mask[1] == 0, np.equal.outer([0, 1, 0, 1], [0, 1, 0, 1]))
    np.testing.assert_array_equal(mask[2] == 0, np.equal.outer([0, 0, 1, 1], [0, 0, 1, 1]))
    np.testing.assert_array_equal(mask[3] == 0, np.eye(4, dtype=bool))
    assert set(np.unique(mask)) == {0.0, swin.OUTSIDE}
