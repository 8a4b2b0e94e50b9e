"""The methods that a comparison puts side by side: each changes a few settings of an experiment's config.

A user's own method is a config file that is named by its path.
"""

import dataclasses
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.errors import UserError, raise_all

GROUPS = ("clustering", "tuning", "common", "inference", "checkpoints")  # methods may differ in these groups
OTHER_SETTINGS = ("data.augment",)  # and in these settings of other groups
LEGAL_SETTINGS = ", ".join([*(f"{group}.*" for group in GROUPS), *OTHER_SETTINGS])
ADAPTIVE = {"clustering.partition": "adaptive", "tuning.method": "prompt+head"}
RANDOM = {"clustering.partition": "random", "tuning.method": "prompt+head"}
ONE_CLUSTER = {"clustering.partition": "one"}
HEAD = {"tuning.method": "head", "data.augment": "none"}
LOGISTIC = ONE_CLUSTER | {"tuning.method": "linear"}
LORA = {"tuning.method": "lora"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a comparison."""

    name: str  # as in --methods and in results
    title: str  # as in tables and figures
    changes: Mapping[str, Any] = dataclasses.field(hash=False)  # {"group.setting": value}

    def configure(self, config: Config) -> Config:
        """The config with the method's changes. Raises `UserError` for changes that are not legal."""
        tree, shared = settings.to_dict(config), []
        own = _flatten(tree)
        for name, value in self.changes.items():
            group, _, setting = name.partition(".")
            if _may_differ(name):
                tree[group][setting] = value
            elif name not in own or own[name] != value:
                shared.append(f"{name}={value!r}: all methods of a comparison share it; legal: {LEGAL_SETTINGS}")
        raise_all(shared, f"the method {self.name} changes other settings:")
        try:
            return settings.from_dict(tree)
        except UserError as error:
            raise UserError(f"the method {self.name} does not go with this config: {error}") from None


METHODS: dict[str, Method] = {  # docs/reproduce.md says what each does
    method.name: method
    for method in (
        Method("lmeraser", "LMEraser", ADAPTIVE | {"inference.nearest": 1}),
        Method("lmeraser-top5", "LMEraser, 5 nearest", ADAPTIVE | {"inference.nearest": 5}),
        Method("lmeraser-ridge", "LMEraser + ridge", ADAPTIVE | {"common.method": "ridge"}),
        Method("single", "single prompt", ONE_CLUSTER | {"tuning.method": "prompt+head"}),
        Method("dam-vp", "DAM-VP", ADAPTIVE | {"tuning.method": "prompt", "inference.nearest": 1}),
        Method("rndpart", "random parts", RANDOM | {"inference.nearest": 1}),
        Method("sisa-vote", "SISA, vote", RANDOM | {"inference.nearest": 0, "inference.aggregate": "vote"}),
        Method("sisa-mean", "SISA, mean", RANDOM | {"inference.nearest": 0, "inference.aggregate": "mean"}),
        Method("retrain", "retrain all", ONE_CLUSTER | {"tuning.method": "backbone"}),
        Method("lora", "LoRA, one adapter", ONE_CLUSTER | LORA),
        Method(
            "sisa-lora-mean",
            "SISA, LoRA, mean",
            RANDOM | LORA | {"inference.nearest": 0, "inference.aggregate": "mean"},
        ),
        Method("linear-head", "linear head", ONE_CLUSTER | HEAD),
        Method("heads-ridge", "heads + ridge", ADAPTIVE | HEAD | {"common.method": "ridge"}),
        Method("ridge", "ridge", ONE_CLUSTER | {"tuning.method": "ridge"}),
        Method("ridge-cosines", "ridge + cosines", ONE_CLUSTER | {"tuning.method": "ridge", "tuning.expand": 512}),
        Method("logistic", "logistic head", LOGISTIC | {"tuning.penalty": 0.03}),
        Method("logistic-weak", "logistic head, weak penalty", LOGISTIC | {"tuning.penalty": 0.001}),
        Method(
            "logistic-balanced",
            "balanced logistic head",
            LOGISTIC | {"tuning.penalty": 0.03, "tuning.balanced": True},
        ),
        Method("ncm", "nearest class mean", ONE_CLUSTER | {"tuning.method": "ncm"}),
    )
}


def load(
    names: Sequence[str], known: Mapping[str, Method] = METHODS, flag: str = "methods", also: str = ""
) -> tuple[Method, ...]:
    """Methods by name, or by the path of a config file (*.py).

    Raises `UserError` with all that are none; its message names the flag, and `also` what else is legal.
    """
    methods, problems = [], []
    for name in names:
        try:
            methods.append(_load_file(Path(absolute(name))) if name.endswith(".py") else known[name])
        except UserError as error:
            problems.append(f"--{flag}={name}: {error}")
        except KeyError:
            problems.append(
                f"--{flag}={name}: no such method; legal: {also}{', '.join(METHODS)}, or a config file FILE.py"
            )
    raise_all(problems)
    return tuple(methods)


def _load_file(path: Path) -> Method:
    """A method from a config file, whose `get_config()` returns settings: all of them, or those to change."""
    if not path.is_file():
        raise UserError("no such file")
    if path.stem in METHODS:
        raise UserError("a method has this name already; give the file another name")
    try:
        variables = runpy.run_path(str(path))
        if "get_config" not in variables:
            raise UserError("is no config file: it must define get_config(), which returns the settings to change")
        tree = variables["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"cannot be loaded: {type(error).__name__}: {error}") from error
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    if not isinstance(tree, Mapping) or not all(isinstance(name, str) for name in tree):
        raise UserError(f"get_config() returns {type(tree).__name__}; must be a ConfigDict or a dict of settings")
    changes, defaults = _flatten(tree), _flatten(settings.to_dict(Config()))
    shared = {name: value for name, value in defaults.items() if not _may_differ(name)}  # count where they are others
    changes = {name: value for name, value in changes.items() if name not in shared or value != shared[name]}
    return Method(path.stem, path.stem, changes)


def _may_differ(name: str) -> bool:
    """Whether methods of one comparison may differ in a setting."""
    return name.partition(".")[0] in GROUPS or name in OTHER_SETTINGS


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"group.setting": value} of a tree of settings."""
    flat = {}
    for name, value in tree.items():
        flat |= {f"{name}.{leaf}": v for leaf, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
