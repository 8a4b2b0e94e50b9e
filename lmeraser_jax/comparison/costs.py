"""What an erasure costs: planned for many records, served for a few."""

import dataclasses

import numpy as np

from lmeraser_jax import unlearning
from lmeraser_jax.artifacts import load_slice
from lmeraser_jax.digests import philox
from lmeraser_jax.planning import plan, sampled
from lmeraser_jax.progress import progress
from lmeraser_jax.run import Run
from lmeraser_jax.store import checkpoints


@dataclasses.dataclass(frozen=True)
class Planned:
    """Erasures that were planned and not carried out, one for each of some records.

    Attributes:
        images: float64 [n], images passed forward and backward.
        records: float64 [n], members of all slices that are made again.
        slices: float64 [n], these slices.
    """

    images: np.ndarray
    records: np.ndarray
    slices: np.ndarray


def planned(run: Run, count: int) -> Planned:
    """Plans the erasure of `count` live records, drawn uniformly, each on its own. Changes nothing."""
    ids = run.catalog.live("train").ids
    chosen = philox(run.config.seed, "probe").choice(len(ids), min(count, len(ids)), replace=False)
    rows = []
    with progress("plan", len(chosen)) as shown:
        for index in chosen:
            wanted = plan(run, frozenset({ids[index]}))
            again = [wanted.members[key] for key in wanted.missing]
            rows.append((wanted.images_missing, sum(map(len, again)), len(again)))
            shown.advance(1)
    return Planned(*np.array(rows, np.float64).reshape(-1, 3).T)


def served(run: Run, count: int) -> float:
    """Erases `count` records that are not sampled, one request after the other: mean seconds of a request."""
    sample, seconds = set(sampled(run)[0].ids), []
    ids = [name for name in run.catalog.live("train").ids if name not in sample]
    for index in philox(run.config.seed, "served").choice(len(ids), min(count, len(ids)), replace=False):
        outcome = unlearning.request_erasure(run, [ids[index]]).outcome
        assert outcome is not None
        seconds.append(outcome.seconds)
    return float(np.mean(seconds)) if seconds else 0.0


def parameters(run: Run) -> int:
    """Numbers in one slice; all slices of a run have as many."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    part = load_slice(run, next(iter(manifest.clusters.values())))
    return sum(leaf.size for leaf in checkpoints.flatten(part).values())
