"""Settings: the defaults are legal, and whatever is not is refused with its name and what would be legal."""

import dataclasses
import json

import pytest

from lmeraser_jax import config, legality
from lmeraser_jax.config import Config, differences, from_dict, to_dict
from lmeraser_jax.errors import UserError
from lmeraser_jax.legality import cut_of

INF, NAN = float("inf"), float("nan")
AT_LEAST_1 = (
    "data.image_size backbone.patch backbone.width backbone.depth pretraining.batch pretraining.checkpoint_epochs "
    "clustering.sample_size clustering.feature_batch tuning.epochs tuning.slices tuning.batch tuning.lanes "
    "tuning.scan_steps checkpoints.keep clustering.shards inference.batch"
).split()
COUNTS_FROM_0 = (
    "seed data.store_size data.store_width data.train_limit data.test_limit backbone.heads backbone.mlp "
    "pretraining.epochs clustering.max_members clustering.min_members tuning.prompt_width tuning.min_steps "
    "tuning.device_bytes checkpoints.every_epochs inference.nearest"
).split()
REALS_FROM_0 = (
    "pretraining.rate pretraining.weight_decay tuning.prompt_init tuning.head_init tuning.prompt_rate "
    "tuning.head_rate tuning.backbone_rate tuning.penalty tuning.prompt_decay tuning.head_decay"
).split()
SHARES = "data.holdout data.test_share tuning.warmup pretraining.warmup tuning.momentum".split()
CHOICES = {
    "data.source": legality.SOURCES,
    "data.split_by": ("record", "owner"),
    "data.augment": legality.AUGMENTS,
    "backbone.feature": ("auto", "cls", "pooler"),
    "pretraining.augment": legality.AUGMENTS,
    "clustering.partition": legality.PARTITIONS,
    "clustering.sample_from": ("private", "public"),
    "tuning.method": legality.TUNED,
    "inference.aggregate": legality.AGGREGATES,
    "tuning.optimizer": legality.OPTIMIZERS,
    "tuning.dtype": legality.DTYPES,
}


def tree(**changes) -> dict:
    """A tree with the given leaves: tree(tuning__lanes=2)."""
    found: dict = {}
    for name, value in changes.items():
        *groups, leaf = name.replace(".", "__").split("__")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return found


def refusal(settings) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(settings)
    return str(caught.value)


def leaves() -> list[tuple[str, object]]:
    found = []
    for name, value in to_dict(Config()).items():
        found += [(f"{name}.{k}", v) for k, v in value.items()] if isinstance(value, dict) else [(name, value)]
    return found


# what is legal
def test_defaults_are_legal():
    assert from_dict({}) == Config() == from_dict(to_dict(Config()))


def test_json_round_trip():
    changed = from_dict(tree(tuning__lanes=3, clustering__cut="2.5", seed=9))
    assert from_dict(json.loads(json.dumps(to_dict(changed)))) == changed
    assert (changed.tuning.lanes, changed.clustering.cut, changed.seed) == (3, "2.5", 9)


def test_config_dict_round_trip():
    pytest.importorskip("ml_collections", reason="default_config needs ml_collections")
    tree = config.default_config()
    assert from_dict(tree) == Config() == from_dict(tree.to_dict())
    tree.tuning.lanes = 4
    assert from_dict(tree).tuning.lanes == 4
    with pytest.raises(TypeError):
        tree.tuning.lanes = "4"
    tree.tuning.lane = 4
    assert "unknown setting tuning.lane; did you mean tuning.lanes?" in refusal(tree)


def test_int_for_float():
    rate = from_dict(tree(tuning__prompt_rate=1)).tuning.prompt_rate
    assert rate == 1.0 and type(rate) is float


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


@pytest.mark.parametrize(("flag", "legal"), CHOICES.items(), ids=CHOICES)
def test_every_choice_is_legal(flag, legal):
    for value in legal:
        from_dict(tree(**{flag: value, "data.path": "x", "data.dataset": "cifar10"}))


@pytest.mark.parametrize("flag", [*COUNTS_FROM_0, *REALS_FROM_0, *SHARES])
def test_zero_is_legal(flag):
    settings = tree(**{flag: 0})
    if flag == "clustering.max_members":
        settings["clustering"]["min_members"] = 10**6  # no limit above: no conflict
    from_dict(settings)


# what is not
@pytest.mark.parametrize(("flag", "legal"), CHOICES.items(), ids=CHOICES)
def test_choice_refused(flag, legal):
    message = refusal(tree(**{flag: "zzz"}))
    assert f"--config.{flag}='zzz'" in message and ", ".join(legal) in message


@pytest.mark.parametrize("flag", AT_LEAST_1)
def test_below_one_refused(flag):
    for value in (0, -3):
        assert f"--config.{flag}={value}: must be at least 1" in refusal(tree(**{flag: value}))


@pytest.mark.parametrize("flag", [*COUNTS_FROM_0, *REALS_FROM_0])
def test_negative_refused(flag):
    value = -1.0 if flag in REALS_FROM_0 else -1
    assert f"--config.{flag}={value}: must be 0 or more" in refusal(tree(**{flag: value}))


@pytest.mark.parametrize("flag", [*REALS_FROM_0, *SHARES])
def test_non_finite_refused(flag):
    for value in (NAN, INF):
        assert f"--config.{flag}={value}: must be " in refusal(tree(**{flag: value}))


@pytest.mark.parametrize("flag", SHARES)
def test_share_refused(flag):
    for value in (-0.1, 1.0, 2.0):
        assert f"--config.{flag}={value}: must be in [0, 1)" in refusal(tree(**{flag: value}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            tree(backbone__name="vit-b-22k"),
            "--config.backbone.weights='': must be the weights of --config.backbone.name=vit-b-22k: a folder or file,"
            " or hub to download (lmeraser backbone --name=vit-b-22k says what and from where)",
        ),
        (
            tree(backbone__patch=3, data__image_size=16),
            "--config.data.image_size=16: must be a multiple of the patch size 3",
        ),
        (tree(backbone__heads=5, backbone__width=64), "--config.backbone.heads=5: must be a divisor of the width 64"),
        (tree(backbone__width=49), "--config.backbone.heads=3: must be a divisor of the width 49"),
        (tree(data__owner_pattern="a(b"), "--config.data.owner_pattern='a(b': must be a regular expression"),
        (tree(data__owner_pattern="ab"), "--config.data.owner_pattern='ab': must be a regular expression"),
        (tree(data__csv_columns="file"), "--config.data.csv_columns='file': must be two or three column names"),
        (tree(data__source="tfds"), "--config.data.dataset='': must be the name of a TFDS data set, such as cifar10"),
        (
            tree(tuning__prompt_width=9, data__image_size=16),
            "--config.tuning.prompt_width=9: must be at most half of --config.data.image_size=16",
        ),
        (
            tree(data__resize_size=15, data__image_size=16),
            "--config.data.resize_size=15: must be 0 or at least --config.data.image_size=16",
        ),
        (
            tree(clustering__min_members=61, clustering__max_members=60),
            "--config.clustering.min_members=61: must be at most --config.clustering.max_members=60",
        ),
        (tree(data__source="npz"), "--config.data.path='': must be set for data.source=npz"),
        (tree(data__source="folder"), "--config.data.path='': must be set for data.source=folder"),
        (tree(clustering__cut="auto"), "--config.clustering.cut='auto': must be a distance of 0 or more, or auto:K"),
    ],
)
def test_conflict_refused(settings, message):
    assert message in refusal(settings)


NORMALISATION_REFUSED = ["nan", "inf", "0.5,-inf,0.5", "a", "0.5,", "0.5,0.4", "1,2,3,4", " "]


@pytest.mark.parametrize("text", NORMALISATION_REFUSED)
@pytest.mark.parametrize("flag", ["backbone.mean", "backbone.std"])
def test_normalisation_refused(flag, text):
    message = refusal(tree(**{flag: text}))
    assert f"--config.{flag}={text!r}: must be empty, or one number or three, finite" in message
    assert ("above 0" in message) == (flag == "backbone.std")


@pytest.mark.parametrize("text", ["0", "0.5,0,0.5", "-1"])
def test_a_deviation_is_above_0(text):
    assert f"--config.backbone.std={text!r}: must be" in refusal(tree(backbone__std=text))
    from_dict(tree(backbone__mean=text))


@pytest.mark.parametrize(
    ("text", "found"),
    [("", ()), ("0.5", (0.5,)), ("0.485,0.456,0.406", (0.485, 0.456, 0.406)), ("1, 2 ,3e-1", (1.0, 2.0, 0.3))],
)
def test_numbers(text, found):
    assert legality.numbers(text) == found
    from_dict(tree(backbone__mean=text, backbone__std=text))


def test_with_weights_the_architecture_is_theirs():
    """Patch, width and heads are not held against each other: the weights say what they are."""
    from_dict(tree(backbone__weights="w", backbone__name="swin-b-1k", backbone__patch=3, data__image_size=16))
    from_dict(tree(backbone__weights="w", backbone__heads=5, backbone__width=64))


def test_borders_are_legal():
    from_dict(tree(tuning__prompt_width=8, data__resize_size=16, data__image_size=16))
    from_dict(tree(clustering__min_members=60, clustering__max_members=60))


def test_every_number_is_checked():
    """A setting that nobody checks would show here."""
    numbers = [(flag, value) for flag, value in leaves() if type(value) in (int, float)]
    assert len(numbers) > 30
    for flag, value in numbers:
        assert f"--config.{flag}=" in refusal(tree(**{flag: type(value)(-1)}))


def test_all_problems_at_once():
    message = refusal(tree(tuning__lanes=0, data__augment="x", seed=-1, clustering__cut="-1"))
    assert message.count("--config.") == 4 == message.count("- --config.")


def test_all_unknown_and_types_at_once():
    message = refusal(tree(tuning__lane=1, dota={}, seed="1", clustering__zzz=0, data=3))
    lines = message.splitlines()
    assert lines[0] == "the config cannot be used:" and len(lines) == 6
    assert any("unknown setting tuning.lane; did you mean tuning.lanes?" in line for line in lines)
    assert any("unknown setting dota; did you mean data?" in line for line in lines)
    assert any("unknown setting clustering.zzz; legal: partition, shards, sample_size" in line for line in lines)
    assert any("seed='1': must be int, is str" in line for line in lines)
    assert any("data=3: must be a group of settings" in line for line in lines)


@pytest.mark.parametrize(
    ("flag", "value", "kind"),
    [
        ("seed", True, "int, is bool"),
        ("seed", 1.0, "int, is float"),
        ("seed", None, "int, is NoneType"),
        ("tuning.prompt_rate", "0.1", "float, is str"),
        ("tuning.prompt_rate", False, "float, is bool"),
        ("clustering.cut", 10.0, "str, is float"),
        ("data.path", ["a"], "str, is list"),
    ],
)
def test_wrong_type_refused(flag, value, kind):
    assert refusal(tree(**{flag: value})) == f"{flag}={value!r}: must be {kind}"


@pytest.mark.parametrize("settings", [[], None, "seed=1", 3])
def test_not_a_tree_refused(settings):
    assert "must be a group of settings" in refusal(settings)


def test_odd_key_refused():
    assert "unknown setting 1; legal: seed, data" in refusal({1: 2})


# helpers
@pytest.mark.parametrize(
    ("cut", "found"),
    [
        ("auto:1", ("auto", 1.0)),
        ("auto:194", ("auto", 194.0)),
        ("10.0", ("threshold", 10.0)),
        ("0", ("threshold", 0.0)),
    ],
)
def test_cut_of(cut, found):
    assert cut_of(cut) == found


@pytest.mark.parametrize(
    "cut", ["", "auto", "auto:", "auto:0", "auto:-2", "auto:1.5", "auto:x", "-1", "nan", "inf", "t"]
)
def test_cut_refused(cut):
    with pytest.raises(ValueError):
        cut_of(cut)
    assert f"--config.clustering.cut={cut!r}" in refusal(tree(clustering__cut=cut))


def test_differences():
    old = to_dict(Config())
    new = to_dict(from_dict(tree(seed=3, tuning__dtype="float32", data__path="x")))
    assert differences(old, old) == []
    assert differences(old, new) == ["data.path: '' -> 'x'", "seed: 0 -> 3", "tuning.dtype: 'auto' -> 'float32'"]


def test_differences_of_missing_keys():
    assert differences({"a": {"b": 1}}, {"c": 2}) == ["a: {'b': 1} -> None", "c: None -> 2"]
