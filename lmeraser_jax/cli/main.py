"""`lmeraser COMMAND --flags`: finds the command, turns mistakes into one message and exit code 2.

Imports stay light here, so that help and typing errors are answered at once.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from lmeraser_jax import __version__, interrupt
from lmeraser_jax.errors import UserError

if TYPE_CHECKING:
    from lmeraser_jax.cli import common

COMMANDS = {
    "demo": "the whole job on scikit-learn's digits, in about a minute",
    "backbone": "list published backbones, convert weights once",
    "prepare": "download a data set of TensorFlow Datasets, to be read without TensorFlow",
    "pretrain": "import the data and train the backbone on public images",
    "train": "import, pretrain or convert the backbone, cluster, tune every cluster",
    "evaluate": "accuracy on the test or hold-out images, beside a plain linear head",
    "predict": "label, probability and cluster of image files",
    "add": "new private records join; only the clusters they touch are tuned",
    "unlearn": "erase records or an owner and re-tune what they touched",
    "process": "serve the erasure requests that wait, in one re-tuning",
    "forecast": "what serving erasures at once, daily or weekly would cost",
    "requests": "erasure requests, their states and receipts",
    "verify": "check receipts against the workdir",
    "rollback": "give one cluster an earlier slice, keep it there, list what there is",
    "audit": "rebuild from scratch and compare every bit",
    "attack": "try to find erased records in an unlearned model",
    "doctor": "say what is wrong with a workdir, and repair what can be made again",
    "compare": "methods side by side: accuracy, cost of an erasure, figures",
    "inspect": "clusters, sizes, slices, versions, disk use",
}
SHARED = frozenset({"train", "add", "unlearn", "process", "rollback"})  # the others are done by process 0 alone
RESUMABLE = SHARED | {"pretrain", "compare"}
SURROUNDINGS = frozenset(  # errors of disks and folders that people can mend
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
)
INTERRUPTED = 130
MISUSED = 2
WHOLE = "the workdir holds the old or the new state, nothing between; mend this and run the same command again"


def usage() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            f"lmeraser {__version__}: exact unlearning for large vision models",
            "",
            "usage: lmeraser COMMAND [--workdir=DIR] [--config=FILE.py] [--config.GROUP.SETTING=VALUE] ...",
            "       lmeraser COMMAND --help",
            "",
            *lines,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit code.

    0 done, or a resumable command got SIGTERM and ended where nothing is lost; 1 an audit, a check or a receipt
    failed, an attack found an erased record, or process 0 of several failed; 2 misused, or a process was lost; 3 an
    attack that can say nothing; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    who: list[str] = []
    try:
        return _run(name, arguments[1:], who)
    except (interrupt.Stopped, UserError, KeyboardInterrupt, BrokenPipeError, OSError, sqlite3.DatabaseError) as error:
        code, message = _ending(error, arguments)
        if message:
            print("".join(who) + message, file=sys.stderr)
        return code


def _run(name: str, arguments: Sequence[str], who: list[str]) -> int:
    """Runs a command; says in `who` which process this is, where it is not the first of several."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"legal: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    module = importlib.import_module(f"lmeraser_jax.cli.{name}")
    from lmeraser_jax.cli import common

    parsed = common.parse(module, ["lmeraser", *arguments])
    if parsed is None:
        return 0
    with interrupt.handle_sigterm() if name in RESUMABLE else contextlib.nullcontext():
        if common.several_processes(parsed):
            return _run_by_several(module, parsed, who)
        return module.run(parsed)


def _run_by_several(module: ModuleType, parsed: "common.Arguments", who: list[str]) -> int:
    """Runs a command at process 0; the other processes do their share of its tasks until it is over."""
    from lmeraser_jax.training import multihost
    from lmeraser_jax.unlearning.share import serve

    processes = multihost.start(parsed["coordinator_address"], parsed["num_processes"], parsed["process_id"])
    if processes.index:
        who.append(f"process {processes.index}: ")
        serve(processes)
        return 0
    try:
        code = module.run(dataclasses.replace(parsed, processes=processes))
    except (interrupt.Stopped, UserError):
        multihost.end(processes)
        raise
    multihost.end(processes)
    return code


def _ending(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of an error that is not ours, and what to tell people; raises any other again."""
    if isinstance(error, interrupt.Stopped):
        again = str(error) or shlex.join(_of_one(arguments))
        return 0, f"stopped as asked; resume with: lmeraser {again}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; the same command goes on where it stopped"
    if isinstance(error, BrokenPipeError):
        return 0, ""
    if isinstance(error, UserError):
        return MISUSED, f"error: {error}"
    if isinstance(error, sqlite3.DatabaseError):
        return MISUSED, f"error: the catalog cannot be written or read: {error}; {_remedy(error)}"
    if isinstance(error, OSError) and error.errno in SURROUNDINGS:
        where = f" ({error.filename})" if error.filename else ""
        return MISUSED, f"error: {error.strerror}{where}; {WHOLE}"
    raise error


def _remedy(error: sqlite3.DatabaseError) -> str:
    """What to do about a catalog that SQLite gave up on: its surroundings are at fault, or it is damaged."""
    surroundings = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
    surroundings += (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    code = getattr(error, "sqlite_errorcode", None)
    if code is None and "disk" in str(error) or code is not None and code & 0xFF in surroundings:
        return WHOLE
    return "it may be damaged: lmeraser doctor says what is wrong, and what can be done"


def console() -> int:
    """The program `lmeraser`."""
    without_echoes()
    keep_compiled_programs()
    return main()


def _of_one(arguments: Sequence[str]) -> list[str]:
    """The command line without a place among several processes: it can be resumed by any number of them."""
    return [
        argument for argument in arguments if not re.match(r"--?(distributed|num_processes|process_id|coord)", argument)
    ]


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiled for the next process; whoever set its variables is not overruled.

    Compiled programs hold no record and no parameter: both are arguments. Must come before JAX is imported.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "lmeraser_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def without_echoes() -> None:
    """Silences threads of a failed checkpoint that have nobody left to report to: the failure itself is raised."""

    def echo(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    report, ignore = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if echo(error) else report(kind, error, trace)
    sys.unraisablehook = lambda args: None if echo(args.exc_value) else ignore(args)


if __name__ == "__main__":
    sys.exit(console())
