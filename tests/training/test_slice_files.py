"""Slices on disk: written a few at a time, yielded in order, and loaded again only exactly as they were written."""

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from tuning_problem import small_spec

from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.interrupt import Stopped
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.training.jobs import Target, make_job
from lmeraser_jax.training.slice_files import WRITERS, load_orphan, write_slice, write_slices
from lmeraser_jax.training.slices import Slice
from lmeraser_jax.training.tune import Tuned

SPEC = small_spec()
TARGETS = [
    Target(f"{i:064x}", make_job(f"cluster-{i}", np.arange(4 * i, 4 * i + 4), SPEC.tuning)) for i in range(2 * WRITERS)
]


def tuned(target, step=None, failed_at=None):
    size = float(int(target.digest, 16) + (step or 0))
    slice_ = Slice(np.full(28, size, np.float32), np.ones((16, 10), np.float32), np.zeros(10, np.float32))
    return Tuned(target.job, step or target.job.steps, slice_, 0.5, failed_at, 0.25)


class Writes:
    """Stands in for `checkpoints.save`: notes what has begun and ended; writes wait until so many have begun."""

    def __init__(self, patch, failing=None, together=WRITERS):
        self.together = together
        self.begun, self.ended, self.most, self.failing = [], [], 0, failing
        self.enough = threading.Event()
        patch.setattr(checkpoints, "save", self.save)

    def save(self, folder, *_):
        self.begun.append(folder.name)
        self.most = max(self.most, len(self.begun) - len(self.ended))
        if len(self.begun) == self.together:
            self.enough.set()
        assert self.enough.wait(20), "too few writes at a time"
        if folder.name == self.failing:
            raise OSError("no space left")
        time.sleep(0.01)
        self.ended.append(folder.name)


def write(folder, results):
    return write_slices(folder, TARGETS, results, "program", SPEC.tuning)


def test_slices_are_written_a_few_at_a_time_and_yielded_in_order(tmp_path, monkeypatch):
    writes = Writes(monkeypatch)
    digests = []
    for written in write(tmp_path, map(tuned, TARGETS)):
        assert written.row.digest in writes.ended, "it is on disk before it is handed over"
        digests.append(written.row.digest)
    assert digests == [target.digest for target in TARGETS] and writes.most == WRITERS


def test_closing_waits_for_the_writes_that_have_begun(tmp_path, monkeypatch):
    writes = Writes(monkeypatch)
    writing = write(tmp_path, map(tuned, TARGETS))
    next(writing)
    writing.close()
    assert len(writes.ended) == len(writes.begun) >= WRITERS


def test_a_write_that_fails_is_raised_after_the_others_have_ended(tmp_path, monkeypatch):
    writes = Writes(monkeypatch, failing=TARGETS[1].digest)
    writing = write(tmp_path, map(tuned, TARGETS))
    assert next(writing).row.digest == TARGETS[0].digest
    with pytest.raises(OSError, match="no space left"):
        list(writing)
    assert len(writes.ended) == len(writes.begun) - 1


def test_a_stop_is_raised_after_what_was_finished_is_written(tmp_path, monkeypatch):
    def results():
        yield from map(tuned, TARGETS[:2])
        raise Stopped

    writes, digests = Writes(monkeypatch, together=2), []
    with pytest.raises(Stopped):
        for written in write(tmp_path, results()):
            digests.append(written.row.digest)
    assert digests == [target.digest for target in TARGETS[:2]] and set(digests) == set(writes.ended)


def test_a_slice_that_is_not_finite_is_not_written(tmp_path):
    (written,) = write(tmp_path, iter([tuned(TARGETS[0], failed_at=3)]))
    assert written.failed_at == 3 and list(tmp_path.iterdir()) == []


def test_a_slice_that_nobody_registered_is_loaded_only_exactly_as_it_was_written(tmp_path):
    job = dataclasses.replace(TARGETS[0].job, snapshots=(2,))
    target = dataclasses.replace(TARGETS[0], job=job)
    written = write_slice(tmp_path, target, tuned(target), [tuned(target, step=2)], "program", SPEC.tuning)
    loaded = load_orphan(tmp_path, target, "program", SPEC)
    assert loaded is not None and (loaded.row, loaded.epochs) == (written.row, written.epochs)
    assert loaded.epochs.keys() == {2} and loaded.failed_at is None and loaded.rows is job.rows
    folder = tmp_path / target.digest
    arrays, facts, step = checkpoints.load(folder)
    earlier = {2: checkpoints.load(folder, 2)[0]}
    more = {**arrays, "more": arrays["bias"]}
    others = {
        "other bits": ({**arrays, "bias": arrays["bias"] + 1}, facts, step, earlier),
        "other bits of a snapshot": (arrays, facts, step, {2: {**arrays, "bias": arrays["bias"] + 1}}),
        "other arrays": (more, {**facts, "params_digest": arrays_digest(more)}, step, earlier),
        "an earlier step": (arrays, facts, step - 1, earlier),
        "no snapshot": (arrays, facts, step, {}),
        **{
            f"{name}={value}": (arrays, {**facts, name: value}, step, earlier)
            for name, value in (("fingerprint", "p"), ("digest", "d"), ("loss", "x"), ("created", None), ("epochs", ""))
        },
    }
    for change, checkpoint in others.items():
        checkpoints.save(folder, *checkpoint)
        assert load_orphan(tmp_path, target, "program", SPEC) is None, change
    checkpoints.save(folder, arrays, facts, step, earlier)
    assert load_orphan(tmp_path, target, "program", SPEC) is not None, "control: written again as it was"
    assert load_orphan(tmp_path, target, "another program", SPEC) is None
    assert load_orphan(tmp_path, TARGETS[1], "program", SPEC) is None
    shutil.copytree(folder, tmp_path / TARGETS[1].digest)
    assert load_orphan(tmp_path, TARGETS[1], "program", SPEC) is None, "another cluster's slice"
    shutil.rmtree(folder / str(step) / "arrays")
    assert load_orphan(tmp_path, target, "program", SPEC) is None, "torn"
