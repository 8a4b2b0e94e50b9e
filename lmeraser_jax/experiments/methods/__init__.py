"""Methods to compare: each is a small file of settings to change, on top of any experiment's config.

A file holds a docstring, `TITLE`, and `CHANGES`, {"group.setting": value}. One more file here is one more method; one
that lies elsewhere is named by its path.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.errors import UserError, join_limited, raise_all

GROUPS = ("clustering", "tuning", "common", "inference", "checkpoints")  # what methods may differ in


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: its name, a title for figures, what it is, and the settings it changes."""

    name: str
    title: str
    about: str
    changes: tuple[tuple[str, Any], ...]

    def of(self, config: Config) -> Config:
        """The config with the method's changes.

        Raises:
            UserError: a change names no setting, or the result is not legal; says which method asked for it.
        """
        raise_all(settings.unknown_names(name for name, _ in self.changes), f"the method {self.name}:")
        tree = settings.to_dict(config)
        for name, value in self.changes:
            *groups, leaf = name.split(".")
            functools.reduce(dict.__getitem__, groups, tree)[leaf] = value
        try:
            return settings.from_dict(tree)
        except UserError as error:
            raise UserError(f"the method {self.name} does not go with this config: {error}") from None


def names() -> tuple[str, ...]:
    """The methods that are here."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def load_all(wanted: Sequence[str]) -> tuple[Method, ...]:
    """Methods by their names or by the paths of their files. Raises `UserError` that names all that are none."""
    unknown = [name for name in wanted if not name.endswith(".py") and name not in names()]
    shadows = [name for name in wanted if name.endswith(".py") and Path(name).stem.replace("_", "-") in names()]
    legal = f"legal: {', '.join(names())}, or FILE.py"
    problems = [f"--methods: {join_limited(map(repr, unknown))}: no such method; {legal}"] if unknown else []
    problems += [f"--methods: {name}: a method is called so already; give the file another name" for name in shadows]
    raise_all(problems)
    return tuple(load(name) for name in wanted)


def load(name: str) -> Method:
    """A method by its name, or by the path of a file.

    Raises:
        UserError: there is none, or the file is not one; lists the names that exist.
    """
    if name.endswith(".py"):
        return _method(Path(name).stem, _from_file(Path(name)))
    if name not in names():
        raise UserError(f"--methods: {name!r} is no method; legal: {', '.join(names())}, or FILE.py")
    return _method(name, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--methods: {path}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file may raise anything
        raise UserError(f"--methods: {path}: {type(error).__name__}: {error}") from error
    return module


def _method(name: str, module: ModuleType) -> Method:
    title, changes = getattr(module, "TITLE", None), getattr(module, "CHANGES", None)
    problems = []
    if not isinstance(title, str):
        problems.append(f"--methods: {name}: TITLE is {title!r}; must be a text")
    if not isinstance(changes, dict):
        problems.append(f"--methods: {name}: CHANGES is {changes!r}; must be a dict of settings")
    for setting, value in changes.items() if isinstance(changes, dict) else ():
        if not isinstance(setting, str) or isinstance(value, dict):
            problems.append(f'--methods: {name}: CHANGES has {setting!r}: {value!r}; must be like "tuning.epochs": 30')
        elif setting.partition(".")[0] not in GROUPS and setting != "data.augment":
            problems.append(
                f"--methods: {name}: CHANGES has {setting}, which all methods of a comparison share; legal:"
                f" {', '.join(f'{group}.*' for group in GROUPS)}, data.augment"
            )
    raise_all(problems)
    assert isinstance(title, str) and isinstance(changes, dict)
    return Method(name, title, (module.__doc__ or "").strip(), tuple(changes.items()))
