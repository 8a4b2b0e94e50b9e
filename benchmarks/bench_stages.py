"""What an erasure costs with R stages inside a cluster (SISA's slicing), beside the formula 2/3 + 1/(3R).

  python benchmarks/bench_stages.py [--quick] [--json=FILE]

Trains scikit-learn's digits with R = 1, 2, 4 and 8 and serves requests for unsampled records, one by one. Cost of a
request: images passed forward and backward / (epochs x members of its cluster), so R = 1 costs 1.
--quick: R = 1 and 4, few epochs, 8 requests.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from synthetic import surroundings, unsampled

from lmeraser_jax import config, unlearning
from lmeraser_jax.evaluation import evaluate
from lmeraser_jax.reconcile import reconcile
from lmeraser_jax.run import prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two values of R, few epochs, 8 requests")
    parser.add_argument("--json", default="", help="file for the numbers")
    arguments = parser.parse_args()
    stages, count = ((1, 4), 8) if arguments.quick else ((1, 2, 4, 8), 40)
    rows = []
    for slices in stages:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(Path(folder) / "run", slices, count, 6 if arguments.quick else 30))
        row = rows[-1]
        print(
            f"R={slices}: {row['cost']:.3f} of a cluster (formula {row['formula']:.3f}), "
            f"{row['seconds']:.2f} s, accuracy {row['accuracy']:.3f}, {row['slices']} slices"
        )
    if arguments.json:
        values = surroundings("bench_stages.py", ["--quick"] * arguments.quick) | {"requests": count, "stages": rows}
        Path(arguments.json).write_text(json.dumps(values, indent=2) + "\n")


def measured(folder: Path, slices: int, count: int, epochs: int) -> dict[str, float]:
    """Trains with so many stages and serves requests: mean cost, the formula, median seconds, test accuracy."""
    settings = config.from_dict({"tuning": {"slices": slices, "epochs": epochs}, "pretraining": {"epochs": 2 * epochs}})
    with prepared(folder, settings) as (run, _):
        reconcile(run)
        accuracy, made = evaluate(run, linear=False).accuracy, len(run.catalog.slices())
        costs, seconds = [], []
        for name in unsampled(run, count):
            (home,) = run.catalog.clusters_of([name]).values()
            outcome = unlearning.request_erasure(run, [name]).outcome
            assert outcome is not None
            costs.append(outcome.images / (settings.tuning.epochs * run.catalog.sizes()[home]))
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
