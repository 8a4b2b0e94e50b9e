"""Work that is shared: dealt so that all end together, refused where bits would differ, checked when it comes back."""

import dataclasses
import functools
import itertools
import os
import threading
import time

import numpy as np
import pytest
from helpers import small_run
from test_wire import ROW, VIT, slice_task

from lmeraser_jax.errors import UserError
from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.training import slice_files
from lmeraser_jax.training.fingerprint import fingerprint
from lmeraser_jax.training.jobs import Job, Target
from lmeraser_jax.training.team import End, Finished
from lmeraser_jax.unlearning.plan import plan


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir whose features are cached."""
    folder = tmp_path_factory.mktemp("shares") / "run"
    with small_run(folder) as run:
        plan(run)
    return folder


class Deaf:
    """A team whose tasks and reports are lists."""

    index, end, size = 1, End(False), 2

    def __init__(self, *tasks):
        self.given, self.reports = tasks, []

    def tasks(self, *kinds):
        return iter(self.given)

    def report(self, message):
        self.reports.append(message)


def test_a_worker_refuses_another_program_backbone_or_workdir(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(slice_files, "silence", lambda: None)
    monkeypatch.setattr(slice_files, "mesh_of", lambda: run.mesh)  # this test process has more devices
    mask = os.umask(0o022)
    with small_run(trained) as run:
        k, tuning, program = run.config.clustering, run.config.tuning, fingerprint(run.config.tuning, run.mesh)
        task = slice_files.FeatureTask(
            run.layout.root,
            run.spec,
            run.backbone.digest,
            program,
            tuning,
            k.feature_batch,
            len(run.images),
            np.arange(40),
            3,
        )
        wanted = run.extractor()(run.images[:40])
        bad = [
            dataclasses.replace(task, program="another"),
            dataclasses.replace(task, backbone="another"),
            dataclasses.replace(task, count=10**6),
            dataclasses.replace(task, root=tmp_path / "nowhere"),
        ]
        team = Deaf(task, *bad)
        try:
            assert slice_files.serve(team) == 1, "the leader failed"
        finally:
            os.umask(mask)
    found, end, *failures = team.reports
    assert found.place == 3 and found.values.tobytes() == wanted.tobytes() and end == Finished(False)
    for failure, words in zip(
        failures, ("its program or devices", "is not the backbone", "of 1000000 rows", "nowhere"), strict=True
    ):
        assert words in failure.message


class Given:
    """A team of three whose others hand in what they are told to."""

    index, size = 0, 3

    def __init__(self, *results):
        self.results, self.tasks = results, {}

    def share(self, tasks, own, kind):
        self.tasks = dict(tasks)
        yield from own
        yield from self.results


def targets(steps) -> tuple[Target, ...]:
    """A slice of so many steps for each number: batches of one image, one epoch."""
    return tuple(
        Target(f"{i:064d}", "", Job(f"k{i}", np.arange(count, dtype=np.int32), 1, 1)) for i, count in enumerate(steps)
    )


@pytest.mark.parametrize("steps", [(9, 7, 6, 5, 5, 4), (1, 1, 1, 9), (3, 3, 2, 2, 2), (5,), (4, 8, 1, 1, 1, 9, 2)])
def test_slices_are_dealt_so_that_all_end_together(steps):
    """Not longer than the best of all ways to deal them."""
    task = dataclasses.replace(slice_task(VIT), targets=targets(steps))
    parts = slice_files._dealt(Given(), task)
    ways = itertools.product(range(3), repeat=len(steps))
    best = min(max(sum(s for s, who in zip(steps, way, strict=True) if who == one) for one in range(3)) for way in ways)
    assert max(sum(target.job.steps for target in part.targets) for part in parts) == best
    assert sorted(target.digest for part in parts for target in part.targets) == [one.digest for one in task.targets]
    assert all(part.labels is task.labels for part in parts)


def shared(tmp_path, monkeypatch, team, steps=(1, 1, 1)):
    """What comes of slices that are shared with a team; process 0's own are made at once."""
    (tmp_path / "slices").mkdir(exist_ok=True)
    task = dataclasses.replace(slice_task(VIT), root=tmp_path, folder=tmp_path / "slices", targets=targets(steps))

    def make(part, *_):
        yield from (slice_files.Made(ROW._replace(digest=one.digest), one.job.rows, {}, None) for one in part.targets)

    monkeypatch.setattr(slice_files, "make_slices", make)
    return list(slice_files.share_slices(team, task, None, None, None))


@pytest.mark.parametrize("digest", ["../../elsewhere", "f" * 64])
def test_a_slice_that_nobody_asked_for_is_refused(tmp_path, monkeypatch, digest):
    (tmp_path / "elsewhere").mkdir()
    made = slice_files.Made(ROW._replace(digest=digest), np.zeros(0, np.int32), {}, None)
    with pytest.raises(UserError, match="another slice than those that it was to make"):
        shared(tmp_path, monkeypatch, Given(made))
    assert list((tmp_path / "slices").iterdir()) == [] == list((tmp_path / "scratch").iterdir())


def test_a_slice_that_is_not_there_is_refused(tmp_path, monkeypatch):
    made = slice_files.Made(ROW._replace(digest=f"{2:064d}"), np.zeros(0, np.int32), {}, None)
    with pytest.raises(UserError, match="is not there; is the workdir shared?"):
        shared(tmp_path, monkeypatch, Given(made))


@pytest.mark.parametrize("places", [(2, 2), (2, 3), (2,), (2, 4, 4)])
def test_features_that_nobody_asked_for_are_refused(places):
    whole = slice_files.FeatureTask(None, None, "", "", None, 1, 6, np.arange(6), 0)
    found = [slice_files.Found(place, np.zeros((2, 4), np.float32)) for place in places]
    with pytest.raises(UserError, match="other features than those that they were to compute"):
        slice_files.share_features(Given(*found), whole, lambda rows: np.zeros((len(rows), 4), np.float32))
    right = [slice_files.Found(place, np.full((2, 4), place, np.float32)) for place in (4, 2)]
    values = slice_files.share_features(Given(*right), whole, lambda rows: np.zeros((len(rows), 4), np.float32))
    assert values[:, 0].tolist() == [0, 0, 2, 2, 4, 4]


def writes(count, log, busy, ending=None):
    """Callables that take a moment each; counts how many are at work."""

    def write(number):
        with busy:
            log.append(("begins", number))
        time.sleep(0.02 if number % 2 else 0.05)
        with busy:
            log.append(("ends", number))
        return number

    for number in range(count):
        yield functools.partial(write, number)
    if ending is not None:
        raise ending


def at_work(log):
    """The most that were between their beginning and their end."""
    running = itertools.accumulate(1 if what == "begins" else -1 for what, _ in log)
    return max(running)


def test_a_few_slices_are_written_at_a_time_and_come_in_order():
    log, busy = [], threading.Lock()
    assert list(slice_files._side_by_side(writes(12, log, busy))) == list(range(12))
    assert 2 <= at_work(log) <= slice_files.WRITERS


def test_whoever_is_asked_to_stop_first_ends_what_is_being_written():
    log, busy, found = [], threading.Lock(), []
    with pytest.raises(Stopped):
        for number in slice_files._side_by_side(writes(6, log, busy, Stopped())):
            found.append(number)
    assert found == list(range(6))


def test_nothing_is_being_written_any_more_once_the_writes_are_closed():
    log, busy = [], threading.Lock()
    begun = slice_files._side_by_side(writes(9, log, busy))
    assert next(begun) == 0
    begun.close()
    assert sorted(n for what, n in log if what == "begins") == sorted(n for what, n in log if what == "ends")
    assert len(log) < 2 * 9


def test_a_write_that_fails_is_raised_and_the_others_end():
    def failing():
        raise OSError(28, "No space left on device")

    log, busy, found = [], threading.Lock(), []
    with pytest.raises(OSError, match="No space left"):
        for number in slice_files._side_by_side(itertools.chain(writes(2, log, busy), [failing], writes(1, log, busy))):
            found.append(number)
    assert found == [0, 1] and sum(what == "begins" for what, _ in log) == sum(what == "ends" for what, _ in log)
