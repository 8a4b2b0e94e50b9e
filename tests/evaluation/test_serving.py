"""Answers of a process that stays alive, while erasures are accepted, quarantined and published beside it."""

import contextlib
import dataclasses
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
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice
from lmeraser_jax.unlearning.run import open_run


@pytest.fixture
def run(trained_workdir):
    """A writer."""
    with small_run(trained_workdir) as run:
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
    by_cluster = {key: name for name, key in zip(records.ids, records.clusters, strict=True) if name not in sample}
    return [by_cluster[key] for key in sorted(by_cluster)][:count]


def quarantine(run, *names):
    requests.accept(run.catalog, names, quarantine=True)


def cluster_of(run, name):
    return run.catalog.clusters_of([name])[name]


def used_keys(answers):
    return {answers.keys[k] for k in answers.clusters.ravel() if k >= 0}


def bits(answers):
    """Answers as something that can be compared bit for bit."""
    return answers.probabilities.tobytes(), tuple(answers.keys[k] for k in answers.clusters.ravel())


def fresh(run, images):
    """What a process that starts now answers."""
    return predict.predict(predict.load_model(run), images)


def count_loads(monkeypatch):
    """The references that `load_model` reads from now on."""
    loaded, real = [], predict.load_slices
    monkeypatch.setattr(
        predict, "load_slices", lambda run, manifest, refs: loaded.extend(refs) or real(run, manifest, refs)
    )
    return loaded


@pytest.mark.parametrize("nearest", [1, 3, 99])
def test_a_quarantined_cluster_reaches_no_answer_from_the_commit_on(run, nearest):
    """Answers are those of the other clusters; with fewer of them than asked for, their mean."""
    images, name = images_of(run), unsampled(run)[0]
    key = cluster_of(run, name)
    with reader(run) as other:
        predictor = Predictor(with_nearest(other, nearest))
        assert key in used_keys(predictor(images))
        quarantine(run, name)
        answers, model = predictor(images), predict.load_model(with_nearest(other, nearest))
    probabilities, clusters = reference(run, images, nearest, {key})
    healthy = min(nearest, len(model.keys) - 1)
    assert [[answers.keys[k] for k in row[:healthy]] for row in answers.clusters] == clusters
    assert (answers.clusters[:, healthy:] == -1).all()
    np.testing.assert_allclose(answers.probabilities, probabilities, atol=1e-5)
    assert bits(predict.predict(model, images)) == bits(answers), "a process that starts now answers the same"

    def poisoned(k):  # its prototype, prompt and head are not a number in memory
        stack = jax.tree.map(lambda leaf: leaf.at[k].set(np.nan), model.arrays.stack)
        arrays = model.arrays._replace(stack=stack, prototypes=model.arrays.prototypes.at[k].set(np.nan))
        return predict.predict(dataclasses.replace(model, arrays=arrays), images)

    out = model.keys.index(key)
    assert bits(poisoned(out)) == bits(answers) and np.isfinite(answers.probabilities).all()
    assert bits(poisoned((out + 1) % len(model.keys))) != bits(answers), "the poison works"
    assert not any(np.asarray(leaf[out]).any() for leaf in jax.tree.leaves(model.arrays.stack)), "it is not even loaded"


def overtake(monkeypatch, call, change):
    """Runs `change` after so many device batches of a predictor; returns the sizes of all batches."""
    real, sizes = serving.predict, []

    def overtaken(model, batch):
        answers = real(model, batch)
        sizes.append(len(batch))
        if len(sizes) == call:
            change()
        return answers

    monkeypatch.setattr(serving, "predict", overtaken)
    return sizes


def test_a_batch_that_a_quarantine_overtook_is_computed_again(run, monkeypatch):
    """The erasure is accepted after the first of many batches: only answers that used the cluster are redone."""
    images, name = images_of(run), unsampled(run)[0]
    key = cluster_of(run, name)
    with reader(run) as other:
        predictor = Predictor(other)
        before = predictor(images)
        touched = sum(before.keys[k] == key for k in before.clusters[:16, 0])
        sizes = overtake(monkeypatch, 1, lambda: quarantine(run, name))
        answers = predictor(images)
    assert bits(answers) == bits(fresh(run, images))
    assert sum(sizes) == len(images) + touched and touched > 0


def test_a_cluster_that_joins_during_a_call_may_take_any_image(run, monkeypatch):
    """The quarantine is lifted, with another slice, after the last full batch."""
    images, name = images_of(run), unsampled(run)[0]
    key = cluster_of(run, name)
    quarantine(run, name)
    with reader(run) as other:
        predictor = Predictor(other)
        overtake(monkeypatch, len(images) // 16, lambda: erase.process(run))
        answers = predictor(images)
    assert bits(answers) == bits(fresh(run, images)) and key in used_keys(answers)


def test_publishing_lifts_the_quarantine_and_loads_only_what_changed(run, monkeypatch):
    images, name = images_of(run), unsampled(run)[0]
    key = cluster_of(run, name)
    with reader(run) as other:
        predictor = Predictor(other)
        predictor(images)
        quarantine(run, name)
        place = predictor.follow().keys.index(key)
        leaves = jax.tree.leaves(predictor.state.arrays.stack)
        assert not any(np.asarray(leaf[place]).any() for leaf in leaves), "still in memory"
        loaded = count_loads(monkeypatch)
        erase.process(run)
        answers = predictor(images)
        assert loaded == [run.catalog.manifest().entries[key]] and key in used_keys(answers)
        leaves = jax.tree.leaves(predictor.follow().arrays.stack)
    new = jax.tree.leaves(load_slice(run, loaded[0]))
    assert all(np.array_equal(leaf[place], expected) for leaf, expected in zip(leaves, new, strict=True))
    assert bits(answers) == bits(fresh(run, images))


def test_a_sampled_record_takes_its_own_cluster_out_and_the_new_clustering_is_followed(run, monkeypatch):
    images, clustering = images_of(run), load_clustering(run.layout, run.catalog.manifest().clustering)
    with reader(run) as other:
        predictor = Predictor(other)
        predictor(images)
        quarantine(run, clustering.sample[0])
        assert run.catalog.quarantined() == {clustering.keys[clustering.labels[0]]}
        assert run.catalog.quarantined().isdisjoint(used_keys(predictor(images)))
        report, _ = erase.process(run)
        assert report.reclustered and report.reused, "some slices move to another place"
        loaded = count_loads(monkeypatch)
        answers, model = predictor(images), predictor.follow()
        assert len(loaded) == report.retuned
    expected = predict.load_model(run)
    assert bits(answers) == bits(fresh(run, images)) and model.keys == expected.keys != clustering.keys
    chex.assert_trees_all_equal(model.arrays, expected.arrays)


def test_without_quarantine_nothing_changes_until_it_is_published(run):
    images, name = images_of(run), unsampled(run)[0]
    with reader(run) as other:
        predictor = Predictor(other)
        before, model = predictor(images), predictor.follow()
        erase.request_erasure(other, [name], defer=True)
        assert bits(predictor(images)) == bits(before) and predictor.follow() is model
        erase.process(run)
        assert bits(predictor(images)) == bits(fresh(run, images)) != bits(before)


def test_a_deferred_quarantine_needs_no_writer_and_holds_until_it_is_served(run):
    """Also for what the same connection commits."""
    images = images_of(run)
    with reader(run) as other:
        predictor = Predictor(other)
        for count, name in enumerate(unsampled(run, 2), 1):
            erase.request_erasure(other, [name], quarantine=True, defer=True)
            predictor(images[:4])
            assert predictor.follow().refs.count("") == count
        assert bits(predictor(images)) == bits(fresh(run, images))
        erase.process(run)
        assert "" not in predictor.follow().refs


def test_everything_quarantined_is_an_error_until_it_is_served(run):
    images, records = images_of(run), run.catalog.live("train")
    with reader(run) as other:
        predictor = Predictor(other)
        quarantine(run, *dict(zip(records.clusters, records.ids, strict=True)).values())
        for attempt in (lambda: predictor(images), lambda: predict.load_model(run)) * 2:
            with pytest.raises(UserError, match=r"all \d clusters are quarantined.* lmeraser process --workdir="):
                attempt()
        erase.process(run)
        images = images_of(run)
        assert bits(predictor(images)) == bits(fresh(run, images))


def test_nothing_is_compiled_anew_for_a_mask_or_another_slice(run, monkeypatch):
    images = images_of(run)
    traced = chex.assert_max_traces(predict.routed_probabilities, 1)
    monkeypatch.setattr(predict, "routed_probabilities", traced)
    caches = (predict.compiled, predict._place_program)
    for cache in caches:
        cache.cache_clear()
    try:
        predictor = Predictor(run)
        for name in unsampled(run, 3):
            quarantine(run, name)
            predictor(images)
            erase.process(run)
            predictor(images)
        assert predict._place_program(run.mesh)._cache_size() == 1
    finally:
        for cache in caches:
            cache.cache_clear()


def during_load(monkeypatch, change):
    """Runs `change` before the next slices that `load_model` reads, once."""
    real, pending = predict.load_slices, [change]

    def overtaken(run, manifest, refs):
        if pending and refs:
            pending.pop()()
        return real(run, manifest, refs)

    monkeypatch.setattr(predict, "load_slices", overtaken)
    return pending


@pytest.mark.parametrize("sampled", [False, True])
def test_a_state_that_is_replaced_while_it_is_read_is_read_again(run, monkeypatch, sampled):
    """The writer publishes and purges after the reader has looked up which slices to load."""
    clustering = run.catalog.manifest().clustering
    names = [load_clustering(run.layout, clustering).sample[0]] if sampled else unsampled(run)
    with reader(run) as other, monkeypatch.context() as patch:
        during_load(patch, lambda: erase.request_erasure(run, names))
        model = predict.load_model(other)
    assert (run.catalog.manifest().clustering != clustering) == sampled
    expected = predict.load_model(run)
    assert (model.keys, model.refs) == (expected.keys, expected.refs)
    chex.assert_trees_all_equal(model.arrays, expected.arrays)


def test_an_erasure_accepted_while_a_state_is_loaded_is_noticed(run, monkeypatch):
    """While the first state is loaded, and while one that was published is."""
    names = unsampled(run, 2)
    with reader(run) as other:
        during_load(monkeypatch, lambda: quarantine(run, names[0]))
        predictor = Predictor(other)
        assert "" not in predictor.state.refs and predictor.follow().refs.count("") == 1
        erase.process(run)
        pending = during_load(monkeypatch, lambda: quarantine(run, names[1]))
        assert "" not in predictor.follow().refs and not pending
        assert predictor.follow().refs.count("") == 1


def test_a_state_that_is_replaced_again_and_again_is_given_up(run, monkeypatch):
    def replaced(*_):
        manifest = run.catalog.manifest()
        run.catalog.publish(manifest.clustering, "", "", manifest.entries, [])
        raise UserError("the slice is not there any more")

    monkeypatch.setattr(predict, "load_slices", replaced)
    with reader(run) as other, pytest.raises(UserError, match=r"replaced 20 times while it was read; try again"):
        predict.load_model(other)


@pytest.mark.parametrize("alive", [True, False], ids=["follows", "starts anew"])
def test_readers_see_one_state_throughout(run, alive):
    """A thread answers without a pause while erasures are accepted, served and purged: sampled and not."""
    images, answers, errors, stop = images_of(run)[:16], [], [], threading.Event()

    def answer_until_stopped():
        try:
            with reader(run) as other:
                predictor = Predictor(other)
                while not stop.is_set():
                    answers.append(bits(predictor(images) if alive else fresh(other, images)))
        except BaseException as error:
            errors.append(error)

    def wait_for_answers():
        count = len(answers)
        while len(answers) < count + 2 and not errors:
            stop.wait(0.005)

    thread = threading.Thread(target=answer_until_stopped)
    states = [bits(fresh(run, images))]
    thread.start()
    try:
        wait_for_answers()
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        for name in (sample[0], *unsampled(run, 2)):
            for change in (lambda name=name: quarantine(run, name), lambda: erase.process(run)):
                change()
                states.append(bits(fresh(run, images)))
                wait_for_answers()
    finally:
        stop.set()
        thread.join()
    assert not errors, errors
    order = [states.index(answer) for answer in answers]
    assert order == sorted(order) and {0, len(states) - 1} <= set(order) and len(set(states)) > 4
