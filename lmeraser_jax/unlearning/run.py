"""A run: one workdir opened with its config, data, backbone and devices.

All commands that compute work on a `Run`. `open_run` opens a finished workdir; `prepare_run` also imports the data and
pretrains or converts the backbone where the workdir lacks them.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.config.paths import same
from lmeraser_jax.data.record_table import RecordTable, check_pixel_hashes
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.data.source import Source, is_text
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.data.text_rows import HEADER, TextSpec
from lmeraser_jax.data.transforms import ImageSpec
from lmeraser_jax.errors import Damaged, UserError
from lmeraser_jax.hashing import digest
from lmeraser_jax.models import adapt, convert, pretrain, public_sets
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.backbone import Backbone
from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.models.public_sets import PublicSample
from lmeraser_jax.storage.atomic_files import is_there, write_json
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import Imported, check_images, image_file, import_source
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.training import public_prompt, tune, waves
from lmeraser_jax.training.features import PIECE, Extractor, cached, compute_dtype
from lmeraser_jax.training.fingerprint import fingerprint, pinned
from lmeraser_jax.training.multihost import ALONE, Processes
from lmeraser_jax.training.slices import RecipeConstants, noise_activation
from lmeraser_jax.training.tasks import TuningSpec
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning import binding, texts

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """An opened workdir with its frozen backbone; `writable` if this process holds the writer lock.

    Where several processes work on one command, this is process 0 and writes; the others are in `share.serve`.
    """

    layout: Layout
    config: Config
    catalog: Catalog
    backbone: Backbone
    mesh: Mesh
    writable: bool
    processes: Processes = ALONE
    signing_key: "Ed25519PrivateKey | None" = None  # of receipts

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.catalog.get("dataset")["classes"])

    @functools.cached_property
    def input_spec(self) -> ImageSpec | TextSpec:
        """How stored rows become input, in tuning, features and inference."""
        shape = self.catalog.get("dataset")["shape"]
        return TextSpec(shape[0] - HEADER) if is_text(shape) else image_spec(self.config, shape, self.backbone)

    @property
    def image_spec(self) -> ImageSpec:
        """`input_spec` where the records are images."""
        assert isinstance(self.input_spec, ImageSpec)
        return self.input_spec

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Queries and responses -> tokens, with the workdir's own tokenizer. Raises `UserError` where it is damaged."""
        return texts.encoder_of(self.layout, self.catalog, self.config.text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What this program's bits depend on beside a slice's recipe."""
        return fingerprint(self.config.tuning, self.mesh)

    @functools.cached_property
    def tuning_spec(self) -> TuningSpec:
        """The static part of the tuning program."""
        tuning, classes = self.config.tuning, len(self.classes)
        mapping = noise_activation(self.backbone, classes) if tuning.method == "prompt" else ()
        start = self.public_prompt[0].tobytes() if tuning.starts_public else b""
        constants = tuning, classes, self.config.seed, mapping, start, self.config.clustering.feature_batch
        spec = TuningSpec(self.backbone.config, self.input_spec, *constants)
        backbone_lib.graph(spec.architecture, spec.lora)  # refuses adapters of more blocks than there are
        return spec

    @functools.cached_property
    def common_spec(self) -> TuningSpec:
        """The static part of how the common head is made."""
        tuning = dataclasses.replace(self.config.tuning, **dataclasses.asdict(self.config.common))
        return dataclasses.replace(self.tuning_spec, tuning=tuning, mapping=(), start=b"")

    @functools.cached_property
    def recipe_constants(self) -> RecipeConstants:
        """What the recipes of all clusters' slices share."""
        computed_once = self.tuning_spec.on_features or self.tuning_spec.prefix
        batch = self.config.clustering.feature_batch if computed_once else 0
        tuning, backbone, classes = self.config.tuning, self.backbone.digest, len(self.classes)
        start = self.public_prompt[1] if tuning.starts_public else ""
        return RecipeConstants(tuning, backbone, self.input_spec, classes, self.config.seed, batch, start)

    @functools.cached_property
    def common_constants(self) -> RecipeConstants:
        """The same for the common head, which is made of features."""
        batch = self.config.clustering.feature_batch
        return dataclasses.replace(self.recipe_constants, tuning=self.common_spec.tuning, feature_batch=batch, start="")

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, h, w, c]: the rows of the image file that the catalog knows."""
        return image_file(self.layout, self.catalog).view()[: self.catalog.rows_used()]

    def feature_file(self, fingerprint: str = "") -> RowFile:
        """The cache of the features that a program computes with this backbone, by default this program.

        They are of images that are not augmented: all settings of `augment` share it.
        """
        spec = dataclasses.asdict(dataclasses.replace(self.input_spec, augment="none"))
        batch, program = self.config.clustering.feature_batch, fingerprint or self.fingerprint
        path = self.layout.features(digest([self.backbone.digest, spec, batch, program]))
        return RowFile(path, (self.backbone.config.feature_size,), np.float32)

    @functools.cached_property
    def extractor(self) -> Extractor:
        """Un-prompted features of images."""
        return self._extractor(self.input_spec)

    def _extractor(self, spec: ImageSpec | TextSpec) -> Extractor:
        dtype = compute_dtype(self.config.tuning.dtype, self.mesh)
        return Extractor(self.backbone, spec, self.config.clustering.feature_batch, self.mesh, dtype)

    @functools.cached_property
    def public_prompt(self) -> tuple[np.ndarray, str]:
        """The prompt that prompts begin with, float32 [n], and its digest. Raises `UserError` where it is damaged."""
        try:
            return public_prompt.load(self.layout.public_prompt(public_prompt.name_of(self.config, self.backbone)))
        except Damaged as error:
            raise UserError(str(error)) from error  # whoever reads a slice must not take that for damage of the slice

    @functools.cached_property
    def public_sample(self) -> PublicSample | None:
        """What the clustering samples of the set that `config.public` names, if it does. Raises `Damaged`."""
        if not self.config.samples_public_set:
            return None
        return public_sets.load_sample(self.layout.public_sample)[0]

    def public_features(self, sample: PublicSample) -> np.ndarray:
        """Un-prompted features of a public sample, computed anew: float32 [S, D]."""
        return self._extractor(image_spec(self.config, sample.images.shape[1:], self.backbone))(sample.images)

    def features(self, records: RecordTable) -> np.ndarray:
        """Un-prompted features of records, from the cache where it has them: float32 [n, D]."""
        return self._features(records.rows, lambda rows: records.take(np.flatnonzero(np.isin(records.rows, rows))))

    def features_at(self, rows: np.ndarray) -> np.ndarray:
        """The same of the live records in the given image rows, int64 [n]."""
        return self._features(rows, self.catalog.at)

    def _features(self, rows: np.ndarray, records_at: Callable[[np.ndarray], RecordTable]) -> np.ndarray:
        images = self.images

        def compute(rows: np.ndarray) -> np.ndarray:
            # The pixels are checked first: a feature of damaged ones would stay in the cache.
            check_pixel_hashes(images, records_at(rows))
            context = {"workdir": str(self.layout.root), "fingerprint": self.fingerprint}
            return waves.extract(self.processes, context, rows, lambda own: self.extractor(images[own]))

        piece = PIECE * self.processes.count
        return cached(self.feature_file(), rows, len(images), compute, piece, write=self.writable)

    def training_rows(self, tuning_spec: TuningSpec) -> np.ndarray:
        """What slices are made of: uint8 [N, h, w, c], the image file, or float32 [N, D], the cached features."""
        if not tuning_spec.on_features:
            return self.images
        return self.feature_file().view()[: self.catalog.rows_used()]

    def training_data(self, records: RecordTable, tuning_spec: TuningSpec) -> np.ndarray:
        """`training_rows` for slices with these members; features of other records may be anything."""
        if not tuning_spec.on_features:
            return self.images
        features = self.features(records)
        if self.writable:
            return self.training_rows(tuning_spec)
        rows = np.full((self.catalog.rows_used(), features.shape[1]), np.nan, np.float32)
        rows[records.rows] = features
        return rows

    def tune_own(self, tuning_spec: TuningSpec, inputs: np.ndarray, labels: np.ndarray) -> waves.TuneOwn:
        """Makes the slices of some jobs on this process's devices: see `tune.make_slices`."""
        return lambda jobs: tune.make_slices(tuning_spec, self.backbone, jobs, inputs, labels, self.mesh)

    def log(self, kind: str, **values: object) -> None:
        """Appends a line of metrics. Never give it anything about a single record: it outlives erasures."""
        with open(self.layout.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "kind": kind, **values}) + "\n")


def image_spec(config: Config, shape: Sequence[int], backbone: Backbone) -> ImageSpec:
    """The image pipeline for stored images [h, w, c] and a backbone."""
    data, channels = config.data, backbone.config.channels
    if shape[2] > channels:
        legal = f"the backbone takes {channels}; convert the images to grey"
        raise UserError(f"the images have {shape[2]} channels, {legal}")
    size, resize, mean, std = data.image_size, data.resize_size or data.image_size, backbone.mean, backbone.std
    return ImageSpec(*shape, size=size, resize=resize, out_channels=channels, mean=mean, std=std, augment=data.augment)


@contextlib.contextmanager
def open_run(
    workdir: str | Path,
    config: Config | None = None,
    devices: Sequence[Any] | None = None,
    write: bool = False,
    wait: float = 0,
    processes: Processes | None = None,
    signing_key: "Ed25519PrivateKey | None" = None,
) -> Iterator[Run]:
    """Opens a finished workdir.

    Args:
        config: may differ from the stored one in `binding.FREE` only.
        devices: all of this process by default.
        write: take the writer lock.
        wait: seconds to wait for another writer.
        signing_key: signs the receipts (`signatures.load_signing_key`).

    Raises:
        UserError: no workdir, not finished yet, another config, no device, or (with `write`) another writer.
    """
    layout = Layout(workdir)
    stored, mesh = binding.finished_config(layout, config), mesh_of(devices)
    lock = writer_lock(layout, wait) if write else contextlib.nullcontext()
    with pinned(), lock, contextlib.closing(Catalog(layout.catalog)) as catalog:
        check_images(layout, catalog)
        backbone, _ = backbone_lib.load(layout.backbone)
        yield Run(layout, config or stored, catalog, backbone, mesh, write, processes or ALONE, signing_key)


@contextlib.contextmanager
def prepare_run(
    workdir: str | Path,
    config: Config,
    devices: Sequence[Any] | None = None,
    source: Source | None = None,
    reimport: bool = False,
    retune: bool = False,
    wait: float = 0,
    processes: Processes | None = None,
    signing_key: "Ed25519PrivateKey | None" = None,
) -> Iterator[tuple[Run, Imported | None]]:
    """Opens a workdir for writing and makes what it lacks: data, then backbone.

    A config binds a workdir as far as the workdir has come: what the images and the backbone were made with
    from the moment they exist, everything but `binding.FREE` from the first published state on. While an erasure
    is open `tuning` may change, so that one whose loss was not finite can be finished.

    Args:
        source: the data; by default what `config.data` names.
        reimport: read the source again although the workdir has data; new records join, erased ones do not. Without it
            the source is read again where `data.path` or `labels` name another place, which must hold the same records.
        retune: let `tuning` differ from the published state's; the old slices stay for rollback.
        devices, wait, signing_key: as in `open_run`.

    Yields:
        The run, and what an import did (None when nothing was imported).

    Raises:
        UserError: anything in config, data, weights or workdir that cannot work; nothing is lost.
    """
    layout, mesh = Layout(workdir), mesh_of(devices)
    layout.prepare()
    with pinned(), writer_lock(layout, wait), contextlib.closing(Catalog(layout.catalog)) as catalog:
        check_images(layout, catalog)
        binding.check_training(layout, catalog, config, retune)
        imported = converted = backbone = None
        stored, has_data = binding.stored_config(layout) or config, catalog.get("dataset") is not None
        has_backbone = is_there(layout.backbone)
        if has_backbone:
            backbone, inputs = backbone_lib.load(layout.backbone)
            binding.check_backbone(layout, inputs, config)
            if not same(inputs["backbone"]["weights"], config.backbone.weights):
                convert.check_moved(layout.backbone, config.backbone)
        kept = same(stored.data.path, config.data.path) and same(stored.data.labels, config.data.labels)
        moved = has_data and not kept
        if moved:
            data = source or texts.open_source(config, layout, backbone)
            imported = import_source(layout, catalog, data, config, moved=True, join=reimport)
        # Before anything can fail: the same command without --config must not mean another run.
        if stored != config or not is_there(layout.config):
            write_json(layout.config, settings.to_dict(config))
        if not has_backbone and config.backbone.weights:
            converted = convert.load(config.backbone, 0 if config.is_text else config.data.image_size)
            backbone = converted[0]
        if not has_data or (reimport and not moved):
            imported = import_source(layout, catalog, source or texts.open_source(config, layout, backbone), config)
        binding.check_sample(catalog, config)
        if config.samples_public_set:
            _draw_public_sample(config, layout, catalog)
        if not has_backbone:
            _make_backbone(layout, config, catalog, mesh, converted)
        backbone, _ = backbone_lib.load(layout.backbone)
        run = Run(layout, config, catalog, backbone, mesh, True, processes or ALONE, signing_key)
        if config.tuning.starts_public:
            _tune_public_prompt(run)
        yield run, imported


def _make_backbone(
    layout: Layout, config: Config, catalog: Catalog, mesh: Mesh, converted: tuple[Backbone, convert.Provenance] | None
) -> None:
    """Saves the converted backbone, or one that is trained on the public records: from scratch, or from weights."""
    inputs = binding.backbone_inputs(config)
    if converted is not None and not config.is_text:
        image_spec(config, catalog.get("dataset")["shape"], converted[0])
    if converted is not None and config.pretraining.start == "scratch":
        backbone, provenance = converted
        if config.is_text:  # before the backbone, so that a workdir with a backbone has its tokenizer
            texts.keep_tokenizer(layout, catalog, config.backbone.weights, backbone)
        backbone_lib.save(layout.backbone, backbone, inputs, dataclasses.asdict(provenance))
        return

    def is_private(content: str) -> bool:
        return bool(catalog.same_pixels(content))

    public = _public_set(config, layout, catalog, is_private, public_sets.labels_learned(config))
    facts: dict[str, Any] = {"origin": "pretrained in the workdir"}
    if converted is not None:
        backbone, facts, accuracy = adapt.adapt(layout.pretraining, public, config, mesh)
    else:
        backbone, accuracy = pretrain.pretrain(layout.pretraining, public, config, mesh)
    backbone_lib.save(layout.backbone, backbone, inputs, facts)
    shutil.rmtree(layout.pretraining, ignore_errors=True)
    catalog.event("pretrained", accuracy=accuracy, digest=backbone.digest)


def _public_set(
    config: Config, layout: Layout, catalog: Catalog, is_private: public_sets.IsPrivate, learned: str
) -> PublicSet:
    """All public records: those of the data, or a set of its own; other arguments are as in `read_public`."""
    if config.public.source == "data":
        records, classes = catalog.live("public"), catalog.get("dataset")["classes"]
        return PublicSet(image_file(layout, catalog).view()[records.rows], records.labels, len(classes))
    return public_sets.read_public(config, is_private, learned)


def _tune_public_prompt(run: Run) -> None:
    """Tunes the prompt that prompts begin with, unless it is there."""
    config, folder = run.config, run.layout.public_prompt(public_prompt.name_of(run.config, run.backbone))
    with contextlib.suppress(Damaged):  # not there yet, or damaged
        public_prompt.load(folder)
        return
    learned = "--config.tuning.start=public learns them; --config.tuning.start=fresh does not"
    # The prompt is in every slice: it is a function of the public set alone, so that no erased record shows in it.
    public = _public_set(config, run.layout, run.catalog, lambda _: False, learned)
    if not len(public.images):
        raise UserError("--config.tuning.start=public: there are no public images; name a set with --config.public")
    spec = image_spec(config, public.images.shape[1:], run.backbone)
    public_prompt.save(folder, public_prompt.tune_prompt(config, public, run.backbone, spec, run.mesh))


def _draw_public_sample(config: Config, layout: Layout, catalog: Catalog) -> None:
    """Draws the sample of the public set, unless it is there. A published state stays with the one it has."""
    folder, drawn_with = layout.public_sample, public_sets.sample_settings(config)
    with contextlib.suppress(Damaged):  # not there yet, or damaged
        if public_sets.load_sample(folder)[1] == drawn_with:
            return
    sample = public_sets.draw_sample(config, lambda content: bool(catalog.same_pixels(content)))
    if catalog.manifest() is not None and catalog.get("public_sample") != sample.digest:
        raise UserError(
            f"{folder} is missing or damaged, and --config.public names other images now than those it was drawn from;"
            " restore the folder or the public set, or use a new --workdir"
        )
    public_sets.save_sample(folder, sample, drawn_with)
    catalog.set("public_sample", sample.digest)
