"""kill -9: whatever a command was doing, the old or the new state is there, and the same command again finishes it.

A killed process leaves the files as they are at that moment. So one run of a command is enough: the workdir is copied
at every labelled point, and each copy is opened as the next command would find it.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from crash_checks import SERVED, Trial, published
from crash_points import Points
from crash_scenarios import SCENARIOS, SOURCE, install_fakes, train
from helpers import without


@pytest.fixture(scope="module", autouse=True)
def _fast():
    with pytest.MonkeyPatch.context() as patch:
        install_fakes(patch)
        yield


def fingerprint(folder: Path) -> int:
    """Equal for equal files; the index of SQLite's log, which is made again, aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "catalog.db-shm")
    return hash(tuple((str(path.relative_to(folder)), path.read_bytes()) for path in files))


def kill(trial: Trial, labels: set[str] | None) -> Counter:
    """Copies the workdir at points with these labels, all by default; checks each copy that differs from the others."""
    folder, copies, numbers = trial.copy("run"), dict[int, tuple[str, Path]](), itertools.count()

    def reached(label, half):
        if not folder.exists() or labels is not None and label not in labels:
            return
        copy = trial.home / f"killed-{next(numbers)}"
        with contextlib.suppress(shutil.Error):  # another thread renames what it has written
            shutil.copytree(folder, copy)
        if half is not None:
            half(copy)
        if copies.setdefault(fingerprint(copy), (label, copy))[1] != copy:
            shutil.rmtree(copy)

    with pytest.MonkeyPatch.context() as patch:
        Points(folder, patch, reached)
        trial.run(folder)
    sides = Counter()
    for label, copy in copies.values():
        try:
            sides[trial.check(copy)] += 1
        except Exception as error:
            raise AssertionError(f"killed at {label}") from error
    return sides


def test_killed_around_save_publish_purge_and_receipt(tmp_path):
    labels = {"after save", "after commit", "halfway overwrite", "halfway rmtree", "after flush", "halfway write_bytes"}
    sides = kill(Trial("unlearn", tmp_path), labels)
    assert sides["old"] > 3 and sides["new"] > 3, sides


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_point(tmp_path, name):
    sides = kill(Trial(name, tmp_path), None)
    assert sides["new"] and (sides["old"] or name == "purge"), "kills on both sides of the publish transaction"


@pytest.mark.slow
def test_the_exact_build_after_a_kill_equals_training_without_the_records(tmp_path):
    """Between the approximate slices and the exact ones; `test_killed_at_every_point` kills it once more."""
    trial = Trial("newton", tmp_path)
    train(tmp_path / "scratch", source=without(SOURCE, set(trial.ids)))
    scratch = published(tmp_path / "scratch")
    assert [part for part in SERVED if scratch[part] != trial.new[part]] == []
    assert trial.old["slices"] != trial.new["slices"]


COMMAND = """
import sys
from pathlib import Path
import pytest
from crash_scenarios import SCENARIOS, install_fakes
install_fakes(pytest.MonkeyPatch())
print("ready", flush=True)
SCENARIOS[sys.argv[1]].command(Path(sys.argv[2]), sys.argv[3:])
"""


@pytest.mark.slow
def test_a_real_process_that_is_killed_at_random_moments(tmp_path):
    trial, draw = Trial("unlearn", tmp_path), random.Random(1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])}
    killed = 0
    for number in range(5):
        folder = trial.copy(f"run-{number}")
        command = [sys.executable, "-W", "ignore", "-c", COMMAND, "unlearn", str(folder), *trial.ids]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        trial.check(folder)
    assert killed > 2
