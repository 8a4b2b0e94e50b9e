"""What a run of any size would take: time, memory, disk, network and money, of training and of a month of erasures.

  python benchmarks/plan_scale.py --records=1e9 --clusters=1e6 --backbone=vit-b-22k --devices=8 --hosts=16
         [--requests_per_day=1000 --window_hours=24] [--json=FILE]
  python benchmarks/plan_scale.py --check

A model of a few lines, with constants measured on small runs: `--check` puts it beside the measured points in results/.
Cluster sizes are heavy-tailed (log-normal, sigma 1, at most `--max_share` of the mean where the cut is balanced).
An erasure re-tunes the clusters of its batch: sum over clusters of m_k (1 - (1 - m_k / N)^n) images per epoch for n
requests at once (paper 5.3). A sampled record re-clusters: a share `--reclustered` of all clusters is tuned again.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from reporting import new_parser, store, surroundings

from lmeraser_jax.models import zoo
from lmeraser_jax.models.swin import SwinConfig
from lmeraser_jax.training.slices import border_size

RESULTS = Path(__file__).parent / "results"
CATALOG = 330  # bytes of a record in the catalog (catalog_1m_cpu.json)
PLANNED = 2.4e-6  # seconds per member of a touched cluster that a plan looks at
PUBLISHED = 2e-3  # seconds to publish and to register a re-tuned cluster, receipts included
PURGED = 9e-3  # seconds to purge what one re-tuned cluster had
IMPORTED = 5.9e-5  # seconds to import a small image that is decoded (import_200k_cpu.json)
WRITTEN = 0.08  # seconds to write a slice (13 small files)
FILES = 30_000  # bytes of a checkpoint beside its arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Sizes of a run: images, network, machines, requests."""

    records: float
    clusters: float
    sample: float
    image_bytes: float  # of a stored image
    flops: float  # of one forward pass
    width: int  # D
    slice_bytes: float
    parameters: float
    activations: float  # bytes that a backward pass keeps of one image
    epochs: float
    batch: int
    lanes: int
    devices: int  # per host
    hosts: int
    flops_per_s: float  # that a device sustains in the tuning program
    read_bytes_per_s: float  # that a host gets of its storage or its network
    max_share: float  # members of the largest cluster, in means
    requests_per_day: float
    window_hours: float
    reclustered: float  # share of the clusters that a new clustering changes
    price: float  # of a device for an hour

    @property
    def processors(self) -> int:
        return self.devices * self.hosts

    def sizes(self) -> np.ndarray:
        return heavy_tailed(self.clusters, self.records, self.max_share)

    def seconds(self, images: float) -> float:
        """To tune so many images: a forward and an activation-backward pass each, on all devices."""
        return 2 * self.flops * images / (self.flops_per_s * self.processors)


def training(run: Run) -> dict[str, float]:
    """Import, features, clustering and all clusters."""
    features = run.flops * run.records / (run.flops_per_s * run.processors)
    longest = run.sizes().max() * run.epochs  # one cluster's steps follow one another
    tuning = max(run.seconds(run.epochs * run.records), 2 * run.flops * longest / run.flops_per_s)
    writing = WRITTEN * run.clusters / run.hosts
    importing = run.records * max(IMPORTED, run.image_bytes / run.read_bytes_per_s)  # by one process
    read = run.image_bytes * run.records / run.hosts / run.read_bytes_per_s  # once
    hours = {"import_h": importing, "features_h": max(features, read), "tuning_h": tuning, "writing_h": writing}
    hours["reading_h"] = read * run.epochs  # as if no image were kept in memory
    total = importing + max(features, read) + max(tuning, writing, read * run.epochs)  # all three at the same time
    return {name: value / 3600 for name, value in hours.items()} | {
        "total_h": total / 3600,
        "cost": total / 3600 * run.processors * run.price,
    }


def memory(run: Run) -> dict[str, float]:
    """Gigabytes: of a device (bfloat16 backbone, activations of a step), and on disk."""
    step = run.activations * run.batch * run.lanes
    catalog, slices = CATALOG * run.records, (run.slice_bytes + FILES) * run.clusters
    disk = (run.image_bytes + 4 * run.width) * run.records
    return {
        "device_gb": (2 * run.parameters + step) / 1e9,
        "images_on_device_gb": run.image_bytes * run.records / 1e9,
        "disk_gb": (disk + catalog + slices) / 1e9,
        "catalog_gb": catalog / 1e9,
        "slices_gb": slices / 1e9,
        "network_gb_per_host": (run.image_bytes * run.records * (1 + run.epochs) / run.hosts) / 1e9,
    }


def month(run: Run) -> dict[str, float]:
    """Thirty days of uniform requests, served in batches."""
    n = run.requests_per_day * run.window_hours / 24
    batches, sizes = 30 * 24 / run.window_hours, run.sizes()
    scale = run.clusters / len(sizes)
    hit = 1 - np.exp(n * np.log1p(-np.minimum(sizes / run.records, 0.5)))
    resampled = 1 - (1 - min(run.sample / run.records, 1.0)) ** n
    clusters = float(hit.sum() * scale) * (1 - resampled) + resampled * run.reclustered * run.clusters
    members = float((hit * sizes).sum() * scale) * (1 - resampled) + resampled * run.reclustered * run.records
    read = run.epochs * members * run.image_bytes / run.hosts / run.read_bytes_per_s
    parts = {
        "tuning": max(run.seconds(run.epochs * members), read),
        "host": PLANNED * members + (PUBLISHED + PURGED + WRITTEN / run.hosts) * clusters,
    }
    total = sum(parts.values())
    return {
        "requests": 30 * run.requests_per_day,
        "clusters_per_batch": clusters,
        "share_per_batch": members / run.records,
        "batch_h": total / 3600,
        "month_h": total * batches / 3600,
        "busy": total * batches / (30 * 24 * 3600),
        "cost": total * batches / 3600 * run.processors * run.price,
    }


def forward_flops(config) -> float:
    """Of one image: products with weights, and attention."""
    if isinstance(config, SwinConfig):
        found, grid, width = 0.0, config.image_size // config.patch, config.width
        for depth in config.depths:
            found += depth * grid * grid * (24 * width * width + 4 * config.window**2 * width)
            grid, width = grid // 2, 2 * width
        return found
    tokens = 1 + config.grid**2
    mlp = 4 * config.width * config.mlp
    return config.depth * tokens * (8 * config.width**2 + mlp + 4 * tokens * config.width)


def parameters(config) -> float:
    """Of the frozen network, about."""
    if isinstance(config, SwinConfig):
        return sum(12 * depth * (config.width * 2**i) ** 2 for i, depth in enumerate(config.depths))
    return config.depth * (4 * config.width**2 + 2 * config.width * config.mlp)


def kept_bytes(config, dtype_bytes: int = 2) -> float:
    """What the backward pass keeps of one image: about 18 numbers per token and channel of a block, and the scores."""
    if isinstance(config, SwinConfig):
        found, grid, width = 0.0, config.image_size // config.patch, config.width
        for depth, heads in zip(config.depths, config.heads):
            found += depth * grid * grid * (18 * width + 2 * heads * config.window**2)
            grid, width = grid // 2, 2 * width
        return found * dtype_bytes
    tokens = 1 + config.grid**2
    return config.depth * tokens * (18 * config.width + 2 * config.heads * tokens) * dtype_bytes


def run_of(arguments: argparse.Namespace) -> Run:
    config = dataclasses.replace(zoo.entry(arguments.backbone).architecture, image_size=arguments.size)
    prompt = border_size(arguments.size, max(1, round(arguments.size * 30 / 224)), 3)
    return Run(
        records=arguments.records,
        clusters=arguments.clusters,
        sample=arguments.sample,
        image_bytes=3 * (arguments.stored or arguments.size) ** 2,
        flops=forward_flops(config),
        width=config.feature_size,
        slice_bytes=4 * (prompt + (config.feature_size + 1) * arguments.classes),
        parameters=parameters(config),
        activations=kept_bytes(config),
        **{name: getattr(arguments, name) for name in ("epochs", "batch", "lanes", "devices", "hosts", "max_share")},
        **{name: getattr(arguments, name) for name in ("requests_per_day", "window_hours", "reclustered", "price")},
        flops_per_s=arguments.tflops * 1e12,
        read_bytes_per_s=arguments.read * 1e9,
    )


def check() -> dict[str, dict[str, float]]:
    """The model beside points that were measured; the first three lines are what its constants come from."""
    catalog = json.loads((RESULTS / "catalog_1m_cpu.json").read_text())
    served, records, count = catalog["serve_1200"], catalog["records"], catalog["clusters"]
    pairs = {
        "catalog_gb (set)": (CATALOG * records / 1e9, catalog["catalog_mb"] / 1e3),
        "purge_s (set)": (PURGED * served["retuned"], served["build.purge"]),
        "write_s (set)": (WRITTEN * served["retuned"], served["build.tune_missing"]),
    }
    sizes = heavy_tailed(count, records, 8)
    planning = catalog["plan_1200_accepted"]["least_cpu_ms"] / 1e3
    hit = 1 - (1 - sizes / records) ** 1200
    pairs |= {
        "clusters of 1,200": (float(hit.sum()), served["retuned"]),
        "plan_s of 1,200": (
            PLANNED * float((hit * sizes).sum()),
            planning,
        ),
        "publish_s": (PUBLISHED * float(hit.sum()), served["build.publish"]),
    }
    speed = json.loads((RESULTS / "tuning_vit_tiny_cpu.json").read_text())
    tiny = zoo.entry("vit-ti").architecture
    at = {size: forward_flops(dataclasses.replace(tiny, image_size=size)) for size in (speed["size"], 64)}
    flops_per_s = 2 * at[speed["size"]] * speed["images_per_s"]["ours"]
    for name in ("mnist", "cifar10", "ham10000"):
        requests = json.loads((RESULTS / f"{name}_requests_cpu.json").read_text())["requests"]
        request = next(request for request in requests if request["images"])
        pairs[f"request_s, {name}"] = (2 * at[64] * request["images"] / flops_per_s, request["seconds"])
    return {
        name: {"predicted": round(a, 3), "measured": round(b, 3), "ratio": round(a / b, 2)}
        for name, (a, b) in pairs.items()
    }


def heavy_tailed(clusters: float, records: float, max_share: float) -> np.ndarray:
    """float64 [K']: sizes of at most 100,000 clusters that stand for all."""
    count = int(min(clusters, 100_000))
    shares = np.minimum(np.random.default_rng(0).lognormal(size=count), max_share * np.exp(0.5))
    return shares / shares.sum() * records * count / clusters


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="the model beside measured points")
    parser.add_argument("--records", type=float, default=1e6, help="private images")
    parser.add_argument("--clusters", type=float, default=2000)
    parser.add_argument("--sample", type=float, default=10_000, help="sampled records")
    parser.add_argument("--backbone", default="vit-b-22k", help="see lmeraser backbone --list")
    parser.add_argument("--size", type=int, default=224, help="side of the backbone's input")
    parser.add_argument("--stored", type=int, default=0, help="side of a stored image; 0: as the input")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=8, help="per host")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=300, help="that a device sustains in the tuning program")
    parser.add_argument("--read", type=float, default=1.0, help="gigabytes a second that a host reads of its storage")
    parser.add_argument("--max_share", type=float, default=4, help="members of the largest cluster, in means")
    parser.add_argument("--requests_per_day", type=float, default=100)
    parser.add_argument("--window_hours", type=float, default=24, help="requests wait so long to be served together")
    parser.add_argument(
        "--reclustered", type=float, default=1.0, help="share of clusters that a new clustering changes"
    )
    parser.add_argument("--price", type=float, default=2.5, help="of a device for an hour")
    arguments = parser.parse_args()
    zero_is_legal = ("check", "json", "stored", "sample", "requests_per_day", "reclustered", "price")
    bad = [f"--{k}={v}" for k, v in vars(arguments).items() if k not in zero_is_legal and v in (0, 0.0)]
    bad += [f"--{k}={v}" for k, v in vars(arguments).items() if isinstance(v, int | float) and not 0 <= v < math.inf]
    if bad:
        parser.error(f"{', '.join(bad)}: must be positive")
    if arguments.check:
        result = check()
    else:
        run = run_of(arguments)
        result = {"train": training(run), "memory": memory(run), "month_of_erasures": month(run)}
    for part, values in result.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:<24}{value:>16,.3f}")
    store(surroundings("plan_scale.py") | {"arguments": vars(arguments)} | result, arguments.json)


if __name__ == "__main__":
    main()
