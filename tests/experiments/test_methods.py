"""Partition x what is tuned x who answers: every combination keeps the contract, and answers as written."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import merged, small_config, small_run, small_source, without
from tuning_problem import small_backbone

from lmeraser_jax import config as settings
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import accuracy
from lmeraser_jax.evaluation.overview import overview
from lmeraser_jax.evaluation.predict import load_model, predict, routed_probabilities
from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.experiments import methods
from lmeraser_jax.experiments.measure import forward_passes
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training import closed_form, clustering, tasks, tune
from lmeraser_jax.training.jobs import make_job
from lmeraser_jax.training.slices import noise_activation, place_prompt
from lmeraser_jax.unlearning import binding, erase
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build

ONE = {"clustering__partition": "one"}
SHARDS = {"clustering__partition": "random", "clustering__shards": 3}
LORA = {"tuning__method": "lora", "tuning__rank": 2, "tuning__lora_rate": 0.01}
QUICK = {
    "DAM-VP": {"tuning__method": "prompt"},
    "retrain": ONE | {"tuning__method": "backbone", "tuning__epochs": 1},
    "LoRA": LORA,
    "linear head": ONE | {"tuning__method": "head"},
    "a common head beside shards": SHARDS | {"common__method": "linear", "inference__nearest": 0},
    "expanded ridge of clusters": {"tuning__method": "ridge", "tuning__expand": 24, "inference__nearest": 0},
}
SLOW = {
    "single prompt": ONE,
    "random parts": SHARDS,
    "SISA": SHARDS | {"inference__nearest": 0, "inference__aggregate": "vote"},
    "SISA of whole networks": SHARDS | {"tuning__method": "backbone", "tuning__epochs": 1, "inference__nearest": 0},
    "SISA of adapters": SHARDS | LORA | {"inference__nearest": 0},
    "heads of clusters": {"tuning__method": "head", "inference__nearest": 2},
    "augmented heads": {"tuning__method": "head", "data__augment": "crop"},
    "ridge": ONE | {"tuning__method": "ridge"},
    "a common head beside clusters": {"common__method": "ridge", "common__expand": 8, "inference__nearest": 2},
    "nearest class mean": ONE | {"tuning__method": "ncm"},
}


def _with_slow(*quick):
    """All combinations as parameters; all but the quick ones are slow."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in QUICK | SLOW if name not in quick)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Opens a copy of a workdir of a combination, trained once: `with built(name, folder, **settings) as run`."""
    templates, combinations = {}, QUICK | SLOW

    def open_copy(name, folder, **overrides):
        if name not in templates:
            templates[name] = tmp_path_factory.mktemp("built") / "run"
            with small_run(templates[name], config=small_config(**combinations[name])) as run:
                build(run)
        shutil.copytree(templates[name], folder)
        return small_run(folder, config=small_config(**(combinations[name] | overrides)))

    return open_copy


@pytest.mark.parametrize("name", _with_slow(*QUICK))
def test_an_erasure_gives_the_state_of_never_having_had_the_records(name, built, tmp_path):
    """The audit builds all again; a random partition re-tunes the record's own shard only."""
    with built(name, tmp_path / "run") as run:
        records = run.catalog.live("train")
        chosen = [records.ids[i] for i in (3, 40)]
        before = run.catalog.manifest().entries
        erase.request_erasure(run, chosen[:1])
        between = run.catalog.manifest().entries
        erase.request_erasure(run, chosen[1:])
        after, verdict = state(run), audit(run)
        assert verdict.ok and verdict.identical == len(run.catalog.manifest().entries), verdict.text()
    changed = {key for key in between if between[key] != before.get(key)}
    assert changed
    if run.config.clustering.partition == "random":
        assert changed - {"common"} == {records.clusters[3]}
    if name in (
        "DAM-VP",
        "SISA",
        "SISA of adapters",
        "a common head beside clusters",
    ):  # once more, from a source without the records
        with small_run(tmp_path / "fresh", without(small_source(), set(chosen)), run.config) as fresh:
            build(fresh)
            assert differences(after, state(fresh)) == []


def test_shards_are_dealt_by_the_id_alone():
    ids = [f"record-{i}" for i in range(4000)]
    shards = clustering.shard_of(ids, 8, seed=1)
    assert np.array_equal(clustering.shard_of(ids[100:200], 8, seed=1), shards[100:200])
    counts = np.bincount(shards, minlength=8)
    assert 400 < counts.min() <= counts.max() < 600
    assert not np.array_equal(clustering.shard_of(ids, 8, seed=2), shards)


def test_a_head_on_features_is_the_head_on_images(built, tmp_path, monkeypatch):
    """The same head with the backbone in the program: an augmentation that does nothing turns the features off."""
    with built("linear head", tmp_path / "run") as run:
        ((key, ref),) = run.catalog.manifest().entries.items()
        slice_, records = load_slice(run, ref), run.catalog.live("train")
        assert run.tuning_spec.on_features and run.catalog.slices()[ref].images == run.config.tuning.epochs * 100
        on_images = dataclasses.replace(run.tuning_spec, input_spec=dataclasses.replace(run.image_spec, augment="flip"))
        labels = np.zeros(run.catalog.rows_used(), np.int32)
        labels[records.rows] = records.labels
        monkeypatch.setattr(tasks, "augmented", lambda images, spec, key: centred(images, spec))
        jobs = [make_job(key, records.rows, run.config.tuning)]
        (tuned,) = tune.make_slices(on_images, run.backbone, jobs, run.images, labels, run.mesh)
    np.testing.assert_allclose(slice_.kernel, tuned.slice.kernel, atol=2e-5)
    np.testing.assert_allclose(slice_.bias, tuned.slice.bias, atol=2e-5)


def literal_answers(run, images) -> np.ndarray:
    """Probabilities [K, N, Y] of every published slice, one at a time, without the prediction program."""
    manifest, architecture = run.catalog.manifest(), run.backbone.config
    pixels, answers = centred(jnp.asarray(images), run.image_spec), []
    features_of = jax.jit(functools.partial(backbone_lib.features, architecture))
    for key in load_model(run).keys:
        slice_, prompt = load_slice(run, manifest.entries[key]), 0.0
        if width := run.config.tuning.active_prompt_width:
            size, channels = architecture.image_size, architecture.channels
            prompt = place_prompt(jnp.asarray(slice_.prompt), size, width, channels)[None]
        params = run.backbone.params
        if run.config.tuning.method == "backbone":
            params = slice_.backbone
        if run.config.tuning.method == "lora":
            params = merged(params, slice_.backbone, run.config.tuning.alpha / run.config.tuning.rank)
        features = features_of(params, pixels + prompt)
        features = closed_form.expand(features, run.config.tuning.expand)
        answers.append(np.asarray(jax.nn.softmax(features @ slice_.kernel + slice_.bias[None], axis=-1)))
    return np.stack(answers)


def answering(run, **inference):
    """The run with other settings of prediction."""
    routing = dataclasses.replace(run.config.inference, **inference)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, inference=routing))


@pytest.mark.parametrize("name", _with_slow("DAM-VP", "LoRA", "expanded ridge of clusters"))
def test_all_clusters_answer_together(name, built, tmp_path):
    """Mean and vote of every slice's answer; of equal shares of votes the first class wins."""
    with built(name, tmp_path / "run") as run:
        images = run.images[run.catalog.live("test").rows][:8]
        each = literal_answers(run, images)
        votes = (each.argmax(axis=2)[..., None] == np.arange(each.shape[2])).mean(axis=0)
        for aggregate, expected in (("mean", each.mean(axis=0)), ("vote", votes)):
            everything = answering(run, nearest=0, aggregate=aggregate, common_weight=0.0)
            answers = predict(load_model(everything), images)
            np.testing.assert_allclose(answers.probabilities, expected, atol=2e-4)
            assert (np.sort(answers.clusters, axis=1) == np.arange(len(each))).all()
            if aggregate == "vote":
                assert np.array_equal(answers.labels, votes.argmax(axis=1))


@pytest.mark.parametrize(
    "name", ["a common head beside shards", pytest.param("a common head beside clusters", marks=pytest.mark.slow)]
)
def test_the_common_head_joins_with_its_weight(name, built, tmp_path):
    with built(name, tmp_path / "run") as run:
        records, images = run.catalog.live("train"), run.images[run.catalog.live("test").rows]
        head, _ = closed_form.solve_members(run.config.common, run.features(records), records.labels, 10)
        features = closed_form.expand(run.extractor(images), run.config.common.expand)
        common = np.asarray(jax.nn.softmax(features @ head.kernel + head.bias, axis=-1))
        weights = (0.0, 0.3, 1.0)
        models = [load_model(answering(run, common_weight=weight)) for weight in weights]
        none, some, all_ = (predict(model, images).probabilities for model in models)
        grid = dict(accuracy.answers_by_weight(run, images))
    assert sorted(grid) == [step / 10 for step in range(11)]
    for weight, direct in zip(weights, (none, some, all_)):
        np.testing.assert_allclose(grid[weight].probabilities, direct, atol=1e-6)
    np.testing.assert_allclose(all_, common, atol=2e-4)
    np.testing.assert_allclose(some, 0.7 * none + 0.3 * common, atol=2e-4)
    assert np.abs(none - common).max() > 0.05


def test_quarantine_silences_shard_and_common_head_and_every_erasure_makes_both_again(built, tmp_path):
    with built("a common head beside shards", tmp_path / "run") as run:
        predictor = Predictor(run)
        before, name = predictor.state.common_ref, run.catalog.live("train").ids[5]
        accepted = erase.request_erasure(run, [name], quarantine=True, defer=True)
        assert before and predictor.follow().common_ref == "" and predictor.state.arrays.common is None
        (out,) = run.catalog.quarantined()
        model = load_model(run)
        answers = predict(model, run.images[:30])
        assert model.keys.index(out) not in np.unique(answers.clusters)
        np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1, atol=1e-5)
        erase.process(run)
        assert predictor.follow().common_ref not in ("", before)
        assert "common head: linear of all 99 private records" in overview(run.layout, run.catalog, run.config).table()
        receipt = json.loads(run.layout.receipt(accepted.request.id).read_text())
        assert len(receipt["clusters"]) == receipt["work"]["clusters_tuned"] == 2, "the shard and the common head"
        assert before not in run.catalog.slices() and not run.layout.slice(before).exists()


def test_an_image_goes_to_the_same_shard_always_and_images_spread(built, tmp_path):
    with built("a common head beside shards", tmp_path / "run", inference__nearest=1) as run:
        run = answering(run, common_weight=0.0)
        images = run.images[run.catalog.live("train").rows]
        model = load_model(run)
        answers, again = predict(model, images), predict(model, images[::-1])
        assert np.array_equal(answers.clusters, again.clusters[::-1])
        assert len(np.unique(answers.clusters)) == 3
        chosen = literal_answers(run, images)[answers.clusters[:, 0], np.arange(len(images))]
    np.testing.assert_allclose(answers.probabilities, chosen, atol=2e-5)


def test_a_fixed_head_never_moves_and_reads_the_features_that_noise_excites(built, tmp_path):
    with built("DAM-VP", tmp_path / "run") as run:
        mapping = noise_activation(run.backbone, 10)
        assert list(mapping) == sorted(set(mapping)) and run.tuning_spec.mapping == mapping
        expected = np.zeros((16, 10), np.float32)
        expected[list(mapping), np.arange(10)] = 1
        for ref in run.catalog.manifest().entries.values():
            slice_ = load_slice(run, ref)
            assert np.array_equal(slice_.kernel, expected) and not slice_.bias.any() and slice_.prompt.any()


def test_noise_activation_is_the_literal_rule():
    """Images of N(0, 1), population standard deviation, the C largest (DAM-VP, head-missing)."""
    backbone = small_backbone()
    mapping = noise_activation(backbone, 5)
    size, channels = backbone.config.image_size, backbone.config.channels
    noise = np.random.default_rng(3).standard_normal((8192, size, size, channels), np.float32)
    features_of = jax.jit(functools.partial(backbone_lib.features, backbone.config))
    spread = np.asarray(features_of(backbone.params, noise)).std(axis=0)
    assert spread[list(mapping)].mean() > 0.97 * np.sort(spread)[-5:].mean()


def test_more_classes_than_features_are_refused_without_a_head(tmp_path):
    config = small_config(tuning__method="prompt", backbone__width=8, backbone__heads=2)
    with small_run(tmp_path / "run", config=config) as run, pytest.raises(UserError, match="10 classes need a feature"):
        build(run)


@pytest.mark.parametrize("name", ["retrain", "LoRA"])
def test_the_backbone_or_its_adapters_are_tuned_and_the_frozen_one_stays(name, built, tmp_path):
    with built(name, tmp_path / "run") as run:
        slice_ = load_slice(run, next(iter(run.catalog.manifest().entries.values())))
        first = run.backbone.params
        if name == "LoRA":  # each B is tuned from zeros, and nothing of the network but adapters is the slice's
            assert {path.split("/")[-1] for path in flatten(slice_.backbone)} == {"lora_a", "lora_b"}
            first = jax.tree.map(np.zeros_like, slice_.backbone)
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), slice_.backbone, first)
        assert min(jax.tree.leaves(moved)) > 0, "every parameter gets a gradient"
        assert backbone_lib.load(run.layout.backbone)[0].digest == run.backbone.digest


def test_features_are_computed_once_for_all_augmentations(tmp_path, monkeypatch):
    """They are of images as they are: a comparison's base has them for heads on features as well."""
    features = {}
    for augment in ("paper", "none"):
        with small_run(tmp_path / "run", config=small_config(data__augment=augment)) as run:
            features[augment] = run.features(run.catalog.live("train"))
            again = property(lambda run: pytest.fail("features are computed again"))
            monkeypatch.setattr(type(run), "extractor", again)
    np.testing.assert_array_equal(features["paper"], features["none"])


def test_every_method_changes_its_settings_and_no_other():
    plain = settings.to_dict(small_config())
    for name, method in methods.METHODS.items():
        tree = settings.to_dict(method.configure(small_config()))
        changed = binding.differences(plain, tree)
        assert method.name == name and method.title
        assert {line.partition(":")[0] for line in changed} <= set(method.changes), name
        for setting, value in method.changes.items():
            group, leaf = setting.split(".")
            assert tree[group][leaf] == value, name


SLOW_PASSES = (
    ("DAM-VP", 0, 5),
    ("LoRA", 0, 5),
    ("LoRA", 2, 3),
    ("retrain", 1, 1),
    ("single prompt", 1, 1),
    ("a common head beside clusters", 2, 3),
)


@pytest.mark.parametrize(
    ("name", "nearest", "expected"),
    [
        ("DAM-VP", 1, 2),
        ("expanded ridge of clusters", 0, 1),
        ("a common head beside shards", 0, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_PASSES),
    ],
)
def test_the_forward_passes_of_a_prediction_are_those_of_the_program(
    name, nearest, expected, built, tmp_path, monkeypatch
):
    passed, real = [], backbone_lib.features

    def features(architecture, params, pixels, lora=None):
        values = real(architecture, params, pixels, lora)
        jax.debug.callback(lambda batch: passed.append(len(batch)), values)  # under vmap once for each image and slice
        return values

    with built(name, tmp_path / "run", inference__nearest=nearest) as run:
        model, pixels = load_model(run), run.images[:2]
        draws = None  # the stack is padded: an empty place must pass nothing
        if run.config.clustering.partition != "adaptive":
            draws = np.zeros((2, len(model.arrays.present)), np.float32)
        monkeypatch.setattr(backbone_lib, "features", features)
        cases = [(run, expected)]
        if model.common_ref:  # at weight 1 it answers alone
            cases.append((accuracy.with_weight(run, 1.0), 1))
        for asked, passes in cases:
            passed.clear()
            answer = functools.partial(routed_probabilities, run.tuning_spec, asked.config, model.nearest)
            jax.jit(answer)(model.arrays, pixels, draws)
            jax.effects_barrier()
            assert sum(passed) / 2 == forward_passes(asked, len(model.keys)) == passes
