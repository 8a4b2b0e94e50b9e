"""What the catalog costs with a million records: opening, accepting, planning, publishing, purging; and its size.

  python benchmarks/bench_catalog.py [--quick] [--kept=DIR] [--json=FILE]

Records, sizes and features are made up (see synthetic.py); tables, clustering file and slice folders are real.
Serving is measured without its device work: tuning is replaced by writing the checkpoints that it would write.
--quick: 100,000 records in 200 clusters.
"""

import argparse
import json
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
from reporting import add_json, deliver

from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.atomic_files import disk_use
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.training import tune as tune_module
from lmeraser_jax.training.slices import init_slice
from lmeraser_jax.training.tune import Tuned
from lmeraser_jax.unlearning import build, plan, purge, receipts
from lmeraser_jax.unlearning.run import Run, open_run

TIMES = 5  # of what is measured more than once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--kept", default="", help="folder that keeps the made workdirs, to measure again with copies")
    add_json(parser)
    arguments = parser.parse_args()
    records, clusters, sample = (100_000, 200, 1_000) if arguments.quick else (1_000_000, 2_000, 10_000)
    found: dict[str, Any] = {"records": records, "clusters": clusters, "sample": sample}
    with tempfile.TemporaryDirectory() as folder:
        synthetic.copied(Path(folder) / "run", arguments.kept, records, clusters, sample)
        found["catalog_mb"] = round((Path(folder) / "run" / "catalog.db").stat().st_size / 1e6, 1)
        found |= private(Path(folder) / "run")
    with tempfile.TemporaryDirectory() as folder:
        synthetic.copied(Path(folder) / "run", arguments.kept, records, clusters, sample, "public")
        found |= public(Path(folder) / "run")
    result = synthetic.surroundings("bench_catalog.py", sys.argv[1:]) | found
    deliver(result, arguments.json)


def private(workdir: Path) -> dict[str, Any]:
    """Everything with the sample among the private records."""
    found = {"open": synthetic.spread([opening(workdir) for _ in range(TIMES)])}
    with open_run(workdir, devices=jax.devices()[:1], write=True) as run:
        names = synthetic.unsampled(run, 1_200)
        few, many = names[:200], names[200:]
        show(found)
        found["plan_1000_to_come"] = repeated(lambda: plan.plan(run, many))
        sampled = run.catalog.sample("train", run.config.clustering.sample_size).ids[0]
        show(found)
        found["plan_1000_with_a_sampled_one_s"] = round(timed(lambda: plan.plan(run, [*many[1:], sampled])), 1)
        show(found)
        found["accept_1"] = synthetic.spread([accepting(run, [name], False) for name in few[:100]])
        found["accept_1_quarantine"] = synthetic.spread([accepting(run, [name], True) for name in few[100:]])
        found["resolve_1000_ms"] = round(1e3 * timed(lambda: requests.resolve(run.catalog, many)), 1)
        found["accept_1000_ms"] = round(1e3 * accepting(run, many, True), 1)
        show(found)
        found["plan_1200_accepted"] = repeated(lambda: plan.plan(run))
        show(found)
        found["serve_1200"] = serving(run)
        found["catalog_after_mb"] = round(disk_use(run.layout.catalog) / 1e6, 1)
        show(found)
        found["plan_nothing"] = repeated(lambda: plan.plan(run))
    return found


def public(workdir: Path) -> dict[str, Any]:
    """Prototypes from public records: no erasure re-clusters."""
    with open_run(workdir, devices=jax.devices()[:1], write=True) as run:
        ids = run.catalog.live("train").ids
        chosen = [ids[i] for i in np.random.default_rng(2).choice(len(ids), 1_000, replace=False)]
        return {"plan_1000_sample_from_public": repeated(lambda: plan.plan(run, chosen))}


def opening(workdir: Path) -> float:
    start = time.perf_counter()
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        requests.any_open(run.catalog)
        return time.perf_counter() - start


def accepting(run: Run, names: list[str], quarantine: bool) -> float:
    name = uuid.uuid4().hex
    return timed(lambda: requests.accept(run.catalog, names, request=name, quarantine=quarantine))


def serving(run: Run) -> dict[str, float]:
    """Seconds of each part of a reconcile that serves what was accepted, without tuning."""
    seconds: dict[str, float] = {}
    tune = tune_module.tune
    slice_ = jax.device_get(init_slice(jax.random.key(1), run.config.tuning, run.backbone.config, len(run.classes)))
    build.refuse_rotten = lambda *_: None  # the made-up records have no pixels of their own
    tune_module.tune = lambda problem, backbone, jobs, *rest: (
        Tuned(job, job.steps, slice_, 0.5, None, 0.0) for job in jobs
    )
    parts = [
        (build, "sweep"),
        (build, "plan"),
        (build, "adopt"),
        (build, "_publish"),
        (build, "_condemned"),
    ]
    parts += [(build, "purge"), (purge, "kept"), (purge, "_overwrite"), (checkpoints, "save")]
    parts += [(Catalog, "add_slice"), (Catalog, "publish"), (Catalog, "drop_slice"), (Catalog, "forget")]
    parts += [(Catalog, "flush"), (receipts, "write")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in parts]
    try:
        for owner, name, function in kept:
            setattr(owner, name, counted(seconds, f"{owner.__name__.rsplit('.')[-1]}.{name}", function))
        outcome: build.BuildReport | None = None

        def serve() -> None:
            nonlocal outcome
            outcome = build.build(run)

        total = timed(serve)
    finally:
        tune_module.tune = tune
        for owner, name, function in kept:
            setattr(owner, name, function)
    assert outcome is not None
    return {"total": round(total, 2), "retuned": outcome.retuned, **{k: round(v, 3) for k, v in seconds.items()}}


def counted(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, adding up what it takes."""
    seconds[name] = 0.0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return wrapper


def repeated(function: Callable[[], Any]) -> dict[str, Any]:
    """Wall time of some calls, and the processor time of the cheapest: the machine may be busy with other jobs."""
    wall, busy = [], []
    for _ in range(TIMES):
        start = time.process_time()
        wall.append(timed(function))
        busy.append(time.process_time() - start)
    return synthetic.spread(wall) | {"least_cpu_ms": round(1e3 * min(busy), 1)}


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def show(found: dict[str, Any]) -> None:
    print(json.dumps(found), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
