"""Several processes on loopback: the bits of one process, losses that are told, work that is not lost."""

import shutil
import signal

import pytest
from teams import FLAGS, Blow, own_run, together

from lmeraser_jax.training.team import AGAIN
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.purge import leftovers

pytest.importorskip("ml_collections", reason="the command line needs ml_collections")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that one process trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with own_run(folder) as run:
        build(run)
    return folder


@pytest.fixture(scope="module")
def wanted(trained):
    """The state that one process makes."""
    with own_run(trained) as run:
        return state(run)


def test_two_processes_make_and_erase_the_bits_of_one(tmp_path, trained, wanted):
    folder = tmp_path / "run"
    first, second = together(tmp_path / "train", ["train", f"--workdir={folder}", *FLAGS], 2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "tuned 5 clusters" in first.out and second.out == second.err == ""
    assert len(first.slices) > 0 < len(second.slices), "both have tuned"
    with own_run(folder) as run:
        assert differences(state(run), wanted) == [] and leftovers(run) == []
        assert set(run.catalog.slices()) == {*first.slices, *second.slices}
        assert not [path for path in run.layout.slices.rglob("*") if path.stat().st_mode & 0o077], "open to others"
        ids = list(run.catalog.live("train").ids[:20])
    erased = together(tmp_path / "erase", ["unlearn", f"--workdir={folder}", f"--records={','.join(ids)}"], 2)
    assert [one.code for one in erased] == [0, 0] and all(one.slices for one in erased), [one.err for one in erased]
    shutil.copytree(trained, tmp_path / "alone")
    with own_run(tmp_path / "alone") as run:
        erase.request_erasure(run, ids)
        alone = state(run)
    with own_run(folder) as run:
        assert differences(state(run), alone) == [] and leftovers(run) == []


@pytest.mark.slow
def test_four_processes_make_the_bits_of_one(tmp_path, wanted):
    ended = together(tmp_path / "train", ["train", f"--workdir={tmp_path / 'run'}", *FLAGS], 4)
    assert [one.code for one in ended] == [0] * 4, [one.err for one in ended]
    assert all(one.slices for one in ended)
    with own_run(tmp_path / "run") as run:
        assert differences(state(run), wanted) == []


def test_a_killed_process_fails_the_command_and_its_slices_are_adopted(tmp_path, wanted):
    folder = tmp_path / "run"
    flags = ["train", f"--workdir={folder}", *FLAGS]
    first, second = together(tmp_path / "one", flags, 2, Blow(1, signal.SIGKILL, 1))
    assert second.code == -signal.SIGKILL and len(second.slices) == 1
    assert first.code == 2 and first.out == "" and first.seconds - second.seconds < 30, (first.out, first.err)
    last = first.err.splitlines()[-1]
    assert last.startswith("error: process 1 (") and last.endswith(f"was lost; {AGAIN}"), first.err
    with own_run(folder) as run:
        registered = set(run.catalog.slices())
        assert run.catalog.manifest() is None and registered == set(first.slices)
        outcome = build(run)
        assert (outcome.adopted, outcome.reused) == (1, len(registered) + 1)
        assert differences(state(run), wanted) == [] and leftovers(run) == []


@pytest.mark.slow
def test_a_lost_leader_ends_the_others(tmp_path, wanted):
    folder = tmp_path / "run"
    flags = ["train", f"--workdir={folder}", *FLAGS]
    first, second = together(tmp_path / "one", flags, 2, Blow(0, signal.SIGKILL, 1))
    assert first.code == -signal.SIGKILL and second.code == 2 and second.seconds - first.seconds < 30
    last = second.err.splitlines()[-1]
    assert last.startswith("process 1: error: process 0 (") and last.endswith(f"was lost; {AGAIN}"), second.err
    with own_run(folder) as run:
        outcome = build(run)
        assert outcome.adopted == len(first.slices) + len(second.slices) == outcome.reused
        assert differences(state(run), wanted) == []


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_process_ends_all_in_order(tmp_path, wanted, victim):
    folder = tmp_path / "run"
    flags = ["train", f"--workdir={folder}", *FLAGS]
    ended = together(tmp_path / "one", flags, 2, Blow(victim, signal.SIGTERM, 1))
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert "stopped as asked; resume with: lmeraser train" in ended[0].err.splitlines()[-1]
    assert ended[1].out == ended[1].err == ""
    with own_run(folder) as run:
        registered = set(run.catalog.slices())
        assert run.catalog.manifest() is None and registered == {name for one in ended for name in one.slices}
        assert 0 < len(registered) < len(wanted["slices"])
        outcome = build(run)
        assert (outcome.adopted, outcome.reused) == (0, len(registered))
        assert differences(state(run), wanted) == []
