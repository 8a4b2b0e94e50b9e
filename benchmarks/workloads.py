"""What several benchmarks work on: cluster sizes, jobs, the tuning program alone, a trained workdir of the digits."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmeraser_jax import config
from lmeraser_jax.config import Tuning
from lmeraser_jax.training import train_step
from lmeraser_jax.training.features import compute_dtype
from lmeraser_jax.training.jobs import Job, make_job
from lmeraser_jax.training.tasks import TuningSpec, step_inputs
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run

PAPER = {"cifar10": (194, 40_000), "cifar100": (347, 40_000), "svhn": (30, 58_605), "gtsrb": (90, 21_312)}
SEED_WORDS = np.array([1, 2], np.uint32)  # of the clusters of `Program`
QUICK = {"tuning": {"epochs": 4}, "pretraining": {"epochs": 8}}


def heavy_tailed(clusters: int, records: int, seed: int = 0) -> np.ndarray:
    """int64 [K] that sum to N, at least 1 each: log-normal shares, sigma 1."""
    shares = np.random.default_rng(seed).lognormal(sigma=1.0, size=clusters)
    sizes = np.maximum(1, np.floor(shares / shares.sum() * records)).astype(np.int64)
    sizes[sizes.argmax()] += records - sizes.sum()
    return sizes


def jobs_of(sizes: np.ndarray, tuning: Tuning) -> list[Job]:
    """A job for each cluster, whose rows follow one another."""
    ends = np.cumsum(sizes)
    return [make_job(f"c{k}", np.arange(end - size, end), tuning) for k, (size, end) in enumerate(zip(sizes, ends))]


class Program:
    """The tuning program on the first device, its inputs already there: every lane tunes a cluster from its start.

    A step takes the next lanes x batch rows of `inputs`, and after the last row the first one again.
    """

    def __init__(self, spec: TuningSpec, params: Any, inputs: Any, labels: np.ndarray, steps: int):
        self.spec, self.steps, lanes, batch = spec, np.int32(steps), spec.tuning.lanes, spec.tuning.batch
        self.mesh = train_step.mesh_of(jax.devices()[:1])
        dtype = compute_dtype(spec.tuning.dtype, self.mesh)
        data = jax.tree.map(lambda leaf: leaf.astype(dtype), params), inputs, labels
        self.data = jax.device_put(data, NamedSharding(self.mesh, P()))  # as `tune` has it: one program for both
        numbers = np.broadcast_to(np.arange(steps, dtype=np.int32)[:, None], (steps, lanes))
        self.work = train_step.Batch(
            rows=(np.arange(steps * lanes * batch, dtype=np.int32) % len(labels)).reshape(steps, lanes, batch),
            valid=np.ones((steps, lanes, batch), bool),
            words=np.broadcast_to(SEED_WORDS, (steps, lanes, 2)),
            step=numbers,
            total=np.full_like(numbers, steps),
            slot=np.full_like(numbers, spec.slots),
        )
        self.program = train_step.compiled(spec, self.mesh)

    def _state(self) -> train_step.LaneState:
        return train_step.initial_state(self.spec, self.mesh)

    def __call__(self) -> tuple[train_step.LaneState, np.ndarray]:
        """The last states, with the leading axis L, and the losses float32 [T, L]; waits for the device."""
        return self.run(self.work, self.steps)

    def run(self, work: train_step.Batch, steps: np.int32) -> tuple[train_step.LaneState, np.ndarray]:
        """As a call, on other work of the same shape."""
        state, _, losses = self.program(*self.data, steps, self._state(), work)
        return state, np.asarray(losses)

    def memory(self) -> Any:
        """What XLA says about the program's memory; compiles it."""
        return self.program.lower(*self.data, self.steps, self._state(), self.work).compile().memory_analysis()

    @property
    def rows(self) -> int:
        """How many rows a call tunes on, each counted as often as it is used."""
        return self.work.rows.size

    def flops_per_row(self) -> float:
        """FLOPs of the matrix products of a step for each row: forward, and backward to the slice.

        Resizing is left out: it is a product here, but need not be.
        """
        batch, (params, inputs, labels) = self.spec.tuning.batch, self.data
        slice_ = jax.tree.map(lambda leaf: leaf[0], self._state().slice)
        rows, labels, valid = jax.tree.map(lambda leaf: leaf[:batch], (inputs, labels, self.work.valid[0, 0]))
        fed = jax.eval_shape(lambda rows: step_inputs(self.spec, rows, jax.random.key(0)), rows)
        gradient = jax.value_and_grad(train_step.cluster_loss)
        traced = jax.make_jaxpr(gradient, static_argnums=1)(slice_, self.spec, params, fed, labels, valid)
        return product_flops(traced.jaxpr) / batch


def product_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products in a jaxpr, two for each multiplication; a loop of known length counts its turns."""
    flops = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            flops += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        flops += turns * sum(product_flops(inner) for inner in jaxprs_in_params(equation.params))
    return flops


def train_digits(workdir: Path, quick: bool) -> None:
    """Images, backbone and slices of the digits; few epochs where it must be quick."""
    with prepare_run(workdir, config.from_dict(QUICK if quick else {})) as (run, _):
        build(run)
