"""Which values are legal: the range of each setting, and the rules between settings."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from lmeraser_jax.config.schema import Config, parse_cut, parse_numbers, settings_of
from lmeraser_jax.errors import shorten

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
Rule = tuple[str, bool, str]  # a setting's dotted name, whether its value is legal, what would be legal


def validate(config: Config) -> list[str]:
    """One line per illegal value: the value, what is legal, the flag to change."""
    rules = (_ranges, _rules_of_data, _rules_of_text, _rules_of_backbone, _rules_of_pretraining, _rules_of_tuning)
    broken = [(name, legal) for rule in rules for name, holds, legal in rule(config) if not holds]
    values = {name: value for name, value, _ in settings_of(config)}
    return [f"--config.{name}={shown(values[name])}: must be {legal}" for name, legal in broken]


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
    for name, group, without in (("data", data, "digits"), ("public", config.public, "data")):
        if group.source in ("npz", "folder", "text"):
            yield f"{name}.path", bool(group.path), f"set for {name}.source={group.source}"
        unused = group.source == without and group.path
        yield f"{name}.path", not unused, f"empty for --config.{name}.source={without}: name the source of these data"
    if data.source == "tfds":
        yield "data.dataset", bool(data.dataset), "the name of a TFDS data set, such as cifar10"
    if data.owner_pattern:
        yield "data.owner_pattern", _has_group(data.owner_pattern), "a regular expression with a group"
    yield "data.csv_columns", data.csv_columns.count(",") in (1, 2), "two or three column names: file,label[,owner]"


def _rules_of_text(config: Config) -> Iterator[Rule]:
    text, data, tuning, clustering = config.text, config.data, config.tuning, config.clustering
    if not config.is_text:
        for name, value, _ in settings_of(text):
            yield (
                f"text.{name}",
                value == getattr(type(text), name),
                "left as it is without data.source=text or text.features",
            )
        return
    features = text.features.split(",")
    named = data.source == "tfds" and len(features) in (2, 3) and len(set(features)) == len(features) and all(features)
    legal = "two or three features of the set, query,response[,owner], and empty for data.source=text"
    yield "text.features", named or features == [""], legal
    for name in ("public_split", "store_size", "store_width"):
        yield f"data.{name}", not getattr(data, name), "left as it is for texts"
    keys = text.names.split(",")
    distinct = len(keys) in (4, 5) and len(set(keys)) == len(keys) and all(keys[:1] + keys[2:])
    yield "text.names", distinct, "four or five names of keys: id,owner,query,response[,split]"
    yield "text.query", "{query}" in text.query, "a template with {query} in it"
    yield "text.response", "{response}" in text.response, "a template with {response} in it"
    yield "backbone.weights", bool(config.backbone.weights), "a language model's file or folder for texts"
    yield "tuning.method", tuning.method == "lora", "lora for texts"
    yield "common.method", config.common.method == "none", "none for texts"
    yield "tuning.start", tuning.start == "fresh", "fresh for texts"
    yield "data.augment", data.augment == "none", "none for texts"
    yield "pretraining.start", config.pretraining.start == "scratch", "scratch for texts"
    yield "clustering.sample_from", clustering.sample_from == "private", "private for texts"
    yield "inference.nearest", config.inference.nearest == 1, "1 for texts"


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
    yield "backbone.weights", not adapts or bool(config.backbone.weights), "named for pretraining.start=weights"
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
        kind, value = parse_cut(clustering.cut)
        fits = kind != "auto" or value <= clustering.sample_size or clustering.partition != "adaptive"
        yield "clustering.cut", fits, f"auto:K with K at most --config.clustering.sample_size={clustering.sample_size}"
    except ValueError:
        yield "clustering.cut", False, "a distance of 0 or more, or auto:K with K >= 1"
    yield "tuning.prompt_width", 2 * tuning.prompt_width <= size, f"at most half of --config.data.image_size={size}"
    prompted = tuning.method != "prompt" or tuning.prompt_width > 0
    yield "tuning.prompt_width", prompted, "above 0 for tuning.method=prompt"
    depth, adapted = config.backbone.depth, tuning.method == "lora" and not config.backbone.weights
    fits = not adapted or tuning.lora_layers <= depth
    yield "tuning.lora_layers", fits, f"at most --config.backbone.depth={depth} (0: all blocks)"
    yield "tuning.lora_l2", tuning.method == "lora" or not tuning.lora_l2, "0 without tuning.method=lora"
    yield "tuning.alpha", tuning.method != "lora" or tuning.alpha > 0, "above 0 for tuning.method=lora"
    for name, head in (("tuning", tuning), ("common", config.common)):
        yield f"{name}.penalty", head.method not in ("ridge", "linear") or head.penalty > 0, "above 0"
        yield f"{name}.balanced", head.method == "linear" or not head.balanced, f"false without {name}.method=linear"
    yield "tuning.expand", tuning.closed or not tuning.expand, f"0 for tuning.method={tuning.method}"
    yield "inference.common_weight", config.inference.common_weight <= 1, "at most 1"


def shown(value: object) -> str:
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
