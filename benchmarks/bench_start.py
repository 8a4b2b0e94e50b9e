"""How long commands take to start, and what keeping compiled programs saves.

  python benchmarks/bench_start.py [--quick] [--json=FILE]

Medians of commands in processes of their own: --help, inspect, requests, unlearn --defer, and an unlearn of one record
without kept programs, with an empty cache, and with a filled one. --quick: three runs of each.
"""

import os
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
        seconds: dict[str, list[float]] = {}
        for _ in range(3 if arguments.quick else 9):  # interleaved: other jobs on the machine hit all alike
            for label, command in COMMANDS.items():
                cold = label == "unlearn"
                for kind in ("without_cache", "empty_cache", "filled_cache") if cold else ("",):
                    if kind == "empty_cache":
                        shutil.rmtree(folder / "cache", ignore_errors=True)
                    took = command_seconds(command, folder, record, kind)
                    seconds.setdefault(" ".join(filter(None, (label, kind))), []).append(took)
    medians = {label: round(statistics.median(times), 3) for label, times in seconds.items()}
    deliver("bench_start.py", {"seconds": medians}, arguments.json)


def command_seconds(command: list[str], folder: Path, record: str, cache: str) -> float:
    """Seconds of one command on a copy of the trained workdir."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / "trained", folder / "run")
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    if cache == "without_cache":
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    words = [word.format(run=folder / "run", record=record) for word in command]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "lmeraser_jax.cli.main", *words], check=True, capture_output=True, env=environment
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
