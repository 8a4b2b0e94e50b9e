"""What serving erasures at once, every so often or so many at a time would cost on a workdir: an estimate.

Reads the catalog and the log of past work; needs no lock, no backbone and no device.
"""

import contextlib
import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError
from lmeraser_jax.experiments import cost_model, simulation
from lmeraser_jax.experiments.cost_model import Batch, Clusters, Machine
from lmeraser_jax.experiments.simulation import Simulated
from lmeraser_jax.hashing import parse_strict_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import images_of
from lmeraser_jax.storage.workdir import Layout, read_config

DAY = 24 * 3600.0  # seconds
MONTH = 30.0  # days
WINDOWS = {"at once": 0.0, "an hour": 1 / 24, "a day": 1.0, "a week": 7.0}  # days
ONE = Batch(1, fixed=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """What a workdir would have to tune again.

    Attributes:
        workdir, version: whose published state.
        clusters: members, sampled members, images of each cluster's whole chain of stages; clusters that share a
            slice count as one.
        lanes: L of one device.
        stages: `tuning.slices`.
        speed: images per second of one device, measured on slices of the published program; None where none was timed.
        reclusterings: for every erasure that changed the clustering, images of the clusters that no erased record was
            in, and of those among them that were tuned again.
    """

    workdir: str
    version: int
    clusters: Clusters
    lanes: int
    stages: int
    speed: float | None
    reclusterings: tuple[tuple[float, float], ...]

    @property
    def changed(self) -> float:
        """c, the share of the clusters nobody named that a new clustering re-tunes: of past ones, or the bound 1."""
        spared, altered = (
            (sum(part) for part in zip(*self.reclusterings, strict=True)) if self.reclusterings else (1, 1)
        )
        return altered / spared

    def machine(self, devices: int, speed: float | None = None) -> Machine:
        """So many devices: each as fast as those that made the slices, or of a given speed all together."""
        speed = speed or (self.speed and self.speed * devices)
        assert speed, "no slice was timed"
        return Machine(self.lanes * devices, speed)


@dataclasses.dataclass(frozen=True)
class Paper:
    """A policy by the paper's formulas: clusters (Eq. 9) and seconds (Eq. 19) of a batch, T_s / T_c (Eq. 24)."""

    clusters: float
    seconds: float
    month_seconds: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Policy:
    """Expected cost of serving requests together: all of a window in which somebody asks, or always so many.

    Attributes:
        name: when, in words.
        window_days: T; of so many requests, mean days from the first to the last. 0: each is served alone, at once.
        any: probability that somebody asks within a window.
        requests, clusters, images: of a batch; clusters and images are those tuned again.
        share: images over those of a full re-tune.
        reclustering: share of the images that new clusterings are to blame for.
        seconds: of a batch, tuning alone.
        wait_seconds: from asking to the end of tuning, mean: half a window and a batch.
        batches, month_images, month_seconds: of 30 days.
        busy: share of the time that tuning takes; from 1 on requests pile up.
        gain: seconds of a full re-tune over those of a batch.
        paper: the same by the paper's formulas.
    """

    name: str
    window_days: float
    any: float
    requests: float
    clusters: float
    images: float
    share: float
    reclustering: float
    seconds: float
    wait_seconds: float
    batches: float
    month_images: float
    month_seconds: float
    busy: float
    gain: float
    paper: Paper


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Policies side by side, and windows, or batches, of the given kind drawn at random."""

    workload: Workload
    rate: float  # requests a day
    batch: Batch
    machine: Machine
    changed: float
    policies: tuple[Policy, ...]
    simulated: Simulated

    def values(self) -> dict[str, Any]:
        """Everything as plain values; shares in [0, 1]."""
        w, clusters = self.workload, self.workload.clusters
        return {
            "workdir": w.workdir,
            "version": w.version,
            "rate_per_day": self.rate,
            "records": clusters.records,
            "sampled": clusters.sample,
            "clusters": len(clusters.members),
            "size_biased_images": cost_model.size_biased_images(clusters),
            "images_full": float(clusters.images.sum()),
            "images_per_second": self.machine.speed,
            "lanes": self.machine.lanes,
            "stages": w.stages,
            "reclustered_share": self.changed,
            "reclusterings_seen": len(w.reclusterings),
            "policies": [dataclasses.asdict(policy) for policy in self.policies],
            "simulated": {"window_days": _days(self.batch, self.rate)} | dataclasses.asdict(self.simulated),
            "estimates": self.estimates(),
        }

    def table(self) -> str:
        w, clusters, drawn, b = self.workload, self.workload.clusters, self.simulated, self.batch
        kind = f"batches of {b.requests:g} requests" if b.fixed else f"windows of {_days(b, self.rate):g} days"
        lines = [
            f"{w.workdir}: state {w.version}, {clusters.records:.0f} records ({clusters.sample:.0f} of them sampled)"
            f" in {len(clusters.members)} clusters; {self.rate:g} requests a day",
            "",
            _row("requests served", [policy.name for policy in self.policies]),
            *(_row(name, [cell(policy) for policy in self.policies]) for name, cell in ROWS),
            "",
            f"{drawn.windows} {kind} drawn at random; 95 % of them tune"
            f" {drawn.retuned.low:.0f} to {drawn.retuned.high:.0f} clusters,"
            f" {drawn.images.low:.0f} to {drawn.images.high:.0f} images,"
            f" {_duration(drawn.seconds.low)} to {_duration(drawn.seconds.high)}",
            "all of this is an estimate:",
            *(f"- {line}" for line in self.estimates()),
        ]
        return "\n".join(lines)

    def estimates(self) -> list[str]:
        """What the numbers rest on."""
        w, lanes, devices = self.workload, self.machine.lanes, self.machine.lanes // self.workload.lanes
        speed = f"{self.machine.speed:.1f} images a second on {lanes} lane{'s' * (lanes > 1)}"
        measured = "measured on this workdir's slices" + f", times {devices} devices" * (devices > 1)
        measured = measured if w.speed and self.machine == w.machine(devices) else "as given"
        found = [
            "requests come independently, each for one training record drawn uniformly; owners are not looked at",
            f"{speed}, {measured}; tuning alone, lanes packed without a gap; start, planning and purge come on top",
        ]
        if w.clusters.sample:
            seen = (
                f"the mean of {len(w.reclusterings)} seen here" if w.reclusterings else "the bound, none was seen here"
            )
            origin = seen if self.changed == w.changed else "as given"
            found.append(f"a new clustering re-tunes {self.changed:.0%} of what nobody named: {origin}")
        if w.stages > 1:
            found.append(f"a hit cluster counts with all its {w.stages} stages, up to 1.5 times too much")
        late = [policy.name for policy in self.policies if policy.busy >= 1]
        if late:
            found.append(f"requests arrive faster than they are served: {', '.join(late)}")
        return found


ROWS = (
    ("a batch: requests", lambda p: f"{p.requests:.3g}"),
    ("  clusters tuned again", lambda p: f"{p.clusters:.3g}"),
    ("    by the paper (Eq. 9)", lambda p: f"{p.paper.clusters:.3g}"),
    ("  images", lambda p: f"{p.images:.0f}"),
    ("    of a full re-tune", lambda p: f"{p.share:.1%}"),
    ("    due to re-clustering", lambda p: f"{p.reclustering:.0%}"),
    ("  time", lambda p: _duration(p.seconds)),
    ("    by the paper (Eq. 19)", lambda p: _duration(p.paper.seconds)),
    ("30 days: batches", lambda p: f"{p.batches:.3g}"),
    ("  time", lambda p: _duration(p.month_seconds)),
    ("    by the paper", lambda p: _duration(p.paper.month_seconds)),
    ("  busy", lambda p: f"{p.busy:.2%}"),
    ("a request waits, on average", lambda p: _duration(p.wait_seconds)),
)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells)


def _duration(seconds: float) -> str:
    """A time in the largest unit of which there is one and a half."""
    for name, unit in (("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def published(layout: Layout, catalog: Catalog) -> Workload:
    """What the published state of a workdir would have to tune again. Reads the catalog, as of one moment.

    Raises:
        UserError: nothing is published, or no live record is in a cluster.
    """
    tree = read_config(layout)
    with catalog.snapshot():
        manifest = catalog.manifest()
        if tree is None or manifest is None:
            raise UserError(f"{layout.root} has no published state; run: lmeraser train --workdir={layout.root}")
        config = settings.from_dict(tree)
        made, sizes = catalog.slices(), catalog.sizes()
        k = config.clustering
        private = k.partition == "adaptive" and k.sample_from == "private"  # shards have no sample
        sampled = Counter(catalog.sample("train", k.sample_size if private else 0).clusters)
    members, sampled_members = Counter(), Counter()
    for key, ref in manifest.entries.items():
        if sizes.get(key):
            members[ref] += sizes[key]
            sampled_members[ref] += sampled[key]
    if not members:
        raise UserError(f"{layout.root} has no live private record in a published cluster: nobody can ask for one")
    images = [images_of(made, ref) for ref in members]
    if not sum(images):
        raise UserError(f"{layout.root} makes its slices by a formula: an erasure tunes no image, nothing is to plan")
    timed = [row for row in made.values() if row.fingerprint == manifest.fingerprint and row.seconds > 0]
    return Workload(
        workdir=str(layout.root),
        version=manifest.version,
        clusters=Clusters(
            np.array(list(members.values()), np.float64),
            np.array([sampled_members[ref] for ref in members], np.float64),
            np.array(images, np.float64),
        ),
        lanes=config.tuning.lanes,
        stages=1,
        speed=sum(row.images for row in timed) / sum(row.seconds for row in timed) if timed else None,
        reclusterings=_reclusterings(layout),
    )


def _reclusterings(layout: Layout) -> tuple[tuple[float, float], ...]:
    """From the log of past work."""
    found, path = [], layout.metrics
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a crash, edited, or of an older release
            values = parse_strict_json(line)
            spared, altered = values["images_spared"], values["images_changed"]
            if values["kind"] == "reconcile" and values["reclustered"] is True and 0 <= altered <= spared != 0:
                found.append((float(spared), float(altered)))
    return tuple(found)


def forecast(workload: Workload, rate: float, batch: Batch, machine: Machine, changed: float) -> Forecast:
    """The cost of serving requests at once, every hour, day and week, and as asked for.

    Args:
        workload: of a workdir.
        rate: lambda, requests a day, above 0.
        batch: what is served together: lambda T requests of a window, or exactly k.
        machine: that tunes a batch.
        changed: c, share of the clusters nobody named that a new clustering re-tunes.
    """
    clusters = workload.clusters
    batches = {name: Batch(rate * days) if days else ONE for name, days in WINDOWS.items()}
    if batch not in batches.values():
        batches[f"every {batch.requests:g}" if batch.fixed else f"{_days(batch, rate):.4g} days"] = batch
    ordered = sorted(batches.items(), key=lambda one: _days(one[1], rate))
    policies = tuple(_policy(name, one, clusters, rate, machine, changed) for name, one in ordered)
    count = simulation.windows_for(clusters)
    drawn = simulation.simulate(clusters, batch, count, changed=changed, machine=machine)
    return Forecast(workload, rate, batch, machine, changed, policies, drawn)


def _days(batch: Batch, rate: float) -> float:
    """Length of a window; of k requests, mean days from the first to the last."""
    return (batch.requests - batch.fixed) / rate


def _policy(name: str, batch: Batch, clusters: Clusters, rate: float, machine: Machine, changed: float) -> Policy:
    """Expectations of a batch are those of a window over the probability that it is not empty (Eq. 18)."""
    some, full, days = cost_model.any_affected(batch), float(clusters.images.sum()), _days(batch, rate)
    images = cost_model.expected_images(clusters, batch, changed) / some
    seconds = cost_model.expected_makespan(clusters, batch, changed, machine.lanes) / machine.lane_speed / some
    batches = MONTH * rate * some / batch.requests
    single = float(clusters.images.mean()) / machine.lane_speed  # T_c
    by_paper = cost_model.expected_time(single, batch) / some
    return Policy(
        name=name,
        window_days=days,
        any=some,
        requests=batch.requests / some,
        clusters=cost_model.expected_retuned(clusters, batch, changed) / some,
        images=images,
        share=images / full,
        reclustering=max(0.0, 1 - cost_model.expected_images(clusters, batch, changed=0.0) / some / images),
        seconds=seconds,
        wait_seconds=days * DAY / 2 + seconds,
        batches=batches,
        month_images=images * batches,
        month_seconds=seconds * batches,
        busy=seconds * batches / (MONTH * DAY),
        gain=full / machine.speed / seconds,
        paper=Paper(
            clusters=cost_model.expected_affected(clusters.members, batch) / some,
            seconds=by_paper,
            month_seconds=by_paper * batches,
            gain=cost_model.efficiency_gain(full / machine.speed, single),
        ),
    )
