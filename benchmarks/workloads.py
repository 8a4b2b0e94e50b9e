"""What several benchmarks work on: cluster sizes, their jobs, and a trained workdir of the digits."""

from pathlib import Path

import numpy as np

from lmeraser_jax import config
from lmeraser_jax.config import Tuning
from lmeraser_jax.training.jobs import Job, make_job
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run

PAPER = {"cifar10": (194, 40_000), "cifar100": (347, 40_000), "svhn": (30, 58_605), "gtsrb": (90, 21_312)}
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


def train_digits(workdir: Path, quick: bool) -> None:
    """Images, backbone and slices of the digits; few epochs where it must be quick."""
    with prepare_run(workdir, config.from_dict(QUICK if quick else {})) as (run, _):
        build(run)
