"""A request's cost by the paper's formulas, with the terms that they leave out, and as measured, in shares of the data.

  python benchmarks/bench_theory.py [--data=FILE.npz,FILE.npz --weights=FILE] [--drops=120] [--quick] [--json=FILE]

Always: K and N as in the paper, heavy-tailed sizes (log-normal, sigma 1), 1,000 sampled records. With --data: features
of a real backbone at 64 px, then sample, tree, cut and assignment as `lmeraser train` makes them, for the paper's plain
cut and a balanced one. Some sampled records are dropped one by one, the next of the sample is admitted, everything is
clustered again. `changed`: mean share of the data in clusters whose sampled ids or members are then others, the dropped
record's own cluster left out; of one half of the drops, and what the formulas are given. `measured`: what a uniform
request re-tunes, unsampled records exactly, sampled ones by the other half. Each with its standard error, as far as it
is one of the drops. --quick: 4 drops.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from reporting import deliver, new_parser
from workloads import PAPER, heavy_tailed

from lmeraser_jax import config as settings
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.experiments import cost_model
from lmeraser_jax.experiments.cost_model import Batch, Clusters
from lmeraser_jax.hashing import philox
from lmeraser_jax.models import convert
from lmeraser_jax.storage.catalog import sample_rank
from lmeraser_jax.training import clustering
from lmeraser_jax.training.features import Extractor
from lmeraser_jax.training.train_step import mesh_of

SAMPLE, SIDE, WINDOW = 1000, 64, 50  # sampled records, pixels, requests of a window
CUTS = {  # the first two are the paper's: no limits
    "K=194": settings.Clustering(sample_size=SAMPLE, cut="auto:194", max_members=0, min_members=0),
    "K=30": settings.Clustering(sample_size=SAMPLE, cut="auto:30", max_members=0, min_members=0),
    "5 to 50": settings.Clustering(sample_size=SAMPLE, cut="auto:30", max_members=50, min_members=5),
    "2 to 5 of 200": settings.Clustering(sample_size=200, cut="auto:60", max_members=5, min_members=2),
    "80 of 80": settings.Clustering(sample_size=80, cut="0", max_members=0, min_members=0),
}
Grouping = dict[tuple[str, ...], frozenset[int]]  # {sampled ids: members} of the clusters


def formulas(clusters: Clusters, changed: float) -> dict[str, float]:
    """Shares of the data of one request and of a window of them; seconds as multiples of the paper's on 8 lanes."""
    one, window, full = Batch(1, fixed=True), Batch(WINDOW), float(clusters.images.sum())
    single = float(clusters.images.mean())
    plain = dataclasses.replace(clusters, sampled=np.zeros_like(clusters.sampled))
    return {
        "clusters": len(clusters.members),
        "largest": float(clusters.members.max()) / clusters.records,
        "paper": single / full,
        "size_biased": cost_model.expected_images(clusters, one, changed=0.0) / full,
        "with_reclustering": cost_model.expected_images(clusters, one, changed) / full,
        "window_paper_clusters": cost_model.expected_affected(clusters.members, window),
        "window_paper": cost_model.expected_affected(clusters.members, window) * single / full,
        "window_unsampled": cost_model.expected_images(plain, window) / full,
        "window_with_reclustering": cost_model.expected_images(clusters, window, changed) / full,
        "window_seconds_over_paper": cost_model.expected_makespan(clusters, window, changed, lanes=8)
        / (single * float(window.hits(1.0))),
    }


def features_of(path: Path, weights: Path) -> np.ndarray:
    """float32 [N, D] of at most 10,000 training images."""
    with np.load(path, allow_pickle=False) as arrays:
        images = arrays["train_images"][:10_000]
    backbone, _ = convert.load(settings.Backbone(weights=str(weights)), SIDE)
    spec = ImageSpec(*images.shape[1:], SIDE, SIDE, backbone.config.channels, backbone.mean, backbone.std)
    return Extractor(backbone, spec, 128, mesh_of(jax.devices()[:1]), np.dtype(np.float32))(images)


def grouped(features: np.ndarray, chosen: list[int], cut: settings.Clustering) -> tuple[Grouping, Clusters]:
    """The clusters of a sample of all records, without those that nobody is assigned to."""
    chosen = sorted(chosen)
    names = [f"{row:05d}" for row in chosen]
    found = clustering.cluster(tuple(names), features[chosen], cut, "")
    homes = clustering.assign(features, found.prototypes)
    homes[chosen] = found.labels
    kept = [k for k in range(len(found.keys)) if (homes == k).any()]
    ids = [tuple(name for name, label in zip(names, found.labels) if label == k) for k in kept]
    members = [np.flatnonzero(homes == k) for k in kept]
    sizes = np.array([len(rows) for rows in members], float)
    grouping = {key: frozenset(rows.tolist()) for key, rows in zip(ids, members)}
    return grouping, Clusters(sizes, np.array([len(key) for key in ids], float), sizes)


def measured(features: np.ndarray, cut: settings.Clustering, drops: int) -> dict[str, float]:
    """The formulas for real clusters, given half of the drops, and what the other half really costs."""
    order = sorted(range(len(features)), key=lambda row: sample_rank(0, f"{row:05d}"))
    size, total = cut.sample_size, len(features)
    chosen, following = order[:size], order[size]
    before, clusters = grouped(features, chosen, cut)
    shares, costs = [], []
    drops = min(drops, size)
    for row in philox(0, "drops").choice(chosen, drops, replace=False).tolist():
        left = np.delete(features, row, axis=0)
        renumbered = [other - (other > row) for other in [*chosen, following] if other != row]
        after = _restored(grouped(left, renumbered, cut)[0], row)
        own = next(key for key, members in before.items() if row in members)
        rest = {key: members for key, members in before.items() if key != own}
        same = sum(len(members) for key, members in rest.items() if after.get(key) == members)
        elsewhere = sum(map(len, rest.values()))
        shares.append(1 - same / elsewhere if elsewhere else 1.0)
        costs.append(1 - same / total)
    (changed, changed_error), (cost, cost_error) = _mean(shares[: drops // 2]), _mean(costs[drops // 2 :])
    unsampled = float(((clusters.members - clusters.sampled) * clusters.members).sum()) / total
    found = formulas(clusters, changed)
    least, most = (formulas(clusters, bound)["with_reclustering"] for bound in (0.0, 1.0))  # it is linear in c
    return found | {
        "changed": changed,
        "changed_error": changed_error,
        "changed_least": min(shares),
        "with_reclustering_error": (most - least) * changed_error,
        "measured": (unsampled + size * cost) / total,
        "measured_error": size * cost_error / total,
    }


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean of at least two values, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5


def _restored(grouping: Grouping, row: int) -> Grouping:
    """The numbers that rows had before one was taken out."""
    return {
        tuple(f"{int(name) + (int(name) >= row):05d}" for name in key): frozenset(i + (i >= row) for i in members)
        for key, members in grouping.items()
    }


def main() -> None:
    parser = new_parser(__doc__, quick="4 drops")
    parser.add_argument("--data", default="", help="packs with train_images, separated by commas")
    parser.add_argument("--weights", default="", help="of a published backbone")
    parser.add_argument("--drops", type=int, default=120, help="sampled records dropped one by one, at least 4")
    arguments = parser.parse_args()
    found: dict[str, dict] = {"paper": {}, "real": {}}
    for name, (count, records) in PAPER.items():
        sizes = np.asarray(heavy_tailed(count, records), np.float64)
        clusters = Clusters(sizes, sizes * SAMPLE / sizes.sum(), sizes)  # each has its share of the sample
        found["paper"][name] = formulas(clusters, changed=1.0)
    for path in filter(None, arguments.data.split(",")):
        features = features_of(Path(path), Path(arguments.weights))
        for name, cut in CUTS.items():
            drops = 4 if arguments.quick else arguments.drops
            found["real"][f"{Path(path).stem}, {name}"] = measured(features, cut, drops)
    rounded = {
        part: {name: {key: round(value, 5) for key, value in one.items()} for name, one in rows.items()}
        for part, rows in found.items()
    }
    deliver("bench_theory.py", rounded, arguments.json)


if __name__ == "__main__":
    main()
