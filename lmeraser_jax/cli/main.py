"""`lmeraser COMMAND --flags`: finds the command, and turns mistakes into one message and exit code 2.

Imports stay light here, so that help and refusals are answered at once.
"""

import contextlib
import dataclasses
import difflib
import errno
import gc
import importlib
import io
import os
import shlex
import sqlite3
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from lmeraser_jax import __version__, interrupt
from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import PLACE, SHARED
from lmeraser_jax.config.paths import expand, home
from lmeraser_jax.errors import UserError

if TYPE_CHECKING:
    from lmeraser_jax.training.multihost import Processes

COMMANDS = {
    "demo": "the whole job on scikit-learn's digits, in about a minute",
    "backbone": "list published backbones, or convert published weights",
    "adapt": "train published weights on, on public records",
    "prepare": "download a TFDS data set into files that the other commands read without TensorFlow",
    "pretrain": "import the data and train the backbone on public images",
    "train": "import records, make the backbone, cluster the records, tune every cluster",
    "evaluate": "measure accuracy, or the loss of texts, beside a plain model",
    "predict": "predict image files: label, probability and cluster; or answer queries",
    "export": "write the adapters of a language model as folders that peft loads",
    "add": "add private records and tune only the clusters that they touch",
    "unlearn": "erase records, or all records of an owner, and re-tune what they touched",
    "rectify": "replace the content or label of records, and re-tune what they touched",
    "process": "serve all waiting requests in one build",
    "serve": "predictions, requests and receipts over HTTP, with a console",
    "tokens": "make a token for the HTTP service",
    "forecast": "estimate what serving erasures at once, daily or weekly costs",
    "requests": "list requests with their states and receipts",
    "verify": "check receipts against the workdir, or copies of receipts by their signatures",
    "keys": "make a key pair that signs receipts and checks them",
    "rollback": "list the earlier slices of a cluster, or pin the cluster to one",
    "audit": "rebuild the workdir from its live records and compare every bit",
    "attack": "try to find erased records in an unlearned model",
    "doctor": "report damage in a workdir; with --fix drop what train can make again",
    "choose": "choose a method on a private hold-out, within a budget for an erasure",
    "compare": "compare methods: accuracy, cost of an erasure, figures",
    "inspect": "show clusters, slices, versions and disk use; list record ids",
}
CHECKS = frozenset({"audit", "attack", "doctor", "verify"})  # exit code 1 is their verdict
RESUMABLE = frozenset(
    {"adapt", "train", "add", "unlearn", "rectify", "process", "rollback", "pretrain", "choose", "compare"}
)
REQUESTS = frozenset({"unlearn", "rectify", "process"})
CACHE = "JAX_COMPILATION_CACHE_DIR"
MISUSED, UNCHECKED, INTERRUPTED = 2, 3, 130  # exit codes
RESUMES = "interrupted; the same command goes on where it stopped"
MENDABLE = frozenset(  # errors of disks, folders and limits
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
)
JAX_SETTINGS = ("jax/_src/config.py", "jaxlib/_config.py")  # what refuses a value of a variable JAX_...
MEND = "the workdir holds the old or the new state, nothing between; mend this and run the same command again"
SMALLER = (
    "lower --config.data.image_size or .text.context, or the batch and lanes of --config.tuning, .pretraining or"
    " .clustering"
)
DAMAGED = "it may be damaged: lmeraser doctor says what is wrong, and what can be done"


def usage() -> str:
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    return f"""lmeraser {__version__}: exact unlearning for large vision models

usage: lmeraser COMMAND [--workdir=DIR] [--config=FILE.py] [--config.GROUP.SETTING=VALUE] ...
       lmeraser COMMAND --help

{commands}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code.

    0 done, or SIGTERM ended a resumable command where nothing is lost; 1 an audit, a check or a receipt failed, an
    attack found an erased record, or an image to predict could not be read; 2 misused, or a process was lost; 3 a
    check that could not look, or an attack that can say nothing; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help", "--version"):
        print(__version__ if name == "--version" else usage())
        return 0
    try:
        return _run(name, arguments[1:])
    except interrupt.Stopped as stop:
        resume = str(stop) or shlex.join(_without_place(arguments))
        print(f"stopped as asked; resume with: lmeraser {resume}", file=sys.stderr)
        return 0
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print(RESUMES, file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSED
    except Exception as error:
        message = _message(error)
        if not message and name not in CHECKS:
            raise
        if not message:
            traceback.print_exc()
        print(f"{'not checked' if name in CHECKS else 'error'}: {message or repr(error)}", file=sys.stderr)
        return UNCHECKED if name in CHECKS else MISUSED


def _run(name: str, arguments: Sequence[str]) -> int:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"legal: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    module = importlib.import_module(f"lmeraser_jax.cli.{name}")
    parsed = common.parse(module, ["lmeraser", *arguments])
    if parsed is None:
        return 0
    processes = None
    if common.several_processes(parsed):
        from lmeraser_jax.training import multihost

        processes = multihost.start(*(parsed[flag.name] for flag in PLACE))  # until all are there, SIGTERM kills
    with interrupt.handle_sigterm() if name in RESUMABLE else contextlib.nullcontext():
        return module.run(parsed) if processes is None else _run_by_several(module, parsed, processes)


def _run_by_several(module: ModuleType, arguments: common.Arguments, processes: "Processes") -> int:
    """Runs a command at process 0; the other processes do their share of its tasks until it is over."""
    from lmeraser_jax.training import multihost
    from lmeraser_jax.unlearning import share

    if processes.index:
        try:
            share.serve(processes)
        except UserError as error:
            raise UserError(f"process {processes.index}: {error}") from error
        return 0
    try:
        code = module.run(dataclasses.replace(arguments, processes=processes))
    except (interrupt.Stopped, UserError):
        multihost.end(processes)
        raise
    multihost.end(processes)
    return code


def _message(error: Exception) -> str:
    """What a user needs to know of an error that a user can mend; "" for any other."""
    if isinstance(error, sqlite3.DatabaseError):
        remedy = MEND if isinstance(error, sqlite3.OperationalError) else DAMAGED
        return f"the catalog cannot be written or read: {error}; {remedy}"
    if isinstance(error, OSError) and error.errno in MENDABLE:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; {MEND}"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"{(str(error) or 'out of memory').splitlines()[0]}; {SMALLER}"  # JAX's is a RuntimeError
    if traceback.extract_tb(error.__traceback__)[-1].filename.endswith(JAX_SETTINGS):
        return f"a setting of JAX in the environment (JAX_...): {error}"
    return ""


def _without_place(arguments: Sequence[str]) -> list[str]:
    """A command line without the flags of several processes: any number of them can resume it."""
    shared, valued = {flag.name for flag in SHARED}, {flag.name for flag in PLACE}
    remaining, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name not in shared:
            remaining.append(argument)
        elif name in valued and not equals:
            next(rest, None)  # its value
    return remaining


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs for the next process; variables that are set are not overruled.

    Compiled programs hold no record and no parameter: both are arguments. Must come before JAX is imported. Without a
    home folder they are not kept, and a line says so.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    default = f"{caches if os.path.isabs(caches) else '~/.cache'}/lmeraser_jax"
    try:
        folder = expand(os.environ.get(CACHE, default))
        if CACHE not in os.environ:
            if not (os.path.isabs(caches) or os.path.isdir(home())):
                raise UserError(f"the home folder {home()} does not exist")
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise UserError(f"{folder} cannot be written")
        os.environ[CACHE] = folder
    except (OSError, UserError) as error:
        os.environ.pop(CACHE, None)
        print(f"compiled programs are not kept: {error}; {CACHE}=DIR names a folder for them", file=sys.stderr)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def ignore_torn_event_loops() -> None:
    """Silences what a failed checkpoint leaves of Orbax's event loops; the failure itself is raised."""
    report = sys.unraisablehook

    def report_others(args: "sys.UnraisableHookArgs") -> None:
        if str(args.exc_value) != "Event loop is closed" and "'_ssock'" not in str(args.exc_value):
            report(args)

    sys.unraisablehook = report_others
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def console() -> int:
    """The program `lmeraser`.

    Importing and tracing makes some 300,000 objects that stay. Python's collector would go through them again and
    again, and once more at the end: together a fifth of a small request, which leaves no array to collect.
    """
    if sys.argv[1:2] and sys.argv[1] in REQUESTS:
        gc.set_threshold(1_000_000)
    interrupt.end_at_second_ctrl_c(RESUMES, INTERRUPTED)
    ignore_torn_event_loops()
    keep_compiled_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are printed as they are, text or not
    code = main()
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(console())
