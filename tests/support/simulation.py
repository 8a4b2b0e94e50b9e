"""Windows of erasure requests drawn at random, to test the formulas of `experiments.cost_model`.

Only the named records are drawn. Clusters hit, new clusterings and lanes are then counted, not computed from
probabilities.
"""

import dataclasses

import numpy as np

from lmeraser_jax.experiments.cost_model import Batch, Clusters


def clusters_of(sizes, sample=0.0, epochs=1.0) -> Clusters:
    """Clusters of given sizes [K], each with its proportional number of n_s sampled records."""
    members = np.asarray(sizes, np.float64)
    return Clusters(members, members * (sample / members.sum()), members * epochs)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """float64 [windows] each: clusters with a named member, clusters and images tuned again, images of the lane that
    ends last, and 1 for a new clustering."""

    affected: np.ndarray
    retuned: np.ndarray
    images: np.ndarray
    longest: np.ndarray
    reclustered: np.ndarray


def simulate(
    clusters: Clusters, batch: Batch, windows: int, rng: np.random.Generator, changed: float = 1.0, lanes: int = 1
) -> Simulated:
    """Draws windows and counts. `changed`: probability that a new clustering changes a cluster that no request hit."""
    share = np.concatenate([clusters.members - clusters.sampled, clusters.sampled]) / clusters.records
    if batch.fixed:
        named = rng.multinomial(int(batch.requests), share, size=windows)
    else:
        named = rng.poisson(batch.requests * share, size=(windows, len(share)))
    unsampled, sampled = np.split(named > 0, 2, axis=1)  # [windows, K] each
    hit, again = unsampled | sampled, np.any(sampled, axis=1)
    retuned = hit | (again[:, None] & (rng.random(hit.shape) < changed))
    images = retuned * clusters.images
    counts = (hit.sum(1), retuned.sum(1), images.sum(1), makespan(images, lanes), again)
    return Simulated(*(np.asarray(count, np.float64) for count in counts))


def makespan(images: np.ndarray, lanes: int) -> np.ndarray:
    """Images of the lane that ends last, at least: the largest of longest and total / L, [..., K] -> [...]."""
    return np.maximum(images.max(axis=-1, initial=0.0), images.sum(axis=-1) / lanes)
