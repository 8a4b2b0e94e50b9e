"""Many processes, on JAX's own runtime: process 0 plans and writes, every process computes on its local devices.

All processes run the same command. Process 0 broadcasts a task and its arrays as bytes (npz, no pickle); each process
does its share (`waves`); `exchange` ends a round and gives every process the results of all. Only process 0 has the
catalog and writes, so a process that wakes up late has nothing to write to.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmeraser_jax.errors import UserError

HEARTBEAT = 10  # seconds without a sign of life after which a process counts as lost
LONGEST_WAIT = 30 * 24 * 3600 * 1000  # milliseconds
WATCH = 1.0  # seconds between two looks at the others
LOST = 2  # exit code
AGAIN = "start the same command again, with any number of processes: it goes on from the slices that are written"
CHOOSING = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")  # of devices
NO_PLUGIN = "it sees none, or the plugin does not load or is not installed (for NVIDIA GPUs: pip install 'jax[cuda13]')"
Arrays = dict[str, np.ndarray]
_ended = threading.Event()
_rounds = itertools.count()


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of a command: its index, and how many there are."""

    index: int = 0
    count: int = 1


ALONE = Processes()


def local_devices() -> list[Any]:
    """The devices of this process. Raises `UserError` where JAX has none: it names what chose them."""
    chosen = {name: os.environ[name] for name in CHOOSING if name in os.environ}
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.disabled = "JAX_PLATFORMS" in chosen  # a plugin that fails is reported with a traceback
    try:
        return jax.local_devices()
    except Exception as error:  # RuntimeError, or AssertionError where there is no plugin or no GPU
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].partition("\n")[0].rstrip(".") or NO_PLUGIN
        names = " ".join(f"{name}={value or repr(value)}" for name, value in chosen.items())
        remedy = f"set JAX_PLATFORMS=cpu alone, or unset {' and '.join(chosen)}, and JAX takes what there is"
        raise UserError(f"{names}: JAX has no such device here: {reason}; {remedy}") from error
    finally:
        logger.disabled = False


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> Processes:
    """Joins the processes of a command. What is None is detected by JAX (Slurm, Open MPI, Kubernetes).

    Raises `UserError` where nothing tells where this process stands, or the others did not come.
    """
    jax.config.update("jax_enable_recoverability", True)  # else JAX aborts before `_watch` can say what to do
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is `interrupt`'s
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        flags = "--coordinator_address=HOST:PORT, --num_processes and --process_id"
        raise UserError(f"the processes cannot meet: {error}; without a scheduler give {flags}") from error
    local_devices()
    processes = Processes(jax.process_index(), jax.process_count())
    if processes.count > 1:
        threading.Thread(target=_watch, args=(processes,), daemon=True).start()
        with _together(), _output_to_errors():  # now: Gloo would not wait for process 0 to import or to pretrain
            multihost_utils.sync_global_devices("start")
    return processes


@contextlib.contextmanager
def _output_to_errors() -> Iterator[None]:
    """Gloo says on standard output that it is connected, where `--json=-` writes its result."""
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _service() -> Any:
    """The client of JAX's coordination service, for which JAX has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def _lost(processes: Processes) -> list[int]:
    """Indices of the processes that the coordination service does not hear any more."""
    indices = list(range(processes.count))
    try:
        return sorted(set(indices) - set(_service().get_live_nodes(indices)))
    except jax.errors.JaxRuntimeError:
        return [0]  # it runs the service


def _watch(processes: Processes) -> None:
    """Ends this process with one line as soon as another one is lost, also while a collective waits for it."""
    while not _ended.wait(WATCH):
        lost = _lost(processes)
        if lost and not _ended.is_set():
            _give_up(f"process {', '.join(map(str, lost))} of {processes.count} was lost")


def _give_up(reason: str) -> NoReturn:
    """Ends this process at once, as a kill would: nothing that it has written depends on it."""
    print(f"error: {reason}; {AGAIN}", file=sys.stderr, flush=True)
    os._exit(LOST)


def broadcast(task: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None):
    """(task, arrays) of process 0, at every process; the others call it without arguments. A task is JSON values."""
    own = _pack({**(arrays or {}), "task": np.array(json.dumps(task))})
    with _together():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
        received = _unpack(np.asarray(multihost_utils.broadcast_one_to_all(_padded(own, size))))
    return json.loads(str(received.pop("task"))), received


def exchange(arrays: Mapping[str, np.ndarray]) -> list[Arrays]:
    """Gives every process the arrays of all, in the order of the processes. It ends a round of work."""
    own = _pack(arrays)
    with _together():
        sizes = multihost_utils.process_allgather(np.int32(len(own)))
        gathered = np.asarray(multihost_utils.process_allgather(_padded(own, int(np.max(sizes)))))
    return [_unpack(raw) for raw in gathered]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Waits for all processes, then runs a collective; one that fails means that a process is lost."""
    try:  # a collective alone waits half an hour at most for a process that imports, pretrains or tunes
        _service().wait_at_barrier(f"lmeraser_jax/{next(_rounds)}", LONGEST_WAIT)
        with jax.transfer_guard("allow"):  # a collective moves arrays of the host to the devices
            yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        _give_up(f"a process was lost ({str(error).splitlines()[0][:200]})")


def _pack(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _unpack(raw: np.ndarray) -> Arrays:
    size = int(raw[:8].view(np.int64)[0])
    with np.load(io.BytesIO(raw[8 : 8 + size].tobytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _padded(raw: np.ndarray, size: int) -> np.ndarray:
    """The bytes behind their number, up to a power of two: messages of nearly one size share a compiled collective."""
    padded = np.zeros(1 << (8 + size - 1).bit_length(), np.uint8)
    padded[:8] = np.array([len(raw)], np.int64).view(np.uint8)
    padded[8 : 8 + len(raw)] = raw[: len(padded) - 8]  # what the others pass to a broadcast counts for nothing
    return padded


def end(processes: Processes) -> None:
    """Ends the command: process 0 tells the others, all wait until every process knows it, process 0 leaves last."""
    if processes.index == 0:
        broadcast({"name": "end"})
    _ended.set()
    with _together():
        multihost_utils.sync_global_devices("end")
    deadline = time.monotonic() + HEARTBEAT
    while processes.index == 0 and len(_lost(processes)) < processes.count - 1 and time.monotonic() < deadline:
        time.sleep(0.05)  # leaving before them would abort them: it runs JAX's coordination service
    jax.distributed.shutdown()
