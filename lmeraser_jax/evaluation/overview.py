"""What people look at: an overview of a workdir as a table, and a picture of clusters and prompts."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import disk_use
from lmeraser_jax.storage.rows import Manifest, SliceKind, SliceRow
from lmeraser_jax.training.clustering import Clustering, expected_share
from lmeraser_jax.training.slices import place_prompt
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice, parts_of, slice_of
from lmeraser_jax.unlearning.run import Run

ATTEMPTS = 10  # to read a state before it is replaced and purged
MOST_CLASSES, END_CLASSES = 12, 5  # a table of more classes shows so many of either end


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


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """The live training records of one class; share in [0, 1]."""

    name: str
    records: int
    share: float


@dataclasses.dataclass(frozen=True)
class Overview:
    """A workdir at a glance; sizes in bytes, shares in [0, 1].

    `expected_share`: of the data, re-tuned by a uniform request for an unsampled record, sum(m_k^2) / N^2 where every
        cluster has a slice of its own.
    `sampled_share`: of the private records, whose erasure also re-clusters.
    `common`: how the common head is made, "" where there is none.
    `classes`: of the live training records, largest first.
    `imbalance`: records of the largest class over those of the smallest that has any; 0 where nothing is left.
    """

    workdir: str
    version: int
    records: dict[str, int]
    backbone: str
    classes: tuple[ClassRow, ...]
    imbalance: float
    clusters: tuple[ClusterRow, ...]
    common: str
    expected_share: float
    sampled_share: float
    open_requests: int
    disk: dict[str, int]
    warnings: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def class_table(self) -> str:
        """Classes with records and shares: all of a dozen, else the ends."""
        shown, between = list(self.classes), 0
        if len(shown) > MOST_CLASSES:
            between = len(shown) - 2 * END_CLASSES
            shown = shown[:END_CLASSES] + shown[-END_CLASSES:]
        width = max(len(row.name) for row in shown)
        lines = [f"  {row.name:<{width}}{row.records:>9}{row.share:>8.1%}" for row in shown]
        if between:
            lines.insert(END_CLASSES, f"  ... {between} classes between ...")
        ratio = f", the largest has {self.imbalance:.1f} times the records of the smallest" if self.imbalance else ""
        empty = sum(not row.records for row in self.classes)
        gone = f" ({empty} without records)" if empty else ""
        return "\n".join([f"training records by class: {len(self.classes)} classes{gone}{ratio}", *lines])

    def cost(self) -> str:
        """What a request costs, in words."""
        text = f"expected share of the data to re-tune per request: {self.expected_share:.1%}"
        sampled = f" (a sampled record, {self.sampled_share:.1%} of all, also re-clusters and costs more)"
        return text + (sampled if self.sampled_share else "")

    def table(self) -> str:
        lines = [
            f"{self.workdir}: state {self.version}, backbone {self.backbone[:12]}",
            "records: " + ", ".join(f"{split} {count}" for split, count in self.records.items()),
            self.class_table(),
            f"{'cluster':<14}{'slice':<14}{'members':>8}{'sampled':>9}{'versions':>10}{'steps':>8}{'loss':>9}",
        ]
        lines += [
            f"{c.key[:12]:<14}{c.slice[:12]:<14}{c.members:>8}{c.sampled:>9}{c.versions:>10}{c.steps:>8}{c.loss:>9.4f}"
            + "  pinned" * c.pinned
            + "  quarantined: no prediction uses it" * c.quarantined
            for c in self.clusters
        ]
        if self.common:
            lines.append(
                f"common head: {self.common} of all {sum(row.members for row in self.clusters)} private records"
            )
        lines.append(self.cost())
        lines.append("disk: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.disk.items()))
        if self.open_requests:
            lines.append(f"{self.open_requests} erasures are not finished; finish them with: lmeraser process")
        return "\n".join(lines + [f"warning: {message}" for message in self.warnings])


class _Moment(NamedTuple):
    """What the catalog holds at one moment."""

    manifest: Manifest
    made: dict[str, SliceRow]
    private: RecordTable
    counts: dict[str, int]
    open_requests: int
    pinned: frozenset[str]
    quarantined: frozenset[str]


def _moment(run: Run) -> _Moment:
    catalog = run.catalog
    with catalog.snapshot():
        manifest = catalog.manifest()
        if manifest is None:
            what = "has no published state; run: lmeraser train"
            raise UserError(f"{run.layout.root} {what} --workdir={run.layout.root}")
        waiting = len(requests.listed(catalog, only_open=True))
        kept_out = (frozenset(catalog.pins()), catalog.quarantined())
        return _Moment(manifest, catalog.slices(), catalog.live("train"), catalog.counts(), waiting, *kept_out)


def _readable_moment(run: Run) -> tuple[_Moment, Clustering]:
    """A moment and its clustering; a later one where a writer has published and removed the clustering meanwhile."""
    for left in reversed(range(ATTEMPTS)):
        moment = _moment(run)
        try:
            return moment, load_clustering(run.layout, moment.manifest.clustering)
        except UserError:
            if not left or run.catalog.manifest() == moment.manifest:
                raise
    raise AssertionError("the last attempt returns or raises")


def overview(run: Run) -> Overview:
    """Reads a workdir's catalog, as of one moment, and disk use.

    Raises:
        UserError: nothing is published yet, or the clustering cannot be read.
    """
    moment, clustering = _readable_moment(run)
    manifest, made, private, counts, waiting, pinned, quarantined = moment
    sampled = Counter(clustering.keys[k] for k in clustering.labels)
    versions = Counter(row.cluster for row in made.values())
    sizes = Counter(private.clusters)
    rows = [
        _cluster_row(key, made[slice_of(ref)], ref, sizes[key], sampled[key], versions[key], pinned, quarantined)
        for key, ref in manifest.clusters.items()
    ]
    again = [made[slice_of(ref)].size for ref in manifest.clusters.values()]
    classes = _classes(run, private.labels)
    filled = [row.records for row in classes if row.records]
    splits = {split: counts.get(split, 0) for split in ("train", "holdout", "test", "public")}
    parts = ("backbone", "records", "clusterings", "slices")
    return Overview(
        workdir=str(run.layout.root),
        version=manifest.version,
        records=splits,
        backbone=run.backbone.digest,
        classes=classes,
        imbalance=max(filled) / min(filled) if filled else 0.0,
        common=run.config.common.method if SliceKind.COMMON in manifest.entries else "",
        clusters=tuple(sorted(rows, key=lambda row: (-row.members, row.key))),
        expected_share=expected_share([row.members for row in rows], again),
        sampled_share=len(set(clustering.sample) & set(private.ids)) / max(len(private), 1),
        open_requests=waiting,
        disk={part: disk_use(getattr(run.layout, part)) for part in parts} | {"catalog": disk_use(run.layout.catalog)},
        warnings=tuple(_warnings(run, len(clustering.keys), len(clustering.sample))),
    )


def _cluster_row(
    key: str,
    row: SliceRow,
    ref: str,
    members: int,
    sampled: int,
    versions: int,
    pinned: frozenset[str],
    kept_out: frozenset[str],
) -> ClusterRow:
    steps, loss = parts_of(ref)[1] or row.steps, row.loss or 0.0
    return ClusterRow(key, ref, members, sampled, versions, steps, loss, key in pinned, key in kept_out)


def _classes(run: Run, labels: np.ndarray) -> tuple[ClassRow, ...]:
    counts = np.bincount(labels, minlength=len(run.classes))
    rows = [ClassRow(name, int(n), float(n / max(len(labels), 1))) for name, n in zip(run.classes, counts, strict=True)]
    return tuple(sorted(rows, key=lambda row: -row.records))  # ties stay in the order of the classes


def _warnings(run: Run, clusters: int, sample: int) -> list[str]:
    """Cuts that make unlearning pointless."""
    cut = f"--config.clustering.cut={run.config.clustering.cut}"
    if clusters == 1 and sample > 1:
        return [f"{cut} gives one cluster: every request re-tunes everything; lower the threshold or raise K"]
    if clusters == sample > 1:
        return [f"{cut} gives a cluster for every sampled record ({sample}); raise the threshold or lower K"]
    return []


def record_list(run: Run) -> tuple[str, dict[str, Any]]:
    """The live private records as text and as values: id, class, owner, cluster."""
    records = run.catalog.live("train", "holdout")
    rows = [
        {"id": name, "class": run.classes[label], "owner": owner, "cluster": cluster}
        for name, label, owner, cluster in zip(
            records.ids, records.labels, records.owners, records.clusters, strict=True
        )
    ]
    text = "\n".join(f"{r['id']}\t{r['class']}\t{r['owner']}\t{r['cluster'][:12]}" for r in rows)
    return text, {"records": rows}


def picture(run: Run, path: Path, clusters: int = 8, members: int = 10, side: int = 64) -> None:
    """Draws the largest clusters, a row each: some members, the prompt, and a member with the prompt on it.

    Args:
        run: a workdir with a published state.
        path: PNG to write.
        clusters, members: rows and images per row at most.
        side: pixels of a tile.
    """
    from PIL import Image, ImageDraw

    manifest = run.catalog.manifest()
    assert manifest is not None
    records, images = run.catalog.live("train"), run.images
    biggest = [key for key, _ in Counter(records.clusters).most_common(clusters)]
    label, gap = 128, 4
    canvas = Image.new("RGB", (label + (members + 2) * (side + gap) + gap, len(biggest) * (side + gap) + 24), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 6), "cluster", fill="black")
    draw.text((label, 6), "members", fill="black")
    draw.text((label + members * (side + gap), 6), "prompt", fill="black")
    draw.text((label + (members + 1) * (side + gap), 6), "on image", fill="black")
    for row, key in enumerate(biggest):
        chosen = [i for i, cluster in enumerate(records.clusters) if cluster == key]
        top = 24 + row * (side + gap)
        draw.text((gap, top + 16), f"{key[:12]}\n{len(chosen)} members", fill="black")
        spread = [chosen[i] for i in np.linspace(0, len(chosen) - 1, min(members, len(chosen))).astype(int)]
        tiles = [images[records.rows[i]] / 255.0 for i in spread]
        prompt = _prompt(run, manifest, key)
        shown = prompt / (2 * max(np.abs(prompt).max(), 1e-6)) + 0.5
        on_image = _resized(tiles[0], prompt.shape[0]) + prompt * run.spec.std
        for column, tile in [*enumerate(tiles), (members, shown), (members + 1, on_image)]:
            canvas.paste(_tile(tile, side), (label + column * (side + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _prompt(run: Run, manifest: Manifest, key: str) -> np.ndarray:
    """A cluster's prompt as an image [S, S, C], in normalised pixels; zeros where none is tuned."""
    architecture, width = run.backbone.config, run.config.tuning.active_prompt_width
    if not width:
        return np.zeros((architecture.image_size, architecture.image_size, architecture.channels), np.float32)
    border = load_slice(run, manifest.entries[key]).prompt
    if run.config.tuning.one_head:
        border = border[load_clustering(run.layout, manifest.clustering).keys.index(key)]
    return np.asarray(place_prompt(border, architecture.image_size, width, architecture.channels))


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """Nearest-neighbour copy of an image [h, w, c] at side x side, with as many channels."""
    rows, columns = (np.arange(side) * old // side for old in image.shape[:2])
    return image[rows][:, columns]


def _tile(image: np.ndarray, side: int) -> Any:
    from PIL import Image

    pixels = np.round(np.clip(_resized(image, side), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
