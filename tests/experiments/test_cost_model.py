"""Each formula against a count of every possible window, a mixture over Poisson numbers, scipy, or drawn records."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lmeraser_jax.experiments import cost_model, simulation
from lmeraser_jax.experiments.cost_model import Batch, Clusters, Machine
from lmeraser_jax.training.jobs import pack

SIZES = (1, 2, 3)
SMALL = Clusters(np.array([1.0, 2, 3]), np.array([0.0, 1, 1]), np.array([40.0, 20, 30]))
REAL = Clusters(np.array([80.0, 40, 20, 9, 1]), np.array([6.0, 1, 2, 1, 0]), np.array([80.0, 45, 20, 30, 12]))


def records_of(clusters):
    """(cluster, sampled) of every record."""
    pairs = zip(clusters.members.astype(int), clusters.sampled.astype(int), strict=True)
    return [(i, place < s) for i, (m, s) in enumerate(pairs) for place in range(m)]


def windows_of(clusters, count, changed):
    """(probability, clusters hit, clusters re-tuned, clustered again) of every window of k requests."""
    everyone, whole = records_of(clusters), range(len(clusters.members))
    for named in itertools.product(everyone, repeat=count):
        hit, again = {i for i, _ in named}, any(sampled for _, sampled in named)
        rest = [i for i in whole if i not in hit] if again else []
        for moved in itertools.product([False, True], repeat=len(rest)):
            chance = math.prod(changed if yes else 1 - changed for yes in moved) / len(everyone) ** count
            yield chance, hit, hit | {i for i, yes in zip(rest, moved) if yes}, again


def enumerated(clusters, count, changed=1.0, lanes=1):
    """Expectations over every window: affected, its square, re-tuned, images, makespan, clustered again."""
    found = np.zeros(6)
    for chance, hit, retuned, again in windows_of(clusters, count, changed):
        images = [clusters.images[i] for i in retuned]
        longest = max(max(images, default=0.0), sum(images) / lanes)
        found += chance * np.array([len(hit), len(hit) ** 2, len(retuned), sum(images), longest, again])
    return dict(zip(("affected", "square", "retuned", "images", "makespan", "again"), found.tolist(), strict=True))


def distribution(chances):
    """Probabilities of how many of some independent events happen."""
    return functools.reduce(np.convolve, [[1 - chance, chance] for chance in chances])


@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize("changed", [0.0, 0.3, 1.0])
def test_k_requests_against_every_possible_window(count, changed):
    wanted, batch = enumerated(SMALL, count, changed), Batch(count, fixed=True)
    assert cost_model.expected_affected(SIZES, batch) == pytest.approx(wanted["affected"])
    assert cost_model.variance_affected(SIZES, batch) == pytest.approx(wanted["square"] - wanted["affected"] ** 2)
    assert cost_model.expected_retuned(SMALL, batch, changed) == pytest.approx(wanted["retuned"])
    assert cost_model.expected_images(SMALL, batch, changed) == pytest.approx(wanted["images"])
    assert cost_model.reclusters(SMALL, batch) == pytest.approx(wanted["again"])
    assert cost_model.expected_makespan(SMALL, batch, changed) == pytest.approx(wanted["makespan"])
    assert cost_model.any_affected(batch) == (count > 0)
    simple = [sum(1 - (1 - m / 6) ** count for m in SIZES), 1 - (1 - 2 / 6) ** count]
    assert [cost_model.expected_affected(SIZES, batch), cost_model.reclusters(SMALL, batch)] == pytest.approx(simple)


@pytest.mark.parametrize("changed", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("lanes", [2, 3])
def test_the_expected_makespan_is_a_close_lower_bound(changed, lanes):
    for count in (1, 2, 3, 4):
        found = cost_model.expected_makespan(SMALL, Batch(count, fixed=True), changed, lanes)
        wanted = enumerated(SMALL, count, changed, lanes)["makespan"]
        assert 0.93 * wanted <= found <= wanted * (1 + 1e-12)


def test_the_makespan_of_one_request_is_that_of_its_cluster():
    """Without a sample one cluster runs, however many lanes there are; with one, either that or everything."""
    one = Batch(1, fixed=True)
    plain = dataclasses.replace(SMALL, sampled=np.zeros(3))
    assert cost_model.expected_makespan(plain, one, lanes=64) == pytest.approx((40 + 2 * 20 + 3 * 30) / 6)
    assert cost_model.expected_makespan(SMALL, one, lanes=64) == pytest.approx((40 + 20 + 2 * 30 + 2 * 40) / 6)
    assert cost_model.expected_makespan(SMALL, one, lanes=2) == pytest.approx((40 + 20 + 2 * 30 + 2 * 45) / 6)


@pytest.mark.parametrize("mean", [0.05, 1.0, 6.0])
def test_poisson_requests_are_a_mixture_of_their_numbers(mean):
    """The law of total expectation; K_affected is a sum of independent events for them, and only for them."""
    chances = [(count, float(stats.poisson.pmf(count, mean))) for count in range(60)]
    batch = Batch(mean)

    def mixed(formula):
        return sum(chance * formula(Batch(count, fixed=True)) for count, chance in chances)

    for formula in (
        lambda b: cost_model.expected_affected(SIZES, b),
        lambda b: cost_model.expected_retuned(SMALL, b, 0.4),
        lambda b: cost_model.expected_images(SMALL, b, 0.4),
        lambda b: cost_model.expected_makespan(SMALL, b, 0.4),
        lambda b: cost_model.reclusters(SMALL, b),
        cost_model.any_affected,
    ):
        assert formula(batch) == pytest.approx(mixed(formula))
    square = mixed(lambda b: cost_model.variance_affected(SIZES, b) + cost_model.expected_affected(SIZES, b) ** 2)
    variance = square - cost_model.expected_affected(SIZES, batch) ** 2
    assert cost_model.variance_affected(SIZES, batch) == pytest.approx(variance)
    count = stats.rv_discrete(values=(range(4), distribution(cost_model.hit_probabilities(SIZES, batch))))
    moments = [cost_model.expected_affected(SIZES, batch), cost_model.variance_affected(SIZES, batch)]
    assert [count.mean(), count.var()] == pytest.approx(moments)
    fixed = Batch(2, fixed=True)
    hits = cost_model.hit_probabilities(SIZES, fixed)
    assert cost_model.variance_affected(SIZES, fixed) < float((hits * (1 - hits)).sum()), "k requests repel each other"


def test_the_paper_s_equations_one_by_one():
    """Literal transcriptions of Eqs. 9 to 24."""
    sizes, rate, period = [5, 9, 1, 30], 3.0, 0.7
    total, batch = sum(sizes), Batch(rate * period)
    rates = [rate * m / total for m in sizes]  # 13
    assert cost_model.cluster_rates(sizes, rate).tolist() == pytest.approx(rates)
    hits = [1 - math.exp(-one * period) for one in rates]  # 14
    assert cost_model.hit_probabilities(sizes, batch).tolist() == pytest.approx(hits)
    assert cost_model.expected_affected(sizes, batch) == pytest.approx(sum(hits))  # 9, 15
    assert cost_model.affected_bound(batch) == rate * period  # 10
    assert cost_model.variance_affected(sizes, batch) == pytest.approx(sum(p * (1 - p) for p in hits))  # 16, 17
    some = 1 - math.prod(1 - p for p in hits)  # 18
    assert cost_model.any_affected(batch) == pytest.approx(some)
    assert cost_model.expected_time(12.0, batch) == pytest.approx(12 * some)  # 19, 22
    assert cost_model.rare_time(12.0, batch) == pytest.approx(12 * rate * period)  # 20, 23
    gain = cost_model.expected_time(480.0, batch) / cost_model.expected_time(12.0, batch)
    assert cost_model.efficiency_gain(480.0, 12.0) == pytest.approx(gain) == 40  # 11, 24


def test_limits():
    sizes = REAL.members
    rare, busy = Batch(1e-9), Batch(1e9)
    assert cost_model.expected_affected(sizes, rare) == pytest.approx(1e-9, rel=1e-6)
    assert cost_model.variance_affected(sizes, rare) == pytest.approx(1e-9, rel=1e-6)
    assert cost_model.expected_time(7.0, rare) == pytest.approx(cost_model.rare_time(7.0, rare), rel=1e-6)
    assert cost_model.expected_affected(sizes, busy) == cost_model.expected_retuned(REAL, busy) == len(sizes)
    assert cost_model.variance_affected(sizes, busy) == 0 and cost_model.reclusters(REAL, busy) == 1
    assert cost_model.expected_images(REAL, busy) == REAL.images.sum() == cost_model.expected_makespan(REAL, busy)
    assert cost_model.expected_makespan(REAL, busy, lanes=1000) == REAL.images.max()
    assert cost_model.expected_affected(sizes, Batch(1, fixed=True)) == pytest.approx(1)
    assert cost_model.expected_affected([1] * 7, Batch(10**6, fixed=True)) == pytest.approx(7)
    assert cost_model.expected_affected([9], Batch(3, fixed=True)) == 1, "one cluster is hit for certain"
    for batch in (Batch(0), Batch(0, fixed=True)):
        assert cost_model.expected_images(REAL, batch) == cost_model.expected_makespan(REAL, batch) == 0
    for mean in np.geomspace(1e-3, 1e3, 13):
        batch = Batch(float(mean))
        expected, variance = cost_model.expected_affected(sizes, batch), cost_model.variance_affected(sizes, batch)
        assert 0 <= variance <= expected <= min(cost_model.affected_bound(batch), len(sizes))


def test_a_uniform_request_pays_for_the_cluster_of_its_record(rng):
    """The mean over records of what their own cluster costs, and how far that is from a cluster of mean size."""
    own = [REAL.images[i] for i, _ in records_of(REAL)]
    assert cost_model.size_biased_images(REAL) == pytest.approx(np.mean(own))
    plain = cost_model.clusters_of(rng.integers(1, 500, 40))
    assert cost_model.size_biased_images(plain) == pytest.approx(
        cost_model.expected_images(plain, Batch(1, fixed=True))
    )
    mean = plain.records / 40
    assert cost_model.size_biased_images(plain) == pytest.approx(mean * (1 + (plain.members.std() / mean) ** 2))
    assert cost_model.size_biased_images(cost_model.clusters_of([7] * 9)) == pytest.approx(7)


def test_clusters_of_sizes_have_their_part_of_the_sample():
    found = cost_model.clusters_of([10, 30], sample=8, epochs=5)
    assert (found.sampled.tolist(), found.images.tolist()) == ([2, 6], [50, 150])
    assert (found.records, found.sample) == (40, 8)


def test_re_clustering_only_adds_what_the_sample_adds():
    for batch in (Batch(2.5), Batch(3, fixed=True)):
        without = dataclasses.replace(REAL, sampled=np.zeros(5))
        hits = cost_model.hit_probabilities(REAL.members, batch)
        for clusters, changed in ((REAL, 0.0), (without, 0.7)):
            assert cost_model.retuned_probabilities(clusters, batch, changed).tolist() == pytest.approx(hits.tolist())
            wanted = float((hits * REAL.images).sum())
            assert cost_model.expected_images(clusters, batch, changed) == pytest.approx(wanted)
        costs = [cost_model.expected_images(REAL, batch, changed) for changed in (0.0, 0.2, 0.6, 1.0)]
        assert costs == sorted(costs) and costs[0] < costs[-1] <= REAL.images.sum()


def drawn_one_by_one(clusters, batch, windows, changed, lanes, rng):
    """Means over windows in which single records are drawn, sampled ones and others. The slow way."""
    everyone = records_of(clusters)
    found = np.zeros((windows, 5))
    for window in found:
        count = batch.requests if batch.fixed else rng.poisson(batch.requests)
        named = [everyone[i] for i in rng.integers(len(everyone), size=int(count))]
        hit, again = {i for i, _ in named}, any(sampled for _, sampled in named)
        others = [i for i in range(len(clusters.members)) if i not in hit]
        retuned = hit | {i for i in others if again and rng.random() < changed}
        images = [clusters.images[i] for i in retuned]
        window[:] = len(hit), len(retuned), sum(images), max([sum(images) / lanes, *images]), again
    return found


@pytest.mark.parametrize("batch", [Batch(0.4), Batch(5.0), Batch(3, fixed=True)], ids=repr)
def test_formulas_and_simulation_against_single_records_drawn(batch, rng):
    changed, machine = 0.35, Machine(lanes=2, speed=10.0)
    slow = drawn_one_by_one(REAL, batch, 6000, changed, 2, rng)
    found = simulation.simulate(REAL, batch, 6000, changed=changed, machine=machine)
    formulas = (
        cost_model.expected_affected(REAL.members, batch),
        cost_model.expected_retuned(REAL, batch, changed),
        cost_model.expected_images(REAL, batch, changed),
    )
    bands = (found.affected, found.retuned, found.images, found.seconds)
    means, errors = slow.mean(axis=0), slow.std(axis=0) / len(slow) ** 0.5
    seconds = 2 / 10.0  # an image, in a lane
    for i, (band, scale) in enumerate(zip(bands, (1, 1, 1, seconds), strict=True)):
        assert abs(band.mean - scale * means[i]) < 4 * (scale * errors[i] + band.error / 1.96)
        assert band.std == pytest.approx(scale * slow[:, i].std(), rel=0.1)
    for wanted, band, mean, error in zip(formulas, bands, means, errors):
        assert abs(wanted - band.mean) < 2 * band.error and abs(wanted - mean) < 4 * error
    bound = cost_model.expected_makespan(REAL, batch, changed, 2) * seconds
    assert 0.8 * found.seconds.mean < bound < found.seconds.mean + 2 * found.seconds.error
    assert abs(found.reclustered - cost_model.reclusters(REAL, batch)) < 0.03


def test_bands_hold_95_percent_of_the_windows():
    """Ends of the band are the percentiles of the exact distribution, the error is that of a mean."""
    batch, clusters = Batch(200.0), cost_model.clusters_of(np.arange(1, 401))
    found = simulation.simulate(clusters, batch, 5000).affected
    exact = stats.rv_discrete(values=(range(401), distribution(cost_model.hit_probabilities(clusters.members, batch))))
    assert (found.low, found.high) == pytest.approx((exact.ppf(0.025), exact.ppf(0.975)), abs=1)
    assert found.std == pytest.approx(exact.std(), rel=0.05)
    assert found.error == pytest.approx(1.96 * exact.std() / 5000**0.5, rel=0.05)


def test_windows_are_drawn_from_keyed_streams(monkeypatch):
    first = simulation.simulate(REAL, Batch(2.0), 300)
    assert simulation.simulate(REAL, Batch(2.0), 300) == first
    assert simulation.simulate(REAL, Batch(2.0), 300, seed=1) != first
    monkeypatch.setattr(simulation, "PIECE", 5 * 70)  # pieces of 70 windows
    pieces = simulation.simulate(REAL, Batch(2.0), 300)
    assert pieces.windows == 300 and pieces != first
    one, two = (simulation.simulate(REAL, Batch(2.0), windows) for windows in (70, 140))
    assert one.images.mean != two.images.mean, "every piece is drawn anew"
    assert abs(pieces.images.mean - first.images.mean) < 2 * (pieces.images.error + first.images.error)
    assert simulation.simulate(REAL, Batch(0.0), 1).images == simulation.Band(0, 0, 0, 0, 0)


@pytest.mark.parametrize("clusters", [30, 90, 194, 347])
def test_the_schedule_comes_close_to_the_makespan(clusters, rng):
    images = np.ceil(1000 * rng.lognormal(size=clusters)).astype(int)
    for lanes in (1, 4, 8):
        longest = max(sum(images[i] for i in lane) for lane in pack(images.tolist(), lanes))
        bound = float(cost_model.makespan(images.astype(float), lanes))
        assert bound <= longest <= 1.02 * bound + 1


def test_sisa_against_every_choice_of_shards():
    """Published costs: each request falls on every shard alike."""
    records, shards = 12, 3
    for count in (1, 2, 3, 4):
        together, one_by_one = [], []
        for chosen in itertools.product(range(shards), repeat=count):
            sizes, passed = [records / shards] * shards, 0.0
            for shard in chosen:
                sizes[shard] -= 1
                passed += sizes[shard]
            one_by_one.append(passed)
            together.append(sum(sizes[shard] for shard in set(chosen)))
        assert cost_model.sisa_sequential(records, shards, count) == pytest.approx(np.mean(one_by_one))
        assert cost_model.sisa_batched(records, shards, count) == pytest.approx(np.mean(together))


def test_sisa_slices_against_every_choice_of_slices():
    shard, epochs = 60.0, 4.0
    for slices in (1, 2, 3, 5):
        passes = [r * shard / slices * 2 * epochs / (slices + 1) for r in range(1, slices + 1)]
        assert sum(passes) == pytest.approx(epochs * shard), "all stages together are e epochs"
        for count in (1, 2, 3):
            costs = [sum(passes[min(c) :]) for c in itertools.product(range(slices), repeat=count)]
            assert cost_model.sisa_sliced_batch(shard, slices, count, epochs) == pytest.approx(np.mean(costs))
        one = cost_model.sisa_sliced_batch(shard, slices, 1, epochs)
        assert cost_model.sisa_sliced(10 * shard, 10, slices, epochs) == pytest.approx(one)


def test_the_picture_shows_formula_band_and_paper(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    panels, requests = [], [0.1, 1.0, 10.0]
    draw = simulation._draw
    monkeypatch.setattr(simulation, "_draw", lambda *args: panels.extend(args[2]) or draw(*args))
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        simulation.figure(tmp_path / name, REAL, requests, 0.35, Machine(2, 10.0))
        assert (tmp_path / name).read_bytes().startswith(start) and (tmp_path / name).stat().st_size > 10_000
    clusters, images, seconds = panels[:3]
    for panel in (clusters, images, seconds):
        for wanted, band in zip(panel.formula, panel.bands, strict=True):
            assert abs(panel.scale * band.mean - wanted) < 0.1 * wanted + 2 * panel.scale * band.error
    shares = [cost_model.expected_images(REAL, Batch(count), 0.35) / REAL.images.sum() for count in requests]
    assert images.formula == pytest.approx(shares) and max(shares) <= 1
    assert clusters.paper["paper, Eq. 9"].tolist() == pytest.approx(
        [cost_model.expected_affected(REAL.members, Batch(count)) for count in requests]
    )
    assert clusters.paper["paper, Eq. 10 (at most K)"] == [0.1, 1.0, 5]
    mean_cluster = REAL.images.mean() / 5.0  # seconds in one of two lanes
    assert seconds.paper["paper, Eq. 19"][2] == pytest.approx(mean_cluster * (1 - math.exp(-10)))
