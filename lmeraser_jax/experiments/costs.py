"""What an erasure costs: planned for many records, served for a few; what an answer costs."""

import dataclasses
import json

import numpy as np

from lmeraser_jax.hashing import philox
from lmeraser_jax.progress import progress
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.rows import SliceKind
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.live_state import live_state, sampled
from lmeraser_jax.unlearning.plan import plan
from lmeraser_jax.unlearning.run import Run


@dataclasses.dataclass(frozen=True)
class Planned:
    """Erasures that were planned and not carried out, one for each of some records.

    Attributes:
        images: float64 [n], images passed forward and backward.
        records: float64 [n], members of all slices that are made again.
        parameters: float64 [n], numbers in these slices.
    """

    images: np.ndarray
    records: np.ndarray
    parameters: np.ndarray


def planned(run: Run, count: int) -> Planned:
    """Plans the erasure of `count` live records, drawn uniformly, each on its own. Changes nothing."""
    ids = run.catalog.live("train").ids
    chosen = philox(run.config.seed, "probe").choice(len(ids), min(count, len(ids)), replace=False)
    rows, (own, common) = [], sizes(run)
    with progress("plan", len(chosen)) as shown:
        for index in chosen:
            wanted = plan(live_state(run, {ids[index]}))
            again = [wanted.members[key].rows for key in wanted.missing]
            records = len(np.unique(np.concatenate(again))) if again else 0
            numbers = sum(common if key == SliceKind.COMMON else own for key in wanted.missing)
            rows.append((wanted.images_missing, records, numbers))
            shown.advance(1)
    return Planned(*np.array(rows, np.float64).reshape(-1, 3).T)


@dataclasses.dataclass(frozen=True)
class Served:
    """Mean seconds of requests that were carried out, from the plan to the purge; 0 where none was."""

    unsampled: float
    sampled: float


def served(run: Run, count: int) -> Served:
    """Erases `count` records that are not sampled and as many that are, one request after the other."""
    live, sample = list(run.catalog.live("train").ids), set(sampled(run)[0].ids)
    strata = {"unsampled": [name for name in live if name not in sample], "sampled": sorted(sample.intersection(live))}
    return Served(**{name: _mean_seconds(run, name, ids, count) for name, ids in strata.items()})


def _mean_seconds(run: Run, stratum: str, ids: list[str], count: int) -> float:
    seconds = []
    for index in philox(run.config.seed, "served", stratum).choice(len(ids), min(count, len(ids)), replace=False):
        outcome = erase.request_erasure(run, [ids[index]]).outcome
        assert outcome is not None
        seconds.append(outcome.seconds)
    return float(np.mean(seconds)) if seconds else 0.0


def seconds_spent(run: Run) -> float:
    """Of all that was made in a workdir so far, features left out.

    An attempt that was interrupted logged nothing; of it the slices count that it left.
    """
    lines = [json.loads(line) for line in run.layout.metrics.read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["kind"] == "reconcile"]
    start = lines[0]["at"] - lines[0]["seconds"]
    left = sum(row.seconds for row in run.catalog.slices().values() if row.created < start)
    return left / run.mesh.size + sum(line["seconds"] for line in lines)


def sizes(run: Run) -> tuple[int, int]:
    """Numbers in the slice of a cluster, all of which have as many, and in the common head, 0 where there is none."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    some = next(iter(manifest.clusters.values()))
    return _numbers(run, some), _numbers(
        run, manifest.entries[SliceKind.COMMON]
    ) if SliceKind.COMMON in manifest.entries else 0


def _numbers(run: Run, reference: str) -> int:
    return sum(leaf.size for leaf in checkpoints.flatten(load_slice(run, reference)).values())


def passes(run: Run, clusters: int) -> float:
    """Images passed forward through the backbone for one answer of K clusters (`inference.routed_probabilities`).

    What is passed to fill up a batch or the stack of clusters is not counted.
    """
    asked, own = run.config.inference, run.tuning_spec.own_architecture
    joined = bool(asked.common_weight and run.config.common.method != "none")
    if run.config.tuning.active_prompt_width == 0 and not own:
        return 1.0  # the feature that every head sees
    prompted = clusters if asked.nearest == 0 or own else min(asked.nearest, clusters)
    routed = run.config.clustering.partition == "adaptive" and asked.nearest > 0
    return float(prompted + (routed or joined))
