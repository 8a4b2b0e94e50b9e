"""Damage in a workdir, through the commands: named in one message, and mended by train to the last bit."""

import shutil
import sqlite3

import numpy as np
import pytest
from fakes import fast_fakes
from helpers import SMALL
from PIL import Image

from lmeraser_jax.cli.main import main
from lmeraser_jax.storage import schema
from lmeraser_jax.unlearning.audit import differences, state
from lmeraser_jax.unlearning.purge import leftovers
from lmeraser_jax.unlearning.run import open_run

pytest.importorskip("ml_collections", reason="the command line needs ml_collections")

FLAGS = [f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()]
FLAGS += ["--config.data.train_limit=60", "--config.data.test_limit=10"]


@pytest.fixture(scope="module", autouse=True)
def _fast():
    """Fast slices and features: what is tried is the store."""
    with pytest.MonkeyPatch.context() as patch:
        fast_fakes(patch)
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory, _fast):
    """A workdir that was trained and erased from, its state, and an image."""
    folder = tmp_path_factory.mktemp("damage")
    assert main(["train", *FLAGS, f"--workdir={folder / 'run'}"]) == 0
    with open_run(folder / "run") as run:
        first = run.catalog.live("train").ids[0]
    assert main(["unlearn", f"--workdir={folder / 'run'}", f"--records={first}"]) == 0
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(folder / "image.png")
    with open_run(folder / "run") as run:
        return folder, state(run)


@pytest.fixture
def damaged(tmp_path, template):
    return shutil.copytree(template[0] / "run", tmp_path / "run")


def one_slice(workdir):
    with open_run(workdir) as run:
        return run.layout.slice(next(iter(run.catalog.manifest().entries.values())))


def data_files(folder):
    """Not all of them are read: each process's own are copied into those of the whole."""
    return [path for path in folder.rglob("d/*") if path.is_file()]


def torn(workdir):
    for file in data_files(one_slice(workdir)):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bit_flipped(workdir):
    for file in data_files(one_slice(workdir)):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def another_slices_bytes(workdir):
    with open_run(workdir) as run:
        one, other = list(run.catalog.manifest().entries.values())[:2]
        shutil.rmtree(run.layout.slice(one))
        shutil.copytree(run.layout.slice(other), run.layout.slice(one))


def without_a_slice(workdir):
    shutil.rmtree(one_slice(workdir))


def without_clusterings(workdir):
    shutil.rmtree(workdir / "clusterings")


def without_features(workdir):
    for file in (workdir / "records").glob("features-*"):
        file.unlink()


def without_receipts(workdir):
    shutil.rmtree(workdir / "receipts")


def said(capsys) -> str:
    """The one error message of the last command."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


DAMAGES = [
    (torn, "predict", 1),
    (bit_flipped, "predict", 1),
    (another_slices_bytes, "predict", 1),
    (without_a_slice, "predict", 1),
    (without_clusterings, "predict and inspect", 0),
    (without_features, "", 0),
    (without_receipts, "", 0),
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, over torn arrays
@pytest.mark.parametrize(("damage", "refused", "tuned"), DAMAGES, ids=[one[0].__name__ for one in DAMAGES])
def test_damage_is_named_and_mended_to_the_last_bit(damaged, template, capsys, damage, refused, tuned):
    folder, wanted = template
    damage(damaged)
    for command in (["predict", str(folder / "image.png")], ["inspect"]):
        capsys.readouterr()
        code = main([*command, f"--workdir={damaged}"])
        assert code == (2 if command[0] in refused else 0)
        if code:
            message = said(capsys)
            assert str(damaged) in message or "is damaged" in message
    capsys.readouterr()
    assert main(["train", f"--workdir={damaged}"]) == 0
    out, err = capsys.readouterr()
    assert err.count("; it is tuned again") == tuned and "Traceback" not in err
    assert ("tuned 1 clusters" in out) == bool(tuned)
    with open_run(damaged) as run:
        assert differences(state(run), wanted) == [] and leftovers(run) == []
    assert main(["predict", str(folder / "image.png"), f"--workdir={damaged}"]) == 0
    assert main(["audit", f"--workdir={damaged}"]) == 0


def test_a_deleted_receipts_folder_does_not_stop_an_erasure(damaged):
    without_receipts(damaged)
    with open_run(damaged) as run:
        name = run.catalog.live("train").ids[0]
    assert main(["unlearn", f"--workdir={damaged}", f"--records={name}"]) == 0
    assert len(list((damaged / "receipts").iterdir())) == 1


def test_a_locked_catalog_is_one_message(damaged, monkeypatch, capsys):
    """Somebody's sqlite3 shell holds a transaction: writers wait, then say so; readers do not care."""
    monkeypatch.setattr(schema, "LONGEST_WAIT", 0.1)
    with open_run(damaged) as run:
        name, wanted = run.catalog.live("train").ids[0], state(run)
    shell = sqlite3.connect(damaged / "catalog.db", isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    assert main(["unlearn", f"--workdir={damaged}", f"--records={name}"]) == 2
    assert "catalog.db is locked by another process" in said(capsys)
    assert main(["inspect", f"--workdir={damaged}"]) == 0
    with open_run(damaged) as run:
        assert differences(state(run), wanted) == []
    shell.execute("ROLLBACK")
    shell.close()
    assert main(["unlearn", f"--workdir={damaged}", f"--records={name}"]) == 0
