"""A set of TensorFlow Datasets (TFDS), of images with labels or of texts, from array_record files without TensorFlow.

Ids are "<base split>/<the set's own id>", or "<base split>/<index>" where the set has no id. The base split is
always there, because file names and numbers repeat across the splits of many sets; the index counts from the start
of the base split. So the id of a record never depends on how the splits are cut into roles.
"""

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from lmeraser_jax.config import Data
from lmeraser_jax.data import tfds_paths
from lmeraser_jax.data.decode import decode
from lmeraser_jax.data.names import as_name
from lmeraser_jax.data.source import Contents, Item, Source, limit_positions, not_used
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.progress import progress

DEFAULTS = {"train": "train", "holdout": "", "test": "test", "public": ""}
ID_FEATURES = ("id", "image_id", "image/id", "file_name", "image/filename", "filename", "name")  # the first that fits
PROBE = 1000  # records in which an id may not repeat: "name" is the name of an image here, of a species there
SMALL = 64  # pixels; images of one known size up to this are kept as they are
PIECE = 512  # records in memory at a time


class Span(NamedTuple):
    """Records of a base split that follow each other, and what they are used for."""

    role: str
    split: str
    indices: range

    def __str__(self) -> str:
        return f"{self.split}[{self.indices.start}:{self.indices.stop}]"


Place = tuple[Span, int]  # a record: its span, and its index in the base split


class Fields(NamedTuple):
    """Which features hold contents, label and owner."""

    contents: tuple[str, ...]  # the image, or query and response
    label: str = ""  # "": the set has none
    owner: str = ""
    shape: tuple[int | None, int | None, int | None] = (None, None, None)  # of an image; None where images differ
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set."""

    name: str  # in full, such as cifar10/3.0.2
    folder: Path
    builder: Any  # TFDS's
    labelled: bool  # it must have labels
    texts: str  # `text.features`; "": it has images
    readers: dict[str, Any] = dataclasses.field(default_factory=dict)  # one for each base split that has been read

    @property
    def sizes(self) -> dict[str, int]:
        """Number of records of every base split."""
        return {name: split.num_examples for name, split in self.builder.info.splits.items()}

    @functools.cached_property
    def fields(self) -> Fields:
        if self.texts:
            return find_texts(self.name, self.builder.info, self.texts)
        return find_fields(self.name, self.builder.info, self.labelled)

    def records(self, split: str, indices: Sequence[int]) -> Sequence[bytes]:
        """Serialized records of a base split; no file stays open: large sets have too many."""
        try:
            if split not in self.readers:
                raw = tfds.decode.DeserializeMethod.RAW_BYTES
                self.readers[split] = self.builder.as_data_source(split, deserialize_method=raw)
            with self.readers[split].data_source:
                return self.readers[split].__getitems__(list(indices))
        except (RuntimeError, OSError, IndexError, ValueError) as error:  # array_record's, over damaged or absent files
            raise self.damaged(f"{split}[{indices[0]}:{indices[-1] + 1}]: {error}") from error

    def damaged(self, fault: str) -> UserError:
        return UserError(
            f"{self.name} in {self.folder} cannot be read: {fault}; if its files are damaged, remove this folder and"
            f" prepare the data set again with: {tfds_paths.command(self.name.rpartition('/')[0])}"
        )


def load(data: Data, labelled: bool = True, encoder: Encoder | None = None) -> Source:
    """Finds the prepared data set, and reads its labels, owners and ids; contents are decoded when they are read.

    With an `encoder` the set has texts, else images. Raises `UserError`: a set that is not prepared, damaged or of
    another kind; splits that do not exist or overlap; labels of images that are hidden or not there, if `labelled`.
    """
    folder = tfds_paths.require(data.dataset, data.path)
    prepared = open_prepared(folder, labelled and encoder is None, encoder.text.features if encoder else "")
    fields = prepared.fields
    spans = _spans(prepared, data)
    places = [(span, index) for span in spans for index in span.indices]
    items = _items(prepared, places, data)
    shape, parse = encoder.shape if encoder else _stored_shape(fields, data), _parser(prepared, fields.contents)

    def read(positions: Sequence[int]) -> Contents:
        records = _records(prepared, [places[position] for position in positions])
        values = [[(parse(record) or {}).get(name, b"") for name in fields.contents] for record in records]
        if encoder:
            return encoder.contents([(as_name(query), as_name(response)) for query, response in values])
        return decode([file for (file,) in values], *shape, max_pixels=data.max_pixels)

    taken = {span.split for span in spans}
    others = [f"{name} ({count})" for name, count in prepared.sizes.items() if count and name not in taken]
    notes = not_used({"splits without a role": others})
    return Source(prepared.name, fields.class_names, shape, items, read, notes)


def open_prepared(folder: Path, labelled: bool = True, texts: str = "") -> Prepared:
    """Opens a prepared data set of images, or of texts, as `text.features` names them.

    Raises `UserError`: not readable, or in another format than array_record.
    """
    try:
        builder = tfds.builder_from_directory(str(folder))
        formats = {kind.value for kind in builder.info.available_file_formats()}
    except Exception as error:  # TFDS has no one exception for damaged descriptions
        raise UserError(f"{folder} holds no readable TFDS data set: {type(error).__name__}: {error}") from error
    name = str(builder.info.full_name)
    if "array_record" not in formats:
        raise UserError(
            f"{folder} keeps {name} as {join_limited(sorted(formats)) or 'nothing'}, which cannot be read without"
            " TensorFlow; move it away, or choose another --data_dir=DIR, and prepare it again as array_record with:"
            f" {tfds_paths.command(name.rpartition('/')[0])}"
        )
    return Prepared(name, folder, builder, labelled, texts)


def find_fields(name: str, info: Any, labelled: bool = True) -> Fields:
    """Finds image and label among a set's features. Raises `UserError` where one is missing or none the main one.

    A label may be missing unless `labelled`.
    """
    features, problems, chosen = dict(info.features), [], []
    supervised = [key for key in (info.supervised_keys or ()) if isinstance(key, str)]
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    plain = [key for key in images if not isinstance(features[key], tfds.features.LabeledImage)]
    labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    for kind, keys, usual in (("image", plain, "image"), ("class label", labels, "label")):
        ranked = [key for key in (*supervised, usual) if key in keys]
        if not ranked and len(keys) != 1 and (labelled or kind == "image"):
            fault = f"several features of the kind {kind}, none the main one" if keys else f"no {kind}"
            hint = "" if images else "; features of texts are named by --config.text.features=QUERY,RESPONSE"
            problems.append(f"{name} is no image classification set: it has {fault}; {_listed(features)}{hint}")
        chosen.append((ranked or keys)[0] if ranked or len(keys) == 1 else "")
    raise_all(problems)
    image, label = chosen
    shape, dtype = features[image].shape, np.dtype(features[image].np_dtype)
    if len(shape) != 3 or dtype != np.uint8:
        raise UserError(
            f"{name} cannot be used: its images (feature {image}) are {dtype} {list(shape)};"
            " uint8 [height, width, channels] is needed"
        )
    names = tuple(features[label].names) if label else ()
    return Fields((image,), label, shape=(shape[0], shape[1], shape[2]), class_names=names)


def find_texts(name: str, info: Any, texts: str) -> Fields:
    """The features that `text.features` names. Raises `UserError` where one is missing, or neither text nor number."""
    query, response, *owner = names = texts.split(",")
    if absent := [key for key in names if key not in info.features or not _is_name(info.features[key])]:
        reason = f"{name} has no text or whole number as {join_limited(absent)}"
        raise UserError(f"--config.text.features={texts}: {reason}; {_listed(info.features)}")
    return Fields((query, response), owner="".join(owner))


def text_features(info: Any) -> list[str]:
    """The features that may hold queries, responses or owners, where a set has two texts and no image."""
    kinds, features = info.features.values(), tfds.features
    if any(isinstance(kind, features.Image) for kind in kinds) or sum(isinstance(k, features.Text) for k in kinds) < 2:
        return []
    return sorted(name for name, kind in info.features.items() if _is_name(kind))


def _listed(features: Mapping[str, Any]) -> str:
    has = join_limited(f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items()))
    return f"its features: {has}"


def _is_name(feature: Any) -> bool:
    """Whether a feature is one text or whole number."""
    if isinstance(feature, tfds.features.ClassLabel) or feature.shape != ():
        return False
    return isinstance(feature, tfds.features.Text) or np.dtype(feature.np_dtype).kind in "iu"


def _stored_shape(fields: Fields, data: Data) -> tuple[int, int, int]:
    """[h, w, c] of a stored image: as configured, but small images of one size stay as they are."""
    height, width, channels = fields.shape
    channels = 1 if channels == 1 else 3
    if height and width and not (data.store_size or data.store_width):
        if max(height, width) <= max(SMALL, data.image_size):
            return height, width, channels
    size = data.store_size or data.image_size
    return size, data.store_width or size, channels


def _spans(prepared: Prepared, data: Data) -> list[Span]:
    """The roles' splits in absolute numbers. Raises `UserError` naming all that do not exist, are empty or overlap."""
    sizes, flags, problems = prepared.sizes, {}, []
    spans: list[Span] = []
    has = join_limited(f"{name} ({count})" for name, count in sizes.items()) or "none"
    for role, default in DEFAULTS.items():
        if role == "test" and (data.test_share or "test" not in sizes):
            default = ""  # where test records are drawn, the set's own test split is left alone
        spec = getattr(data, f"{role}_split") or default
        if not spec:
            continue
        flags[role] = f"--config.data.{role}_split={spec}"
        try:
            cuts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(prepared.builder.info.splits)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[-1].partition(". ")[0]  # without links
            problems.append(f"{flags[role]} cannot be used: {reason.rstrip('.')}; {prepared.name} has the splits {has}")
            continue
        for cut in cuts:
            stop = sizes[cut.splitname] if cut.to is None else cut.to
            spans.append(Span(role, cut.splitname, range(cut.from_ or 0, stop)))
        if not any(span.indices for span in spans if span.role == role):
            problems.append(f"{flags[role]} holds no record; {prepared.name} has the splits {has}")
    raise_all(problems)
    raise_all(_overlaps(spans, flags))
    return spans


def _overlaps(spans: Sequence[Span], flags: Mapping[str, str]) -> list[str]:
    """A line for every two roles that share records: what was trained on must not be tested on."""
    shared = defaultdict(list)
    for a, b in itertools.combinations(spans, 2):
        common = range(max(a.indices.start, b.indices.start), min(a.indices.stop, b.indices.stop))
        if a.split == b.split and common:
            shared[a.role, b.role].append(a._replace(indices=common))
    problems = []
    for (first, second), common in shared.items():
        count, where = sum(len(span.indices) for span in common), join_limited(common)
        if first == second:
            problems.append(f"{flags[first]} names {count} records twice: {where}")
        else:
            both = f"{flags[first]} and {flags[second]}"
            problems.append(f"{both} share {count} records: {where}; a record has one role only")
    return problems


def _records(prepared: Prepared, places: Iterable[Place]) -> Iterator[bytes]:
    """The serialized records at some places, in their order."""
    for split, group in itertools.groupby(places, lambda place: place[0].split):
        yield from prepared.records(split, [index for _, index in group])


def _items(prepared: Prepared, places: list[Place], data: Data) -> list[Item]:
    """Ids, labels and owners of the records at some places, in their order.

    Where the places alone name the records, those that the limits leave out are taken from the list unread.
    """
    id_feature, label_feature, owner_feature = _id_feature(prepared), prepared.fields.label, prepared.fields.owner
    if not id_feature and data.limit_by == "record":
        named = [Item(f"{span.split}/{index}", span.role, 0) for span, index in places]
        places[:] = [places[position] for position in limit_positions(named, data.train_limit, data.test_limit)]
    parse = _parser(prepared, [name for name in (label_feature, id_feature, owner_feature) if name])
    items, damaged, hidden = [], [], Counter()
    with progress(f"{prepared.name}: ids", len(places)) as shown:
        for first in range(0, len(places), PIECE):
            piece = places[first : first + PIECE]
            for (span, index), record in zip(piece, _records(prepared, piece), strict=True):
                values = parse(record)
                if values is None:
                    damaged.append(f"{span.split}[{index}]")
                    continue
                label = int(values[label_feature]) if label_feature else -1
                hidden[span] += label < 0
                name = as_name(values[id_feature]) if id_feature else index
                owner = as_name(values[owner_feature]) if owner_feature else ""
                items.append(Item(f"{span.split}/{name}", span.role, label, owner))
            shown.advance(len(piece))
    if damaged:
        raise prepared.damaged(f"no whole records: {join_limited(damaged)}")
    if prepared.labelled:
        raise_all([_hidden_labels(prepared, span, count, data) for span, count in hidden.items() if count])
    return items


def _hidden_labels(prepared: Prepared, span: Span, count: int, data: Data) -> str:
    """What to do about a split without labels, such as the test split of a competition."""
    taken = {other.split for other in _spans(prepared, data)}
    free = sorted((name for name, size in prepared.sizes.items() if size and name not in taken), reverse=True)
    hint = f", such as --config.data.{span.role}_split={free[0]}" if free else ""  # validation comes before train
    if span.role == "test" and not free:
        hint = ", or draw some of the training images with --config.data.test_share=0.1 and without a test_split"
    return (
        f"{prepared.name} hides labels of its split {span.split} (feature {prepared.fields.label} is negative in"
        f" {count} of {len(span.indices)} images); use images with labels{hint}"
    )


def _id_feature(prepared: Prepared) -> str:
    """The feature that names every record, or "". Looks at the same records whatever the roles are."""
    features, sizes, fields = prepared.builder.info.features, prepared.sizes, prepared.fields
    others = {name: kind for name, kind in features.items() if name not in (*fields.contents, fields.owner)}
    candidates = [name for name in ID_FEATURES if name in others and _is_name(others[name])]
    if not candidates:
        return ""
    largest = max(sorted(sizes), key=lambda name: sizes[name])
    records = prepared.records(largest, range(min(PROBE, sizes[largest])))
    parsed = [values for values in map(_parser(prepared, candidates), records) if values is not None]
    for name in candidates:
        texts = [as_name(values[name]) for values in parsed]
        if len(set(texts)) == len(texts) and all(texts):
            return name
    return ""


def _parser(prepared: Prepared, names: Sequence[str]) -> Callable[[bytes], dict[str, Any] | None]:
    """Takes features out of a serialized record: numbers as they are, bytes for texts and (encoded) images."""
    kinds = {name: prepared.builder.info.features[name] for name in names}
    features = tfds.features.FeaturesDict(kinds)
    skip = {name: tfds.decode.SkipDecoding() for name, kind in kinds.items() if isinstance(kind, tfds.features.Image)}

    def parse(record: bytes) -> dict[str, Any] | None:
        """{feature: value}; None for a damaged record, such as the empty ones of a file that was cut off."""
        try:
            values: Any = features.deserialize_example_np(record, decoders=skip)
        except Exception:  # protobuf and TFDS raise many kinds over bytes that are no example
            return None
        return None if any(value is None for value in values.values()) else values

    return parse
