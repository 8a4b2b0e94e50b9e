"""The command that measures a GPU runs here on tiny networks, so that nothing in it is broken when a GPU comes."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports one of the suite's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.slow
def test_every_part_runs_here_and_none_twice(tmp_path):
    def suite(*flags):
        command = [sys.executable, str(FOLDER / "gpu_suite.py"), "--quick", f"--out={tmp_path / 'out'}", *flags]
        return subprocess.run(command, check=True, capture_output=True, text=True)

    done = suite(f"--json={tmp_path / 'all.json'}")
    results = json.loads((tmp_path / "all.json").read_text())
    assert len(results) == 10 and all(result["state"] == "complete" for result in results.values()), done.stderr
    figures = {name: result["figures"] for name, result in results.items()}
    assert all("slices bit-identical" in text for text in figures["exactness"].values())
    assert figures["determinism"]["needed XLA_FLAGS"] == "none"
    for name in ("vit", "swin"):
        assert figures[name]["program"]["utilisation"] > 0 and figures[name]["ratio"]["best_torch"] > 0
    assert figures["language"]["ratio"]["peft"] > 0
    assert figures["memory"]["rematerialised"]["peak_bytes"] <= figures["memory"]["plain"]["peak_bytes"]
    assert figures["attention"]["vit cudnn"] == "needs a GPU" and figures["attention"]["swin xla"] > 0
    (tmp_path / "out" / "lanes.json").unlink()
    again = suite()
    assert again.stderr.split() == ["lanes", "..."] and again.stdout.count(" complete ") == 10


def test_flops_are_those_of_the_formula(module):
    """Twice a forward pass, and once more for attention, whose two factors both have a gradient."""
    parts, plan = module("gpu_parts"), module("plan_scale")
    config = parts.QUICK
    program = parts.vit_program(module("gpu_settings").Settings(quick=True), lanes=2, batch=4, blocks=0)
    scores = 4 * config.depth * (1 + config.grid**2) ** 2 * config.width
    embedding = 2 * config.grid**2 * config.width * 3 * config.patch**2
    expected = 2 * (plan.forward_flops(config) + embedding) + scores
    assert 0.8 * expected < program.flops_per_row() < expected, "the last block computes the class token alone"


def test_a_part_that_ends_early_keeps_its_figures_and_says_why(module, monkeypatch, tmp_path):
    suite, parts, shared = module("gpu_suite"), module("gpu_parts"), module("gpu_settings")
    monkeypatch.setattr("os.setsid", lambda: None)
    reasons = {
        "vit": (shared.Unavailable("needs a GPU"), "unavailable", "needs a GPU"),
        "swin": (ModuleNotFoundError(name="torch"), "unavailable", "needs the package torch"),
        "lanes": (ValueError("out of memory"), "failed", "ValueError: out of memory"),
    }
    for name, (error, state, why) in reasons.items():

        def part(settings, error=error):
            yield {"first": 1}
            raise error

        monkeypatch.setitem(parts.PARTS, name, part)
        suite.run_part(name, shared.Settings(quick=True), tmp_path / name)
        result = suite.read(tmp_path / name)
        assert (result["state"], result["why"], result["figures"]) == (state, why, {"first": 1})
        assert suite.completed(result, 0) == result
    suite.run_part("vit", shared.Settings(), tmp_path / "vit")
    result = suite.read(tmp_path / "vit")
    assert (result["state"], result["figures"]) == ("unavailable", {}) and "--quick" in result["why"]
    assert result["packages"]["jaxlib"] and {"device", "driver", "runtime", "commit"} <= result.keys()
    running = {"state": "running", "figures": {"first": 1}}
    assert "time ran out" in suite.completed(running, -signal.SIGKILL)["why"]
    assert suite.completed({}, 3) == {"state": "failed", "why": "its process ended with exit code 3"}


def overrun(place):
    os.setsid()  # as `run_part` does
    child = subprocess.Popen(["sleep", "600"])
    place.with_suffix(".tmp").write_text(str(child.pid))
    place.with_suffix(".tmp").rename(place)
    child.wait()


def test_a_part_that_runs_too_long_is_ended_with_what_it_started(module, tmp_path):
    suite, place = module("gpu_suite"), tmp_path / "child"
    assert sum(suite.SECONDS.values()) <= 9 * 60
    process = multiprocessing.get_context("fork").Process(target=overrun, args=(place,))
    with warnings.catch_warnings(action="ignore"):  # of JAX's threads, which the child does not use
        process.start()
    while not place.exists():
        time.sleep(0.02)
    suite.stop(process)
    assert process.exitcode == -signal.SIGKILL
    stat = Path("/proc") / place.read_text() / "stat"
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "its own child lives on"


def test_the_first_flags_with_equal_bits_are_named(module, monkeypatch):
    checks, shared = module("gpu_checks"), module("gpu_settings")
    answers = iter("abababcc")

    class Process:
        returncode = 0

        def __init__(self, command, env, **_):
            assert env["JAX_ENABLE_COMPILATION_CACHE"] == "0"

        def communicate(self):
            return (next(answers),)

    monkeypatch.setattr(checks.subprocess, "Popen", Process)
    figures = {name: value for piece in checks.determinism(shared.Settings()) for name, value in piece.items()}
    assert list(figures.values()) == [False, False, False, True, checks.PINS["both"]]


@pytest.mark.slow
def test_an_erasure_that_leaves_a_trace_is_noticed(module, monkeypatch):
    checks, shared = module("gpu_checks"), module("gpu_settings")
    monkeypatch.setattr(checks, "without", lambda source, ids: source)
    with pytest.raises(AssertionError, match="prompt.head"):
        list(checks.exactness(shared.Settings(quick=True)))
