"""The choice of a method: the best within the budget by the hold-out, a config that is ready, test images untouched."""

import json
import types

import numpy as np
import pytest
from commands import TINY, call, refused
from helpers import changed, small_config

import lmeraser_jax as lm
from lmeraser_jax import interrupt
from lmeraser_jax.cli import compare
from lmeraser_jax.cli.main import main
from lmeraser_jax.data import digits
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation import accuracy
from lmeraser_jax.experiments import candidates, choosing, measure, runner
from lmeraser_jax.experiments.comparison import Comparison, Options
from lmeraser_jax.experiments.results import Measurement

pytestmark = pytest.mark.usefixtures("fast_files")
FLAGS = [flag for flag in TINY if "sample_size" not in flag]
FLAGS += ["--config.data.train_limit=110", "--config.data.test_limit=20", "--config.data.holdout=0.4"]
FLAGS += ["--config.clustering.sample_size=20", "--requests=0"]
TRIED = "--candidates=logistic,lmeraser-10,shards-4"


def choose(folder, *flags):
    """What the command writes as JSON."""
    target = folder.with_suffix(".json")
    assert main(["choose", *FLAGS, TRIED, "--budget=25%", f"--workdir={folder}", f"--json={target}", *flags]) == 0
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory, fast_files):
    """A finished choice: (folder, its JSON)."""
    folder = tmp_path_factory.mktemp("choose") / "c"
    return folder, choose(folder)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(compare, "drawn", lambda *_: ([], []))


def without_times(values):
    measured = [name for name in values["candidates"][0] if not name.startswith(("seconds", "source"))]
    return [[row[name] for name in measured] for row in values["candidates"]]


def test_the_best_within_the_budget_is_chosen_by_the_rows_of_the_hold_out(done, undrawn, monkeypatch):
    """Another budget repeats no measurement; a budget of nearly nothing leaves the head in closed form."""
    folder, first = done
    assert (folder / "figures" / "tradeoff.png").is_file()
    rows = {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    shares = {name: row["images_request"] / max(row["images_full"], 1) for name, row in rows.items()}
    costs = {name: max(row["share_request"], shares[name]) for name, row in rows.items()}
    assert costs["logistic"] == 0 < costs["lmeraser-10"] and costs["shards-4"] == pytest.approx(0.25, abs=0.05)
    monkeypatch.setattr(runner, "run_task", None)  # any task would fail
    for budget in ("0.1%", "0.2", "30%", "1"):
        values = choose(folder, f"--budget={budget}")
        within = [name for name, cost in costs.items() if cost <= choosing.SLACK * candidates.parse_budget(budget)]
        best = max(within, key=lambda name: (rows[name]["accuracy"], -costs[name]))
        assert values["chosen"] == best and without_times(values) == without_times(first), budget
    assert {row["method"]: row["cost"] for row in first["candidates"]} == costs


def test_the_chosen_config_trains_what_was_measured(done, undrawn, tmp_path):
    """With its weight of the common head, and the hold-out kept out as in the given config."""
    folder, _ = done
    values = choose(folder, "--candidates=shards-4", "--budget=100%")
    assert "lmeraser train --config=chosen.py" in (folder / "chosen.py").read_text()
    assert main(["train", f"--config={folder / 'chosen.py'}", f"--workdir={tmp_path / 'run'}"]) == 0
    tree, chosen = json.loads((tmp_path / "run" / "config.json").read_text()), values["candidates"][0]
    assert tree["data"]["holdout"] == 0.4 and tree["clustering"]["shards"] == 4 and tree["common"]["method"] == "linear"
    assert tree["inference"]["common_weight"] == chosen["common_weight"]
    measured = lm.evaluate(tmp_path / "run", split="holdout")
    assert (measured.accuracy, measured.images) == (chosen["accuracy"], chosen["tested"])
    assert measured.balanced_error == pytest.approx(chosen["balanced_reach"] / choosing.NORMAL)


def test_a_killed_choice_goes_on_and_no_test_image_matters(done, undrawn, tmp_path, monkeypatch):
    source, real = digits.load(), measure.EXPERIMENTS["methods"]
    test = {item.id for item in source.items if item.split == "test"}
    monkeypatch.setattr(digits, "load", lambda: changed(source, test, lambda label: (label + 1) % 10))

    def killed(run, task, options):
        rows = list(real(run, task, options))
        if task.method.name != "logistic":
            raise interrupt.Stopped
        yield from rows

    with monkeypatch.context() as patch:
        patch.setitem(measure.EXPERIMENTS, "methods", killed)
        assert main(["choose", *FLAGS, TRIED, "--budget=25%", f"--workdir={tmp_path / 'c'}"]) == 0  # stopped
    assert not (tmp_path / "c" / "chosen.py").exists()
    assert without_times(choose(tmp_path / "c")) == without_times(done[1])


def test_of_equally_good_weights_the_largest_is_taken(monkeypatch):
    """On a hold-out of classes 0, 0, 0, 1: the balanced accuracy may want another weight than the accuracy."""
    labels = np.array([0, 0, 0, 1])
    answers = {0.0: [0, 0, 0, 0], 0.1: [0, 0, 0, 0], 0.2: [0, 1, 1, 1], 0.3: [1, 1, 1, 1]}
    by_weight = [(weight, types.SimpleNamespace(labels=np.array(given))) for weight, given in answers.items()]
    monkeypatch.setattr(accuracy, "answers_by_weight", lambda *_: iter(by_weight))
    run = types.SimpleNamespace(
        catalog=types.SimpleNamespace(live=lambda split: types.SimpleNamespace(labels=labels, rows=[0])), images=labels
    )
    assert accuracy.best_weight(run, "holdout", "accuracy")[0] == 0.1
    assert accuracy.best_weight(run, "holdout", "balanced")[0] == 0.2


def row(method, accuracy, share):
    """A row of 1,000 images, whose accuracy is within 2.7 points."""
    values = {"experiment": "methods", "dataset": "", "backbone": "", "seed": 0, "records": 100, "clusters": 5}
    values |= {"balanced": accuracy, "images_full": 100, "images_request": 50 * share, "tested": 1000}
    return Measurement(method=method, accuracy=accuracy, share_request=share, **values)


def test_the_verdict_names_a_simple_head_that_is_as_good(tmp_path):
    simple, near, far = row("head", 0.75, 0), row("near", 0.76, 0.2), row("far", 0.85, 0.2)
    titles = {method: method for method in ("head", "near", "far", "worse")}
    for rows, words in (
        ((near, simple), "near, 1.0 ± 3.8 points above head: within the noise that is as good"),
        ((far, near, simple), "far, 10.0 ± 3.5 points above head, whose erasures pass no image"),
        ((simple, row("worse", 0.7, 0.1)), "The simplest wins: head."),
        ((far,), "No candidate does without passing images"),
    ):
        choice = choosing.Choice(0.2, "accuracy", rows, rows[0], titles, tmp_path)
        assert words in choice.verdict and choice.table().endswith(choice.verdict)
        assert choice.front == {r.method for r in rows if r is rows[0] or r is simple}
    assert choosing.best_within(0.197, [far, simple], titles) is far, "a hash deals shards of nearly equal size"
    with pytest.raises(UserError, match="--budget=10%: no candidate is within it; the cheapest, far, passes 20 %"):
        choosing.best_within(0.1, [far], titles)


def test_the_default_candidates_fit_the_budget_and_the_records(tmp_path):
    for budget, names in (
        (0.03, ("lmeraser-80", "shards-34", "lora-shards-34")),
        (0.25, ("lmeraser-10", "shards-4", "lora-shards-4")),
    ):
        assert tuple(method.name for method in candidates.candidates(budget)[-3:]) == names
    for records, count in ((1000, 7), (100, 6), (10, 4)):
        tried = Comparison(tmp_path, small_config(), candidates.candidates(0.1), (0,), ("methods",), Options("", ""))
        assert len(choosing._with_enough_records(tried, records).methods) == count


def test_bad_input_is_said_in_a_line(done, undrawn, capsys, tmp_path):
    at = f"--workdir={tmp_path / 'c'}"
    for flags, message in (
        ([], "--budget is missing: a share above 0 %, at most 100 %, such as 3% or 0.03"),
        *(([f"--budget={text}"], f"--budget={text}: must be a share") for text in ("0", "101%", "3", "nan", "much")),
        (
            ["--budget=3%", "--candidates=best"],
            "--candidates=best: no such method; legal: lmeraser-N, shards-N, lora-shards-N, ",
        ),
        (["--budget=3%", "--candidates=shards-0"], "--candidates=shards-0: no such method"),
        (["--budget=3%", "--config.data.holdout=0"], "there is no hold-out: --config.data.holdout=0 must be above 0"),
        (["--budget=3%", f"--workdir={tmp_path}"], "holds other files and no comparison"),
        (["--budget=3%", f"--workdir={done[0]}", "--by=balanced"], "--by: 'accuracy' -> 'balanced'"),
    ):
        (tmp_path / "file").touch()
        assert message in refused(capsys, "choose", *FLAGS, at, *flags), flags
    assert not (tmp_path / "c").exists()
    few = ["--config.data.holdout=0.05", "--by=balanced", "--budget=3%"]
    text = refused(capsys, "choose", *FLAGS, at, *few)
    assert "--by=balanced: the hold-out has no image of 1, 4" in text and "raise --config.data.holdout" in text
    code, _, err = call(capsys, "choose", *FLAGS, at, "--budget=0.5%", "--config.data.holdout=0.05")
    assert code == 0 and "the balanced accuracy is of the other classes" in err
    assert "too few for 200 shards" in err and "of 4 candidates to do, in about 40 s. This is an estimate" in err
