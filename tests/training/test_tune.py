"""The tuning program: against a literal loop, no backbone gradient, bits free of lanes and neighbours."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config
from scipy.special import logsumexp
from tuning_problem import (
    CLASSES,
    GROUPS,
    assert_near,
    reference,
    same_bits,
    small_backbone,
    small_data,
    small_spec,
    tune_groups,
    tune_jobs,
)

from lmeraser_jax.data.transforms import centred
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.training import train_step, tune
from lmeraser_jax.training.fingerprint import pinned
from lmeraser_jax.training.jobs import batches, make_job, snapshot_steps
from lmeraser_jax.training.lanes import step_batches
from lmeraser_jax.training.slices import init_slice, place_prompt
from lmeraser_jax.training.train_step import mesh_of


@pytest.fixture(scope="module")
def together():
    """All clusters tuned at once, with random augmentation."""
    return tune_groups(small_spec("flip"))


def snapped_jobs(spec):
    """The jobs of GROUPS with a snapshot after each epoch."""
    jobs = [make_job(key, rows, spec.tuning) for key, rows in GROUPS.items()]
    return [dataclasses.replace(job, snapshots=snapshot_steps(job, 1, 99)) for job in jobs]


def test_tuning_equals_a_literal_loop():
    rows = np.arange(30, 41)  # 11 members, batches of 4: the last batch is short
    sgd = {"optimizer": "sgd", "prompt_rate": 0.5, "head_rate": 0.2, "prompt_decay": 0.01, "head_decay": 0.02}
    adamw = {"optimizer": "adam", "prompt_rate": 0.03, "head_rate": 0.01, "head_decay": 0.1}
    for settings in (sgd, adamw):
        spec = small_spec(**settings)
        expected = reference(spec, make_job("b", rows, spec.tuning))[-1]
        assert_near(tune_groups(spec, {"a": np.arange(9), "b": rows})["b"].slice, expected)
        assert np.abs(expected[0]).max() > 1e-3, "the prompt did learn"


def test_the_loss_is_the_masked_mean_cross_entropy():
    spec, params, (pixels, labels) = small_spec(prompt_init=1.0, head_init=1.0), small_backbone().params, small_data()
    images, labels = centred(jnp.asarray(pixels[:4]), spec.image_spec), labels[:4]
    slice_ = init_slice(jax.random.key(1), spec.tuning, spec.architecture, CLASSES)
    prompt = place_prompt(slice_.prompt, 8, 1, 1)
    features = jax.jit(backbone_lib.features, static_argnums=0)(spec.architecture, params, images + prompt[None])
    logits = np.asarray(features @ slice_.kernel, np.float64)
    losses = logsumexp(logits, axis=1) - logits[np.arange(4), labels]
    cluster_loss = jax.jit(train_step.cluster_loss, static_argnums=1)
    for valid in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]):
        loss = cluster_loss(slice_, spec, params, images, labels, jnp.asarray(valid, bool))
        np.testing.assert_allclose(loss, (losses * valid).sum() / max(sum(valid), 1), rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt+head", pytest.param("lora", marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_lane_neighbours_or_their_number(method):
    spec = small_spec("flip", method=method, rank=2)
    together, backwards = tune_groups(spec), tune_groups(spec, dict(reversed(GROUPS.items())))
    for key, rows in GROUPS.items():
        alone = tune_groups(spec, {key: rows})[key].slice
        assert same_bits(alone, together[key].slice) and same_bits(alone, backwards[key].slice)


def test_bits_do_not_depend_on_the_length_of_a_call_or_on_where_the_images_are(together):
    short_and_streamed = tune_groups(small_spec("flip", scan_steps=3, device_bytes=0))
    assert all(same_bits(together[key].slice, short_and_streamed[key].slice) for key in GROUPS)


def several(devices):
    """So many devices; a machine without them skips the test."""
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices, there are {len(jax.devices())}")
    return devices


@pytest.mark.parametrize(
    "method", ["prompt+head", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "backbone"))]
)
def test_bits_do_not_depend_on_the_number_of_devices_or_on_which_of_them(method):
    spec = small_spec("flip", method=method, rank=2)
    alone, forwards = tune_groups(spec), tune_groups(spec, devices=several(2))
    backwards = tune_groups(spec, dict(reversed(GROUPS.items())), devices=2)
    for key in GROUPS:
        assert same_bits(forwards[key].slice, alone[key].slice) and same_bits(backwards[key].slice, alone[key].slice)


def test_several_devices_trace_the_program_once_and_obey_the_settings_of_a_run(monkeypatch):
    """The threads that call the devices do not see the settings of the caller's thread by themselves."""
    monkeypatch.setattr(train_step, "device_program", chex.assert_max_traces(train_step.device_program, n=1))
    jax.config.update("jax_debug_nans", True)
    try:
        with pinned():
            diverging = tune_groups(small_spec(seed=5, head_rate=1e38), devices=several(2))
    finally:
        jax.config.update("jax_debug_nans", False)
    assert all(tuned.failed_at is not None for tuned in diverging.values())


def test_more_clusters_than_output_slots():
    spec = small_spec("flip", min_steps=0, epochs=1)
    groups = {f"s{i}": np.arange(i, i + 1) for i in range(3 * spec.slots)}
    assert set(tune_groups(spec, groups)) == set(groups)


def shapes_of_products(jaxpr):
    """Shapes of all matrix products anywhere in a jaxpr."""
    shapes = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            shapes |= {tuple(var.aval.shape) for var in eqn.outvars}
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    shapes |= shapes_of_products(inner)
    return shapes


@pytest.mark.parametrize("method", ["prompt+head", "lora"])
def test_no_backbone_gradient_exists_in_the_program(method):
    """A gradient of a weight is a matrix product with the weight's shape; the program has none."""
    spec, params = small_spec(method=method, rank=2), small_backbone().params
    weights = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2 and 1 not in leaf.shape}
    weights |= {shape[::-1] for shape in weights}

    def loss(slice_, params):
        labels, valid = jnp.zeros(4, jnp.int32), jnp.ones(4, bool)
        return train_step.cluster_loss(slice_, spec, params, jnp.zeros((4, 8, 8, 1)), labels, valid)

    slice_ = train_step.fresh_slice(spec, jax.random.key(0), params)
    with_gradient = jax.make_jaxpr(jax.grad(loss, argnums=1))(slice_, params)
    assert weights & shapes_of_products(with_gradient.jaxpr), "control: with a backbone gradient one is there"
    state = train_step.initial_state(spec, mesh_of(jax.devices()[:1]))
    rows, words, numbers = (np.zeros((8, 2, *shape), np.int32) for shape in ((4,), (2,), ()))
    work = train_step.Batch(rows, np.ones((8, 2, 4), bool), words.astype(np.uint32), numbers, numbers, numbers)
    program = jax.make_jaxpr(lambda *args: train_step.device_program(spec, *args))
    shapes = {
        shape[-2:] for shape in shapes_of_products(program(params, *small_data(), np.int32(8), state, work).jaxpr)
    }
    assert shapes and not weights & shapes


@pytest.mark.parametrize("method", ["prompt+head", pytest.param("lora", marks=pytest.mark.slow)])
def test_tracing_the_loss_first_leaves_the_program_as_it_is(monkeypatch, method):
    spec, mesh, programs = small_spec("flip", method=method, rank=2), mesh_of(jax.devices()[:1]), []
    numbers = np.zeros((8, 2), np.int32)
    words, valid = np.zeros((8, 2, 2), np.uint32), np.ones((8, 2, 4), bool)
    work = train_step.Batch(np.zeros((8, 2, 4), np.int32), valid, words, numbers, numbers, numbers)
    for convert in (jax.closure_convert, lambda function, *_: (function, [])):
        monkeypatch.setattr(jax, "closure_convert", convert)
        arguments = small_backbone().params, *small_data(), np.int32(8), train_step.initial_state(spec, mesh), work
        programs.append(train_step.compiled.__wrapped__(spec, mesh).lower(*arguments).as_text())
    assert programs[0] == programs[1] and "stablehlo.while" in programs[0]


def test_orbax_is_imported_while_the_device_works(monkeypatch):
    events, collect = [], tune.Tracker.collect
    monkeypatch.setattr(tune.checkpoints, "import_writer", lambda: events.append("import"))
    monkeypatch.setattr(tune.Tracker, "collect", lambda *args: (events.append("wait"), collect(*args))[1])
    tune_groups(small_spec(), {"c1": GROUPS["c1"]})
    assert events[0] == "import" and "wait" in events


def test_a_call_sends_no_image_where_all_fit_on_the_device(monkeypatch):
    """Images go to the device once. A call is given its batches' row numbers, and sends nothing while it runs."""
    compiled = train_step.compiled
    for fits in (True, False):
        spec = small_spec("flip") if fits else small_spec("flip", scan_steps=3, device_bytes=0)
        images, sent = [], []

        def watched(spec, mesh, images=images, sent=sent):
            def call(*args):
                images.append(args[1])
                sent.append(sum(leaf.nbytes for leaf in jax.tree.leaves(args) if isinstance(leaf, np.ndarray)))
                on_device = jax.device_put(args)
                with jax.transfer_guard_host_to_device("disallow"):
                    return compiled(spec, mesh)(*on_device)

            return call

        monkeypatch.setattr(tune, "compiled", watched)
        tune_groups(spec)
        assert len(images) > 2 and all(isinstance(array, jax.Array) for array in images)
        assert (len({id(array) for array in images}) == 1) == fits
        call_images = spec.tuning.scan_steps * spec.tuning.lanes * spec.tuning.batch
        assert max(sent) < 32 * call_images < small_data()[0].nbytes, "row numbers, places in the schedule: no pixels"
    with pytest.raises(Exception, match="[Dd]isallowed"), jax.transfer_guard_host_to_device("disallow"):
        jax.jit(jnp.sum)(np.ones(3))  # control: the guard works on this backend


@pytest.mark.parametrize("method", ["prompt+head", pytest.param("lora", marks=pytest.mark.slow)])
def test_snapshots_change_neither_the_end_nor_the_program(method, monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(train_step, "device_program", chex.assert_max_traces(train_step.device_program, n=1))
    spec = small_spec(seed=101, method=method)  # new to this process
    plain, results = tune_groups(spec), tune_jobs(spec, snapped_jobs(spec))
    for job in snapped_jobs(spec):
        own = [tuned for tuned in results if tuned.job.key == job.key]
        assert [tuned.step for tuned in own] == [*job.snapshots, job.steps] and len(own) > 1
        assert [tuned.final for tuned in own] == [False] * len(job.snapshots) + [True]
        assert same_bits(own[-1].slice, plain[job.key].slice) and own[-1].loss == plain[job.key].loss
        assert not any(same_bits(a.slice, b.slice) for a, b in itertools.pairwise(own))


def stopped_slice(spec, job, steps):
    """(slice, losses) of a job whose program ends after so many steps."""
    images, labels = small_data()
    padding = ((0, tune.bucket(len(images)) - len(images)),)
    data = np.pad(images, padding + ((0, 0),) * 3), np.pad(labels, padding)
    call = next(step_batches([job], 1, spec.tuning, spec.slots, spec.seed))
    work = train_step.Batch(call.rows, call.valid, call.seed_words, call.step, call.total, call.slot)
    mesh = mesh_of(jax.devices()[:1])
    program, state = train_step.compiled(spec, mesh), train_step.initial_state(spec, mesh)
    state, _, losses = program(small_backbone().params, *data, np.int32(steps), state, work)
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.slice), np.asarray(losses)[:steps, 0]


def test_a_snapshot_is_the_run_stopped_there():
    """Bit for bit where the program stops, and near where the literal loop does."""
    spec = small_spec()
    results = {(tuned.job.key, tuned.step): tuned for tuned in tune_jobs(spec, snapped_jobs(spec))}
    for job in snapped_jobs(spec)[:3]:
        whole = dataclasses.replace(job, snapshots=())
        history = reference(spec, whole)
        for epoch, step in enumerate(job.snapshots, 1):
            tuned, (slice_, losses) = results[job.key, step], stopped_slice(spec, whole, step)
            assert same_bits(tuned.slice, slice_)
            assert_near(tuned.slice, history[step - 1])
            assert step == math.ceil(epoch * len(job.rows) / 4) and not tuned.final and tuned.failed_at is None
            assert tuned.loss == pytest.approx(losses[step - math.ceil(len(job.rows) / 4) :].mean(), rel=1e-6)


def test_the_learning_rate_rises_then_falls_to_zero():
    for warmup, total in itertools.product((0.0, 0.2), (1, 2, 7, 100)):
        settings = dataclasses.replace(small_config().tuning, warmup=warmup)
        rates = np.asarray(train_step.learning_rate(settings, jnp.arange(100), jnp.full(100, total)))[:total]
        rising = math.ceil(warmup * total)
        assert (0 <= rates).all() and (rates <= 1 + 1e-6).all() and rates.max() == pytest.approx(1.0)
        assert (np.diff(rates[:rising]) > 0).all() and (np.diff(rates[rising:]) < 0).all()


def test_a_loss_that_is_not_finite_fails_its_cluster_only_and_the_step_is_named(together, monkeypatch):
    """A poisoned label makes the loss NaN; clusters without it, in the next lane too, keep their bits."""
    cluster_loss, poisoned = train_step.cluster_loss, 9

    def poison(slice_, spec, params, images, labels, valid):
        bad = jnp.any((labels == poisoned) & valid)
        return cluster_loss(slice_, spec, params, images, labels, valid) * jnp.where(bad, jnp.nan, 1.0)

    assert all(tuned.failed_at is None and math.isfinite(tuned.loss) for tuned in together.values())
    train_step.compiled.cache_clear()
    monkeypatch.setattr(train_step, "cluster_loss", poison)
    try:
        results = tune_groups(small_spec("flip"))
    finally:
        train_step.compiled.cache_clear()
    failed = {}  # {cluster key: first step whose batch has the poisoned label}
    for key, rows in GROUPS.items():
        order, valid = batches(make_job(key, rows, small_config().tuning), 0)
        hit = ((small_data()[1][order] == poisoned) & valid).any(axis=1)
        failed[key] = int(hit.argmax()) if hit.any() else None
    assert {key: tuned.failed_at for key, tuned in results.items()} == failed
    sound = [key for key in GROUPS if failed[key] is None]
    assert 0 < len(sound) < len(GROUPS)
    assert all(same_bits(results[key].slice, together[key].slice) for key in sound)


def test_bfloat16_stays_near_float32():
    low, full = (tune_groups(small_spec(dtype=dtype))["c5"] for dtype in ("bfloat16", "float32"))
    assert low.slice.kernel.dtype == np.float32 and not same_bits(low.slice, full.slice)
    assert low.loss == pytest.approx(full.loss, rel=0.1)


def test_buckets_hold_the_count_and_waste_little():
    for count, size in ((0, 256), (1, 256), (256, 256), (257, 512), (50_000, 53_248)):
        assert tune.bucket(count) == size
