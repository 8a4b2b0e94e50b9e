"""Images per second and latency of predictions, beside one plain forward pass with a classifier.

  python benchmarks/bench_predict.py [--workdir=DIR] [--quick] [--json=FILE]

The images of every call belong to many clusters. Routing needs a pass of its own, so a prediction should cost about two
passes: `cost` is the time of a prediction over the time of a plain pass of the same batch. Batch 1 gives the latency.
Without --workdir: scikit-learn's digits. --quick: few epochs, few calls.
"""

import dataclasses
import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reporting import deliver, new_parser, timed
from workloads import train_digits

from lmeraser_jax.data.transforms import centred
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.unlearning.run import Run, open_run


def main() -> None:
    parser = new_parser(__doc__, quick="few epochs, few calls")
    parser.add_argument("--workdir", default="", help="a trained workdir")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = arguments.workdir or folder + "/trained"
        if not arguments.workdir:
            train_digits(Path(workdir), arguments.quick)
        with open_run(workdir) as run:
            batches = {size: measured(run, size, 20 if arguments.quick else 100) for size in (1, 16, 128)}
    deliver("bench_predict.py", {"batches": batches}, arguments.json)


def measured(run: Run, size: int, calls: int) -> dict[str, Any]:
    """Calls with so many images each, predictions and plain passes in turn."""
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, inference=dataclasses.replace(run.config.inference, batch=size))
    )
    model = load_model(run)
    rows = np.random.default_rng(0).integers(0, len(run.images), (calls, size))
    batches = [np.asarray(run.images[chosen]) for chosen in rows]
    head = jax.device_put(np.zeros((run.backbone.config.feature_size, len(run.classes)), np.float32))
    plain = jax.jit(functools.partial(classified, run))
    clusters = {int(k) for k in predict(model, run.images[:200]).clusters[:, 0]}
    seconds: dict[str, list[float]] = {"predict": [], "plain": []}
    calls_of = {"predict": lambda batch: predict(model, batch)}
    calls_of["plain"] = lambda batch: jax.block_until_ready(plain(model.arrays.params, head, batch))
    for number, batch in enumerate([batches[0], *batches]):
        for name, call in calls_of.items():
            took = timed(call, batch)
            if number:
                seconds[name].append(took)
    ratios = [a / b for a, b in zip(seconds["predict"], seconds["plain"], strict=True)]
    return {
        "clusters": len(clusters),
        "images_per_s": round(size / statistics.median(seconds["predict"]), 1),
        "p50_ms": round(1e3 * float(np.percentile(seconds["predict"], 50)), 3),
        "p99_ms": round(1e3 * float(np.percentile(seconds["predict"], 99)), 3),
        "cost": round(statistics.median(ratios), 3),
    }


def classified(run: Run, params: Any, head: jax.Array, images: jax.Array) -> jax.Array:
    """What any classifier does: one pass, one head. uint8 [B, h, w, c] -> int32 [B]."""
    return (backbone_lib.features(run.backbone.config, params, centred(images, run.image_spec)) @ head).argmax(axis=1)


if __name__ == "__main__":
    main()
