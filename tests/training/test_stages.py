"""Stages of a cluster (SISA): who is in which, what they cost, and bits free of everything but their chain."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from tuning_problem import (
    GROUPS,
    assert_near,
    problem_of,
    reference,
    run_jobs,
    same_bits,
    small_backbone,
    small_data,
)

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.hashing import digest, seed_words
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training import tune as program
from lmeraser_jax.training.jobs import make_job, parts, stage_jobs
from lmeraser_jax.training.slices import Slice, init_slice, recipe

SEED = 0
SPEC = ImageSpec(8, 8, 1, size=8, resize=8, out_channels=1)


def names(count):
    return [f"record-{i:05d}" for i in range(count)]


def balanced(count, slices):
    """So many ids that every part has its equal share."""
    pool = names(40 * count)
    part = parts(pool, slices, SEED)
    kept = np.concatenate([np.flatnonzero(part == r)[: count // slices] for r in range(1, slices + 1)])
    assert len(kept) == count
    return [pool[i] for i in sorted(kept)]


# who is in which
def test_a_record_s_part_depends_on_seed_and_id_alone():
    ids = names(4000)
    part = parts(ids, 8, SEED)
    assert (parts(ids[::3], 8, SEED) == part[::3]).all() and (parts(ids, 8, SEED + 1) != part).any()
    counts = np.bincount(part, minlength=9)
    assert counts[0] == 0 and len(counts) == 9
    assert (abs(counts[1:] - 500) < 5 * np.sqrt(500)).all(), "about equal shares"
    assert (parts(ids, 1, SEED) == 1).all()


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_each_stage_adds_the_members_of_its_part(count, slices):
    for first in range(0, 200, 40):
        ids, rows = names(240)[first : first + count], np.arange(first, first + count)[::-1]
        part = parts(ids, slices, SEED)
        chain = stage_jobs("k", ids, rows, Tuning(slices=slices), SEED)
        assert [job.stage for job in chain] == sorted(set(part.tolist())), "an empty part makes no stage"
        for job in chain:
            assert job.rows.tolist() == [row for row, r in zip(rows, part, strict=True) if r <= job.stage]
            assert job.start is None and job.rows.dtype == np.int32
        assert chain[-1].rows.tolist() == rows.tolist(), "the last stage has seen all"


def test_one_slice_is_the_job_of_a_whole_cluster():
    for count in (1, 7, 100):
        (job,) = stage_jobs("k", names(count), np.arange(count), Tuning(), SEED)
        wanted = make_job("k", np.arange(count), Tuning())
        assert job.rows.tolist() == wanted.rows.tolist() and job.stream == wanted.stream == "k"
        assert (job.epochs, job.steps, job.stage) == (wanted.epochs, wanted.steps, 1)
        assert job.epochs == max(30, -(-60 * 16 // count))


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_a_small_stage_makes_its_share_of_the_steps(slices):
    tuning = Tuning(slices=slices, epochs=1, min_steps=60, batch=16)
    chain = stage_jobs("k", names(40), np.arange(40), tuning, SEED)
    assert all(60 / slices <= job.steps < 60 / slices + 1 + 40 / 16 for job in chain)


def test_no_two_stages_share_a_random_stream():
    chain = stage_jobs("k", names(64), np.arange(64), Tuning(slices=8), SEED)
    assert chain[0].stream == "k" and len({job.stream for job in chain}) == len(chain) == 8


# what they cost
@pytest.mark.parametrize("epochs", [7, 30, 50])
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_the_cost_is_sisa_s(slices, epochs):
    """Bourtoule et al.: as many image passes as without stages; an erasure costs 2/3 + 1/(3R) of them on average.

    Rounding to whole epochs moves either by less than one epoch of all members.
    """
    count = 240
    ids, tuning = balanced(count, slices), Tuning(slices=slices, epochs=epochs, min_steps=0)
    rows, part = np.arange(count), parts(ids, slices, SEED)
    passes = sum(job.images for job in stage_jobs("k", ids, rows, tuning, SEED))
    assert abs(passes - epochs * count) < count

    def erasure(gone):
        left = [i for i in range(count) if i != gone]
        chain = stage_jobs("k", [ids[i] for i in left], rows[left], tuning, SEED)
        return sum(job.images for job in chain if job.stage >= part[gone])

    cost = np.mean([erasure(gone) for gone in range(count)])
    assert abs(cost - epochs * count * (2 / 3 + 1 / (3 * slices))) < count + epochs, "one record fewer is seen"


# what a stage's recipe depends on
def chain_digests(ids, slices, contents=None):
    """{stage: digest of its recipe}, each with the digest of the stage before."""
    contents, part = contents or {}, parts(ids, slices, SEED)
    found, parent = {}, ""
    for stage in np.unique(part).tolist():
        members = [(name, contents.get(name, "as it was"), 0) for name, r in zip(ids, part, strict=True) if r <= stage]
        parent = digest(recipe("k", members, Tuning(slices=slices), "theta", SPEC, 2, SEED, stage, parent))
        found[stage] = parent
    return found


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_an_erasure_changes_the_recipes_from_its_stage_on(slices):
    ids = names(20)
    part, before = dict(zip(ids, parts(ids, slices, SEED).tolist(), strict=True)), chain_digests(ids, slices)
    assert len(set(before.values())) == len(before) == slices
    for name in ids:
        kept = {stage for stage in before if stage < part[name]}
        for after in (chain_digests([i for i in ids if i != name], slices), chain_digests(ids, slices, {name: "new"})):
            assert {stage for stage in before if after.get(stage) == before[stage]} == kept


def test_a_stage_s_job_does_not_know_who_comes_later():
    ids, tuning = names(60), Tuning(slices=4)
    part, rows = parts(ids, 4, SEED), np.arange(60)
    whole = {job.stage: job for job in stage_jobs("k", ids, rows, tuning, SEED)}
    for last in (1, 2, 3):
        early = np.flatnonzero(part <= last)
        for job in stage_jobs("k", [ids[i] for i in early], rows[early], tuning, SEED):
            same = whole[job.stage]
            assert (job.stream, job.epochs, job.steps) == (same.stream, same.epochs, same.steps)
            assert job.rows.tolist() == same.rows.tolist()


# the program
R = 3


@pytest.fixture(scope="module")
def problem():
    return problem_of(small_backbone(), slices=R, epochs=4, augment="paper")


def chains(problem):
    """{key: jobs of its stages} of GROUPS; ids are the rows as text."""
    return {
        key: stage_jobs(key, [f"{row:03d}" for row in rows], rows, problem.tuning, problem.seed)
        for key, rows in GROUPS.items()
    }


def stage_by_stage(problem, devices=1):
    """{(key, stage): Tuned} by one call of `tune` per stage over all clusters."""
    found, last = {}, {}
    for stage in range(1, problem.tuning.slices + 1):
        due = [job for chain in chains(problem).values() for job in chain if job.stage == stage]
        for done in run_jobs(problem, [dataclasses.replace(job, start=last.get(job.key)) for job in due], devices):
            found[done.job.key, stage], last[done.job.key] = done, done.slice
    return found


@pytest.fixture(scope="module")
def together(problem):
    return stage_by_stage(problem)


def test_a_chain_has_the_bits_of_a_literal_chain(problem, together):
    """One cluster alone, one call a stage; the groups have chains with and without gaps."""
    skipping = 0
    for key, chain in chains(problem).items():
        start = None
        skipping += len(chain) < R
        for job in chain:
            (alone,) = run_jobs(problem, [dataclasses.replace(job, start=start)])
            assert same_bits(alone, together[key, job.stage]) and alone.loss == together[key, job.stage].loss
            start = alone.slice
    assert 0 < skipping < len(GROUPS)


def test_a_stage_follows_the_literal_loop_from_its_start():
    """Steps count from 0 again, the optimizer is new, and the numbers are the start's."""
    problem = problem_of(small_backbone(), slices=R, epochs=4)
    for done in stage_by_stage(problem).values():
        if done.job.key == "c5":
            assert (done.job.start is None) == (done.job.stage == 1)
            assert_near(done.slice, reference(problem, small_backbone(), small_data(), done.job))


def started(together):
    """Every job that carries on from a slice."""
    jobs = [done.job for done in together.values() if done.job.start is not None]
    assert len(jobs) > len(GROUPS)
    return jobs


def test_bits_of_a_started_job_do_not_depend_on_lane_neighbours_or_call(problem, together):
    """Beside fresh jobs and other stages of all clusters, in another order, in shorter calls."""
    mixed = [done.job for done in together.values()][::-1]
    short = dataclasses.replace(problem, tuning=dataclasses.replace(problem.tuning, scan_steps=3))
    for found in (run_jobs(problem, started(together)), run_jobs(problem, mixed), run_jobs(short, mixed)):
        assert all(same_bits(done, together[done.job.key, done.job.stage]) for done in found)


def test_bits_of_a_started_job_do_not_depend_on_which_of_many_devices(problem, together):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    two, eight = stage_by_stage(problem, 2), stage_by_stage(problem, 8)
    for name, one in together.items():
        assert same_bits(two[name], eight[name])
        for a, b in zip(*map(jax.tree.leaves, (one.slice, two[name].slice)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)  # another program: XLA fuses it differently


def test_a_start_from_disk_gives_the_bits_of_one_from_memory(problem, together, tmp_path):
    job = started(together)[-1]
    checkpoints.save(tmp_path / "start", checkpoints.flatten(job.start), {}, step=1)
    arrays, _, _ = checkpoints.load(tmp_path / "start")
    (again,) = run_jobs(problem, [dataclasses.replace(job, start=Slice(**arrays))])
    assert same_bits(again, together[job.key, job.stage])


@pytest.mark.parametrize("devices", [1, 8])
def test_every_job_gets_its_own_start(devices, monkeypatch):
    """More jobs than places in a call, fresh ones between; at a rate of 0 each hands its start back. One trace."""
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    chex.clear_trace_counter()
    monkeypatch.setattr(program, "device_program", chex.assert_max_traces(program.device_program, n=1))
    still = {"prompt_rate": 0.0, "head_rate": 0.0, "min_steps": 0, "epochs": 1, "head_init": 1.0, "prompt_init": 1.0}
    problem = problem_of(small_backbone(), slices=2, **still)
    like = program.initial_state(problem, program.mesh_of(jax.devices()[:1])).slice
    jobs = []
    for i in range(devices * 3 * problem.starts):
        start = jax.tree.map(lambda leaf, i=i: np.full(leaf.shape[1:], i, np.float32), like) if i % 5 else None
        jobs.append(dataclasses.replace(make_job(f"k{i}", np.arange(i % 7 + 1), problem.tuning), start=start))
    found = {done.job.key: done.slice for done in run_jobs(problem, jobs, devices)}
    assert len(found) == len(jobs)
    assert all((leaf == i).all() for i in range(len(jobs)) if i % 5 for leaf in jax.tree.leaves(found[f"k{i}"]))
    for job in jobs[:30:5]:
        key = jax.random.key(problem.seed)
        for word in seed_words(job.key):
            key = jax.random.fold_in(key, word)
        fresh = init_slice(jax.random.split(key)[0], problem.tuning, problem.architecture, problem.classes)
        for leaf, wanted in zip(found[job.key][:3], fresh[:3], strict=True):
            np.testing.assert_allclose(leaf, wanted, atol=1e-5)


def test_without_stages_a_start_is_refused():
    """The usual program has no such input: a start that came through would be lost in silence."""
    problem = problem_of(small_backbone())
    start = Slice(np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32))
    assert problem.starts == 0
    with pytest.raises(AssertionError, match="tuning.slices > 1"):
        run_jobs(problem, [dataclasses.replace(make_job("k", np.arange(5), problem.tuning), start=start)])
