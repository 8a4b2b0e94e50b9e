"""What starts fast: help, refusals and the commands that only read or write the catalog load no JAX and no Orbax."""

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lmeraser_jax.cli.main import COMMANDS
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
from lmeraser_jax.cli.main import main
for arguments, expected in json.loads(sys.argv[1]):
    code = main(arguments)
    assert code == expected, (arguments, code)
    names = {"jax", "orbax", "flax", "optax", "transformers", "tensorflow_datasets", "matplotlib", "jinja2"}
    heavy = names & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def light_commands(workdir) -> list[tuple[list[str], int]]:
    """Command lines that need no JAX, each with its exit code."""
    with contextlib.closing(Catalog(Layout(workdir).catalog)) as catalog:
        cluster = min(catalog.manifest().clusters)
    commands = [(["--help"], 0)]
    for name in COMMANDS:
        commands += [([name, "--help"], 0), ([name, "--nonsense=1"], 2)]
    at = f"--workdir={workdir}"
    commands += [
        (["train", at, "--config.tuning.epoch=3"], 2),
        (["train", at, "--config.tuning.epochs=0"], 2),
        (["audit", at, "--wait=-1"], 2),
        *(
            ([name, "--workdir=/nowhere"], 2)
            for name in ("evaluate", "attack", "audit", "unlearn", "process", "doctor")
        ),
        *(
            ([name, at, "--config.tuning.epochs=99"], 2)
            for name in ("train", "pretrain", "evaluate", "attack", "audit")
        ),
        (["predict", at], 2),
        (["predict", at, "none.png"], 2),
        (["predict", at, str(ROOT / "README.md"), "--config.seed=1"], 2),
        (["rollback", at, f"--cluster={cluster}", "--to=epoch:999"], 2),
        (["rollback", at, "--cluster=unknown"], 2),
        *((["attack", at, flag], 2) for flag in ("--attacks=x", "--shadows=0", "--records=unknown", "--figure=x.jpg")),
        (["rollback", at, f"--cluster={cluster}", "--unpin"], 2),
        (["rollback", at, f"--cluster={cluster}", "--list"], 0),
        (["demo", at], 2),
        *(
            (["compare", f"--workdir={workdir}-new", flag], 2)
            for flag in ("--methods=x", "--experiments=x", "--seeds=0")
        ),
        (["compare", at], 2),
        (["add", at, f"--source={ROOT}", "--config.seed=1"], 2),
        (["add", at, "--source=none.npz"], 2),
        (["unlearn", at, "--records_file=none.txt"], 2),
        (["requests", at], 0),
        (["inspect", at], 0),
        (["verify", at, "--all"], 0),
        (["forecast", at, "--rate=5", "--window=2"], 0),
        (["unlearn", at, "--records=nobody", "--dry_run"], 2),
        (["unlearn", at, "--records=digit-0018", "--defer", "--quarantine"], 0),
        (["unlearn", at, "--records=digit-0019", "--dry_run", "--config.seed=1"], 2),
        (["process", at, "--config.seed=1"], 2),
        (["process", at, "--max_wait=1000"], 0),
    ]
    return commands


def test_light_commands_load_neither_jax_nor_orbax(erased_workdir):
    commands = light_commands(erased_workdir)
    run = [sys.executable, "-c", RUN, json.dumps(commands)]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_light_commands_take_at_most_0_6_seconds_of_processor_time(erased_workdir):
    for arguments, code in light_commands(erased_workdir)[-10:]:
        times = [processor_time(arguments, code)]
        while min(times) > 0.6 and len(times) < 3:  # another process may have disturbed it
            times.append(processor_time(arguments, code))
        assert min(times) <= 0.6, (arguments, times)


def processor_time(arguments: list[str], code: int) -> float:
    """Seconds of a command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lmeraser_jax.cli.main", *arguments]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == code, arguments
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
