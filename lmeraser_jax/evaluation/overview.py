"""An overview of a workdir, from its catalog and its clustering alone: neither JAX nor Orbax is loaded."""

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.config import Config
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import disk_use
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import Manifest, SliceKind, SliceRow
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training.clustering import Clustering, expected_share
from lmeraser_jax.unlearning.artifacts import APPROXIMATE, is_approximate, load_clustering, slice_of, split_reference

ATTEMPTS = 10  # to read a clustering that writers replace and purge meanwhile
MOST_CLASSES, END_CLASSES = 12, 5  # a table of more classes shows only so many of the largest and of the smallest
SPLITS = ("train", "holdout", "test", "public")
FOLDERS = ("backbone", "records", "clusterings", "slices")


@dataclasses.dataclass(frozen=True)
class ClusterRow:
    """One published cluster."""

    key: str
    slice: str
    members: int
    sampled: int
    versions: int
    steps: int
    loss: float
    pinned: bool
    quarantined: bool
    approximate: bool  # its slice stands in for an exact one

    def line(self) -> str:
        counts = f"{self.members:>8}{self.sampled:>9}{self.versions:>10}{self.steps:>8}{self.loss:>9.4f}"
        text = f"{self.key[:12]:<14}{_shown(self.slice):<14}{counts}"
        if self.pinned:
            text += "  pinned"
        if self.approximate:
            text += "  approximate: no guarantee; lmeraser process makes it exact"
        if self.quarantined:
            text += "  quarantined: no prediction uses it"
        return text


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """The live training records of one class; share in [0, 1]."""

    name: str
    records: int
    share: float


@dataclasses.dataclass(frozen=True)
class Overview:
    """A workdir at a glance; sizes in bytes, shares in [0, 1]."""

    workdir: str
    version: int
    published: float  # when, in seconds since 1970
    fingerprint: str
    records: dict[str, int]
    backbone: str
    classes: tuple[ClassRow, ...]  # of the live training records, largest first
    imbalance: float  # records of the largest class over those of the smallest that has any; 0 without records
    clusters: tuple[ClusterRow, ...]
    common: str  # how the common head is computed; "" where there is none
    expected_share: float  # of the data, that a request for an unsampled record re-tunes: sum(m_k^2) / N^2
    sampled_share: float  # of the private records, those whose erasure also re-clusters
    open_requests: int
    warnings: tuple[str, ...]

    @property
    def disk(self) -> dict[str, int]:
        """Bytes of each folder and of the catalog, now: a look at every file."""
        layout = Layout(Path(self.workdir))
        return {name: disk_use(layout.root / name) for name in FOLDERS} | {"catalog": disk_use(layout.catalog)}

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"disk": self.disk}

    def class_table(self) -> str:
        """Classes with their records and shares; of more than `MOST_CLASSES` only the largest and the smallest."""
        if not self.classes:
            return ""  # text has none
        width = max(len(row.name) for row in self.classes)
        lines = [f"  {row.name:<{width}}{row.records:>9}{row.share:>8.1%}" for row in self.classes]
        if len(lines) > MOST_CLASSES:
            lines[END_CLASSES:-END_CLASSES] = [f"  ... {len(lines) - 2 * END_CLASSES} classes between ..."]
        heading = f"training records by class: {len(self.classes)} classes"
        empty = sum(not row.records for row in self.classes)
        if empty:
            heading += f" ({empty} without records)"
        if self.imbalance:
            heading += f", the largest has {self.imbalance:.1f} times the records of the smallest"
        return "\n".join([heading, *lines])

    def cost(self) -> str:
        """What a request costs, in words."""
        text = f"expected share of the data to re-tune per request: {self.expected_share:.1%}"
        if self.sampled_share:
            text += f" (a sampled record, {self.sampled_share:.1%} of all, also re-clusters and costs more)"
        return text

    def table(self) -> str:
        lines = [
            f"{self.workdir}: state {self.version}, backbone {self.backbone[:12]}",
            "records: " + ", ".join(f"{split} {count}" for split, count in self.records.items()),
            *filter(None, [self.class_table()]),
            f"{'cluster':<14}{'slice':<14}{'members':>8}{'sampled':>9}{'versions':>10}{'steps':>8}{'loss':>9}",
            *(cluster.line() for cluster in self.clusters),
        ]
        if self.common:
            members = sum(cluster.members for cluster in self.clusters)
            lines.append(f"common head: {self.common} of all {members} private records")
        lines.append(self.cost())
        lines.append("disk: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.disk.items()))
        if self.open_requests:
            lines.append(f"{self.open_requests} erasures are not finished; finish them with: lmeraser process")
        return "\n".join([*lines, *(f"warning: {message}" for message in self.warnings)])


class _Snapshot(NamedTuple):
    """The rows of the catalog at one moment."""

    manifest: Manifest
    slices: Mapping[str, SliceRow]
    private: RecordTable
    counts: Mapping[str, int]
    open_requests: int
    pinned: Mapping[str, str]
    quarantined: frozenset[str]


def _shown(ref: str) -> str:
    """The beginning of a slice's digest; of an approximate slice that of its own part, as the line says what it is."""
    return slice_of(ref).removeprefix(APPROXIMATE)[:12]


def overview(layout: Layout, catalog: Catalog, config: Config) -> Overview:
    """Reads a workdir's catalog and clustering, both of one published state.

    The config says what the warnings and the common head are about. Raises `UserError` where nothing is published yet,
    or the clustering or the backbone's description cannot be read.
    """
    snapshot, clustering = _read(layout, catalog)
    classes = _class_rows(catalog.get("dataset")["classes"], snapshot.private.labels)
    filled = [row.records for row in classes if row.records]
    clusters = _cluster_rows(snapshot, clustering)
    tuned_again = [snapshot.slices[slice_of(cluster.slice)].size for cluster in clusters]
    return Overview(
        workdir=str(layout.root),
        version=snapshot.manifest.version,
        published=snapshot.manifest.created,
        fingerprint=snapshot.manifest.fingerprint,
        records={split: snapshot.counts.get(split, 0) for split in SPLITS},
        backbone=_backbone_digest(layout),
        classes=classes,
        imbalance=max(filled) / min(filled) if filled else 0.0,
        common=config.common.method if SliceKind.COMMON in snapshot.manifest.entries else "",
        clusters=clusters,
        expected_share=expected_share([cluster.members for cluster in clusters], tuned_again),
        sampled_share=_sampled_share(config, clustering, snapshot.private.ids),
        open_requests=snapshot.open_requests,
        warnings=_warnings(config, len(clustering.keys), len(clustering.sample)),
    )


def _read(layout: Layout, catalog: Catalog) -> tuple[_Snapshot, Clustering]:
    """A snapshot and its clustering; a later one where a writer has published and purged meanwhile."""
    attempts = 0
    while True:
        with catalog.snapshot():  # left before files are read: a writer's purge waits for readers of the catalog
            manifest = catalog.manifest()
            if manifest is None:
                raise UserError(f"{layout.root} has no published state; run: lmeraser train {layout.flag}")
            waiting = len(requests.listed(catalog, only_open=True))
            rows = catalog.slices(), catalog.live("train"), catalog.counts(), waiting
            snapshot = _Snapshot(manifest, *rows, catalog.pins(), catalog.quarantined())
        try:
            return snapshot, load_clustering(layout, manifest.clustering)
        except UserError:
            attempts += 1
            if attempts == ATTEMPTS or catalog.manifest() == manifest:
                raise


def _cluster_rows(snapshot: _Snapshot, clustering: Clustering) -> tuple[ClusterRow, ...]:
    """The published clusters, largest first."""
    members = Counter(snapshot.private.clusters)
    sampled = Counter(clustering.keys[k] for k in clustering.labels)
    versions = Counter(row.cluster for row in snapshot.slices.values())
    rows = []
    for key, ref in snapshot.manifest.clusters.items():
        digest, step = split_reference(ref)
        steps, loss = step or snapshot.slices[digest].steps, snapshot.slices[digest].loss or 0.0
        counts = members[key], sampled[key], versions[key], steps
        rows.append(
            ClusterRow(
                key, ref, *counts, loss, key in snapshot.pinned, key in snapshot.quarantined, is_approximate(ref)
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.members, row.key)))


def _class_rows(classes: list[str], labels: np.ndarray) -> tuple[ClassRow, ...]:
    """All classes, largest first; equal ones in the order of the data set. `labels` int32 [N]."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes)).tolist()
    rows = [ClassRow(name, count, count / max(len(labels), 1)) for name, count in zip(classes, counts, strict=True)]
    return tuple(sorted(rows, key=lambda row: -row.records))


def _backbone_digest(layout: Layout) -> str:
    """The digest in the JSON file that Orbax keeps beside the backbone's arrays."""
    try:
        (path,) = layout.backbone.glob("*/metadata/metadata")
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{layout.backbone} cannot be read: {error}; restore the folder") from error


def _sampled_share(config: Config, clustering: Clustering, private: Collection[str]) -> float:
    """Share of the private records whose erasure changes other clusters, too: of owners' clusters, none does."""
    if config.clustering.partition == "owner":
        return 0.0
    return len(set(clustering.sample) & set(private)) / max(len(private), 1)


def _warnings(config: Config, clusters: int, sample: int) -> tuple[str, ...]:
    """Names a cut that makes unlearning pointless."""
    if config.clustering.partition != "adaptive":
        return ()
    cut = f"--config.clustering.cut={config.clustering.cut}"
    if clusters == 1 and sample > 1:
        return (f"{cut} gives one cluster: every request re-tunes everything; lower the threshold or raise K",)
    if clusters == sample > 1:
        return (f"{cut} gives a cluster for every sampled record ({sample}); raise the threshold or lower K",)
    return ()


def record_list(catalog: Catalog) -> tuple[str, dict[str, Any]]:
    """The live private records as text, with ids and owners as a shell reads them, and as values."""
    dataset = catalog.get("dataset")
    if dataset is None:
        raise UserError("the workdir has no records yet; import them with: lmeraser train")
    records = catalog.live("train", "holdout")
    columns = zip(records.ids, records.labels, records.owners, records.clusters, strict=True)
    rows = [
        {"id": name, "class": dataset["classes"][label] if label >= 0 else "", "owner": owner, "cluster": cluster}
        for name, label, owner, cluster in columns
    ]
    text = "\n".join(
        f"{shlex.quote(row['id'])}\t{row['class']}\t{row['owner'] and shlex.quote(row['owner'])}\t{row['cluster'][:12]}"
        for row in rows
    )
    return text, {"records": rows}
