"""Shadow models: one cluster's slice tuned on other members, and what slices say about records.

Clusters are tuned independently, so a shadow model of a record is one slice, not a system. Shadows are ordinary jobs
under names of their own, so that their random streams differ; they stay in memory.

Shapes: N shadows, n records of a pool, S slices, Y classes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.transforms import centred
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import statistics
from lmeraser_jax.evaluation.forgetting import RowScores, row_scores
from lmeraser_jax.evaluation.language import AT_A_TIME, padded
from lmeraser_jax.hashing import philox
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.training.closed_form import expand
from lmeraser_jax.training.features import compute_dtype, on_device
from lmeraser_jax.training.jobs import make_job
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TextRows, TuningSpec, features_of, outputs_of, targets_of
from lmeraser_jax.training.tune import make_slices
from lmeraser_jax.unlearning.run import Run

FORGOTTEN, RETAINED, OUTSIDE, VALIDATION = range(4)  # roles of records
LANES = 8  # at least so many shadows are tuned at the same time


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """One attacked cluster, with the images of no published model that are routed to it.

    FORGOTTEN and RETAINED are the cluster's members; the others are images that no published model was tuned on:
    OUTSIDE are in shadows and compared with the forgotten, VALIDATION are in none.
    """

    key: str  # of the cluster
    ref: str  # its published slice
    records: RecordTable  # n, sorted by id
    roles: np.ndarray  # int8 [n]

    def of(self, *roles: int) -> RecordTable:
        """The records with one of these roles."""
        return self.records.take(np.flatnonzero(np.isin(self.roles, roles)))


@dataclasses.dataclass(frozen=True, eq=False)
class ShadowSets:
    """Margins of a pool's records under three populations of N slices each, float64 [N, n]."""

    roles: np.ndarray  # int8 [n]
    inside: np.ndarray  # bool [N, n], the records drawn for each shadow
    kept: np.ndarray  # under slices tuned on the records drawn
    unlearned: np.ndarray  # under the same slices after the forgotten records were erased from them
    drawn: np.ndarray  # bool [N, n], a second draw
    never: np.ndarray  # under slices tuned on the second draw without the forgotten records, which they never saw


def with_lanes(tuning_spec: TuningSpec) -> TuningSpec:
    """Settings for shadows, whose bits need not be those published: many lanes, except of whole backbones."""
    if tuning_spec.tuning.method == "backbone":
        return tuning_spec
    lanes = max(LANES, tuning_spec.tuning.lanes)
    return dataclasses.replace(tuning_spec, tuning=dataclasses.replace(tuning_spec.tuning, lanes=lanes))


def tune_counterfactuals(run: Run, tuning_spec: TuningSpec, clusters: Sequence[tuple[str, RecordTable]]) -> list[Slice]:
    """The slices of clusters as they might have been, in their order. Writes nothing.

    Each cluster is the name of its random streams and its members. With the run's own settings, a cluster's key as the
    name and its live members, these are the published bits.

    Raises:
        UserError: a loss was not finite.
    """
    jobs = [make_job(stream, members.rows, tuning_spec.tuning) for stream, members in clusters]
    inputs, labels = training_arrays(run, tuning_spec, [members for _, members in clusters])
    slices = {}
    for tuned in make_slices(tuning_spec, run.backbone, jobs, inputs, labels, run.mesh):
        if tuned.failed_at is not None:
            raise UserError("the loss of a shadow model became infinite or not a number; the attack has no result")
        slices[tuned.job] = tuned.slice
    return [slices[job] for job in jobs]


def training_arrays(run: Run, tuning_spec: TuningSpec, tables: Sequence[RecordTable]) -> tuple[np.ndarray, np.ndarray]:
    """Images or features that slices of these records are tuned on (`Run.training_data`), and labels int32 [N]."""
    labels, needed = np.zeros(run.catalog.rows_used(), np.int32), np.zeros(run.catalog.rows_used(), bool)
    for table in tables:
        labels[table.rows], needed[table.rows] = table.labels, True
    live = run.catalog.live("train", "test", "holdout")
    return run.training_data(live.take(np.flatnonzero(needed[live.rows])), tuning_spec), labels


@functools.lru_cache(maxsize=8)
def _logits_program(tuning_spec: TuningSpec, mesh: Mesh):
    """Compiled `(params, slices with a leading axis S, uint8 [B, h, w, c]) -> logits float32 [S, B, Y]`."""

    def logits_of_all(params, slices: Slice, images):
        inputs = centred(images, tuning_spec.image_spec)
        if tuning_spec.on_features:
            features = backbone_lib.features(tuning_spec.architecture, params, inputs)
            inputs = expand(features, tuning_spec.tuning.expand)

        def logits_of_one(slice_: Slice):
            return features_of(slice_, tuning_spec, params, inputs) @ slice_.kernel + slice_.bias[None]

        return jax.vmap(logits_of_one)(slices)

    axis = P(mesh.axis_names[0])
    mapped = jax.shard_map(logits_of_all, mesh=mesh, in_specs=(P(), axis, P()), out_specs=axis, check_vma=False)
    return jax.jit(mapped)


def logits(run: Run, slices: Sequence[Slice], rows: np.ndarray) -> np.ndarray:
    """Logits of images, as centre crops, under each of S slices on the host: rows int [n] -> float32 [S, n, Y]."""
    tuning_spec = with_lanes(run.tuning_spec)
    program = _logits_program(tuning_spec, run.mesh)
    params = on_device(run.backbone, compute_dtype(tuning_spec.tuning.dtype, run.mesh), run.mesh)
    width, batch = tuning_spec.tuning.lanes * run.mesh.size, run.config.inference.batch
    result = np.zeros((len(slices), len(rows), tuning_spec.classes), np.float32)
    for low in range(0, len(slices), width):
        group = list(slices[low : low + width])
        padding = [group[0]] * (width - len(group))
        stack = jax.tree.map(lambda *leaves: np.stack(leaves), *group, *padding)
        for start in range(0, len(rows), batch):
            crops = run.images[rows[start : start + batch]]
            images = np.zeros((batch, *crops.shape[1:]), np.uint8)
            images[: len(crops)] = crops
            answers = np.asarray(program(params, stack, images))
            result[low : low + width, start : start + batch] = answers[: len(group), : len(crops)]
    return result


@functools.lru_cache(maxsize=8)
def _text_program(tuning_spec: TuningSpec):
    """Compiled `(params, slices with a leading axis S, int32 [B, 2 + T]) -> RowScores, each [S, B]`."""

    def scores_of_all(params: Any, slices: Slice, rows: jax.Array) -> RowScores:
        inputs = TextRows(rows)
        targets = targets_of(tuning_spec, inputs, rows)
        return jax.lax.map(lambda own: row_scores(outputs_of(own, tuning_spec, params, inputs), targets), slices)

    return jax.jit(scores_of_all)


def text_scores(run: Run, slices: Sequence[Slice], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses and token accuracies of rows, int32 [n, 2 + T], under each of S slices: float32 [S, n] both."""
    tuning_spec = run.tuning_spec
    params = on_device(run.backbone, compute_dtype(tuning_spec.tuning.dtype, run.mesh), run.mesh)
    stack, scored = jax.tree.map(lambda *leaves: np.stack(leaves), *slices), []
    for start in range(0, len(rows), AT_A_TIME):
        batch = padded(rows[start : start + AT_A_TIME])
        scored.append(np.stack(_text_program(tuning_spec)(params, stack, batch)))  # [2, S, B]
    losses, accuracies = np.concatenate(scored, axis=-1)[..., : len(rows)]
    return losses, accuracies


def score(run: Run, slices: Sequence[Slice], records: RecordTable) -> tuple[np.ndarray, np.ndarray]:
    """Margins of n records under each of S slices, float64 [S, n], and whether the answers were right, bool [S, n].

    The margin of a text is that of the geometric mean of its response's token probabilities, p = exp(-mean loss); right
    is the share of these tokens that are the likeliest, float32.
    """
    if run.tuning_spec.is_text:
        losses, right = text_scores(run, slices, run.images[records.rows])
        return -np.log(np.maximum(np.expm1(losses.astype(np.float64)), 1e-12)), right
    values = logits(run, slices, records.rows)
    return statistics.margins(values, records.labels), values.argmax(axis=-1) == records.labels


def halves(models: int, records: int, rng: np.random.Generator) -> np.ndarray:
    """bool [models, records]: a random half of the records for each model, and of the models for each record."""
    inside = np.repeat(np.arange(models)[:, None] < models // 2, records, axis=1)
    return rng.permuted(inside, axis=0)


def on_draws(records: RecordTable, draws: np.ndarray, name: str, first: int = 0) -> list[tuple[str, RecordTable]]:
    """Clusters of the records that each draw has, bool [N, n]; their streams are numbered from `first`."""
    return [(f"{name}/{first + i}", records.take(np.flatnonzero(row))) for i, row in enumerate(draws)]


def shadow_sets(run: Run, pool: Pool, count: int, seed: int, populations: bool) -> ShadowSets:
    """Tunes N = `count` shadows of each population on random halves of a pool and scores its records.

    Without `populations` only `kept` is tuned, and `unlearned` and `never` are empty.
    """
    in_shadows, remaining = pool.roles != VALIDATION, np.isin(pool.roles, (RETAINED, OUTSIDE))
    rng = philox(seed, "attack", "halves", pool.key)
    inside, drawn = (halves(count, len(pool.roles), rng) & in_shadows for _ in range(2))
    for mask in (inside, drawn):  # in a small pool a draw may have no record that remains after the erasure
        mask[~(mask & remaining).any(axis=1), np.flatnonzero(remaining)[0]] = True

    clusters = on_draws(pool.records, inside, f"{pool.key}/shadow/{seed}")
    if populations:
        clusters += on_draws(pool.records, inside & remaining, f"{pool.key}/shadow/{seed}")
        clusters += on_draws(pool.records, drawn & remaining, f"{pool.key}/shadow/{seed}", count)
    margins, _ = score(run, tune_counterfactuals(run, with_lanes(run.tuning_spec), clusters), pool.records)
    kept, unlearned, never = margins[:count], margins[count : 2 * count], margins[2 * count :]
    return ShadowSets(pool.roles, inside, kept, unlearned, drawn, never)
