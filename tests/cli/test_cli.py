"""The command line: the whole job in small, and every kind of bad input with its message and exit code 2."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import SMALL

from lmeraser_jax.cli.main import COMMANDS, main

pytest.importorskip("ml_collections", reason="the command line needs ml_collections")

TINY = ["--config=configs/digits.py:smoke"] + [
    f"--config.{group}.{name}={value}" for group, values in SMALL.items() for name, value in values.items()
]


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


def call(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The message of a command that must be refused."""
    code, _, err = call(capsys, *arguments)
    assert code == 2 and err.splitlines()[-1] != "" and "Traceback" not in err, (code, err)
    return err


def test_help_loads_neither_jax_nor_transformers():
    code = "import sys; from lmeraser_jax.cli.main import main; main(['--help']); main(['train', '--help']);"
    code += "assert not {'jax', 'flax', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(name in out for name in COMMANDS) and "--config.tuning.epochs=" in out


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        code, out, _ = call(capsys, name, "--help")
        assert code == 0 and out.startswith(f"lmeraser {name}:") and "--workdir" in out


def test_the_job_as_separate_commands(workdir, capsys, tmp_path):
    code, out, _ = call(capsys, "train", f"--workdir={workdir}")
    assert code == 0 and "nothing to do" in out and "expected share" in out
    code, out, _ = call(capsys, "evaluate", f"--workdir={workdir}", f"--json={tmp_path}/e.json")
    values = json.loads((tmp_path / "e.json").read_text())
    assert code == 0 and f"{values['accuracy']:.4f}" in out and 0 <= values["balanced"] <= 1 and values["linear"] > 0.2
    code, out, _ = call(capsys, "inspect", f"--workdir={workdir}", "--json=-")
    before = json.loads(out)
    assert code == 0 and before["records"]["train"] > 500
    sizes = [c["members"] for c in before["clusters"]]
    assert sum(sizes) == before["records"]["train"]
    assert before["expected_share"] == pytest.approx(sum(m * m for m in sizes) / sum(sizes) ** 2)
    assert before["sampled_share"] == pytest.approx(30 / sum(sizes))
    code, out, _ = call(capsys, "inspect", f"--workdir={workdir}", "--records")
    name = out.split()[0]
    code, out, _ = call(capsys, "unlearn", f"--workdir={workdir}", f"--records={name}", "--dry_run")
    assert code == 0 and re.search(r"images to process: [1-9]\d* \(", out)
    code, out, _ = call(capsys, "unlearn", f"--workdir={workdir}", f"--records={name}", "--dry_run", "--json=-")
    estimate, plan = json.loads(out), ["--rate=5", "--window=2", f"--devices={jax.device_count()}"]
    code, out, _ = call(capsys, "forecast", f"--workdir={workdir}", *plan, "--json=-")
    planned = json.loads(out)
    assert (planned["records"], planned["sampled"], planned["clusters"]) == (sum(sizes), 30, len(sizes))
    assert planned["images_full"] == estimate["images_full"] + 2, "one record more, seen in 2 epochs"
    assert planned["images_per_second"] == pytest.approx(estimate["images"] / estimate["seconds"])
    assert json.loads(call(capsys, "inspect", f"--workdir={workdir}", "--json=-")[1]) == before
    code, out, _ = call(capsys, "unlearn", f"--workdir={workdir}", f"--records={name}")
    assert code == 0 and "erased 1 records" in out
    (tmp_path / "ids.txt").write_text(f"{name}\n")
    code, out, _ = call(capsys, "unlearn", f"--workdir={workdir}", f"--records_file={tmp_path}/ids.txt")
    assert code == 0 and "were erased before: nothing to do" in out and "nothing to do: all" in out
    code, out, _ = call(capsys, "audit", f"--workdir={workdir}")
    assert code == 0 and re.match(r"bit-identical: (\d+) of \1 slices\n", out)
    code, out, _ = call(capsys, "audit", f"--workdir={workdir}", "--sample=2")
    assert code == 0 and out.startswith("bit-identical: 2 of 2 slices (a sample;")


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_predict_prints_label_probability_and_cluster(workdir, capsys, tmp_path, form):
    from PIL import Image
    from sklearn.datasets import load_digits

    for i, image in enumerate(load_digits().images[:3]):
        Image.fromarray(np.round(image * 15.9).astype(np.uint8)).resize((20 + i, 31)).save(tmp_path / f"{i}.png")
    code, out, _ = call(capsys, "predict", f"--workdir={workdir}", tmp_path, f"--format={form}")
    lines = out.strip().splitlines()
    assert code == 0
    if form == "json":
        rows = json.loads(out)
        assert [row["file"] for row in rows] == [str(tmp_path / f"{i}.png") for i in range(3)]
        assert all(0 < row["probability"] <= 1 and len(row["cluster"]) == 64 for row in rows)
    else:
        assert len(lines) == 4 and lines[0].replace(" ", ",").startswith("file,")


def test_an_audit_that_finds_a_difference_exits_with_1(workdir, capsys):
    from lmeraser_jax.storage import checkpoints
    from lmeraser_jax.unlearning.run import open_run

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
    assert "did you mean train?" in refused(capsys, "trian")
    assert "legal: demo, backbone" in refused(capsys, "xyz")
    assert "workdri" in refused(capsys, "train", "--workdri=x")
    assert "--workdir=DIR is missing" in refused(capsys, "evaluate")
    assert "unexpected argument 'stray'" in refused(capsys, "evaluate", f"--workdir={workdir}", "stray")
    for config in (["--config=configs/digits.py"], []):
        message = refused(capsys, "train", *config, "--config.tuning.epoch=3", "--config.tunning.x=1", "--workdir=x")
        assert "unknown setting tuning.epoch; did you mean tuning.epochs?" in message
        assert "unknown setting tunning; did you mean tuning?" in message
    assert "ids are given as --records=" in refused(capsys, "unlearn", f"--workdir={workdir}", "digit-0017")
    assert "--config" in refused(capsys, "train", "--config.tuning.epochs=many", "--workdir=x")
    assert "no such file" in refused(capsys, "train", "--config=configs/nothing.py", "--workdir=x")
    assert "smoke" in refused(capsys, "train", "--config=configs/digits.py:huge", f"--workdir={tmp_path}/x")
    assert "--records=ID" in refused(capsys, "unlearn", f"--workdir={workdir}")
    assert "no such file" in refused(capsys, "unlearn", f"--workdir={workdir}", "--records_file=none.txt")
    assert "table, csv, json" in refused(capsys, "predict", f"--workdir={workdir}", "--format=xml").replace("|", ", ")
    assert "name image files" in refused(capsys, "predict", f"--workdir={workdir}")
    assert "no such file or folder" in refused(capsys, "predict", f"--workdir={workdir}", "none.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert "bad.png" in refused(capsys, "predict", f"--workdir={workdir}", tmp_path / "bad.png")


def test_missing_and_foreign_workdirs(capsys, tmp_path):
    assert "does not exist" in refused(capsys, "evaluate", f"--workdir={tmp_path}/none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for command in ("train", "evaluate", "audit", "inspect"):
        assert "workdir" in refused(capsys, command, f"--workdir={tmp_path}/mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "train", f"--workdir={tmp_path}/file")


def test_a_config_that_differs_from_the_workdir_s(capsys, workdir):
    message = refused(capsys, "train", f"--workdir={workdir}", "--config.tuning.epochs=9", "--config.seed=5")
    assert "tuning.epochs: 2 -> 9" in message and "seed: 0 -> 5" in message
    assert call(capsys, "evaluate", f"--workdir={workdir}", "--config.inference.nearest=2", "--nolinear")[0] == 0


def test_unknown_records_are_all_listed_and_nothing_is_erased(capsys, workdir):
    before = call(capsys, "inspect", f"--workdir={workdir}", "--records")[1]
    good = before.split()[0]
    assert "a, b" in refused(capsys, "unlearn", f"--workdir={workdir}", f"--records={good},a,b")
    assert "--owner=nobody" in refused(capsys, "unlearn", f"--workdir={workdir}", "--owner=nobody")
    assert call(capsys, "inspect", f"--workdir={workdir}", "--records")[1] == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("tuning.batch=0", "at least 1"),
        ("tuning.lanes=0", "at least 1"),
        ("tuning.prompt_width=5", "at most half of --config.data.image_size=8"),
        ("clustering.sample_size=5000", "at most the number of private records"),
        ("clustering.cut=far", "a distance of 0 or more, or auto:K"),
        ("clustering.cut=auto:31", "at most clustering.sample_size=30"),
        ("backbone.heads=3", "a divisor of the width 16"),
        ("data.image_size=10", "multiple of the patch size"),
        ("data.source=npz", "--config.data.path"),
        ("data.train_limit=1", "only one class is present"),
        ("backbone.weights=none.npz", "no such file"),
        ("tuning.optimizer=lion", "one of sgd, adam"),
    ],
)
def test_bad_settings(capsys, tmp_path, flag, message):
    found = refused(capsys, "train", *TINY, f"--config.{flag}", f"--workdir={tmp_path}/run")
    assert message in found, found


def test_extreme_cuts_work_with_a_warning(capsys, tmp_path):
    free = ["--config.clustering.max_members=0", "--config.clustering.min_members=0", "--config.data.train_limit=40"]
    code, _, err = call(capsys, "train", *TINY, *free, "--config.clustering.cut=1e9", f"--workdir={tmp_path}/one")
    assert code == 0 and "gives one cluster" in err
    small = ["--config.clustering.cut=0.0", "--config.clustering.sample_size=12"]
    code, _, err = call(capsys, "train", *TINY, *free, *small, f"--workdir={tmp_path}/all")
    assert code == 0 and "a cluster for every sampled record (12)" in err


def npz(path, **changes):
    """A small .npz of digits with some arrays replaced (None: left out)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 15.9).astype(np.uint8)
    arrays = {
        "train_images": images[:80],
        "train_labels": digits.target[:80],
        "test_images": images[80:100],
        "test_labels": digits.target[80:100],
        "public_images": images[100:140],
        "public_labels": digits.target[100:140],
        "class_names": np.array([str(i) for i in range(10)]),
    }
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return ["--config.data.source=npz", f"--config.data.path={path}"]


def test_a_users_npz_works(capsys, tmp_path):
    owners = np.array([f"person-{i // 8}" for i in range(80)])
    data = npz(tmp_path / "mine.npz", train_owners=owners, train_ids=np.array([f"img-{i}" for i in range(80)]))
    assert call(capsys, "train", *TINY, *data, f"--workdir={tmp_path}/run")[0] == 0
    code, out, _ = call(capsys, "unlearn", f"--workdir={tmp_path}/run", "--owner=person-3")
    assert code == 0 and "erased 8 records" in out
    assert call(capsys, "audit", f"--workdir={tmp_path}/run")[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)}, "no training image"),
        ({"train_labels": np.zeros(80, int), "test_labels": np.zeros(20, int)}, "only one class"),
        ({"train_labels": np.full(80, 10)}, "labels must lie in 0..9"),
        ({"train_images": np.zeros((80, 8, 8), np.float32)}, "must be uint8"),
        ({"train_images": np.zeros((80, 8, 8, 4), np.uint8)}, "[N, H, W, 1 or 3]"),
        ({"train_images": np.zeros((80, 9, 9), np.uint8)}, "one shape"),
        ({"train_ids": np.array(["same"] * 80)}, "more than once: same"),
        ({"test_labels": None}, "test_labels"),
    ],
    ids=["empty", "one-class", "label", "dtype", "channels", "shape", "duplicate-ids", "missing-key"],
)
def test_bad_data_is_refused_and_leaves_the_workdir_usable(capsys, tmp_path, changes, message):
    bad = npz(tmp_path / "bad.npz", **changes)
    assert message in refused(capsys, "train", *TINY, *bad, f"--workdir={tmp_path}/run")
    assert not (tmp_path / "run" / "records").exists() and not (tmp_path / "run" / "backbone").exists()


def test_a_full_disk_is_a_message(capsys, tmp_path, monkeypatch, workdir):
    import errno

    from lmeraser_jax.storage import checkpoints

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "slices")

    name = call(capsys, "inspect", f"--workdir={workdir}", "--records")[1].split()[0]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        message = refused(capsys, "unlearn", f"--workdir={workdir}", f"--records={name}")
    assert "No space left on device (slices)" in message and "the old or the new state" in message
    code, _, err = call(capsys, "evaluate", f"--workdir={workdir}", "--nolinear")
    assert code == 0 and "an accepted erasure is not finished" in err
    assert call(capsys, "train", f"--workdir={workdir}")[0] == 0
    assert call(capsys, "audit", f"--workdir={workdir}", "--sample=1")[0] == 0


@pytest.mark.parametrize("command", ["train", "process", "audit"])
def test_a_second_writer_is_refused_and_readers_go_on(capsys, workdir, command):
    from lmeraser_jax.storage.workdir import Layout, writer_lock

    assert call(capsys, "unlearn", f"--workdir={workdir}", "--records=digit-0017", "--defer")[0] == 0
    with writer_lock(Layout(workdir)):
        assert "is being written by process" in refused(capsys, command, f"--workdir={workdir}")
        assert call(capsys, "inspect", f"--workdir={workdir}")[0] == 0


def test_results_go_where_they_can(capsys, workdir, tmp_path):
    """A file that cannot be written is refused before the work, not after it."""
    records = call(capsys, "inspect", f"--workdir={workdir}", "--records")[1]
    name = records.split()[0]
    for target in (tmp_path, "/proc/nowhere/x.json"):
        message = refused(capsys, "unlearn", f"--workdir={workdir}", f"--records={name}", f"--json={target}")
        assert "cannot be written" in message
    assert call(capsys, "inspect", f"--workdir={workdir}", "--records")[1] == records


def test_damaged_files_are_messages(capsys, workdir, tmp_path):
    import shutil

    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "ids").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(capsys, "unlearn", f"--workdir={tmp_path}/run", f"--records_file={tmp_path}/ids")
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    assert "SyntaxError" in refused(capsys, "train", f"--config={tmp_path}/bad.py", f"--workdir={tmp_path}/new")
    assert "no such file" in refused(capsys, "train", "--config", "none.py", f"--workdir={tmp_path}/new")
    good = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text("{")
    for command in ("train", "evaluate", "audit", "inspect"):
        assert "config.json is damaged" in refused(capsys, command, f"--workdir={tmp_path}/run")
    (tmp_path / "run" / "config.json").unlink()
    assert call(capsys, "train", *TINY, f"--workdir={tmp_path}/run")[0] == 0, "as the message says"
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(good)
    images = tmp_path / "run" / "records" / "images.u8"
    whole = images.read_bytes()
    images.write_bytes(whole[:1000])
    for command, *flags in (["train"], ["audit"], ["unlearn", "--records=digit-0018", "--dry_run"]):
        assert "the workdir is damaged" in refused(capsys, command, f"--workdir={tmp_path}/run", *flags)
    message = refused(capsys, "unlearn", f"--workdir={tmp_path}/run", "--records=digit-0019")
    assert "the workdir is damaged" in message and "is accepted all the same" in message
    images.write_bytes(whole)
    assert call(capsys, "process", f"--workdir={tmp_path}/run")[0] == 0
    assert call(capsys, "audit", f"--workdir={tmp_path}/run", "--sample=1")[0] == 0
    (tmp_path / "run" / "catalog.db").write_bytes(b"x" * 4096)
    assert "not a readable catalog" in refused(capsys, "inspect", f"--workdir={tmp_path}/run")
    (tmp_path / "run" / "catalog.db").unlink()
    for command in ("train", "inspect"):
        assert "catalog.db is missing: restore it" in refused(capsys, command, f"--workdir={tmp_path}/run")


def test_a_corrected_first_try_is_as_good_as_new(capsys, tmp_path):
    """What failed before something was made does not bind the next try; what was made does."""
    assert refused(capsys, "train", *TINY, "--config.clustering.sample_size=5000", f"--workdir={tmp_path}/run")
    assert call(capsys, "train", *TINY, f"--workdir={tmp_path}/run")[0] == 0
    assert call(capsys, "pretrain", *TINY, f"--workdir={tmp_path}/two")[0] == 0
    message = refused(capsys, "train", *TINY, "--config.backbone.width=32", f"--workdir={tmp_path}/two")
    assert "backbone.width: 16 -> 32" in message
    assert call(capsys, "train", *TINY, "--config.tuning.epochs=1", f"--workdir={tmp_path}/two")[0] == 0


def test_the_demo_in_small(capsys, tmp_path):
    code, out, _ = call(capsys, "demo", *TINY, f"--workdir={tmp_path}/demo", f"--json={tmp_path}/demo.json")
    values = json.loads((tmp_path / "demo.json").read_text())
    assert code == 0 and re.search(r"audit: bit-identical: (\d+) of \1 slices", out)
    assert values["ok"] and [r["name"] for r in values["requests"]] == [
        "an unsampled record",
        "a sampled record",
        "an owner",
    ]
    assert values["requests"][0]["outcome"]["retuned"] == 1
    from PIL import Image

    with Image.open(values["picture"]) as picture:
        assert picture.width > 400 and len(picture.getcolors(1 << 24)) > 20
    assert "holds a run already" in refused(capsys, "demo", f"--workdir={tmp_path}/demo")
