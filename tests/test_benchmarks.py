"""Benchmarks that need no measuring: the schedule keeps its promise, the model of large runs fits what was measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def output(monkeypatch, tmp_path, name, *flags):
    """The JSON that a benchmark writes."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, *flags, f"--json={tmp_path / 'found.json'}"])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return json.loads((tmp_path / "found.json").read_text())


def test_schedules_are_full_and_made_in_no_time(monkeypatch, tmp_path):
    found = output(monkeypatch, tmp_path, "bench_schedule.py")
    for name in ("cifar10", "cifar100", "svhn", "gtsrb"):
        assert found["efficiency"][name] > 0.95 and found["efficiency"][f"{name}, 8 devices"] > 0.95
        assert found["efficiency"][name] <= found["bound"][name] + 1e-4
    assert found["seconds"]["10000000 records"] < 10 and len(found["seconds"]) == 3
    assert found["efficiency"]["10000000 records, 8 devices"] > 0.95


def test_the_model_of_large_runs_fits_what_was_measured(monkeypatch, tmp_path):
    found = output(monkeypatch, tmp_path, "plan_scale.py", "--check")
    wrong = {name: one for name, one in found.items() if isinstance(one, dict) and not 0.4 < one.get("ratio", 1) < 2.5}
    assert not wrong and len(found) > 8


def test_the_terms_that_the_paper_leaves_out(monkeypatch, tmp_path):
    """Each of them adds to the cost, and with all of them the formula says what was measured on photographs."""
    found = output(monkeypatch, tmp_path, "bench_theory.py")["paper"]
    kept = json.loads((FOLDER / "results" / "theory_cpu.json").read_text())
    assert found == kept["paper"] and len(found) == 4 and len(kept["real"]) == 15
    for one in [*found.values(), *kept["real"].values()]:
        assert one["paper"] < one["size_biased"] < one["with_reclustering"]
        assert one["window_paper"] < one["window_unsampled"] < one["window_with_reclustering"]
    for one in kept["real"].values():
        assert one["with_reclustering"] == pytest.approx(one["measured"], rel=0.02)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in FOLDER.glob("*.py") if "add_json(parser)" in path.read_text())
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(monkeypatch, tmp_path, capsys, name):
    needed = ["--workdir=x"] if name == "bench_requests.py" else []
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, *needed, f"--json={tmp_path / 'none' / 'found.json'}"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert "found.json cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--records=0", "--clusters=-1", "--read=nan", "--devices=0"])
def test_sizes_that_cannot_be_are_refused(monkeypatch, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        output(monkeypatch, tmp_path, "plan_scale.py", flag)
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("records", ["1e6", "1e9"])
def test_larger_runs_cost_more(monkeypatch, tmp_path, records):
    small = output(monkeypatch, tmp_path, "plan_scale.py", f"--records={records}", "--clusters=1e5")
    large = output(monkeypatch, tmp_path, "plan_scale.py", f"--records={float(records) * 10}", "--clusters=1e5")
    more = output(monkeypatch, tmp_path, "plan_scale.py", f"--records={records}", "--clusters=1e5", "--hosts=4")
    assert large["train"]["tuning_h"] == pytest.approx(10 * small["train"]["tuning_h"], rel=0.01)
    assert large["memory"]["disk_gb"] > small["memory"]["disk_gb"]
    assert more["train"]["tuning_h"] == pytest.approx(small["train"]["tuning_h"] / 4, rel=0.01)
