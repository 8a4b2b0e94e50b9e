"""The schema: every setting with its default, its meaning and its legal values, as a tree of frozen dataclasses.

The defaults are the embedded experiment: scikit-learn's digits, split into a public and a private half.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lmeraser_jax.config.paths import WithPaths, absolute, absolute_weights

AUGMENTS = ("none", "crop", "flip", "paper")
PROMPTED = ("prompt+head", "prompt")
CLOSED_FORMS = ("ridge", "ncm", "linear")
METHODS = (*PROMPTED, "head", "backbone", "lora", *CLOSED_FORMS)
INTEGER_LIMIT = 2**63  # whole numbers lie below it
NOT_IN_RECIPE = ("scan_steps", "device_bytes")  # settings of `tuning` that never reach the numbers


def setting(default: Any, text: str, choices: tuple[str, ...] = (), **limits: Any) -> Any:
    """A field of the schema: default, meaning with unit, legal texts or numbers, low <= x < below, or a path's rule."""
    text = f"{text} ({' | '.join(choices)})" if choices else text
    metadata = {"help": text, "choices": choices, "low": 0, "below": math.inf, "path": None, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(WithPaths):
    """Where the records come from and what the backbone sees of them."""

    source: str = setting("digits", "where records come from", choices=("digits", "npz", "folder", "tfds", "text"))
    path: str = setting(
        "",
        "npz file, image folder, file of JSON lines; tfds: its data folder, empty for TFDS's own",
        path=absolute,
    )
    dataset: str = setting("", "tfds: name such as cifar10 or visual_domain_decathlon/gtsrb")
    train_split: str = setting("", "folder: subfolder, tfds: split such as train[:40000]; empty: train")
    holdout_split: str = setting("", "as train_split, for the hold-out; empty: none")
    test_split: str = setting("", "as train_split, for the test records; empty: test, if the source has it")
    public_split: str = setting("", "as train_split, for public images; empty: none; folder: public, if it exists")
    test_share: float = setting(0.0, "share of the training records that become test records", below=1)
    holdout: float = setting(0.0, "share of the training records kept out of tuning, to choose settings with", below=1)
    split_by: str = setting("record", "draw the two shares by record or by owner", ("record", "owner"))
    owner_pattern: str = setting("", "regular expression; its groups in an id, joined by /, are the owner")
    labels: str = setting("", "folder: CSV that names files, labels and owners", path=absolute)
    csv_columns: str = setting("file,label,owner", "names of the CSV's three columns; the owner's may be left out")
    skip_unreadable: bool = setting(False, "leave out and name records that cannot be read, instead of refusing all")
    max_pixels: int = setting(50_000_000, "an image file of more pixels counts as unreadable", low=1)
    store_size: int = setting(0, "folder, tfds: height in pixels at which images are kept; 0: image_size")
    store_width: int = setting(0, "folder, tfds: width in pixels; 0: store_size")
    image_size: int = setting(16, "side in pixels of the backbone's input", low=1)
    resize_size: int = setting(0, "shorter side in pixels before the crop; 0: image_size, nothing is cropped")
    augment: str = setting("none", "random crops and flips while tuning; paper: both", AUGMENTS)
    train_limit: int = setting(0, "use only so many private records, drawn by a hash of the id; 0: all")
    test_limit: int = setting(0, "use only so many test records, drawn as train_limit draws; 0: all")
    limit_by: str = setting("record", "draw them from all, or of every class its share", ("record", "class"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """How queries and responses, of data.source=text or of a TFDS set with such features, become rows of tokens."""

    names: str = setting(
        "id,owner,query,response,split",
        "keys of a line for these; the owner's may be empty, the split's left out",
    )
    features: str = setting(
        "", "tfds: features that hold query, response and owner; the owner's may be left out; empty: the set has images"
    )
    query: str = setting("Question: {query}\nAnswer:", "template of a query")
    response: str = setting(" {response}", "template of a response")
    chat: bool = setting(False, "use the tokenizer's chat template instead of these")
    context: int = setting(256, "T, tokens of a row at most; shorter rows are padded", low=1)
    long: str = setting(
        "refuse", "longer rows: count as unreadable, or lose the response's end and the end token", ("refuse", "cut")
    )


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
    """Public records, to train the backbone on and to sample for clusters: never private, and reached by no erasure."""

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
    checkpoint_epochs: int = setting(20, "epochs between checkpoints, beside one every five minutes", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering:
    """How private records are parted: Algorithms 1 and 2 with a balanced cut, by a keyed hash, by owner, or not."""

    partition: str = setting(
        "adaptive",
        "clusters by feature, S random shards, one, or one an owner",
        ("adaptive", "random", "one", "owner"),
    )
    shards: int = setting(10, "S, shards of the random partition", low=1)
    sample_size: int = setting(200, "n_s, number of records that are sampled to make the clusters", low=1)
    sample_from: str = setting("private", "which records are sampled; public: see public.source", ("private", "public"))
    cut: str = setting("auto:10", "where to cut the tree: distance t such as 10.0, or auto:K for K clusters")
    max_members: int = setting(30, "most sampled members of a cluster; 0: no limit (paper)")
    min_members: int = setting(8, "fewest sampled members of a cluster; 0: no limit (paper)")
    feature_batch: int = setting(128, "records per device and call when features are computed", low=1)

    @property
    def has_prototypes(self) -> bool:
        """Whether clusters have a place in the feature space, by which images and queries are routed."""
        return self.partition in ("adaptive", "owner")

    @property
    def parts(self) -> int:
        """Shards of a partition that looks at no feature."""
        return self.shards if self.partition == "random" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Prompts and heads (Def. 1, Eqs. 5 and 6)."""

    method: str = setting("prompt+head", "what is tuned (prompt: the head is fixed), or a closed form", METHODS)
    prompt_width: int = setting(2, "P, width of the border prompt in pixels of the backbone's input")
    start: str = setting("fresh", "where prompts begin; public: at one that is tuned on public.*", ("fresh", "public"))
    prompt_init: float = setting(0.0, "standard deviation of the initial prompt, in normalised pixels; 0: zeros")
    head_init: float = setting(0.0, "standard deviation of the initial head; 0: zeros")
    optimizer: str = setting("adam", "optimizer of prompt and head", ("sgd", "adam"))
    momentum: float = setting(0.9, "momentum of sgd", below=1)
    prompt_rate: float = setting(3e-2, "learning rate of the prompt")
    head_rate: float = setting(1e-2, "learning rate of the head")
    backbone_rate: float = setting(1e-4, "learning rate of the backbone, method backbone only")
    lora_rate: float = setting(1e-3, "learning rate of the adapters, method lora only")
    lora_layers: int = setting(0, "the last so many blocks of the backbone have adapters; 0: all")
    rank: int = setting(8, "R, rank of the adapters", low=1)
    alpha: float = setting(16.0, "what an adapter adds to its layer is multiplied by alpha / rank")
    lora_l2: float = setting(0.0, "lambda: the loss has lambda / 2 times the squared adapters, method lora only")
    penalty: float = setting(0.1, "ridge: added to the variance of standardised features; linear: to squared weights")
    expand: int = setting(0, "closed forms: number of random cosines to append to the feature; 0: none")
    balanced: bool = setting(False, "linear: every class counts alike, however many records it has")
    prompt_decay: float = setting(0.0, "weight decay of the prompt (decoupled for adam)")
    head_decay: float = setting(0.0, "weight decay of the head (decoupled for adam)")
    warmup: float = setting(0.1, "share of the cluster's steps during which the rates rise", below=1)
    epochs: int = setting(30, "passes over the members of a cluster", low=1)
    min_steps: int = setting(60, "fewest steps of a cluster: a small one passes over its members more often")
    batch: int = setting(16, "B, records per lane", low=1)
    lanes: int = setting(1, "L, clusters tuned at the same time per device", low=1)
    scan_steps: int = setting(64, "steps per call of the device program", low=1)
    dtype: str = setting("auto", "auto: float32 on CPU, bfloat16 on GPU", ("auto", "float32", "bfloat16"))
    device_bytes: int = setting(4_000_000_000, "keep records on the device up to this size, else stream them")

    @property
    def active_prompt_width(self) -> int:
        """Width of the prompt that is tuned: 0 where there is none."""
        return self.prompt_width if self.method in PROMPTED else 0

    @property
    def shares_feature(self) -> bool:
        """Whether all slices read the same feature of an image: they have heads and nothing else."""
        return self.active_prompt_width == 0 and self.method not in ("backbone", "lora")

    @property
    def starts_public(self) -> bool:
        """Whether prompts begin at the one that is tuned on public records."""
        return self.start == "public" and self.active_prompt_width > 0

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
    batch: int = setting(128, "inputs per device and call", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = setting(0, "determines every random choice: sample, order, augmentation, initial values")
    data: Data = Data()
    text: Text = Text()
    public: Public = Public()
    backbone: Backbone = Backbone()
    pretraining: Pretraining = Pretraining()
    clustering: Clustering = Clustering()
    tuning: Tuning = Tuning()
    common: Common = Common()
    checkpoints: Checkpoints = Checkpoints()
    inference: Inference = Inference()

    @property
    def is_text(self) -> bool:
        """Whether the records are queries and responses, and the backbone a language model."""
        return self.data.source == "text" or self.data.source == "tfds" and bool(self.text.features)

    @property
    def samples_public_set(self) -> bool:
        """Whether the clustering samples the set that `public` names, not records of `data`."""
        sampled = self.clustering.partition == "adaptive" and self.clustering.sample_from == "public"
        return sampled and self.public.source != "data"


def settings_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Dotted name, value and metadata of every setting of a config, in the order of the schema."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field.metadata


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
