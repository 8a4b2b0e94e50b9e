"""Times of slices: device time, shared among the lanes that were busy."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from lmeraser_jax.training.jobs import Job, StepBatch
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tracking import Tracker


def call_of(job: np.ndarray) -> StepBatch:
    """A call that hands nothing over; job int32 [T, G]."""
    at = np.zeros(job.shape, np.int32)
    return StepBatch(len(job), at[..., None], at[..., None] > 0, at[..., None], at, at + 9, at, at, job, (), ())


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_slice_s_seconds_are_its_share_of_the_time_of_all_devices(monkeypatch, devices):
    """Whatever ran beside it, seconds add up to what the devices spent."""
    now = iter([0.0, 3.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    jobs = [Job(key, np.arange(9, dtype=np.int32), 1, 1) for key in "ab"]
    tracker = Tracker(jobs, devices)
    nothing = Slice(np.zeros(0), np.zeros(0), np.zeros(0))
    for job in ([[0, 1], [0, 1]], [[0, -1], [1, -1], [1, -1], [1, -1]]):
        grid = np.array(job, np.int32)
        assert not list(tracker.collect(call_of(grid), nothing, jnp.zeros(grid.shape), 1))
    assert tracker.seconds.tolist() == pytest.approx([devices * (1.5 + 5 / 4), devices * (1.5 + 15 / 4)])
    assert tracker.seconds.sum() == pytest.approx(8 * devices)
