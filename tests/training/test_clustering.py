"""Sample, tree, cut, keys, prototypes and assignment against slow literal references and scikit-learn."""

import hashlib
import itertools
import json

import jax
import numpy as np
import pytest
from scipy.spatial import distance
from sklearn.cluster import AgglomerativeClustering

from lmeraser_jax import config as settings
from lmeraser_jax.training import clustering
from lmeraser_jax.training.clustering import (
    BATCH,
    Clustering,
    assign,
    cluster,
    cut_tree,
    expected_share,
    merge_small,
    padded,
    reassign,
    route,
    squared_distances,
    tree,
)


def points(count: int, width: int = 5, seed: int = 0) -> np.ndarray:
    """A few blobs of unequal size and spread, float32."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 4, (4, width))
    which = rng.choice(4, count, p=[0.5, 0.3, 0.15, 0.05])
    return (centres[which] + rng.normal(0, 1, (count, width)) * (1 + which[:, None])).astype(np.float32)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"record-{i:04d}" for i in range(count))


def options(cut: str, max_members: int = 0, min_members: int = 0) -> settings.Clustering:
    return settings.Clustering(cut=cut, max_members=max_members, min_members=min_members)


def partition(clusters) -> set[frozenset[int]]:
    return {frozenset(int(i) for i in members) for members in clusters}


def groups(clustering: Clustering) -> list[list[int]]:
    return [np.flatnonzero(clustering.labels == k).tolist() for k in range(len(clustering.keys))]


def algorithm_2(features: np.ndarray, t: float) -> list[list[int]]:
    """The paper's HierCluster, line by line: merge the closest pair until it is further apart than t."""
    m = distance.cdist(features.astype(np.float64), features.astype(np.float64))
    clusters = [[i] for i in range(len(features))]
    while True:
        closest, pair = np.inf, None
        for a, b in itertools.combinations(range(len(clusters)), 2):
            gap = m[np.ix_(clusters[a], clusters[b])].mean()
            if gap < closest:
                closest, pair = gap, (a, b)
        if pair is None or closest > t:
            return clusters
        merged = clusters[pair[0]] + clusters[pair[1]]
        clusters = [members for i, members in enumerate(clusters) if i not in pair] + [merged]


@pytest.mark.parametrize("count", [1, 2, 22])
def test_threshold_cut_is_algorithm_2(count):
    features = points(count, seed=count)
    links = tree(features)
    sizes = set()
    gaps = distance.pdist(features) if count > 1 else np.ones(1)
    for t in (0.0, *np.quantile(gaps, [0.02, 0.1, 0.3, 0.6, 1.0])):
        expected = algorithm_2(features, float(t))
        assert partition(cut_tree(links, ("threshold", float(t)))) == partition(expected)
        sizes.add(len(expected))
    assert {1, count} <= sizes  # both ends were reached
    assert count < 9 or len(sizes) > 3


def test_a_merge_at_exactly_the_threshold_is_made():
    """Algorithm 2 stops when the distance is above t, not when it equals t."""
    features = np.array([[0], [3], [10]], np.float32)
    assert partition(cut_tree(tree(features), ("threshold", 3.0))) == {frozenset({0, 1}), frozenset({2})}
    assert len(cut_tree(tree(features), ("threshold", 2.999))) == 3
    assert len(cut_tree(tree(features), ("threshold", 8.5))) == 1  # mean of 10 and 7


def test_cuts_agree_with_scikit_learn():
    features = points(70)
    links = tree(features)

    def reference(**cut) -> set[frozenset[int]]:
        labels = AgglomerativeClustering(linkage="average", **cut).fit(features.astype(np.float64)).labels_
        return partition(np.flatnonzero(labels == k) for k in set(labels))

    for t in (0.5, 2.0, 4.0, 7.0, 11.0, 100.0):
        assert partition(cut_tree(links, ("threshold", t))) == reference(n_clusters=None, distance_threshold=t)
    for k in (1, 2, 3, 7, 20, 69, 70):
        clusters = cut_tree(links, ("auto", k))
        assert len(clusters) == k and partition(clusters) == reference(n_clusters=k)
    assert len(cut_tree(links, ("auto", 500))) == 70, "more clusters than records: all"


def nodes(links: np.ndarray) -> list[frozenset[int]]:
    members = [frozenset({i}) for i in range(len(links) + 1)]
    for a, b, *_ in links:
        members.append(members[int(a)] | members[int(b)])
    return members


def test_max_members_splits_no_further_than_it_must():
    links = tree(points(60))
    every = nodes(links)
    cuts = [("auto", 3), ("threshold", 3.0), ("threshold", 1e9)]
    for cut, limit in itertools.product(cuts, (1, 2, 5, 13, 60)):
        plain, limited = cut_tree(links, cut), cut_tree(links, cut, limit)
        assert sorted(i for members in limited for i in members) == list(range(60))
        assert partition(limited) <= set(every)
        for members in partition(limited):
            assert len(members) <= limit
            allowed = next(frozenset(whole) for whole in plain if members <= frozenset(whole))
            above = [node for node in every if members < node and node <= allowed]
            assert all(len(node) > limit for node in above)  # whatever is larger was too large


def literal_merge(features: np.ndarray, clusters: list[list[int]], least: int, most: int) -> set[frozenset[int]]:
    clusters = [sorted(members) for members in clusters]
    while len(clusters) > 1:
        small = sorted(clusters, key=lambda members: (len(members), members[0]))[0]
        if len(small) >= least:
            break
        best = None
        for strict in (True, False):
            for other in sorted(clusters, key=lambda members: members[0]):
                if other == small or (strict and most and len(other) + len(small) > most):
                    continue
                a, b = (sum(features[i].astype(np.float64) for i in m) / len(m) for m in (other, small))
                gap = float(np.sqrt(((a - b) ** 2).sum()))
                if best is None or gap < best[0]:
                    best = (gap, other)
            if best is not None:
                break
        clusters = [m for m in clusters if m not in (small, best[1])] + [sorted(small + best[1])]
    return {frozenset(members) for members in clusters}


def test_merging_small_clusters_follows_its_rule():
    limits = [(2, 0), (4, 0), (4, 6), (7, 8), (10, 12), (100, 0)]
    for (least, most), seed in itertools.product(limits, range(2)):
        features = points(45, seed=seed)
        before = cut_tree(tree(features), ("threshold", 3.0), most)
        after = merge_small(before, features, least, most)
        assert partition(after) == literal_merge(features, before, least, most)
        assert all(any(members <= whole for whole in partition(after)) for members in partition(before))
        assert len(after) == 1 or min(len(members) for members in after) >= least


def test_clusters_partition_the_sample_and_prototypes_are_means():
    sample, features = names(80), points(80)
    for limits in ((0, 0), (0, 3), (5, 0), (20, 3), (50, 7)):
        clustering = cluster(sample, features, options("auto:9", *limits), "name")
        assert clustering.digest == "name" and clustering.sample == sample
        assert clustering.labels.shape == (80,) and clustering.labels.dtype == np.int32
        assert set(clustering.labels) == set(range(len(clustering.keys)))
        assert list(clustering.keys) == sorted(set(clustering.keys))
        assert clustering.prototypes.dtype == np.float32 and len(clustering.prototypes) == len(clustering.keys)
        for k, members in enumerate(groups(clustering)):
            mean = sum(features[i].astype(np.float64) for i in members) / len(members)
            np.testing.assert_array_max_ulp(clustering.prototypes[k], mean.astype(np.float32), maxulp=1)


def test_a_key_is_the_digest_of_the_members_ids_alone():
    sample, features = names(30), points(30)
    clustering = cluster(sample, features, options("auto:4"), "one")
    for key, members in zip(clustering.keys, groups(clustering), strict=True):
        text = json.dumps([sample[i] for i in members], separators=(",", ":"))
        assert key == hashlib.sha256(text.encode()).hexdigest()
    moved = cluster(sample, features * 3 + 1, options("auto:4"), "two")  # other features, same partition
    assert moved.keys == clustering.keys and not np.array_equal(moved.prototypes, clustering.prototypes)
    renamed = cluster(tuple(f"other-{i:04d}" for i in range(30)), features, options("auto:4"), "one")
    assert not set(renamed.keys) & set(clustering.keys)


def test_a_key_survives_when_another_cluster_changes():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(centre, 1, (12, 3)) for centre in (-50, 0, 50)]).astype(np.float32)
    sample = names(36)
    before = cluster(sample, features, options("20"), "x")
    keep = np.delete(np.arange(36), 17)  # a member of the middle cluster
    after = cluster(tuple(sample[i] for i in keep), features[keep], options("20"), "y")
    key_of = {i: before.keys[before.labels[i]] for i in range(36)}
    assert len(set(before.keys) & set(after.keys)) == 2
    for at, i in enumerate(keep):
        assert (after.keys[after.labels[at]] == key_of[i]) == (i // 12 != 1)
    rows = {key: before.prototypes[k] for k, key in enumerate(before.keys)}
    for k, key in enumerate(after.keys):
        if key in rows:
            np.testing.assert_array_equal(after.prototypes[k], rows[key])


@pytest.mark.parametrize("cut", ["0", "5", "auto:1", "auto:9"])
def test_equal_records_and_single_records_are_clustered(cut):
    sample, features = names(9), np.ones((9, 4), np.float32)
    whole = cluster(sample, features, options(cut), "x")
    assert len(whole.keys) == (int(cut[5:]) if cut.startswith("auto") else 1)
    np.testing.assert_array_equal(whole.prototypes, np.ones((len(whole.keys), 4), np.float32))
    split = groups(cluster(sample, features, options(cut, max_members=2), "x"))
    assert max(len(members) for members in split) <= 2
    assert sorted(i for members in split for i in members) == list(range(9))
    assert len(cluster(sample, features, options(cut, min_members=9), "x").keys) == 1
    single = cluster(("a",), np.full((1, 4), 0.3, np.float32), options(cut, max_members=5, min_members=2), "x")
    assert single.keys == (hashlib.sha256(b'["a"]').hexdigest(),) and single.labels.tolist() == [0]
    np.testing.assert_array_equal(single.prototypes, np.full((1, 4), 0.3, np.float32))


@pytest.mark.parametrize("count", [1, 8, 11])
def test_assignment_is_the_nearest_prototype(count):
    features, prototypes = points(2 * BATCH + 77, seed=1), points(count, seed=2)
    gaps = ((features[:, None].astype(np.float64) - prototypes[None].astype(np.float64)) ** 2).sum(axis=-1)
    nearest = assign(features, prototypes)
    assert nearest.dtype == np.int32
    np.testing.assert_array_equal(nearest, gaps.argmin(axis=1))
    order = np.random.default_rng(0).permutation(len(features))
    np.testing.assert_array_equal(assign(features[order], prototypes), nearest[order])
    for rows in (order[:1], order[:BATCH], order[: BATCH + 1]):
        np.testing.assert_array_equal(assign(features[rows], prototypes), nearest[rows])
    assert assign(features[:0], prototypes).shape == (0,)


def test_assignment_breaks_ties_the_same_way_everywhere():
    """Twin prototypes, and features between them: the first wins, in whatever place the feature stands."""
    twins = np.array([[-1, 0], [1, 0], [-1, 0], [1, 0]], np.float32)
    middle = np.zeros((BATCH + 3, 2), np.float32)
    assert not assign(middle, twins).any()
    assert (assign(middle + np.float32([[0.5, 0]]), twins) == 1).all()


def test_prototypes_are_padded_to_a_power_of_two():
    for count, size in ((1, 8), (8, 8), (9, 16), (16, 16), (100, 128)):
        prototypes = points(count)
        full, present = padded(prototypes)
        assert full.shape == (size, 5) and full.dtype == np.float32
        assert present.tolist() == [True] * count + [False] * (size - count)
        np.testing.assert_array_equal(full[:count], prototypes)
        near_padding = np.zeros((3, 5), np.float32)  # padding is zeros, and never chosen
        assert assign(near_padding, prototypes + np.float32(100)).max() < count


def test_the_expected_share_is_the_mean_over_records():
    rng = np.random.default_rng(0)
    for sizes in ([5], [1] * 10, [9, 1], rng.integers(1, 30, 12).tolist()):
        owner = np.repeat(np.arange(len(sizes)), sizes)  # the cluster of each record
        share = np.mean([np.mean(owner == owner[i]) for i in range(len(owner))])
        assert expected_share(sizes) == pytest.approx(share)
    assert expected_share([]) == 0.0


def test_a_matrix_product_assigns_as_the_routing_program_does():
    rng = np.random.default_rng(7)
    prototypes = rng.normal(size=(40, 24)).astype(np.float32) + np.float32(30)
    pairs = prototypes[rng.integers(40, size=(600, 2))]
    far = rng.normal(size=(600, 24)).astype(np.float32) + np.float32(30)
    halfway = pairs.mean(axis=1) + rng.choice(np.float32([0, 1e-6, 1e-5]), (600, 1))  # nearly, or exactly, a tie
    features = np.concatenate([far, halfway, prototypes, np.full((1, 24), np.nan, np.float32)])
    np.testing.assert_array_equal(assign(features, prototypes), route(features, prototypes))
    assert len(np.unique(assign(far, prototypes))) > 10
    with pytest.MonkeyPatch.context() as patch:  # and asks the program about few of them
        routed = []
        patch.setattr(clustering, "route", lambda rows, _: routed.append(len(rows)) or np.zeros(len(rows), np.int32))
        assign(far, prototypes)
    assert sum(routed) < 20


def test_what_was_nearest_is_compared_with_new_prototypes_only():
    rng = np.random.default_rng(3)
    old, new = points(30, seed=5), rng.choice([True, False], 30, p=[0.2, 0.8])
    prototypes = np.where(new[:, None], points(30, seed=6), old)
    prototypes[new.argmax()] = prototypes[np.flatnonzero(~new)[-1]]  # twins: the first wins
    near = prototypes[rng.integers(30, size=300)] + rng.choice(np.float32([0, 1e-6]), (300, 5))
    halfway = prototypes[rng.integers(30, size=(300, 2))].mean(axis=1)
    features = np.concatenate([points(BATCH + 50, seed=7), near, halfway])
    before = assign(features, old)
    nearest = np.where(new[before] | (rng.random(len(features)) < 0.1), -1, before)  # left, or is not known
    expected = assign(features, prototypes)
    with pytest.MonkeyPatch.context() as patch:
        again = []
        patch.setattr(clustering, "assign", lambda rows, _: again.append(len(rows)) or assign(rows, prototypes))
        np.testing.assert_array_equal(reassign(features, prototypes, nearest, new), expected)
    assert (expected != before).any() and sum(again) < (nearest < 0).sum() + len(features) / 2


def test_a_distance_has_the_same_bits_wherever_its_prototype_stands():
    """So that records keep their cluster when other prototypes come and go."""
    features, prototypes = points(BATCH, seed=1), points(100, seed=2)
    distances = jax.jit(squared_distances)
    every = np.asarray(distances(features, *padded(prototypes)))[:, :100]
    for places in (np.arange(99, -1, -1), np.arange(3, 40), np.arange(7)):
        some = np.asarray(distances(features, *padded(prototypes[places])))
        np.testing.assert_array_equal(some[:, : len(places)], every[:, places])
