"""Commands run in several real processes on loopback."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helpers import SMALL, small_config, small_run

from lmeraser_jax.data import load

CONFIG = small_config(data__train_limit=100, data__test_limit=20, tuning__scan_steps=1)
SETTINGS = {**SMALL, "data": SMALL["data"] | {"train_limit": 100, "test_limit": 20}}
SETTINGS["tuning"] = SMALL["tuning"] | {"scan_steps": 1}
FLAGS = [f"--config.{group}.{name}={value}" for group, values in SETTINGS.items() for name, value in values.items()]
HELPER = Path(__file__).with_name("team_process.py")


@dataclasses.dataclass(frozen=True)
class Blow:
    """A signal that a process sends itself at its so-manieth slice, "after" or "during" its writing."""

    victim: int = -1
    number: int = 0
    at: int = 0
    moment: str = "after"

    def words(self, index: int) -> list[str]:
        return [str(self.number), str(self.at), self.moment] if index == self.victim else ["0", "0", "after"]


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


def plain_environ() -> dict[str, str]:
    """No scheduler's variables; the CPU."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "JAX_NUM"))}
    return environ | {"JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def started(folder: Path, command: list[str], count: int, blow: Blow = Blow()) -> Iterator[list[subprocess.Popen]]:
    """The processes of a command; their output goes to files in the folder, and none outlives the context."""
    folder.mkdir(exist_ok=True)
    where = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    processes = []
    with contextlib.ExitStack() as stack:
        for index in range(count):
            (folder / f"notes-{index}").unlink(missing_ok=True)
            line = [sys.executable, str(HELPER), str(folder / f"notes-{index}"), *blow.words(index)]
            line += [*command, *where, f"--process_id={index}"]
            out, err = (stack.enter_context(open(folder / f"{kind}-{index}", "w")) for kind in ("out", "err"))
            process = subprocess.Popen(line, stdout=out, stderr=err, env=plain_environ())
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield processes


def together(folder: Path, command: list[str], count: int, blow: Blow = Blow()) -> list[Ended]:
    """Runs a command in so many processes to its end; one may get a signal."""
    start, ends = time.monotonic(), {}
    with started(folder, command, count, blow) as processes:
        while len(ends) < count:
            for index, process in enumerate(processes):
                if index not in ends and process.poll() is not None:
                    ends[index] = time.monotonic() - start
            assert time.monotonic() - start < 240, f"only {sorted(ends)} have ended"
            time.sleep(0.05)
    return [_ended(folder, index, process.returncode, ends[index]) for index, process in enumerate(processes)]


def _ended(folder: Path, index: int, code: int, seconds: float) -> Ended:
    out, err, notes = (folder / f"{kind}-{index}" for kind in ("out", "err", "notes"))
    slices = notes.read_text().split() if notes.exists() else []
    return Ended(code, out.read_text(), err.read_text(), slices, seconds)


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def own_run(folder: Path):
    """The workdir opened in this process, on one device."""
    return small_run(folder, load.load(CONFIG.data), CONFIG)
