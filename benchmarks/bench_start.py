"""How long commands take to start, and what keeping compiled programs saves.

  python benchmarks/bench_start.py [--quick] [--json=FILE]

Medians of commands in processes of their own: --help, inspect, requests, unlearn --defer, and an unlearn of one record
without kept programs, with an empty cache, and with a filled one. --quick: three runs of each.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_unlearn import trained_digits
from reporting import add_json, deliver, surroundings
from synthetic import unsampled

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three runs of each")
    add_json(parser)
    arguments = parser.parse_args()
    times = 3 if arguments.quick else 9
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained_digits(folder / "trained", quick=True)
        with open_run(folder / "trained", write=True) as run:
            (record,) = unsampled(run, 1)
        seconds: dict[str, list[float]] = {}
        for _ in range(times):  # interleaved: other jobs on the machine hit all alike
            for label, command in COMMANDS.items():
                cold = label == "unlearn"
                for kind in ("without_cache", "empty_cache", "filled_cache") if cold else ("",):
                    if kind == "empty_cache":
                        shutil.rmtree(folder / "cache", ignore_errors=True)
                    took = timed(command, folder, record, kind)
                    seconds.setdefault(" ".join(filter(None, (label, kind))), []).append(took)
    medians = {label: round(statistics.median(found), 3) for label, found in seconds.items()}
    result = surroundings("bench_start.py", sys.argv[1:]) | {"seconds": medians}
    deliver(result, arguments.json)


def timed(command: list[str], folder: Path, record: str, cache: str) -> float:
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
