"""How long an accepted erasure with quarantine can still reach answers of a process that serves predictions.

  python benchmarks/bench_quarantine.py [--quick] [--keep=DIR] [--json=FILE]

One process answers batches of 16 images in a loop through a `Predictor`; this one accepts erasures with quarantine,
one record each, at random times. Per request: from the start of the call of `accept` to the return of the last answer
that was routed without that quarantine (0 where it returned before), and to the return of the first answer that was
routed with it; both processes read the system's monotonic clock. The workdir is made up (see synthetic.py).
--quick: 100,000 records in 200 clusters, 50 requests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from reporting import deliver, new_parser, spread

IMAGES = 16


def main() -> None:
    parser = new_parser(__doc__, quick="a tenth of everything")
    parser.add_argument("--keep", default="", help="folder that keeps synthetic workdirs; copies are measured")
    parser.add_argument("--answer", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(Path(arguments.answer))
        return
    import synthetic

    records, clusters, sample, count = (100_000, 200, 1_000, 50) if arguments.quick else (1_000_000, 2_000, 10_000, 300)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        synthetic.copy(workdir, arguments.keep, records, clusters, sample)
        accepted, seen = measured(workdir, count)
    last = [max(0.0, seen["changes"][key][0] - start) for key, start, _ in accepted]
    first = [seen["changes"][key][1] - start for key, start, _ in accepted]
    result = {
        "records": records,
        "clusters": clusters,
        "images_per_call": IMAGES,
        "seconds_loading_the_model": round(seen["loading"], 1),
        "to_the_last_answer_with_old_routing": spread(last),
        "to_the_first_answer_with_new_routing": spread(first),
        "accept": spread([end - start for _, start, end in accepted]),
        "answer": spread(seen["answers"]),
    }
    deliver("bench_quarantine.py", result, arguments.json)


def measured(workdir: Path, count: int) -> tuple[list[tuple[str, float, float]], dict[str, Any]]:
    """(cluster, start and end of `accept`) of each request, and what the answering process saw."""
    from lmeraser_jax.storage import requests
    from lmeraser_jax.storage.catalog import KEY, Catalog

    command = [sys.executable, __file__, f"--answer={workdir}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
    catalog, rng, accepted = Catalog(workdir / "catalog.db"), np.random.default_rng(3), []
    record_of = dict(catalog.db.execute(f"SELECT {KEY},min(id) FROM records WHERE split='train' GROUP BY cluster"))
    for key in rng.permutation(sorted(record_of))[:count].tolist():
        time.sleep(rng.uniform(0.02, 0.15))
        start = time.monotonic()
        requests.accept(catalog, [record_of[key]], quarantine=True)
        accepted.append((key, start, time.monotonic()))
    time.sleep(1)
    catalog.close()
    seen, _ = process.communicate()  # closes its standard input: the end
    assert process.returncode == 0
    return accepted, json.loads(seen)


def answer(workdir: Path) -> None:
    """Answers until standard input ends; then prints when which cluster left routing, and the times of the calls."""
    import jax

    from lmeraser_jax.evaluation.serving import Predictor
    from lmeraser_jax.unlearning.run import open_run

    stop, changes, answers = threading.Event(), {}, []
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        start = time.monotonic()
        predictor = Predictor(run)
        loading = time.monotonic() - start
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, *run.images.shape[1:]), np.uint8)
        predictor(images)
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        print("ready", flush=True)
        state, before = predictor.state, time.monotonic()
        while not stop.is_set():
            start = time.monotonic()
            predictor(images)
            now = time.monotonic()
            answers.append(now - start)
            if predictor.state is not state:  # the state that gave this answer; nothing is looked up here
                left = [key for key, a, b in zip(state.keys, state.refs, predictor.state.refs) if a and not b]
                changes |= {key: (before, now) for key in left}
                state = predictor.state
            before = now
    print(json.dumps({"loading": loading, "changes": changes, "answers": answers}))


if __name__ == "__main__":
    main()
