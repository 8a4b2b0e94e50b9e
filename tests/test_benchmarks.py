"""Benchmarks that measure no time: how full the schedule is, the formulas, and the model of large runs."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def output(monkeypatch, tmp_path, name, *flags):
    """The JSON that a benchmark writes."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, *flags, f"--json={tmp_path / 'result.json'}"])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return json.loads((tmp_path / "result.json").read_text())


def test_schedules_are_full_and_quickly_made(monkeypatch, tmp_path):
    result = output(monkeypatch, tmp_path, "bench_schedule.py", "--quick")
    for name in ("cifar10", "cifar100", "svhn", "gtsrb"):
        assert result["efficiency"][name] > 0.95 and result["efficiency"][f"{name}, 8 devices"] > 0.95
        assert result["efficiency"][name] <= result["bound"][name] + 1e-4
    assert max(result["seconds"].values()) < 10 and len(result["seconds"]) == 2
    assert result["efficiency"]["1000000 records, 8 devices"] > 0.95


def test_the_model_of_large_runs_fits_the_measured_points(monkeypatch, tmp_path):
    result = output(monkeypatch, tmp_path, "plan_scale.py", "--check")
    ratios = {name: point["ratio"] for name, point in result.items() if isinstance(point, dict) and "ratio" in point}
    assert len(ratios) > 8 and all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios


def test_the_terms_that_the_paper_leaves_out(monkeypatch, tmp_path):
    """Each of them adds to the cost, and with all of them the formula says what was measured on photographs."""
    result = output(monkeypatch, tmp_path, "bench_theory.py")["paper"]
    kept = json.loads((FOLDER / "results" / "theory_cpu.json").read_text())
    assert result == kept["paper"] and len(result) == 4 and len(kept["real"]) == 15
    for one in [*result.values(), *kept["real"].values()]:
        assert one["paper"] < one["size_biased"] < one["with_reclustering"]
        assert one["window_paper"] < one["window_unsampled"] < one["window_with_reclustering"]
    gaps = []
    for one in kept["real"].values():  # c is of one half of the drops, what is measured of the other
        error = math.hypot(one["with_reclustering_error"], one["measured_error"], 1e-5)  # of rounding
        gaps.append((one["with_reclustering"] - one["measured"]) / error)
        assert error < 0.05 * one["measured"], "known well enough to say anything"
    assert max(map(abs, gaps)) < 3 and 0.5 < np.sqrt(np.mean(np.square(gaps))) < 1.5, gaps


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    """Also loads every benchmark, so that names it imports must exist."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    names = sorted(path.name for path in FOLDER.glob("*.py") if "new_parser(__doc__" in path.read_text())
    assert len(names) > 9
    for name in names:
        needed = ["--workdir=x"] if name == "bench_requests.py" else []
        monkeypatch.setattr(sys, "argv", [name, *needed, f"--json={tmp_path / 'none' / 'result.json'}"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        assert "result.json cannot be written: No such file" in capsys.readouterr().err, name


def test_sizes_that_cannot_be_are_refused(monkeypatch, tmp_path, capsys):
    for flag in ("--records=0", "--clusters=-1", "--read=nan", "--devices=0"):
        with pytest.raises(SystemExit):
            output(monkeypatch, tmp_path, "plan_scale.py", flag)
        assert flag.split("=")[0] in capsys.readouterr().err


def test_larger_runs_cost_more(monkeypatch, tmp_path):
    def plan(*flags):
        return output(monkeypatch, tmp_path, "plan_scale.py", "--clusters=1e5", *flags)

    for records in (1e6, 1e9):
        small, large = plan(f"--records={records}"), plan(f"--records={records * 10}")
        more = plan(f"--records={records}", "--hosts=4")
        assert large["train"]["tuning_h"] == pytest.approx(10 * small["train"]["tuning_h"], rel=0.01)
        assert large["memory"]["disk_gb"] > small["memory"]["disk_gb"]
        assert more["train"]["tuning_h"] == pytest.approx(small["train"]["tuning_h"] / 4, rel=0.01)
