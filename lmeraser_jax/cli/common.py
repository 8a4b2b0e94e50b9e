"""Flags that commands share, how they are parsed, and how results are printed."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.training.places import Place, detect
from lmeraser_jax.training.team import ALONE, Team

if TYPE_CHECKING:
    from lmeraser_jax.storage.catalog import Catalog
    from lmeraser_jax.storage.workdir import Layout
    from lmeraser_jax.unlearning.build import BuildReport

Flags = absl_flags.FlagValues


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line: `arguments["flag"]` is a flag's value, `files` what stood without a flag.

    `team` are the processes that the command may share its work with.
    """

    flags: Flags
    files: list[str]
    team: Team = ALONE

    def __getitem__(self, name: str) -> Any:
        return self.flags[name].value


def parse(module: ModuleType, argv: list[str]) -> Arguments | None:
    """Parses a command's flags.

    Args:
        module: the command; its `define(flags)` adds flags, its docstring is the help.
        argv: program name and arguments.

    Returns:
        The arguments; None when help was asked for and printed.

    Raises:
        UserError: an unknown flag or setting, or a value that cannot be parsed.
    """
    flags = Flags()
    absl_flags.DEFINE_string("workdir", "", "folder of the run", flag_values=flags)
    absl_flags.DEFINE_string(
        "json", "", "also write the result as JSON to this file; - for standard output", flag_values=flags
    )
    _define_place(flags)
    module.define(flags)
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv):
        print(_help(module, flags))
        return None
    overrides = [argument[9:].partition("=")[0] for argument in argv if argument.startswith("--config.")]
    raise_all(settings.unknown_names(overrides))
    try:
        if getattr(module, "TAKES_CONFIG", True):
            _define_config(flags, argv, getattr(module, "stored_config", _config_of_run))
        rest = flags(argv)
    except UserError:
        raise
    except absl_flags.Error as error:
        last = str(error).strip().splitlines()[-1]  # ml_collections quotes a whole traceback
        raise UserError(f"{last} (see: lmeraser {_name(module)} --help)") from None
    except Exception as error:  # an experiment file may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config: {kind}{str(error).strip(chr(34))}") from None
    if len(rest) > 1 and not getattr(module, "TAKES_FILES", False):
        hint = getattr(module, "STRAY", "values are given as --flag=value")
        raise UserError(f"unexpected argument {rest[1]!r}; {hint}")
    if flags["json"].value not in ("", "-", None):
        check_target("json", flags["json"].value)
    return Arguments(flags, rest[1:])


def _define_place(flags: Flags) -> None:
    """Flags that say where a process stands among several; Slurm, Open MPI and Kubernetes say it by variables."""
    text = "HOST:PORT of process 0, where no scheduler tells it"
    absl_flags.DEFINE_string("coordinator_address", "", text, flag_values=flags)
    absl_flags.DEFINE_integer("num_processes", None, "number of processes", flag_values=flags)
    absl_flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=flags)


def place_of(arguments: Arguments) -> Place | None:
    """Where this process stands among several; None where it is the only one."""
    given = (arguments[name] for name in ("coordinator_address", "num_processes", "process_id"))
    return detect(os.environ, *given)


def check_target(flag: str, target: str) -> None:
    """Refuses a flag's file that cannot be written before the work is done, not after."""
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={target} cannot be written: {error.strerror}") from error


def _name(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[-1]


def _define_config(flags: Flags, argv: list[str], stored_config: Callable[[str], dict[str, Any] | None]) -> None:
    """--config=FILE.py, or the workdir's own config, or the defaults; each open to --config.x.y=value."""
    try:
        from ml_collections import config_dict, config_flags
    except ImportError as error:
        raise UserError("the command line needs ml_collections: python -m pip install ml_collections") from error
    file = _early(argv, "config")
    if file:
        path = file.partition(":")[0]
        if not Path(path).is_file():
            raise UserError(
                f"--config={path}: no such file; experiments are in configs/, for example configs/digits.py"
            )
        sys.path.append(str(Path(path).resolve().parent.parent))  # experiment files do `from configs import common`
        config_flags.DEFINE_config_file("config", flag_values=flags, sys_argv=argv)
        return
    workdir = _early(argv, "workdir")
    stored = stored_config(workdir) if workdir else None
    base = stored if stored is not None else settings.to_dict(Config())
    config_flags.DEFINE_config_dict("config", config_dict.ConfigDict(base), flag_values=flags, sys_argv=argv)


def _config_of_run(workdir: str) -> dict[str, Any] | None:
    from lmeraser_jax.storage.workdir import Layout, read_config

    return read_config(Layout(workdir))


def _early(argv: list[str], name: str) -> str:
    """The value of a flag before the flags are parsed."""
    found = ""
    for i, argument in enumerate(argv):
        if argument in (f"--{name}", f"-{name}"):
            found = argv[i + 1] if i + 1 < len(argv) else ""
        elif argument.startswith((f"--{name}=", f"-{name}=")):
            found = argument.partition("=")[2]
    return found


def config_of(arguments: Arguments) -> Config:
    """The checked config of a command."""
    try:
        return settings.from_dict(arguments["config"].to_dict())
    except AttributeError as error:
        raise UserError(f"--config: {error}") from None


def workdir_of(arguments: Arguments) -> str:
    """The workdir. Raises `UserError` when none was given."""
    if not arguments["workdir"]:
        raise UserError("--workdir=DIR is missing: the folder of the run")
    return arguments["workdir"]


def _help(module: ModuleType, flags: Flags) -> str:
    texts = {name: _described(flags[name]) for name in flags if name not in ("undefok", "flagfile")}
    configurable = getattr(module, "TAKES_CONFIG", True)
    if configurable:
        texts["config"] = "experiment file, for example configs/digits.py; by default the workdir's own settings"
    width = max(map(len, texts)) + 2
    lines = [(module.__doc__ or "").strip(), "", "flags:"]
    lines += [f"  --{name:<{width}}{texts[name]}" for name in sorted(texts)]
    if not configurable:
        return "\n".join(lines)
    lines += ["", "settings and defaults:"]
    leaves = {f"--config.{name}={default}": text for name, default, text in settings.describe()}
    width = max(map(len, leaves)) + 2
    lines += [f"  {flag:<{width}}{text}" for flag, text in leaves.items()]
    return "\n".join(lines)


def _described(flag: absl_flags.Flag) -> str:
    """A flag's help, and its default where that is not nothing."""
    value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    shown = value is not None and value is not False and value != ""
    return f"{flag.help} (default: {value})" if shown else str(flag.help)


def define_wait(flags: Flags) -> None:
    """The flag of commands that write."""
    text = "seconds to wait while another process writes the workdir"
    absl_flags.DEFINE_float("wait", 0.0, text, lower_bound=0, flag_values=flags)


def define_profile(flags: Flags) -> None:
    """The flag of commands that tune."""
    text = "folder for a jax.profiler trace of a few calls of the tuning program"
    absl_flags.DEFINE_string("profile", "", text, flag_values=flags)


@contextlib.contextmanager
def catalog_of(workdir: str) -> Iterator[tuple["Layout", "Catalog"]]:
    """A workdir's catalog alone: no lock, no backbone, no JAX. Raises `UserError` when it is no workdir."""
    from lmeraser_jax.storage.catalog import Catalog
    from lmeraser_jax.storage.workdir import Layout

    layout = Layout(workdir)
    layout.require()
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        yield layout, catalog


def outcome_text(outcome: "BuildReport") -> str:
    """What a reconcile did, in a line."""
    return (
        f"clusters re-tuned {outcome.retuned}, reused {outcome.reused}; {outcome.images} images"
        f" ({outcome.ratio:.1%} of a full re-tune) in {outcome.seconds:.1f} s"
    )


def log_devices() -> None:
    """Says on standard error what the work runs on."""
    import jax

    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})", file=sys.stderr)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def warn_if_unfinished(run: Any) -> None:
    """Says that the published state still holds what an accepted erasure will remove."""
    from lmeraser_jax.storage import requests

    if requests.any_open(run.catalog):
        warn(f"an accepted erasure is not finished; finish it with: lmeraser process --workdir={run.layout.root}")


def show(arguments: Arguments, text: str, values: dict[str, Any]) -> None:
    """Prints the text for people and, with --json, the values for machines."""
    target = arguments["json"]
    if target == "-":
        print(json.dumps(values, indent=2))
        return
    print(text)
    if target:
        Path(target).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
