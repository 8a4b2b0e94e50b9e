"""Seconds and images of an erasure: one record, unsampled and sampled, and batches of 10, 100 and 1,000.

  python benchmarks/bench_unlearn.py [--data=FILE.npz --weights=FILE | --workdir=DIR] [--quick] [--json=FILE]

Data: scikit-learn's digits with their backbone, or 4,000 images of an .npz at 32 px with published weights, or a
trained workdir. Each request is served on a copy, warm: in a process that has served one before, so that nothing is
compiled; and once cold, in processes of their own, the first without and the second with compiled programs on disk.
Seconds are split into opening the workdir, planning, compiling, tuning, writing, publishing, purging. Beside it one
record under other methods: one prompt and head for everything, SISA with ten shards, the whole network, heads on
features. Batches larger than half of the records are left out. --quick: few epochs, one repetition.
"""

import argparse
import json
import os
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
from reporting import Clock, deliver, log, new_parser
from synthetic import unsampled
from workloads import QUICK

from lmeraser_jax import config
from lmeraser_jax.experiments import methods
from lmeraser_jax.training import slice_files
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.unlearning import build, erase
from lmeraser_jax.unlearning.run import open_run, prepare_run

OTHERS = ("single", "sisa-mean", "retrain", "linear-head", "ridge")
STEPS = {
    "plan": (build, "current_plan"),
    "write": (slice_files, "write_slice"),
    "register": (build, "register"),
    "publish": (build, "publish"),
    "purge": (build, "purge"),
}


def main() -> None:
    parser = new_parser(__doc__, quick="few epochs, one repetition")
    parser.add_argument("--workdir", default="", help="a trained workdir; it is copied")
    parser.add_argument("--data", default="", help="an .npz, in place of the digits")
    parser.add_argument("--weights", default="", help="the backbone for --data")
    parser.add_argument("--cold", nargs=2, default=None, help="used by the script itself: a workdir and a record")
    arguments = parser.parse_args()
    if arguments.cold:
        print(json.dumps(serve(Path(arguments.cold[0]), [arguments.cold[1]], BuildClock())))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), None
        workdir = Path(arguments.workdir or folder / "trained")
        if not arguments.workdir:
            base = folder / "base"
            with prepare_run(base, settings_of(arguments)) as (run, _):
                run.features(run.catalog.live("train"))
            train_copy(base, workdir, settings_of(arguments))
        result = measured(workdir, folder, arguments.quick)
        if base is not None:
            settings = settings_of(arguments)
            result["others"] = {
                name: other(base, folder / name, methods.METHODS[name].configure(settings)) for name in OTHERS
            }
    deliver("bench_unlearn.py", result, arguments.json)


def settings_of(arguments: argparse.Namespace) -> config.Config:
    """The digits as they are, or an .npz in clusters of about a hundred."""
    tree: dict[str, dict] = dict(QUICK) if arguments.quick else {}
    if arguments.data:
        limits = {"train_limit": 4000, "test_limit": 100}
        tree["data"] = {"source": "npz", "path": arguments.data, "image_size": 32} | limits
        tree["backbone"] = {"weights": arguments.weights, "heads": 3}
        tree["clustering"] = {"sample_size": 400, "cut": "auto:40", "max_members": 20, "min_members": 4}
        tree["tuning"] = {"epochs": 2 if arguments.quick else 10}
    return config.from_dict(tree)


def train_copy(base: Path, workdir: Path, settings: config.Config) -> None:
    shutil.copytree(base, workdir)
    with prepare_run(workdir, settings) as (run, _):
        build.build(run)


def other(base: Path, workdir: Path, settings: config.Config) -> dict[str, float]:
    """Another method: everything tuned, in a process that has tuned before, and one record erased."""
    for _ in range(2):  # the first compiles
        shutil.rmtree(workdir, ignore_errors=True)
        train_copy(base, workdir, settings)
    with open_run(workdir, write=True) as run:
        rows = run.catalog.slices().values()
        outcome = erase.request_erasure(run, unsampled(run, 1, seed=1)).outcome
    assert outcome is not None
    full = {"full_seconds": round(sum(row.seconds for row in rows), 3), "images_full": sum(row.images for row in rows)}
    return full | {"seconds": round(outcome.seconds, 3), "images": outcome.images}


def measured(workdir: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """All requests, each on a copy of the workdir."""
    clock = BuildClock()
    with open_run(workdir, write=True) as run:
        count, epochs = run.catalog.counts()["train"], run.config.tuning.epochs
        k = run.config.clustering
        sampled = [run.catalog.sample("train", k.sample_size).ids[0]] if k.sample_from == "private" else []
        sizes = [size for size in (1, 10, 100, 1000) if 2 * size <= count]
        requests = {f"unsampled_{size}": unsampled(run, size, seed=size) for size in sizes}
        requests |= {"sampled_1": sampled} if sampled else {}
    serve(workdir, requests["unsampled_1"], clock)  # compiles
    warm = {}
    for name, ids in requests.items():
        served = [serve(workdir, ids, clock) for _ in range(1 if quick or len(ids) > 10 else 3)]
        warm[name] = {step: statistics.median(seconds[step] for seconds in served) for step in served[0]}
        warm[name]["in_program"] = round(warm[name]["tune"] / warm[name]["total"], 3)  # opening the workdir counted
        log({name: warm[name]})
    cold = command(workdir, folder, requests["unsampled_1"][0])
    return {"records": count, "epochs": epochs, "warm": warm, "cold_unsampled_1": cold}


def serve(workdir: Path, ids: list[str], clock: "BuildClock") -> dict[str, float]:
    """Serves one request on a copy: seconds of each part, images."""
    with tempfile.TemporaryDirectory() as folder:
        return _served(shutil.copytree(workdir, Path(folder) / "copy"), ids, clock)


def _served(copy: Path, ids: list[str], clock: "BuildClock") -> dict[str, float]:
    clock.reset()
    start = time.perf_counter()
    with open_run(copy, write=True) as run:
        jax.block_until_ready(run.backbone.params)
        clock.seconds["open"] = time.perf_counter() - start
        outcome = erase.request_erasure(run, ids).outcome
    assert outcome is not None
    total = {"total": time.perf_counter() - start}
    images = {"images": outcome.images, "images_full": outcome.images_full, "clusters": outcome.retuned}
    return {name: round(value, 4) for name, value in (clock.seconds | total).items()} | images


def command(workdir: Path, folder: Path, name: str) -> list[dict[str, float]]:
    """One record in processes of their own: seconds from start to end, and of each part. The second finds programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    runs = []
    for _ in range(2):
        start = time.perf_counter()
        call = [sys.executable, __file__, "--cold", str(workdir), name]
        done = subprocess.run(call, check=True, capture_output=True, text=True, env=os.environ | cache)
        runs.append(json.loads(done.stdout) | {"process": round(time.perf_counter() - start, 2)})
    return runs


class BuildClock(Clock):
    """Seconds spent in the steps of a build; compiling also counts in the step that needed it."""

    def __init__(self):
        super().__init__(STEPS)
        tune_module.make_slices = self._timed_generator(tune_module.make_slices)
        monitoring.register_event_duration_secs_listener(self._compiled)

    def reset(self) -> None:
        self.seconds = dict.fromkeys(("open", *STEPS, "tune", "compile"), 0.0)

    def _timed_generator(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """What a generator takes, without what is done with the things it yields."""

        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            start, results = time.perf_counter(), function(*args, **kwargs)
            for result in results:
                self.seconds["tune"] += time.perf_counter() - start
                yield result
                start = time.perf_counter()
            self.seconds["tune"] += time.perf_counter() - start

        return wrapper

    def _compiled(self, event: str, seconds: float, **_: Any) -> None:
        if "compile" in event:
            self.seconds["compile"] += seconds


if __name__ == "__main__":
    main()
