"""Partitions of private data: clusters (paper Algorithms 1 and 2, Eqs. 3 and 4) with a balanced cut, or shards.

Sample -> average-linkage tree -> cut -> keys and prototypes; then every other record goes to the nearest prototype.
Only the sampled records' ids and features enter the tree, so erasing an unsampled record moves nothing here. Shards
(SISA) look at no feature: a keyed hash of its id deals a record to one. Clusters of owners are made of all records.

Shapes: S sampled records, K clusters, D feature width, N records.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.config import parse_cut
from lmeraser_jax.hashing import digest, keyed_hash

if TYPE_CHECKING:
    import jax  # imported where it is used: a command that only reads a clustering starts without it

BATCH = 512  # records per call of the routing program


@dataclasses.dataclass(frozen=True, eq=False)
class Clustering:
    """A partition of the feature space."""

    digest: str  # of the inputs: settings, backbone and the sample
    sample: tuple[str, ...]  # S record ids, sorted
    labels: np.ndarray  # int32 [S], index of each sampled record's cluster
    keys: tuple[str, ...]  # K cluster keys, sorted; a key is the digest of the cluster's sampled ids
    prototypes: np.ndarray  # float32 [K, D], mean feature of the sampled members (Eq. 3)
    owners: tuple[str, ...] = ()  # of each cluster, where a key is the digest of its owner instead


def tree(features: np.ndarray) -> np.ndarray:
    """Average-linkage tree of features [S, D] by Euclidean distance (Algorithm 2): scipy's linkage [S - 1, 4]."""
    if len(features) < 2:
        return np.zeros((0, 4))
    from scipy.cluster import hierarchy  # slow to import, and most requests need no tree
    from scipy.spatial import distance

    return hierarchy.linkage(distance.pdist(features.astype(np.float64)), "average")


def cut_tree(links: np.ndarray, cut: tuple[str, float], max_members: int = 0) -> list[list[int]]:
    """Clusters of a tree, as sorted lists of positions in the sample.

    Args:
        links: linkage matrix [S - 1, 4]; merges in the order of their height.
        cut: ("threshold", t) undoes every merge above t (Algorithm 2, line 13); ("auto", K) undoes the
            last K - 1 merges, of which there are S - 1.
        max_members: a node with more members than this is undone too; 0: no limit.
    """
    if not len(links):
        return [[0]]
    from scipy.cluster import hierarchy

    leaves, (kind, value) = len(links) + 1, cut
    if kind == "auto":
        first_undone = leaves - min(int(value), leaves)
    else:
        first_undone = int(np.searchsorted(links[:, 2], value, side="right"))
    clusters: list[list[int]] = []
    stack: list[Any] = [hierarchy.to_tree(links)]
    while stack:
        node = stack.pop()
        if not node.is_leaf() and (node.id - leaves >= first_undone or 0 < max_members < node.count):
            stack += [node.left, node.right]
        else:
            clusters.append(sorted(node.pre_order()))
    return sorted(clusters)


def merge_small(clusters: list[list[int]], features: np.ndarray, min_members: int, max_members: int) -> list[list[int]]:
    """Merges clusters with fewer than `min_members` into the nearest one, smallest first.

    Nearest by prototype, among those that stay within `max_members` after the merge, or among all where
    there is no such cluster. Ties go to the cluster with the smaller first member.
    """
    means = {tuple(members): _mean(features, members) for members in clusters}
    while len(means) > 1:
        small = min(means, key=lambda members: (len(members), members))
        if len(small) >= min_members:
            break
        others = sorted(members for members in means if members != small)
        fitting = [m for m in others if not max_members or len(m) + len(small) <= max_members] or others
        gaps = np.linalg.norm(np.stack([means[members] for members in fitting]) - means[small][None], axis=1)
        target = fitting[int(np.argmin(gaps))]
        merged = tuple(sorted(target + small))
        del means[target], means[small]
        means[merged] = _mean(features, merged)
    return sorted(list(members) for members in means)


def _mean(features: np.ndarray, members: Sequence[int]) -> np.ndarray:
    return features[list(members)].astype(np.float64).mean(axis=0)


def cluster(sample: tuple[str, ...], features: np.ndarray, config: settings.Clustering, name: str) -> Clustering:
    """Algorithm 1, lines 5 to 11: the partition of a sample, with features [S, D]; `name` becomes its digest."""
    groups = cut_tree(tree(features), parse_cut(config.cut), config.max_members)
    groups = merge_small(groups, features, config.min_members, config.max_members)
    return _keyed({key_of([sample[i] for i in members]): members for members in groups}, sample, features, name)


def key_of(sampled: Sequence[str] = (), owner: str = "") -> str:
    """A cluster's key: the digest of its sampled ids, or of its owner."""
    return digest(["owner", owner] if owner else list(sampled))


def by_owner(ids: tuple[str, ...], owners: Sequence[str], features: np.ndarray, name: str) -> Clustering:
    """A cluster for every owner: all records are its sample, features [S, D], and its key is of the owner alone."""
    groups: dict[str, list[int]] = {}
    for position, owner in enumerate(owners):
        groups.setdefault(key_of(owner=owner), []).append(position)
    clustering = _keyed(groups, ids, features, name)
    return dataclasses.replace(clustering, owners=tuple(owners[groups[key][0]] for key in clustering.keys))


def _keyed(groups: Mapping[str, list[int]], sample: tuple[str, ...], features: np.ndarray, name: str) -> Clustering:
    """The clustering of the given clusters, {key: positions in the sample}."""
    keyed = sorted(groups.items())
    labels = np.zeros(len(sample), np.int32)
    for k, (_, members) in enumerate(keyed):
        labels[members] = k
    prototypes = np.stack([_mean(features, members) for _, members in keyed]).astype(np.float32)
    return Clustering(name, sample, labels, tuple(key for key, _ in keyed), prototypes)


def shards(count: int, width: int, name: str) -> Clustering:
    """A partition into so many shards without a sample; prototypes are zeros [count, width], which route nothing."""
    keys = tuple(sorted(digest(["shard", number]) for number in range(count)))
    return Clustering(name, (), np.zeros(0, np.int32), keys, np.zeros((count, width), np.float32))


def shard_of(ids: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Index of each record's shard, a keyed hash of its id: int32 [N], each below `count`."""
    hashes = (int.from_bytes(keyed_hash(seed, "shard", name), "little") for name in ids)
    return np.array([value % count for value in hashes], np.int32)


def squared_distances(features: "jax.Array", prototypes: "jax.Array", present: "jax.Array") -> "jax.Array":
    """Squared Euclidean distances [B, K] of [B, D] and [K, D]; infinite where a prototype is not `present` [K]."""
    import jax.numpy as jnp

    gaps = jnp.sum((features[:, None] - prototypes[None]) ** 2, axis=-1)  # [B, K]
    return jnp.where(present[None], gaps, jnp.inf)


@functools.cache
def _nearest():
    """Compiled `(features, prototypes, present) -> int32 [B, 1]`, the place of the nearest prototype."""
    import jax

    return jax.jit(lambda *arrays: jax.lax.top_k(-squared_distances(*arrays), 1)[1])


def padded(prototypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prototypes padded to a power of two, and which are real: re-clustering rarely changes the shape."""
    size = max(8, 1 << (len(prototypes) - 1).bit_length())
    full = np.zeros((size, prototypes.shape[1]), np.float32)
    full[: len(prototypes)] = prototypes
    return full, np.arange(size) < len(prototypes)


def assign(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Index of the nearest prototype of each feature (Eq. 4): float32 [N, D], [K, D] -> int32 [N].

    A matrix product decides where its lead over the second nearest is more than all rounding there can be, so that
    the routing program would say the same; that program decides the rest.
    """
    nearest = np.zeros(len(features), np.int32)
    for piece, rows, products, bound in _factors(features, prototypes):
        nearest[piece] = _clear_nearest(rows @ products, bound)
    unclear = np.flatnonzero(nearest < 0)
    nearest[unclear] = route(features[unclear], prototypes)
    return nearest


def reassign(features: np.ndarray, prototypes: np.ndarray, nearest: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What `assign` gives where some prototypes are `new` bool [K], in the place of others: only they can be nearer.

    `nearest` int32 [N] is the place of the prototype that was nearest before, negative where it is gone. `assign`
    decides for these, for those whose own is new, and where a new prototype may be nearer.
    """
    nearest = nearest.copy()
    known = np.flatnonzero(nearest >= 0)
    for piece, rows, products, bound in _factors(features[known], prototypes):
        own = np.einsum("bd,bd->b", rows, products.T[nearest[known[piece]]])
        gaps = np.concatenate([own[:, None], rows @ products[:, new]], axis=1)  # [B, 1 + new]
        nearest[known[piece][_clear_nearest(gaps, bound) != 0]] = -1
    lost = np.flatnonzero(nearest < 0)
    nearest[lost] = assign(features[lost], prototypes)
    return nearest


def _factors(
    features: np.ndarray, prototypes: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces of the features, the factors [B, D + 1], [D + 1, K] of their gaps, the bounds of `_clear_nearest`."""
    centre = prototypes.mean(axis=0, dtype=np.float32)
    columns = prototypes - centre
    squares = np.sum(columns**2, axis=1)  # [K]
    products = np.concatenate([-2 * columns.T, squares[None]])  # [D + 1, K]
    rounding = 8 * (len(products) + 8) * np.finfo(np.float32).eps
    for start in range(0, len(features), BATCH):
        piece = slice(start, start + BATCH)
        rows = np.ones((len(features[piece]), len(products)), np.float32)  # [B, D + 1]
        rows[:, :-1] = features[piece] - centre
        reach = np.sqrt(np.sum(rows**2, axis=1)) + np.sqrt(squares.max())
        yield piece, rows, products, rounding * reach**2


def _clear_nearest(gaps: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Column int32 [B] of the smallest gap in each row of [B, K]; -1 where the next is not larger by the bound [B].

    A gap is a squared distance less the row's own square, |p - c|^2 - 2 (f - c)(p - c) for a feature f, a prototype p
    and the mean prototype c. The difference of two is wrong by less than 4 (D + 4) u (|f - c| + |p - c|)^2 with the
    unit roundoff u, the routing program's error included; the bound is four times that.
    """
    every, nearest = np.arange(len(gaps)), np.argmin(gaps, axis=1)
    smallest = gaps[every, nearest]
    gaps[every, nearest] = np.inf
    clear = np.min(gaps, axis=1) > smallest + bound  # not where one is NaN
    return np.where(clear, nearest, -1).astype(np.int32)


def route(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Index of the nearest prototype as the routing program of predictions has it: [N, D], [K, D] -> int32 [N]."""
    full, present = padded(prototypes)
    nearest = np.zeros(len(features), np.int32)
    for start in range(0, len(features), BATCH):
        batch = np.zeros((BATCH, features.shape[1]), np.float32)
        rows = features[start : start + BATCH]
        batch[: len(rows)] = rows
        nearest[start : start + BATCH] = np.asarray(_nearest()(batch, full, present))[: len(rows), 0]
    return nearest


def expected_share(sizes: Sequence[int], tuned: Sequence[int] = ()) -> float:
    """Expected share of the data that a uniform unsampled request re-tunes: sum(m_k^2) / N^2, of clusters of m_k.

    `tuned` are the records that are tuned again with a member of each cluster, where that is not m_k.
    """
    total = sum(sizes)
    return sum(size * again for size, again in zip(sizes, tuned or sizes, strict=True)) / max(total, 1) ** 2
