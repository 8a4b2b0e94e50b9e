"""Settings of a run: an experiment file (`configs/*.py`) fills a `ConfigDict`, which `from_dict` checks and freezes."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from lmeraser_jax.config.rules import legal_values, shown, validate
from lmeraser_jax.config.schema import (
    INTEGER_LIMIT,
    Config,
)
from lmeraser_jax.config.schema import (
    NOT_IN_RECIPE as NOT_IN_RECIPE,
)
from lmeraser_jax.config.schema import (
    Backbone as Backbone,
)
from lmeraser_jax.config.schema import (
    Checkpoints as Checkpoints,
)
from lmeraser_jax.config.schema import (
    Clustering as Clustering,
)
from lmeraser_jax.config.schema import (
    Common as Common,
)
from lmeraser_jax.config.schema import (
    Data as Data,
)
from lmeraser_jax.config.schema import (
    Inference as Inference,
)
from lmeraser_jax.config.schema import (
    Pretraining as Pretraining,
)
from lmeraser_jax.config.schema import (
    Public as Public,
)
from lmeraser_jax.config.schema import (
    Text as Text,
)
from lmeraser_jax.config.schema import (
    Tuning as Tuning,
)
from lmeraser_jax.config.schema import (
    parse_cut as parse_cut,
)
from lmeraser_jax.config.schema import (
    parse_numbers as parse_numbers,
)
from lmeraser_jax.config.schema import (
    settings_of as settings_of,
)
from lmeraser_jax.errors import UserError, raise_all, shorten


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
            problems.append(f"{flag}={shown(value)}: must lie between -2^63 and 2^63")
        elif type(default) is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not type(default):
            problems.append(f"{flag}={shown(value)}: must be {legal_values(flag)}, is {type(value).__name__}")
        else:
            values[name] = value
    return cls(**values)


def unknown(prefix: str, name: object, legal: Collection[str]) -> str:
    """What to say of a name that is no setting of a group, or no group."""
    name = shorten(name)
    near = difflib.get_close_matches(name, legal, 1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"legal: {', '.join(legal)}"
    return f"unknown setting {prefix}{name}; {hint}"
