"""Several hosts: who takes part in a command, and how its processes find each other.

`detect` reads flags and variables. `joined` lets the processes meet through `jax.distributed` and leaves them with a
`Team`. They meet in a child process on the CPU (this module, run as a program): JAX stays distributed only until every
process knows where process 0 listens, and a shared key. The processes that work are ordinary ones with the devices of
their host. So bits cannot depend on the number of processes, checkpoints are written as ever, and a lost process is
a message: JAX's coordination service would abort the survivors in the middle of their work.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, SimpleQueue

from lmeraser_jax import stopping, wire
from lmeraser_jax.errors import UserError
from lmeraser_jax.team import ALONE, Hello, Team

PORTS = 4096  # above 61439, as JAX picks them: a port for each Slurm or Open MPI job
MEETING_BYTES = 256  # of what process 0 tells the others
POLL = 0.2  # seconds
PATIENCE = 60.0  # seconds for all to connect, once all have met


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among several.

    Attributes:
        coordinator: HOST:PORT of process 0, where the processes meet.
        size: number of processes, more than one.
        index: own number.
        device: the one GPU of its host that this process uses; None: all.
    """

    coordinator: str
    size: int
    index: int
    device: int | None = None

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")


def detect(
    environ: Mapping[str, str], coordinator: str = "", size: int | None = None, index: int | None = None
) -> Place | None:
    """This process's place among several, or None where it is the only one.

    Flags come first, then Open MPI (whose processes may run inside a Slurm job), Slurm and Kubernetes.

    Args:
        environ: the environment's variables.
        coordinator, size, index: the flags --coordinator_address, --num_processes and --process_id.

    Raises:
        UserError: flags or variables that are half set or impossible.
    """
    flags = {"--coordinator_address": coordinator or None, "--num_processes": size, "--process_id": index}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) < len(flags):
        if missing:
            raise UserError(f"{', '.join(missing)} missing: {', '.join(flags)} are given together, or none of them")
        return _place(coordinator, str(size), str(index), None, "--coordinator_address, --num_processes, --process_id")
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return _open_mpi(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return _slurm(environ)
    if "JOB_COMPLETION_INDEX" in environ:
        return _kubernetes(environ)
    return None


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    """mpirun's own host is the first one, as JAX takes it too: `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`."""
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]:]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found:
        raise UserError(
            "Open MPI started several processes but does not say where (OMPI_MCA_orte_hnp_uri); give each of them"
            " --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        )
    port = 65536 - PORTS + int(found[1]) // PORTS % PORTS
    crowded = int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"]) > 1
    device = _device(environ, environ["OMPI_COMM_WORLD_LOCAL_RANK"]) if crowded else None
    names = (environ["OMPI_COMM_WORLD_SIZE"], environ["OMPI_COMM_WORLD_RANK"])
    return _place(f"{found[2]}:{port}", *names, device, "Open MPI's variables")


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """The first of `node[001,007-015],other` is where process 0 runs."""
    nodes = environ["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    assert first, nodes
    port = 65536 - PORTS + int(environ["SLURM_JOB_ID"]) % PORTS
    crowded = int(environ["SLURM_STEP_NUM_TASKS"]) > int(environ["SLURM_STEP_NUM_NODES"])
    device = _device(environ, environ["SLURM_LOCALID"]) if crowded else None
    names = (environ["SLURM_STEP_NUM_TASKS"], environ["SLURM_PROCID"])
    return _place(f"{first[1]}{first[2] or ''}:{port}", *names, device, "Slurm's variables")


def _device(environ: Mapping[str, str], local: str) -> str | None:
    """Processes of one host take a GPU each, unless the scheduler shows each of them only one."""
    return local if "," in environ.get("CUDA_VISIBLE_DEVICES", ",") else None


def _kubernetes(environ: Mapping[str, str]) -> Place | None:
    """Pods of an indexed job know their index; where pod 0 is and how many there are the manifest has to say."""
    needed = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
    missing = [name for name in needed if not environ.get(name)]
    if len(missing) == len(needed):
        return None  # an indexed job of independent pods
    if missing:
        raise UserError(f"{missing[0]} is not set; launch/k8s_jobset.yaml sets {' and '.join(needed)} in each pod")
    address, count = (environ[name] for name in needed)
    return _place(address, count, environ["JOB_COMPLETION_INDEX"], None, f"{needed[0]}, {needed[1]}, index of the pod")


def _place(coordinator: str, size: str, index: str, device: str | None, source: str) -> Place | None:
    """The place, checked; None where there is one process only."""
    given = f"{source}: {coordinator}, {size}, {index}"
    if not re.fullmatch(r"(?:[^\s:\[\]]+|\[[^\s\]]+\]):\d{1,5}", coordinator):
        raise UserError(f"{given}: the address must be HOST:PORT")
    if not (size.isdecimal() and index.isdecimal() and int(index) < int(size)):
        raise UserError(f"{given}: the number of processes must be at least 1, the index 0 to that number less 1")
    if int(size) == 1:
        return None
    return Place(coordinator, int(size), int(index), None if device is None else int(device))


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
