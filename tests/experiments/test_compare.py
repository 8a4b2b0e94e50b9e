"""Comparisons: rows that agree with what they measure, work that is resumed and never repeated, bad input refused."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

from lmeraser_jax import interrupt
from lmeraser_jax.cli.main import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.experiments import measure, methods, results, runner, sequences
from lmeraser_jax.experiments.comparison import Comparison, Options, check
from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.erase import request_erasure
from lmeraser_jax.unlearning.plan import current_plan
from lmeraser_jax.unlearning.run import prepare_run

CONFIG = small_config(
    data__train_limit=80,
    data__test_limit=30,
    clustering__shards=3,
    clustering__sample_size=20,
    clustering__min_members=1,
)
SHORT = Options("digits", "small", probes=6, requests=1, cuts=("auto:2", "auto:10"), sequences=("burst",), length=2)


def comparison(folder, names=("ridge",), experiments=("methods",), seeds=1, config=CONFIG, **options):
    options = dataclasses.replace(SHORT, **options)
    return Comparison(folder, config, methods.load(names), tuple(range(seeds)), tuple(experiments), options)


@pytest.fixture(scope="module", autouse=True)
def _bases(tmp_path_factory):
    """Workdirs with images and features are made once for each config and copied."""
    made, real = {}, runner._make_base

    def make_base(folder, config):
        if config not in made:
            made[config] = tmp_path_factory.mktemp("base") / "base"
            real(made[config], config)
        if not folder.exists():
            measure._copy(made[config], folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_make_base", make_base)
        yield


def rows_of(outcome, experiment, method):
    return [row for row in outcome.rows if (row.experiment, row.method) == (experiment, method)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: (comparison, results), to which more experiments came with a second command."""
    first = comparison(tmp_path_factory.mktemp("compare") / "c", ("lmeraser", "linear-head", "ridge"))
    runner.compare(first, "the command")
    second = comparison(first.folder, ("ridge",), ("removal", "sequence"))
    return first, runner.compare(second, "another command")


@pytest.fixture
def base(done, tmp_path):
    """A workdir with images and a backbone for one test to change, and the config of ridge."""
    folder = tmp_path / "run"
    measure._copy(done[0].base(0), folder)
    return folder, methods.METHODS["ridge"].configure(CONFIG)


def test_every_task_gives_its_rows(done):
    first, outcome = done
    assert results.load(first.folder / "results.json") == outcome
    for row in outcome.rows:
        command = "the command" if row.experiment == "methods" else "another command"
        assert outcome.sources[row.source]["command"] == command
    assert len({row.point for row in outcome.rows}) == len(outcome.rows) == 3 + 6 + 3
    lines = (first.folder / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(outcome.rows) and lines[0].startswith("experiment,dataset,backbone,method,seed")
    assert {path.name for path in first.folder.iterdir() if path.is_dir()} == {"base_0", "rows"}
    assert [row.records for row in rows_of(outcome, "removal", "ridge")] == [
        80 - round(share * 80) for share in (0, *measure.REMOVED_SHARES)
    ]
    burst = [(row.x, row.records) for row in rows_of(outcome, "sequence", "ridge")]
    assert burst == [(x, 80 - x * sequences.BATCH) for x in range(3)]


def test_costs_are_those_of_real_erasures(done, tmp_path):
    """Planned costs against a plan for every record, and against one erasure that is served."""
    first, outcome = done
    (row,) = rows_of(outcome, "methods", "lmeraser")
    measure._copy(first.base(0), tmp_path / "run")
    with prepare_run(tmp_path / "run", first.methods[0].configure(CONFIG)) as (run, _):
        report = build(run)
        assert (row.images_full, row.clusters) == (report.images, len(run.catalog.manifest().clusters))
        ids = run.catalog.live("train").ids
        chosen = [ids[i] for i in philox(0, "probe").choice(len(ids), SHORT.probes, replace=False)]
        images = [current_plan(run, {name}).images_missing for name in chosen]
        assert row.images_request == np.mean(images) and row.images_worst == max(images)
        assert request_erasure(run, chosen[:1]).outcome.images == images[0]
    assert row.seconds_full > 0 < row.seconds_unsampled and row.seconds_sampled > 0 < row.sampled_share < 1
    share = row.sampled_share
    assert row.seconds_request == (1 - share) * row.seconds_unsampled + share * row.seconds_sampled
    assert row.passes == 2 and row.tested == 30
    for name in ("ridge", "linear-head"):
        (closed,) = rows_of(outcome, "methods", name)
        assert (closed.images_request, closed.images_full, closed.clusters, closed.records_request) == (0, 0, 1, 79)


@pytest.mark.slow
@pytest.mark.parametrize("requests", [0, 3])
def test_a_request_that_tunes_everything_again_is_served_once_at_most(tmp_path, requests, monkeypatch):
    served, real = [], measure.erase.request_erasure
    monkeypatch.setattr(measure.erase, "request_erasure", lambda *args: served.append(args) or real(*args))
    (row,) = runner.compare(comparison(tmp_path / "c", ("single",), requests=requests), "x").rows
    assert row.seconds_full > 0 and len(served) == min(requests, 1)
    assert row.seconds_request == row.seconds_unsampled and (row.seconds_request > 0) == (requests > 0)


def test_seconds_of_an_interrupted_attempt_count(base):
    """Its slices were there before the attempt that was logged began."""
    with prepare_run(*base) as (run, _):
        build(run)
        earlier = sum(row.seconds for row in run.catalog.slices().values()) / run.mesh.size
        line = json.loads(run.layout.metrics.read_text().splitlines()[-1])
        assert measure.full_tuning_seconds(run) == line["seconds"]
        run.layout.metrics.write_text(json.dumps(line | {"seconds": 0.001}) + "\n")
        assert measure.full_tuning_seconds(run) == pytest.approx(earlier + 0.001)


def test_seeds_share_images_where_nothing_depends_on_the_seed(tmp_path):
    """A hold-out is drawn with the seed; published weights are not."""
    same = small_config(backbone__weights="x.npz", backbone__name="vit-ti")
    split = dataclasses.replace(same, data=dataclasses.replace(same.data, holdout=0.2))
    shared = [comparison(tmp_path, config=config) for config in (CONFIG, same, split)]
    assert [tried.base(0) == tried.base(1) for tried in shared] == [False, True, False]


@pytest.mark.slow
def test_experiments_of_lmeraser_give_their_rows(tmp_path):
    outcome = runner.compare(comparison(tmp_path / "c", ("lmeraser",), ("cut", "epochs", "sequence")), "x")
    few, many = sorted(rows_of(outcome, "cut", "lmeraser"), key=lambda row: row.x)
    assert (few.x, many.x) == (2, 10) and few.clusters < many.clusters
    assert [row.x for row in rows_of(outcome, "epochs", "lmeraser")] == list(range(1, CONFIG.tuning.epochs + 1))
    spent = [row.spent for row in rows_of(outcome, "sequence", "lmeraser")]
    assert spent[0] == 0 < spent[1] < spent[2]


def test_epochs_are_shares_of_a_cluster_s_own_steps():
    """A small cluster makes more steps than its epochs say: half of the way is half of these."""
    snapshots = {"whole": (2, 4), "long": range(1, 13), "one": ()}
    run = types.SimpleNamespace(catalog=types.SimpleNamespace(epochs=snapshots.get))
    steps = {"whole": 6, "long": 13, "one": 1}
    for name, expected in {"whole": ("@2", "@4"), "long": ("@4", "@9"), "one": ("", "")}.items():
        row = types.SimpleNamespace(digest=name, steps=steps[name])
        nearest = [measure.nearest_snapshot(run, row, share) for share in (1 / 3, 2 / 3)]
        assert nearest == [name + step for step in expected]


def test_nothing_is_done_twice_and_a_method_joins(done, monkeypatch):
    first, outcome = done
    monkeypatch.setattr(runner, "run_task", None)  # any task would fail
    assert runner.compare(first, "again").rows == outcome.rows
    with pytest.raises(TypeError):
        runner.compare(comparison(first.folder, ("ridge", "ncm")), "more")


def test_an_interrupted_comparison_carries_on(tmp_path, monkeypatch):
    tried = comparison(tmp_path / "c", ("ridge", "ncm"))
    real, finished = measure.EXPERIMENTS["methods"], []

    def killed(run, task, options):
        row = next(real(run, task, options))  # it has served its erasures by now
        if finished:
            raise interrupt.Stopped
        finished.append(task.name)
        yield row

    monkeypatch.setitem(measure.EXPERIMENTS, "methods", killed)
    with pytest.raises(interrupt.Stopped):
        runner.compare(tried, "x")
    assert [path.stem for path in (tried.folder / "rows").iterdir()] == finished == ["methods_ridge_0"]
    assert (tried.folder / "methods_ncm_0").is_dir()
    monkeypatch.setitem(measure.EXPERIMENTS, "methods", real)
    resumed = runner.compare(tried, "x")
    fresh = runner.compare(comparison(tmp_path / "d", ("ridge", "ncm")), "x")
    assert [row.without_times() for row in resumed.rows] == [row.without_times() for row in fresh.rows]


def test_slices_that_methods_share_are_tuned_once(tmp_path, monkeypatch):
    """The nearest cluster, the five nearest, and a ridge head beside them share their slices."""
    images, real = {}, measure.build

    def counted(run):
        report = real(run)
        images[run.layout.root.name] = report.images
        return report

    monkeypatch.setattr(measure, "build", counted)
    names = ("lmeraser", "lmeraser-top5", "lmeraser-ridge")
    outcome = runner.compare(comparison(tmp_path / "c", names), "x")
    assert [images[f"methods_{name}_0"] > 0 for name in names] == [True, False, False]
    assert not list((tmp_path / "c").glob("*tuned*"))
    (plain,), (beside,) = (rows_of(outcome, "methods", name) for name in names[::2])
    head = beside.parameters - plain.parameters  # 16 features and a bias for each of ten classes
    assert head == 17 * 10 and beside.parameters_request == plain.parameters_request + head
    assert plain.records_request < beside.records_request == 79, "every record but the erased one, each once"
    assert [row.passes for row in (plain, beside)] == [2, 1 + CONFIG.inference.nearest]


def test_tries_that_finished_nothing_do_not_bind_a_folder(tmp_path, monkeypatch):
    """One was refused, one was interrupted: other settings start afresh."""
    tree = {"data__train_limit": 12, "data__test_limit": 30, "clustering__sample_size": 10}
    refused = comparison(tmp_path / "c", config=small_config(**tree))
    with pytest.raises(UserError, match="too few"):
        runner.compare(refused, "x")
    assert refused.base(0).is_dir()
    with monkeypatch.context() as patch:
        patch.setitem(measure.EXPERIMENTS, "methods", lambda *_: (_ for _ in ()).throw(interrupt.Stopped))
        with pytest.raises(interrupt.Stopped):
            runner.compare(comparison(tmp_path / "c"), "x")
    assert (refused.folder / "methods_ridge_0").is_dir()
    more = small_config(**(tree | {"data__train_limit": 70}))
    (row,) = runner.compare(comparison(tmp_path / "c", config=more), "x").rows
    assert row.records == 70


def test_other_settings_and_foreign_folders_are_refused(done):
    first, _ = done
    other = dataclasses.replace(CONFIG, tuning=dataclasses.replace(CONFIG.tuning, epochs=7))
    longer = dataclasses.replace(SHORT, length=3)
    with pytest.raises(UserError, match=r"other settings.*\n.*config.tuning.epochs: 2 -> 7\n- --length: 2 -> 3$"):
        runner.compare(dataclasses.replace(first, config=other, options=longer), "x")
    with pytest.raises(UserError, match="holds other files and no comparison"):
        runner.compare(comparison(first.folder.parent), "x")


def test_everything_that_cannot_work_is_said_at_once(tmp_path):
    unknown = {"names": ("sisa-vote",), "experiments": ("speed", "cut"), "cuts": ("many",), "sequences": ("all",)}
    for changes, *messages in (
        (unknown, "--experiments: speed unknown; legal: methods, removal", "--sequences: all", "--cuts=many"),
        ({"names": ("lmeraser",), "experiments": ("cut",), "cuts": ()}, "--cuts is missing"),
        ({"experiments": ("cut",)}, "--experiments=cut: ridge cuts no tree; its partition is one"),
        ({"names": ("ncm",), "experiments": ("epochs",)}, "--experiments=epochs: ncm has a closed form and no epochs"),
        ({"names": ("ridge", "ridge")}, "--methods: 2 are called ridge"),
        ({"split": "holdout"}, "there is no hold-out: --config.data.holdout=0 must be above 0"),
        ({"experiments": ()}, "--experiments: name at least one"),
    ):
        with pytest.raises(UserError) as caught:
            check(comparison(tmp_path / "c", **changes))
        assert all(message in str(caught.value) for message in messages), caught.value
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="null/x cannot be made: Not a directory"):
        runner.compare(comparison(Path("/dev/null/x")), "x")


def test_too_few_records_are_named_before_the_work(tmp_path):
    tree = {"data__train_limit": 80, "data__test_limit": 30, "clustering__sample_size": 10}
    shards = r"of 70 shards \d+ get none with seed 1 \(shard \d+(.*\n?.*)sisa-vote needs"
    classes = r"too few: each class must have 2, \d have not: \w+ \([01]\)[^\n]*limit_by=class"
    holdout = "--split=holdout: no image of seed [01] is in it; --config.data.ho"
    for changes, split, message in (
        ({"clustering__shards": 70}, "test", shards),
        ({"data__train_limit": 12}, "test", classes),
        ({"data__holdout": 0.0005}, "holdout", holdout),
    ):
        config, folder = small_config(**(tree | changes)), tmp_path / "-".join(changes)
        with pytest.raises(UserError, match=message):
            runner.compare(comparison(folder, ("sisa-vote",), config=config, seeds=2, split=split), "x")
        assert not (folder / "rows").exists(), "said before the first seed is done"


def test_a_method_of_one_s_own_is_a_config_file(tmp_path):
    file = tmp_path / "two_nearest.py"
    file.write_text('def get_config():\n    return {"inference": {"nearest": 2}, "tuning": {"batch": 3}}\n')
    (method,) = methods.load([str(file)])
    config = method.configure(CONFIG)
    assert method.name == "two_nearest" and (config.inference.nearest, config.tuning.batch) == (2, 3)
    assert config == dataclasses.replace(CONFIG, inference=config.inference, tuning=config.tuning), "no other setting"
    whole = "from lmeraser_jax.config import default_config\ndef get_config():\n    config = default_config()\n"
    file.write_text(whole + "    config.tuning.epochs = 5\n    return config\n")
    config = methods.load([str(file)])[0].configure(CONFIG)
    assert config.tuning.epochs == 5 and (config.data, config.seed) == (CONFIG.data, CONFIG.seed), "shared by all"
    returning = "def get_config():\n    return "
    for text, message in (
        ("TITLE = 3", r"two_nearest.py: is no config file: it must define get_config\(\)"),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        (returning + "5", "returns int; must be a ConfigDict or a dict of settings"),
        (returning + '{"seed": 3, "data": {"path": "x"}}', r"seed=3: all methods .* share it; .*\n.*data.path='x'"),
        (returning + '{"tuning": {"epoch": 1}}', "did you mean tuning.epochs"),
        (returning + '{"tuning": {"epochs": 0}}', "does not go with this config.*at least 1"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            methods.load([str(file)])[0].configure(CONFIG)
    (tmp_path / "ridge.py").write_text(text)
    with pytest.raises(UserError) as caught:
        methods.load(["lmerase", str(tmp_path / "ridge.py"), "none.py"])
    for message in ("lmerase: no such method; legal: lmeraser, ", "has this name already", "none.py: no such file"):
        assert message in str(caught.value)


def test_a_method_that_was_edited_does_not_pass_for_the_old_one(tmp_path):
    file = tmp_path / "mine.py"
    text = 'def get_config():\n    return {"tuning": {"method": "ridge", "penalty": %s}}\n'
    file.write_text(text % 0.1)
    runner.compare(comparison(tmp_path / "c", (str(file),)), "x")
    file.write_text(text % 1000.0)
    with pytest.raises(UserError, match=r"same name with other settings; delete them.*rows/methods_mine_0.json"):
        runner.compare(comparison(tmp_path / "c", (str(file),)), "x")


def test_merged_rows_may_not_contradict_each_other(done):
    outcome = done[1]
    first = outcome.rows[0]
    slower = dataclasses.replace(outcome, rows=(dataclasses.replace(first, seconds_full=99.0, source="s"),))
    assert results.merge(outcome, {"a": outcome, "b": slower}).rows == outcome.rows
    other = dataclasses.replace(outcome, rows=(dataclasses.replace(first, accuracy=0.123),))
    with pytest.raises(UserError, match=f"--merge: .* different results .*: b: {first.experiment} of {first.method}"):
        results.merge(outcome, {"a": outcome, "b": other})


def test_sequences_erase_live_records_and_each_once(base):
    """The adaptive one asks for what the model is surest of."""
    with prepare_run(*base) as (run, _):
        build(run)
        for kind, batches in sequences.KINDS.items():
            start, erased = len(run.catalog.live("train")), []
            for batch in batches(run, 2):
                records = run.catalog.live("train")
                assert batch and set(records.ids).issuperset(batch) and len(batch) == len(set(batch)), kind
                places = [records.ids.index(name) for name in batch]
                if kind == "class":
                    of_class = np.flatnonzero(records.labels == records.labels[places[0]])
                    assert batch == [records.ids[i] for i in of_class]
                if kind == "adaptive":
                    answers = predict(load_model(run), run.images[records.rows]).probabilities
                    sure = answers[np.arange(len(records)), records.labels]
                    assert min(sure[places]) >= np.sort(sure)[-sequences.BATCH] - 1e-6
                request_erasure(run, batch)
                erased += batch
            assert 0 < len(erased) == len(set(erased)) < start, kind
            assert kind != "half" or len(erased) == start // 2


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, capsys, monkeypatch):
    """Files and tables; bad input on purpose; a second run only writes the report again."""
    flags = ["--config=configs/digits.py:smoke", "--config.data.train_limit=80", "--config.data.test_limit=30"]
    flags += ["--config.clustering.sample_size=30", "--config.pretraining.epochs=0", "--methods=ridge,ncm"]
    flags += ["--config.backbone.width=16", "--config.backbone.depth=1", "--config.backbone.mlp=32"]
    flags += ["--probes=3", "--requests=1", f"--workdir={tmp_path / 'c'}"]
    assert main(["compare", *flags, "--seeds=2", f"--json={tmp_path / 'rows.json'}"]) == 0
    out = capsys.readouterr()
    assert "digits, small ViT: 80 records, 2 seeds" in out.out and "| nearest class mean |" in out.out
    assert "[4/4]" in out.err
    written = {path.name for path in (tmp_path / "c").iterdir()}
    assert written >= {"results.csv", "results.json", "report.html", "report.md", "figures"}
    assert "lmeraser compare" in (tmp_path / "c" / "report.html").read_text()
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4
    without = [flag for flag in flags if not flag.startswith("--config")]
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    assert main(["compare", *without, "--seeds=2"]) == 0, "a folder knows its own settings"
    err = capsys.readouterr().err
    assert "[1/" not in err and "warning: no figures: figures need matplotlib; install it with: " in err
    for wrong, message in (
        ("--seeds=0", "--seeds=0: 0 is not a positive integer"),
        ("--methods=best,ncm,worst", "--methods=worst: no such method; legal: lmeraser, "),
        ("--experiments=all", "--experiments: all unknown"),
        (f"--merge={tmp_path}", "is not the results.json of a comparison"),
    ):
        others = [flag for flag in flags if flag.partition("=")[0] != wrong.partition("=")[0]]
        assert main(["compare", *others, wrong]) == 2 and message in capsys.readouterr().err


def test_damaged_files_are_named(done, tmp_path, capsys):
    path = tmp_path / "results.json"
    whole = json.loads((done[0].folder / "results.json").read_text())
    damaged = {
        "'rows' is missing": {"sources": {}},
        ".* missing 9 required keyword-only arguments: 'dataset',": whole | {"rows": [{"experiment": "methods"}]},
        "accuracy is 'high'": whole | {"rows": [whole["rows"][0] | {"accuracy": "high"}]},
    }
    for reason, tree in damaged.items():
        path.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=f"is not the results.json of a comparison: {reason}"):
            results.load(path)
    for text, reason in (("{", "Expecting"), ('{"config": {}}', "'options' is missing"), ("3", "not subscriptable")):
        (tmp_path / "comparison.json").write_text(text)
        for flags in ([], ["--config=configs/digits.py"]):
            assert main(["compare", *flags, f"--workdir={tmp_path}"]) == 2
            err = capsys.readouterr().err
            assert "comparison.json is damaged" in err and reason in err and "name another --workdir" in err
