"""A team without JAX, threads of this process on loopback: results, losses, stops."""

import dataclasses
import socket
import threading
import time
from multiprocessing.connection import Client, Listener

import pytest
from teams import within

from lmeraser_jax import interrupt
from lmeraser_jax.errors import UserError
from lmeraser_jax.training import distributed
from lmeraser_jax.training.team import AGAIN, ALONE, Asked, End, Failed, Finished, Hello, Team, _socket


@pytest.fixture
def crew():
    """A leader and two workers that are connected; nobody stays asked to stop."""
    with Listener(("127.0.0.1", 0), authkey=b"k") as listener, interrupt.handle_sigterm():
        peers, workers = {}, []
        for index in (1, 2):
            thread = threading.Thread(
                target=lambda i: workers.append(
                    Team(i, 3, {0: (Hello(0, 3, "here", 7), Client(listener.address, authkey=b"k"))})
                ),
                args=(index,),
            )
            thread.start()
            peers[index] = (Hello(index, 3, "there", 8), listener.accept())
            thread.join()
        leader = Team(0, 3, peers)
        yield leader, *workers
        for team in (leader, *workers):
            team.end = End(True)
        for team in (*workers, leader):
            team.leave(True)


@dataclasses.dataclass(frozen=True)
class Word:
    """A task, or a result."""

    text: str


def texts(words) -> list[str]:
    return [word.text for word in words]


def served(worker, answers) -> threading.Thread:
    """A thread that answers each task of a worker."""

    def work():
        for task in worker.tasks(Word):
            for answer in answers(task.text):
                worker.report(answer)
        worker.leave(True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_every_result_comes_and_the_end_waits_for_the_slowest(crew):
    leader, *workers = crew

    def slowly(task):
        time.sleep(0.3 * (task == "b"))
        yield from (Word(task), Word(task * 2), Finished(False))

    threads = [served(worker, slowly) for worker in workers]
    for _ in range(2):  # round after round
        found = leader.share({1: Word("a"), 2: Word("b")}, iter([Word("own")]), Word)
        assert sorted(texts(found)) == ["a", "aa", "b", "bb", "own"]
    leader.leave(True)
    for thread, worker in zip(threads, workers, strict=True):
        thread.join(5)
        assert worker.end == End(True) and not thread.is_alive()


def test_a_failed_task_is_one_message_at_process_0(crew):
    leader, first, second = crew
    served(first, lambda task: [Failed("no space left")])
    served(second, lambda task: [Finished(interrupt.stop_requested())])
    with pytest.raises(UserError, match=r"^process 1 \(8 on there\): no space left$"):
        list(leader.share({1: Word("a"), 2: Word("b")}, iter([]), Word))
    with pytest.raises(UserError, match="no space left"):
        list(leader.share({}, iter([]), Word))


def test_a_loss_is_noticed_while_process_0_works_and_after_what_had_arrived(crew):
    leader, first, second = crew
    served(second, lambda task: [Finished(False)])

    def own():
        first.report(Word("late"))
        first.leave(True)  # closes its connection without a word
        assert within(5, interrupt.stop_requested), "the device program ends after its call"
        yield Word("own")
        yield Word("of the call in flight")
        raise interrupt.Stopped

    taken = []
    with pytest.raises(UserError, match=f"^process 1 .* was lost; {AGAIN}$"):
        for one in leader.share({1: Word("a"), 2: Word("b")}, own(), Word):
            taken.append(one.text)
    assert sorted(taken) == ["late", "of the call in flight", "own"]
    assert taken.index("own") < taken.index("of the call in flight")


def test_a_loss_is_no_stop_although_nobody_waits_for_the_lost_any_more(crew):
    leader, first, _ = crew

    def own():
        first.report(Finished(False))
        yield "own"
        first.leave(True)
        # Not `stop_requested`: all three live in one process here, and the lost one's own thread may ask first.
        assert within(5, lambda: leader.problem is not None)
        raise interrupt.Stopped

    with pytest.raises(UserError, match="^process 1 .* was lost"):
        list(leader.share({1: Word("a")}, own(), Word))


def test_a_part_that_was_stopped_at_the_very_end_stops_all(crew):
    """Process 0 has done its own part: without a word it would publish what is not there."""
    leader, first, second = crew
    served(first, lambda task: [Finished(True)])
    served(second, lambda task: [Finished(False)])
    taken = []
    with pytest.raises(interrupt.Stopped):
        taken.extend(leader.share({1: Word("a"), 2: Word("b")}, iter([Word("own")]), Word))


def test_a_worker_that_is_asked_to_stop_while_it_has_no_task_says_so(crew):
    leader, first, _ = crew
    assert not interrupt.stop_requested()
    first.report(Asked())
    assert within(5, interrupt.stop_requested)

    def own():
        yield "own"
        interrupt.raise_if_stopped()

    with pytest.raises(interrupt.Stopped):
        list(leader.share({}, own(), Word))


def test_a_team_of_one_has_nothing_to_wait_for():
    assert list(ALONE.share({}, iter([1, 2]), int)) == [1, 2] and ALONE._threads == []
    with distributed.joined(None) as team:
        assert team is ALONE


def test_a_team_that_is_over_asks_nobody_to_stop(crew):
    leader, *workers = crew
    for team in (*workers, leader):
        team.end = End(True)
        team.leave(True)
        assert not any(thread.is_alive() for thread in team._threads)


def test_what_is_no_message_ends_the_team_with_a_word_about_it(crew):
    leader, first, second = crew
    served(second, lambda task: [Finished(interrupt.stop_requested())])
    first._peers[0][1].send(Word("a pickle"))
    with pytest.raises(UserError, match=f"^process 1 .* cannot be read .* same version .*{AGAIN}$"):
        list(leader.share({1: Word("a"), 2: Word("b")}, iter([]), Word))


def test_a_result_of_another_kind_is_refused(crew):
    leader, first, _ = crew
    served(first, lambda task: [Hello(1, 3, "there", 8)])
    with pytest.raises(UserError, match="'Hello' is not expected"):
        list(leader.share({1: Word("a")}, iter([]), Word))


def test_a_host_that_vanishes_without_a_word_is_noticed_within_half_a_minute(crew):
    """Probes of an idle connection, and the wait for an answer to what was sent."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system cannot be told")
    for team in crew:
        for _, connection in team._peers.values():
            with _socket(connection) as raw:
                assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
                idle, between, count, unanswered = (raw.getsockopt(socket.IPPROTO_TCP, name) for name in names)
                assert idle + between * count <= 30 and 0 < unanswered <= 30_000
