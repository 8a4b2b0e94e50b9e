"""Damage in a workdir, through the commands: named in one message, and mended by train to the last bit."""

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from damages import feature_file, published_slice, slice_flipped, slice_of_another_cluster
from helpers import SMALL
from PIL import Image

from lmeraser_jax.cli.main import main
from lmeraser_jax.storage import schema
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import open_run

pytestmark = pytest.mark.usefixtures("fast")
FLAGS = [f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()]
FLAGS += ["--config.data.train_limit=60", "--config.data.test_limit=10"]


@pytest.fixture(scope="module")
def template(tmp_path_factory, fast):
    """A workdir that was trained and erased from, its state, and an image."""
    folder = tmp_path_factory.mktemp("damage")
    assert main(["train", *FLAGS, f"--workdir={folder / 'run'}"]) == 0
    with open_run(folder / "run") as run:
        first = run.catalog.live("train").ids[0]
    assert main(["unlearn", f"--workdir={folder / 'run'}", f"--records={first}"]) == 0
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(folder / "image.png")
    with open_run(folder / "run") as run:
        return folder, state(run)


def error_line(capsys) -> str:
    """The one error message of the last command."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_damage_is_named_and_mended_to_the_last_bit(template, tmp_path, capsys):
    (folder, wanted), workdir = template, tmp_path / "run"
    layout, predict = Layout(shutil.copytree(folder / "run", workdir)), ["predict", str(folder / "image.png")]
    for damage, message, tuned in (
        (slice_flipped, str(workdir), 1),
        (slice_of_another_cluster, "is damaged", 1),
        (lambda layout: shutil.rmtree(published_slice(layout)), str(workdir), 1),
        (lambda layout: shutil.rmtree(layout.clusterings), str(workdir), 0),
        (lambda layout: feature_file(layout).unlink(), "", 0),
    ):
        damage(layout)
        capsys.readouterr()
        assert main([*predict, f"--workdir={workdir}"]) == (2 if message else 0)
        assert not message or message in error_line(capsys)
        capsys.readouterr()
        assert main(["train", f"--workdir={workdir}"]) == 0
        out, err = capsys.readouterr()
        assert err.count("; it is tuned again") == tuned and ("tuned 1 clusters" in out) == bool(tuned)
        with open_run(workdir) as run:
            assert differences(state(run), wanted) == [] and leftovers(run) == []
    assert main([*predict, f"--workdir={workdir}"]) == 0 and main(["audit", f"--workdir={workdir}"]) == 0


def test_a_deleted_receipts_folder_does_not_stop_an_erasure(template, tmp_path):
    workdir = Path(shutil.copytree(template[0] / "run", tmp_path / "run"))
    shutil.rmtree(workdir / "receipts")
    with open_run(workdir) as run:
        name = run.catalog.live("train").ids[0]
    assert main(["unlearn", f"--workdir={workdir}", f"--records={name}"]) == 0
    assert len(list((workdir / "receipts").iterdir())) == 1


def test_a_locked_catalog_is_one_message(template, tmp_path, monkeypatch, capsys):
    """Somebody's sqlite3 shell holds a transaction: writers wait, then say so; readers do not care."""
    workdir = Path(shutil.copytree(template[0] / "run", tmp_path / "run"))
    monkeypatch.setattr(schema, "LONGEST_WAIT", 0.1)
    with open_run(workdir) as run:
        name, wanted = run.catalog.live("train").ids[0], state(run)
    shell = sqlite3.connect(workdir / "catalog.db", isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    assert main(["unlearn", f"--workdir={workdir}", f"--records={name}"]) == 2
    assert "catalog.db is locked by another process" in error_line(capsys)
    assert main(["inspect", f"--workdir={workdir}"]) == 0
    with open_run(workdir) as run:
        assert differences(state(run), wanted) == []
    shell.execute("ROLLBACK")
    shell.close()
    assert main(["unlearn", f"--workdir={workdir}", f"--records={name}"]) == 0
