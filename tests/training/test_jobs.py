"""The host's schedule: every member is seen exactly so often, every job runs once, lanes are well packed."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from lmeraser_jax.config import Tuning
from lmeraser_jax.training.jobs import Output, batches, efficiency, make_job, pack, snapshot_steps, step_batches
from lmeraser_jax.training.slices import Slice


def jobs_of(sizes, tuning):
    starts = np.cumsum([0, *sizes])
    return [make_job(f"cluster-{i}", np.arange(starts[i], starts[i] + n), tuning) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("members", [1, 3, 4, 5, 17])
def test_every_member_is_seen_exactly_epochs_times(members):
    tuning = Tuning(batch=4, epochs=3, min_steps=5)
    job = make_job("k", np.arange(100, 100 + members), tuning)
    rows, valid = batches(job, seed=0)
    assert rows.shape == valid.shape == (job.steps, 4)
    assert Counter(rows[valid].tolist()) == {row: job.epochs for row in range(100, 100 + members)}
    assert job.epochs >= 3 and job.steps >= 5
    assert valid[:-1].all(), "only the last batch may be short"


def test_each_epoch_is_a_new_permutation_that_depends_on_seed_and_key():
    tuning = Tuning(batch=8, epochs=4, min_steps=0)
    orders = {}
    for seed, key in ((0, "a"), (0, "b"), (1, "a"), (0, "a")):
        rows, _ = batches(make_job(key, np.arange(8), tuning), seed)
        orders.setdefault((seed, key), []).append(rows)
        assert len({tuple(row) for row in rows}) == 4
        assert all(sorted(row) == list(range(8)) for row in rows)
    again = orders[0, "a"]
    assert (again[0] == again[1]).all()
    assert (orders[0, "b"][0] != again[0]).any() and (orders[1, "a"][0] != again[0]).any()


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_packing_runs_every_job_once_and_is_near_the_lower_bound(lanes, rng):
    steps = rng.integers(1, 60, 40).tolist()
    plan = pack(steps, lanes)
    assert sorted(index for lane in plan for index in lane) == list(range(40))
    longest = max(sum(steps[i] for i in lane) for lane in plan)
    bound = max(max(steps), sum(steps) / lanes)
    assert longest <= (4 / 3) * bound + 1, "longest-first is within 4/3 of the best schedule"


def test_packing_is_near_the_best_of_all_schedules(rng):
    """MULTIFIT's bound, 13/11 (Yue, 1990), against every way to deal nine jobs to three lanes."""
    for _ in range(5):
        steps = rng.integers(1, 30, 9)
        ways = np.indices((3,) * 9).reshape(9, -1)  # [job, way]: lane
        best = np.array([(steps[:, None] * (ways == lane)).sum(axis=0) for lane in range(3)]).max(axis=0).min()
        found = max(sum(steps[i] for i in lane) for lane in pack(steps.tolist(), 3))
        assert best <= found <= 13 / 11 * best


def test_thirty_uneven_clusters_fill_eight_devices():
    """Dealing each to the least loaded device leaves a twentieth idle here."""
    shares = np.random.default_rng(0).lognormal(size=30)
    steps = np.ceil(shares / shares.sum() * 45_000).astype(int).tolist()
    longest = max(sum(steps[i] for i in lane) for lane in pack(steps, 8))
    assert sum(steps) / (8 * longest) > 0.98


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize(("members", "batch"), [(11, 4), (4, 4), (3, 4), (1, 16), (50, 8)])
def test_a_snapshot_is_the_first_step_at_which_all_were_seen_so_often(members, batch, every):
    job = make_job("k", np.arange(members), Tuning(batch=batch, epochs=9, min_steps=6))
    rows, valid = batches(job, seed=0)
    least = []  # how often the least seen member was seen after each step
    for step in range(1, job.steps + 1):
        seen = Counter(rows[:step][valid[:step]].tolist())
        least.append(min(seen[row] for row in range(members)))
    wanted = [1 + next(i for i, n in enumerate(least) if n >= e) for e in range(1, job.epochs) if e % every == 0]
    for keep in (1, 2, 3, 99):
        assert snapshot_steps(job, every, keep) == tuple(sorted(set(wanted[-keep:]) - {job.steps}))
    assert snapshot_steps(job, 0, 3) == () == snapshot_steps(job, job.epochs, 3)


@pytest.mark.parametrize(("devices", "lanes"), [(1, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize("every", [0, 1], ids=["ends", "snapshots"])
def test_chunks_carry_every_batch_of_every_job_in_order(devices, lanes, every, rng):
    tuning = Tuning(batch=4, epochs=2, min_steps=3, lanes=lanes, scan_steps=7)
    jobs = jobs_of(rng.integers(1, 25, 30).tolist(), tuning)
    given = Slice(*(np.zeros(1, np.float32) for _ in range(3)))
    jobs = [
        dataclasses.replace(job, snapshots=snapshot_steps(job, every, 9), start=given if i % 3 else None)
        for i, job in enumerate(jobs)
    ]
    seen: dict[int, list] = {i: [] for i in range(len(jobs))}
    place: dict[int, int] = {}
    handed, begun = [], []
    slots = 5
    for chunk in step_batches(jobs, devices, tuning, slots, seed=0):
        assert 0 < chunk.steps <= 7 and (chunk.job[chunk.steps :] == -1).all()
        taken = Counter(output.device for output in chunk.outputs)
        assert all(count <= slots for count in taken.values())
        assert len({(output.device, output.slot) for output in chunk.outputs}) == len(chunk.outputs)
        assert len(chunk.starts) == devices and all(len(loaded) <= slots for loaded in chunk.starts)
        for t in range(chunk.steps):
            for g in np.flatnonzero(chunk.job[t] >= 0):
                index, device = int(chunk.job[t, g]), int(g) // lanes
                job, at = jobs[index], int(chunk.step[t, g])
                assert place.setdefault(index, g) == g, "a job stays in its lane"
                assert at == len(seen[index]) and chunk.total[t, g] == job.steps
                seen[index].append((chunk.rows[t, g].copy(), chunk.valid[t, g].copy()))
                hands_over = at + 1 in (*job.snapshots, job.steps)
                assert (chunk.slot[t, g] < slots) == hands_over
                if hands_over:
                    assert Output(index, at + 1, device, int(chunk.slot[t, g])) in chunk.outputs
                if at == 0 and job.start is not None:
                    assert chunk.starts[device][chunk.start[t, g]] == index
                else:
                    assert chunk.start[t, g] == -1
            idle = chunk.job[t] < 0
            assert not chunk.valid[t, idle].any() and (chunk.slot[t, idle] == slots).all()
            assert (chunk.step[t, idle] != 0).all(), "an idle lane must not look like a fresh cluster"
        handed += [(output.job, output.step) for output in chunk.outputs]
        begun += [index for loaded in chunk.starts for index in loaded]
    assert sorted(handed) == [(i, step) for i, job in enumerate(jobs) for step in (*job.snapshots, job.steps)]
    assert sorted(begun) == [i for i, job in enumerate(jobs) if job.start is not None]
    for index, job in enumerate(jobs):
        rows, valid = batches(job, 0)
        assert (np.stack([r for r, _ in seen[index]]) == rows).all()
        assert (np.stack([v for _, v in seen[index]]) == valid).all()


def test_efficiency_counts_padding_and_idle_lanes():
    tuning = Tuning(batch=4, epochs=1, min_steps=0)
    assert efficiency(jobs_of([8, 8], tuning), lanes=2, batch=4) == 1.0
    assert efficiency(jobs_of([8], tuning), lanes=2, batch=4) == 0.5
    assert efficiency(jobs_of([6], tuning), lanes=1, batch=4) == 6 / 8
    assert efficiency([], lanes=4, batch=4) == 1.0


def test_no_jobs_no_chunks():
    assert list(step_batches([], 2, Tuning(), 4, 0)) == []
