"""Several hosts: how the processes of a command find each other.

`joined` lets them meet through `jax.distributed` and leaves each with its side of a `Team`. They meet in a child
process on the CPU (this module, run as a program): JAX stays distributed only until every process knows where process 0
listens, and a shared key. The processes that work are ordinary ones with the devices of their host. So bits cannot
depend on the number of processes, checkpoints are written as ever, and a lost process is a message: JAX's coordination
service would abort the survivors in the middle of their work.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from queue import Empty, SimpleQueue

from lmeraser_jax import interrupt
from lmeraser_jax.errors import UserError
from lmeraser_jax.training import wire
from lmeraser_jax.training.places import Place
from lmeraser_jax.training.team import ALONE, Hello, Team, hang_up

MEETING_BYTES = 256  # of what process 0 tells the others
POLL = 0.2  # seconds
MEETING = 120.0  # seconds for all to meet; JAX would abort after 300
SILENCE = 20.0  # seconds after which a process says that it waits
PATIENCE = 60.0  # seconds for all to connect, once all have met
HANDSHAKE = 10.0  # seconds for who connects to show that it knows the key
STRANGE = (AuthenticationError, AssertionError, EOFError, OSError, wire.Malformed)  # what a handshake may end in


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[Team]:
    """The team of a command: of one process where there is no place, else of all once they have met.

    At the end process 0 dismisses the others. Nothing of JAX may have run before.

    Raises:
        UserError: the processes could not meet, or one was lost while this one waited or worked.
    """
    if place is None:
        yield ALONE
        return
    if place.device is not None:
        import jax

        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", str(place.device))
    team = _call(place) if place.index else _answer(place)
    done = False
    try:
        yield team
        done = True
    except interrupt.Stopped:
        done = team.problem is None
        if not done:
            raise UserError(team.problem) from None
        raise
    finally:
        team.leave(done)


# process 0


def _answer(place: Place) -> Team:
    """Listens before the meeting, and waits for the others after it."""
    key = secrets.token_bytes(16)
    with listening(place.host, key) as (port, found):
        meet(place, {"port": port, "key": key.hex(), "pid": os.getpid(), "size": place.size})
        return Team(0, place.size, arrived(found, place.size))


@contextlib.contextmanager
def listening(host: str, key: bytes) -> Iterator[tuple[int, "SimpleQueue[tuple[Hello, Connection]]"]]:
    """A port on which whoever knows the key is let in: its number, and the queue of those who came."""
    found: SimpleQueue[tuple[Hello, Connection]] = SimpleQueue()
    closed = threading.Event()
    with _server(host) as server:
        server.settimeout(POLL)  # a thread that waits in accept keeps a port open that was closed
        thread = threading.Thread(target=_accept, args=(server, key, found, closed), daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1], found
        finally:
            closed.set()
            thread.join()


def _server(host: str) -> socket.socket:
    """Listens at the address that the others call, where that is sure to be this host's, elsewhere at all of its own.

    A name that means a loopback address here (Debian's 127.0.1.1) means another one to other hosts.
    """
    addresses: list[str] = []
    with contextlib.suppress(OSError):
        addresses = socket.gethostbyname_ex(host)[2]
    with contextlib.suppress(OSError):  # not this host's own: behind a translated or a virtual address
        if len(addresses) == 1 and (host in (*addresses, "localhost") or not addresses[0].startswith("127.")):
            return socket.create_server((addresses[0], 0))
    return socket.create_server(("", 0))


def _accept(
    server: socket.socket, key: bytes, found: "SimpleQueue[tuple[Hello, Connection]]", closed: threading.Event
) -> None:
    while not closed.is_set():
        with contextlib.suppress(OSError):
            connection = Connection(server.accept()[0].detach())
            threading.Thread(target=_welcome, args=(connection, key, found), daemon=True).start()


def _welcome(connection: Connection, key: bytes, found: "SimpleQueue[tuple[Hello, Connection]]") -> None:
    """Lets in who knows the key and says in time who it is; strangers are turned away, and keep nobody waiting."""
    try:
        with _in_time(connection):
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            hello = wire.receive(connection).open(Hello)
    except STRANGE:
        connection.close()
    else:
        found.put((hello, connection))


@contextlib.contextmanager
def _in_time(connection: Connection) -> Iterator[None]:
    """Hangs up unless what is inside ends in time."""
    timer = threading.Timer(HANDSHAKE, hang_up, (connection,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def arrived(found: "SimpleQueue[tuple[Hello, Connection]]", size: int) -> dict[int, tuple[Hello, Connection]]:
    """All other processes, once they are there.

    Raises:
        UserError: one did not come, or was started as another one.
        Stopped: this process was asked to stop.
    """
    peers: dict[int, tuple[Hello, Connection]] = {}
    end = time.monotonic() + PATIENCE
    while len(peers) < size - 1:
        interrupt.raise_if_stopped()
        if time.monotonic() > end:
            missing = sorted(set(range(1, size)) - set(peers))
            raise UserError(f"processes {missing} did not reach process 0 within {PATIENCE:g} s; see their messages")
        with contextlib.suppress(Empty):
            hello, connection = found.get(timeout=POLL)
            _check_size(hello.index, hello.size, size)
            if hello.index in peers or not 0 < hello.index < size:
                raise UserError(f"{hello} has the number of another process; legal: 1 to {size - 1}, each once")
            peers[hello.index] = (hello, connection)
    return peers


def _check_size(index: int, own: int, wanted: int) -> None:
    if own != wanted:
        what = "start all with the same number of processes (--num_processes)"
        raise UserError(f"process {index} was started as one of {own}, process 0 as one of {wanted}; {what}")


# the others


def _call(place: Place) -> Team:
    """Meets the others, then calls process 0."""
    told = meet(place, {})
    address, key = (place.host, told["port"]), bytes.fromhex(told["key"])
    try:
        connection = Connection(_connected(address))
        with _in_time(connection):
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            wire.send(connection, Hello(place.index, place.size, socket.gethostname(), os.getpid()))
    except STRANGE as error:
        raise UserError(
            f"process {place.index} cannot reach process 0 at {address[0]}, port {address[1]}: {error}; the"
            " hosts must reach each other at any port"
        ) from error
    _check_size(place.index, place.size, told["size"])
    return Team(place.index, place.size, {0: (Hello(0, place.size, place.host, told["pid"]), connection)})


def _connected(address: tuple[str, int]) -> int:
    """The handle of a connection."""
    with socket.create_connection(address, timeout=PATIENCE) as raw:
        raw.settimeout(None)
        return raw.detach()


# the meeting


def meet(place: Place, told: dict) -> dict:
    """What process 0 tells; each process waits until all have heard it.

    Raises:
        UserError: they did not meet, and why.
        Stopped: this process was asked to stop.
    """
    command = [
        sys.executable,
        "-m",
        "lmeraser_jax.training.distributed",
        place.coordinator,
        str(place.size),
        str(place.index),
    ]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environ, **pipes) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(told), file=child.stdin, flush=True)  # left open: the child ends when it closes
                _await(child, place)
                heard = child.stdout.read()
            finally:
                child.kill()  # does nothing once it has ended
        interrupt.raise_if_stopped()
        if child.returncode == 0:
            return json.loads(heard.splitlines()[-1])
        errors.seek(0)
        reason = _reason(errors.read())
    who = f"process {place.index} of {place.size}"
    raise UserError(f"{who} could not meet the others at {place.coordinator}: {reason}")


def _await(child: subprocess.Popen, place: Place) -> None:
    """Waits for the end of a child, not silently and not for ever."""
    start, said = time.monotonic(), False
    who = f"process {place.index}: " if place.index else ""
    while child.poll() is None:
        interrupt.raise_if_stopped()
        waited = time.monotonic() - start
        if waited > MEETING:
            raise UserError(
                f"not all {place.size} processes met at {place.coordinator} within {MEETING:g} s; start them together,"
                f" each with a number of its own from 0 to {place.size - 1}, where they reach that address"
            )
        if waited > SILENCE and not said:
            said = True
            print(f"{who}waiting for all {place.size} processes to meet at {place.coordinator}", file=sys.stderr)
        time.sleep(POLL)


def _reason(text: str) -> str:
    """What JAX says of a failure, without its stack."""
    lines = [line.strip() for line in text.splitlines() if not re.match(r"\s*@ |\*\*\*|\s*$|RPC: ", line)]
    if any("ALREADY_EXISTS" in line for line in lines):
        return "another process has the same number (--process_id)"
    last = lines[-1] if lines else "it ended without a word"
    return re.sub(r"^.*absl::Status: |^[A-Z]\d{4} \S+ +\d+ \S+\] ", "", last)[:300]


def _meeting(coordinator: str, size: int, index: int) -> None:
    """The child: one broadcast from process 0 to all. Reads what is told, prints what was heard (JSON)."""
    told = sys.stdin.readline().strip().encode() if index == 0 else b""
    assert len(told) <= MEETING_BYTES, len(told)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(coordinator, size, index, cluster_detection_method="deactivate")
    row = np.frombuffer(told.ljust(MEETING_BYTES), np.uint8)
    heard = multihost_utils.broadcast_one_to_all(row)
    jax.distributed.shutdown()  # waits for all
    print(np.asarray(heard, np.uint8).tobytes().decode().strip())


def _end_with_parent() -> None:
    """Ends the child when its parent has ended, however: the pipe from it closes."""
    while os.read(sys.stdin.fileno(), 1 << 10):
        pass
    os._exit(1)


if __name__ == "__main__":
    _meeting(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
