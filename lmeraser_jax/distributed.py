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
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, SimpleQueue

from lmeraser_jax import stopping, wire
from lmeraser_jax.errors import UserError
from lmeraser_jax.places import Place
from lmeraser_jax.team import ALONE, Hello, Team

MEETING_BYTES = 256  # of what process 0 tells the others
POLL = 0.2  # seconds
PATIENCE = 60.0  # seconds for all to connect, once all have met


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
    team = _connect(place)
    done = False
    try:
        yield team
        done = True
    except stopping.Stopped:
        done = team.problem is None
        if not done:
            raise UserError(team.problem) from None
        raise
    finally:
        team.leave(done)


def _connect(place: Place) -> Team:
    """Process 0 listens before the meeting, the others call it after."""
    if place.index:
        told = _meet(place, {})
        address = (place.host, told["port"])
        try:
            connection = Client(address, authkey=bytes.fromhex(told["key"]))
            wire.send(connection, Hello(place.index, socket.gethostname(), os.getpid()))
        except (OSError, EOFError, AuthenticationError) as error:
            raise UserError(
                f"process {place.index} cannot reach process 0 at {address[0]}, port {address[1]}: {error}; the"
                " hosts must reach each other at any port"
            ) from error
        return Team(place.index, place.size, {0: (Hello(0, place.host, told["pid"]), connection)})
    key = secrets.token_hex(16)
    own = place.host in ("localhost", "127.0.0.1")
    with Listener(("127.0.0.1" if own else "", 0), backlog=place.size, authkey=bytes.fromhex(key)) as listener:
        found: SimpleQueue[tuple[Hello, Connection]] = SimpleQueue()
        closed = threading.Event()
        threading.Thread(target=_accept, args=(listener, found, closed), daemon=True).start()
        try:
            _meet(place, {"port": listener.address[1], "key": key, "pid": os.getpid()})
            peers = _arrived(found, place.size)
        finally:
            closed.set()
    return Team(0, place.size, peers)


def _accept(listener: Listener, found: "SimpleQueue[tuple[Hello, Connection]]", closed: threading.Event) -> None:
    """Lets in whoever knows the key; strangers are turned away."""
    while not closed.is_set():
        with contextlib.suppress(AuthenticationError, EOFError, OSError, wire.Malformed):
            connection = listener.accept()
            found.put((wire.receive(connection).open(Hello), connection))


def _arrived(found: "SimpleQueue[tuple[Hello, Connection]]", size: int) -> dict[int, tuple[Hello, Connection]]:
    peers: dict[int, tuple[Hello, Connection]] = {}
    end = time.monotonic() + PATIENCE
    while len(peers) < size - 1:
        stopping.check()
        if time.monotonic() > end:
            missing = sorted(set(range(1, size)) - set(peers))
            raise UserError(f"processes {missing} did not reach process 0 within {PATIENCE:g} s; see their messages")
        with contextlib.suppress(Empty):
            hello, connection = found.get(timeout=POLL)
            peers[hello.index] = (hello, connection)
    return peers


def _meet(place: Place, told: dict) -> dict:
    """What process 0 tells; each process waits until all have heard it. Its errors go to standard error as they are."""
    command = [sys.executable, "-m", "lmeraser_jax.distributed", place.coordinator, str(place.size), str(place.index)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    given: str | None = json.dumps(told)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as child:
        try:
            while True:
                try:
                    out, _ = child.communicate(given, timeout=POLL)
                    break
                except subprocess.TimeoutExpired:
                    given = None  # it was handed over by the first call
                    stopping.check()
        finally:
            child.kill()  # does nothing once it has ended
    stopping.check()
    if child.returncode:
        raise UserError(
            f"process {place.index} of {place.size} could not meet the others at {place.coordinator} (see above)"
        )
    return json.loads(out.splitlines()[-1])


def _meeting(coordinator: str, size: int, index: int) -> None:
    """The child: one broadcast from process 0 to all. Reads what is told, prints what was heard (JSON)."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    told = sys.stdin.read().encode() if index == 0 else b""
    assert len(told) <= MEETING_BYTES, len(told)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(coordinator, size, index, cluster_detection_method="deactivate")
    row = np.frombuffer(told.ljust(MEETING_BYTES), np.uint8)
    heard = multihost_utils.broadcast_one_to_all(row)
    jax.distributed.shutdown()  # waits for all
    print(np.asarray(heard, np.uint8).tobytes().decode().strip())


if __name__ == "__main__":
    _meeting(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
