"""Which values of settings are legal, alone and together: one line for each that is not.

The schema and its defaults are in `config`, which calls this.
"""

import math
import re
import warnings
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


def illegal(c: "Config") -> list[str]:
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
        ("clustering.partition", k.partition, PARTITIONS),
        ("clustering.sample_from", k.sample_from, ("private", "public")),
        ("tuning.what", t.what, TUNED),
        ("common.what", c.common.what, ("none", *CLOSED_FORMS)),
        ("inference.aggregate", i.aggregate, AGGREGATES),
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
        ("clustering.shards", k.shards),
        ("clustering.sample_size", k.sample_size),
        ("clustering.feature_batch", k.feature_batch),
        ("tuning.epochs", t.epochs),
        ("tuning.slices", t.slices),
        ("tuning.batch", t.batch),
        ("tuning.lanes", t.lanes),
        ("tuning.scan_steps", t.scan_steps),
        ("checkpoints.keep", c.checkpoints.keep),
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
        ("tuning.backbone_rate", t.backbone_rate),
        ("tuning.penalty", t.penalty),
        ("tuning.expand", t.expand),
        ("common.penalty", c.common.penalty),
        ("common.expand", c.common.expand),
        ("tuning.prompt_decay", t.prompt_decay),
        ("tuning.head_decay", t.head_decay),
        ("tuning.min_steps", t.min_steps),
        ("tuning.device_bytes", t.device_bytes),
        ("checkpoints.every_epochs", c.checkpoints.every_epochs),
        ("inference.nearest", i.nearest),
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
    need(
        t.what != "prompt" or t.prompt_width > 0,
        "tuning.prompt_width",
        t.prompt_width,
        "above 0 for tuning.what=prompt",
    )
    need(t.what != "ridge" or t.penalty > 0, "tuning.penalty", t.penalty, "above 0")
    need(c.common.what != "ridge" or c.common.penalty > 0, "common.penalty", c.common.penalty, "above 0")
    need(t.expand == 0 or t.closed, "tuning.expand", t.expand, f"0 for tuning.what={t.what}")
    need(0 <= i.common <= 1, "inference.common", i.common, "in [0, 1]")
    stages = f"1 for tuning.what={t.what}: a closed form has no stages to repeat"
    need(t.slices == 1 or not t.closed, "tuning.slices", t.slices, stages)
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
