"""What all benchmarks share: flags, clocks, what they say about the machine, and the file in the end."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def new_parser(description: str | None, quick: str = "") -> argparse.ArgumentParser:
    """A parser with --json=FILE, refused before anything is measured if it cannot be written, and with --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", type=_writable, help="file for the numbers")
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def _writable(path: str) -> str:
    try:
        if path:  # argparse hands over the default too
            open(path, "ab").close()
        return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from None


def deliver(script: str, result: dict[str, Any], path: str) -> None:
    """Prints a result with its surroundings, and writes it where a file is asked for."""
    result = surroundings(script) | result
    print(json.dumps(result, indent=2))
    store(result, path)


def store(result: dict[str, Any], path: str) -> None:
    """Writes a result where a file is asked for."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def log(values: object) -> None:
    """Numbers on standard error, as they come."""
    print(json.dumps(values), file=sys.stderr, flush=True)


def surroundings(script: str) -> dict[str, Any]:
    """What a result depends on beside the code."""
    import jax  # not above: bench_import measures processes that must do without

    return {
        "command": f"python benchmarks/{script} {' '.join(sys.argv[1:])}".strip(),
        "device": jax.devices()[0].device_kind,
        "machine": machine(),
        "load_average": [round(x, 1) for x in os.getloadavg()],  # of other jobs too
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "commit": commit(),
    }


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of the working tree, with a + where it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
        status = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.strip() + ("+" if status.strip() else "")


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and worst, in milliseconds."""
    values = np.array(seconds) * 1e3
    return {
        "count": len(values),
        "median_ms": round(float(np.median(values)), 3),
        "p99_ms": round(float(np.percentile(values, 99)), 3),
        "worst_ms": round(float(values.max()), 3),
    }


def timed(function: Callable[..., Any], *args: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def interleaved(methods: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each method in each round, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, run in methods.items():
            took = timed(run)
            if number:
                seconds[name].append(took)
    return seconds


def rates_and_ratios(seconds: Mapping[str, list[float]], amount: int) -> tuple[dict[str, float], dict[str, float]]:
    """Amount per second of each side; seconds of the others over ours in the same round: above 1, ours is faster."""
    rates = {name: round(amount / statistics.median(times), 2) for name, times in seconds.items()}
    ratios = {
        name: round(statistics.median(b / a for a, b in zip(seconds["ours"], times, strict=True)), 3)
        for name, times in seconds.items()
        if name != "ours"
    }
    return rates, ratios


class Clock:
    """Seconds spent in functions, each replaced where it is looked up: {name: (owner, attribute)}."""

    def __init__(self, functions: Mapping[str, tuple[Any, str]]):
        self.seconds = dict.fromkeys(functions, 0.0)
        for name, (owner, attribute) in functions.items():
            setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def reset(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return wrapper
