"""Public records of their own, which `config.public` names: all of them, or a sample for the clustering.

No erasure reaches them. Images that are private or test images too, pixel for pixel, are named. They are left out of
the training of a backbone; a sample has them, because erasures must not show in it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.config import Config, Data
from lmeraser_jax.data import load as sources
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.data.source import WITHOUT_LABELS, Item, Source, content_hash, limit_positions, problems
from lmeraser_jax.errors import Damaged, UserError, join_limited, raise_all
from lmeraser_jax.hashing import digest
from lmeraser_jax.models.pretrain import PublicSet
from lmeraser_jax.progress import progress, warn
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.catalog import sample_rank

PIECE = 1024  # images that are read at a time
FLAGS = {  # in messages of a source, {its own: that of the public set}
    "--config.data.train_split": "--config.public.split",
    "--config.data.": "--config.public.",
    "with data.source": "with public.source",
}
IsPrivate = Callable[[str], bool]  # whether an image with this content hash is a private or a test image


@dataclasses.dataclass(frozen=True, eq=False)
class PublicSample:
    """Public images that are sampled for the clustering in the place of private ones."""

    records: RecordTable  # [S]; digests stand for ids, no record of the workdir has such an id; rows are in `images`
    images: np.ndarray  # uint8 [S, h, w, c]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over ids and pixels."""
        return digest([self.records.ids, self.records.contents])


def read_public(config: Config, is_private: IsPrivate, learned: str) -> PublicSet:
    """Reads the public set without private images. Raises `UserError` where that fails or all its images are private.

    `learned` says for a message which setting learns labels; where it is empty they may be missing, and then all images
    are of one class.
    """
    source, positions = _open(config, learned)
    chosen = _take(source, positions, is_private, len(positions))
    images, labels = np.stack([image for _, image in chosen]), np.array([item.label for item, _ in chosen], np.int32)
    if labels.min() < 0:
        return PublicSet(images, np.zeros(len(images), np.int32), 1)
    return PublicSet(images, labels, len(source.class_names))


def labels_learned(config: Config) -> str:
    """The `learned` of `read_public` for the training of a backbone."""
    supervise = config.pretraining.supervise
    return f"--config.pretraining.supervise={supervise} learns them, {WITHOUT_LABELS} features" if supervise else ""


def draw_sample(config: Config, is_private: IsPrivate) -> PublicSample:
    """The `clustering.sample_size` images with the smallest keyed hashes: a function of the public set alone.

    Were private images left out, the sample would show that there was a record which is erased now. Raises `UserError`
    where there are fewer images, or where all that are drawn are private.
    """
    size = config.clustering.sample_size
    source, positions = _open(config)
    ranked = sorted(positions, key=lambda position: sample_rank(config.seed, _sample_id(source.items[position])))
    chosen = _take(source, ranked, lambda _: False, size)
    if len(chosen) < size:
        raise UserError(
            f"--config.clustering.sample_size={size}: must be at most {len(chosen)}, the number of images of the public"
            f" set {source.name}"
        )
    twins = [item.id for item, image in chosen if is_private(content_hash(image))]
    if len(twins) == size:
        raise UserError(f"all images drawn from the public set {source.name} are private or test images; use another")
    if twins:
        warn(
            f"{len(twins)} images of the public sample are private or test images too: {join_limited(twins)}. They stay"
            " in it as public images: a sample that depended on private records would show that an erased one existed"
        )
    chosen.sort(key=lambda pair: _sample_id(pair[0]))
    return _sample([_sample_id(item) for item, _ in chosen], np.stack([image for _, image in chosen]))


def save_sample(folder: Path, sample: PublicSample, settings: dict[str, Any]) -> None:
    """Writes a sample with the settings that it was drawn with."""
    notes = {"ids": list(sample.records.ids), "digest": sample.digest, "settings": settings}
    checkpoints.save(folder, {"images": sample.images}, notes)


def load_sample(folder: Path) -> tuple[PublicSample, dict[str, Any]]:
    """A saved sample and its settings. Raises `Damaged` where it is missing or has another digest than it had."""
    again = "lmeraser train draws it again from the public set"
    try:
        arrays, notes, _ = checkpoints.load(folder)
    except Damaged as error:
        raise Damaged(f"{error}; {again}") from error
    sample = _sample(notes["ids"], arrays["images"])
    if sample.digest != notes["digest"]:
        raise Damaged(f"{folder} is damaged: its images are not those that were drawn; {again}")
    return sample, notes["settings"]


def sample_settings(config: Config) -> dict[str, Any]:
    """The settings that a sample depends on."""
    size = {"sample_size": config.clustering.sample_size, "image_size": config.data.image_size}
    return {"public": dataclasses.asdict(config.public), "seed": config.seed, **size}


def private_contents(data: Data) -> frozenset[str]:
    """Content hashes of all private and test images that the config names."""
    source, contents = sources.load(data, own_test=False), set()
    with progress("private", len(source.items)) as shown:
        for start in range(0, len(source.items), PIECE):
            items = source.items[start : start + PIECE]
            images = source.read(range(start, start + len(items))).rows
            contents.update(
                content_hash(image) for item, image in zip(items, images, strict=True) if item.split != "public"
            )
            shown.advance(len(items))
    return frozenset(contents)


def _sample_id(item: Item) -> str:
    return digest(["public", item.id])


def _sample(ids: Sequence[str], images: np.ndarray) -> PublicSample:
    count, contents = len(ids), tuple(map(content_hash, images))
    none = ("",) * count
    return PublicSample(
        RecordTable(tuple(ids), np.arange(count), np.zeros(count, np.int32), none, contents, none), images
    )


def _open(config: Config, learned: str = "") -> tuple[Source, list[int]]:
    """The public set, and the positions of its images; `learned` is as in `read_public`."""
    public = config.public
    data = Data(
        source=public.source,
        path=public.path,
        dataset=public.dataset if public.source == "tfds" else "",
        train_split=public.split,
        store_size=public.store_size,
        image_size=config.data.image_size,
        train_limit=public.limit,
    )
    try:
        source = sources.load(data, own_test=False, labelled=False)
    except UserError as error:  # the flags are those of the public set
        text = str(error)
        for private, own in FLAGS.items():
            text = text.replace(private, own)
        raise UserError(text) from error
    unlabelled = [item.id for item in source.items if item.split == "train" and item.label < 0]
    if unlabelled and learned:
        raise UserError(
            f"the public set {source.name} lacks the labels of {len(unlabelled)} images: {join_limited(unlabelled)};"
            f" {learned}"
        )
    raise_all(problems(source, classes=2 if learned else 0), f"the public set {source.name} cannot be used:")
    warn(*(f"the public set {source.name}: {note}" for note in source.notes))
    positions = limit_positions(source.items, data.train_limit, 0)
    return source, [position for position in positions if source.items[position].split == "train"]


def _take(source: Source, positions: Sequence[int], is_private: IsPrivate, count: int) -> list[tuple[Item, np.ndarray]]:
    """The first `count` images at some positions that are not private.

    Raises `UserError` for unreadable ones, and where all are private.
    """
    chosen, left_out, unreadable, start = [], [], [], 0
    with progress("public", count) as shown:
        while len(chosen) < count and start < len(positions):
            before, piece = len(chosen), sorted(positions[start : start + min(PIECE, count - len(chosen))])
            start += len(piece)
            pixels = source.read(piece)
            for place, (position, image) in enumerate(zip(piece, pixels.rows, strict=True)):
                item = source.items[position]
                if place in pixels.unreadable:
                    unreadable.append(f"{item.id}: {pixels.unreadable[place]}")
                elif is_private(content_hash(image)):
                    left_out.append(item.id)
                else:
                    chosen.append((item, image))
            shown.advance(len(chosen) - before)
    raise_all(unreadable, f"the public set {source.name} cannot be used:")
    if not chosen:
        every = f"all {len(positions)} images of the public set {source.name}"
        raise UserError(f"{every} are private or test images; use another")
    if left_out:
        warn(f"{len(left_out)} public images are private or test images too; left out: {join_limited(left_out)}")
    return chosen
