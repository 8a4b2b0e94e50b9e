"""Prediction against a literal loop over images: route, prompt, classify, average the m nearest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from lmeraser_jax.data.transforms import centred
from lmeraser_jax.evaluation import predict
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.training.slices import place_prompt
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice
from lmeraser_jax.unlearning.run import open_run


@pytest.fixture
def run(trained_template):
    """A reader of the trained workdir that all tests share."""
    with open_run(trained_template, devices=jax.devices()[:1]) as run:
        yield run


def with_nearest(run, nearest):
    config = dataclasses.replace(run.config, inference=dataclasses.replace(run.config.inference, nearest=nearest))
    return dataclasses.replace(run, config=config)


def reference(run, images, nearest, quarantined=frozenset()):
    """Probabilities and the keys of the nearest healthy clusters, one image at a time."""
    manifest, vit = run.catalog.manifest(), run.backbone.config
    clustering = load_clustering(run.layout, manifest.clustering)
    features = jax.jit(lambda x: backbone_lib.features(vit, run.backbone.params, x))
    slices = {key: load_slice(run, name) for key, name in manifest.entries.items()}
    probabilities, clusters = [], []
    for image in images:
        pixels = centred(jnp.asarray(image[None]), run.image_spec)
        gaps = np.linalg.norm(np.asarray(features(pixels), np.float64) - clustering.prototypes, axis=1)
        chosen = [key for k in np.argsort(gaps) if (key := clustering.keys[k]) not in quarantined][:nearest]
        each = []
        for key in chosen:
            prompt = place_prompt(jnp.asarray(slices[key].prompt), vit.image_size, run.config.tuning.prompt_width, 1)
            feature = np.asarray(features(pixels + prompt[None]), np.float64)[0]
            each.append(softmax(feature @ slices[key].kernel + slices[key].bias))
        probabilities.append(np.mean(each, axis=0))
        clusters.append(chosen)
    return np.array(probabilities), clusters


@pytest.mark.parametrize("nearest", [1, 3, 99])  # 99: all that there are
def test_equals_a_literal_loop(run, nearest):
    images = run.images[run.catalog.live("test").rows]
    model = predict.load_model(with_nearest(run, nearest))
    answers = predict.predict(model, images)
    probabilities, clusters = reference(run, images, nearest)
    assert [[model.keys[k] for k in row] for row in answers.clusters] == clusters
    np.testing.assert_allclose(answers.probabilities, probabilities, atol=1e-5)
    np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1, atol=1e-5)


def test_ragged_batches_and_neighbours_change_nothing_and_compile_nothing(run):
    images = run.images[run.catalog.live("test", "train").rows]
    model = predict.load_model(run)
    whole = predict.predict(model, images)
    program = predict.compiled(run.tuning_spec, run.config, model.nearest, run.mesh)
    traces = program._cache_size()
    for count in (0, 1, 5, 16, 17, 33):
        few = predict.predict(model, images[:count])
        assert np.array_equal(few.probabilities, whole.probabilities[:count])
        assert len(few.labels) == count
    backwards = predict.predict(model, images[::-1])
    assert np.array_equal(backwards.probabilities[::-1], whole.probabilities)
    assert program._cache_size() == traces


def test_two_devices_agree(run):
    images = run.images[run.catalog.live("test").rows]
    single = predict.predict(predict.load_model(run), images)
    wide = predict.load_model(dataclasses.replace(run, mesh=mesh_of(jax.devices()[:2])))
    double = predict.predict(wide, images)
    assert np.array_equal(single.clusters, double.clusters)
    np.testing.assert_allclose(single.probabilities, double.probabilities, atol=1e-5)
