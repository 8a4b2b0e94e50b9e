"""The host's schedule: every member is seen exactly so often, every job runs once, lanes are well packed."""

import dataclasses
from collections import Counter

import numpy as np

from lmeraser_jax.config import Tuning
from lmeraser_jax.training.jobs import batches, make_job, snapshot_steps
from lmeraser_jax.training.lanes import Output, efficiency, pack, step_batches


def jobs_of(sizes, tuning):
    starts = np.cumsum([0, *sizes])
    return [make_job(f"cluster-{i}", np.arange(starts[i], starts[i] + n), tuning) for i, n in enumerate(sizes)]


def test_every_member_is_seen_exactly_epochs_times():
    for members in (1, 3, 4, 5, 17):
        job = make_job("k", np.arange(100, 100 + members), Tuning(batch=4, epochs=3, min_steps=5))
        rows, valid = batches(job, seed=0)
        assert rows.shape == valid.shape == (job.steps, 4)
        assert Counter(rows[valid].tolist()) == {row: job.epochs for row in range(100, 100 + members)}
        assert job.epochs >= 3 and job.steps >= 5
        assert valid[:-1].all(), "only the last batch may be short"


def test_each_epoch_is_a_new_permutation_that_depends_on_seed_and_key():
    tuning = Tuning(batch=8, epochs=4, min_steps=0)

    def order(seed, key):
        rows, _ = batches(make_job(key, np.arange(8), tuning), seed)
        assert len({tuple(row) for row in rows}) == 4
        assert all(sorted(row) == list(range(8)) for row in rows)
        return rows

    assert (order(0, "a") == order(0, "a")).all()
    assert (order(0, "b") != order(0, "a")).any() and (order(1, "a") != order(0, "a")).any()


def test_packing_runs_every_job_once_and_is_near_the_best_of_all_schedules(rng):
    """MULTIFIT's bound, 13/11 (Yue, 1990), against every way to deal nine jobs to three lanes."""
    for _ in range(5):
        steps = rng.integers(1, 30, 9)
        ways = np.indices((3,) * 9).reshape(9, -1)  # [job, way]: lane
        best = np.array([(steps[:, None] * (ways == lane)).sum(axis=0) for lane in range(3)]).max(axis=0).min()
        plan = pack(steps.tolist(), 3)
        assert sorted(index for lane in plan for index in lane) == list(range(9))
        assert best <= max(sum(steps[i] for i in lane) for lane in plan) <= 13 / 11 * best
    assert pack([5, 4], 3) == [[0], [1], []], "more lanes than jobs"


def test_a_snapshot_is_the_first_step_at_which_all_were_seen_so_often():
    for members, batch in ((11, 4), (4, 4), (3, 4), (1, 16), (50, 8)):
        job = make_job("k", np.arange(members), Tuning(batch=batch, epochs=9, min_steps=6))
        rows, valid = batches(job, seed=0)
        least = []  # how often the least seen member was seen after each step
        for step in range(1, job.steps + 1):
            seen = Counter(rows[:step][valid[:step]].tolist())
            least.append(min(seen[row] for row in range(members)))
        first = {epoch: 1 + next(i for i, n in enumerate(least) if n >= epoch) for epoch in range(1, job.epochs)}
        for every in (1, 2, 3, 7):
            steps = [first[epoch] for epoch in first if epoch % every == 0]
            for keep in (1, 2, 3, 99):
                assert snapshot_steps(job, every, keep) == tuple(sorted(set(steps[-keep:]) - {job.steps}))
        assert snapshot_steps(job, 0, 3) == () == snapshot_steps(job, job.epochs, 3)


def check_calls(jobs, devices, lanes, tuning):
    """Walks through the calls: each job in one lane, step by step, handed over at its snapshots and its end."""
    seen: dict[int, list] = {i: [] for i in range(len(jobs))}
    lane_of: dict[int, int] = {}
    outputs, slots = [], 5
    for call in step_batches(jobs, devices, tuning, slots, seed=0):
        assert 0 < call.steps <= tuning.scan_steps and (call.job[call.steps :] == -1).all()
        assert all(count <= slots for count in Counter(output.device for output in call.outputs).values())
        assert len({(output.device, output.slot) for output in call.outputs}) == len(call.outputs)
        for t in range(call.steps):
            for g in np.flatnonzero(call.job[t] >= 0):
                index, device = int(call.job[t, g]), int(g) // lanes
                job, step = jobs[index], int(call.step[t, g])
                assert lane_of.setdefault(index, g) == g, "a job stays in its lane"
                assert step == len(seen[index]) and call.total[t, g] == job.steps
                seen[index].append((call.rows[t, g].copy(), call.valid[t, g].copy()))
                handed_over = step + 1 in (*job.snapshots, job.steps)
                assert (call.slot[t, g] < slots) == handed_over
                if handed_over:
                    assert Output(index, step + 1, device, int(call.slot[t, g])) in call.outputs
            idle = call.job[t] < 0
            assert not call.valid[t, idle].any() and (call.slot[t, idle] == slots).all()
            assert (call.step[t, idle] != 0).all(), "an idle lane must not look like a fresh cluster"
        outputs += [(output.job, output.step) for output in call.outputs]
    assert sorted(outputs) == [(i, step) for i, job in enumerate(jobs) for step in (*job.snapshots, job.steps)]
    for index, job in enumerate(jobs):
        for given, expected in zip(zip(*seen[index], strict=True), batches(job, 0), strict=True):
            assert (np.stack(given) == expected).all()


def test_calls_carry_every_batch_of_every_job_in_order(rng):
    for devices, lanes in ((1, 1), (2, 2), (8, 1)):
        tuning = Tuning(batch=4, epochs=2, min_steps=3, lanes=lanes, scan_steps=7)
        jobs = jobs_of(rng.integers(1, 25, 30).tolist(), tuning)
        check_calls(jobs, devices, lanes, tuning)
        jobs = [dataclasses.replace(job, snapshots=snapshot_steps(job, 1, 9)) for job in jobs]
        check_calls(jobs, devices, lanes, tuning)
    assert list(step_batches([], 2, Tuning(), 4, 0)) == []


def test_efficiency_counts_padding_and_idle_lanes():
    tuning = Tuning(batch=4, epochs=1, min_steps=0)
    assert efficiency(jobs_of([8, 8], tuning), lanes=2, batch=4) == 1.0
    assert efficiency(jobs_of([8], tuning), lanes=2, batch=4) == 0.5
    assert efficiency(jobs_of([6], tuning), lanes=1, batch=4) == 6 / 8
    assert efficiency([], lanes=4, batch=4) == 1.0
