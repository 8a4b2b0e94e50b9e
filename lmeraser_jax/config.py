"""Every setting of a run, with its default, its legal values and one place that checks them.

The schema is a tree of frozen dataclasses; an experiment file (`configs/*.py`) fills an
`ml_collections.ConfigDict` of the same shape, which `from_dict` turns into a checked `Config`.
The defaults are the embedded experiment: scikit-learn's digits, split into a public and a private half.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import typing
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lmeraser_jax.errors import UserError, raise_all

SOURCES = ("digits", "npz", "folder", "tfds")
AUGMENTS = ("none", "crop", "flip", "paper")
OPTIMIZERS = ("sgd", "adam")
DTYPES = ("auto", "float32", "bfloat16")
WHOLE = 2**63  # whole numbers lie below it
SHOWN = 400  # characters of a value in a message
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHOWN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from and what the backbone sees of them."""

    source: str = "digits"  # digits | npz | folder | tfds
    path: str = ""  # npz file or image folder; tfds: its data folder (empty: TFDS's own)
    dataset: str = ""  # tfds only: name such as cifar10 or visual_domain_decathlon/gtsrb
    train_split: str = ""  # folder: subfolder, tfds: split such as train[:40000]; empty: train
    holdout_split: str = ""  # as train_split; empty: none
    test_split: str = ""  # as train_split; empty: test, where there is one
    public_split: str = ""  # as train_split; folder: empty means public, where there is one
    test_share: float = 0.0  # share of the training images that become test images
    holdout: float = 0.0  # share of private records kept from tuning, to choose settings with
    split_by: str = "record"  # record | owner: what the two shares draw; an owner never falls on both sides
    owner_pattern: str = ""  # regular expression; its first group in an id is the owner
    labels: str = ""  # folder only: CSV that names files, labels and owners
    csv_columns: str = "file,label,owner"  # names of these three columns in the CSV; the owner may be left out
    skip_unreadable: bool = False  # leave out images that cannot be read, and name them, instead of refusing all
    max_pixels: int = 50_000_000  # an image file of more pixels counts as unreadable
    store_size: int = 0  # folder, tfds: height in pixels at which images are kept; 0: image_size
    store_width: int = 0  # folder, tfds: width; 0: store_size
    image_size: int = 16  # side in pixels of the backbone's input
    resize_size: int = 0  # shorter side before the crop; 0: image_size, so that nothing is cropped
    augment: str = "none"  # none | crop | flip | paper (crop and flip), while tuning
    train_limit: int = 0  # use the first so many private records; 0: all
    test_limit: int = 0  # use the first so many test images; 0: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """The frozen network. With `weights` the architecture is read from them, else it is trained as set here."""

    name: str = ""  # a published backbone such as vit-b-22k (see lmeraser backbone); empty: whatever the weights are
    weights: str = ""  # a file or folder, hub:OWNER/NAME[@REVISION], or hub; empty: pretrained on the public records
    feature: str = "auto"  # auto | cls | pooler; auto: what the name or the weights have; Swin has its mean token
    mean: str = ""  # normalisation of pixels in [0, 1]: one number or 0.485,0.456,0.406; empty: as the weights had it
    std: str = ""
    patch: int = 4  # pixels; this, width, depth and mlp only where there are no weights
    width: int = 64
    depth: int = 4
    heads: int = 0  # 0: as the weights say, or width / 64 where they do not; width / 16 where there are none
    mlp: int = 0  # 0: 4 x width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Supervised training on public records (paper Eq. 2): AdamW, warm-up and cosine."""

    epochs: int = 80
    batch: int = 64  # over all devices
    rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of all steps
    augment: str = "crop"  # none | crop | flip | paper
    checkpoint_epochs: int = 20  # a checkpoint every so many epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """Algorithms 1 and 2 with a balanced cut."""

    sample_size: int = 200  # n_s
    sample_from: str = "private"  # private | public
    cut: str = "auto:10"  # a distance threshold t such as 10.0, or auto:K
    max_members: int = 30  # sampled members of a cluster at most; 0: no limit (paper)
    min_members: int = 8  # sampled members at least; 0: no limit (paper)
    feature_batch: int = 128  # images per device and call when features are computed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Prompts and heads (Def. 1, Eqs. 5 and 6)."""

    prompt_width: int = 2  # P, pixels of the backbone's input
    prompt_init: float = 0.0  # standard deviation of the first prompt, in normalised pixels; 0: zeros
    head_init: float = 0.0  # standard deviation of the first head; 0: zeros
    optimizer: str = "adam"  # sgd | adam
    momentum: float = 0.9  # sgd only
    prompt_rate: float = 3e-2
    head_rate: float = 1e-2
    prompt_decay: float = 0.0  # weight decay (decoupled for adam)
    head_decay: float = 0.0
    warmup: float = 0.1  # share of the cluster's own steps
    epochs: int = 30  # times a member is seen
    min_steps: int = 60  # a small cluster sees its members more often until it has made so many steps
    slices: int = 1  # R, stages of a cluster (SISA): an erasure repeats only those that saw the record; 1: paper
    batch: int = 16  # B, images per lane
    lanes: int = 1  # L, clusters tuned at the same time per device
    scan_steps: int = 64  # steps per call of the device program
    dtype: str = "auto"  # auto: float32 on CPU, bfloat16 on GPU | float32 | bfloat16
    device_bytes: int = 4_000_000_000  # images stay on the device up to this size, else they are streamed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Earlier epochs of a cluster that are kept beside its last; never part of a slice's numbers."""

    every_epochs: int = 0  # keep the cluster as it was after every so many of its epochs; 0: the last step only
    keep: int = 3  # so many of these at most, the latest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """Routing and prediction; free to differ between commands on one workdir."""

    nearest: int = 1  # m: average the probabilities of the m nearest clusters (1: paper)
    batch: int = 128  # images per device and call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = 0
    data: Data = Data()
    backbone: Backbone = Backbone()
    pretraining: Pretraining = Pretraining()
    clustering: Clustering = Clustering()
    tuning: Tuning = Tuning()
    checkpoints: Checkpoints = Checkpoints()
    inference: Inference = Inference()


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values."""
    return dataclasses.asdict(config)


def default_config() -> Any:
    """The defaults as an `ml_collections.ConfigDict`, for experiment files to change."""
    from ml_collections import config_dict

    return config_dict.ConfigDict(to_dict(Config()))


def from_dict(tree: Any) -> Config:
    """Checks a tree of settings, a mapping or a `ConfigDict`, and freezes it.

    Raises:
        UserError: names every unknown key and wrong type at once; where there are none, every illegal value.
    """
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    if not isinstance(tree, Mapping):
        raise UserError(f"the config must be a group of settings, is {type(tree).__name__}")
    problems: list[str] = []
    config = _build(Config, tree, "", problems)
    raise_all(problems, "the config cannot be used:" if len(problems) > 1 else "")
    raise_all(_illegal(config))
    return config


def unknown_names(names: Iterable[str]) -> list[str]:
    """A message for every dotted name, such as tuning.epochs, that is no setting."""
    tree, problems = to_dict(Config()), []
    for name in names:
        level: Any = tree
        for depth, part in enumerate(name.split(".")):
            if not isinstance(level, dict) or part not in level:
                legal = list(level) if isinstance(level, dict) else []
                prefix = "".join(f"{group}." for group in name.split(".")[:depth])
                problems.append(_unknown(prefix, part, legal))
                break
            level = level[part]
    return problems


def _unknown(prefix: str, name: str, legal: Collection[str]) -> str:
    near = difflib.get_close_matches(name, legal, 1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"legal: {', '.join(legal)}"
    return f"unknown setting {prefix}{name}; {hint}"


def cut_of(cut: str) -> tuple[str, float]:
    """Reads `clustering.cut`: ("auto", K) or ("threshold", t). Raises ValueError for anything else."""
    if cut.startswith("auto:"):
        count = int(cut.removeprefix("auto:"))
        if not 1 <= count < WHOLE:
            raise ValueError(cut)
        return "auto", float(count)
    threshold = float(cut)
    if not 0 <= threshold < float("inf"):
        raise ValueError(cut)
    return "threshold", threshold


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list such as "0.5" or "0.485,0.456,0.406"; what is no number becomes nan."""

    def number(part: str) -> float:
        try:
            return float(part)
        except ValueError:
            return math.nan

    return tuple(number(part) for part in text.split(",")) if text else ()


def _has_group(pattern: str) -> bool:
    """Whether a non-empty pattern is a regular expression with at least one group."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python will read differently
            return not pattern or re.compile(pattern).groups > 0
    except (re.error, RecursionError, OverflowError):
        return False


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf that differs between two trees of settings."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _shown(value: object) -> str:
    """A value of any kind for a message: short, however large or deep it is."""
    try:
        return SHORT.repr(value)
    except (ValueError, RecursionError):  # Python does not print whole numbers of many thousand digits
        return f"a large {type(value).__name__}"


def _build(cls: type, tree: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """One dataclass of the schema from one level of the tree; problems are collected."""
    hints = typing.get_type_hints(cls)
    problems += [
        _unknown(prefix, key if isinstance(key, str) and len(key) <= SHOWN else _shown(key), hints)
        for key in tree
        if key not in hints
    ]
    values = {}
    for name, kind in hints.items():
        if name not in tree:
            continue
        value = tree[name]
        if dataclasses.is_dataclass(kind):
            if isinstance(value, Mapping):
                values[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.", problems)
            else:
                problems.append(f"{prefix}{name}={_shown(value)}: must be a group of settings")
        elif isinstance(value, int) and not -WHOLE < value < WHOLE:
            problems.append(f"{prefix}{name}={_shown(value)}: must lie between -2^63 and 2^63")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        elif type(value) is not kind:
            problems.append(f"{prefix}{name}={_shown(value)}: must be {kind.__name__}, is {type(value).__name__}")
        else:
            values[name] = value
    return cls(**values)


def _illegal(c: Config) -> list[str]:
    """One line per illegal value: the value, what is legal, the flag to change."""
    d, b, p, k, t, i = c.data, c.backbone, c.pretraining, c.clustering, c.tuning, c.inference
    problems = []

    def need(ok: bool, flag: str, value: object, legal: str) -> None:
        if not ok:
            text = str(value)
            cut = text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
            problems.append(f"--config.{flag}={cut}: must be {legal}")

    for flag, value, legal in (
        ("data.source", d.source, SOURCES),
        ("data.split_by", d.split_by, ("record", "owner")),
        ("data.augment", d.augment, AUGMENTS),
        ("backbone.feature", b.feature, ("auto", "cls", "pooler")),
        ("pretraining.augment", p.augment, AUGMENTS),
        ("clustering.sample_from", k.sample_from, ("private", "public")),
        ("tuning.optimizer", t.optimizer, OPTIMIZERS),
        ("tuning.dtype", t.dtype, DTYPES),
    ):
        need(value in legal, flag, repr(value), "one of " + ", ".join(legal))
    for flag, value in (
        ("data.max_pixels", d.max_pixels),
        ("data.image_size", d.image_size),
        ("backbone.patch", b.patch),
        ("backbone.width", b.width),
        ("backbone.depth", b.depth),
        ("pretraining.batch", p.batch),
        ("pretraining.checkpoint_epochs", p.checkpoint_epochs),
        ("clustering.sample_size", k.sample_size),
        ("clustering.feature_batch", k.feature_batch),
        ("tuning.epochs", t.epochs),
        ("tuning.slices", t.slices),
        ("tuning.batch", t.batch),
        ("tuning.lanes", t.lanes),
        ("tuning.scan_steps", t.scan_steps),
        ("checkpoints.keep", c.checkpoints.keep),
        ("inference.nearest", i.nearest),
        ("inference.batch", i.batch),
    ):
        need(value >= 1, flag, value, "at least 1")
    for flag, value in (
        ("seed", c.seed),
        ("data.store_size", d.store_size),
        ("data.store_width", d.store_width),
        ("data.train_limit", d.train_limit),
        ("data.test_limit", d.test_limit),
        ("backbone.heads", b.heads),
        ("backbone.mlp", b.mlp),
        ("pretraining.epochs", p.epochs),
        ("pretraining.rate", p.rate),
        ("pretraining.weight_decay", p.weight_decay),
        ("clustering.max_members", k.max_members),
        ("clustering.min_members", k.min_members),
        ("tuning.prompt_width", t.prompt_width),
        ("tuning.prompt_init", t.prompt_init),
        ("tuning.head_init", t.head_init),
        ("tuning.prompt_rate", t.prompt_rate),
        ("tuning.head_rate", t.head_rate),
        ("tuning.prompt_decay", t.prompt_decay),
        ("tuning.head_decay", t.head_decay),
        ("tuning.min_steps", t.min_steps),
        ("tuning.device_bytes", t.device_bytes),
        ("checkpoints.every_epochs", c.checkpoints.every_epochs),
    ):
        need(0 <= value < float("inf"), flag, value, "0 or more")
    for flag, value in (("tuning.warmup", t.warmup), ("pretraining.warmup", p.warmup), ("tuning.momentum", t.momentum)):
        need(0 <= value < 1, flag, value, "in [0, 1)")
    for flag, value in (("data.holdout", d.holdout), ("data.test_share", d.test_share)):
        need(0 <= value < 1, flag, value, "in [0, 1)")
    for flag, text, low in (("backbone.mean", b.mean, -math.inf), ("backbone.std", b.std, 0.0)):
        values = numbers(text)
        legal = all(low < value < math.inf for value in values) and len(values) in (0, 1, 3)
        need(legal, flag, repr(text), f"empty, or one number or three, finite{' and above 0' if low == 0 else ''}")
    what = f"the weights of --config.backbone.name={b.name}: a folder or file, or hub to download"
    what += f" (lmeraser backbone --name={b.name} says what and from where)"
    need(bool(b.weights) or not b.name, "backbone.weights", repr(b.weights), what)
    need(
        2 * t.prompt_width <= d.image_size,
        "tuning.prompt_width",
        t.prompt_width,
        f"at most half of --config.data.image_size={d.image_size}",
    )
    need(
        d.resize_size == 0 or d.resize_size >= d.image_size,
        "data.resize_size",
        d.resize_size,
        f"0 or at least --config.data.image_size={d.image_size}",
    )
    need(
        k.max_members == 0 or k.min_members <= k.max_members,
        "clustering.min_members",
        k.min_members,
        f"at most --config.clustering.max_members={k.max_members}",
    )
    if d.source in ("npz", "folder"):
        need(bool(d.path), "data.path", repr(d.path), f"set for data.source={d.source}")
    if d.source == "tfds":
        need(bool(d.dataset), "data.dataset", repr(d.dataset), "the name of a TFDS data set, such as cifar10")
    need(_has_group(d.owner_pattern), "data.owner_pattern", repr(d.owner_pattern), "a regular expression with a group")
    columns = len(d.csv_columns.split(","))
    need(columns in (2, 3), "data.csv_columns", repr(d.csv_columns), "two or three column names: file,label[,owner]")
    if not b.weights and min(b.patch, b.width) > 0:  # else the weights decide
        size, heads = d.image_size, b.heads or max(1, b.width // 16)
        need(size % b.patch == 0, "data.image_size", size, f"a multiple of the patch size {b.patch}")
        need(b.width % heads == 0, "backbone.heads", heads, f"a divisor of the width {b.width}")
    try:
        cut_of(k.cut)
    except ValueError:
        need(False, "clustering.cut", repr(k.cut), "a distance of 0 or more, or auto:K with K >= 1")
    return problems
