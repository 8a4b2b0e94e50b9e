"""Batch unlearning in formulas: the paper's (section 5.3 and appendix 2) and what they leave out. NumPy only.

Requests name private records independently and uniformly; those that arrive in one window are served together.
The paper counts clusters that are hit and prices each at T_c, whatever its size, all at the same time. Left out are:
a uniform request hits large clusters more often; a sampled record changes the clustering, and with it slices that
nobody named; L lanes take turns.

Symbols: K clusters, m_i members of cluster i, N records, n_s sampled records, s_i of them in cluster i,
lambda T expected requests of a window, k requests where their number is known, L lanes of all devices together.
Arrays are float64 [K] unless it is said otherwise; times are in the unit of what they are made of.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Sizes = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Batch:
    """The requests that are served together.

    Attributes:
        requests: lambda T, the mean of a Poisson number; or, if `fixed`, k, exactly so many.
        fixed: their number is known.
    """

    requests: float
    fixed: bool = False

    def hits(self, share: float | np.ndarray) -> np.ndarray:
        """Probability that a request names one of a given share of the records, [...] -> [...] (Eq. 14).

        1 - exp(-share lambda T), or 1 - (1 - share)^k. Repeated requests for a record count once for its cluster.
        """
        return -np.expm1(self._log_spares(share))

    def spares(self, share: float | np.ndarray) -> np.ndarray:
        """Probability that no request names one of a given share of the records, 1 - `hits`."""
        return np.exp(self._log_spares(share))

    def _log_spares(self, share: float | np.ndarray) -> np.ndarray:
        share = np.clip(np.asarray(share, np.float64), 0.0, 1.0)  # sums of shares may end a rounding above 1
        if not self.requests:
            return np.zeros_like(share)
        if not self.fixed:
            return -share * self.requests
        with np.errstate(divide="ignore"):  # everything is named for certain
            return self.requests * np.log1p(-share)


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """What requests may hit, and what it costs.

    Attributes:
        members: float64 [K], m_i > 0.
        sampled: float64 [K], s_i <= m_i, members whose erasure changes the clustering (none for a public sample).
        images: float64 [K], images passed forward and backward to tune the cluster again.
    """

    members: np.ndarray
    sampled: np.ndarray
    images: np.ndarray

    @property
    def records(self) -> float:
        """N."""
        return float(self.members.sum())

    @property
    def sample(self) -> float:
        """n_s."""
        return float(self.sampled.sum())


def clusters_of(sizes: Sizes, sample: float = 0.0, epochs: float = 1.0) -> Clusters:
    """Clusters of given sizes, each with its proportional part of n_s sampled records.

    Every member is passed forward and backward `epochs` times.
    """
    members = np.asarray(sizes, np.float64)
    return Clusters(members, members * (sample / members.sum()), members * epochs)


# the paper's formulas


def cluster_rates(sizes: Sizes, rate: float) -> np.ndarray:
    """Requests per unit of time that fall on each cluster: lambda m_i / N (Eq. 13)."""
    return _shares(sizes) * rate


def hit_probabilities(sizes: Sizes, batch: Batch) -> np.ndarray:
    """P_i, the probability that a window's requests hit a cluster (Eq. 14)."""
    return batch.hits(_shares(sizes))


def expected_affected(sizes: Sizes, batch: Batch) -> float:
    """E[K_affected] = sum of P_i (Eqs. 9 and 15); for k requests sum of 1 - (1 - m_i / N)^k."""
    return float(hit_probabilities(sizes, batch).sum())


def affected_bound(batch: Batch) -> float:
    """lambda T: at least E[K_affected] and its variance, and what they come to for rare requests (Eqs. 10, 15, 17)."""
    return batch.requests


def variance_affected(sizes: Sizes, batch: Batch) -> float:
    """Var[K_affected]: for Poisson requests the sum of P_i (1 - P_i) (Eqs. 16 and 17).

    k requests couple the clusters: P(neither i nor j is hit) - (1 - P_i)(1 - P_j) is added for each pair. Pairs
    are counted by their sizes, of which there are at most sqrt(2 N) different ones.
    """
    share, count = np.unique(_shares(sizes), return_counts=True)
    hit, spared = batch.hits(share), batch.spares(share)
    own = float((count * hit * spared).sum())
    if not batch.fixed:
        return own
    both = batch.spares(share[:, None] + share[None]) - spared[:, None] * spared[None]
    pairs = count[:, None] * count[None] - np.diag(count)
    return own + float((pairs * both).sum())


def any_affected(batch: Batch) -> float:
    """P(any cluster affected) = 1 - exp(-lambda T) (Eqs. 18 and 21)."""
    return float(batch.hits(1.0))


def expected_time(seconds: float, batch: Batch) -> float:
    """The paper's processing time of a window: seconds of one re-tuning times P(any).

    With T_c, one cluster, that of LMEraser, whatever number of clusters is hit (Eq. 19); with T_s, the whole data
    set, that of a single prompt (Eq. 22).
    """
    return seconds * any_affected(batch)


def rare_time(seconds: float, batch: Batch) -> float:
    """What `expected_time` comes to when requests are rare: seconds times lambda T (Eqs. 20 and 23)."""
    return seconds * batch.requests


def efficiency_gain(single: float, cluster: float) -> float:
    """T_s / T_c (Eqs. 11 and 24)."""
    return single / cluster


# what the paper's formulas leave out


def size_biased_images(clusters: Clusters) -> float:
    """Images that one uniform request re-tunes where nothing is clustered again: sum of m_i images_i / N.

    One pass over the members costs sum of m_i^2 / N, which is at least the mean size N / K that pricing a request
    at T_c amounts to: it is N / K times 1 + the squared coefficient of variation of the sizes.
    """
    return float((clusters.members * clusters.images).sum() / clusters.records)


def reclusters(clusters: Clusters, batch: Batch) -> float:
    """Probability that a sampled record is named: for one request n_s / N."""
    return float(batch.hits(clusters.sample / clusters.records))


def retuned_probabilities(clusters: Clusters, batch: Batch, changed: float = 1.0) -> np.ndarray:
    """Probability that each cluster is tuned again: it is hit, or another cluster's sampled record is and it changes.

    1 - (1 - changed) P(i is not hit) - changed P(i is not hit and nothing is clustered again). With changed = 0, or
    without a private sample, this is P_i (Eq. 14).

    Args:
        clusters: K clusters.
        batch: the requests.
        changed: share of the clusters that a new clustering changes although none of their members is erased; 1 is
            the bound.
    """
    total, others = clusters.records, clusters.sample - clusters.sampled
    hit, disturbed = batch.hits(clusters.members / total), batch.hits((clusters.members + others) / total)
    return (1 - changed) * hit + changed * disturbed


def expected_retuned(clusters: Clusters, batch: Batch, changed: float = 1.0) -> float:
    """Clusters tuned again, those of a new clustering included; with changed = 0 E[K_affected]."""
    return float(retuned_probabilities(clusters, batch, changed).sum())


def expected_images(clusters: Clusters, batch: Batch, changed: float = 1.0) -> float:
    """Images that a window's requests re-tune: sum of images_i times `retuned_probabilities`.

    A bound by the images of the erased members, which are not tuned on any more.
    """
    return float((clusters.images * retuned_probabilities(clusters, batch, changed)).sum())


def makespan(images: np.ndarray, lanes: int) -> np.ndarray:
    """Images of the lane that ends last, at least: the largest of longest and total / L, float64 [..., K] -> [...].

    `schedule.pack` comes within 2 % of it for as many clusters as the paper has.
    """
    return np.maximum(images.max(axis=-1, initial=0.0), images.sum(axis=-1) / lanes)


def expected_makespan(clusters: Clusters, batch: Batch, changed: float = 1.0, lanes: int = 1) -> float:
    """Images of the lane that ends last, expected, at least: E[T] (Eq. 19) where clusters differ and lanes are few.

    max(E[longest], E[total] / L), windows with and without a new clustering apart; exact for one lane. Each cluster
    changes independently of the others. E[longest] sums over the clusters, longest first, the probability that
    this is the first one tuned again.
    """
    order = np.argsort(-clusters.images, kind="stable")
    members, sampled, images = (part[order] for part in (clusters.members, clusters.sampled, clusters.images))
    total, sample = clusters.records, clusters.sample
    counted, counted_sampled = (np.concatenate([[0.0], np.cumsum(part)]) for part in (members, sampled))
    quiet = batch.spares((counted + sample - counted_sampled) / total)  # first j not hit, nothing clustered again
    spared = batch.spares(counted / total)  # first j not hit
    untouched = (spared - quiet) * (1 - changed) ** np.arange(len(counted))  # first j left alone by a new clustering
    alone = batch.spares(sample / total) - batch.spares((members + sample - sampled) / total)
    kept_images = float((images * alone).sum())
    rest_images = expected_images(clusters, batch, changed) - kept_images
    kept_longest, rest_longest = (float((images * -np.diff(left)).sum()) for left in (quiet, untouched))
    return max(kept_longest, kept_images / lanes) + max(rest_longest, rest_images / lanes)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What tunes: L lanes of all devices together, and the images per second of all of them when none is idle."""

    lanes: int = 1
    speed: float = 1.0

    @property
    def lane_speed(self) -> float:
        """Images per second of one lane; idle ones beside it make it no faster, one program has them all."""
        return self.speed / self.lanes


# SISA (Bourtoule et al., 2021), for comparison: records passed once, requests that fall on every shard alike


def sisa_sequential(records: float, shards: int, requests: int) -> float:
    """Records re-trained by k requests served one by one: k (N / S - 1) - k (k - 1) / (2 S)."""
    return requests * (records / shards - 1) - requests * (requests - 1) / (2 * shards)


def sisa_batched(records: float, shards: int, requests: int) -> float:
    """Records re-trained by k requests served together: N (1 - (1 - 1 / S)^k) - k."""
    return records * float(Batch(requests, fixed=True).hits(1 / shards)) - requests


def sisa_sliced(records: float, shards: int, slices: int, epochs: float = 1.0) -> float:
    """Records times epochs that one request re-trains with R slices in a shard: e N / S (2/3 + 1/(3 R))."""
    return epochs * records / shards * (2 / 3 + 1 / (3 * slices))


def sisa_sliced_batch(shard: float, slices: int, requests: int, epochs: float = 1.0) -> float:
    """Records times epochs that k requests in one shard of D records re-train together.

    Stage r passes r D / R records 2 e / (R + 1) times; it is repeated with probability 1 - (1 - r / R)^k.
    """
    stage = np.arange(1, slices + 1)
    repeated = Batch(requests, fixed=True).hits(stage / slices)
    return float((stage * repeated).sum() * 2 * epochs * shard / (slices * (slices + 1)))


def _shares(sizes: Sizes) -> np.ndarray:
    """m_i / N."""
    members = np.asarray(sizes, np.float64)
    return members / members.sum()
