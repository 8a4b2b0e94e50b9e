"""Every setting of a run: its default, what it means, which values are legal, and the rules between settings.

An experiment file (`configs/*.py`) fills a `ConfigDict`, which `from_dict` turns into a checked `Config`.
The defaults are the embedded experiment: scikit-learn's digits, split into a public and a private half.
"""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lmeraser_jax.errors import UserError, raise_all, shorten
from lmeraser_jax.paths import WithPaths, absolute, absolute_weights

AUGMENTS = ("none", "crop", "flip", "paper")
PROMPTED = ("prompt+head", "prompt")
CLOSED_FORMS = ("ridge", "ncm", "linear")
METHODS = (*PROMPTED, "head", "backbone", *CLOSED_FORMS)
INTEGER_LIMIT = 2**63  # whole numbers lie below it
NOT_IN_RECIPE = ("scan_steps", "device_bytes")  # settings of `tuning` that never reach the numbers
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
Rule = tuple[str, bool, str]  # a setting's dotted name, whether its value is legal, what would be legal


def setting(default: Any, text: str, choices: tuple[str, ...] = (), **limits: Any) -> Any:
    """A field of the schema: default, meaning with unit, legal texts or numbers, low <= x < below, or a path's rule."""
    text = f"{text} ({' | '.join(choices)})" if choices else text
    metadata = {"help": text, "choices": choices, "low": 0, "below": math.inf, "path": None, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(WithPaths):
    """Where the images come from and what the backbone sees of them."""

    source: str = setting("digits", "where images come from", choices=("digits", "npz", "folder", "tfds"))
    path: str = setting("", "npz file or image folder; tfds: its data folder, empty for TFDS's own", path=absolute)
    dataset: str = setting("", "tfds: name such as cifar10 or visual_domain_decathlon/gtsrb")
    train_split: str = setting("", "folder: subfolder, tfds: split such as train[:40000]; empty: train")
    holdout_split: str = setting("", "as train_split, for the hold-out; empty: none")
    test_split: str = setting("", "as train_split, for the test images; empty: test, if the source has it")
    public_split: str = setting("", "as train_split, for public images; empty: none; folder: public, if it exists")
    test_share: float = setting(0.0, "share of the training images that become test images", below=1)
    holdout: float = setting(0.0, "share of the training images kept out of tuning, to choose settings with", below=1)
    split_by: str = setting("record", "draw the two shares by record or by owner", ("record", "owner"))
    owner_pattern: str = setting("", "regular expression; its groups in an id, joined by /, are the owner")
    labels: str = setting("", "folder: CSV that names files, labels and owners", path=absolute)
    csv_columns: str = setting("file,label,owner", "names of the CSV's three columns; the owner's may be left out")
    skip_unreadable: bool = setting(False, "leave out and name images that cannot be read, instead of refusing all")
    max_pixels: int = setting(50_000_000, "an image file of more pixels counts as unreadable", low=1)
    store_size: int = setting(0, "folder, tfds: height in pixels at which images are kept; 0: image_size")
    store_width: int = setting(0, "folder, tfds: width in pixels; 0: store_size")
    image_size: int = setting(16, "side in pixels of the backbone's input", low=1)
    resize_size: int = setting(0, "shorter side in pixels before the crop; 0: image_size, nothing is cropped")
    augment: str = setting("none", "random crops and flips while tuning; paper: both", AUGMENTS)
    train_limit: int = setting(0, "use only so many private records, drawn by a hash of the id; 0: all")
    test_limit: int = setting(0, "use only so many test images, drawn as train_limit draws; 0: all")
    limit_by: str = setting("record", "draw them from all, or of every class its share", ("record", "class"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone(WithPaths):
    """The frozen network. With `weights` the architecture is read from them, else it is trained as set here."""

    name: str = setting("", "published backbone such as vit-b-22k (lmeraser backbone --list); empty: as the weights")
    weights: str = setting("", "file, folder, hub:OWNER/NAME[@REVISION] or hub; empty: pretrain", path=absolute_weights)
    feature: str = setting("auto", "auto: as the name or the weights say", ("auto", "cls", "pooler"))
    mean: str = setting("", "mean of pixels in [0, 1]: one number or 0.485,0.456,0.406; empty: as the weights say")
    std: str = setting("", "standard deviation of pixels in [0, 1], as mean")
    patch: int = setting(4, "side of a patch in pixels; patch, width, depth and mlp apply without weights", low=1)
    width: int = setting(64, "size of a token", low=1)
    depth: int = setting(4, "transformer blocks", low=1)
    heads: int = setting(0, "attention heads; 0: as the weights say, else width / 64; width / 16 without weights")
    mlp: int = setting(0, "hidden size of the MLP; 0: 4 x width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Public(WithPaths):
    """Public records of their own, to train the backbone on; no private record, and no erasure, ever reaches them."""

    source: str = setting("data", "data: the public records of data.source", ("data", "npz", "folder", "tfds"))
    path: str = setting("", "as data.path", path=absolute)
    dataset: str = setting("imagenette/160px-v2", "as data.dataset; by default photographs that anybody may fetch")
    split: str = setting("", "as data.train_split")
    store_size: int = setting(0, "as data.store_size")
    limit: int = setting(0, "use only so many public records, drawn as data.train_limit draws; 0: all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Training of the backbone on public records (paper Eq. 2): AdamW, warm-up and cosine."""

    start: str = setting("scratch", "where training begins; weights: at backbone.weights", ("scratch", "weights"))
    supervise: float = setting(1.0, "weight of the cross-entropy of public labels in the loss")
    distill: float = setting(0.0, "weight of the distance from the features of the weights at their own image size")
    epochs: int = setting(80, "passes over the public records")
    batch: int = setting(64, "images a step, over all devices", low=1)
    rate: float = setting(2e-3, "learning rate")
    weight_decay: float = setting(0.05, "decoupled weight decay")
    warmup: float = setting(0.1, "share of all steps during which the rate rises", below=1)
    augment: str = setting("crop", "as data.augment", AUGMENTS)
    checkpoint_epochs: int = setting(20, "epochs between checkpoints", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """How private records are parted: Algorithms 1 and 2 with a balanced cut, by a keyed hash, or not at all."""

    partition: str = setting("adaptive", "clusters by feature, S random shards, or one", ("adaptive", "random", "one"))
    shards: int = setting(10, "S, shards of the random partition", low=1)
    sample_size: int = setting(200, "n_s, number of records that are sampled to make the clusters", low=1)
    sample_from: str = setting("private", "which records are sampled", ("private", "public"))
    cut: str = setting("auto:10", "where to cut the tree: distance t such as 10.0, or auto:K for K clusters")
    max_members: int = setting(30, "most sampled members of a cluster; 0: no limit (paper)")
    min_members: int = setting(8, "fewest sampled members of a cluster; 0: no limit (paper)")
    feature_batch: int = setting(128, "images per device and call when features are computed", low=1)

    @property
    def parts(self) -> int:
        """Shards of a partition that looks at no feature."""
        return self.shards if self.partition == "random" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Prompts and heads (Def. 1, Eqs. 5 and 6)."""

    method: str = setting("prompt+head", "what is tuned (prompt: the head is fixed), or a closed form", METHODS)
    prompt_width: int = setting(2, "P, width of the border prompt in pixels of the backbone's input")
    prompt_init: float = setting(0.0, "standard deviation of the initial prompt, in normalised pixels; 0: zeros")
    head_init: float = setting(0.0, "standard deviation of the initial head; 0: zeros")
    optimizer: str = setting("adam", "optimizer of prompt and head", ("sgd", "adam"))
    momentum: float = setting(0.9, "momentum of sgd", below=1)
    prompt_rate: float = setting(3e-2, "learning rate of the prompt")
    head_rate: float = setting(1e-2, "learning rate of the head")
    backbone_rate: float = setting(1e-4, "learning rate of the backbone, method backbone only")
    penalty: float = setting(0.1, "ridge: added to the variance of standardised features; linear: to squared weights")
    expand: int = setting(0, "closed forms: number of random cosines to append to the feature; 0: none")
    balanced: bool = setting(False, "linear: every class counts alike, however many records it has")
    prompt_decay: float = setting(0.0, "weight decay of the prompt (decoupled for adam)")
    head_decay: float = setting(0.0, "weight decay of the head (decoupled for adam)")
    warmup: float = setting(0.1, "share of the cluster's steps during which the rates rise", below=1)
    epochs: int = setting(30, "passes over the members of a cluster", low=1)
    min_steps: int = setting(60, "fewest steps of a cluster: a small one passes over its members more often")
    batch: int = setting(16, "B, images per lane", low=1)
    lanes: int = setting(1, "L, clusters tuned at the same time per device", low=1)
    scan_steps: int = setting(64, "steps per call of the device program", low=1)
    dtype: str = setting("auto", "auto: float32 on CPU, bfloat16 on GPU", ("auto", "float32", "bfloat16"))
    device_bytes: int = setting(4_000_000_000, "keep images on the device up to this size, else stream them")

    @property
    def active_prompt_width(self) -> int:
        """Width of the prompt that is tuned: 0 where there is none."""
        return self.prompt_width if self.method in PROMPTED else 0

    @property
    def closed(self) -> bool:
        """Whether a slice is a formula of its members' features: no step, no epoch."""
        return self.method in CLOSED_FORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """A closed-form head of all private records, which answers together with the clusters; an erasure subtracts."""

    method: str = setting("none", "kind of the common head", ("none", *CLOSED_FORMS))
    penalty: float = setting(0.1, "as tuning.penalty")
    expand: int = setting(0, "as tuning.expand")
    balanced: bool = setting(False, "as tuning.balanced")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Earlier epochs of a cluster that are kept beside its last; never part of a slice's numbers."""

    every_epochs: int = setting(0, "epochs between snapshots of a cluster that are kept; 0: no snapshots")
    keep: int = setting(3, "most snapshots to keep of a slice; the oldest go first", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """Routing and prediction; free to differ between commands on one workdir."""

    nearest: int = setting(1, "m, number of nearest clusters that answer (paper: 1); 0: all")
    aggregate: str = setting("mean", "mean of their probabilities, or shares of votes", ("mean", "vote"))
    common_weight: float = setting(0.3, "weight of the common head's probabilities, if there is one")
    batch: int = setting(128, "images per device and call", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = setting(0, "determines every random choice: sample, order, augmentation, initial values")
    data: Data = Data()
    public: Public = Public()
    backbone: Backbone = Backbone()
    pretraining: Pretraining = Pretraining()
    clustering: Clustering = Clustering()
    tuning: Tuning = Tuning()
    common: Common = Common()
    checkpoints: Checkpoints = Checkpoints()
    inference: Inference = Inference()


def settings_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Dotted name, value and metadata of every setting of a config, in the order of the schema."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field.metadata


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values."""
    return dataclasses.asdict(config)


def default_config() -> Any:
    """The defaults as an `ml_collections.ConfigDict`, for experiment files to change."""
    from ml_collections import config_dict

    return config_dict.ConfigDict(to_dict(Config()))


def from_dict(tree: Any) -> Config:
    """Checks a tree of settings, a mapping or a `ConfigDict`, and freezes it.

    Raises `UserError` with every unknown key and wrong type at once; where there are none, with every illegal value.
    """
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    if not isinstance(tree, Mapping):
        raise UserError(f"the config must be a group of settings, is {type(tree).__name__}")
    problems: list[str] = []
    config = _build(Config, tree, "", problems)
    raise_all(problems)
    raise_all(validate(config))
    return config


def _build(cls: type, tree: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """One dataclass of the schema from one level of the tree; problems are collected."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems += [unknown(prefix, key, fields) for key in tree if key not in fields]
    values = {}
    for name in fields.keys() & tree.keys():
        value, default, flag = tree[name], fields[name].default, f"{prefix}{name}"
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            values[name] = _build(type(default), value, f"{flag}.", problems)
        elif isinstance(value, int) and not -INTEGER_LIMIT < value < INTEGER_LIMIT:
            problems.append(f"{flag}={_shown(value)}: must lie between -2^63 and 2^63")
        elif type(default) is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not type(default):
            problems.append(f"{flag}={_shown(value)}: must be {legal_values(flag)}, is {type(value).__name__}")
        else:
            values[name] = value
    return cls(**values)


def _shown(value: object) -> str:
    """A value as Python writes it, for a message."""
    return shorten(repr(value) if isinstance(value, str) else value, 400)


def legal_values(name: str) -> str:
    """What a setting such as tuning.epochs may be, whatever the others are."""
    for dotted, default, metadata in settings_of(Config()):
        if dotted == name:
            return ", ".join(filter(None, (KINDS[type(default)], _range(default, metadata))))
    return "a group of settings"


def _range(default: object, metadata: Mapping[str, Any]) -> str:
    """The legal texts or numbers of a setting; "" where every value of its kind is legal."""
    low, below = metadata["low"], metadata["below"]
    if metadata["choices"]:
        return "one of " + ", ".join(metadata["choices"])
    if type(default) not in (int, float):
        return ""
    return f"in [{low}, {below})" if below < math.inf else f"at least {low}" if low else "0 or more"


def unknown(prefix: str, name: object, legal: Collection[str]) -> str:
    """What to say of a name that is no setting of a group, or no group."""
    name = shorten(name)
    near = difflib.get_close_matches(name, legal, 1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"legal: {', '.join(legal)}"
    return f"unknown setting {prefix}{name}; {hint}"


def parse_cut(cut: str) -> tuple[str, float]:
    """Reads `clustering.cut`: ("auto", K) or ("threshold", t). Raises ValueError for anything else."""
    kind = "auto" if cut.startswith("auto:") else "threshold"
    value = int(cut.removeprefix("auto:")) if kind == "auto" else float(cut)
    low, limit = (1, INTEGER_LIMIT) if kind == "auto" else (0, math.inf)
    if not low <= value < limit:
        raise ValueError(cut)
    return kind, float(value)


def parse_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list such as "0.5" or "0.485,0.456,0.406". Raises ValueError for anything else."""
    return tuple(float(number) for number in text.split(",")) if text else ()


def validate(config: Config) -> list[str]:
    """One line per illegal value: the value, what is legal, the flag to change."""
    rules = (_ranges, _rules_of_data, _rules_of_backbone, _rules_of_pretraining, _rules_of_tuning)
    broken = [(name, legal) for rule in rules for name, holds, legal in rule(config) if not holds]
    values = {name: value for name, value, _ in settings_of(config)}
    return [f"--config.{name}={_shown(values[name])}: must be {legal}" for name, legal in broken]


def _ranges(config: Config) -> Iterator[Rule]:
    """What each value must be whatever the others are, as its field says."""
    for name, value, metadata in settings_of(config):
        choices, low, below = metadata["choices"], metadata["low"], metadata["below"]
        if legal := _range(value, metadata):
            yield name, value in choices if choices else low <= value < below, legal


def _rules_of_data(config: Config) -> Iterator[Rule]:
    data = config.data
    fits = data.resize_size == 0 or data.resize_size >= data.image_size
    yield "data.resize_size", fits, f"0 or at least --config.data.image_size={data.image_size}"
    for name, group in (("data", data), ("public", config.public)):
        if group.source in ("npz", "folder"):
            yield f"{name}.path", bool(group.path), f"set for {name}.source={group.source}"
    if data.source == "tfds":
        yield "data.dataset", bool(data.dataset), "the name of a TFDS data set, such as cifar10"
    if data.owner_pattern:
        yield "data.owner_pattern", _has_group(data.owner_pattern), "a regular expression with a group"
    yield "data.csv_columns", data.csv_columns.count(",") in (1, 2), "two or three column names: file,label[,owner]"


def _has_group(pattern: str) -> bool:
    """Whether a pattern is a regular expression with at least one group."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python will read differently
            return re.compile(pattern).groups > 0
    except (re.error, RecursionError, OverflowError):
        return False


def _rules_of_backbone(config: Config) -> Iterator[Rule]:
    backbone = config.backbone
    yield "backbone.mean", _is_normalisation(backbone.mean, -math.inf), "empty, or one number or three, finite"
    yield "backbone.std", _is_normalisation(backbone.std, 0), "empty, or one number or three, finite and above 0"
    if backbone.name:
        weights = f"a file, a folder or hub (see lmeraser backbone --name={backbone.name})"
        yield "backbone.weights", bool(backbone.weights), weights
    if not backbone.weights and min(backbone.patch, backbone.width) > 0:  # else the weights decide
        fits = config.data.image_size % backbone.patch == 0
        yield "data.image_size", fits, f"a multiple of the patch size {backbone.patch}"
        heads = backbone.heads or max(1, backbone.width // 16)
        yield "backbone.heads", backbone.width % heads == 0, f"a divisor of the width {backbone.width} (0: {heads})"


def _rules_of_pretraining(config: Config) -> Iterator[Rule]:
    pretraining = config.pretraining
    adapts = pretraining.start == "weights"
    yield "pretraining.start", not adapts or bool(config.backbone.weights), "scratch without --config.backbone.weights"
    yield "pretraining.epochs", not adapts or pretraining.epochs > 0, "at least 1 for pretraining.start=weights"
    yield "pretraining.distill", adapts or not pretraining.distill, "0 without pretraining.start=weights"
    yield "pretraining.supervise", pretraining.supervise + pretraining.distill > 0, "above 0, or distill is"


def _is_normalisation(text: str, low: float) -> bool:
    """Whether a text is empty, or one finite number or three, all above `low`."""
    try:
        numbers = parse_numbers(text)
    except ValueError:
        return False
    return len(numbers) in (0, 1, 3) and all(low < number < math.inf for number in numbers)


def _rules_of_tuning(config: Config) -> Iterator[Rule]:
    clustering, tuning, size = config.clustering, config.tuning, config.data.image_size
    fits = clustering.max_members == 0 or clustering.min_members <= clustering.max_members
    yield "clustering.min_members", fits, f"at most --config.clustering.max_members={clustering.max_members}"
    try:
        parse_cut(clustering.cut)
    except ValueError:
        yield "clustering.cut", False, "a distance of 0 or more, or auto:K with K >= 1"
    yield "tuning.prompt_width", 2 * tuning.prompt_width <= size, f"at most half of --config.data.image_size={size}"
    prompted = tuning.method != "prompt" or tuning.prompt_width > 0
    yield "tuning.prompt_width", prompted, "above 0 for tuning.method=prompt"
    for name, head in (("tuning", tuning), ("common", config.common)):
        yield f"{name}.penalty", head.method not in ("ridge", "linear") or head.penalty > 0, "above 0"
        yield f"{name}.balanced", head.method == "linear" or not head.balanced, f"false without {name}.method=linear"
    yield "tuning.expand", tuning.closed or not tuning.expand, f"0 for tuning.method={tuning.method}"
    yield "inference.common_weight", config.inference.common_weight <= 1, "at most 1"
