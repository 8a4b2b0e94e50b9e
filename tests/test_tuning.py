"""The tuning program: against a literal loop, no backbone gradient, bits free of lanes and neighbours."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config
from scipy.special import logsumexp

from lmeraser_jax import tuning
from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.backbones import pretrain
from lmeraser_jax.images import ImageSpec, centred
from lmeraser_jax.schedule import batches, make_job
from lmeraser_jax.tuning import Problem, mesh_of, tune

CLASSES = 10


@pytest.fixture(scope="module")
def backbone():
    from flax import nnx

    from lmeraser_jax.backbones.vit import ViT

    vit = pretrain.architecture(small_config(), channels=1, classes=0)
    params = nnx.to_pure_dict(nnx.split(ViT(vit, nnx.Rngs(0)), nnx.Param)[1])
    return frozen.make(vit, params, 0.5, 0.5)


def problem_of(backbone, **changes):
    spec = ImageSpec(8, 8, 1, size=8, resize=8, out_channels=1, augment=changes.pop("augment", "none"))
    settings = dataclasses.replace(small_config().tuning, **changes)
    return Problem(backbone.config, spec, settings, CLASSES, seed=0)


@pytest.fixture(scope="module")
def data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return images[:200], digits.target[:200].astype(np.int32)


def run(problem, backbone, data, groups, devices=1):
    """{key: Tuned} of the clusters given as {key: rows}."""
    jobs = [make_job(key, np.asarray(rows), problem.tuning) for key, rows in groups.items()]
    mesh = mesh_of(jax.devices()[:devices])
    return {done.job.key: done for done in tune(problem, backbone, jobs, *data, mesh)}


def same_bits(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.slice, b.slice, strict=True))


def reference(problem, backbone, data, key, rows):
    """One cluster in a plain loop, float64 where NumPy computes: prompt by slicing, optimizers by hand."""
    t, size, width = problem.tuning, problem.architecture.image_size, problem.tuning.prompt_width
    mask = np.ones((size, size, 1), np.float32)
    mask[width : size - width, width : size - width] = 0
    images, labels = data
    job = make_job(key, rows, t)
    orders, valid = batches(job, problem.seed, t.batch)
    prompt, kernel = np.zeros((size, size, 1)), np.zeros((problem.architecture.feature_size, CLASSES))
    bias = np.zeros(CLASSES)
    state = [[np.zeros_like(p), np.zeros_like(p)] for p in (prompt, kernel, bias)]

    def loss(parts, pixels, targets):
        features = frozen.features(problem.architecture, backbone.params, pixels + (parts[0] * mask)[None])
        logits = features @ parts[1] + parts[2][None]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(targets)), targets])

    gradient = jax.jit(jax.grad(loss))
    warmup = math.ceil(t.warmup * job.steps)
    for step in range(job.steps):
        chosen = orders[step][valid[step]]
        pixels = centred(jnp.asarray(images[chosen]), problem.spec)
        parts = tuple(np.asarray(p, np.float32) for p in (prompt, kernel, bias))
        grads = [np.asarray(g, np.float64) for g in gradient(parts, pixels, labels[chosen])]
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(job.steps - warmup, 1)))
        new = []
        for p, g, s, group in zip((prompt, kernel, bias), grads, state, ("prompt", "head", "head"), strict=True):
            rate, decay = getattr(t, f"{group}_rate"), getattr(t, f"{group}_decay")
            if t.optimizer == "sgd":
                s[0] = t.momentum * s[0] + (g + decay * p)
                direction = s[0]
            else:
                s[0], s[1] = 0.9 * s[0] + 0.1 * g, 0.999 * s[1] + 0.001 * g * g
                scale = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                direction = scale * s[0] / (np.sqrt(s[1]) + 1e-8 * math.sqrt(1 - 0.999 ** (step + 1))) + decay * p
            new.append(p - rate * factor * direction)
        prompt, kernel, bias = new
    return prompt * mask, kernel, bias


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
    prompt, kernel, bias = reference(problem, backbone, data, "b", rows)
    laid = tuning.lay_prompt(jnp.asarray(found.slice.prompt), 8, problem.tuning.prompt_width, 1)
    np.testing.assert_allclose(laid, prompt, atol=2e-4)
    np.testing.assert_allclose(found.slice.kernel, kernel, atol=2e-4)
    np.testing.assert_allclose(found.slice.bias, bias, atol=2e-4)
    assert np.abs(prompt).max() > 1e-3, "the prompt did learn"


def test_the_loss_is_the_masked_mean_cross_entropy(backbone, data, rng):
    problem = problem_of(backbone)
    images, labels = centred(jnp.asarray(data[0][:4]), problem.spec), data[1][:4]
    part = tuning.init_slice(
        jax.random.key(1),
        dataclasses.replace(problem.tuning, prompt_init=1.0, head_init=1.0),
        problem.architecture,
        CLASSES,
    )
    prompt = tuning.lay_prompt(part.prompt, 8, 1, 1)
    logits = np.asarray(
        frozen.features(problem.architecture, backbone.params, images + prompt[None]) @ part.kernel, np.float64
    )
    losses = logsumexp(logits, axis=1) - logits[np.arange(4), labels]
    for valid in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]):
        found = tuning.cluster_loss(part, problem, backbone.params, images, labels, jnp.asarray(valid, bool))
        wanted = (losses * valid).sum() / max(sum(valid), 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


GROUPS = {f"c{i}": np.arange(i * 12, i * 12 + 5 + 3 * i) for i in range(6)}


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
        for a, b in zip(one[key].slice, found[0][key].slice, strict=True):
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
            return tuning.cluster_loss(part, problem, params, images, jnp.zeros(4, jnp.int32), jnp.ones(4, bool))

        part = tuning.init_slice(jax.random.key(0), problem.tuning, problem.architecture, CLASSES)
        return shapes_of_products(jax.make_jaxpr(jax.grad(loss, argnums=argument))(part, backbone.params).jaxpr)

    assert shapes & products(1), "control: with a backbone gradient the finder finds it"
    assert not shapes & products(0)
    state = jax.tree.map(lambda leaf: leaf[:2], tuning.initial_state(problem, mesh_of(jax.devices()[:1])))
    work = tuning.Batch(
        np.zeros((8, 2, 4), np.int32),
        np.ones((8, 2, 4), bool),
        np.zeros((8, 2, 2), np.uint32),
        *(np.zeros((8, 2), np.int32) for _ in range(3)),
    )
    whole = jax.make_jaxpr(lambda *args: tuning.device_program(problem, *args))(
        backbone.params, *data, np.int32(8), state, work
    )
    ending = {shape[-2:] for shape in shapes_of_products(whole.jaxpr)}
    assert ending and not shapes & ending


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_learning_rate_rises_then_falls_to_zero(total, warmup):
    settings = dataclasses.replace(small_config().tuning, warmup=warmup)
    steps = jnp.arange(total)
    rates = np.asarray(tuning.learning_rate(settings, steps, jnp.full(total, total)))
    rising = math.ceil(warmup * total)
    assert (0 <= rates).all() and (rates <= 1 + 1e-6).all() and rates.max() == pytest.approx(1.0)
    assert (np.diff(rates[:rising]) > 0).all() and (np.diff(rates[rising:]) < 0).all()


def test_a_rate_of_zero_leaves_the_prompt_alone(backbone, data):
    found = run(problem_of(backbone, prompt_rate=0.0), backbone, data, {"a": np.arange(20)})["a"]
    assert (found.slice.prompt == 0).all() and (found.slice.kernel != 0).any()


def test_a_loss_that_is_not_finite_stops_its_cluster_only(backbone, data, monkeypatch):
    """A poisoned label makes the loss NaN; clusters without it, in the next lane too, keep their bits."""
    loss, poisoned = tuning.cluster_loss, 9

    def poison(part, problem, params, images, labels, valid):
        bad = jnp.any((labels == poisoned) & valid)
        return loss(part, problem, params, images, labels, valid) * jnp.where(bad, jnp.nan, 1.0)

    fine = run(problem_of(backbone), backbone, data, GROUPS)
    assert all(done.failed_at is None and math.isfinite(done.loss) for done in fine.values())
    tuning.compiled.cache_clear()
    monkeypatch.setattr(tuning, "cluster_loss", poison)
    try:
        found = run(problem_of(backbone), backbone, data, GROUPS)
    finally:
        tuning.compiled.cache_clear()
    hit = {key for key, rows in GROUPS.items() if (data[1][rows] == poisoned).any()}
    assert 0 < len(hit) < len(GROUPS)
    for key, done in found.items():
        assert (done.failed_at is not None) == (key in hit)
        assert key in hit or same_bits(done, fine[key])


def test_a_huge_rate_fails_and_says_at_which_step(backbone, data):
    found = run(problem_of(backbone, optimizer="sgd", head_rate=1e38, prompt_rate=1e38), backbone, data, GROUPS)
    assert all(done.failed_at is not None and done.failed_at <= done.job.steps for done in found.values())


def test_bfloat16_stays_near_float32(backbone, data):
    low = run(problem_of(backbone, dtype="bfloat16"), backbone, data, {"a": np.arange(20)})["a"]
    full = run(problem_of(backbone), backbone, data, {"a": np.arange(20)})["a"]
    assert low.slice.kernel.dtype == np.float32 and not same_bits(low, full)
    assert low.loss == pytest.approx(full.loss, rel=0.1)


def test_the_fingerprint_names_what_the_bits_depend_on():
    settings, one = small_config().tuning, mesh_of(jax.devices()[:1])
    assert tuning.fingerprint(settings, one) != tuning.fingerprint(dataclasses.replace(settings, lanes=5), one)
    assert jax.__version__ in tuning.fingerprint(settings, one)


@pytest.mark.parametrize(("count", "size"), [(0, 256), (1, 256), (256, 256), (257, 512), (50_000, 53_248)])
def test_buckets_hold_the_count_and_waste_little(count, size):
    assert tuning.bucket(count) == size
