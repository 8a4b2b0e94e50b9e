"""A full or a failing disk: one message, exit code 2, the old or the new state; with space again it is finished."""

import errno
import os
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from crash_checks import Trial
from crash_points import Points
from crash_scenarios import SCENARIOS, install_fakes

from lmeraser_jax.cli import main
from lmeraser_jax.cli import rollback as command
from lmeraser_jax.storage.catalog import Catalog

NAMES = [name for name in SCENARIOS if name not in ("unlearn texts", "newton")]  # which write as the others do
QUICK_AND_SLOW = [pytest.param(name, marks=() if name == "unlearn" else pytest.mark.slow) for name in NAMES]
CATALOG = ("before begin", "before commit", "after commit", "before flush", "after flush")


@pytest.fixture(scope="module", autouse=True)
def _fast():
    with pytest.MonkeyPatch.context() as patch:
        install_fakes(patch)
        yield


class Faults:
    """Reports an error at the `fail_at`-th point, and with `lasting` at every later one."""

    def __init__(self, folder: Path, fail_at: int | None = None, error: str = "ENOSPC", lasting: bool = False):
        self.folder, self.fail_at, self.error, self.lasting = folder, fail_at, error, lasting
        self.labels: list[str] = []

    def __call__(self, label, half) -> None:
        number = len(self.labels)
        self.labels.append(label)
        if self.fail_at is None or number < self.fail_at or number > self.fail_at and not self.lasting:
            return
        if half is not None and number == self.fail_at:
            half(self.folder)
        if label in CATALOG:
            raise sqlite3.OperationalError("database or disk is full" if self.error == "ENOSPC" else "disk I/O error")
        code = getattr(errno, self.error)
        raise OSError(code, os.strerror(code))


def through_main(trial: Trial, folder: Path, capsys) -> int:
    """The exit code of a command that does the trial's work; one line of standard error if it is not 0."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run", lambda _: trial.run(folder) or 0)
        code = main.main(["rollback", f"--workdir={folder}"])
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert (code, said) == (0, []) or code == 2 and said == lines[-1:], lines
    assert not any("Traceback" in line for line in lines)
    return code


def fail(trial: Trial, number: int, error: str, lasting: bool, capsys) -> tuple[int, str]:
    """The exit code of the command that fails at a point, and the state that it left."""
    folder = trial.copy(f"failed-{number}")
    with pytest.MonkeyPatch.context() as patch:
        Points(folder, patch, Faults(folder, number, error, lasting))
        code = through_main(trial, folder, capsys)
    return code, trial.check(folder)


def labels_of(trial: Trial) -> list[str]:
    folder = trial.copy("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(folder)
        Points(folder, patch, faults)
        trial.run(folder)
    return faults.labels


def test_an_error_around_save_publish_purge_and_receipt(tmp_path, capsys):
    trial = Trial("unlearn", tmp_path)
    labels = labels_of(trial)
    wanted = ("before save", "after save", "before commit", "halfway overwrite", "before remove_others")
    numbers = {label: number for number, label in enumerate(labels)}  # of each the last one
    answers = [fail(trial, numbers[label], "ENOSPC", False, capsys) for label in (*wanted, "before flush")]
    answers += [fail(trial, labels.index("before save"), "EIO", True, capsys)]
    answers += [fail(trial, numbers["halfway write_bytes"], "EIO", True, capsys)]
    assert Counter(code for code, _ in answers)[2] > 5 and {side for _, side in answers} == {"old", "new"}, answers


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_error_at_a_sixth_of_all_points(tmp_path, capsys, name):
    trial, draw = Trial(name, tmp_path), random.Random(0)
    for number in range(0, len(labels_of(trial)), 6):
        fail(trial, number, draw.choice(["ENOSPC", "EIO"]), draw.random() < 0.5, capsys)


@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_a_catalog_that_cannot_grow(tmp_path, capsys, name):
    trial, real = Trial(name, tmp_path), Catalog.__init__

    def limited(catalog, path):
        real(catalog, path)
        pages = catalog.db.execute("PRAGMA page_count").fetchone()[0]
        catalog.db.execute(f"PRAGMA max_page_count={pages}")

    folder = trial.copy("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Catalog, "__init__", limited)
        through_main(trial, folder, capsys)
    trial.check(folder)


FULL = """
import os, subprocess, sys
from pathlib import Path
import pytest
from crash_checks import Trial
from crash_scenarios import install_fakes

def mount(option):
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(disk)], check=True)

install_fakes(pytest.MonkeyPatch())
trial, disk = Trial(sys.argv[1], Path(sys.argv[2])), Path(sys.argv[2]) / "disk"
disk.mkdir()
for room in map(int, sys.argv[3:]):
    mount("size=64m")
    folder = trial.copy("disk/run")
    use = os.statvfs(disk)
    mount(f"remount,size={max((use.f_blocks - use.f_bavail) * use.f_frsize + room, use.f_frsize)}")  # 0: no limit
    try:
        trial.run(folder)
    except Exception as error:
        print(room, type(error).__name__, flush=True)
    mount("remount,size=64m")
    print(trial.check(folder), flush=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a failed command may have files open
"""


@pytest.mark.parametrize("name", QUICK_AND_SLOW)
def test_a_full_file_system(tmp_path, request, name):
    """A real one: a small tmpfs with so many bytes of room."""
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here: {error}")
    rooms = ["0", "65536"] if not request.node.get_closest_marker("slow") else ["0", "8192", "32768", "131072"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])}
    call = ["unshare", "--mount", sys.executable, "-W", "ignore", "-c", FULL, name, str(tmp_path), *rooms]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("0 "), done.stdout + done.stderr
