"""The models of a comparison of unlearning on text: tuned, tuned again, and what approximate methods make of them.

One slice is tuned for all records, and one again for the records after the edit, in workdirs as `lmeraser train`
makes them. Influence functions and the losses that are raised start from the former.

A pass is the gradient of all n records' loss, or a product with the curvature of all n; losses alone are not counted.
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeraser_jax.config import Config, Tuning
from lmeraser_jax.data.source import Contents, Source
from lmeraser_jax.experiments import ascent
from lmeraser_jax.experiments.text_draw import Draw
from lmeraser_jax.training import tune
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tasks import TextRows, TuningSpec, targets_of
from lmeraser_jax.unlearning import influence
from lmeraser_jax.unlearning.approximate import objective_of, strengths
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.influence import Problem, Rows
from lmeraser_jax.unlearning.run import Run, prepare_run

BEFORE = "removal_before"  # the workdir of a seed's records before any edit
CHUNK = 8  # rows of a chunk of an influence problem
EDITS = ("removal", "query", "response")
INFLUENCE = {"newton": EDITS, "newton-calibrated": EDITS[:1], "paper": EDITS, "warm": EDITS}  # {method: edits}
Weights = Mapping[str, np.ndarray]  # {before, after, erased, kept, heldout: [C, B]}


class Cost(NamedTuple):
    """What a model took."""

    seconds: float
    processor: float | None
    passes: float
    residual: float | None = None


class Tuned(NamedTuple):
    """One slice for all records, as a workdir has it."""

    slice: Slice
    cost: Cost


def common_spec(spec: TuningSpec) -> TuningSpec:
    """The part of a spec that outputs depend on: seeds and schedules share a compiled program."""
    lora = {name: getattr(spec.tuning, name) for name in ("method", "rank", "alpha", "lora_layers")}
    return dataclasses.replace(spec, tuning=Tuning(**lora), seed=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Laboratory:
    """The records of a seed; `folder` gets the workdirs of the models that are tuned on them."""

    folder: Path
    config: Config  # with the seed
    draw: Draw

    @property
    def n(self) -> int:
        return len(self.draw.records)

    @contextlib.contextmanager
    def workdir(self, name: str, config: Config, rows: np.ndarray) -> Iterator[Run]:
        """A workdir with the last so many of the records, and a slice for each of its clusters."""
        items = [record.item for record in self.draw.records[self.n - len(rows) :]]
        source = Source(name, (), rows.shape[1:], items, lambda places: Contents(rows[list(places)]))
        with prepare_run(self.folder / name, config, source=source) as (run, _):
            yield run


def one_adapter(config: Config) -> Config:
    """The config of one adapter for all records, which sees at a step as many of them as all lanes see together."""
    tuning = dataclasses.replace(config.tuning, batch=config.tuning.batch * config.tuning.lanes, lanes=1)
    return dataclasses.replace(
        config, tuning=tuning, clustering=dataclasses.replace(config.clustering, partition="one")
    )


@functools.lru_cache(maxsize=8)
def tuned(lab: Laboratory, edit: str, role: str) -> Tuned:
    """One adapter for all records: before an edit, after it (`retrain`), or after it with another seed (`floor`).

    `base` is the frozen model: adapters of zeros.
    """
    draw, config, removal = lab.draw, one_adapter(lab.config), edit == "removal"
    if role == "base":
        return Tuned(jax.tree.map(np.zeros_like, tuned(lab, edit, "before").slice), Cost(0.0, None, 0.0))
    if role == "retrain" and not removal:
        return tuned(lab, "removal", "before")  # corrected records are what a removal starts from
    rows = draw.rows
    if role != "before":
        rows = rows[draw.edited :] if removal else rows
    elif not removal:
        rows = np.concatenate([draw.wrong[edit], rows[draw.edited :]])
    if role == "floor":
        config = dataclasses.replace(config, seed=config.seed + 1000)
    name = f"{edit if removal or role == 'before' else 'edit'}_{role}"
    with lab.workdir(name if name == BEFORE else f"{name}_{draw.edited}", config, rows) as run:
        processor = build_timed(run)
        ((ref, row),) = run.catalog.slices().items()
        return Tuned(load_slice(run, ref), Cost(row.seconds, processor, row.images / lab.n))


def build_timed(run: Run) -> float | None:
    """Tunes what is missing; returns processor seconds, None if nothing was. A job of one step compiles the program."""
    if run.catalog.manifest() is not None:
        return None
    labels, job = np.zeros(len(run.images), np.int32), Job("compile", np.zeros(1, np.int32), 1, run.config.tuning.batch)
    collections.deque(tune.make_slices(run.tuning_spec, run.backbone, [job], run.images, labels, run.mesh), 0)
    start = time.process_time()
    build(run)
    return time.process_time() - start


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An edit as influence functions see it: chunks of the kept, edited, wrong and calibrating rows."""

    problem: Problem
    tuned: Tuned
    weights: Weights  # 1 / number of rows
    n: int


def case_of(lab: Laboratory, edit: str, spec: TuningSpec, params: Any) -> Case:
    """The case of an edit. Rows stand in chunks of their own kind, so that those without weight cost nothing."""
    draw, edited, calibrating = lab.draw, lab.draw.edited, lab.draw.heldout[::2]
    wrong = draw.wrong.get(edit, draw.rows[:0])
    groups = {"kept": draw.rows[edited:], "edited": draw.rows[:edited], "wrong": wrong, "heldout": calibrating}
    chunks, places, start = [], {}, 0
    for name, rows in groups.items():
        count = -(-len(rows) // CHUNK)
        chunks.append(influence.chunked(rows, CHUNK, count))
        places[name] = np.arange(start * CHUNK, start * CHUNK + len(rows))
        start += count
    inputs = np.concatenate(chunks)
    labels = targets_of(spec, TextRows(inputs.reshape(-1, inputs.shape[2])), jnp.zeros(0))

    def weights(total: int, *names: str) -> np.ndarray:
        flat = np.zeros(start * CHUNK, np.float32)
        flat[np.concatenate([places[name] for name in names])] = 1 / total
        return flat.reshape(start, CHUNK)

    kept, removal = len(places["kept"]), edit == "removal"
    before = tuned(lab, edit, "before")
    strength = strengths(before.slice, lab.config.tuning)
    rows = Rows(TextRows(jnp.asarray(inputs)), labels.reshape(start, CHUNK, -1))
    return Case(
        Problem(objective_of(spec), params, rows, strength),
        before,
        {
            "before": weights(lab.n, "kept", "edited" if removal else "wrong"),
            "after": weights(lab.n, "kept") if removal else weights(lab.n, "kept", "edited"),
            "erased": weights(edited, "edited"),
            "kept": weights(kept, "kept"),
            "heldout": weights(len(calibrating), "heldout"),
        },
        lab.n,
    )


def approximate(case: Case, edit: str, method: str) -> Tuned:
    """The slice that a method gives, and what it took. A call without any weight compiles the programs before."""
    nothing = {name: np.zeros_like(array) for name, array in case.weights.items()}
    unlearn = _by_influence if method in INFLUENCE else _by_ascent
    jax.block_until_ready(unlearn(case, nothing, edit, method)[0])
    seconds, processor = time.perf_counter(), time.process_time()
    slice_, passes, residual = unlearn(case, case.weights, edit, method)
    jax.block_until_ready(slice_)
    cost = Cost(time.perf_counter() - seconds, time.process_time() - processor, passes, residual)
    return Tuned(slice_, cost)


def _by_influence(case: Case, weights: Weights, edit: str, method: str) -> tuple[Slice, float, float | None]:
    """Slice, passes, residual. Passes: the report's gradient, then right-hand sides, products or warm steps."""
    mode, _, calibrated = method.partition("-")
    settings, heldout = influence.settings_of(mode, edit != "removal"), weights["heldout"] if calibrated else None
    ends = weights["before"], weights["after"]
    slice_, report = influence.update(case.problem, case.tuned.slice, *ends, settings, heldout)
    after, edited = (np.count_nonzero(case.weights[name]) / case.n for name in ("after", "erased"))
    if method == "warm":
        return slice_, 1 + after * settings.warm_passes, None
    sides = after * settings.rounds if settings.rounds else edited + after * (heldout is not None)
    products = report.iterations * (1.0 if method == "paper" else after)
    return slice_, 1 + sides + products, report.residual


def _by_ascent(case: Case, weights: Weights, edit: str, method: str) -> tuple[Slice, float, None]:
    used = (weights[name] for name in ("erased", "kept", "heldout"))
    slice_, steps = ascent.unlearn(case.problem, case.tuned.slice, *used, method)
    edited = np.count_nonzero(case.weights["erased"]) / case.n
    return slice_, int(steps) * (edited if method == "ascent" else 1.0), None
