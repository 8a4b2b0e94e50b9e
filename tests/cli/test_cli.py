"""The command line: the whole job in small, and every kind of bad input with its message and exit code 2."""

import errno
import json
import re
import shutil
import sqlite3
from unittest import mock

import jax
import numpy as np
import pytest
from commands import TINY, call, refused
from PIL import Image
from sklearn.datasets import load_digits

from lmeraser_jax.cli.main import COMMANDS, main
from lmeraser_jax.config import Data
from lmeraser_jax.data import folder
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning.run import open_run


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, request):
    """A workdir trained by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        assert main(["train", *TINY, f"--workdir={folder}"]) == 0
    return folder


def test_every_command_has_help(capsys):
    out = call(capsys, "--help")[1]
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = call(capsys, name, "--help")
        assert code == 0 and out.startswith(f"lmeraser {name}:") and "--workdir" in out
    out = call(capsys, "train", "--help")[1]
    assert re.search(r"--config\.tuning\.epochs=30 +\w+", out), "each setting with its default and its meaning"


def test_the_job_as_separate_commands(workdir, capsys, tmp_path):
    at = f"--workdir={workdir}"
    code, out, _ = call(capsys, "train", at)
    assert code == 0 and "nothing to do" in out and "expected share" in out
    code, out, _ = call(capsys, "evaluate", at, f"--json={tmp_path}/e.json")
    values = json.loads((tmp_path / "e.json").read_text())
    assert code == 0 and f"{values['accuracy']:.4f}" in out and 0 <= values["balanced"] <= 1 and values["linear"] > 0.2
    before = json.loads(call(capsys, "inspect", at, "--json=-")[1])
    sizes = [cluster["members"] for cluster in before["clusters"]]
    assert sum(sizes) == before["records"]["train"] > 500
    assert before["expected_share"] == pytest.approx(sum(m * m for m in sizes) / sum(sizes) ** 2)
    assert before["sampled_share"] == pytest.approx(30 / sum(sizes))
    name = call(capsys, "inspect", at, "--records")[1].split()[0]
    code, out, _ = call(capsys, "unlearn", at, f"--records={name}", "--dry_run")
    assert code == 0 and re.search(r"passes of a record: [1-9]\d* \(", out)
    estimate = json.loads(call(capsys, "unlearn", at, f"--records={name}", "--dry_run", "--json=-")[1])
    rates = ["--rate=5", "--window=2", f"--devices={jax.device_count()}"]
    planned = json.loads(call(capsys, "forecast", at, *rates, "--json=-")[1])
    clusters = planned["workload"]["clusters"]
    assert sorted(clusters["members"]) == sorted(sizes) and sum(clusters["sampled"]) == 30
    assert sum(clusters["images"]) == estimate["images_full"] + 2, "one record more, seen in 2 epochs"
    assert planned["workload"]["speed"] == pytest.approx(estimate["images"] / estimate["seconds"])
    assert json.loads(call(capsys, "inspect", at, "--json=-")[1]) == before, "neither changes anything"
    code, out, _ = call(capsys, "unlearn", at, f"--records={name}")
    assert code == 0 and "erased 1 records" in out
    (tmp_path / "ids.txt").write_text(f"{name}\n")
    code, out, _ = call(capsys, "unlearn", at, f"--records_file={tmp_path}/ids.txt")
    assert code == 0 and "were erased before: nothing to do" in out and "nothing to do: all" in out
    code, out, _ = call(capsys, "audit", at)
    assert code == 0 and re.match(r"bit-identical: (\d+) of \1 slices\n", out)
    code, out, _ = call(capsys, "audit", at, "--sample=2")
    assert code == 0 and out.startswith("bit-identical: 2 of 2 slices (a sample;")


def test_predict_takes_what_an_import_takes_and_answers_for_what_can_be_read(workdir, capsys, tmp_path):
    """One set of files, hidden, linked, broken, of odd suffixes: an import and a prediction read the same."""
    root = tmp_path / "set" / "train"
    for name in ("a/1.png", "a/2.JFIF", "a/._3.png", "b/4.jpe", "b/5.jp2", ".c/6.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 8), 7).save(root / name, "PNG")
    (root / "b" / "torn.png").write_bytes((root / "a" / "1.png").read_bytes()[:50])
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (9, 8)).save(tmp_path / "elsewhere" / "8.png")
    (root / "b" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(root)
    source = folder.load(Data(source="folder", path=str(root.parent)))
    pixels = source.read(range(len(source.items)))
    wanted = {str(root.parent / item.id) for item in source.items}
    torn = {str(root.parent / source.items[i].id): reason for i, reason in pixels.unreadable.items()}
    assert len(wanted) == 5 and [*torn] == [str(root / "b" / "torn.png")]
    arguments = ["predict", f"--workdir={workdir}", root, root / "a" / "._3.png", tmp_path / "gone.png"]
    torn[str(tmp_path / "gone.png")] = "no such file or folder"
    for form in ("table", "csv", "json"):
        code, out, err = call(capsys, *arguments, f"--format={form}", f"--json={tmp_path}/out.json")
        values = json.loads((tmp_path / "out.json").read_text())
        assert code == 1 and {row["file"]: row["reason"] for row in values["unreadable"]} == torn
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [
            f"error: {row['file']}: {row['reason']}" for row in values["unreadable"]
        ]
        assert {row["file"] for row in values["predictions"]} == wanted - {*torn} | {str(root / "a" / "._3.png")}
        assert all(row["file"] in out for row in values["predictions"]) and "torn.png" not in out
        assert form == "json" or out.replace(" ", ",").startswith("file,") and out.count("\n") == 6
        assert all(0 < row["probability"] <= 1 and len(row["cluster"]) == 64 for row in values["predictions"])
    assert "not used: 3 files (2 hidden, 1 .jp2)" in err
    code, out, err = call(capsys, "predict", f"--workdir={workdir}", root / "b" / "torn.png", "--format=csv")
    assert (code, out) == (1, "file,label,probability,cluster,approximate\n") and "torn.png: " in err
    (root / "none").mkdir()
    assert "none: holds no images" in refused(capsys, "predict", f"--workdir={workdir}", root / "none")


def test_an_audit_that_finds_a_difference_exits_with_1(workdir, capsys):
    with open_run(workdir) as run:
        key, name = next(iter(run.catalog.manifest().entries.items()))
        folder = run.layout.slice(name)
    arrays, metadata, step = checkpoints.load(folder)
    checkpoints.save(folder, dict(arrays) | {"bias": arrays["bias"] + 1}, metadata, step)
    code, out, _ = call(capsys, "audit", f"--workdir={workdir}")
    assert code == 1 and key in out and "is damaged" in out
    checkpoints.save(folder, arrays, metadata, step)
    assert call(capsys, "audit", f"--workdir={workdir}", "--sample=1")[0] == 0


def test_misuse_of_commands_and_flags(capsys, tmp_path, workdir):
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    (tmp_path / "ids").write_bytes(b"\xff\xfe")
    at, new = f"--workdir={workdir}", f"--workdir={tmp_path}/new"
    for arguments, message in (
        (["trian"], "did you mean train?"),
        (["xyz"], "legal: demo, backbone"),
        (["train", "--workdri=x"], "workdri"),
        (["evaluate"], "--workdir=DIR is missing"),
        (["evaluate", at, "stray"], "unexpected argument 'stray'"),
        (["train", "--config.tuning.epochs=many", new], "--config"),
        (["train", "--config=configs/nothing.py", new], "no such file"),
        (["train", "--config", "none.py", new], "no such file"),
        (["train", "--config=configs/digits.py:huge", new], "smoke"),
        (["train", f"--config={tmp_path}/bad.py", new], "SyntaxError"),
        (["unlearn", at, "digit-0017"], "ids are given as --records="),
        (["unlearn", at], "--records=ID"),
        (["unlearn", at, "--records_file=none.txt"], "no such file"),
        (["unlearn", at, f"--records_file={tmp_path}/ids"], "not UTF-8"),
        (["predict", at, "--format=xml"], "table"),
        (["predict", at], "name image files"),
        (["predict", at, "none.png"], "no such file or folder"),
    ):
        assert message in refused(capsys, *arguments), arguments
    for config in (["--config=configs/digits.py"], []):
        message = refused(capsys, "train", *config, "--config.tuning.epoch=3", "--config.tunning.x=1", new)
        assert "unknown setting tuning.epoch; did you mean tuning.epochs?" in message
        assert "unknown setting tunning; did you mean tuning?" in message
    assert not (tmp_path / "new").exists()


def test_missing_and_foreign_workdirs(capsys, tmp_path):
    assert "does not exist" in refused(capsys, "evaluate", f"--workdir={tmp_path}/none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for command in ("train", "evaluate", "audit", "inspect"):
        assert "workdir" in refused(capsys, command, f"--workdir={tmp_path}/mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "train", f"--workdir={tmp_path}/file")
    assert "not UTF-8" in refused(capsys, "train", f"--workdir={tmp_path}/\udcff")


def test_a_config_that_differs_from_the_workdir_s(capsys, workdir):
    message = refused(capsys, "train", f"--workdir={workdir}", "--config.tuning.epochs=9", "--config.seed=5")
    assert "tuning.epochs: 2 -> 9" in message and "seed: 0 -> 5" in message
    assert call(capsys, "evaluate", f"--workdir={workdir}", "--config.inference.nearest=2", "--nolinear")[0] == 0


def test_settings_that_do_not_fit_each_other_or_the_data(capsys, tmp_path):
    for flag, message in (
        ("tuning.batch=0", "at least 1"),
        ("tuning.prompt_width=5", "at most half of --config.data.image_size=8"),
        ("tuning.optimizer=lion", "one of sgd, adam"),
        ("data.train_limit=1", "only one class is present"),
        ("clustering.sample_size=5000", "at most the number of private records"),
        ("clustering.cut=auto:31", "at most --config.clustering.sample_size=30"),
        ("backbone.weights=none.npz", "no such file"),
    ):
        assert message in refused(capsys, "train", *TINY, f"--config.{flag}", f"--workdir={tmp_path}/run"), flag
    assert call(capsys, "pretrain", *TINY, f"--workdir={tmp_path}/run")[0] == 0, "a corrected try is as good as new"
    message = refused(capsys, "train", *TINY, "--config.backbone.width=32", f"--workdir={tmp_path}/run")
    assert "backbone.width: 16 -> 32" in message, "what was made binds"
    assert call(capsys, "train", *TINY, "--config.tuning.epochs=1", f"--workdir={tmp_path}/run")[0] == 0


def test_extreme_cuts_work_with_a_warning(capsys, tmp_path):
    free = [
        f"--config.{name}" for name in ("clustering.max_members=0", "clustering.min_members=0", "data.train_limit=40")
    ]
    for cut, sample, message in (("1e9", 30, "gives one cluster"), ("0.0", 12, "for every sampled record (12)")):
        flags = [*free, f"--config.clustering.cut={cut}", f"--config.clustering.sample_size={sample}"]
        code, _, err = call(capsys, "train", *TINY, *flags, f"--workdir={tmp_path}/{cut}")
        assert code == 0 and message in err


def npz(path, **changes):
    """A small .npz of digits with some arrays replaced (None: left out)."""
    digits = load_digits()
    images = np.round(digits.images * 15.9).astype(np.uint8)
    arrays = {"class_names": np.array([str(i) for i in range(10)])}
    for split, rows in {"train": slice(80), "test": slice(80, 100), "public": slice(100, 140)}.items():
        arrays |= {f"{split}_images": images[rows], f"{split}_labels": digits.target[rows]}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return ["--config.data.source=npz", f"--config.data.path={path}"]


def test_bad_data_is_refused_and_leaves_the_workdir_usable(capsys, tmp_path):
    for changes, message in (
        ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)}, "no training record"),
        ({"train_labels": np.zeros(80, int), "test_labels": np.zeros(20, int)}, "only one class"),
        ({"train_labels": np.full(80, 10)}, "labels must lie in 0..9"),
        ({"train_images": np.zeros((80, 8, 8), np.float32)}, "must be uint8"),
        ({"train_images": np.zeros((80, 9, 9), np.uint8)}, "one shape"),
        ({"train_ids": np.array(["same"] * 80)}, "more than once: same"),
        ({"test_labels": None}, "test_labels"),
    ):
        bad = npz(tmp_path / "bad.npz", **changes)
        assert message in refused(capsys, "train", *TINY, *bad, f"--workdir={tmp_path}/run")
        assert not (tmp_path / "run" / "records").exists() and not (tmp_path / "run" / "backbone").exists()
    names = {"train_owners": np.arange(80).astype(str), "train_ids": np.array([f"img-{i}" for i in range(80)])}
    at = f"--workdir={tmp_path}/run"
    assert call(capsys, "train", *TINY, *npz(tmp_path / "bad.npz", **names), at)[0] == 0
    assert "erased 1 records" in call(capsys, "unlearn", at, "--owner=3")[1] and call(capsys, "audit", at)[0] == 0


def test_a_device_without_memory_is_a_message(capsys, monkeypatch, workdir):
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")
    monkeypatch.setattr("lmeraser_jax.cli.evaluate.run", mock.Mock(side_effect=error))
    message = refused(capsys, "evaluate", f"--workdir={workdir}")
    assert "allocating 9 bytes; lower --config.data.image_size" in message and "more" not in message


def test_a_check_that_cannot_look_accuses_nobody(capsys, monkeypatch, workdir):
    for name in ("audit", "verify", "attack", "doctor"):
        for error in (OSError(errno.EIO, "Input/output error", "x"), sqlite3.OperationalError("busy"), KeyError("bug")):
            with monkeypatch.context() as patch:
                patch.setattr(f"lmeraser_jax.cli.{name}.run", mock.Mock(side_effect=error))
                code, _, err = call(capsys, name, f"--workdir={workdir}")
            assert code == 3 and "not checked: " in err, (name, error, err)
            assert ("Traceback" in err) == isinstance(error, KeyError)


def test_a_full_disk_is_a_message(capsys, monkeypatch, workdir):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device", "slices"))
    name = call(capsys, "inspect", f"--workdir={workdir}", "--records")[1].split()[0]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        message = refused(capsys, "unlearn", f"--workdir={workdir}", f"--records={name}")
    assert "No space left on device (slices)" in message and "the old or the new state" in message
    code, _, err = call(capsys, "evaluate", f"--workdir={workdir}", "--nolinear")
    assert code == 0 and "an accepted erasure is not finished" in err
    assert call(capsys, "train", f"--workdir={workdir}")[0] == 0
    assert call(capsys, "audit", f"--workdir={workdir}", "--sample=1")[0] == 0


def test_a_second_writer_is_refused_and_readers_go_on(capsys, workdir):
    assert call(capsys, "unlearn", f"--workdir={workdir}", "--records=digit-0017", "--defer")[0] == 0
    with writer_lock(Layout(workdir)):
        for command in ("train", "process", "audit"):
            assert "is being written by process" in refused(capsys, command, f"--workdir={workdir}")
        assert call(capsys, "inspect", f"--workdir={workdir}")[0] == 0


def test_a_result_that_cannot_be_written_is_refused_before_the_work(capsys, workdir, tmp_path):
    records = call(capsys, "inspect", f"--workdir={workdir}", "--records")[1]
    name = records.split()[0]
    for target in (tmp_path, "/proc/nowhere/x.json"):
        flags = f"--workdir={workdir}", f"--records={name}", f"--json={target}"
        assert "cannot be written" in refused(capsys, "unlearn", *flags)
    assert call(capsys, "inspect", f"--workdir={workdir}", "--records")[1] == records


def test_damaged_files_are_messages(capsys, workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    at, config, images = f"--workdir={run}", run / "config.json", run / "records" / "images.u8"
    good = config.read_text()
    config.write_text("{")
    for command in ("train", "evaluate", "audit", "inspect"):
        assert "config.json is damaged" in refused(capsys, command, at)
    config.unlink()
    assert call(capsys, "train", *TINY, at)[0] == 0, "as the message says"
    assert json.loads(config.read_text()) == json.loads(good)
    whole = images.read_bytes()
    images.write_bytes(whole[:1000])
    for command, *flags in (["train"], ["audit"], ["unlearn", "--records=digit-0018", "--dry_run"]):
        assert "the workdir is damaged" in refused(capsys, command, at, *flags)
    message = refused(capsys, "unlearn", at, "--records=digit-0019")
    assert "the workdir is damaged" in message and "is accepted all the same" in message
    images.write_bytes(whole)
    assert call(capsys, "process", at)[0] == 0
    assert call(capsys, "audit", at, "--sample=1")[0] == 0
    (run / "catalog.db").unlink()
    for command in ("train", "inspect"):
        assert "catalog.db is missing: restore it" in refused(capsys, command, at)


def test_the_demo_in_small(capsys, tmp_path):
    code, out, _ = call(capsys, "demo", *TINY, f"--workdir={tmp_path}/demo", f"--json={tmp_path}/demo.json")
    values = json.loads((tmp_path / "demo.json").read_text())
    assert code == 0 and re.search(r"audit: bit-identical: (\d+) of \1 slices", out)
    names = [request["name"] for request in values["requests"]]
    assert values["ok"] and names == ["an unsampled record", "a sampled record", "an owner"]
    assert values["requests"][0]["outcome"]["retuned"] == 1
    with Image.open(values["picture"]) as picture:
        assert picture.width > 400 and len(picture.getcolors(1 << 24)) > 20
    assert "holds a run already" in refused(capsys, "demo", f"--workdir={tmp_path}/demo")
