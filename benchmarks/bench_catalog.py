"""What the catalog costs with a million records: opening, accepting, planning, publishing, purging; and its size.

  python benchmarks/bench_catalog.py [--quick] [--growth] [--keep=DIR] [--json=FILE]

Records, sizes and features are made up (see synthetic.py); tables, clustering file and slice folders are real.
Serving is measured without its device work: tuning is replaced by writing the checkpoints that it would write.
--quick: 100,000 records in 200 clusters.
--growth: what a request for one unsampled record costs with ten thousand to ten million records (--quick: to a hundred
thousand), always 500 in a cluster; each number of records in a process of its own, for its peak memory. Then the peak
memory of train, unlearn, evaluate and predict on tiny random images.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import synthetic
from PIL import Image
from reporting import Clock, deliver, log, new_parser, spread, timed

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.atomic_files import disk_use
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.training.slices import init_slice
from lmeraser_jax.training.tune import Tuned
from lmeraser_jax.unlearning import build, plan, publish, purge, receipts
from lmeraser_jax.unlearning.run import Run, open_run

TIMES = 5  # of what is measured more than once
CLUSTER = 500  # records in each cluster where the growth is measured
IMAGES = (10_000, 40_000, 160_000)  # of which commands are measured


def main() -> None:
    parser = new_parser(__doc__, quick="a tenth of everything")
    parser.add_argument("--keep", default="", help="folder that keeps synthetic workdirs; copies are measured")
    parser.add_argument("--growth", action="store_true", help="the cost of one request at several numbers of records")
    parser.add_argument("--records", type=int, default=0, help="used by the script itself: one number of records")
    parser.add_argument("--folder", default="", help="used by the script itself: where their workdir is, or goes")
    arguments = parser.parse_args()
    if arguments.records:
        return print(json.dumps(one_request(arguments.records, Path(arguments.folder))))
    if arguments.growth:
        sizes = [10**power for power in range(4, 6 if arguments.quick else 8)]
        result = {"records_in_a_cluster": CLUSTER, "growth": [in_process_of_its_own(size) for size in sizes]}
        result["commands"] = [commands(images) for images in IMAGES[: 1 if arguments.quick else None]]
        return deliver("bench_catalog.py", result, arguments.json)
    records, clusters, sample = (100_000, 200, 1_000) if arguments.quick else (1_000_000, 2_000, 10_000)
    result: dict[str, Any] = {"records": records, "clusters": clusters, "sample": sample}
    with tempfile.TemporaryDirectory() as folder:
        synthetic.copy(Path(folder) / "run", arguments.keep, records, clusters, sample)
        result["catalog_mb"] = round((Path(folder) / "run" / "catalog.db").stat().st_size / 1e6, 1)
        result |= private(Path(folder) / "run")
    with tempfile.TemporaryDirectory() as folder:
        synthetic.copy(Path(folder) / "run", arguments.keep, records, clusters, sample, "public")
        result |= public(Path(folder) / "run")
    deliver("bench_catalog.py", result, arguments.json)


def private(workdir: Path) -> dict[str, Any]:
    """Everything with the sample among the private records."""
    result: dict[str, Any] = {"open": spread([opening(workdir) for _ in range(TIMES)])}
    with open_run(workdir, devices=jax.devices()[:1], write=True) as run:
        names = synthetic.unsampled(run, 1_200)
        few, many = names[:200], names[200:]
        log(result)
        result["plan_1000_to_come"] = repeated(lambda: plan.current_plan(run, many))
        sampled = run.catalog.sample("train", run.config.clustering.sample_size).ids[0]
        log(result)
        result["plan_1000_with_a_sampled_record"] = repeated(lambda: plan.current_plan(run, [*many[1:], sampled]))
        log(result)
        result["accept_1"] = spread([accepting(run, [name], False) for name in few[:100]])
        result["accept_1_quarantine"] = spread([accepting(run, [name], True) for name in few[100:]])
        result["resolve_1000_ms"] = round(1e3 * timed(lambda: requests.resolve(run.catalog, many)), 1)
        result["accept_1000_ms"] = round(1e3 * accepting(run, many, True), 1)
        log(result)
        result["plan_1200_accepted"] = repeated(lambda: plan.current_plan(run))
        log(result)
        result["serve_1200"] = serving(run)
        result["catalog_after_mb"] = round(disk_use(run.layout.catalog) / 1e6, 1)
        log(result)
        result["plan_nothing"] = repeated(lambda: plan.current_plan(run))
    return result


def public(workdir: Path) -> dict[str, Any]:
    """Prototypes from public records: no erasure re-clusters."""
    with open_run(workdir, devices=jax.devices()[:1], write=True) as run:
        ids = run.catalog.live("train").ids
        chosen = [ids[i] for i in np.random.default_rng(2).choice(len(ids), 1_000, replace=False)]
        return {"plan_1000_sample_from_public": repeated(lambda: plan.current_plan(run, chosen))}


def in_process_of_its_own(records: int) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--records={records}"]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the first one makes the workdir, which takes more memory
            output = subprocess.run([*command, f"--folder={folder}"], check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(output.stdout.splitlines()[-1])
    log(row)
    return row


def one_request(records: int, folder: Path) -> dict[str, Any]:
    """Milliseconds of a request for one unsampled record, without tuning: the median of some, after one to warm up."""
    clusters, workdir, rows = records // CLUSTER, folder / "run", []
    if not workdir.exists():
        synthetic.make(workdir, records, clusters, 2 * clusters, "private", even=True)
        return {}
    started = spread([opening(workdir) for _ in range(TIMES)])["median_ms"]
    with open_run(workdir, devices=jax.devices()[:1], write=True) as run:
        clock = without_tuning(run)
        last = run.catalog.db.execute(
            "SELECT id FROM records WHERE split='train' ORDER BY rank DESC LIMIT ?", (TIMES + 1,)
        )
        for (name,) in last.fetchall():
            clock.reset()
            start, busy = time.perf_counter(), time.process_time()
            requests.accept(run.catalog, [name])
            accepted = time.perf_counter() - start
            build.build(run)
            total, busy = time.perf_counter() - start, time.process_time() - busy
            rows.append({"accept": accepted, **clock.seconds, "total": total, "processor": busy})
    medians = {step: round(1e3 * float(np.median([row[step] for row in rows[1:]])), 1) for step in rows[-1]}
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"records": records, "clusters": clusters, "rss_mb": peak, "open": started, **medians}


def commands(images: int) -> dict[str, int]:
    """Peak megabytes of commands on so many private images."""
    rng, side, clusters = np.random.default_rng(0), synthetic.SIDE, images // CLUSTER
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", images), ("test", 1_000), ("public", 500)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, side, side, 1), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % synthetic.CLASSES
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", **arrays)  # type: ignore[arg-type]
        Image.fromarray(arrays["test_images"][0, ..., 0]).save(f"{folder}/image.png")
        config = settings.to_dict(synthetic.config_of(2 * clusters, clusters))
        config["data"] |= {"source": "npz", "path": f"{folder}/images.npz"}
        train = []
        for part, default in settings.to_dict(Config()).items():
            if isinstance(default, dict):
                changed = {name: value for name, value in config[part].items() if value != default[name]}
                train += [f"--config.{part}.{name}={value}" for name, value in changed.items()]
        row = {"images": images}
        others = (("unlearn", "--records=train/5"), ("evaluate",), ("predict", f"{folder}/image.png"))
        for name, *flags in (("train", *train), *others):
            command = [sys.executable, "-m", "lmeraser_jax.cli.main", name, f"--workdir={folder}/run", *flags]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, command
            row[f"{name}_rss_mb"] = round(usage.ru_maxrss / 1024)
    log(row)
    return row


def opening(workdir: Path) -> float:
    start = time.perf_counter()
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        requests.any_open(run.catalog)
        return time.perf_counter() - start


def accepting(run: Run, names: list[str], quarantine: bool) -> float:
    name = uuid.uuid4().hex
    return timed(lambda: requests.accept(run.catalog, names, request=name, quarantine=quarantine))


def serving(run: Run) -> dict[str, float]:
    """Seconds of each step of a build that serves what was accepted, without tuning."""
    clock = without_tuning(run)
    start = time.perf_counter()
    report = build.build(run)
    total = round(time.perf_counter() - start, 2)
    return {"total": total, "retuned": report.retuned, **{k: round(v, 3) for k, v in clock.seconds.items()}}


def without_tuning(run: Run) -> Clock:
    """Makes builds write the checkpoints that tuning would give, and takes the time of each of their steps."""
    slice_ = jax.device_get(init_slice(jax.random.key(1), run.config.tuning, run.backbone.config, len(run.classes)))

    def write_only(spec, backbone, jobs, *_):
        return (Tuned(job, job.steps, slice_, 0.5, None, 0.0) for job in jobs)

    build.check_pixel_hashes = lambda *_: None  # the made-up records have no pixels of their own
    tune_module.make_slices = write_only
    steps = [(build, name) for name in ("current_plan", "register_orphans", "tune_missing", "pack", "publish", "purge")]
    steps += [(publish, "removal_summary"), (purge, "surviving"), (checkpoints, "save"), (receipts, "write")]
    steps += [(Catalog, name) for name in ("add_slice", "publish", "drop_slice", "forget", "flush")]
    return Clock({f"{owner.__name__.rsplit('.')[-1]}.{name}": (owner, name) for owner, name in steps})


def repeated(function: Callable[[], Any]) -> dict[str, Any]:
    """Wall time of some calls, and the processor time of the cheapest: the machine may be busy with other jobs."""
    wall, busy = [], []
    for _ in range(TIMES):
        start = time.process_time()
        wall.append(timed(function))
        busy.append(time.process_time() - start)
    return spread(wall) | {"least_cpu_ms": round(1e3 * min(busy), 1)}


if __name__ == "__main__":
    main()
