"""Erases random records one by one and reports what each request cost, sampled and unsampled records apart.

  python benchmarks/bench_requests.py --workdir=DIR [--count=20] [--json=FILE]

Works on a copy of the workdir, so the run itself keeps its records. Ratios are images processed against the
images of a full re-tune.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from reporting import log, new_parser, store, surroundings

from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.run import Run, open_run


def one_by_one(run: Run, count: int) -> list[dict]:
    """Erases `count` records drawn uniformly; one entry per request."""
    ids = run.catalog.live("train").ids
    requests = []
    for i in philox(run.config.seed, "bench").choice(len(ids), count, replace=False):
        manifest = run.catalog.manifest()
        assert manifest is not None
        sampled = ids[i] in load_clustering(run.layout, manifest.clustering).sample
        start = time.perf_counter()
        report = erase.request_erasure(run, [ids[i]]).outcome
        assert report is not None
        work = {name: getattr(report, name) for name in ("retuned", "reused", "images", "ratio")}
        requests.append({"sampled": sampled} | work | {"seconds": time.perf_counter() - start})
        log(requests[-1])
    return requests


def summary(requests: list[dict]) -> dict:
    """Mean and worst of each kind of request."""
    kinds = {}
    for name, kind in (("unsampled", [False]), ("sampled", [True]), ("all", [False, True])):
        chosen = [r for r in requests if r["sampled"] in kind]
        if chosen:
            ratios, slices = [r["ratio"] for r in chosen], [r["retuned"] for r in chosen]
            kinds[name] = {
                "requests": len(chosen),
                "ratio_mean": statistics.mean(ratios),
                "ratio_worst": max(ratios),
                "retuned_mean": statistics.mean(slices),
                "retuned_worst": max(slices),
                "seconds_median": statistics.median(r["seconds"] for r in chosen),
            }
    return kinds


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--workdir", required=True, help="a trained workdir")
    parser.add_argument("--count", type=int, default=20, help="requests")
    parser.add_argument("--audit", type=int, default=2, help="clusters to rebuild from scratch at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        shutil.copytree(arguments.workdir, copy)
        with open_run(copy, write=True) as run:
            requests = one_by_one(run, arguments.count)
            verdict = audit(run, arguments.audit)
    result = surroundings("bench_requests.py") | {
        "summary": summary(requests),
        "audit": verdict.text(),
        "requests": requests,
    }
    print(json.dumps({"summary": result["summary"], "audit": result["audit"]}, indent=2))
    store(result, arguments.json)


if __name__ == "__main__":
    main()
