"""The processes of one command: process 0 leads, the others do the tasks that it hands out.

Messages are dataclasses (`wire`): those below, and tasks and results, which only who works on them opens. A thread for
each connection reads all the time, so that a lost process is noticed while others work: their device programs then end
after the call in flight (`stopping`), and what they have finished is kept.
"""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from lmeraser_jax import interrupt
from lmeraser_jax.errors import UserError
from lmeraser_jax.training import wire

POLL = 0.2  # seconds between two looks whether to stop
GOODBYE = 15.0  # seconds that process 0 gives the others to end their calls
AGAIN = "run the same command again: it goes on from the slices already written"


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first message of a connection: who calls."""

    index: int
    size: int  # number of processes, as it was told
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.index} ({self.pid} on {self.host})"


@dataclasses.dataclass(frozen=True)
class Finished:
    """From a worker: its task is done, or was stopped before its end."""

    stopped: bool


@dataclasses.dataclass(frozen=True)
class Failed:
    """From a worker: its task cannot be done."""

    message: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """From a worker that has no task: it was asked to stop."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """To a worker: end the task where nothing is lost."""


@dataclasses.dataclass(frozen=True)
class End:
    """To a worker: there is nothing more to do; `ok` says whether the command went well."""

    ok: bool


@dataclasses.dataclass(frozen=True)
class _Lost:
    """Noted here: a connection ended."""


OPENED = (Finished, Failed, Asked, Stop, End)  # by the thread that reads


class Team:
    """A process's side of a team. A team of one has no connections and no threads.

    Args:
        index: own number; 0 leads.
        size: number of processes.
        peers: {index: (who, connection)}: at process 0 all others, elsewhere process 0.
    """

    def __init__(self, index: int, size: int, peers: Mapping[int, tuple[Hello, Connection]]):
        self.index, self.size = index, size
        self.problem: str | None = None  # what ended the team's work: a lost process, a failed task
        self.end: End | None = None
        self._stopped = False  # some part of what is shared now was stopped before its end
        self._peers = dict(peers)
        self._inbox: SimpleQueue[tuple[int, Any]] = SimpleQueue()  # wire.Sealed, or one of OPENED, or _Lost
        self._threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in self._peers]
        for _, connection in self._peers.values():
            _notice_silence(connection)
        for thread in self._threads:
            thread.start()

    # the connections
    def _listen(self, peer: int) -> None:
        """Reads until the connection ends. Whatever must end work under way is noted before it is looked at."""
        who, connection = self._peers[peer]
        names, why = {kind.__name__ for kind in OPENED}, "was lost"
        while True:
            try:
                message = wire.receive(connection)
                message = message.open(*OPENED) if message.name in names else message
            except (EOFError, OSError):
                message = _Lost()
            except wire.Malformed as error:
                message, why = _Lost(), str(error)
            if isinstance(message, End):
                self.end = message
            if isinstance(message, _Lost) and self.end is None and self.problem is None:
                self.problem = f"{who} {why}; {AGAIN}"
            if isinstance(message, Failed) and self.problem is None:
                self.problem = f"{who}: {message.message}"
            if isinstance(message, _Lost | Failed | Asked | Stop | End) or message == Finished(stopped=True):
                interrupt.request_stop()
            self._inbox.put((peer, message))
            if isinstance(message, _Lost):
                return

    def _send(self, peer: int, message: object) -> None:
        """Whoever cannot be reached any more is noticed by the thread that reads."""
        with contextlib.suppress(OSError):
            wire.send(self._peers[peer][1], message)

    def _take(self, timeout: float) -> tuple[int, Any] | None:
        try:
            return self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
        except Empty:
            return None

    def _check(self) -> None:
        if self.problem is not None:
            raise UserError(self.problem)

    # process 0
    def share(self, tasks: Mapping[int, object], own: Iterable[Any], kind: type) -> Iterator[Any]:
        """Hands out tasks, works on its own, and yields every result of everybody as it comes.

        When it ends, every task is done everywhere.

        Args:
            tasks: {process: task}, for others than process 0.
            own: the results of this process's own part, made while they are taken.
            kind: of results.

        Raises:
            UserError: a process was lost, or could not do its task. What was finished before was yielded.
            Stopped: some process was asked to stop; all have ended where nothing is lost, and that was yielded.
        """
        self._check()
        busy, told, self._stopped = set(tasks), False, False
        for peer, task in tasks.items():
            self._send(peer, task)
        try:
            for result in own:
                yield result
                yield from self._results(busy, kind, 0)
        except interrupt.Stopped:
            self._stopped = True
        while busy:
            if interrupt.stop_requested() and not told:
                told = True
                for peer in busy:
                    self._send(peer, Stop())
            yield from self._results(busy, kind, POLL)
        if self._stopped:
            self._check()
            raise interrupt.Stopped

    def _results(self, busy: set[int], kind: type, timeout: float) -> Iterator[Any]:
        """What has arrived; a process that has finished is no longer busy. After a loss nobody is waited for."""
        while busy and (found := self._take(timeout)) is not None:
            peer, message = found
            if isinstance(message, _Lost | Failed):
                self._stopped = True
                busy.clear()
            elif isinstance(message, Finished):
                self._stopped |= message.stopped
                busy.discard(peer)
            elif isinstance(message, wire.Sealed):
                yield message.open(kind)

    def leave(self, ok: bool) -> None:
        """Ends the team. Process 0 tells the others and gives them a while to end what they are doing."""
        if self.index == 0:
            self.end = End(ok)
            for peer in self._peers:
                self._send(peer, self.end)
            end = time.monotonic() + GOODBYE
            for thread in self._threads:
                thread.join(max(0.0, end - time.monotonic()))
        for _, connection in self._peers.values():
            hang_up(connection)
        for thread in self._threads:
            thread.join(GOODBYE)  # none may ask this process to stop once its team is over

    # the others
    def tasks(self, *kinds: type) -> Iterator[Any]:
        """The tasks of this process, each of one of the kinds, until process 0 ends the team.

        Raises:
            UserError: process 0 was lost.
        """
        asked = False
        while True:
            if interrupt.stop_requested() and not asked:
                asked = True
                self.report(Asked())
            found = self._take(POLL)
            if found is None or isinstance(found[1], Stop):
                continue
            if isinstance(found[1], End):
                return
            self._check()
            if isinstance(found[1], wire.Sealed):
                yield found[1].open(*kinds)

    def report(self, message: object) -> None:
        """Sends process 0 a result, or that a task is done."""
        self._send(0, message)


def _notice_silence(connection: Connection) -> None:
    """A host that vanishes without a word (power, network) counts as lost after half a minute."""
    with _socket(connection) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", 10),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 30_000),
        ):
            if hasattr(socket, name):  # not on every system
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def hang_up(connection: Connection) -> None:
    """Ends a connection and wakes the thread that reads from it; closing would pull the rug from under that."""
    with contextlib.suppress(OSError), _socket(connection) as raw:
        raw.shutdown(socket.SHUT_RDWR)


def _socket(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


ALONE = Team(0, 1, {})
