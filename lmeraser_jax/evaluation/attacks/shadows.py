"""Slices that might have been: one cluster's slice tuned on other members, and what any slices say of images.

In exact mode clusters are independent, so a shadow model of a record is one slice, not a system. Shadows are ordinary
jobs of the tuning program under names of their own, so that their random streams differ; they stay in memory.

Shapes: N shadows, n records of a pool, w of them watched, S slices.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, RETAINED, VALIDATION, Pool
from lmeraser_jax.hashing import philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.training.closed_form import expanded
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.jobs import stage_jobs
from lmeraser_jax.training.making import make
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import TuningSpec, features_of
from lmeraser_jax.unlearning.run import Run

LANES = 8  # at least so many shadows are tuned at the same time


@dataclasses.dataclass(frozen=True, eq=False)
class Counterfactual:
    """A cluster as it might have been: the name of its random streams, and its members."""

    stream: str
    members: RecordTable


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What slices say of records: margins float64 [S, w] and whether the answer was right, bool [S, w]."""

    margins: np.ndarray
    right: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Shadows:
    """Margins of a pool's watched records under three populations of N slices each, float64 [N, w].

    Attributes:
        inside: bool [N, w], who was drawn for each shadow.
        shadows: tuned on who was drawn.
        unlearned: the same shadows after the forgotten records were erased from them.
        drawn: bool [N, w], a second draw.
        never: tuned on that draw without the forgotten records, which these slices never saw.
    """

    inside: np.ndarray
    shadows: np.ndarray
    unlearned: np.ndarray
    drawn: np.ndarray
    never: np.ndarray


def with_lanes(problem: TuningSpec) -> TuningSpec:
    """The problem for shadows: many lanes, except of whole backbones. Their bits need not be those published."""
    lanes = problem.tuning.lanes if problem.own_architecture else max(LANES, problem.tuning.lanes)
    return dataclasses.replace(problem, tuning=dataclasses.replace(problem.tuning, lanes=lanes))


def tuned(run: Run, problem: TuningSpec, worlds: Sequence[Counterfactual]) -> tuple[list[Slice], int]:
    """The slices of some worlds, in their order, and how many images were passed. Writes nothing.

    With the run's own problem, a cluster's key for a stream and its live members, these are the published bits.

    Raises:
        UserError: a loss was not finite.
    """
    chains = [
        stage_jobs(world.stream, world.members.ids, world.members.rows, problem.tuning, problem.seed)
        for world in worlds
    ]
    inputs, labels = material(run, problem, [world.members for world in worlds])
    slices: dict[int, Slice] = {}
    for stage in range(max(map(len, chains), default=0)):  # once, or once for each stage, as a reconcile does
        jobs = {
            place: dataclasses.replace(chain[stage], start=slices.get(place))
            for place, chain in enumerate(chains)
            if stage < len(chain)
        }
        places = {id(job): place for place, job in jobs.items()}
        for done in make(problem, run.backbone, list(jobs.values()), inputs, labels, run.mesh):
            if done.failed_at is not None:
                raise UserError("the loss of a shadow model became infinite or not a number; nothing can be said")
            slices[places[id(done.job)]] = done.slice
    return [slices[place] for place in range(len(worlds))], sum(job.images for chain in chains for job in chain)


def material(run: Run, problem: TuningSpec, tables: Sequence[RecordTable]) -> tuple[np.ndarray, np.ndarray]:
    """What slices with these members are made of, and the labels int32 [N] of their rows: see `Run.training_data`."""
    labels, seen = np.zeros(run.catalog.rows_used(), np.int32), np.zeros(run.catalog.rows_used(), bool)
    for table in tables:
        labels[table.rows], seen[table.rows] = table.labels, True
    live = run.catalog.live("train", "test", "holdout")
    return run.training_data(live.take(np.flatnonzero(seen[live.rows])), problem), labels


@functools.lru_cache(maxsize=8)
def _compiled(problem: TuningSpec, mesh: Mesh):
    """Compiled `(params, slices with a leading axis S, uint8 [B, h, w, c]) -> logits float32 [S, B, Y]`."""

    def one(params, inputs, part: Slice):
        return features_of(part, problem, params, inputs) @ part.kernel + part.bias[None]

    def device(params, parts: Slice, images):
        inputs = centred(images, problem.spec)
        if problem.on_features:
            inputs = expanded(backbone_lib.features(problem.architecture, params, inputs), problem.tuning.expand)
        return jax.vmap(one, in_axes=(None, None, 0))(params, inputs, parts)

    axis = P(mesh.axis_names[0])
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(P(), axis, P()), out_specs=axis, check_vma=False))


def logits(run: Run, slices: Sequence[Slice], rows: np.ndarray, problem: TuningSpec | None = None) -> np.ndarray:
    """Logits of images, as centre crops, under each of some slices: float32 [S, w, Y].

    Args:
        run: an opened workdir.
        slices: S slices on the host.
        rows: int [w], image rows.
        problem: how the slices were made, if not by the run's own.
    """
    problem = with_lanes(problem or run.tuning_spec)
    program = _compiled(problem, run.mesh)
    params = on_device(run.backbone, compute_dtype(problem.tuning.dtype, run.mesh), run.mesh)
    wide, batch = problem.tuning.lanes * run.mesh.size, run.config.inference.batch
    found = np.zeros((len(slices), len(rows), problem.classes), np.float32)
    for low in range(0, len(slices), wide):
        some = list(slices[low : low + wide])
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), *some, *some[:1] * (wide - len(some)))
        for start in range(0, len(rows), batch):
            piece = run.images[rows[start : start + batch]]
            images = np.zeros((batch, *piece.shape[1:]), np.uint8)
            images[: len(piece)] = piece
            answers = np.asarray(program(params, stack, images))
            found[low : low + wide, start : start + batch] = answers[: len(some), : len(piece)]
    return found


def scored(run: Run, slices: Sequence[Slice], records: RecordTable, problem: TuningSpec | None = None) -> Scores:
    """Margins and right answers of records under each of some slices."""
    found = logits(run, slices, records.rows, problem)
    return Scores(statistics.margins(found, records.labels), found.argmax(axis=-1) == records.labels)


def unlearned_world(pool: Pool) -> Counterfactual:
    """The cluster that erasing the forgotten records leaves: the published key, the members that stay."""
    return Counterfactual(pool.key, pool.of(RETAINED))


def halves(models: int, records: int, rng: np.random.Generator) -> np.ndarray:
    """bool [models, records]: a random half of the records for each model, and of the models for each record."""
    inside = np.repeat(np.arange(models)[:, None] < models // 2, records, axis=1)
    return rng.permuted(inside, axis=0)


def shadows(run: Run, pool: Pool, count: int, seed: int, populations: bool) -> tuple[Shadows, int, int]:
    """Tunes a pool's shadows on random halves of it and scores the watched records.

    Args:
        run: an opened workdir.
        pool: the cluster.
        count: N.
        seed: of the halves.
        populations: also tune `unlearned` and `never`, which are empty otherwise.

    Returns:
        (the scores, slices tuned, images passed).
    """
    able, stays = pool.roles != VALIDATION, ~np.isin(pool.roles, (FORGOTTEN, VALIDATION))
    rng = philox(seed, "attack", "halves", pool.key)
    inside, drawn = (halves(count, len(pool.roles), rng) & able for _ in range(2))
    for mask in (inside, drawn):  # of a small pool a model may have drawn nobody that stays
        mask[~(mask & stays).any(axis=1), np.flatnonzero(stays)[0]] = True

    def worlds(mask: np.ndarray, first: int) -> list[Counterfactual]:
        names = (f"{pool.key}/shadow/{seed}/{first + i}" for i in range(count))
        return [
            Counterfactual(name, pool.records.take(np.flatnonzero(row))) for name, row in zip(names, mask, strict=True)
        ]

    cast = worlds(inside, 0)
    if populations:
        cast += worlds(inside & stays, 0) + worlds(drawn & stays, count)
    made, images = tuned(run, with_lanes(run.tuning_spec), cast)
    margins = scored(run, made, pool.records.take(pool.watched)).margins
    parts = [margins[low : low + count] for low in (0, count, 2 * count)]
    return Shadows(inside[:, pool.watched], parts[0], parts[1], drawn[:, pool.watched], parts[2]), len(made), images
