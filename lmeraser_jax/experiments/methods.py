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
from lmeraser_jax.errors import UserError, raise_all

GROUPS = ("clustering", "tuning", "common", "inference", "checkpoints")  # methods may differ in these groups
OTHER_SETTINGS = ("data.augment",)  # and in these settings of other groups
LEGAL_SETTINGS = ", ".join([*(f"{group}.*" for group in GROUPS), *OTHER_SETTINGS])
ADAPTIVE = {"clustering.partition": "adaptive", "tuning.method": "prompt+head"}
RANDOM = {"clustering.partition": "random", "tuning.method": "prompt+head"}
ONE_CLUSTER = {"clustering.partition": "one"}
HEAD = {"tuning.method": "head", "data.augment": "none"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a comparison.

    Attributes:
        name: as in --methods and in results.
        title: as in tables and figures.
        changes: {"group.setting": value}.
    """

    name: str
    title: str
    changes: Mapping[str, Any] = dataclasses.field(hash=False)

    def configure(self, config: Config) -> Config:
        """Returns the config with the method's changes.

        Raises:
            UserError: names every setting that all methods share and this one would change, or what is not legal.
        """
        tree = settings.to_dict(config)
        shared = []
        for name, value in self.changes.items():
            group, _, setting = name.partition(".")
            if _may_differ(name):
                tree[group][setting] = value
            elif name not in _flatten(tree) or _flatten(tree)[name] != value:
                shared.append(f"{name}={value!r}: all methods of a comparison share it; legal: {LEGAL_SETTINGS}")
        raise_all(shared, f"the method {self.name} changes other settings:")
        try:
            return settings.from_dict(tree)
        except UserError as error:
            raise UserError(f"the method {self.name} does not go with this config: {error}") from None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        # A prompt and a head for every cluster; the nearest cluster answers.
        Method("lmeraser", "LMEraser", ADAPTIVE | {"inference.nearest": 1}),
        # The mean of the five nearest clusters' probabilities.
        Method("lmeraser-top5", "LMEraser, 5 nearest", ADAPTIVE | {"inference.nearest": 5}),
        # LMEraser and a ridge head of all records, weighted as the config says.
        Method("lmeraser-ridge", "LMEraser + ridge", ADAPTIVE | {"common.method": "ridge"}),
        # Visual prompting: one prompt and one head for all private data; a request re-tunes both.
        Method("single", "single prompt", ONE_CLUSTER | {"tuning.method": "prompt+head"}),
        # A prompt for every cluster; fixed features of the backbone stand for the classes.
        Method("dam-vp", "DAM-VP", ADAPTIVE | {"tuning.method": "prompt", "inference.nearest": 1}),
        # Random shards in the place of clusters; a hash of the image chooses the shard that answers.
        Method("rndpart", "random parts", RANDOM | {"inference.nearest": 1}),
        # SISA (Bourtoule et al., 2021) over prompts and heads: all shards answer.
        Method("sisa-vote", "SISA, vote", RANDOM | {"inference.nearest": 0, "inference.aggregate": "vote"}),
        Method("sisa-mean", "SISA, mean", RANDOM | {"inference.nearest": 0, "inference.aggregate": "mean"}),
        # The whole network is tuned on all private data, and again after every request.
        Method("retrain", "retrain all", ONE_CLUSTER | {"tuning.method": "backbone"}),
        # A linear head on frozen features, tuned like the heads of the others; a request tunes it again.
        Method("linear-head", "linear head", ONE_CLUSTER | HEAD),
        # Clusters without prompts: a linear head on features for each, and a ridge head of all records.
        Method("heads-ridge", "heads + ridge", ADAPTIVE | HEAD | {"common.method": "ridge"}),
        # Closed forms on frozen features, from which an erasure is an exact subtraction of whole numbers.
        Method("ridge", "ridge", ONE_CLUSTER | {"tuning.method": "ridge"}),
        Method("ridge-cosines", "ridge + cosines", ONE_CLUSTER | {"tuning.method": "ridge", "tuning.expand": 512}),
        Method("ncm", "nearest class mean", ONE_CLUSTER | {"tuning.method": "ncm"}),
    )
}


def load(names: Sequence[str]) -> tuple[Method, ...]:
    """Returns methods by their names, or by the paths of config files (*.py).

    Raises:
        UserError: names every unknown method and every file that is no method.
    """
    methods, problems = [], []
    for name in names:
        try:
            methods.append(_load_file(Path(name)) if name.endswith(".py") else METHODS[name])
        except UserError as error:
            problems.append(f"--methods={name}: {error}")
        except KeyError:
            problems.append(f"--methods={name}: no such method; legal: {', '.join(METHODS)}, or a config file FILE.py")
    raise_all(problems)
    return tuple(methods)


def _load_file(path: Path) -> Method:
    """A method from a config file, whose `get_config()` returns settings: all of them, or those to change.

    Settings that all methods share count only where they are not the defaults: `Method.configure` refuses these.
    """
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
    defaults = _flatten(settings.to_dict(Config()))
    changes = {
        name: value
        for name, value in _flatten(tree).items()
        if _may_differ(name) or name not in defaults or value != defaults[name]
    }
    return Method(path.stem, path.stem, changes)


def _may_differ(name: str) -> bool:
    """Whether methods of one comparison may differ in a setting."""
    return name.partition(".")[0] in GROUPS or name in OTHER_SETTINGS


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"group.setting": value} of a tree of settings."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{setting}": leaf for setting, leaf in value.items()}
        else:
            flat[name] = value
    return flat
