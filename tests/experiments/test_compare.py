"""Comparisons: rows that agree with what they measure, work that is resumed and never repeated, bad input refused."""

import collections
import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config
from published import VIT, hub_folder, hugging_face_vit, settings_of

from lmeraser_jax import config as settings
from lmeraser_jax import interrupt
from lmeraser_jax.cli.main import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.experiments import costs, measure, methods, runner, sequences
from lmeraser_jax.experiments.measure import Plan
from lmeraser_jax.experiments.results import load
from lmeraser_jax.hashing import philox
from lmeraser_jax.unlearning.erase import request_erasure
from lmeraser_jax.unlearning.plan import plan
from lmeraser_jax.unlearning.run import prepare_run

CONFIG = small_config(
    data__train_limit=80,
    data__test_limit=30,
    clustering__shards=3,
    clustering__sample_size=20,
    clustering__min_members=1,
)
SHORT = Plan("digits", "small", probes=6, requests=1, cuts=("auto:2", "auto:10"), sequences=("burst",), length=2)


def comparison(folder, names=("ridge",), experiments=("methods",), seeds=1, config=CONFIG, **plan):
    chosen = tuple(methods.load(name) for name in names)
    what = dataclasses.replace(SHORT, **plan)
    return runner.Comparison(folder, config, chosen, tuple(range(seeds)), tuple(experiments), what)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: (comparison, results), to which one method came with all other experiments."""
    one = comparison(tmp_path_factory.mktemp("compare") / "c", ("lmeraser", "sisa-vote", "ridge"))
    runner.compare(one, "the command")
    every = tuple(measure.EXPERIMENTS)
    return one, runner.compare(comparison(one.folder, ("lmeraser",), every), "another command")


def rows(results, experiment, method):
    return [row for row in results.rows if (row.experiment, row.method) == (experiment, method)]


def timeless(found):
    return [runner._timeless(row) for row in found]


def test_every_task_gives_its_rows(done):
    one, results = done
    assert load(one.folder / "results.json") == results and results.command == "another command"
    made_by = {row.point[:4]: results.sources[row.source]["command"] for row in results.rows}
    assert {what[0]: command for what, command in made_by.items()} == dict.fromkeys(
        measure.EXPERIMENTS, "another command"
    ) | {"methods": "the command"}
    assert len({row.point for row in results.rows}) == len(results.rows)
    counts = {name: len(rows(results, name, "lmeraser")) for name in measure.EXPERIMENTS}
    assert counts == {"methods": 1, "removal": 6, "cut": 2, "epochs": counts["epochs"], "sequence": 3}
    every = measure.tasks("epochs", one.methods[0], 0, CONFIG, SHORT)[0].config.checkpoints.every_epochs
    assert counts["epochs"] == len(range(0, CONFIG.tuning.epochs, every)), "as many, however small a cluster is"
    lines = (one.folder / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(results.rows) and lines[0].startswith("experiment,dataset,backbone,method,seed")
    assert not [path for path in one.folder.iterdir() if path.is_dir() and path.name not in ("base_0", "rows")]


def test_costs_are_those_of_real_erasures(done, tmp_path):
    """The mean of planned costs against erasures that are really served, one record at a time, each from the start."""
    one, results = done
    (row,) = rows(results, "methods", "sisa-vote")
    config = one.methods[1].of(dataclasses.replace(CONFIG, seed=0))
    with prepare_run(tmp_path / "run", config) as (run, _):
        from lmeraser_jax.unlearning.build import build

        whole = build(run)
        assert row.images_full == whole.images and row.clusters == 3
        ids = run.catalog.live("train").ids
        every = [plan(run, frozenset({name})).images_missing for name in ids]
        probed = [every[i] for i in philox(0, "probe").choice(len(ids), SHORT.probes, replace=False)]
        assert row.images_request == np.mean(probed) and row.images_worst == max(probed)
        first = request_erasure(run, [ids[7]]).outcome
        assert first.images == every[7]
    assert row.sampled_share == 0 and row.expected_share == pytest.approx(1 / 3, abs=0.05)


def test_seconds_are_those_of_both_kinds_of_records(done):
    (row,) = rows(done[1], "methods", "lmeraser")
    assert row.seconds_full > 0 < row.seconds_unsampled and row.seconds_sampled > 0 < row.sampled_share < 1
    share = row.sampled_share
    assert row.seconds_request == (1 - share) * row.seconds_unsampled + share * row.seconds_sampled
    (shards,) = rows(done[1], "methods", "sisa-vote")
    assert shards.seconds_sampled == 0 and shards.seconds_request == shards.seconds_unsampled > 0
    assert shards.passes == 3 and row.passes == 2 and row.tested == 30


@pytest.mark.parametrize("requests", [0, 3])
def test_a_request_that_makes_everything_again_is_served_once_at_most(tmp_path, requests, monkeypatch):
    served, kept = [], costs.unlearning.request_erasure
    monkeypatch.setattr(costs.unlearning, "request_erasure", lambda *args: served.append(args) or kept(*args))
    (row,) = runner.compare(comparison(tmp_path / "c", ("single",), requests=requests), "x").rows
    assert row.seconds_full > 0 and len(served) == min(requests, 1)
    assert row.seconds_request == row.seconds_unsampled and (row.seconds_request > 0) == (requests > 0)


def test_seconds_of_an_interrupted_attempt_count(tmp_path):
    """Its slices were there before the attempt that was logged began."""
    with prepare_run(tmp_path / "run", CONFIG) as (run, _):
        from lmeraser_jax.unlearning.build import build

        build(run)
        made = sum(row.seconds for row in run.catalog.slices().values()) / run.mesh.size
        line = json.loads(run.layout.metrics.read_text().splitlines()[-1])
        assert costs.seconds_spent(run) == line["seconds"] > made > 0
        run.layout.metrics.write_text(json.dumps(line | {"seconds": 0.001}) + "\n")
        assert costs.seconds_spent(run) == pytest.approx(made + 0.001)


def test_seeds_share_images_where_nothing_depends_on_the_seed(tmp_path):
    """A hold-out is drawn with the seed; published weights are not."""
    same = small_config(backbone__weights="x.npz", backbone__name="vit-ti")
    split = dataclasses.replace(same, data=dataclasses.replace(same.data, holdout=0.2))
    for config, shared in ((CONFIG, False), (same, True), (split, False)):
        one = comparison(tmp_path, config=config)
        assert (one.base(0) == one.base(1)) == shared


def test_each_seed_holds_out_images_of_its_own(tmp_path):
    """Published weights, a hold-out and two seeds: what is asked was not tuned on."""
    pytest.importorskip("safetensors")
    weights = hub_folder(tmp_path / "vit", hugging_face_vit(prefix="vit."), settings_of(VIT))
    data = {"data__train_limit": 80, "data__test_limit": 30, "data__holdout": 0.25}
    config = small_config(backbone__weights=str(weights), clustering__sample_size=20, **data)
    one = comparison(tmp_path / "c", config=config, seeds=2, split="holdout")
    found = runner.compare(one, "x").rows
    assert [(row.seed, row.records + row.tested) for row in found] == [(0, 80), (1, 80)]
    held = []
    for seed in (0, 1):
        with prepare_run(one.base(seed), dataclasses.replace(config, seed=seed)) as (run, _):
            held.append(set(run.catalog.live("holdout").ids))
            assert held[-1].isdisjoint(run.catalog.live("train").ids)
    assert held[0] != held[1]


def test_a_method_that_was_edited_does_not_pass_for_the_old_one(tmp_path, capsys):
    file = tmp_path / "mine.py"
    text = '"""Mine."""\nTITLE = "mine"\nCHANGES = {"clustering.partition": "one", "tuning.method": "ridge"'
    file.write_text(text + "}\n")
    runner.compare(comparison(tmp_path / "c", (str(file),)), "x")
    file.write_text(text + ', "tuning.penalty": 1000.0}\n')
    with pytest.raises(UserError, match=r"same name with other settings; delete them.*rows/methods_mine_0.json"):
        runner.compare(comparison(tmp_path / "c", (str(file),)), "x")
    (tmp_path / "ridge.py").write_text(text + "}\n")
    with pytest.raises(UserError, match="ridge.py: a method is called so already"):
        methods.load_all([str(tmp_path / "ridge.py")])


def test_merged_rows_may_not_contradict_each_other(done):
    results = done[1]
    first = results.rows[0]
    slower = dataclasses.replace(results, rows=(dataclasses.replace(first, seconds_full=99.0, source="s"),))
    assert set(runner.merged(results, {"a": results, "b": slower}).rows) == set(results.rows)
    other = dataclasses.replace(results, rows=(dataclasses.replace(first, accuracy=0.123),))
    with pytest.raises(UserError, match=f"--merge: .* different results; .*: b: {first.experiment} of lmeraser"):
        runner.merged(results, {"a": results, "b": other})


def test_a_closed_form_costs_no_image(done):
    (row,) = rows(done[1], "methods", "ridge")
    assert (row.images_request, row.images_full, row.clusters) == (0, 0, 1) and row.records_request == 79


def test_removal_and_sequences_end_with_fewer_records(done):
    removed = rows(done[1], "removal", "lmeraser")
    assert [row.records for row in removed] == [80 - round(share * 80) for share in (0, *measure.REMOVED)]
    burst = rows(done[1], "sequence", "lmeraser")
    assert [row.x for row in burst] == [0, 1, 2] and burst[0].spent == 0 < burst[1].spent < burst[2].spent
    assert burst[2].records == burst[0].records - 2 * sequences.SIZE


def test_the_cut_sets_the_number_of_prompts(done):
    found = {row.x: row.clusters for row in rows(done[1], "cut", "lmeraser")}
    assert found[2.0] < found[10.0]


def test_epochs_are_shares_of_a_cluster_s_own_steps():
    """A small cluster makes more steps than its epochs say: half of the way is half of these."""
    catalog = types.SimpleNamespace(
        epochs={"whole": {2: "", 4: ""}, "long": dict.fromkeys(range(1, 13), ""), "one": {}}.get
    )
    run = types.SimpleNamespace(catalog=catalog)
    made = {
        name: types.SimpleNamespace(digest=name, steps=steps)
        for name, steps in (("whole", 6), ("long", 13), ("one", 1))
    }
    found = {name: [measure.snapshot(run, row, share) for share in (1 / 3, 2 / 3)] for name, row in made.items()}
    assert found == {"whole": ["whole@2", "whole@4"], "long": ["long@4", "long@9"], "one": ["one", "one"]}


def test_nothing_is_done_twice_and_a_method_joins(done, monkeypatch):
    one, results = done
    monkeypatch.setattr(runner, "rows", None)  # any task would fail
    assert runner.compare(one, "again").rows == results.rows
    more = dataclasses.replace(one, methods=(*one.methods, methods.load("ncm")), experiments=("methods",))
    with pytest.raises(TypeError):
        runner.compare(more, "more")


def test_an_interrupted_comparison_carries_on(tmp_path, monkeypatch):
    one = comparison(tmp_path / "c", ("ridge", "lmeraser"))
    kept, finished = measure.EXPERIMENTS["methods"], []

    def killed(run, task, what):
        row = next(kept(run, task, what))  # it has served its erasures by now
        if len(finished) == 1:
            raise interrupt.Stopped
        finished.append(task.name)
        yield row

    monkeypatch.setitem(measure.EXPERIMENTS, "methods", killed)
    with pytest.raises(interrupt.Stopped):
        runner.compare(one, "x")
    assert [path.stem for path in (one.folder / "rows").iterdir()] == finished == ["methods_ridge_0"]
    assert (one.folder / "methods_lmeraser_0").is_dir()
    monkeypatch.setitem(measure.EXPERIMENTS, "methods", kept)
    results = runner.compare(one, "x")
    fresh = runner.compare(comparison(tmp_path / "d", ("ridge", "lmeraser")), "x")
    assert timeless(results.rows) == timeless(fresh.rows)


def test_what_methods_have_in_common_is_tuned_once(tmp_path, monkeypatch):
    """The nearest one, the five nearest and a ridge head beside them: the same slices, and the same rows as alone."""
    spent, kept = {}, measure.reconcile

    def counted(run):
        outcome = kept(run)
        spent[run.layout.root.name] = outcome.images
        return outcome

    monkeypatch.setattr(measure, "reconcile", counted)
    names = ("lmeraser", "lmeraser-top5", "lmeraser-ridge")
    results = runner.compare(comparison(tmp_path / "c", names), "x")
    assert [spent[f"methods_{name}_0"] > 0 for name in names] == [True, False, False]
    assert not list((tmp_path / "c").glob("*tuned*"))
    alone = runner.compare(comparison(tmp_path / "d", names[2:]), "x").rows[0]
    (beside,) = rows(results, "methods", "lmeraser-ridge")
    assert timeless([beside]) == timeless([alone])
    (plain,) = rows(results, "methods", "lmeraser")
    head = beside.parameters - plain.parameters  # 16 features and a bias for each of ten classes
    assert head == 17 * 10 and beside.parameters_request == plain.parameters_request + head
    assert plain.records_request < beside.records_request == 79, "every record but the erased one, each once"
    assert [row.passes for row in (plain, beside)] == [2, 1 + CONFIG.inference.nearest]


def test_a_refused_comparison_does_not_bind_its_folder(tmp_path):
    tree = {"data__train_limit": 12, "data__test_limit": 30, "clustering__sample_size": 10}
    refused = comparison(tmp_path / "c", config=small_config(**tree))
    with pytest.raises(UserError, match="too few"):
        runner.compare(refused, "x")
    assert refused.base(0).is_dir()
    (row,) = runner.compare(comparison(tmp_path / "c"), "x").rows
    assert row.records == 80, "no longer the images of before"


def test_an_interrupted_try_does_not_bind_its_folder(tmp_path, monkeypatch):
    """A method was under way and nothing done: other settings start afresh."""
    first = comparison(tmp_path / "c")

    def killed(run, task, what):
        raise interrupt.Stopped

    monkeypatch.setitem(measure.EXPERIMENTS, "methods", killed)
    with pytest.raises(interrupt.Stopped):
        runner.compare(first, "x")
    assert (first.folder / "methods_ridge_0").is_dir()
    monkeypatch.undo()
    fewer = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, train_limit=70))
    (row,) = runner.compare(comparison(first.folder, config=fewer), "x").rows
    assert row.records == 70


def test_a_hold_out_without_images_is_told_before_the_work(tmp_path):
    config = small_config(data__train_limit=80, data__holdout=0.0005, clustering__sample_size=20)
    with pytest.raises(UserError, match="--split=holdout: no image of seed 0 is in it; --config.data.holdout"):
        runner.compare(comparison(tmp_path / "c", config=config, split="holdout"), "x")


def test_other_settings_and_foreign_folders_are_refused(done, tmp_path):
    one, _ = done
    other = dataclasses.replace(CONFIG, tuning=dataclasses.replace(CONFIG.tuning, epochs=7))
    with pytest.raises(UserError, match=r"other settings.*\n.*config.tuning.epochs: 2 -> 7"):
        runner.compare(dataclasses.replace(one, config=other), "x")
    with pytest.raises(UserError, match=r"\n- --length: 2 -> 3$"):
        runner.compare(dataclasses.replace(one, plan=dataclasses.replace(SHORT, length=3)), "x")
    with pytest.raises(UserError, match=r"\n- --requests: 1 -> 2$"):
        runner.compare(dataclasses.replace(one, plan=dataclasses.replace(SHORT, requests=2)), "x")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files and no comparison"):
        runner.compare(comparison(tmp_path), "x")


def test_everything_that_cannot_work_is_said_at_once(tmp_path):
    wrong = comparison(tmp_path / "c", ("sisa-vote",), ("methods", "speed", "cut"), cuts=("many",), sequences=("all",))
    with pytest.raises(UserError) as caught:
        runner.check(wrong)
    for text in (
        "--experiments: speed unknown; legal: methods, removal, cut, epochs",
        "--sequences: all",
        "--cuts=many",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="--cuts is missing"):
        runner.check(comparison(tmp_path / "c", ("lmeraser",), ("cut",), cuts=()))
    for name, what, message in (
        ("ridge", "cut", "ridge cuts no tree; its partition is one"),
        ("ncm", "epochs", "ncm has a closed form and no epochs"),
        ("sisa-vote", "epochs", "sisa-vote tunes in 2 stages"),
    ):
        with pytest.raises(UserError, match=f"--experiments={what}: {message}"):
            runner.check(comparison(tmp_path / "c", (name,), (what,)))
    with pytest.raises(UserError, match="2 methods are called ridge"):
        runner.check(comparison(tmp_path / "c", ("ridge", "ridge")))
    with pytest.raises(UserError, match="--split=holdout: there is none; set --config.data.holdout"):
        runner.check(comparison(tmp_path / "c", split="holdout"))
    with pytest.raises(UserError, match="--experiments: name at least one"):
        runner.check(comparison(tmp_path / "c", experiments=()))
    with pytest.raises(UserError, match="--workdir=/dev/null/x cannot be made: Not a directory"):
        runner.compare(comparison(Path("/dev/null/x")), "x")
    with pytest.raises(UserError, match="--split=train: must be test or holdout"):
        runner.check(comparison(tmp_path / "c", split="train"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"clustering__shards": 70},
            r"too few: of 70 shards \d+ get none with seed 1 \(shard \d+(.*\n?.*)which sisa-vote",
        ),
        ({"data__train_limit": 12}, r"too few: class \w+ has [01] of them, must have 2; use more data"),
    ],
)
def test_too_few_records_are_named(tmp_path, config, message):
    tree = {"data__train_limit": 80, "data__test_limit": 30, "clustering__sample_size": 10} | config
    one = comparison(tmp_path / "c", ("sisa-vote",), config=small_config(**tree), seeds=2)
    with pytest.raises(UserError, match=message):
        runner.compare(one, "x")
    assert not (one.folder / "rows").exists(), "said before the first seed is done"


def test_a_method_of_one_s_own_is_a_small_file(tmp_path):
    file = tmp_path / "two_nearest.py"
    file.write_text('"""Two."""\nTITLE = "two"\nCHANGES = {"inference.nearest": 2, "tuning.batch": 3}\n')
    method = methods.load(str(file))
    assert (method.name, method.title) == ("two_nearest", "two")
    found = method.of(CONFIG)
    assert found.inference.nearest == 2 and found.tuning.batch == 3 != CONFIG.tuning.batch
    for text, message in (
        ("TITLE = 3", r"TITLE is 3; must be a text\n.*CHANGES is None; must be a dict"),
        ("raise KeyError('x')", "KeyError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ('TITLE = "t"\nCHANGES = {5: 1, "tuning": {}}', r"has 5: 1; must be like.*\n.*has 'tuning': {}; must be like"),
        ('TITLE = "t"\nCHANGES = {"seed": 3, "data.path": "x"}', r"has seed, which all.*\n.*has data.path, which all"),
        ('TITLE = "t"\nCHANGES = {"tuning.epoch": 1}', "did you mean tuning.epochs"),
        ('TITLE = "t"\nCHANGES = {"tuning.epochs": 0}', "does not go with this config.*at least 1"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            methods.load(str(file)).of(CONFIG)
    with pytest.raises(UserError, match="'lmerase' is no method; legal: dam-vp, heads-ridge, linear-head, lmeraser"):
        methods.load("lmerase")


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_described_and_legal(name):
    method = methods.load(name)
    assert method.title and method.about and method.changes
    tree, wanted = settings.to_dict(method.of(CONFIG)), settings.to_dict(CONFIG)
    for setting, value in method.changes:
        group, leaf = setting.split(".")
        wanted[group][leaf] = value
    assert tree == wanted, "these settings and no other"


@pytest.mark.parametrize("kind", sequences.KINDS)
def test_sequences_ask_for_live_records_and_for_each_once(kind, done, tmp_path):
    one, _ = done
    config = one.methods[2].of(dataclasses.replace(CONFIG, seed=0))  # ridge: nothing is tuned
    with prepare_run(tmp_path / "run", config) as (run, _):
        from lmeraser_jax.unlearning.build import build

        build(run)
        whole, gone = set(run.catalog.live("train").ids), []
        for batch in sequences.KINDS[kind](run, 3):
            live = set(run.catalog.live("train").ids)
            assert batch and live.issuperset(batch) and len(batch) == len(set(batch))
            if kind == "class":
                labels = run.catalog.live("train")
                of = {labels.labels[labels.ids.index(name)] for name in batch}
                assert len(of) == 1 and sum(labels.labels == of.pop()) == len(batch)
            request_erasure(run, batch)
            gone += batch
        assert len(gone) == len(set(gone)) and whole.issuperset(gone) and len(gone) < len(whole)
        if kind == "half":
            assert len(gone) == 40


def test_a_few_owners_ask_for_most():
    """Batches of one owner each, who come again; an owner's records lie side by side."""
    ids = tuple(f"{i:05d}" for i in range(2000))
    clusters = tuple(f"c{i // 100:02d}" for i in range(2000))
    records = types.SimpleNamespace(ids=ids, clusters=clusters)
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(seed=3), catalog=types.SimpleNamespace(live=lambda split: records)
    )
    batches = list(sequences.pareto(run, 100))
    assert all(0 < len(batch) <= sequences.SIZE for batch in batches) and len(batches) == 100
    assert sum(len(batch) == sequences.SIZE for batch in batches) > 20, "an owner drawn by chance has one or two"
    where = [{clusters[ids.index(name)] for name in batch} for batch in batches if len(batch) > 1]
    assert np.mean([len(found) == 1 for found in where]) > 0.6, "of 20 clusters"
    of = dict(zip(ids, sequences._made_up(clusters, philox(3, "sequence", "pareto")), strict=True))
    assert all(len({of[name] for name in batch}) == 1 for batch in batches)
    assert collections.Counter(of[batch[0]] for batch in batches).most_common(1)[0][1] >= 5


def test_the_adaptive_sequence_asks_for_what_the_model_is_surest_of(done, tmp_path):
    from lmeraser_jax.evaluation.predict import load_model, predict
    from lmeraser_jax.unlearning.build import build

    config = done[0].methods[2].of(dataclasses.replace(CONFIG, seed=0))
    with prepare_run(tmp_path / "run", config) as (run, _):
        build(run)
        records = run.catalog.live("train")
        sure = predict(load_model(run), run.images[records.rows]).probabilities[np.arange(80), records.labels]
        first = next(iter(sequences.adaptive(run, 1)))
        assert min(sure[[records.ids.index(name) for name in first]]) >= np.sort(sure)[-sequences.SIZE] - 1e-6


def test_the_command_from_end_to_end(tmp_path, capsys):
    """Files, table and sentences; bad input on purpose; a second run only writes the report again."""
    flags = ["--config=configs/digits.py:smoke", "--config.data.train_limit=80", "--config.data.test_limit=30"]
    flags += ["--config.clustering.sample_size=30", "--config.pretraining.epochs=0", "--methods=ridge,ncm"]
    flags += ["--probes=3", "--requests=1", f"--workdir={tmp_path / 'c'}"]
    assert main(["compare", *flags, "--seeds=2", "--montage", f"--json={tmp_path / 'found.json'}"]) == 0
    out = capsys.readouterr()
    assert "digits, small ViT, 2 seeds" in out.out and "nearest class mean" in out.out and "[4/4]" in out.err
    written = {path.name for path in (tmp_path / "c").iterdir()}
    assert written >= {"results.csv", "results.json", "report.html", "figures", "clusters.png"}
    assert "lmeraser compare" in (tmp_path / "c" / "report.html").read_text()
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 4
    without = [flag for flag in flags if not flag.startswith("--config")]
    for again in (flags, without):  # a folder knows its own settings
        assert main(["compare", *again, "--seeds=2"]) == 0 and "[" not in capsys.readouterr().err.replace("[0", "")
    (tmp_path / "c" / "clusters.png").unlink()
    assert main(["compare", *without, "--montage"]) == 0
    assert "delete" in (err := capsys.readouterr().err) and "methods_ridge_0.json to do it again" in err
    for wrong, message in (
        ("--seeds=0", "--seeds=0: must be at least 1"),
        ("--methods=best,ncm,worst", "'best', 'worst': no such method; legal: dam-vp"),
        ("--experiments=all", "--experiments: all unknown"),
        (f"--merge={tmp_path}", "is not the results.json of a comparison"),
    ):
        assert main(["compare", *flags, wrong]) == 2 and message in capsys.readouterr().err


def test_damaged_rows_are_named(done, tmp_path):
    path = tmp_path / "results.json"
    whole = json.loads((done[0].folder / "results.json").read_text())
    whole["rows"][0]["accuracy"] = "high"
    header = {"command": "", "machine": ""}
    for text, why in (
        ("{", "Expecting property name"),
        (json.dumps(header), "'rows' is missing"),
        (json.dumps(header | {"rows": [{"experiment": "methods"}]}), "row 0 has no accuracy, backbone, balanced"),
        (
            json.dumps(header | {"rows": whole["rows"][1:] + [whole["rows"][1] | {"speed": 1}]}),
            r"row \d+ has speed, which",
        ),
        (json.dumps(whole), "row 0: accuracy is 'high'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"is not the results.json of a comparison: {why}"):
            load(path)


def test_damaged_settings_of_a_folder_are_named(tmp_path, capsys):
    for text, why in (("{", "Expecting"), ('{"config": {}}', "'plan' is missing"), ("3", "not subscriptable")):
        (tmp_path / "comparison.json").write_text(text)
        for flags in ([], ["--config=configs/digits.py"]):
            assert main(["compare", *flags, f"--workdir={tmp_path}"]) == 2
            err = capsys.readouterr().err
            assert "comparison.json is damaged" in err and why in err and "name another --workdir" in err
