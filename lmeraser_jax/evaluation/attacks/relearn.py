"""Relearn time (Golatkar et al., 2020): how soon do slices learn erased records again?

A slice that keeps a residue of the records needs fewer steps than one tuned from scratch without them, until their
loss is where a slice has it that was tuned on them. That slice is one of its own, with other random streams, so that
the published one, which must be quick, is measured and not compared with itself.

Shapes: K clusters, S slices from scratch of each.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import shadows, statistics
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, Pool
from lmeraser_jax.evaluation.attacks.statistics import DOUBT
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import TuningSpec, tune
from lmeraser_jax.unlearning.run import Run

STEPS = 64  # tried; longer is told as this
SCRATCH = 3  # at least so many slices of a cluster are tuned from scratch
BACK = 1.1  # the loss is back when it is at most so many times that of the slice that gives the level


@dataclasses.dataclass(frozen=True)
class Relearn:
    """Steps until the loss of a cluster's forgotten records was back, for slices that keep, unlearned, never saw them.

    Attributes:
        steps: for each column, for each cluster.
        p: for each column, the chance of so few steps beside slices tuned from scratch.
        scratch: S.
    """

    steps: tuple[tuple[int, ...], ...]
    p: tuple[float, ...]
    scratch: int

    name = "relearn"

    @property
    def found(self) -> tuple[bool, ...]:
        return tuple(p < DOUBT for p in self.p)

    @property
    def least(self) -> float:
        return least(len(self.steps[0]), self.scratch)

    def lines(self) -> list[tuple[str, ...]]:
        means = (f"{mean:.1f} (p = {p:.3f})" for mean, p in zip(np.mean(self.steps, axis=1), self.p, strict=True))
        return [(f"steps, at most {STEPS} (fewer by chance)", *means)]

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"found": self.found}


def least(clusters: int, scratch: int) -> float:
    """The smallest chance that K clusters with S slices from scratch can give: the quickest of S + 1 in each."""
    return float(scratch + 1) ** -clusters


def scratch_for(clusters: int, most: int) -> int:
    """S for K clusters: as many slices as let the test find something, or `SCRATCH` where not even `most` would."""
    count = max(SCRATCH, math.floor(DOUBT ** (-1 / clusters)))
    return count if count <= most else SCRATCH


def relearn(run: Run, pools: Sequence[Pool], slices: Sequence[Sequence[Slice]], again: Sequence[Slice]) -> Relearn:
    """Tunes slices on the forgotten records alone and watches their loss.

    Args:
        run: an opened workdir.
        pools: K clusters.
        slices: for each, the published slice, which keeps the records, that which unlearned them, and S from scratch.
        again: for each, another one tuned with the records, whose loss on them is the level to reach.
    """
    problem = _problem(run.tuning_spec)
    records = [pool.of(FORGOTTEN) for pool in pools]
    inputs, labels = shadows.material(run, problem, records)
    jobs: dict[tuple[int, int], Job] = {}
    for k, table in enumerate(records):
        epochs = -(-STEPS * problem.tuning.batch // len(table))
        job = Job(f"{pools[k].key}/relearn", table.rows.astype(np.int32), epochs, problem.tuning.batch)
        job = dataclasses.replace(job, snapshots=tuple(range(1, min(STEPS + 1, job.steps))))
        jobs |= {(k, place): dataclasses.replace(job, start=start) for place, start in enumerate(slices[k])}
    places = {id(job): place for place, job in jobs.items()}
    passed = {(k, place): [slices[k][place]] for k, place in jobs}
    for done in tune(problem, run.backbone, list(jobs.values()), inputs, labels, run.mesh):
        if done.failed_at is not None:
            raise UserError("the loss became infinite or not a number while forgotten records were learned again")
        passed[places[id(done.job)]].append(done.slice)
    levels = [float(_loss(run, [part], table)[0]) for part, table in zip(again, records, strict=True)]
    counted = {(k, place): until(_loss(run, made, records[k]), levels[k]) for (k, place), made in passed.items()}
    steps = np.array([[counted[k, place] for place in range(len(slices[k]))] for k in range(len(pools))])  # [K, 2 + S]
    columns = [np.delete(steps, [i for i in (0, 1) if i != column], axis=1) for column in (0, 1)]
    chances = tuple(faster(column) for column in (*columns, steps[:, 2:]))
    return Relearn(tuple(map(tuple, steps[:, :3].T.tolist())), chances, steps.shape[1] - 2)


def _problem(problem: TuningSpec) -> TuningSpec:
    """Starting from given slices is a part of the program where clusters are tuned in stages only."""
    tuning = shadows.with_lanes(problem).tuning
    return dataclasses.replace(problem, tuning=dataclasses.replace(tuning, slices=max(2, tuning.slices), warmup=0.0))


def _loss(run: Run, slices: Sequence[Slice], records) -> np.ndarray:
    """Mean loss of records under each of some slices: float64 [S]."""
    return statistics.losses(shadows.scored(run, slices, records).margins).mean(axis=1)


def until(losses: np.ndarray, level: float) -> int:
    """The first step after which the loss, float [1 + steps], is back at a level; `STEPS` where it is never."""
    back = np.flatnonzero(losses[: STEPS + 1] <= BACK * level)
    return int(back[0]) if len(back) else STEPS


def faster(steps: np.ndarray) -> float:
    """The chance that the first of each row's equals needs so few steps in all: int [K, 1 + others].

    Where slices are alike, any of a cluster's might have been the first: a permutation test, over all deals.
    """
    chances = np.ones(1)  # of each sum
    for row in steps:
        chances = np.convolve(chances, np.bincount(row) / len(row))
    return float(min(1.0, chances[: steps[:, 0].sum() + 1].sum()))
