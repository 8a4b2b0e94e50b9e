"""What an erasure costs with R stages inside a cluster (SISA's slicing), beside the formula 2/3 + 1/(3R).

  python benchmarks/bench_stages.py [--quick] [--json=FILE]

Trains scikit-learn's digits with R = 1, 2, 4 and 8 and serves requests for unsampled records, one by one. Cost of a
request: images passed forward and backward / (epochs x members of its cluster), so R = 1 costs 1.
--quick: R = 1 and 4, few epochs, 8 requests.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from reporting import add_json, store, surroundings
from synthetic import unsampled

from lmeraser_jax import config
from lmeraser_jax.config import Config
from lmeraser_jax.evaluation.accuracy import evaluate
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two values of R, few epochs, 8 requests")
    add_json(parser)
    arguments = parser.parse_args()
    stages, count = ((1, 4), 8) if arguments.quick else ((1, 2, 4, 8), 40)
    epochs, rows = 6 if arguments.quick else 30, []
    with tempfile.TemporaryDirectory() as folder:
        with prepare_run(Path(folder) / "0", settings(1, epochs)):
            pass  # images and backbone, the same for all
        for slices in stages:
            shutil.copytree(Path(folder) / "0", Path(folder) / str(slices))
            rows.append(measured(Path(folder) / str(slices), slices, count, epochs))
            row = rows[-1]
            print(
                f"R={slices}: {row['cost']:.3f} of a cluster (formula {row['formula']:.3f}), "
                f"{row['seconds']:.2f} s, accuracy {row['accuracy']:.3f}, {row['slices']} slices"
            )
    result = surroundings("bench_stages.py", ["--quick"] * arguments.quick) | {"requests": count, "stages": rows}
    store(result, arguments.json)


def settings(slices: int, epochs: int) -> Config:
    """Without a least number of steps, which small clusters would have to make up for."""
    tuning = {"slices": slices, "epochs": epochs, "min_steps": 1}
    return config.from_dict({"tuning": tuning, "pretraining": {"epochs": 2 * epochs}})


def measured(folder: Path, slices: int, count: int, epochs: int) -> dict[str, float]:
    """Trains with so many stages and serves requests: mean cost, the formula, median seconds, test accuracy."""
    with prepare_run(folder, settings(slices, epochs)) as (run, _):
        build(run)
        accuracy, made = evaluate(run, linear=False).accuracy, len(run.catalog.slices())
        costs, seconds = [], []
        for name in unsampled(run, count):
            (home,) = run.catalog.clusters_of([name]).values()
            outcome = erase.request_erasure(run, [name]).outcome
            assert outcome is not None
            costs.append(outcome.images / (epochs * run.catalog.sizes()[home]))
            seconds.append(outcome.seconds)
    return {
        "R": slices,
        "cost": statistics.mean(costs),
        "formula": 2 / 3 + 1 / (3 * slices),
        "seconds": statistics.median(seconds),
        "accuracy": accuracy,
        "slices": made,
    }


if __name__ == "__main__":
    main()
