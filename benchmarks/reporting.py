"""What all benchmarks say about themselves: a flag for a file, the machine, and the file in the end."""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json=FILE; a file that cannot be written is refused before anything is measured."""
    parser.add_argument("--json", default="", type=_writable, help="file for the numbers")


def _writable(path: str) -> str:
    try:
        if path:  # argparse hands over the default too
            open(path, "ab").close()
        return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from None


def deliver(result: dict[str, Any], path: str) -> None:
    """Prints a result, and writes it where a file is asked for."""
    print(json.dumps(result, indent=2))
    store(result, path)


def store(result: dict[str, Any], path: str) -> None:
    """Writes a result where a file is asked for."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def surroundings(script: str, arguments: list[str]) -> dict:
    """What a result depends on beside the code."""
    import jax  # not above: bench_import measures processes that must do without

    return {
        "command": f"python benchmarks/{script} {' '.join(arguments)}".strip(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": [round(x, 1) for x in os.getloadavg()],  # also of other people's jobs
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the working tree, with a + where it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
        status = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.strip() + ("+" if status.strip() else "")


def spread(seconds: list[float]) -> dict:
    """Median, 99th percentile and worst, in milliseconds."""
    values = np.array(seconds) * 1e3
    return {
        "count": len(values),
        "median_ms": round(float(np.median(values)), 3),
        "p99_ms": round(float(np.percentile(values, 99)), 3),
        "worst_ms": round(float(values.max()), 3),
    }
