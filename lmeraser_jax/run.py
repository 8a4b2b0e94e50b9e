"""A run: one workdir opened with its config, data, backbone and devices.

Everything after this line of the program works on a `Run`; making one imports the data and pretrains or
converts the backbone if the workdir does not have them yet.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lmeraser_jax import config as settings
from lmeraser_jax import features as feature_module
from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.backbones import convert, pretrain
from lmeraser_jax.backbones.backbone import Backbone
from lmeraser_jax.config import Config
from lmeraser_jax.digests import digest
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.images import ImageSpec
from lmeraser_jax.records import sources
from lmeraser_jax.records.cache import RowFile
from lmeraser_jax.records.source import Source
from lmeraser_jax.records.table import RecordTable
from lmeraser_jax.store.catalog import Catalog
from lmeraser_jax.store.importing import Imported, image_file, import_settings, import_source
from lmeraser_jax.store.layout import Layout, write_json, writer_lock
from lmeraser_jax.tuning import Problem, mesh_of


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """An opened workdir with its frozen backbone."""

    layout: Layout
    config: Config
    catalog: Catalog
    backbone: Backbone
    mesh: Mesh

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.catalog.get("dataset")["classes"])

    @functools.cached_property
    def spec(self) -> ImageSpec:
        """The image pipeline of tuning, features and inference."""
        return image_spec(self.config, self.catalog.get("dataset")["shape"], self.backbone.config.channels)

    @functools.cached_property
    def problem(self) -> Problem:
        """The static part of the tuning program."""
        return Problem(self.backbone.config, self.spec, self.config.tuning, len(self.classes), self.config.seed)

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, h, w, c]: all rows of the image file."""
        return image_file(self.layout, self.catalog).view()

    def features(self, records: RecordTable) -> np.ndarray:
        """Un-prompted features of records, from the cache where it has them: float32 [n, D]."""
        identity = digest([self.backbone.digest, dataclasses.asdict(self.spec), self.config.clustering.feature_batch])
        file = RowFile(self.layout.features(identity), (self.backbone.config.width,), np.float32)
        return feature_module.cached(
            file,
            records.rows,
            self.backbone,
            self.spec,
            self.images,
            self.config.clustering.feature_batch,
            self.mesh,
            feature_module.compute_dtype(self.config.tuning.dtype, self.mesh),
        )

    def log(self, kind: str, **values: object) -> None:
        """Appends a line of metrics. Never give it anything about a single record: it outlives erasures."""
        with open(self.layout.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "kind": kind, **values}) + "\n")


def image_spec(config: Config, shape: Sequence[int], channels: int) -> ImageSpec:
    """The image pipeline for stored images [h, w, c] and a backbone with so many channels."""
    if shape[2] > channels:
        raise UserError(
            f"the images have {shape[2]} channels, the backbone takes {channels}; convert the images to grey"
        )
    return ImageSpec(
        *shape,
        size=config.data.image_size,
        resize=config.data.resize_size or config.data.image_size,
        out_channels=channels,
        mean=config.backbone.mean,
        std=config.backbone.std,
        augment=config.data.augment,
    )


def stored_config(workdir: str | Path) -> Config | None:
    """The config a workdir was made with, or None."""
    path = Layout(workdir).config
    if not path.exists():
        return None
    try:
        return settings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def opened(workdir: str | Path, config: Config | None = None, devices: Sequence[Any] | None = None) -> Iterator[Run]:
    """Opens a finished workdir. `config` may differ from the stored one in `inference` only.

    Raises:
        UserError: no workdir, no backbone yet, or another config.
    """
    layout = Layout(workdir)
    layout.require()
    stored = stored_config(workdir)
    backbone = frozen.load(layout)
    if stored is None or backbone is None:
        raise UserError(f"{layout.root} is not complete yet; finish it with: lmeraser train --workdir={layout.root}")
    if config is not None:
        _check_same(layout, stored, config, everything=True)
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        yield Run(layout, config or stored, catalog, backbone, mesh_of(devices))


@contextlib.contextmanager
def prepared(
    workdir: str | Path,
    config: Config,
    devices: Sequence[Any] | None = None,
    source: Source | None = None,
    reimport: bool = False,
) -> Iterator[tuple[Run, Imported | None]]:
    """Opens a workdir for writing and makes what it lacks: data, then backbone.

    Args:
        workdir: new, empty or an existing workdir.
        config: the run's config; must agree with the stored one.
        devices: all by default.
        source: the data; by default what `config.data` names.
        reimport: read the source again although the workdir has data; new records join, erased ones do not.

    Yields:
        The run, and what an import did (None when nothing was imported).

    Raises:
        UserError: anything in config, data, weights or workdir that cannot work; nothing is lost.
    """
    layout = Layout(workdir)
    layout.prepare()
    with writer_lock(layout), contextlib.closing(Catalog(layout.catalog)) as catalog:
        stored = stored_config(workdir)
        if stored is not None:
            _check_same(layout, stored, config, everything=catalog.manifest() is not None)
        imported, dataset = None, catalog.get("dataset")
        if dataset is not None:
            lines = settings.differences(dataset["settings"], import_settings(config), "data.")
            raise_all(
                lines,
                f"the images in {layout.root} were imported with other settings (workdir -> flags):" * bool(lines),
            )
        if dataset is None or reimport:
            imported = import_source(layout, catalog, source or sources.load(config.data), config)
        _check_data(config, catalog, catalog.manifest() is None)
        mesh = mesh_of(devices)
        backbone = frozen.load(layout) or _make_backbone(layout, config, catalog, mesh)
        if stored != config:
            write_json(layout.config, settings.to_dict(config))
        yield Run(layout, config, catalog, backbone, mesh), imported


def _check_same(layout: Layout, stored: Config, config: Config, everything: bool) -> None:
    """Refuses a config that would contradict what the workdir holds; `inference` is always free."""
    free = ("inference",) if everything else ("inference", "tuning", "clustering")
    old, new = ({k: v for k, v in settings.to_dict(c).items() if k not in free} for c in (stored, config))
    lines = settings.differences(old, new)
    raise_all(
        lines,
        f"{layout.root} was made with another config (workdir -> flags); use a new --workdir or drop:" * bool(lines),
    )


def _check_data(config: Config, catalog: Catalog, first: bool) -> None:
    """What the config asks of the data; the sample may only outgrow it later, by erasures."""
    k = config.clustering
    split = "train" if k.sample_from == "private" else "public"
    count = len(catalog.live(split))
    problems = []
    if first and k.sample_size > count:
        what = f"at most the number of {k.sample_from} records, {count}"
        problems.append(f"--config.clustering.sample_size={k.sample_size}: must be {what}")
    kind, value = settings.cut_of(k.cut)
    if kind == "auto" and value > k.sample_size:
        problems.append(f"--config.clustering.cut={k.cut}: K must be at most clustering.sample_size={k.sample_size}")
    raise_all(problems)


def _make_backbone(layout: Layout, config: Config, catalog: Catalog, mesh: Mesh) -> Backbone:
    """Converts the weights that the config names, or pretrains on the public records."""
    if config.backbone.weights:
        backbone = convert.load(config)
        image_spec(config, catalog.get("dataset")["shape"], backbone.config.channels)
        frozen.save(layout, backbone)
        return backbone
    public, classes = catalog.live("public"), catalog.get("dataset")["classes"]
    images = image_file(layout, catalog).view()[public.rows]
    backbone, accuracy = pretrain.pretrain(layout, images, public.labels, len(classes), config, mesh)
    catalog.event("pretrained", accuracy=accuracy, digest=backbone.digest)
    return backbone
