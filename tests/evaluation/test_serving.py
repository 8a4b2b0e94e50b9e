"""Answers of a process that stays alive, while erasures are accepted, quarantined and published beside it."""

import contextlib
import dataclasses
import shutil
import threading

import chex
import jax
import numpy as np
import pytest
from helpers import small_run
from test_predict import reference, with_nearest

from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import predict, serving
from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.storage import requests
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, save_clustering
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("serving") / "run"
    with small_run(workdir) as run:
        build(run)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A writer on a copy of the trained workdir."""
    shutil.copytree(trained, tmp_path / "run")
    with small_run(tmp_path / "run") as run:
        yield run


@contextlib.contextmanager
def reader(run):
    """Another connection to the workdir, as another process has it."""
    with open_run(run.layout.root, devices=jax.devices()[:1]) as other:
        yield other


def images_of(run):
    return np.array(run.images[run.catalog.live("test", "train").rows])


def unsampled(run, count=1):
    """Records that are not sampled, of different clusters."""
    sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
    records = run.catalog.live("train")
    homes = {key: name for name, key in zip(records.ids, records.clusters, strict=True) if name not in sample}
    return [homes[key] for key in sorted(homes)][:count]


def cluster_of(run, name):
    return run.catalog.clusters_of([name])[name]


def bits(found):
    """An answer as something that can be compared bit for bit."""
    return found.probabilities.tobytes(), tuple(found.keys[k] for k in found.clusters.ravel())


def fresh(run, images):
    """What a process that starts now answers."""
    return predict.predict(predict.load_model(run), images)


@pytest.mark.parametrize("nearest", [1, 3])
def test_a_quarantined_cluster_is_out_of_routing_from_the_commit_on(run, nearest):
    images, name = images_of(run), unsampled(run)[0]
    key = cluster_of(run, name)
    with reader(run) as other:
        predictor = Predictor(with_nearest(other, nearest))
        before = predictor(images)
        assert key in {before.keys[k] for k in before.clusters.ravel()}
        requests.accept(run.catalog, [name], quarantine=True)
        found = predictor(images)
        probabilities, clusters = reference(run, images, nearest, {key})
        assert [[found.keys[k] for k in row] for row in found.clusters] == clusters
        np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-5)
        alone = predict.predict(predict.load_model(with_nearest(other, nearest)), images)
        assert bits(alone) == bits(found), "a process that starts now answers the same"


@pytest.mark.parametrize("nearest", [1, 3, 99])
def test_nothing_of_a_quarantined_cluster_reaches_an_answer(run, nearest):
    """Its prototype, prompt and head are not a number in memory; the same in a healthy cluster shows."""
    images, name = images_of(run), unsampled(run)[0]
    requests.accept(run.catalog, [name], quarantine=True)
    model = predict.load_model(with_nearest(run, nearest))
    clean, out = predict.predict(model, images), model.keys.index(cluster_of(run, name))

    def poisoned(k):
        stack = jax.tree.map(lambda leaf: leaf.at[k].set(np.nan), model.arrays.stack)
        arrays = model.arrays._replace(stack=stack, prototypes=model.arrays.prototypes.at[k].set(np.nan))
        return predict.predict(dataclasses.replace(model, arrays=arrays), images)

    assert bits(poisoned(out)) == bits(clean) and np.isfinite(clean.probabilities).all()
    assert bits(poisoned((out + 1) % len(model.keys))) != bits(clean), "the poison works"
    assert not any(np.asarray(leaf[out]).any() for leaf in jax.tree.leaves(model.arrays.stack)), (
        "its slice is not even loaded"
    )


def test_with_fewer_healthy_clusters_than_asked_for_the_mean_is_over_those(run):
    images, name = images_of(run)[:8], unsampled(run)[0]
    requests.accept(run.catalog, [name], quarantine=True)
    found = Predictor(with_nearest(run, 99))(images)
    healthy = [key for key in found.keys if key != cluster_of(run, name)]
    probabilities, _ = reference(run, images, 99, {cluster_of(run, name)})
    np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-5)
    assert (found.clusters[:, : len(healthy)] >= 0).all() and (found.clusters[:, len(healthy) :] == -1).all()


def test_a_batch_that_a_quarantine_overtook_is_computed_again(run, monkeypatch):
    """The erasure is accepted after the first of many batches: only answers that used the cluster are redone."""
    images, name = images_of(run), unsampled(run)[0]
    key, real, sizes = cluster_of(run, name), serving.predict, []
    with reader(run) as other:
        predictor = Predictor(other)
        touched = int((np.array(predictor(images).keys)[predictor(images).clusters[:16, 0]] == key).sum())

        def overtaken(model, batch):
            found = real(model, batch)
            sizes.append(len(batch))
            if len(sizes) == 1:
                requests.accept(run.catalog, [name], quarantine=True)
            return found

        monkeypatch.setattr(serving, "predict", overtaken)
        found = predictor(images)
    assert bits(found) == bits(fresh(run, images))
    assert sum(sizes) == len(images) + touched and touched > 0


def test_a_cluster_that_joins_during_a_call_may_take_any_image(run, monkeypatch):
    """The quarantine is lifted, with another slice, after the first of many batches."""
    images, name = images_of(run), unsampled(run)[0]
    key, real, sizes = cluster_of(run, name), serving.predict, []
    requests.accept(run.catalog, [name], quarantine=True)

    def overtaken(model, batch):
        found = real(model, batch)
        sizes.append(len(batch))
        if len(sizes) == len(images) // 16:
            erase.process(run)
        return found

    with reader(run) as other:
        predictor = Predictor(other)
        monkeypatch.setattr(serving, "predict", overtaken)
        found = predictor(images)
    assert bits(found) == bits(fresh(run, images)) and key in {found.keys[k] for k in found.clusters[:, 0]}


def test_publishing_lifts_the_quarantine_and_loads_only_what_changed(run, monkeypatch):
    images, name = images_of(run), unsampled(run)[0]
    key, loaded, real = cluster_of(run, name), [], predict.load_slice
    with reader(run) as other:
        predictor = Predictor(other)
        predictor(images)
        requests.accept(run.catalog, [name], quarantine=True)
        state = predictor.follow()
        held = [np.asarray(leaf[state.keys.index(key)]) for leaf in jax.tree.leaves(state.arrays.stack)]
        assert not any(leaf.any() for leaf in held), "still in memory"
        monkeypatch.setattr(predict, "load_slice", lambda run, ref: loaded.append(ref) or real(run, ref))
        erase.process(run)
        found = predictor(images)
        assert loaded == [run.catalog.manifest().entries[key]]
        assert key in {found.keys[k] for k in found.clusters[:, 0]}
        model = predictor.follow()
    new = load_slice(run, loaded[0])
    pairs = zip(jax.tree.leaves(model.arrays.stack), jax.tree.leaves(new), strict=True)
    assert all(np.array_equal(leaf[model.keys.index(key)], part) for leaf, part in pairs)
    assert bits(found) == bits(fresh(run, images))


def test_a_sampled_record_takes_its_own_cluster_out_and_the_new_clustering_is_followed(run, monkeypatch):
    images, loaded, real = images_of(run), [], predict.load_slice
    clustering = load_clustering(run.layout, run.catalog.manifest().clustering)
    name = clustering.sample[0]
    with reader(run) as other:
        predictor = Predictor(other)
        predictor(images)
        requests.accept(run.catalog, [name], quarantine=True)
        assert run.catalog.quarantined() == {clustering.keys[clustering.labels[0]]}
        found = predictor(images)
        assert run.catalog.quarantined().isdisjoint(found.keys[k] for k in found.clusters.ravel())
        outcome, _ = erase.process(run)
        assert outcome.reclustered and outcome.reused, "some slices move to another place"
        with monkeypatch.context() as patch:
            patch.setattr(predict, "load_slice", lambda run, ref: loaded.append(ref) or real(run, ref))
            found, model = predictor(images), predictor.follow()
        assert len(loaded) == outcome.retuned
    wanted = predict.load_model(run)
    assert bits(found) == bits(fresh(run, images)) and model.keys == wanted.keys != clustering.keys
    chex.assert_trees_all_equal(
        (model.arrays.stack, model.arrays.prototypes, model.arrays.present),
        (wanted.arrays.stack, wanted.arrays.prototypes, wanted.arrays.present),
    )


def test_slices_move_with_their_clusters(run, monkeypatch):
    """The same clusters at other places: nothing is read again, and the answers are the same."""
    images, manifest = images_of(run), run.catalog.manifest()
    old = load_clustering(run.layout, manifest.clustering)
    last = len(old.keys) - 1
    turned = dataclasses.replace(
        old, digest="f" * 64, labels=last - old.labels, keys=old.keys[::-1], prototypes=old.prototypes[::-1]
    )
    with reader(run) as other:
        predictor = Predictor(other)
        before = predictor(images)
        save_clustering(run.layout, turned)
        run.catalog.publish(turned.digest, manifest.fingerprint, manifest.recipe_constants_digest, manifest.entries, [])
        monkeypatch.setattr(predict, "load_slice", None)
        found = predictor(images)
    assert found.keys == before.keys[::-1] and bits(found) == bits(before)


def test_without_quarantine_nothing_changes_until_it_is_published(run):
    images, name = images_of(run), unsampled(run)[0]
    with reader(run) as other:
        predictor = Predictor(other)
        before = predictor(images)
        model = predictor.follow()
        erase.request_erasure(other, [name], defer=True)
        assert bits(predictor(images)) == bits(before) and predictor.follow() is model
        erase.process(run)
        assert bits(predictor(images)) == bits(fresh(run, images)) != bits(before)


def test_a_deferred_quarantine_needs_no_writer_and_holds_until_it_is_served(run):
    """Also for what the same connection commits."""
    first, second = unsampled(run, 2)
    with reader(run) as other:
        predictor = Predictor(other)
        for count, name in enumerate((first, second), 1):
            erase.request_erasure(other, [name], quarantine=True, defer=True)
            predictor(images_of(run)[:4])
            assert predictor.follow().refs.count("") == count
        images = images_of(run)
        assert bits(predictor(images)) == bits(fresh(run, images))
        erase.process(run)
        assert "" not in predictor.follow().refs


def test_everything_quarantined_is_an_error_until_it_is_served(run):
    everyone = run.catalog.live("train")
    names = list(dict(zip(everyone.clusters, everyone.ids, strict=True)).values())
    with reader(run) as other:
        predictor = Predictor(other)
        requests.accept(run.catalog, names, quarantine=True)
        for attempt in (lambda: predictor(images_of(run)), lambda: predict.load_model(run)) * 2:
            with pytest.raises(UserError, match=r"all \d clusters are quarantined.* lmeraser process --workdir="):
                attempt()
        erase.process(run)
        images = images_of(run)
        assert bits(predictor(images)) == bits(fresh(run, images))


def test_nothing_is_compiled_anew_for_a_mask_or_another_slice(run, monkeypatch):
    images, names = images_of(run), unsampled(run, 3)
    traced = chex.assert_max_traces(predict.routed_probabilities, 1)
    monkeypatch.setattr(predict, "routed_probabilities", traced)
    caches = (predict.compiled, predict._place_program)
    for cache in caches:
        cache.cache_clear()
    try:
        predictor = Predictor(run)
        for name in names:
            requests.accept(run.catalog, [name], quarantine=True)
            predictor(images)
            erase.process(run)
            predictor(images)
        assert predict._place_program(run.mesh)._cache_size() == 1
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("sampled", [False, True])
def test_a_state_that_is_replaced_while_it_is_read_is_read_again(run, monkeypatch, sampled):
    """The writer publishes and purges after the reader has looked up which slices to load."""
    clustering, real, loaded = run.catalog.manifest().clustering, predict.load_slice, []
    names = [load_clustering(run.layout, clustering).sample[0]] if sampled else unsampled(run)

    def overtaken(reading, ref):
        loaded.append(ref)
        if len(loaded) == 1:
            erase.request_erasure(run, names)
        return real(reading, ref)

    with reader(run) as other, monkeypatch.context() as patch:
        patch.setattr(predict, "load_slice", overtaken)
        model = predict.load_model(other)
    assert (run.catalog.manifest().clustering != clustering) == sampled
    wanted = predict.load_model(run)
    assert (model.keys, model.refs) == (wanted.keys, wanted.refs)
    chex.assert_trees_all_equal(
        (model.arrays.stack, model.arrays.prototypes), (wanted.arrays.stack, wanted.arrays.prototypes)
    )


def test_what_is_accepted_while_a_state_is_loaded_is_noticed(run, monkeypatch):
    """While the first state is loaded, and while one that was published is."""
    names, real = unsampled(run, 2), predict.load_slice
    coming = [names[0]]

    def overtaken(reading, ref):
        if coming:
            requests.accept(run.catalog, [coming.pop()], quarantine=True)
        return real(reading, ref)

    monkeypatch.setattr(predict, "load_slice", overtaken)
    with reader(run) as other:
        predictor = Predictor(other)
        assert "" not in predictor.state.refs and predictor.follow().refs.count("") == 1
        erase.process(run)
        coming.append(names[1])
        assert "" not in predictor.follow().refs and not coming
        assert predictor.follow().refs.count("") == 1


def test_a_state_that_is_replaced_again_and_again_is_given_up(run, monkeypatch):
    def replaced(_, ref):
        with run.catalog.transaction():
            manifest = run.catalog.manifest()
            run.catalog.publish(manifest.clustering, "", "", manifest.entries, [])
        raise UserError("gone")

    monkeypatch.setattr(predict, "load_slice", replaced)
    with reader(run) as other, pytest.raises(UserError, match=r"replaced 20 times while it was read; try again"):
        predict.load_model(other)


@pytest.mark.parametrize("alive", [True, False], ids=["follows", "starts anew"])
def test_readers_see_one_state_throughout(run, alive):
    """A thread answers without a pause while erasures are accepted, served and purged: sampled and not."""
    images, answers, wrong, stop = images_of(run)[:16], [], [], threading.Event()
    rows = run.catalog.live("test", "train").rows[:16]

    def answering():
        try:
            with reader(run) as other:
                predictor = Predictor(other)
                while not stop.is_set():
                    found = predictor(images) if alive else predict.predict(predict.load_model(other), images)
                    answers.append(bits(found))
        except BaseException as error:
            wrong.append(error)

    def now():
        return bits(predict.predict(predict.load_model(run), images))

    def more():
        seen = len(answers)
        while len(answers) < seen + 2 and not wrong:
            stop.wait(0.005)

    assert np.array_equal(images, run.images[rows])
    thread = threading.Thread(target=answering)
    states = [now()]
    thread.start()
    try:
        more()
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        for name in (sample[0], *unsampled(run, 2)):
            requests.accept(run.catalog, [name], quarantine=True)
            states.append(now())
            more()
            erase.process(run)
            states.append(now())
        more()
    finally:
        stop.set()
        thread.join()
    assert not wrong, wrong
    order = [states.index(answer) for answer in answers]
    assert order == sorted(order) and {0, len(states) - 1} <= set(order) and len(set(states)) > 4
