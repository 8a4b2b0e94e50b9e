"""What the commands share: flags, how a command line is parsed, how a workdir is opened and a result printed."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags as absl_flags

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.config.paths import absolute, expand
from lmeraser_jax.data.names import list_names
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.models import zoo
from lmeraser_jax.progress import warn
from lmeraser_jax.storage import checkpoints, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import Imported
from lmeraser_jax.storage.workdir import Layout, read_config, refuse_other_writer
from lmeraser_jax.unlearning import binding, signatures

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from lmeraser_jax.training.multihost import Processes
    from lmeraser_jax.unlearning.build import BuildReport
    from lmeraser_jax.unlearning.run import Run

Flags = absl_flags.FlagValues
INSTALL = "the service needs more packages: pip install 'lmeraser_jax[serve]'"
NAMES_IN_WARNING = 1000  # --json has all names


class Flag(NamedTuple):
    """A flag of a command. Its values are of the default's type, or of the type that stands in place of a default.

    A list is one text with commas between its values. A tuple is a flag that may be repeated: each time one name or
    path, as it stands. A path has the function that makes it absolute for default.
    """

    name: str
    default: Any
    text: str
    low: float | None = None  # the least legal number
    choices: tuple[str, ...] = ()  # the legal texts; empty: any

    def define(self, flags: Flags) -> None:
        kind, default = type(self.default), self.default
        if kind is type:
            kind, default = default, None
        if isinstance(default, FunctionType):
            absl_flags.DEFINE(_PathParser(default), self.name, "", self.text, flags)
        elif kind is tuple and default:
            parser, serializer = _PathParser(*default), absl_flags.ArgumentSerializer()
            absl_flags.DEFINE_multi(parser, serializer, self.name, (), self.text, flags)
        elif self.choices:
            absl_flags.DEFINE_enum(self.name, default, self.choices, self.text, flag_values=flags)
        elif kind in (int, float):
            define: Any = absl_flags.DEFINE_integer if kind is int else absl_flags.DEFINE_float
            define(self.name, default, self.text, lower_bound=self.low, flag_values=flags)
        else:
            plain = {bool: absl_flags.DEFINE_bool, str: absl_flags.DEFINE_string, list: absl_flags.DEFINE_list}
            plain[tuple] = absl_flags.DEFINE_multi_string
            plain[kind](self.name, default, self.text, flag_values=flags)


class _PathParser(absl_flags.ArgumentParser):
    """Makes the value of a flag an absolute path."""

    def __init__(self, function: Callable[[str], str]):
        self.function = function

    def parse(self, argument: str) -> str:
        return self.function(argument)


def _file_or_output(path: str) -> str:
    """An absolute path, or - for standard output."""
    return path if path == "-" else absolute(path)


WORKDIR = Flag("workdir", absolute, "folder of the run")
COMMON = (  # of all commands
    WORKDIR,
    Flag("json", _file_or_output, "also write the result as JSON to this file; - is standard output"),
)
WRITING = (  # of commands that write and tune
    Flag("wait", 0.0, "seconds to wait while another process writes the workdir", low=0),
    Flag("profile", absolute, "write a jax.profiler trace of two calls of the tuning program to this folder"),
)
# of commands that finish requests
SIGNING_KEY = Flag("signing_key", absolute, "private key (lmeraser keys) that signs all receipts not signed yet")
PLACE = (  # where a process stands among several
    Flag("coordinator_address", str, "HOST:PORT of process 0, if no scheduler gives it"),
    Flag("num_processes", int, "number of processes", low=1),
    Flag("process_id", int, "number of this process, from 0", low=0),
)
SHARED = (  # of commands whose work several processes can share
    Flag("distributed", False, "this is one of several processes that a scheduler started for one command"),
    *PLACE,
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line: `arguments["flag"]` is a flag's value."""

    flags: Flags
    files: list[str]  # what stood without a flag
    processes: "Processes | None" = None  # this process among those that share the work; None where it is alone

    def __getitem__(self, name: str) -> Any:
        return self.flags[name].value


def parse(module: ModuleType, argv: list[str]) -> Arguments | None:
    """Parses program name and arguments with the flags of a command; None when help was asked for and printed.

    A command is a module: its docstring is the help, `FLAGS` are its flags, `run(arguments)` does the work.
    Raises `UserError` for an unknown flag or setting, or a value that cannot be parsed.
    """
    flags = Flags()
    for flag in (*COMMON, *getattr(module, "FLAGS", ())):
        flag.define(flags)
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv):
        print(_help(module, flags))
        return None
    overrides = [argument[9:].partition("=")[0] for argument in argv if argument.startswith("--config.")]
    raise_all(unknown_names(overrides))
    try:
        if getattr(module, "TAKES_CONFIG", True):
            _define_config(flags, argv, getattr(module, "stored_config", read_config))
        rest = flags(argv)
    except UserError:
        raise
    except absl_flags.Error as error:
        last = str(error).strip().splitlines()[-1]  # ml_collections quotes a whole traceback
        value = last.removeprefix("flag ").partition(": ")[0]
        if value.startswith("--config."):
            name = value.removeprefix("--config.").partition("=")[0]
            raise UserError(f"{value}: must be {settings.legal_values(name)}") from None
        raise UserError(f"{last} (see: lmeraser {module.__name__.rpartition('.')[2]} --help)") from None
    except Exception as error:  # an experiment file may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config: {kind}{str(error).strip(chr(34))}") from None
    if len(rest) > 1 and not getattr(module, "TAKES_FILES", False):
        hint = getattr(module, "STRAY", "values are given as --flag=value")
        raise UserError(f"unexpected argument {rest[1]!r}; {hint}")
    target = str(flags["json"].value)
    if target not in ("", "-"):
        check_target("json", target)
    return Arguments(flags, [expand(name) for name in rest[1:]])


def unknown_names(names: Iterable[str]) -> list[str]:
    """A message for every dotted name, such as tuning.epochs, that is no setting."""
    tree, problems = settings.to_dict(Config()), []
    for name in names:
        group, _, leaf = name.partition(".")
        legal = tree[group] if isinstance(tree.get(group), dict) else {}
        if group not in tree:
            problems.append(settings.unknown("", group, tree))
        elif leaf and leaf not in legal:
            problems.append(settings.unknown(f"{group}.", leaf, legal))
    return problems


def check_target(flag: str, target: str) -> None:
    """Refuses a flag's file that cannot be written before the work is done, not after."""
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={target} cannot be written: {error.strerror}") from error


def _define_config(flags: Flags, argv: list[str], stored_config: Callable[[Layout], dict[str, Any] | None]) -> None:
    """Defines --config=FILE.py; without it the workdir's own config or the defaults, open to --config.x.y=value."""
    from ml_collections import config_dict, config_flags

    early = Flags()  # what --config.x.y changes depends on these two flags
    for flag in (Flag("config", "", ""), WORKDIR):
        flag.define(early)
    early(argv, known_only=True)
    if early["config"].value:
        given = early["config"].value
        ways = (given, f"-config={given}", f"--config={given}")
        argv[:] = [word.removesuffix(given) + expand(given) if word in ways else word for word in argv]
        path = expand(given).partition(":")[0]
        if not Path(path).is_file():
            hint = "experiments are in configs/, for example configs/digits.py"
            raise UserError(f"--config={path}: no such file; {hint}")
        sys.path.append(str(Path(path).resolve().parent.parent))  # experiment files do `from configs import common`
        config_flags.DEFINE_config_file("config", flag_values=flags, sys_argv=argv)
        return
    workdir = early["workdir"].value
    base = (stored_config(Layout(workdir)) if workdir else None) or settings.to_dict(Config())
    config_flags.DEFINE_config_dict("config", config_dict.ConfigDict(base), flag_values=flags, sys_argv=argv)


def config_of(arguments: Arguments) -> Config:
    """The checked config of a command."""
    return settings.from_dict(arguments["config"])


def refuse_text(config: Config, instead: str) -> None:
    """Raises `UserError` where a command for images is given texts; `instead` says what serves."""
    if config.is_text:
        raise UserError(f"this command is for images, not for texts; {instead}")


def workdir_of(arguments: Arguments, must_exist: bool = True) -> str:
    """The workdir. Raises `UserError` when none was given, or when it must exist and does not; loads no JAX."""
    workdir = arguments["workdir"]
    if not workdir:
        raise UserError("--workdir=DIR is missing: the folder of the run")
    if must_exist:
        Layout(workdir).require()
    return workdir


def _help(module: ModuleType, flags: Flags) -> str:
    """A command's docstring, its flags and the settings, each with its meaning and default."""
    texts = {f"--{name}": _described(flags[name]) for name in flags if name not in ("undefok", "flagfile")}
    config = {}
    if getattr(module, "TAKES_CONFIG", True):
        texts["--config"] = "experiment file, for example configs/digits.py; by default the workdir's own settings"
        defaults = settings.settings_of(Config())
        config = {f"--config.{name}={default}": metadata["help"] for name, default, metadata in defaults}
    lines = [(module.__doc__ or "").strip(), "", "flags:", *_columns(dict(sorted(texts.items())))]
    return "\n".join([*lines, "", "settings and defaults:", *_columns(config)] if config else lines)


def _columns(texts: dict[str, str]) -> list[str]:
    width = max(map(len, texts)) + 2
    return [f"  {name:<{width}}{text}" for name, text in texts.items()]


def _described(flag: absl_flags.Flag) -> str:
    """A flag's help, and its default where that is not nothing."""
    value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return str(flag.help) if str(value) in ("None", "False", "") else f"{flag.help} (default: {value})"


def several_processes(arguments: Arguments) -> bool:
    """Whether several processes share the work. Raises `UserError` where their flags do not go together."""
    if "distributed" not in arguments.flags:
        return False
    place = {flag.name: arguments[flag.name] for flag in PLACE}
    missing = [f"--{name}" for name, value in place.items() if value is None]
    if 0 < len(missing) < len(PLACE):
        raise UserError(f"{', '.join(missing)} missing: give all of {', '.join(place)}, or --distributed alone")
    address = place["coordinator_address"]
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator_address={address}: must be HOST:PORT, with a port from 1 to 65535")
    if not missing and place["process_id"] >= place["num_processes"]:
        raise UserError(f"--process_id={place['process_id']}: must be below --num_processes={place['num_processes']}")
    return not missing or arguments["distributed"]


@contextlib.contextmanager
def catalog_of(workdir: str) -> Iterator[tuple[Layout, Catalog]]:
    """A workdir's catalog alone: no lock, no backbone, no JAX."""
    layout = Layout(workdir)
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        yield layout, catalog


def finished(arguments: Arguments) -> tuple[str, Config]:
    """The finished workdir and the config of a command. Raises `UserError` unless they go together; loads no JAX."""
    workdir, config = workdir_of(arguments), config_of(arguments)
    binding.finished_config(Layout(workdir), config)
    return workdir, config


@contextlib.contextmanager
def opened(arguments: Arguments, write: bool = False) -> Iterator["Run"]:
    """A run on the finished workdir of a command; to write, the command has the flags `WRITING` and `SHARED`."""
    workdir, config = finished(arguments)
    if write:
        refuse_other_writer(Layout(workdir), arguments["wait"])
    from lmeraser_jax.training import profiling
    from lmeraser_jax.unlearning.run import open_run

    log_devices()
    options: dict[str, Any] = {"wait": arguments["wait"], "processes": arguments.processes} if write else {}
    options["signing_key"] = signing_key_of(arguments)
    with (
        profiling.into(arguments["profile"] if write else ""),
        open_run(workdir, config, write=write, **options) as run,
    ):
        yield run


def signing_key_of(arguments: Arguments) -> "Ed25519PrivateKey | None":
    """The key that signs receipts, if the command has one. Raises `UserError` where it cannot be used."""
    return signatures.load_signing_key(arguments["signing_key"]) if "signing_key" in arguments.flags else None


def begun(arguments: Arguments) -> tuple[str, Config]:
    """The same for a workdir that is new or not finished yet."""
    workdir, config = workdir_of(arguments, must_exist=False), config_of(arguments)
    if config.backbone.weights and not Layout(workdir).backbone.exists():
        zoo.refuse_absent(config.backbone)
    require_device()
    Layout(workdir).prepare()
    if Layout(workdir).catalog.exists():
        refuse_other_writer(Layout(workdir), arguments["wait"] if "wait" in arguments.flags else 0)
        with catalog_of(workdir) as (layout, catalog):
            binding.check_training(layout, catalog, config, "retune" in arguments.flags and arguments["retune"])
            if catalog.manifest() is None and layout.backbone.exists():
                _, metadata, _ = checkpoints.load(layout.backbone)
                binding.check_backbone(layout, metadata["inputs"], config)
            if not ("reimport" in arguments.flags and arguments["reimport"]):
                binding.check_sample(catalog, config)
    return workdir, config


def imported_text(imported: Imported, again: str, text: bool = False) -> str:
    """What an import did, in a line. Warns of unreadable images; the command `again` adds them once they are mended."""
    if imported.unreadable:
        warn(
            f"{len(imported.unreadable)} records could not be read and were left out"
            f" ({list_names(imported.unreadable, NAMES_IN_WARNING)}); once they are mended, {again} adds them"
        )
    counts = {
        "known before": imported.known,
        "refused because they or their owner were erased": imported.erased,
        "with the content of another": imported.duplicates,
        "cut to --config.text.context" if text else "converted from another colour mode": imported.converted,
        "damaged in the workdir and read from the source again": imported.mended,
        "test, hold-out or public records left out": imported.left_out,
    }
    others = [f"{count} {text}" for text, count in counts.items() if count]
    return ", ".join([f"imported {imported.added} records", *others])


def build_text(report: "BuildReport") -> str:
    """What a build did, in a line."""
    if not (report.retuned or report.published):
        return f"nothing to do: all {report.clusters} clusters are tuned and published"
    return (
        f"tuned {report.retuned} clusters, reused {report.reused}: {report.images} passes of a record"
        f" ({report.ratio:.1%} of a full tuning) in {report.seconds:.1f} s"
    )


def require_device() -> None:
    """Raises `UserError` where JAX_PLATFORMS names a device that is not here; without it JAX finds the CPU at least."""
    if os.environ.get("JAX_PLATFORMS", "") not in ("", "cpu"):
        from lmeraser_jax.training import multihost

        multihost.local_devices()


def log_devices() -> None:
    """Says on standard error what the work runs on. Raises `UserError` where there is no device."""
    import jax

    from lmeraser_jax.training import multihost

    multihost.local_devices()
    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})", file=sys.stderr)


def warn_if_unfinished(run: "Run") -> None:
    """Warns that the published state still holds what an accepted erasure will remove."""
    if requests.any_open(run.catalog):
        warn(f"an accepted erasure is not finished; finish it with: lmeraser process {run.layout.flag}")


def show(arguments: Arguments, text: str, values: dict[str, Any]) -> None:
    """Prints the text for people or, with --json, writes the values for machines."""
    target, content = arguments["json"], json.dumps(values, indent=2, default=str)  # str: paths
    print(content if target == "-" else text)
    if target not in ("", "-"):
        Path(target).write_text(content + "\n", encoding="utf-8")
