"""Seconds and images of an erasure: one record, unsampled and sampled, and batches of 10, 100 and 1,000.

  python benchmarks/bench_unlearn.py [--workdir=DIR] [--quick] [--json=FILE]

Each request is served on a copy of a trained workdir (scikit-learn's digits where none is given), warm: in a process
that has served one before, so that nothing is compiled; and once cold: by the command, in a process of its own.
Seconds are split into opening the workdir, planning, compiling, tuning, writing, publishing, purging. Beside
it what other methods process, in images: tuning all clusters again, one prompt and head for everything, SISA with ten
shards (expected). Batches larger than half of the records are left out. --quick: few epochs, one repetition.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from synthetic import surroundings, unsampled

from lmeraser_jax import config, making, reconcile, shares, unlearning
from lmeraser_jax.run import opened, prepared

SHARDS = 10
PARTS = {
    "plan": (reconcile, "plan"),
    "write": (shares, "_written"),
    "register": (reconcile, "_keep"),
    "publish": (reconcile, "_publish"),
    "purge": (reconcile, "purge"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="a trained workdir; it is copied")
    parser.add_argument("--quick", action="store_true", help="few epochs, one repetition")
    parser.add_argument("--json", default="", help="file for the numbers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(arguments.workdir or Path(folder) / "trained")
        if not arguments.workdir:
            train(workdir, arguments.quick)
        result = surroundings("bench_unlearn.py", sys.argv[1:]) | measured(workdir, Path(folder), arguments.quick)
    print(json.dumps(result, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def train(workdir: Path, quick: bool) -> None:
    settings = {"tuning": {"epochs": 4}, "pretraining": {"epochs": 8}} if quick else {}
    with prepared(workdir, config.from_dict(settings)) as (run, _):
        reconcile.reconcile(run)


def measured(workdir: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """All requests, each on a copy of the workdir."""
    clock = Clock()
    with opened(workdir, write=True) as run:
        count, epochs = run.catalog.counts()["train"], run.config.tuning.epochs
        k = run.config.clustering
        sampled = [run.catalog.sample("train", k.sample_size).ids[0]] if k.sample_from == "private" else []
        sizes = [size for size in (1, 10, 100, 1000) if 2 * size <= count]
        requests = {f"unsampled_{size}": unsampled(run, size, seed=size) for size in sizes}
        requests |= {"sampled_1": sampled} if sampled else {}
    serve(workdir, folder, requests["unsampled_1"], clock)  # compiles
    warm = {}
    for name, ids in requests.items():
        found = [serve(workdir, folder, ids, clock) for _ in range(1 if quick or len(ids) > 10 else 3)]
        warm[name] = {part: statistics.median(one[part] for one in found) for part in found[0]}
        warm[name]["in_program"] = round(warm[name]["tune"] / warm[name]["total"], 3)  # opening the workdir counted
        print(name, json.dumps(warm[name]), file=sys.stderr, flush=True)
    others = {
        "full_retune": warm["unsampled_1"]["images_full"],
        "one_prompt": epochs * (count - 1),
        f"sisa_{SHARDS}_shards": round(epochs * (count / SHARDS - 1)),
    }
    cold = command(workdir, folder, requests["unsampled_1"])
    return {"records": count, "epochs": epochs, "warm": warm, "cold_unsampled_1": cold, "images_of_others": others}


def serve(workdir: Path, folder: Path, ids: list[str], clock: "Clock") -> dict[str, float]:
    """Serves one request on a copy: seconds of each part, images."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy)
    clock.reset()
    start = time.perf_counter()
    with opened(copy, write=True) as run:
        jax.block_until_ready(run.backbone.params)
        clock.seconds["open"] = time.perf_counter() - start
        outcome = unlearning.request_erasure(run, ids).outcome
    assert outcome is not None
    total = {"total": time.perf_counter() - start}
    images = {"images": outcome.images, "images_full": outcome.images_full, "clusters": outcome.retuned}
    return {name: round(value, 4) for name, value in (clock.seconds | total).items()} | images


def command(workdir: Path, folder: Path, ids: list[str]) -> dict[str, float]:
    """Seconds of `lmeraser unlearn` in a process of its own, twice: the second finds compiled programs on disk."""
    found = []
    for _ in range(2):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(workdir, copy)
        call = [sys.executable, "-m", "lmeraser_jax.cli.main", "unlearn", f"--workdir={copy}", f"--records={ids[0]}"]
        start = time.perf_counter()
        subprocess.run(call, check=True, capture_output=True)
        found.append(round(time.perf_counter() - start, 2))
    return {"first": found[0], "second": found[1]}


class Clock:
    """Seconds spent in the parts of a reconcile; compiling is also part of whatever called for it."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.reset()
        for name, (module, function) in PARTS.items():
            setattr(module, function, self._timed(name, getattr(module, function)))
        making.tune = self._stepped(making.tune)
        monitoring.register_event_duration_secs_listener(self._compiled)

    def reset(self) -> None:
        self.seconds = dict.fromkeys(("open", *PARTS, "tune", "compile"), 0.0)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return wrapper

    def _stepped(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """What a generator takes, without what is done with the things it yields."""

        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            start, inner = time.perf_counter(), function(*args, **kwargs)
            for one in inner:
                self.seconds["tune"] += time.perf_counter() - start
                yield one
                start = time.perf_counter()
            self.seconds["tune"] += time.perf_counter() - start

        return wrapper

    def _compiled(self, event: str, seconds: float, **_: Any) -> None:
        if "compile" in event:
            self.seconds["compile"] += seconds


if __name__ == "__main__":
    main()
