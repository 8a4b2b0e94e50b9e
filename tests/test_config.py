"""Settings: the defaults are legal, and whatever is not is refused with its name and what would be legal."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmeraser_jax import config
from lmeraser_jax.cli.common import unknown_names
from lmeraser_jax.config import Config, from_dict, parse_cut, parse_numbers, to_dict
from lmeraser_jax.errors import UserError
from lmeraser_jax.unlearning.binding import differences

# An independent list of what is legal; the numbers that are not named here may be 0 or more.
AT_LEAST_1 = (
    "data.image_size data.max_pixels text.context backbone.patch backbone.width backbone.depth pretraining.batch "
    "pretraining.checkpoint_epochs clustering.sample_size clustering.feature_batch clustering.shards tuning.epochs "
    "tuning.batch tuning.lanes tuning.scan_steps tuning.rank checkpoints.keep inference.batch"
).split()
SHARES = "data.holdout data.test_share tuning.warmup pretraining.warmup tuning.momentum".split()
CHOICES = {
    "data.source": ("digits", "npz", "folder", "tfds", "text"),
    "data.split_by": ("record", "owner"),
    "text.long": ("refuse", "cut"),
    "data.limit_by": ("record", "class"),
    "data.augment": ("none", "crop", "flip", "paper"),
    "backbone.feature": ("auto", "cls", "pooler"),
    "pretraining.augment": ("none", "crop", "flip", "paper"),
    "clustering.partition": ("adaptive", "random", "one"),
    "clustering.sample_from": ("private", "public"),
    "tuning.method": ("prompt+head", "prompt", "head", "backbone", "lora", "ridge", "ncm", "linear"),
    "tuning.optimizer": ("sgd", "adam"),
    "tuning.dtype": ("auto", "float32", "bfloat16"),
    "common.method": ("none", "ridge", "ncm", "linear"),
    "inference.aggregate": ("mean", "vote"),
}


def tree(**changes) -> dict:
    """A tree with the given leaves: tree(tuning__lanes=2)."""
    root: dict = {}
    for name, value in changes.items():
        *groups, leaf = name.replace(".", "__").split("__")
        level = root
        for group in groups:
            level = level.setdefault(group, {})
        level[leaf] = value
    return root


def refusal(settings: object) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(settings)
    return str(caught.value)


LEAVES = {name: value for name, value, _ in config.settings_of(Config())}
NUMBERS = {name: value for name, value in LEAVES.items() if type(value) in (int, float)}


# what is legal
def test_the_defaults_are_legal():
    assert from_dict({}) == Config() == from_dict(to_dict(Config()))


def test_every_setting_is_described_once():
    flat = {name: v for name, v in to_dict(Config()).items() if not isinstance(v, dict)}
    flat |= {f"{g}.{name}": v for g, v in to_dict(Config()).items() if isinstance(v, dict) for name, v in v.items()}
    assert flat == LEAVES and len(list(config.settings_of(Config()))) == len(LEAVES)
    for name, _, metadata in config.settings_of(Config()):
        text = metadata["help"]
        assert text and all(choice in text for choice in CHOICES.get(name, ()))


def test_a_config_survives_json_and_a_config_dict():
    changed = from_dict(tree(tuning__lanes=3, clustering__cut="2.5", seed=9))
    assert from_dict(json.loads(json.dumps(to_dict(changed)))) == changed
    assert (changed.tuning.lanes, changed.clustering.cut, changed.seed) == (3, "2.5", 9)
    flexible = config.default_config()
    assert from_dict(flexible) == Config() == from_dict(flexible.to_dict())
    flexible.tuning.lanes = 4
    assert from_dict(flexible).tuning.lanes == 4
    flexible.tuning.lane = 4
    assert "unknown setting tuning.lane; did you mean tuning.lanes?" in refusal(flexible)


def test_a_whole_number_may_stand_for_a_real_one():
    rate = from_dict(tree(tuning__prompt_rate=1)).tuning.prompt_rate
    assert rate == 1.0 and type(rate) is float


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_choice_is_legal_and_another_is_refused_with_all_of_them():
    for name, choices in CHOICES.items():
        for value in choices:
            source = {"data.source": "npz", "data.path": "x"} if value != "digits" else {}
            if "text" in (value, name.partition(".")[0]):
                source |= {"data.source": "text", "backbone.weights": "x", "tuning.method": "lora"}
            from_dict(tree(**{**source, "data.dataset": "cifar10", name: value}))
        message = refusal(tree(**{name: "zzz"}))
        assert f"--config.{name}='zzz': must be one of {', '.join(choices)}" in message, name


def test_every_number_has_a_least_value_and_shares_a_limit():
    assert len(NUMBERS) > 30 and {*AT_LEAST_1, *SHARES} < set(NUMBERS)
    for name, default in NUMBERS.items():
        kind, low = type(default), 1 if name in AT_LEAST_1 else 0
        with_low = tree(**{name: kind(low)})
        if name == "clustering.max_members":
            with_low["clustering"]["min_members"] = 10**6  # 0 is no limit, so there is no conflict
        if name not in (
            "data.image_size",
            "text.context",
            "backbone.width",
            "pretraining.supervise",
            "clustering.sample_size",
        ):  # where other settings call for more
            from_dict(with_low)
        legal = "in [0, 1)" if name in SHARES else "at least 1" if low else "0 or more"
        illegal = [kind(low - 1), kind(-3)]
        if kind is float:
            illegal += [math.nan, math.inf]
        if name in SHARES:
            illegal += [1.0, 2.0]
        for value in illegal:
            assert f"--config.{name}={value}: must be {legal}" in refusal(tree(**{name: value}))


def test_conflicts_between_settings_are_refused_with_what_would_be_legal():
    for message, changes in (
        ("data.path='': must be set for data.source=npz", {"data.source": "npz"}),
        ("data.path='': must be set for data.source=folder", {"data.source": "folder"}),
        ("data.path='/x': must be empty for --config.data.source=digits", {"data.path": "/x"}),
        ("public.path='/x': must be empty for --config.public.source=data", {"public.path": "/x"}),
        (
            "clustering.cut='auto:9': must be auto:K with K at most --config.clustering.sample_size=8",
            {"clustering.cut": "auto:9", "clustering.sample_size": 8},
        ),
        ("data.dataset='': must be the name of a TFDS data set, such as cifar10", {"data.source": "tfds"}),
        ("data.owner_pattern='a(b': must be a regular expression with a group", {"data.owner_pattern": "a(b"}),
        ("data.owner_pattern='ab': must be a regular expression with a group", {"data.owner_pattern": "ab"}),
        ("data.csv_columns='file': must be two or three column names", {"data.csv_columns": "file"}),
        ("data.resize_size=15: must be 0 or at least --config.data.image_size=16", {"data.resize_size": 15}),
        ("backbone.weights='': must be named for pretraining.start=weights", {"pretraining.start": "weights"}),
        (
            "tuning.lora_layers=5: must be at most --config.backbone.depth=4 (0: all blocks)",
            {"tuning.method": "lora", "tuning.lora_layers": 5},
        ),
        ("pretraining.distill=1.0: must be 0 without pretraining.start=weights", {"pretraining.distill": 1.0}),
        ("pretraining.supervise=0.0: must be above 0, or distill is", {"pretraining.supervise": 0.0}),
        ("public.path='': must be set for public.source=folder", {"public.source": "folder"}),
        (
            "backbone.weights='': must be a file, a folder or hub (see lmeraser backbone --name=a",
            {"backbone.name": "a"},
        ),
        ("data.image_size=16: must be a multiple of the patch size 3", {"backbone.patch": 3}),
        ("backbone.heads=5: must be a divisor of the width 64", {"backbone.heads": 5}),
        ("backbone.heads=0: must be a divisor of the width 49 (0: 3)", {"backbone.width": 49}),
        ("clustering.min_members=31: must be at most --config.clustering.max", {"clustering.min_members": 31}),
        ("clustering.cut='auto': must be a distance of 0 or more, or auto:K", {"clustering.cut": "auto"}),
        ("tuning.prompt_width=9: must be at most half of --config.data.image_size=16", {"tuning.prompt_width": 9}),
        ("tuning.prompt_width=0: must be above 0", {"tuning.prompt_width": 0, "tuning.method": "prompt"}),
        ("tuning.penalty=0.0: must be above 0", {"tuning.method": "ridge", "tuning.penalty": 0.0}),
        ("common.balanced=True: must be false without common.method=linear", {"common.balanced": True}),
        ("common.penalty=0.0: must be above 0", {"common.method": "ridge", "common.penalty": 0.0}),
        ("tuning.expand=8: must be 0 for tuning.method=prompt+head", {"tuning.expand": 8}),
        ("inference.common_weight=1.5: must be at most 1", {"inference.common_weight": 1.5}),
    ):
        assert f"--config.{message}" in refusal(tree(**changes))
    from_dict(tree(tuning__prompt_width=8, data__resize_size=16))
    from_dict(tree(clustering__min_members=30))
    from_dict(tree(inference__common_weight=1.0))


def test_with_weights_patch_width_and_heads_are_theirs():
    from_dict(tree(backbone__weights="w", backbone__name="swin-b-1k", backbone__patch=3))
    from_dict(tree(backbone__weights="w", backbone__heads=5))


def test_normalisation_is_one_finite_number_or_three():
    for text, numbers in (("", ()), ("0.5", (0.5,)), ("1, 2 ,3e-1", (1.0, 2.0, 0.3))):
        assert parse_numbers(text) == numbers
        from_dict(tree(backbone__mean=text, backbone__std=text))
    for text in ("nan", "inf", "0.5,-inf,0.5", "a", "0.5,", "0.5,0.4", "1,2,3,4", " "):
        for name in ("mean", "std"):
            message = refusal(tree(**{f"backbone.{name}": text}))
            assert f"--config.backbone.{name}={text!r}: must be empty, or one number or three, finite" in message
            assert ("above 0" in message) == (name == "std")
    for text in ("0", "0.5,0,0.5", "-1"):
        from_dict(tree(backbone__mean=text))
        assert f"--config.backbone.std={text!r}: must be" in refusal(tree(backbone__std=text))


def test_a_cut_is_a_distance_or_a_number_of_clusters():
    cuts = {"auto:1": ("auto", 1.0), "auto:194": ("auto", 194.0), "10.0": ("threshold", 10.0), "0": ("threshold", 0.0)}
    for text, cut in cuts.items():
        assert parse_cut(text) == cut
    for text in ("", "auto", "auto:", "auto:0", "auto:-2", "auto:1.5", "auto:x", "-1", "nan", "inf", "t"):
        with pytest.raises(ValueError):
            parse_cut(text)
        assert f"--config.clustering.cut={text!r}" in refusal(tree(clustering__cut=text))


# what is refused
def test_all_illegal_values_are_named_at_once():
    message = refusal(tree(tuning__lanes=0, data__augment="x", seed=-1, clustering__cut="-1"))
    assert message.count("--config.") == 4 == message.count("- --config.")


def test_all_unknown_names_and_wrong_types_are_named_at_once():
    lines = refusal(tree(tuning__lane=1, dota={}, seed="1", clustering__zzz=0, data=3)).splitlines()
    assert lines[0] == "several things are wrong:" and len(lines) == 6
    for words in (
        "unknown setting tuning.lane; did you mean tuning.lanes?",
        "unknown setting dota; did you mean data?",
        "unknown setting clustering.zzz; legal: partition, shards, sample_size",
        "seed='1': must be a whole number, 0 or more, is str",
        "data=3: must be a group of settings",
    ):
        assert any(words in line for line in lines), words
    assert "unknown setting 1; legal: seed, data" in refusal({1: 2})


def test_unknown_names_of_flags_are_refused_with_what_is_near():
    assert unknown_names([*LEAVES, "data"]) == []
    assert unknown_names(["tuning.lane", "tunin.lanes", "seed.x"]) == [
        "unknown setting tuning.lane; did you mean tuning.lanes?",
        "unknown setting tunin; did you mean tuning?",
        "unknown setting seed.x; legal: ",
    ]


def test_a_value_of_another_type_is_refused():
    for name, value, kind in (
        ("seed", True, "a whole number, 0 or more, is bool"),
        ("seed", 1.0, "a whole number, 0 or more, is float"),
        ("seed", None, "a whole number, 0 or more, is NoneType"),
        ("tuning.prompt_rate", "0.1", "a number, 0 or more, is str"),
        ("tuning.prompt_rate", False, "a number, 0 or more, is bool"),
        ("clustering.cut", 10.0, "text, is float"),
        ("data.path", ["a"], "text, is list"),
    ):
        assert refusal(tree(**{name: value})) == f"{name}={value!r}: must be {kind}"
    for settings_ in ([], None, "seed=1", 3):
        assert "must be a group of settings" in refusal(settings_)


def test_differences_name_every_leaf_that_differs():
    old = to_dict(Config())
    new = to_dict(from_dict(tree(seed=3, tuning__dtype="float32", data__path="x", data__source="npz")))
    assert differences(old, old) == []
    assert differences(old, new) == [
        f"data.path: '' -> '{Path.cwd()}/x'",
        "data.source: 'digits' -> 'npz'",
        "seed: 0 -> 3",
        "tuning.dtype: 'auto' -> 'float32'",
    ]
    assert differences({"a": {"b": 1}}, {"c": 2}) == ["a: {'b': 1} -> None", "c: None -> 2"]


# settings of any content
GROUPS = [name for name, value in to_dict(Config()).items() if isinstance(value, dict)]
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1, 5000).map(lambda digits: (-1) ** digits * 10**digits)
    | st.sampled_from([2**63, -(2**63), math.nan, math.inf, "auto:" + "9" * 400, "x" * 10**6])
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=3)
)
KEYS = st.sampled_from([*GROUPS, *to_dict(Config())["data"], "cut", "heads"]) | st.text(max_size=4) | st.integers()
TREES = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)


def checked(settings: object) -> str:
    """The message of a refusal, "" where there is none."""
    try:
        from_dict(settings)
        return ""
    except UserError as error:
        assert len(str(error)) < 20_000
        return str(error)


@given(TREES)
def test_any_tree_is_checked_or_refused_in_few_words(settings):
    checked(settings)


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(LEAVES)),
    VALUES | st.integers(-2, 5) | st.text(alphabet="([{\\.*+?|)]}^$0,:auto", max_size=12),
)
def test_any_value_of_any_setting_is_refused_or_survives_json(name, value):
    settings_ = tree(**{name: value})
    if not checked(settings_):
        accepted = from_dict(settings_)
        assert from_dict(json.loads(json.dumps(to_dict(accepted)))) == accepted


def test_settings_made_to_do_harm_are_refused_in_few_words():
    deep: Any = {}
    for _ in range(100_000):
        deep = {"data": deep}
    for settings_, reason in (
        (deep, "data"),
        ({"data": {"path": [deep]}}, "must be text, is list"),
        ({"seed": 10**5000}, "seed=a large int: must lie between"),
        ({"tuning": {"head_rate": 10**5000}}, "must lie between"),
        ({"clustering": {"cut": "auto:" + "9" * 400}}, "auto:K with K >= 1"),
        ({"data": {"owner_pattern": "(" * 50_000}}, "a regular expression with a group"),
        ({"data": {"owner_pattern": "(a{99999999999999})"}}, "a regular expression with a group"),
        ({"x" * 10**7: 1}, "unknown setting"),
        ({"data": {"source": "x" * 10**7}}, "must be one of digits"),
    ):
        message = checked(settings_)
        assert reason in message and len(message) < 3000
    with contextlib.suppress(AttributeError):  # let the deep tree go without a deep recursion
        while deep:
            deep = deep["data"]
