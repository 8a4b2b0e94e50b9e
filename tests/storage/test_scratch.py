"""A process of a dead command that wakes up late: nothing that it still does reaches the workdir."""

import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from teams import FLAGS, Blow, own_run, started, within

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import checkpoints, scratch
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import doctor, erase
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers

TREE, DIGEST = {"kernel": np.ones((3, 4), np.float32)}, "d" * 64


@pytest.fixture
def place(tmp_path):
    """A workdir's layout, and a folder of scratch that a worker writes to."""
    found = Layout(tmp_path)
    return found, scratch.begin(found)


def below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_what_is_written_is_taken_by_process_0(place):
    workdir, folder = place
    checkpoints.save(scratch.held(folder) / DIGEST, TREE, {}, 5, {3: TREE})
    assert below(folder)[0] != f".{DIGEST}.tmp" and not workdir.slices.exists()
    scratch.take(workdir, folder, DIGEST)
    assert checkpoints.load(workdir.slice(DIGEST))[2] == 5 and checkpoints.load(workdir.slice(DIGEST), 3)[2] == 3
    scratch.settle(workdir)
    assert below(workdir.scratch) == [] and [path.name for path in workdir.slices.iterdir()] == [DIGEST]
    with pytest.raises(UserError, match="is the workdir shared?"):
        scratch.take(workdir, folder, DIGEST)
    with pytest.raises(UserError, match="is the workdir shared?"):
        scratch.held(folder)


@pytest.mark.parametrize("moment", ["before", "_manager", "_write", "publish_folder"])
def test_nothing_can_be_written_once_the_round_has_ended(place, monkeypatch, moment):
    """Orbax makes the folders of a path that are missing; there are none to make below a folder that is held."""
    workdir, folder = place
    if moment != "before":
        where = workdir if moment == "publish_folder" else checkpoints
        real = getattr(where, moment)

        def late(*args, **kwargs):
            scratch.settle(workdir)
            return real(*args, **kwargs)

        monkeypatch.setattr(where, moment, late)
    own = scratch.held(folder)
    if moment == "before":
        scratch.settle(workdir)
    with pytest.raises(OSError):
        checkpoints.save(own / DIGEST, TREE, {}, 5, {3: TREE})
    assert below(workdir.scratch) == [] and not workdir.slices.exists()


def test_what_is_finished_is_taken_at_the_end_and_replaces_nothing(place):
    workdir, folder = place
    for name, value in (("a" * 64, 1.0), ("b" * 64, 2.0)):
        checkpoints.save(folder / name, {"x": np.full(2, value)}, {})
    checkpoints.save(workdir.slice("b" * 64), {"x": np.full(2, 7.0)}, {})
    (folder / ".torn.tmp" / "deep").mkdir(parents=True)
    (folder / "stray").write_text("")
    os.symlink(workdir.root, folder / "link")
    scratch.settle(workdir)
    assert {path.name for path in workdir.slices.iterdir()} == {"a" * 64, "b" * 64} and below(workdir.scratch) == []
    assert checkpoints.load(workdir.slice("b" * 64))[0]["x"].tolist() == [7.0, 7.0]


def test_a_folder_that_is_written_to_is_removed_at_last(place, monkeypatch):
    workdir, folder = place
    (folder / ".a.tmp").mkdir()
    real, calls = shutil.rmtree, []

    def busy(path, *rest):
        (folder / f".late-{len(calls)}").mkdir()  # the other process is faster, twice
        calls.append(path)
        real(path / ".a.tmp", ignore_errors=True)
        return real(path, *rest) if len(calls) > 2 else os.rmdir(path)

    monkeypatch.setattr(scratch.shutil, "rmtree", busy)
    scratch.settle(workdir)
    assert len(calls) == 3 and not folder.exists()
    monkeypatch.setattr(scratch, "PATIENCE", 0.1)
    monkeypatch.setattr(scratch.shutil, "rmtree", os.rmdir)
    (scratch.begin(workdir) / "stays").mkdir()
    with pytest.raises(UserError, match="a process still writes there; end it"):
        scratch._remove(next(workdir.scratch.iterdir()))


def test_a_worker_that_wakes_up_after_an_erasure_does_no_harm(tmp_path):
    """It is frozen while it writes a slice; its command dies, another trains, erases and writes the receipt."""
    folder, notes = tmp_path / "run", tmp_path / "notes"
    frozen = Blow(1, signal.SIGSTOP, 1, "during")
    with started(notes, ["train", f"--workdir={folder}", *FLAGS], 2, frozen) as (leader, worker):
        assert within(120, lambda: stopped(worker.pid) or leader.poll() is not None) and leader.poll() is None
        leader.kill()
        leader.wait()
        (late,) = Layout(folder).scratch.glob("team-*/.*.tmp")
        digest = late.name[1:-4]
        with own_run(folder) as run:
            build(run)
            rows = run.catalog.rows_of(digest)
            erase.request_erasure(run, [name for name, row in ids(run).items() if row in rows][:2])
            wanted = state(run)
        worker.send_signal(signal.SIGCONT)
        assert worker.wait(60) == 2
    with own_run(folder) as run:
        assert not run.layout.slice(digest).exists() and below(run.layout.scratch) == []
        assert leftovers(run) == [] and differences(state(run), wanted) == []
    assert doctor.examine(folder, devices=jax.devices()[:1]).healthy


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def ids(run) -> dict[str, int]:
    records = run.catalog.live("train")
    return dict(zip(records.ids, records.rows.tolist(), strict=True))
