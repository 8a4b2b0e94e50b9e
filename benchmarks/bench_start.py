"""How long commands take to start, and what keeping compiled programs saves.

  python benchmarks/bench_start.py [--quick] [--json=FILE]

Medians of commands in processes of their own: --help, inspect, requests, unlearn --defer, and an unlearn of one record
without kept programs, with an empty cache, and with a filled one. Seconds, and seconds of processor time, which other
jobs on the machine disturb less. --quick: three runs of each.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import deliver, new_parser
from synthetic import unsampled
from workloads import train_digits

from lmeraser_jax.unlearning.run import open_run

COMMANDS = {
    "help": ["--help"],
    "train_help": ["train", "--help"],
    "requests": ["requests", "--workdir={run}"],
    "inspect": ["inspect", "--workdir={run}"],
    "unlearn_defer": ["unlearn", "--defer", "--records={record}", "--workdir={run}"],
    "unlearn": ["unlearn", "--records={record}", "--workdir={run}"],
}


def main() -> None:
    parser = new_parser(__doc__, quick="three runs of each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_digits(folder / "trained", quick=True)
        with open_run(folder / "trained", write=True) as run:
            (record,) = unsampled(run, 1)
        measured: dict[str, list[tuple[float, float]]] = {}
        for _ in range(3 if arguments.quick else 9):  # interleaved: other jobs on the machine hit all alike
            for label, command in COMMANDS.items():
                cold = label == "unlearn"
                for kind in ("without_cache", "empty_cache", "filled_cache") if cold else ("",):
                    if kind == "empty_cache":
                        shutil.rmtree(folder / "cache", ignore_errors=True)
                    took = command_seconds(command, folder, record, kind)
                    measured.setdefault(" ".join(filter(None, (label, kind))), []).append(took)
    medians = {
        name: {label: round(statistics.median(row[i] for row in rows), 3) for label, rows in measured.items()}
        for i, name in enumerate(("seconds", "processor_seconds"))
    }
    deliver("bench_start.py", medians, arguments.json)


def command_seconds(command: list[str], folder: Path, record: str, cache: str) -> tuple[float, float]:
    """Seconds of one command on a copy of the trained workdir, and its processor time."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / "trained", folder / "run")
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled already
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    if cache == "without_cache":
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    words = [word.format(run=folder / "run", record=record) for word in command]
    start, before = time.perf_counter(), processor_seconds()
    subprocess.run(
        [sys.executable, "-m", "lmeraser_jax.cli.main", *words], check=True, capture_output=True, env=environment
    )
    return time.perf_counter() - start, processor_seconds() - before


def processor_seconds() -> float:
    """Of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
