"""Partition x what is tuned x aggregation: every combination keeps the contract, and answers as written."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config, small_run, small_source, without

from lmeraser_jax.data.transforms import centred
from lmeraser_jax.evaluation import predict as predict_module
from lmeraser_jax.evaluation.accuracy import evaluate
from lmeraser_jax.evaluation.overview import overview
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.experiments.costs import passes
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.training import closed_form, clustering, train_step, tune
from lmeraser_jax.training.slices import noise_activation, place_prompt
from lmeraser_jax.unlearning import erase, rollback
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.doctor import examine

COMBINATIONS = {
    "single prompt": {"clustering__partition": "one"},
    "DAM-VP": {"tuning__method": "prompt"},
    "random parts": {"clustering__partition": "random", "clustering__shards": 4},
    "SISA": {
        "clustering__partition": "random",
        "clustering__shards": 3,
        "tuning__slices": 2,
        "inference__nearest": 0,
        "inference__aggregate": "vote",
    },
    "retrain": {"clustering__partition": "one", "tuning__method": "backbone", "tuning__epochs": 1},
    "SISA of whole networks": {
        "clustering__partition": "random",
        "clustering__shards": 2,
        "tuning__method": "backbone",
        "tuning__epochs": 1,
        "tuning__slices": 2,
        "inference__nearest": 0,
    },
    "one head": {"tuning__method": "prompts+one head"},
    "linear head": {"clustering__partition": "one", "tuning__method": "head"},
    "heads of clusters": {"tuning__method": "head", "inference__nearest": 2},
    "augmented heads": {"tuning__method": "head", "data__augment": "crop"},
    "ridge": {"clustering__partition": "one", "tuning__method": "ridge"},
    "ridge of clusters": {"tuning__method": "ridge", "inference__nearest": 0},
    "expanded ridge": {"clustering__partition": "one", "tuning__method": "ridge", "tuning__expand": 24},
    "a common head beside clusters": {"common__method": "ridge", "common__expand": 8, "inference__nearest": 2},
    "a common head beside shards": {
        "clustering__partition": "random",
        "clustering__shards": 3,
        "common__method": "ncm",
        "inference__nearest": 0,
    },
    "nearest class mean": {"clustering__partition": "one", "tuning__method": "ncm"},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Makes a copy of a trained run of a combination, trained once: built(name, folder) -> (folder, config)."""
    made = {}

    def copy_of(name, folder):
        if name not in made:
            config, root = small_config(**COMBINATIONS[name]), tmp_path_factory.mktemp("built") / "run"
            with small_run(root, config=config) as run:
                build(run)
            made[name] = root, config
        root, config = made[name]
        shutil.copytree(root, folder)
        return folder, config

    return copy_of


@pytest.mark.parametrize("name", COMBINATIONS)
def test_an_erasure_gives_the_state_of_never_having_had_the_records(name, built, tmp_path):
    folder, config = built(name, tmp_path / "run")
    with small_run(folder, config=config) as run:
        chosen = [run.catalog.live("train").ids[i] for i in (3, 40)]
        before = run.catalog.manifest().entries
        for one in chosen:
            done = erase.request_erasure(run, [one])
        after = run.catalog.manifest().entries
        found, verdict = state(run), audit(run)
        assert verdict.ok and verdict.identical == len(after), verdict.text()
        assert done.outcome.published and set(before.values()) != set(after.values())
    assert examine(folder, devices=jax.devices()[:1]).healthy
    if name in (
        "SISA",
        "one head",
        "a common head beside clusters",
    ):  # the audit rebuilt all; once more from the source
        with small_run(tmp_path / "fresh", without(small_source(), set(chosen)), config) as run:
            build(run)
            assert differences(found, state(run)) == []


@pytest.mark.parametrize("name", ["random parts", "SISA", "ridge of clusters"])
def test_an_erasure_touches_the_record_s_own_part_only(name, built, tmp_path):
    folder, config = built(name, tmp_path / "run")
    with small_run(folder, config=config) as run:
        records = run.catalog.live("train")
        sampled = set() if config.clustering.partition == "random" else set(run.catalog.sample("train", 30).ids)
        one = next(i for i, name in enumerate(records.ids) if name not in sampled)
        before = run.catalog.manifest().entries
        erase.request_erasure(run, [records.ids[one]])
        after = run.catalog.manifest().entries
    assert {key for key in after if after[key] != before[key]} == {records.clusters[one]}


def test_shards_are_dealt_by_the_id_alone():
    ids = [f"record-{i}" for i in range(4000)]
    whole = clustering.shard_of(ids, 8, seed=1)
    assert np.array_equal(clustering.shard_of(ids[100:200], 8, seed=1), whole[100:200])
    counts = np.bincount(whole, minlength=8)
    assert counts.min() > 400 and counts.max() < 600
    assert not np.array_equal(clustering.shard_of(ids, 8, seed=2), whole)


def test_closed_forms_pass_no_image_and_heads_see_features_only(built, tmp_path):
    for name in ("ridge", "linear head"):
        folder, config = built(name, tmp_path / name)
        with small_run(folder, config=config) as run:
            row = next(iter(run.catalog.slices().values()))
            assert run.tuning_spec.on_features and row.images == (0 if name == "ridge" else config.tuning.epochs * 100)


def test_a_head_on_features_is_the_head_on_images(built, tmp_path):
    """The same head with the backbone in the program: an augmentation that does nothing turns the features off."""
    folder, config = built("linear head", tmp_path / "run")
    with small_run(folder, config=config) as run:
        found = load_slice(run, next(iter(run.catalog.manifest().entries.values())))
        records = run.catalog.live("train")
        slow = dataclasses.replace(run.tuning_spec, spec=dataclasses.replace(run.image_spec, augment="flip"))
        key = next(iter(run.catalog.manifest().entries))
        job = tuning_job(key, records.rows, config)
        labels = np.zeros(run.catalog.rows_used(), np.int32)
        labels[records.rows] = records.labels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "augmented", lambda images, spec, key: centred(images, spec))
            (made,) = tune.tune(slow, run.backbone, [job], run.images, labels, run.mesh)
    np.testing.assert_allclose(found.kernel, made.slice.kernel, atol=2e-5)
    np.testing.assert_allclose(found.bias, made.slice.bias, atol=2e-5)


def tuning_job(key, rows, config):
    from lmeraser_jax.training.jobs import make_job

    return make_job(key, rows, config.tuning)


def literal_answers(run, images) -> np.ndarray:
    """Probabilities [K, N, Y] of every published slice, one at a time, without the prediction program."""
    manifest, config = run.catalog.manifest(), run.backbone.config
    pixels, found = centred(jnp.asarray(images), run.image_spec), []
    for key in load_model(run).keys:
        part = load_slice(run, manifest.entries[key])
        width = run.config.tuning.active_prompt_width
        prompt = (
            place_prompt(jnp.asarray(part.prompt), config.image_size, width, config.channels)[None] if width else 0.0
        )
        params = part.backbone if part.backbone is not None else run.backbone.params
        logits = backbone_lib.features(config, params, pixels + prompt) @ part.kernel + part.bias[None]
        found.append(np.asarray(jax.nn.softmax(logits, axis=-1)))
    return np.stack(found)


@pytest.mark.parametrize(
    "name", ["SISA", "SISA of whole networks", "ridge of clusters", "retrain", "DAM-VP", "heads of clusters"]
)
def test_all_clusters_answer_together(name, built, tmp_path):
    folder, config = built(name, tmp_path / "run")
    with small_run(folder, config=config) as run:
        images = run.images[run.catalog.live("test").rows]
        each = literal_answers(run, images)
        for aggregate in ("mean", "vote"):
            asked = dataclasses.replace(run.config.inference, nearest=0, aggregate=aggregate)
            everyone = dataclasses.replace(run, config=dataclasses.replace(run.config, inference=asked))
            found = predict(load_model(everyone), images)
            if aggregate == "vote":
                wanted = (each.argmax(axis=2)[..., None] == np.arange(each.shape[2])).mean(axis=0)
            else:
                wanted = each.mean(axis=0)
            np.testing.assert_allclose(found.probabilities, wanted, atol=2e-5)
            assert (np.sort(found.clusters, axis=1) == np.arange(len(each))).all()


@pytest.mark.parametrize("name", ["a common head beside clusters", "a common head beside shards"])
def test_the_common_head_joins_with_its_weight(name, built, tmp_path):
    folder, config = built(name, tmp_path / "run")
    with small_run(folder, config=config) as run:
        records, images = run.catalog.live("train"), run.images[run.catalog.live("test").rows]
        features = run.features(records)
        head, _ = closed_form.solve_members(config.common, features, records.labels, 10)
        plain = closed_form.expand(run.extractor()(images), config.common.expand)
        together = np.asarray(jax.nn.softmax(plain @ head.kernel + head.bias, axis=-1))
        found = {}
        for weight in (0.0, 0.3, 1.0):
            asked = dataclasses.replace(run.config.inference, common_weight=weight)
            one = dataclasses.replace(run, config=dataclasses.replace(run.config, inference=asked))
            found[weight] = predict(load_model(one), images).probabilities
        np.testing.assert_allclose(found[1.0], together, atol=2e-4)
        np.testing.assert_allclose(found[0.3], 0.7 * found[0.0] + 0.3 * together, atol=2e-4)
        assert np.abs(found[0.0] - together).max() > 0.05


def test_quarantine_silences_the_common_head_and_every_erasure_makes_it_again(built, tmp_path):
    folder, config = built("a common head beside shards", tmp_path / "run")
    with small_run(folder, config=config) as run:
        predictor = Predictor(run)
        before = predictor.state.common_ref
        one = run.catalog.live("train").ids[5]
        accepted = erase.request_erasure(run, [one], quarantine=True, defer=True)
        assert before and predictor.follow().common_ref == "" and predictor.state.arrays.common is None
        erase.process(run)
        assert predictor.follow().common_ref not in ("", before)
        shown = overview(run.layout, run.catalog, run.config)
        assert "common" not in [cluster.key for cluster in shown.clusters]
        assert "common head: ncm of all 99 private records" in shown.table()
        receipt = json.loads(run.layout.receipt(accepted.request.id).read_text())
        assert len(receipt["clusters"]) == 2, "the shard and the common head"
        assert receipt["work"]["clusters_tuned"] == 2
        assert before not in run.catalog.slices() and not run.layout.slice(before).exists()


def test_of_equal_votes_the_first_class_wins():
    logits = np.array([[[5.0, 0, 0], [0, 0, 5.0]]], np.float32)
    each = jax.nn.one_hot(jax.nn.softmax(logits).argmax(axis=-1), 3)
    assert int(np.asarray(each.mean(axis=1)).argmax()) == 0


def test_an_image_goes_to_the_same_shard_always_and_images_spread(built, tmp_path):
    folder, config = built("random parts", tmp_path / "run")
    with small_run(folder, config=config) as run:
        images = run.images[run.catalog.live("train").rows]
        model = load_model(run)
        found, again = predict(model, images), predict(model, images[::-1])
        assert np.array_equal(found.clusters, again.clusters[::-1])
        assert len(np.unique(found.clusters)) == 4
        each = literal_answers(run, images)
        chosen = each[found.clusters[:, 0], np.arange(len(images))]
        np.testing.assert_allclose(found.probabilities, chosen, atol=2e-5)


def test_a_quarantined_shard_is_not_asked(built, tmp_path):
    for name in ("SISA", "random parts"):
        folder, config = built(name, tmp_path / name)
        with small_run(folder, config=config) as run:
            one = run.catalog.live("train").ids[5]
            erase.request_erasure(run, [one], quarantine=True, defer=True)
            (out,) = run.catalog.quarantined()
            model = load_model(run)
            found = predict(model, run.images[:30])
            assert model.keys.index(out) not in np.unique(found.clusters)
            np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)


def test_a_fixed_head_never_moves_and_is_the_features_that_noise_excites(built, tmp_path):
    folder, config = built("DAM-VP", tmp_path / "run")
    with small_run(folder, config=config) as run:
        mapping = noise_activation(run.backbone, 10)
        assert list(mapping) == sorted(set(mapping)) and run.tuning_spec.mapping == mapping
        wanted = np.zeros((16, 10), np.float32)
        wanted[list(mapping), np.arange(10)] = 1
        for ref in run.catalog.manifest().entries.values():
            part = load_slice(run, ref)
            assert np.array_equal(part.kernel, wanted) and not part.bias.any() and part.prompt.any()


def test_noise_activation_is_the_literal_rule():
    """512 images of N(0, 1), population standard deviation, the C largest, by place (DAM-VP, head-missing)."""
    from tuning_problem import small_backbone

    backbone = small_backbone()
    found = noise_activation(backbone, 5)
    rng = np.random.default_rng(3)
    size, channels = backbone.config.image_size, backbone.config.channels
    noise = rng.standard_normal((8192, size, size, channels), np.float32)
    spread = np.asarray(backbone_lib.features(backbone.config, backbone.params, jnp.asarray(noise))).std(axis=0)
    assert spread[list(found)].mean() > 0.97 * np.sort(spread)[-5:].mean()


def test_one_head_is_tuned_with_every_image_under_its_own_cluster_s_prompt(built, tmp_path):
    """The first step against a literal one: the head's gradient is that of all images, each with its prompt."""
    folder, config = built("one head", tmp_path / "run")
    with small_run(folder, config=config) as run:
        (ref,) = set(run.catalog.manifest().entries.values())
        part, keys, records = load_slice(run, ref), load_model(run).keys, run.catalog.live("train")
        assert part.prompt.shape[0] == len(keys) and len(np.unique(part.prompt, axis=0)) == len(keys)
        problem = dataclasses.replace(run.tuning_spec, prompts=len(keys))
        which = np.array([keys.index(key) for key in records.clusters])
        pixels = centred(jnp.asarray(run.images[records.rows]), run.image_spec)
        labels, valid = jnp.asarray(records.labels + 10 * which, jnp.int32), jnp.ones(len(records), bool)
        given, slopes_of = (
            jax.tree.map(jnp.asarray, part),
            jax.jit(jax.value_and_grad(train_step.cluster_loss), static_argnums=1),
        )
        loss, grads = slopes_of(given, problem, run.backbone.params, pixels, labels, valid)
        alone = dataclasses.replace(run.tuning_spec, tuning=dataclasses.replace(config.tuning, method="prompt+head"))
        each, heads, plain = [], 0.0, jnp.asarray(records.labels)
        for k in range(len(keys)):
            mine, own = jnp.asarray(which == k), given._replace(prompt=given.prompt[k])
            value, slopes = slopes_of(own, alone, run.backbone.params, pixels, plain, mine)
            share = float(mine.sum()) / len(records)
            each.append(float(value) * share)
            heads = heads + slopes.kernel * share
            np.testing.assert_allclose(grads.prompt[k], slopes.prompt * share, atol=1e-6)
        np.testing.assert_allclose(float(loss), sum(each), rtol=1e-5)
        np.testing.assert_allclose(grads.kernel, heads, atol=1e-6)


def test_one_head_has_no_cheap_request_and_no_rollback(built, tmp_path):
    folder, config = built("one head", tmp_path / "run")
    with small_run(folder, config=config) as run:
        assert overview(run.layout, run.catalog, run.config).expected_share == 1.0
        with pytest.raises(ValueError, match="all clusters share one slice"):
            rollback.rollback(run, next(iter(run.catalog.manifest().entries)))


def test_more_classes_than_features_are_refused(tmp_path):
    config = small_config(tuning__method="prompt", backbone__width=8, backbone__heads=2)
    with small_run(tmp_path / "run", config=config) as run:
        with pytest.raises(ValueError, match="10 classes need a feature each, the backbone has 8; use prompt"):
            build(run)


def test_the_backbone_is_tuned_and_the_frozen_one_stays(built, tmp_path):
    folder, config = built("retrain", tmp_path / "run")
    with small_run(folder, config=config) as run:
        part = load_slice(run, next(iter(run.catalog.manifest().entries.values())))
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), part.backbone, run.backbone.params)
        assert min(jax.tree.leaves(moved)) > 0, "every parameter gets a gradient"
        assert backbone_lib.load(run.layout.backbone)[0].digest == run.backbone.digest


def test_features_are_computed_once_for_all_augmentations(tmp_path, monkeypatch):
    """They are of images as they are: a comparison's base has them for heads on features as well."""
    found = {}
    for augment in ("paper", "none"):
        with small_run(tmp_path / "run", config=small_config(data__augment=augment)) as run:
            found[augment] = run.features(run.catalog.live("train"))
            monkeypatch.setattr(type(run), "extractor", lambda run: pytest.fail("features are computed again"))
    np.testing.assert_array_equal(found["paper"], found["none"])


@pytest.mark.parametrize("name", ["SISA", "retrain", "ridge"])
def test_methods_are_evaluated_like_any_other(name, built, tmp_path):
    folder, config = built(name, tmp_path / "run")
    with small_run(folder, config=config) as run:
        found = evaluate(run, linear=False)
        assert 0 <= found.accuracy <= 1 and found.table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning__method": "ridge", "tuning__slices": 2}, "a closed form has no stages to repeat"),
        ({"tuning__method": "prompt", "tuning__prompt_width": 0}, "must be above 0 for tuning.method=prompt"),
        ({"tuning__method": "ridge", "tuning__penalty": 0.0}, "--config.tuning.penalty=0.0: must be above 0"),
        ({"tuning__method": "heads"}, "one of prompt+head, prompt, prompts+one head, head, backbone, ridge, ncm"),
        ({"clustering__partition": "hash"}, "one of adaptive, random, one"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        small_config(**changes)


@pytest.mark.parametrize(
    ("name", "nearest", "expected"),
    [
        ("single prompt", 1, 1),
        ("DAM-VP", 1, 2),
        ("DAM-VP", 0, 5),
        ("SISA", 0, 3),
        ("retrain", 1, 1),
        ("ridge of clusters", 0, 1),
        ("a common head beside clusters", 2, 3),
        ("a common head beside shards", 0, 4),
    ],
)
def test_the_passes_of_an_answer_are_those_that_the_program_makes(
    name, nearest, expected, built, tmp_path, monkeypatch
):
    folder, config = built(name, tmp_path / "run")
    config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, nearest=nearest))
    counted, kept = [], backbone_lib.features

    def features(architecture, params, pixels):
        counted.append(len(pixels))
        return kept(architecture, params, pixels)

    with small_run(folder, config=config) as run:
        model = load_model(run)
        draws = None  # the stack is padded: an empty place must pass nothing
        if config.clustering.partition != "adaptive":
            draws = np.zeros((2, len(model.arrays.present)), np.float32)
        monkeypatch.setattr(backbone_lib, "features", features)
        with jax.disable_jit():
            predict_module.routed_probabilities(run.tuning_spec, model.routing, model.arrays, run.images[:2], draws)
        assert sum(counted) / 2 == passes(run, len(model.keys)) == expected


def test_one_program_answers_all_batches(built, tmp_path, monkeypatch):
    import chex

    folder, config = built("SISA", tmp_path / "run")
    monkeypatch.setattr(
        predict_module, "routed_probabilities", chex.assert_max_traces(predict_module.routed_probabilities, 1)
    )
    predict_module.compiled.cache_clear()
    with small_run(folder, config=config) as run:
        model = load_model(run)
        for count in (1, 16, 40):
            predict(model, run.images[:count])
    predict_module.compiled.cache_clear()
