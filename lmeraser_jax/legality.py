"""Which values of settings are legal, alone and together: one line for each that is not.

The schema and its defaults are in `config`, which calls this.
"""

import functools
import math
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmeraser_jax.config import Config

SOURCES = ("digits", "npz", "folder", "tfds")
AUGMENTS = ("none", "crop", "flip", "paper")
OPTIMIZERS = ("sgd", "adam")
DTYPES = ("auto", "float32", "bfloat16")
PARTITIONS = ("adaptive", "random", "one")
PROMPTED = ("prompt+head", "prompt", "prompts+one head")
CLOSED_FORMS = ("ridge", "ncm")
TUNED = (*PROMPTED, "head", "backbone", *CLOSED_FORMS)
AGGREGATES = ("mean", "vote")
WHOLE = 2**63  # whole numbers lie below it
SHOWN = 400  # characters of a value in a message

CHOICES = {
    "data.source": SOURCES,
    "data.split_by": ("record", "owner"),
    "data.augment": AUGMENTS,
    "backbone.feature": ("auto", "cls", "pooler"),
    "pretraining.augment": AUGMENTS,
    "clustering.partition": PARTITIONS,
    "clustering.sample_from": ("private", "public"),
    "tuning.method": TUNED,
    "common.method": ("none", *CLOSED_FORMS),
    "inference.aggregate": AGGREGATES,
    "tuning.optimizer": OPTIMIZERS,
    "tuning.dtype": DTYPES,
}
AT_LEAST_ONE = {
    "data": ("max_pixels", "image_size"),
    "backbone": ("patch", "width", "depth"),
    "pretraining": ("batch", "checkpoint_epochs"),
    "clustering": ("shards", "sample_size", "feature_batch"),
    "tuning": ("epochs", "slices", "batch", "lanes", "scan_steps"),
    "checkpoints": ("keep",),
    "inference": ("batch",),
}
ZERO_OR_MORE = {
    "data": ("store_size", "store_width", "train_limit", "test_limit"),
    "backbone": ("heads", "mlp"),
    "pretraining": ("epochs", "rate", "weight_decay"),
    "clustering": ("max_members", "min_members"),
    "tuning": (
        *("prompt_width", "prompt_init", "prompt_rate", "prompt_decay", "head_init", "head_rate", "head_decay"),
        *("backbone_rate", "penalty", "expand", "min_steps", "device_bytes"),
    ),
    "common": ("penalty", "expand"),
    "checkpoints": ("every_epochs",),
    "inference": ("nearest",),
}
SHARES = {"data": ("holdout", "test_share"), "pretraining": ("warmup",), "tuning": ("warmup", "momentum")}

Rule = tuple[bool, str, object, str]  # whether it holds, the flag, its value, what is legal


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


def validate(c: "Config") -> list[str]:
    """One line per illegal value: the value, what is legal, the flag to change."""
    rules = (_alone, _of_data, _of_backbone, _of_clustering, _of_tuning)
    broken = [rule for part in rules for rule in part(c) if not rule[0]]
    return [f"--config.{flag}={_short(value)}: must be {legal}" for _, flag, value, legal in broken]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _alone(c: "Config") -> Iterator[Rule]:
    """What each value must be whatever the others are."""

    def value_of(flag: str):
        return functools.reduce(getattr, flag.split("."), c)

    for flag, legal in CHOICES.items():
        yield value_of(flag) in legal, flag, repr(value_of(flag)), "one of " + ", ".join(legal)
    yield c.seed >= 0, "seed", c.seed, "0 or more"
    for table, test, legal in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (ZERO_OR_MORE, lambda value: 0 <= value < math.inf, "0 or more"),
        (SHARES, lambda value: 0 <= value < 1, "in [0, 1)"),
    ):
        for flag in (f"{group}.{name}" for group, names in table.items() for name in names):
            yield test(value_of(flag)), flag, value_of(flag), legal
    yield 0 <= c.inference.common_weight <= 1, "inference.common_weight", c.inference.common_weight, "in [0, 1]"


def _of_data(c: "Config") -> Iterator[Rule]:
    d = c.data
    legal = f"0 or at least --config.data.image_size={d.image_size}"
    yield d.resize_size == 0 or d.resize_size >= d.image_size, "data.resize_size", d.resize_size, legal
    needs_path = d.source in ("npz", "folder")
    yield bool(d.path) or not needs_path, "data.path", repr(d.path), f"set for data.source={d.source}"
    named = "the name of a TFDS data set, such as cifar10"
    yield bool(d.dataset) or d.source != "tfds", "data.dataset", repr(d.dataset), named
    grouped = "a regular expression with a group"
    yield _has_group(d.owner_pattern), "data.owner_pattern", repr(d.owner_pattern), grouped
    columns = len(d.csv_columns.split(","))
    legal = "two or three column names: file,label[,owner]"
    yield columns in (2, 3), "data.csv_columns", repr(d.csv_columns), legal


def _of_backbone(c: "Config") -> Iterator[Rule]:
    b = c.backbone
    for flag, text, low in (("backbone.mean", b.mean, -math.inf), ("backbone.std", b.std, 0.0)):
        values = numbers(text)
        legal = f"empty, or one number or three, finite{' and above 0' if low == 0 else ''}"
        ok = all(low < value < math.inf for value in values) and len(values) in (0, 1, 3)
        yield ok, flag, repr(text), legal
    what = f"the weights of --config.backbone.name={b.name}: a folder or file, or hub to download"
    what += f" (lmeraser backbone --name={b.name} says what and from where)"
    yield bool(b.weights) or not b.name, "backbone.weights", repr(b.weights), what
    if not b.weights and min(b.patch, b.width) > 0:  # else the weights decide
        size, heads = c.data.image_size, b.heads or max(1, b.width // 16)
        yield size % b.patch == 0, "data.image_size", size, f"a multiple of the patch size {b.patch}"
        yield b.width % heads == 0, "backbone.heads", heads, f"a divisor of the width {b.width}"


def _of_clustering(c: "Config") -> Iterator[Rule]:
    k = c.clustering
    legal = f"at most --config.clustering.max_members={k.max_members}"
    ok = k.max_members == 0 or k.min_members <= k.max_members
    yield ok, "clustering.min_members", k.min_members, legal
    try:
        cut_of(k.cut)
    except ValueError:
        yield False, "clustering.cut", repr(k.cut), "a distance of 0 or more, or auto:K with K >= 1"


def _of_tuning(c: "Config") -> Iterator[Rule]:
    t, width = c.tuning, c.tuning.prompt_width
    legal = f"at most half of --config.data.image_size={c.data.image_size}"
    yield 2 * width <= c.data.image_size, "tuning.prompt_width", width, legal
    yield t.method != "prompt" or width > 0, "tuning.prompt_width", width, "above 0 for tuning.method=prompt"
    yield t.method != "ridge" or t.penalty > 0, "tuning.penalty", t.penalty, "above 0"
    yield c.common.method != "ridge" or c.common.penalty > 0, "common.penalty", c.common.penalty, "above 0"
    yield t.expand == 0 or t.closed, "tuning.expand", t.expand, f"0 for tuning.method={t.method}"
    stages = f"1 for tuning.method={t.method}: a closed form has no stages to repeat"
    yield t.slices == 1 or not t.closed, "tuning.slices", t.slices, stages
