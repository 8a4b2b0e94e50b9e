"""A workdir of texts through the commands: train, add, unlearn, rollback, inspect, doctor, verify, audit."""

import json

import pytest
from commands import call, refused
from text_problem import experiment, line, text_config, text_folder

import lmeraser_jax as lm


def spoken(capsys, *arguments):
    """As `call`; no word of it is of images."""
    code, shown, err = call(capsys, *arguments)
    assert "image" not in f"{shown}{err}".replace("images.u8", "").lower()
    return code, shown, err


@pytest.mark.slow
def test_the_commands_serve_texts_as_they_serve_images(tmp_path, capsys):
    folder, workdir = text_folder(tmp_path / "text"), tmp_path / "run"
    config = text_config(folder, checkpoints__every_epochs=1)
    (tmp_path / "file.py").write_text(experiment(config))
    at = f"--workdir={workdir}"
    code, shown, _ = spoken(capsys, "train", f"--config={tmp_path / 'file.py'}", at)
    assert code == 0 and "imported 48 records" in shown and "classes" not in shown
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps(line(3) | {"id": "late", "query": "w2 w9"}))
    code, shown, _ = spoken(capsys, "add", at, f"--source={more}")
    assert code == 0 and "imported 1 records" in shown
    assert "must be a file of JSON lines that exists" in refused(capsys, "add", at, f"--source={tmp_path}/x.npz")
    assert "the workdir holds text" in refused(capsys, "unlearn", at, f"--like={more}")
    code, shown, _ = spoken(capsys, "unlearn", at, "--records=late", "--owner=person-2")
    assert code == 0 and "erased 7 records" in shown
    (tmp_path / "edits.jsonl").write_text(json.dumps({"id": "text-00", "response": "w9 w9"}))
    for flags in (["--dry_run"], []):
        code, _, err = spoken(capsys, "rectify", at, f"--edits={tmp_path / 'edits.jsonl'}", *flags)
        assert code == 0 and err.count("devices: ") == 1
    table = spoken(capsys, "requests", at)[1].splitlines()
    assert [row.split()[1:3] for row in table] == [["kind", "state"], ["erase", "purged"], ["rectify", "purged"]]
    assert spoken(capsys, "verify", at, "--all")[0] == spoken(capsys, "doctor", at)[0] == 0
    code, shown, _ = spoken(capsys, "inspect", at, "--records")
    assert code == 0 and "text-00\t\tperson-0\t" in shown and "late" not in shown and "person-2" not in shown
    key = spoken(capsys, "inspect", at)[1].split("cluster")[1].split("\n")[1].split()[0]
    code, shown, _ = spoken(capsys, "rollback", at, f"--cluster={key}", "--list")
    assert code == 0 and "@" in shown
    assert lm.audit(workdir).ok
    assert "--config.text.context=99: must be at most 32" in refused(
        capsys, "train", f"--config={tmp_path / 'file.py'}", "--config.text.context=99", f"--workdir={tmp_path / 'new'}"
    )
