"""What batches of erasure requests cost: formulas (paper section 5.3, appendix 2), and a forecast for a workdir.

docs/theory.md explains the formulas. Symbols: K clusters, m_i members of cluster i, N records, n_s sampled records, s_i
of them in cluster i, lambda T expected requests of a window, or k requests, L lanes of all devices, c share of the
clusters without an erased member that a new clustering changes. Arrays are float64 [K].
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import parse_strict_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout, read_config
from lmeraser_jax.unlearning.artifacts import slice_of

DAY = 24 * 3600.0  # seconds
MONTH = 30.0  # days
WINDOWS = {"at once": 0.0, "an hour": 1 / 24, "a day": 1.0, "a week": 7.0}  # days


@dataclasses.dataclass(frozen=True)
class Batch:
    """The requests that are served together: lambda T, the mean of a Poisson number, or exactly k if `fixed`."""

    requests: float
    fixed: bool = False

    def hits(self, share: float | np.ndarray) -> np.ndarray:
        """Probability that some request names one of a given share of the records, [...] -> [...] (Eq. 14).

        1 - exp(-share lambda T), or 1 - (1 - share)^k. Of the share 1, that there is a request (Eqs. 18 and 21).
        """
        from scipy.special import xlog1py

        share = np.clip(np.asarray(share, np.float64), 0.0, 1.0)  # sums of shares may end a rounding above 1
        return -np.expm1(xlog1py(self.requests, -share) if self.fixed else -share * self.requests)


ONE_REQUEST = Batch(1, fixed=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """What requests may hit."""

    members: np.ndarray  # m_i > 0
    sampled: np.ndarray  # s_i <= m_i, members whose erasure changes the clustering (none for a public sample)
    images: np.ndarray  # passed forward and backward to tune the cluster again

    @property
    def records(self) -> float:
        """N."""
        return float(self.members.sum())

    @property
    def sample(self) -> float:
        """n_s."""
        return float(self.sampled.sum())


def expected_affected(members: Sequence[float] | np.ndarray, batch: Batch) -> float:
    """E[K_affected] = sum of P_i (Eqs. 9 and 15); for k requests sum of 1 - (1 - m_i / N)^k."""
    sizes = np.asarray(members, np.float64)
    return float(batch.hits(sizes / sizes.sum()).sum())


def retuned_probabilities(clusters: Clusters, batch: Batch, changed: float = 1.0) -> np.ndarray:
    """Probability that each cluster is tuned again, [K]. `changed` is c; 1 is the bound.

    1 - (1 - c) P(i is not hit) - c P(i is not hit, and no sampled record of another cluster is named). With c = 0, or
    without a private sample, this is P_i (Eq. 14).
    """
    total, others = clusters.records, clusters.sample - clusters.sampled
    hit, disturbed = batch.hits(clusters.members / total), batch.hits((clusters.members + others) / total)
    return (1 - changed) * hit + changed * disturbed


def expected_images(clusters: Clusters, batch: Batch, changed: float = 1.0) -> float:
    """Images that a window's requests re-tune; a bound, because erased members are not tuned on any more."""
    return float((clusters.images * retuned_probabilities(clusters, batch, changed)).sum())


def expected_makespan(clusters: Clusters, batch: Batch, changed: float = 1.0, lanes: int = 1) -> float:
    """Expected images of the lane that ends last, at least (Eq. 19 with sizes and few lanes): exact for one lane.

    max(E[longest], E[total] / L), summed over windows with and without a new clustering. E[longest] sums over the
    clusters, longest first, the probability that this is the first one that is tuned again.
    """
    order = np.argsort(-clusters.images, kind="stable")
    members, sampled, images = clusters.members[order], clusters.sampled[order], clusters.images[order]
    total, sample = clusters.records, clusters.sample
    members_before = np.concatenate([[0.0], np.cumsum(members)])  # members of the first j clusters
    sampled_before = np.concatenate([[0.0], np.cumsum(sampled)])
    hit = batch.hits(members_before / total)  # some of the first j is hit
    disturbed = batch.hits((members_before + sample - sampled_before) / total)  # or something is clustered again
    unchanged = (disturbed - hit) * (1 - changed) ** np.arange(len(hit))  # clustered again, the first j unchanged
    alone = batch.hits((members + sample - sampled) / total) - batch.hits(sample / total)
    quiet_images = float((images * alone).sum())
    other_images = expected_images(clusters, batch, changed) - quiet_images
    quiet_longest = float((images * np.diff(disturbed)).sum())
    other_longest = float((images * -np.diff(unchanged)).sum())
    return max(quiet_longest, quiet_images / lanes) + max(other_longest, other_images / lanes)


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """What a workdir would have to tune again."""

    workdir: str
    version: int  # of the published state
    clusters: Clusters
    lanes: int  # L of all devices
    speed: float  # images per second of all devices together when no lane is idle
    changed: float  # c, measured on past erasures that changed the clustering; 1 where there is none
    reclusterings: int  # number of such erasures


def read_workload(layout: Layout, catalog: Catalog, devices: int = 1) -> Workload:
    """Reads a workdir's published state from its catalog, as of one moment, and the log of past work.

    Each device is as fast as those that made the slices of the published program. Raises `UserError` where nothing is
    published, no live record is in a cluster, slices are closed forms, or none was timed.
    """
    tree = read_config(layout)
    with catalog.snapshot():
        manifest = catalog.manifest()
        if tree is None or manifest is None:
            raise UserError(f"{layout.root} has no published state; run: lmeraser train {layout.flag}")
        config = settings.from_dict(tree)
        slices, sizes = catalog.slices(), catalog.sizes()
        k = config.clustering
        private = k.partition == "adaptive" and k.sample_from == "private"  # shards have no sample
        sampled = Counter(catalog.sample("train", k.sample_size if private else 0).clusters)
    keys = [key for key in manifest.clusters if sizes.get(key)]
    images = [slices[slice_of(manifest.clusters[key])].images for key in keys]
    if not keys:
        raise UserError(f"{layout.root} has no live private record in a published cluster: nobody can ask for one")
    if not sum(images):
        raise UserError(
            f"{layout.root} makes its slices by a formula: an erasure tunes nothing, so there is nothing to forecast"
        )
    timed = [row for row in slices.values() if row.fingerprint == manifest.fingerprint and row.seconds > 0]
    if not timed:
        raise UserError(f"{layout.root} has no slice of this program that was timed: nothing to forecast from")
    columns = [[sizes[key] for key in keys], [sampled[key] for key in keys], images]
    reclusterings = _read_reclusterings(layout)
    spared, changed = np.sum(reclusterings, axis=0) if reclusterings else (1.0, 1.0)
    return Workload(
        workdir=str(layout.root),
        version=manifest.version,
        clusters=Clusters(*np.array(columns, np.float64)),
        lanes=config.tuning.lanes * devices,
        speed=devices * sum(row.images for row in timed) / sum(row.seconds for row in timed),
        changed=float(changed / spared),
        reclusterings=len(reclusterings),
    )


def _read_reclusterings(layout: Layout) -> list[tuple[float, float]]:
    """For each past erasure that changed the clustering: images of the clusters that no record was erased from, and of
    those that were tuned again among them."""
    pairs, path = [], layout.metrics
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a crash, or edited
            values = parse_strict_json(line)
            spared, changed = values["images_spared"], values["images_changed"]
            if values["kind"] == "build" and values["reclustered"] is True and 0 <= changed <= spared != 0:
                pairs.append((float(spared), float(changed)))
    return pairs


def _duration(seconds: float) -> str:
    """A time in the largest unit of which there is one and a half."""
    for name, unit in (("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def _row(title: str, text: Callable[[Any], str] = "{:.3g}".format) -> Any:
    """A field that is a row of the table."""
    return dataclasses.field(metadata={"title": title, "text": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Expected costs of serving requests together: all of a window with at least one request, or always k."""

    name: str = _row("requests served", str)
    window_days: float  # T; for k requests the mean days from the first to the last; 0: each is served at once
    any: float  # probability of a request within a window
    requests: float = _row("a batch: requests")
    clusters: float = _row("  clusters tuned again")
    paper_clusters: float = _row("    by the paper (Eq. 9)")
    images: float = _row("  passes of a record", "{:.0f}".format)
    share: float = _row("    of a full tuning", "{:.1%}".format)
    reclustering: float = _row("    due to re-clustering", "{:.0%}".format)  # share of the images
    seconds: float = _row("  time", _duration)
    paper_seconds: float = _row("    by the paper (Eq. 19)", _duration)
    batches: float = _row("30 days: batches")
    month_seconds: float = _row("  time", _duration)
    busy: float = _row("  busy", "{:.2%}".format)  # share of the time that tuning takes; from 1 on requests pile up
    wait_seconds: float = _row("a request waits, on average", _duration)  # half a window and a batch


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Policies side by side, the most prompt one first."""

    workload: Workload
    rate: float  # lambda, requests a day
    policies: list[Policy]
    estimates: list[str]  # sentences: what the numbers rest on

    def values(self) -> dict[str, Any]:
        """Everything as plain values; shares in [0, 1]."""
        clusters = {name: column.tolist() for name, column in vars(self.workload.clusters).items()}
        return dataclasses.asdict(self) | {"workload": vars(self.workload) | {"clusters": clusters}}

    def table(self) -> str:
        clusters = self.workload.clusters
        sizes = f"{clusters.records:.0f} records ({clusters.sample:.0f} of them sampled)"
        header = f"{self.workload.workdir}: state {self.workload.version}, {sizes} in {len(clusters.members)} clusters"
        lines = [f"{header}; {self.rate:g} requests a day", ""]
        for field in dataclasses.fields(Policy):
            if field.metadata:
                cells = [field.metadata["text"](getattr(policy, field.name)) for policy in self.policies]
                lines.append(f"{field.metadata['title']:<28}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join([*lines, "", "all of this is an estimate:", *(f"- {line}" for line in self.estimates)])


def forecast(workload: Workload, rate: float, batch: Batch) -> Forecast:
    """The cost of serving requests, `rate` a day, at once, every hour, day and week, and in batches of a given kind."""
    batches = {name: Batch(rate * days) if days else ONE_REQUEST for name, days in WINDOWS.items()}
    if batch not in batches.values():
        name = f"every {batch.requests:g}" if batch.fixed else f"{_days(batch, rate):.4g} days"
        batches[name] = batch
    ordered = sorted(batches.items(), key=lambda item: _days(item[1], rate))
    policies = [_policy(name, each, rate, workload) for name, each in ordered]
    notes = [
        "requests come independently, each for one training record drawn uniformly; owners are not considered",
        f"{workload.speed:.1f} passes a second (lanes: {workload.lanes}), as on this workdir's slices; tuning alone,"
        " lanes packed without a gap; start, planning and purge come on top",
    ]
    if workload.clusters.sample:
        count = workload.reclusterings
        origin = f"the mean of {count} seen here" if count else "the bound, none was seen here"
        notes.append(f"a new clustering re-tunes {workload.changed:.0%} of the clusters that no request hit: {origin}")
    if late := [policy.name for policy in policies if policy.busy >= 1]:
        notes.append(f"requests arrive faster than they are served: {', '.join(late)}")
    return Forecast(workload, rate, policies, notes)


def _days(batch: Batch, rate: float) -> float:
    """Length of a window in days; for k requests, mean days from the first to the last."""
    return (batch.requests - batch.fixed) / rate


def _policy(name: str, batch: Batch, rate: float, workload: Workload) -> Policy:
    """The expectations of a window, divided by the probability that it is not empty (Eq. 18)."""
    clusters, changed, lanes = workload.clusters, workload.changed, workload.lanes
    nonempty, days = float(batch.hits(1.0)), _days(batch, rate)
    lane_speed = workload.speed / lanes  # idle lanes speed no other up
    images = expected_images(clusters, batch, changed) / nonempty
    seconds = expected_makespan(clusters, batch, changed, lanes) / lane_speed / nonempty
    batches = MONTH * rate * nonempty / batch.requests
    return Policy(
        name=name,
        window_days=days,
        any=nonempty,
        requests=batch.requests / nonempty,
        clusters=float(retuned_probabilities(clusters, batch, changed).sum()) / nonempty,
        images=images,
        share=images / float(clusters.images.sum()),
        reclustering=max(0.0, 1 - expected_images(clusters, batch, changed=0.0) / nonempty / images),
        seconds=seconds,
        paper_clusters=expected_affected(clusters.members, batch) / nonempty,
        paper_seconds=float(clusters.images.mean()) / lane_speed,
        wait_seconds=days * DAY / 2 + seconds,
        batches=batches,
        month_seconds=seconds * batches,
        busy=seconds * batches / (MONTH * DAY),
    )
