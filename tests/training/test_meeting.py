"""How processes find each other: strangers keep nobody waiting, nothing is left behind, and a failure is one line."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from queue import SimpleQueue

import pytest
from teams import free_port, plain_environ, within

from lmeraser_jax import interrupt
from lmeraser_jax.errors import UserError
from lmeraser_jax.training import distributed, wire
from lmeraser_jax.training.places import Place
from lmeraser_jax.training.team import Finished, Hello

KEY = b"a key of 16 byte"
HELLO = Hello(1, 3, "there", 8)


@pytest.fixture
def door():
    """An address where whoever knows the key is let in, and the queue of those."""
    with distributed.listening("127.0.0.1", KEY) as (port, found):
        yield ("127.0.0.1", port), found
        assert found.empty()


def friend(address, found, hello=HELLO) -> None:
    """Somebody who knows the key comes in at once."""
    with Client(address, authkey=KEY) as connection:
        wire.send(connection, hello)
        assert found.get(timeout=5)[0] == hello


def test_strangers_are_turned_away(door):
    address, found = door
    socket.create_connection(address).close()
    with pytest.raises((AuthenticationError, EOFError)):
        Client(address, authkey=b"another")
    with Client(address, authkey=KEY) as rude:
        wire.send(rude, Finished(True))
        with pytest.raises((EOFError, OSError)):
            rude.recv_bytes()
    with Client(address, authkey=KEY) as pickling:
        pickling.send(HELLO)
        with pytest.raises((EOFError, OSError)):
            pickling.recv_bytes()
    friend(address, found)


def test_silent_strangers_keep_nobody_waiting_and_are_hung_up_on(door, monkeypatch):
    address, found = door
    silent = [socket.create_connection(address) for _ in range(3)]
    started = time.monotonic()
    friend(address, found)
    assert time.monotonic() - started < 3
    monkeypatch.setattr(distributed, "HANDSHAKE", 0.3)
    with socket.create_connection(address, timeout=5) as late, Client(address, authkey=KEY) as wordless:
        while late.recv(100):
            pass
        with pytest.raises((EOFError, OSError)):
            wordless.recv_bytes()
    for one in silent:
        one.close()


def test_the_port_is_closed_when_all_are_there():
    before = threading.active_count()
    with distributed.listening("127.0.0.1", KEY) as (port, found):
        friend(("127.0.0.1", port), found)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert within(5, lambda: threading.active_count() == before)


@pytest.mark.parametrize(
    ("host", "means", "bound"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("gpu007", ["127.0.1.1"], "0.0.0.0"),
        ("gpu007", ["127.0.0.1", "127.0.0.2"], "0.0.0.0"),
        ("gpu007", [], "0.0.0.0"),
        ("gpu007", ["203.0.113.9"], "0.0.0.0"),
        ("203.0.113.9", None, "0.0.0.0"),
        ("no host has this name", None, "0.0.0.0"),
    ],
)
def test_process_0_listens_at_the_address_that_the_others_call_where_it_has_it(monkeypatch, host, means, bound):
    if means is not None:
        monkeypatch.setattr(socket, "gethostbyname_ex", lambda name: (name, [], means))
    with distributed._server(host) as server:
        assert server.getsockname()[0] == bound


@pytest.mark.parametrize("means", [["203.0.113.9"], ["203.0.113.9", "203.0.113.10"]])
def test_a_name_with_one_address_is_listened_at(monkeypatch, means):
    calls = []
    monkeypatch.setattr(socket, "gethostbyname_ex", lambda name: (name, [], means))
    monkeypatch.setattr(socket, "create_server", lambda address: calls.append(address))
    distributed._server("gpu007")
    assert calls == [(means[0] if len(means) == 1 else "", 0)]


@pytest.mark.parametrize(
    ("hellos", "words"),
    [
        ([Hello(1, 2, "h", 8)], "process 1 was started as one of 2, process 0 as one of 3; start all with the same"),
        ([HELLO, Hello(1, 3, "elsewhere", 9)], "process 1 .9 on elsewhere. has the number of another process"),
        ([Hello(0, 3, "h", 8)], "legal: 1 to 2, each once"),
        ([Hello(3, 3, "h", 8)], "legal: 1 to 2, each once"),
        ([HELLO], r"processes \[2\] did not reach process 0 within 0.5 s"),
    ],
)
def test_others_than_those_expected_are_refused(monkeypatch, hellos, words):
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    found = SimpleQueue()
    for hello in hellos:
        found.put((hello, None))
    with pytest.raises(UserError, match=words):
        distributed.arrived(found, 3)
    found.put((HELLO, None))
    found.put((Hello(2, 3, "h", 9), None))
    assert sorted(distributed.arrived(found, 3)) == [1, 2]


# ---- the meeting itself: children that import JAX

JOIN = """
import sys
from lmeraser_jax import distributed, errors, places
try:
    with distributed.joined(places.Place(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))) as team:
        for task in team.tasks():
            pass
    print("met", team.index, team.size)
except errors.UserError as error:
    sys.exit(str(error))
"""


def joining(address: str, size: int, index: int) -> subprocess.Popen:
    command = [sys.executable, "-c", JOIN, address, str(size), str(index)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=plain_environ(), **pipes)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_processes_of_different_sizes_are_told_so():
    address = f"127.0.0.1:{free_port()}"
    ones = [joining(address, size, index) for size, index in ((2, 0), (3, 1))]
    for one in ones:
        out, err = one.communicate(timeout=120)
        assert one.returncode == 1 and "process 1 was started as one of 3, process 0 as one of 2" in err, (out, err)


def test_a_meeting_that_nobody_comes_to_is_not_silent_and_ends(monkeypatch, capfd):
    monkeypatch.setattr(distributed, "MEETING", 6.0)
    monkeypatch.setattr(distributed, "SILENCE", 1.0)
    address, start = f"127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(UserError, match=f"^not all 3 processes met at {address} within 6 s; start them together"):
        distributed.meet(Place(address, 3, 1), {})
    assert capfd.readouterr() == ("", f"process 1: waiting for all 3 processes to meet at {address}\n")
    assert time.monotonic() - start < 15 and children(os.getpid()) == []


def test_a_meeting_ends_when_the_process_is_asked_to_stop():
    with interrupt.handle_sigterm():
        threading.Timer(1.0, interrupt.request_stop).start()
        with pytest.raises(interrupt.Stopped):
            distributed.meet(Place(f"127.0.0.1:{free_port()}", 2, 0), {})
    assert children(os.getpid()) == []


def test_why_a_meeting_failed_is_one_line(capfd):
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        what = f"^process 0 of 2 could not meet the others at {address}: .*Failed to (add port|start RPC server).*$"
        with pytest.raises(UserError, match=what):
            distributed.meet(Place(address, 2, 0), {})
    assert capfd.readouterr() == ("", "")


STACK = """F1121 21:35:39.642593   16185 client.h:80] Terminating process because JAX. absl::Status: {}

RPC: /xla.coordination.CoordinationService/RegisterTask
*** Check failure stack trace: ***
    @     0x7fb61b840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STACK.format("DEADLINE_EXCEEDED: Deadline Exceeded"), "DEADLINE_EXCEEDED: Deadline Exceeded"),
        (STACK.format("ALREADY_EXISTS: Aborted"), "another process has the same number (--process_id)"),
        ("Traceback\n  File x\nValueError: no\n", "ValueError: no"),
        ("", "it ended without a word"),
    ],
)
def test_the_reason_is_what_jax_says_last(text, reason):
    assert distributed._reason(text) == reason


def test_the_child_ends_with_its_parent():
    """Killed, the parent cannot take the child with it; the pipe between them can."""
    port = free_port()
    parent = joining(f"127.0.0.1:{port}", 2, 0)
    try:
        assert within(60, lambda: reachable(port)), "it waits for the other, deep inside JAX"
        (child,) = children(parent.pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    assert within(15, lambda: not Path(f"/proc/{child}").exists() or state(child) == "Z")


def reachable(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
