"""Every setting of a run, with its default, its legal values and one place that checks them.

The schema is a tree of frozen dataclasses; an experiment file (`configs/*.py`) fills an
`ml_collections.ConfigDict` of the same shape, which `from_dict` turns into a checked `Config`.
The defaults are the embedded experiment: scikit-learn's digits, split into a public and a private half.
"""

import dataclasses
import difflib
import reprlib
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.legality import CLOSED_FORMS, PROMPTED, SHOWN, WHOLE, validate

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
    """How private records are parted: Algorithms 1 and 2 with a balanced cut, by a keyed hash, or not at all."""

    partition: str = "adaptive"  # adaptive | random (S shards) | one
    shards: int = 10  # S, random only
    sample_size: int = 200  # n_s
    sample_from: str = "private"  # private | public
    cut: str = "auto:10"  # a distance threshold t such as 10.0, or auto:K
    max_members: int = 30  # sampled members of a cluster at most; 0: no limit (paper)
    min_members: int = 8  # sampled members at least; 0: no limit (paper)
    feature_batch: int = 128  # images per device and call when features are computed

    @property
    def parts(self) -> int:
        """Shards of a partition that looks at no feature."""
        return self.shards if self.partition == "random" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Prompts and heads (Def. 1, Eqs. 5 and 6)."""

    method: str = "prompt+head"  # | prompt (fixed head) | prompts+one head | head | backbone (and head) | ridge | ncm
    prompt_width: int = 2  # P, pixels of the backbone's input
    prompt_init: float = 0.0  # standard deviation of the first prompt, in normalised pixels; 0: zeros
    head_init: float = 0.0  # standard deviation of the first head; 0: zeros
    optimizer: str = "adam"  # sgd | adam
    momentum: float = 0.9  # sgd only
    prompt_rate: float = 3e-2
    head_rate: float = 1e-2
    backbone_rate: float = 1e-4  # backbone only
    penalty: float = 0.1  # ridge only: added to the variance of every standardised feature
    expand: int = 0  # ridge and ncm: random cosines of the feature that stand beside it
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

    @property
    def active_prompt_width(self) -> int:
        """Width of the prompt that is tuned: 0 where there is none."""
        return self.prompt_width if self.method in PROMPTED else 0

    @property
    def one_head(self) -> bool:
        """Whether all clusters' prompts share a head, so that there is one slice for all, and no request is cheap."""
        return self.method == "prompts+one head"

    @property
    def closed(self) -> bool:
        """Whether a slice is a formula of its members' features: no step, no epoch."""
        return self.method in CLOSED_FORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """A closed-form head of all private records, which answers together with the clusters.

    Erasure is a subtraction; where features are expanded, all that are left are added up again.
    """

    method: str = "none"  # none | ridge | ncm
    penalty: float = 0.1  # as tuning.penalty
    expand: int = 0  # as tuning.expand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Earlier epochs of a cluster that are kept beside its last; never part of a slice's numbers."""

    every_epochs: int = 0  # keep the cluster as it was after every so many of its epochs; 0: the last step only
    keep: int = 3  # so many of these at most, the latest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """Routing and prediction; free to differ between commands on one workdir."""

    nearest: int = 1  # m: ask the m nearest clusters (1: paper); 0: all
    aggregate: str = "mean"  # of their probabilities | vote: the share of them whose first choice a class is
    common_weight: float = 0.3  # weight of the common head's probabilities, where there is one
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
    common: Common = Common()
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
    raise_all(validate(config))
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
