"""How slices are made: by the tuning program, or by a formula."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.progress import progress
from lmeraser_jax.training import closed_form
from lmeraser_jax.training.closed_form import KeptSums
from lmeraser_jax.training.jobs import Job
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tracking import Tuned
from lmeraser_jax.training.tune import TuningSpec, tune


def make(
    problem: TuningSpec, backbone: Backbone, jobs: Sequence[Job], inputs: np.ndarray, labels: np.ndarray, mesh: Mesh
) -> Iterator[Tuned]:
    """Makes slices and yields each as it is finished, and snapshots of those that are tuned. As `tuning.tune`.

    Args:
        problem: static settings.
        backbone: frozen network.
        jobs: one for each slice; their rows point into `inputs`.
        inputs: uint8 [N, h, w, c], images; float32 [N, D], features, where `problem.on_features`.
        labels: int32 [N].
        mesh: 1-D mesh.
    """
    if not problem.tuning.closed:
        yield from tune(problem, backbone, jobs, inputs, labels, mesh)
        return
    how = problem.tuning
    with progress("solve", len(jobs)) as shown:
        for job in jobs:
            start = time.perf_counter()
            features, answers = inputs[job.rows], labels[job.rows]
            if how.expand or len(job.rows) < closed_form.TALLIED:  # cosines have other bits in another company
                part, loss = closed_form.solve(how, features, answers, problem.classes)
                yield solved(job, part, loss, start)
            else:
                kept = closed_form.kept_sums(features, answers, job.rows, problem.classes)
                yield solved(job, *closed_form.head(how, kept.total), start, kept)
            shown.advance(1)


def solved(job: Job, part: Slice, loss: float, start: float, kept: KeptSums | None = None) -> Tuned:
    """A closed form that was begun at a time of `time.perf_counter`."""
    finite = all(np.isfinite(leaf).all() for leaf in (part.kernel, part.bias))
    return Tuned(job, job.steps, part, loss, None if finite else 0, time.perf_counter() - start, kept)
