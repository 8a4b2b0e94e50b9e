"""Several processes on loopback: the bits of one process, losses that are told, work that is not lost."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from helpers import SMALL, small_config, small_run

from lmeraser_jax import distributed, shares, stopping, unlearning
from lmeraser_jax.audit import differences, state
from lmeraser_jax.errors import UserError
from lmeraser_jax.fingerprint import fingerprint
from lmeraser_jax.planning import plan
from lmeraser_jax.purge import leftovers
from lmeraser_jax.reconcile import reconcile
from lmeraser_jax.records import sources
from lmeraser_jax.team import AGAIN, ALONE, Asked, End, Failed, Finished, Hello, Team

pytest.importorskip("ml_collections", reason="the command line needs ml_collections")

CONFIG = small_config(data__train_limit=100, data__test_limit=20, tuning__scan_steps=1)
SETTINGS = {**SMALL, "data": SMALL["data"] | {"train_limit": 100, "test_limit": 20}}
SETTINGS["tuning"] = SMALL["tuning"] | {"scan_steps": 1}
FLAGS = [f"--config.{group}.{name}={value}" for group, values in SETTINGS.items() for name, value in values.items()]
HELPER = Path(__file__).with_name("team_process.py")


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that ended: exit code, output, slices that it wrote, seconds since the start of all."""

    code: int
    out: str
    err: str
    slices: list[str]
    seconds: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def together(folder: Path, command: list[str], count: int, victim: int = -1, number: int = 0, after=0) -> list[Ended]:
    """Runs a command in so many processes; one may get a signal after it has written so many slices."""
    folder.mkdir(exist_ok=True)
    where = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "JAX_NUM"))}
    environ["JAX_PLATFORMS"] = "cpu"
    started, processes = time.monotonic(), []
    for index in range(count):
        (folder / f"notes-{index}").unlink(missing_ok=True)
        blow = [str(number), str(after)] if index == victim else ["0", "0"]
        line = [sys.executable, str(HELPER), str(folder / f"notes-{index}"), *blow, *command, *where]
        files = [open(folder / f"{kind}-{index}", "w+") for kind in ("out", "err")]  # noqa: SIM115
        line.append(f"--process_id={index}")
        processes.append((subprocess.Popen(line, stdout=files[0], stderr=files[1], env=environ), files))
    ends: dict[int, float] = {}
    try:
        while len(ends) < count:
            for index, (process, _) in enumerate(processes):
                if index not in ends and process.poll() is not None:
                    ends[index] = time.monotonic() - started
            assert time.monotonic() - started < 240, f"only {sorted(ends)} have ended"
            time.sleep(0.05)
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
    numbered = enumerate(processes)
    return [_ended(folder, index, process.returncode, files, ends[index]) for index, (process, files) in numbered]


def _ended(folder: Path, index: int, code: int, files, seconds: float) -> Ended:
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
        file.close()
    notes = folder / f"notes-{index}"
    return Ended(code, *texts, notes.read_text().split() if notes.exists() else [], seconds)


def own_run(folder: Path):
    """The workdir opened in this process, on one device."""
    return small_run(folder, sources.load(CONFIG.data), CONFIG)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir that one process trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with own_run(folder) as run:
        reconcile(run)
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
        unlearning.request_erasure(run, ids)
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
    first, second = together(tmp_path / "one", flags, 2, victim=1, number=signal.SIGKILL, after=1)
    assert second.code == -signal.SIGKILL and len(second.slices) == 1
    assert first.code == 2 and first.out == "" and first.seconds - second.seconds < 30, (first.out, first.err)
    last = first.err.splitlines()[-1]
    assert last.startswith("error: process 1 (") and last.endswith(f"was lost; {AGAIN}"), first.err
    with own_run(folder) as run:
        registered = set(run.catalog.slices())
        assert run.catalog.manifest() is None and registered == set(first.slices)
        outcome = reconcile(run)
        assert (outcome.adopted, outcome.reused) == (1, len(registered) + 1)
        assert differences(state(run), wanted) == [] and leftovers(run) == []


@pytest.mark.slow
def test_a_lost_leader_ends_the_others(tmp_path, wanted):
    folder = tmp_path / "run"
    flags = ["train", f"--workdir={folder}", *FLAGS]
    first, second = together(tmp_path / "one", flags, 2, victim=0, number=signal.SIGKILL, after=1)
    assert first.code == -signal.SIGKILL and second.code == 2 and second.seconds - first.seconds < 30
    last = second.err.splitlines()[-1]
    assert last.startswith("process 1: error: process 0 (") and last.endswith(f"was lost; {AGAIN}"), second.err
    with own_run(folder) as run:
        outcome = reconcile(run)
        assert outcome.adopted == len(first.slices) + len(second.slices) == outcome.reused
        assert differences(state(run), wanted) == []


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_process_ends_all_in_order(tmp_path, wanted, victim):
    folder = tmp_path / "run"
    flags = ["train", f"--workdir={folder}", *FLAGS]
    ended = together(tmp_path / "one", flags, 2, victim, signal.SIGTERM, 1)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert "stopped as asked; resume with: lmeraser train" in ended[0].err.splitlines()[-1]
    assert ended[1].out == ended[1].err == ""
    with own_run(folder) as run:
        registered = set(run.catalog.slices())
        assert run.catalog.manifest() is None and registered == {name for one in ended for name in one.slices}
        assert 0 < len(registered) < len(wanted["slices"])
        outcome = reconcile(run)
        assert (outcome.adopted, outcome.reused) == (0, len(registered))
        assert differences(state(run), wanted) == []


# ---- a team without JAX: threads of this process on loopback


@pytest.fixture
def crew():
    """A leader and two workers that are connected; nobody stays asked to stop."""
    with Listener(("127.0.0.1", 0), authkey=b"k") as listener, stopping.on_request():
        peers, workers = {}, []
        for index in (1, 2):
            thread = threading.Thread(
                target=lambda i: workers.append(
                    Team(i, 3, {0: (Hello(0, "here", 7), Client(listener.address, authkey=b"k"))})
                ),
                args=(index,),
            )
            thread.start()
            peers[index] = (Hello(index, "there", 8), listener.accept())
            thread.join()
        leader = Team(0, 3, peers)
        yield leader, *workers
        for team in (leader, *workers):
            team.end = End(True)
        for team in (*workers, leader):
            team.leave(True)


def served(worker, answers) -> threading.Thread:
    """A thread that answers each task of a worker."""

    def work():
        for task in worker.tasks():
            for answer in answers(task):
                worker.report(answer)
        worker.leave(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_every_result_comes_and_the_end_waits_for_the_slowest(crew):
    leader, *workers = crew

    def slowly(task):
        time.sleep(0.3 * (task == "b"))
        yield from (task, task * 2, Finished(False))

    threads = [served(worker, slowly) for worker in workers]
    for _ in range(2):  # round after round
        assert sorted(leader.share({1: "a", 2: "b"}, iter(["own"]))) == ["a", "aa", "b", "bb", "own"]
    leader.leave(True)
    for thread, worker in zip(threads, workers, strict=True):
        thread.join(5)
        assert worker.end == End(True) and not thread.is_alive()


def test_a_failed_task_is_one_message_at_process_0(crew):
    leader, first, second = crew
    served(first, lambda task: [Failed("no space left")])
    served(second, lambda task: [Finished(stopping.asked())])
    with pytest.raises(UserError, match=r"^process 1 \(8 on there\): no space left$"):
        list(leader.share({1: "a", 2: "b"}, iter([])))
    with pytest.raises(UserError, match="no space left"):
        list(leader.share({}, iter([])))


def test_a_loss_is_noticed_while_process_0_works_and_after_what_had_arrived(crew):
    leader, first, second = crew
    served(second, lambda task: [Finished(False)])

    def own():
        first.report("late")
        first.leave(True)  # closes its connection without a word
        assert within(5, stopping.asked), "the device program ends after its call"
        yield "own"
        yield "of the call in flight"
        raise stopping.Stopped

    taken = []
    with pytest.raises(UserError, match=f"^process 1 .* was lost; {AGAIN}$"):
        for one in leader.share({1: "a", 2: "b"}, own()):
            taken.append(one)  # noqa: PERF402
    assert taken == ["own", "late", "of the call in flight"]


def test_a_loss_is_no_stop_although_nobody_waits_for_the_lost_any_more(crew):
    leader, first, _ = crew

    def own():
        first.report(Finished(False))
        yield "own"
        first.leave(True)
        assert within(5, stopping.asked)
        raise stopping.Stopped

    with pytest.raises(UserError, match="^process 1 .* was lost"):
        list(leader.share({1: "a"}, own()))


def test_a_part_that_was_stopped_at_the_very_end_stops_all(crew):
    """Process 0 has done its own part: without a word it would publish what is not there."""
    leader, first, second = crew
    served(first, lambda task: [Finished(True)])
    served(second, lambda task: [Finished(False)])
    taken = []
    with pytest.raises(stopping.Stopped):
        taken.extend(leader.share({1: "a", 2: "b"}, iter(["own"])))


def test_a_worker_that_is_asked_to_stop_while_it_has_no_task_says_so(crew):
    leader, first, _ = crew
    assert not stopping.asked()
    first.report(Asked())
    assert within(5, stopping.asked)

    def own():
        yield "own"
        stopping.check()

    with pytest.raises(stopping.Stopped):
        list(leader.share({}, own()))


def test_a_team_of_one_has_nothing_to_wait_for():
    assert list(ALONE.share({}, iter([1, 2]))) == [1, 2] and ALONE._threads == []
    with distributed.joined(None) as team:
        assert team is ALONE


def test_strangers_are_turned_away():
    found, closed = SimpleQueue(), threading.Event()
    with Listener(("127.0.0.1", 0), authkey=b"key") as listener:
        threading.Thread(target=distributed._accept, args=(listener, found, closed), daemon=True).start()
        socket.create_connection(listener.address).close()
        with pytest.raises(AuthenticationError):
            Client(listener.address, authkey=b"another")
        with Client(listener.address, authkey=b"key") as friend:
            friend.send(Hello(1, "there", 8))
            assert found.get(timeout=5)[0] == Hello(1, "there", 8)
        closed.set()
    assert found.empty()


class Deaf:
    """A team whose tasks and reports are lists."""

    index, end, size = 1, End(False), 2

    def __init__(self, *tasks):
        self.given, self.reports = tasks, []

    def tasks(self):
        return iter(self.given)

    def report(self, message):
        self.reports.append(message)


def test_a_worker_refuses_another_program_backbone_or_workdir(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "silence", lambda: None)
    monkeypatch.setattr(shares, "mesh_of", lambda: run.mesh)  # this test process has more devices
    mask = os.umask(0o022)
    with own_run(trained) as run:
        k, tuning, program = run.config.clustering, run.config.tuning, fingerprint(run.config.tuning, run.mesh)
        task = shares.FeatureTask(
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
            assert shares.serve(team) == 1, "the leader failed"
        finally:
            os.umask(mask)
        assert plan(run).missing == {}
    found, end, *failures = team.reports
    assert found.place == 3 and found.values.tobytes() == wanted.tobytes() and end == Finished(False)
    for failure, words in zip(
        failures, ("its program or devices", "is not the backbone", "of 1000000 rows", "nowhere"), strict=True
    ):
        assert words in failure.message


def test_a_team_that_is_over_asks_nobody_to_stop(crew):
    leader, *workers = crew
    for team in (*workers, leader):
        team.end = End(True)
        team.leave(True)
        assert not any(thread.is_alive() for thread in team._threads)
