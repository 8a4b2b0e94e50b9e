"""Relearn time (Golatkar et al., 2020): how soon do slices learn erased records again?

A slice with a residue of them needs fewer steps than one from scratch, until its loss is that of a slice tuned with
them: another one than the published, which must be quick and is not compared with itself.

Shapes: K clusters, S slices from scratch of each, n forgotten records of a cluster (padded), B batch.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import shadows, statistics
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, Pool
from lmeraser_jax.evaluation.attacks.statistics import SIGNIFICANT
from lmeraser_jax.hashing import seed_words
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.jobs import Job, batches
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TextRows, TuningSpec
from lmeraser_jax.training.train_step import Batch, LaneState, cluster_loss, cluster_step, optimizer
from lmeraser_jax.unlearning.run import Run

STEPS = 64  # that are tried; a slice that needs more counts as needing so many
SCRATCH = 3  # at least so many slices of a cluster are tuned from scratch
BACK = 1.1  # the loss is back when it is at most so many times that of the slice that gives the level


def relearn(run: Run, pools: Sequence[Pool], slices: Sequence[Sequence[Slice]], again: Sequence[Slice]) -> Finding:
    """Tunes slices on the forgotten records alone and watches their loss.

    Of each of K clusters, `slices` are the published one, which keeps the records, that which unlearned them, and S
    from scratch; `again` is another one tuned with the records, whose loss on them is the level to reach. The finding
    has the steps of the first three for each cluster, and the chance of so few.

    Raises:
        UserError: a loss was not finite.
    """
    tables = [pool.of(FORGOTTEN) for pool in pools]
    size, steps = max(map(len, tables)), []
    for pool, table, candidates, with_records in zip(pools, tables, slices, again, strict=True):
        level = statistics.losses(shadows.score(run, [with_records], table)[0]).mean()
        losses = losses_while_relearning(run, pool.key, table, candidates, size)
        steps.append([steps_until(row, level) for row in losses])
    counts = np.array(steps)  # [K, 2 + S]
    scratch = counts.shape[1] - 2
    columns = (np.delete(counts, 1, axis=1), counts[:, 1:], counts[:, 2:])  # each with those from scratch behind it
    chances = [chance_of_so_few(column) for column in columns]
    means = counts[:, :3].mean(axis=0)
    return Finding(
        "relearn",
        detected=tuple(chance < SIGNIFICANT for chance in chances),
        smallest_p=float(scratch + 1) ** -len(pools),  # the quickest of each cluster's slices
        lines=[
            (
                f"steps, at most {STEPS} (fewer by chance)",
                *(f"{mean:.1f} (p = {chance:.3f})" for mean, chance in zip(means, chances, strict=True)),
            )
        ],
        values={"steps": counts[:, :3].T.tolist(), "p": chances, "scratch": scratch},
    )


def losses_while_relearning(run: Run, key: str, records: RecordTable, slices: Sequence[Slice], size: int) -> np.ndarray:
    """Mean loss of a cluster's forgotten records before and after each step, from each of 2 + S slices.

    The records are padded to `size`, one for all clusters, so that they share a program. float64 [2 + S, STEPS + 1].
    """
    tuning_spec = shadows.with_lanes(run.tuning_spec)
    tuning_spec = dataclasses.replace(tuning_spec, tuning=dataclasses.replace(tuning_spec.tuning, warmup=0.0))
    inputs, _ = shadows.training_arrays(run, tuning_spec, [records])
    rows, labels = np.zeros((size, *inputs.shape[1:]), inputs.dtype), np.zeros(size, np.int32)
    rows[: len(records)], labels[: len(records)] = inputs[records.rows], records.labels
    batch = tuning_spec.tuning.batch
    job = Job(
        f"{key}/relearn", np.arange(len(records), dtype=np.int32), epochs=-(-STEPS * batch // len(records)), batch=batch
    )
    orders, valid = batches(job, tuning_spec.seed)
    work = Batch(
        rows=orders[:STEPS],
        valid=valid[:STEPS],
        words=np.tile(seed_words(job.key), (STEPS, 1)),
        step=np.arange(1, STEPS + 1, dtype=np.int32),  # step 0 would start with a fresh slice
        total=np.full(STEPS, job.steps + 1, np.int32),
        slot=np.zeros(STEPS, np.int32),
    )
    params = on_device(run.backbone, compute_dtype(tuning_spec.tuning.dtype, run.mesh), run.mesh)
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *slices)
    losses = _program(tuning_spec)(params, stack, rows, labels, np.arange(size) < len(records), work)
    losses = np.asarray(losses, np.float64)
    if not np.isfinite(losses).all():
        raise UserError("the loss became infinite or not a number while forgotten records were learned again")
    return losses


@functools.lru_cache(maxsize=2)
def _program(tuning_spec: TuningSpec):
    """Compiled `(params, slices [S], records [n], labels [n], valid [n], Batch [STEPS]) -> losses [S, STEPS + 1]`."""

    def relearned(params: Any, rows: Any, labels: Any, valid: Any, work: Batch, slice_: Slice) -> jax.Array:
        rows = TextRows(rows) if tuning_spec.is_text else rows
        as_they_are = tuning_spec.is_text or tuning_spec.on_features
        inputs: Any = rows if as_they_are else centred(rows, tuning_spec.image_spec)

        def step(state: LaneState, batch: Batch) -> tuple[LaneState, jax.Array]:
            before = cluster_loss(state.slice, tuning_spec, params, inputs, labels, valid)
            state, _ = cluster_step(tuning_spec, params, rows, labels, state, batch)
            return state, before

        state = LaneState(slice_, optimizer(tuning_spec.tuning).init(slice_))
        state, losses = jax.lax.scan(step, state, work)
        return jnp.append(losses, cluster_loss(state.slice, tuning_spec, params, inputs, labels, valid))

    def all_relearned(params: Any, slices: Slice, *data: Any) -> jax.Array:
        return jax.lax.map(functools.partial(relearned, params, *data), slices, batch_size=tuning_spec.tuning.lanes)

    return jax.jit(all_relearned)


def steps_until(losses: np.ndarray, level: float) -> int:
    """The first step after which the loss, float [1 + steps], is back at a level; `STEPS` where it is never."""
    back = np.flatnonzero(losses <= BACK * level)
    return int(back[0]) if len(back) else STEPS


def scratch_for(clusters: int, most: int) -> int:
    """S for K clusters: as many slices as let the test find something, or `SCRATCH` where not even `most` would."""
    count = max(SCRATCH, math.floor(SIGNIFICANT ** (-1 / clusters)))
    return count if count <= most else SCRATCH


def chance_of_so_few(steps: np.ndarray) -> float:
    """The chance that the first slice of each row needs so few steps in all: int [K, 1 + S].

    Where slices are alike, any of a cluster's might have been the first: a permutation test, over all deals.
    """
    chances = np.ones(1)  # of each sum
    for row in steps:
        chances = np.convolve(chances, np.bincount(row) / len(row))
    return float(min(1.0, chances[: steps[:, 0].sum() + 1].sum()))
