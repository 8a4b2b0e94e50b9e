"""Made-up rows of a comparison, shaped like real ones: twelve methods, three data sets, every experiment."""

import numpy as np

from lmeraser_jax.experiments.results import Measurement, Results

# method: (points of accuracy below the best, clusters, images of a request in percent of all)
METHODS = {
    "lmeraser": (0.8, 194, 1.1),
    "lmeraser-top5": (0.4, 194, 1.1),
    "rndpart": (9.0, 194, 0.5),
    "one-head": (1.0, 194, 100.0),
    "single": (0.5, 1, 100.0),
    "dam-vp": (18.0, 194, 1.1),
    "sisa-vote": (3.0, 10, 10.0),
    "sisa-mean": (2.2, 10, 10.0),
    "retrain": (0.0, 1, 100.0),
    "linear-head": (1.4, 1, 100.0),
    "ridge": (2.0, 1, 0.0),
    "ncm": (7.0, 1, 0.0),
}
PASSES = {"lmeraser-top5": 6.0, "sisa-vote": 10.0, "sisa-mean": 10.0} | dict.fromkeys(
    ("single", "retrain", "linear-head", "ridge", "ncm", "rndpart"), 1.0
)
# scikit-learn's digits: method: (right answers of 299, images of a request in percent of all), of three seeds
DIGITS = {
    "dam-vp": ((288, 288, 293), (15.1, 15.7, 13.9)),
    "linear-head": ((294, 295, 294), (0.0, 0.0, 0.0)),
    "lmeraser-ridge": ((290, 292, 294), (15.1, 15.7, 13.9)),
    "lmeraser-top5": ((230, 235, 231), (15.1, 15.7, 13.9)),
    "lmeraser": ((290, 293, 294), (15.1, 15.7, 13.9)),
    "ncm": ((292, 291, 294), (0.0, 0.0, 0.0)),
    "one-head": ((292, 293, 294), (99.8, 99.8, 99.8)),
    "retrain": ((296, 297, 294), (99.8, 99.8, 99.8)),
    "ridge": ((291, 294, 293), (0.0, 0.0, 0.0)),
    "rndpart": ((290, 284, 291), (10.0, 10.2, 9.9)),
    "single": ((289, 291, 294), (99.8, 99.8, 99.8)),
    "sisa-mean": ((288, 292, 296), (8.1, 8.8, 8.2)),
    "sisa-vote": ((290, 293, 296), (8.1, 8.8, 8.2)),
}
TITLES = {
    "lmeraser": "LMEraser",
    "lmeraser-top5": "LMEraser (5 nearest)",
    "rndpart": "random partition",
    "one-head": "one head",
    "single": "single prompt",
    "dam-vp": "DAM-VP",
    "sisa-vote": "SISA (vote)",
    "sisa-mean": "SISA (mean)",
    "retrain": "retraining",
    "linear-head": "linear head",
    "ridge": "ridge",
    "ncm": "nearest class mean",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "ham10000": "HAM10000",
}
DATASETS = {"cifar10": (95.0, 40_000), "cifar100": (79.0, 40_000), "ham10000": (81.0, 8_000)}
BACKBONES = {"vit-b-22k": 0.0, "vit-b-1k": 3.0, "swin-b-22k": -0.7, "swin-b-1k": 2.2}


def row(**changes) -> Measurement:
    """A row with plain values where nothing else is said."""
    plain = {
        "experiment": "methods",
        "dataset": "cifar10",
        "backbone": "vit-b-22k",
        "method": "lmeraser",
        "seed": 0,
        "records": 100,
        "clusters": 4,
        "accuracy": 0.9,
        "balanced": 0.8,
        "images_full": 1000,
        "seconds_full": 10.0,
        "images_request": 50.0,
        "seconds_request": 0.5,
        "records_request": 25.0,
        "parameters_request": 70.0,
    }
    return Measurement(**(plain | changes))


def measured(experiment: str, dataset: str, method: str, seed: int, minus: float = 0.0, **changes) -> Measurement:
    """A row of a method on a data set; `minus` are points of accuracy that this place costs."""
    best, records = DATASETS[dataset]
    below, clusters, share = METHODS[method]
    noise = np.random.default_rng([len(experiment), len(dataset), list(METHODS).index(method), seed]).normal(size=4)
    accuracy = (best - below - minus + 0.4 * noise[0]) / 100
    images = 50 * records
    request = images * share / 100 * (1 + 0.05 * noise[1])
    heavy = method == "retrain"
    values = {
        "records": records,
        "clusters": clusters,
        "accuracy": accuracy,
        "balanced": accuracy - 0.02 - 0.1 * (dataset == "ham10000") + 0.003 * noise[2],
        "images_full": images,
        "seconds_full": images / 600,
        "images_request": request,
        "images_worst": 3 * request,
        "seconds_request": request / 600 * (30 if heavy else 1) + 0.4 + 0.05 * abs(noise[3]),
        "records_request": max(request / 50, 1.0),
        "parameters_request": 86e6 if heavy else 77_530.0 * (2 if method == "one-head" else 1),
        "parameters": 77_530 * clusters,
        "expected_share": share / 100,
        "sampled_share": 1000 / records,
        "tested": 2000,
        "passes": PASSES.get(method, 2.0),
        "seconds_unsampled": request / 600 + 0.3,
        "seconds_sampled": 3 * request / 600 + 0.5,
    }
    return row(experiment=experiment, dataset=dataset, method=method, seed=seed, **(values | changes))


def digits() -> list[Measurement]:
    """Real rows: one method far below the others, these close together, some that cost nothing, some alike."""
    return [
        row(dataset="digits", method=method, seed=seed, accuracy=right / 299, images_request=share, images_full=100)
        for method, found in DIGITS.items()
        for seed, (right, share) in enumerate(zip(*found))
    ]


def results(methods=tuple(METHODS), datasets=tuple(DATASETS), seeds: int = 3) -> Results:
    """Every experiment of the paper, and sequences of requests."""
    rows: list[Measurement] = []
    for seed in range(seeds):
        rows += [measured("methods", d, m, seed) for d in datasets for m in methods]
        rows += [
            measured("methods", d, "lmeraser", seed, minus, backbone=backbone)
            for d in datasets
            for backbone, minus in list(BACKBONES.items())[1:]
        ]
        rows += [
            measured("epochs", datasets[-1], "lmeraser", seed, minus + 30 / epoch, backbone=backbone, x=epoch)
            for backbone, minus in BACKBONES.items()
            for epoch in range(5, 51, 5)
        ]
        rows += [
            measured("removal", datasets[0], m, seed, 6 * share**2, x=share)
            for m in methods[:6]
            for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
        ]
        rows += [
            measured(
                "cut", datasets[0], "lmeraser", seed, (11 - cut) ** 2 / 8, x=cut, clusters=int(900 * 0.6 ** (cut - 6))
            )
            for cut in (7.0, 8.0, 9.0, 10.0, 11.0)
        ]
        rows += [
            measured(
                "sequence", d, m, seed, 0.01 * served, x=served, series=series,
                spent=served * 20_000 * METHODS[m][2] * (2 if series == "bursts" else 1),
            )
            for d in datasets[:2]
            for m in methods[:5]
            for series in ("uniform", "bursts")
            for served in range(0, 101, 10)
        ]  # fmt: skip
    command = "lmeraser compare --folder=runs/compare --methods=all --seeds=3"
    return Results(tuple(rows), command, "2 CPU cores, jax 0.10")
