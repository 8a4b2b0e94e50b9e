"""Each formula against a count of every possible window, a mixture over Poisson numbers, or windows drawn at random."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lmeraser_jax.experiments import cost_model
from lmeraser_jax.experiments.cost_model import Batch, Clusters
from lmeraser_jax.training.lanes import pack

SMALL = Clusters(np.array([1.0, 2, 3]), np.array([0.0, 1, 1]), np.array([40.0, 20, 30]))
LARGE = Clusters(np.array([80.0, 40, 20, 9, 1]), np.array([6.0, 1, 2, 1, 0]), np.array([80.0, 45, 20, 30, 12]))
UNSAMPLED = Clusters(LARGE.members, np.zeros(5), LARGE.images)


def records_of(clusters):
    """(cluster, sampled) of every record."""
    pairs = zip(clusters.members.astype(int), clusters.sampled.astype(int), strict=True)
    return [(i, place < sampled) for i, (members, sampled) in enumerate(pairs) for place in range(members)]


def windows_of(clusters, count, changed):
    """(probability, clusters hit, clusters re-tuned) of every window of k requests."""
    records, everything = records_of(clusters), range(len(clusters.members))
    for named in itertools.product(records, repeat=count):
        hit, again = {i for i, _ in named}, any(sampled for _, sampled in named)
        rest = [i for i in everything if i not in hit] if again else []
        for moved in itertools.product([False, True], repeat=len(rest)):
            chance = math.prod(changed if yes else 1 - changed for yes in moved) / len(records) ** count
            yield chance, hit, hit | {i for i, yes in zip(rest, moved) if yes}


def makespan(images, lanes):
    """Images of the lane that ends last, at least: the largest of longest and total / L, [..., K] -> [...]."""
    return np.maximum(np.max(images, axis=-1, initial=0.0), np.sum(images, axis=-1) / lanes)


def enumerated(clusters, count, changed=1.0, lanes=1):
    """Expectations over every window: clusters hit, clusters re-tuned, images, makespan."""
    sums = np.zeros(4)
    for chance, hit, retuned in windows_of(clusters, count, changed):
        images = [clusters.images[i] for i in retuned]
        sums += chance * np.array([len(hit), len(retuned), sum(images), makespan(images, lanes)])
    return sums.tolist()


def formulas(clusters, batch, changed=1.0, lanes=1):
    return [
        cost_model.expected_affected(clusters.members, batch),
        float(cost_model.retuned_probabilities(clusters, batch, changed).sum()),
        cost_model.expected_images(clusters, batch, changed),
        cost_model.expected_makespan(clusters, batch, changed, lanes),
    ]


@pytest.mark.parametrize("changed", [0.0, 0.3, 1.0])
def test_k_requests_against_every_possible_window(changed):
    for count in (0, 1, 2, 4):
        batch = Batch(count, fixed=True)
        assert formulas(SMALL, batch, changed) == pytest.approx(enumerated(SMALL, count, changed)), count
        assert batch.hits(1.0) == (count > 0)
        for lanes in (2, 3):
            bound = cost_model.expected_makespan(SMALL, batch, changed, lanes)
            exact = enumerated(SMALL, count, changed, lanes)[3]
            assert 0.93 * exact <= bound <= exact * (1 + 1e-12), "a close lower bound"


def test_poisson_requests_are_a_mixture_of_their_numbers():
    """The law of total expectation."""
    for mean in (0.05, 1.0, 6.0):
        chances = stats.poisson.pmf(np.arange(60), mean)
        for changed in (0.4, 1.0):
            each = [formulas(SMALL, Batch(count, fixed=True), changed) for count in range(60)]
            assert formulas(SMALL, Batch(mean), changed) == pytest.approx(list(chances @ np.array(each)))


def test_the_paper_s_equations_one_by_one():
    """Literal transcriptions of Eqs. 9, 14, 15, 18 and 21."""
    sizes, rate, period = [5, 9, 1, 30], 3.0, 0.7
    batch = Batch(rate * period)
    hits = [1 - math.exp(-rate * m / sum(sizes) * period) for m in sizes]  # 13, 14
    assert batch.hits(np.array(sizes) / sum(sizes)).tolist() == pytest.approx(hits)
    assert cost_model.expected_affected(sizes, batch) == pytest.approx(sum(hits))  # 9, 15
    nonempty = 1 - math.prod(1 - p for p in hits)  # 18, 21
    assert batch.hits(1.0) == pytest.approx(nonempty)


def test_rare_and_busy_windows():
    rare, busy = Batch(1e-9), Batch(1e9)
    assert cost_model.expected_affected(LARGE.members, rare) == pytest.approx(1e-9, rel=1e-6)  # Eq. 10
    assert formulas(LARGE, busy) == [5, 5, LARGE.images.sum(), LARGE.images.sum()]
    assert cost_model.expected_makespan(LARGE, busy, lanes=1000) == LARGE.images.max()
    assert cost_model.expected_affected([9], Batch(3, fixed=True)) == 1, "the only cluster is hit for certain"
    for empty in (Batch(0), Batch(0, fixed=True)):
        assert formulas(LARGE, empty) == [0, 0, 0, 0]
    costs = [cost_model.expected_images(LARGE, Batch(2.5), changed) for changed in (0.0, 0.2, 0.6, 1.0)]
    assert costs == sorted(costs) and costs[0] < costs[-1] <= LARGE.images.sum()


def test_a_uniform_request_pays_for_the_cluster_of_its_record(rng):
    """The mean over records of the images of their own cluster, and how far that is from a cluster of mean size."""
    own = [LARGE.images[i] for i, _ in records_of(LARGE)]
    single = Batch(1, fixed=True)
    assert cost_model.expected_images(LARGE, single, changed=0.0) == pytest.approx(np.mean(own))
    sizes = rng.integers(1, 500, 40).astype(float)
    plain = Clusters(sizes, np.zeros(40), sizes)
    request = cost_model.expected_images(plain, single)
    assert request == pytest.approx(sizes.mean() * (1 + (sizes.std() / sizes.mean()) ** 2))


def test_without_a_private_sample_only_clusters_that_are_hit_are_tuned_again():
    for batch in (Batch(2.5), Batch(3, fixed=True)):
        hits = batch.hits(LARGE.members / LARGE.records)
        for clusters, changed in ((LARGE, 0.0), (UNSAMPLED, 0.7)):
            assert cost_model.retuned_probabilities(clusters, batch, changed) == pytest.approx(hits)


def test_lanes_come_close_to_the_makespan(rng):
    for clusters, lanes in itertools.product((30, 194, 347), (1, 4, 8)):
        images = np.ceil(1000 * rng.lognormal(size=clusters)).astype(int)
        longest = max(sum(images[i] for i in lane) for lane in pack(images.tolist(), lanes))
        bound = float(makespan(images, lanes))
        assert bound <= longest <= 1.02 * bound + 1, (clusters, lanes)
