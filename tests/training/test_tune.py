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
    problem_of,
    reference,
    run,
    run_jobs,
    same_bits,
    small_backbone,
    small_data,
)

from lmeraser_jax.data.transforms import centred
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.training import train_step, tune
from lmeraser_jax.training.fingerprint import fingerprint
from lmeraser_jax.training.jobs import make_job, snapshot_steps, step_batches
from lmeraser_jax.training.train_step import mesh_of


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "prompt_rate": 0.5, "head_rate": 0.2, "prompt_decay": 0.01, "head_decay": 0.02},
        {"optimizer": "adam", "prompt_rate": 0.03, "head_rate": 0.01, "head_decay": 0.1},
    ],
    ids=["sgd", "adamw"],
)
def test_equals_a_literal_loop(backbone, data, changes):
    problem = problem_of(backbone, **changes)
    rows = np.arange(30, 41)  # 11 members, batches of 4: the last batch is short
    found = run(problem, backbone, data, {"a": np.arange(9), "b": rows})["b"]
    wanted = reference(problem, backbone, data, make_job("b", rows, problem.tuning))
    assert_near(found.slice, wanted)
    assert np.abs(wanted[0]).max() > 1e-3, "the prompt did learn"


def test_the_loss_is_the_masked_mean_cross_entropy(backbone, data, rng):
    problem = problem_of(backbone)
    images, labels = centred(jnp.asarray(data[0][:4]), problem.image_spec), data[1][:4]
    part = tune.init_slice(
        jax.random.key(1),
        dataclasses.replace(problem.tuning, prompt_init=1.0, head_init=1.0),
        problem.architecture,
        CLASSES,
    )
    prompt = tune.place_prompt(part.prompt, 8, 1, 1)
    logits = np.asarray(
        backbone_lib.features(problem.architecture, backbone.params, images + prompt[None]) @ part.kernel, np.float64
    )
    losses = logsumexp(logits, axis=1) - logits[np.arange(4), labels]
    for valid in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]):
        found = train_step.cluster_loss(part, problem, backbone.params, images, labels, jnp.asarray(valid, bool))
        wanted = (losses * valid).sum() / max(sum(valid), 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_bits_do_not_depend_on_lane_neighbours_or_their_number(backbone, data):
    problem = problem_of(backbone, augment="paper")
    together = run(problem, backbone, data, GROUPS)
    backwards = run(problem, backbone, data, dict(reversed(GROUPS.items())))
    for key, rows in GROUPS.items():
        alone = run(problem, backbone, data, {key: rows})[key]
        assert same_bits(alone, together[key]) and same_bits(alone, backwards[key])


def test_bits_do_not_depend_on_which_of_many_devices(backbone, data):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    problem = problem_of(backbone)
    found = [run(problem, backbone, data, GROUPS, devices) for devices in (2, 8)]
    one = run(problem, backbone, data, GROUPS, 1)
    for key in GROUPS:
        assert same_bits(found[0][key], found[1][key])
        for a, b in zip(*map(jax.tree.leaves, (one[key].slice, found[0][key].slice)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)  # another program: XLA fuses it differently


def test_bits_do_not_depend_on_where_the_images_are(backbone, data):
    """On the device, or streamed because they do not fit."""
    resident = run(problem_of(backbone), backbone, data, GROUPS)
    streamed = run(problem_of(backbone, device_bytes=0), backbone, data, GROUPS)
    assert all(same_bits(resident[key], streamed[key]) for key in GROUPS)


def test_bits_do_not_depend_on_the_length_of_a_call(backbone, data):
    long = run(problem_of(backbone), backbone, data, GROUPS)
    short = run(problem_of(backbone, scan_steps=3), backbone, data, GROUPS)
    assert all(same_bits(long[key], short[key]) for key in GROUPS)


def test_more_clusters_than_output_slots(backbone, data):
    problem = problem_of(backbone, min_steps=0, epochs=1)
    groups = {f"s{i}": np.arange(i, i + 1) for i in range(3 * problem.slots)}
    assert set(run(problem, backbone, data, groups)) == set(groups)


def shapes_of_products(jaxpr):
    """Shapes of all matrix products anywhere in a jaxpr."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found |= {tuple(var.aval.shape) for var in eqn.outvars}
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= shapes_of_products(inner)
    return found


def weight_shapes(backbone):
    shapes = {leaf.shape for leaf in jax.tree.leaves(backbone.params) if leaf.ndim == 2 and 1 not in leaf.shape}
    return shapes | {shape[::-1] for shape in shapes}


def test_no_backbone_gradient_exists_in_the_program(backbone, data):
    """A gradient of a weight is a matrix product with the weight's shape; the program has none."""
    problem = problem_of(backbone)
    shapes = weight_shapes(backbone)

    def products(argument):
        def loss(part, params):
            images = jnp.zeros((4, 8, 8, 1))
            return train_step.cluster_loss(part, problem, params, images, jnp.zeros(4, jnp.int32), jnp.ones(4, bool))

        part = tune.init_slice(jax.random.key(0), problem.tuning, problem.architecture, CLASSES)
        return shapes_of_products(jax.make_jaxpr(jax.grad(loss, argnums=argument))(part, backbone.params).jaxpr)

    assert shapes & products(1), "control: with a backbone gradient the finder finds it"
    assert not shapes & products(0)
    state = jax.tree.map(lambda leaf: leaf[:2], train_step.initial_state(problem, mesh_of(jax.devices()[:1])))
    work = train_step.Batch(
        np.zeros((8, 2, 4), np.int32),
        np.ones((8, 2, 4), bool),
        np.zeros((8, 2, 2), np.uint32),
        *(np.zeros((8, 2), np.int32) for _ in range(3)),
    )
    whole = jax.make_jaxpr(lambda *args: train_step.device_program(problem, *args))(
        backbone.params, *data, np.int32(8), state, work
    )
    ending = {shape[-2:] for shape in shapes_of_products(whole.jaxpr)}
    assert ending and not shapes & ending


@pytest.mark.parametrize("fits", [True, False])
def test_a_call_sends_no_image_where_all_fit_on_the_device(backbone, data, monkeypatch, fits):
    """Images go to the device once. A call is given its batches' row numbers, and sends nothing while it runs."""
    images, _ = data
    changes = {} if fits else {"device_bytes": 1}
    problem = problem_of(backbone, scan_steps=4, **changes)
    kept, given, sent = train_step.compiled, [], []

    def watched(problem, mesh):
        program = kept(problem, mesh)

        def call(*args):
            given.append(args[1])
            sent.append(sum(leaf.nbytes for leaf in jax.tree.leaves(args) if isinstance(leaf, np.ndarray)))
            there = jax.device_put(args)
            with jax.transfer_guard_host_to_device("disallow"):
                return program(*there)

        return call

    monkeypatch.setattr(tune, "compiled", watched)
    run(problem, backbone, data, GROUPS)
    assert len(given) > 3 and all(isinstance(leaf, jax.Array) for leaf in given)
    assert (len({id(leaf) for leaf in given}) == 1) == fits
    batches = problem.tuning.scan_steps * problem.tuning.lanes * problem.tuning.batch
    assert max(sent) < 32 * batches < images.nbytes, "row numbers, places in the schedule: no pixels"
    with pytest.raises(Exception, match="[Dd]isallowed"), jax.transfer_guard_host_to_device("disallow"):
        jax.jit(jnp.sum)(np.ones(3))  # control: the guard works on this backend


def snapped(problem):
    """The jobs of GROUPS with a snapshot after each epoch."""
    jobs = [make_job(key, rows, problem.tuning) for key, rows in GROUPS.items()]
    return [dataclasses.replace(job, snapshots=snapshot_steps(job, 1, 99)) for job in jobs]


@pytest.mark.parametrize("devices", [1, 8])
def test_snapshots_change_neither_the_end_nor_the_program(backbone, data, devices, monkeypatch):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    chex.clear_trace_counter()
    monkeypatch.setattr(tune, "device_program", chex.assert_max_traces(train_step.device_program, n=1))
    problem = dataclasses.replace(problem_of(backbone, augment="paper"), seed=101)  # new to this process
    plain = run(problem, backbone, data, GROUPS, devices)
    found = run_jobs(problem, snapped(problem), devices)
    for job in snapped(problem):
        mine = [done for done in found if done.job.key == job.key]
        assert [done.step for done in mine] == [*job.snapshots, job.steps] and len(mine) > 1
        assert [done.final for done in mine] == [False] * len(job.snapshots) + [True]
        assert same_bits(mine[-1], plain[job.key]) and mine[-1].loss == plain[job.key].loss
        assert not any(same_bits(a, b) for a, b in itertools.pairwise(mine))


def stopped(problem, backbone, data, job, steps):
    """(slice, losses) of a job whose program was told to stop after so many steps."""
    mesh, size = mesh_of(jax.devices()[:1]), tune.bucket(len(data[0]))
    padded = [np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)]) for part in data]
    chunk = next(step_batches([job], 1, problem.tuning, problem.slots, problem.seed))
    work = train_step.Batch(chunk.rows, chunk.valid, chunk.seed_words, chunk.step, chunk.total, chunk.slot)
    state = train_step.initial_state(problem, mesh)
    program = train_step.compiled(problem, mesh)
    state, _, losses = program(backbone.params, *padded, np.int32(steps), state, work, None)
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.slice), np.asarray(losses)[:steps, 0]


def test_a_snapshot_is_the_run_stopped_there(backbone, data):
    """Bit for bit where the program stops, and near where the literal loop does."""
    problem = problem_of(backbone)
    found = {(done.job.key, done.step): done for done in run_jobs(problem, snapped(problem))}
    for job in snapped(problem)[:3]:
        whole = dataclasses.replace(job, snapshots=())
        for epoch, step in enumerate(job.snapshots, 1):
            done, (part, losses) = found[job.key, step], stopped(problem, backbone, data, whole, step)
            assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (done.slice, part)), strict=True))
            assert_near(done.slice, reference(problem, backbone, data, whole, step))
            seen = -(-len(job.rows) // 4)
            assert step == math.ceil(epoch * len(job.rows) / 4) and not done.final and done.failed_at is None
            assert done.loss == pytest.approx(losses[step - seen :].mean(), rel=1e-6)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_learning_rate_rises_then_falls_to_zero(total, warmup):
    settings = dataclasses.replace(small_config().tuning, warmup=warmup)
    steps = jnp.arange(total)
    rates = np.asarray(train_step.learning_rate(settings, steps, jnp.full(total, total)))
    rising = math.ceil(warmup * total)
    assert (0 <= rates).all() and (rates <= 1 + 1e-6).all() and rates.max() == pytest.approx(1.0)
    assert (np.diff(rates[:rising]) > 0).all() and (np.diff(rates[rising:]) < 0).all()


def test_a_rate_of_zero_leaves_the_prompt_alone(backbone, data):
    found = run(problem_of(backbone, prompt_rate=0.0), backbone, data, {"a": np.arange(20)})["a"]
    assert (found.slice.prompt == 0).all() and (found.slice.kernel != 0).any()


def test_a_loss_that_is_not_finite_stops_its_cluster_only(backbone, data, monkeypatch):
    """A poisoned label makes the loss NaN; clusters without it, in the next lane too, keep their bits."""
    loss, poisoned = train_step.cluster_loss, 9

    def poison(part, problem, params, images, labels, valid):
        bad = jnp.any((labels == poisoned) & valid)
        return loss(part, problem, params, images, labels, valid) * jnp.where(bad, jnp.nan, 1.0)

    fine = run(problem_of(backbone), backbone, data, GROUPS)
    assert all(done.failed_at is None and math.isfinite(done.loss) for done in fine.values())
    train_step.compiled.cache_clear()
    monkeypatch.setattr(tune, "cluster_loss", poison)
    try:
        found = run(problem_of(backbone), backbone, data, GROUPS)
    finally:
        train_step.compiled.cache_clear()
    hit = {key for key, rows in GROUPS.items() if (data[1][rows] == poisoned).any()}
    assert 0 < len(hit) < len(GROUPS)
    for key, done in found.items():
        assert (done.failed_at is not None) == (key in hit)
        assert key in hit or same_bits(done, fine[key])


def test_a_huge_rate_fails_and_says_at_which_step(backbone):
    problem = problem_of(backbone, optimizer="sgd", head_rate=1e38, prompt_rate=1e38)
    found = run_jobs(problem, snapped(problem))
    failed = {done.job.key: done.failed_at for done in found if done.final}
    assert len(failed) == len(GROUPS) and None not in failed.values()
    for done in found:
        first = failed[done.job.key]
        assert first <= done.job.steps
        assert done.failed_at in ((None, first) if done.step <= first else (first,)), "snapshots before it are whole"


def test_bfloat16_stays_near_float32(backbone, data):
    low = run(problem_of(backbone, dtype="bfloat16"), backbone, data, {"a": np.arange(20)})["a"]
    full = run(problem_of(backbone), backbone, data, {"a": np.arange(20)})["a"]
    assert low.slice.kernel.dtype == np.float32 and not same_bits(low, full)
    assert low.loss == pytest.approx(full.loss, rel=0.1)


def test_the_fingerprint_names_what_the_bits_depend_on():
    settings, one = small_config().tuning, mesh_of(jax.devices()[:1])
    assert fingerprint(settings, one) != fingerprint(dataclasses.replace(settings, lanes=5), one)
    assert jax.__version__ in fingerprint(settings, one)


@pytest.mark.parametrize(("count", "size"), [(0, 256), (1, 256), (256, 256), (257, 512), (50_000, 53_248)])
def test_buckets_hold_the_count_and_waste_little(count, size):
    assert tune.bucket(count) == size
