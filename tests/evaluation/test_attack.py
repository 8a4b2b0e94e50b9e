"""Attacks on a small workdir: what is played in memory is what an erasure publishes, controls work, leaks are found."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import small_config, small_run, small_source, with_items
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from lmeraser_jax.cli.main import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import attack as attacks
from lmeraser_jax.evaluation.attacks import common_head, membership, routing, shadows, statistics, targets
from lmeraser_jax.evaluation.attacks import relearn as relearning
from lmeraser_jax.evaluation.attacks.attack import ATTACKS, Options
from lmeraser_jax.evaluation.attacks.klom import klom
from lmeraser_jax.evaluation.attacks.pools import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION
from lmeraser_jax.evaluation.attacks.relearn import relearn
from lmeraser_jax.evaluation.attacks.ulira import ulira
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.hashing import philox
from lmeraser_jax.storage.rows import SliceKind
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run

LEARNT = {"tuning__lanes": shadows.LANES, "tuning__epochs": 40, "tuning__head_rate": 0.05}  # one program with shadows
OPTIONS = Options(targets=16, shadows=16, seed=1)


def noisy_source():
    """Digits of which two in three, of every split alike, have a random label: a slice can only learn them by heart."""
    source, draw = small_source(train=100, test=100), np.random.default_rng(5)
    items = [item._replace(label=int(draw.integers(10))) if draw.random() < 0.67 else item for item in source.items]
    return with_items(source, items, source.read(0, len(items)).images)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "run"
    with small_run(folder, noisy_source(), small_config(**LEARNT)) as run:
        build(run)
    return folder


@pytest.fixture
def run(workdir):
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        yield run


@pytest.fixture(scope="module")
def trials(workdir):
    """The pools of an attack, everything tuned."""
    with open_run(workdir, devices=jax.devices()[:1]) as run:
        drawn = targets.draw(run, (), OPTIONS.targets, OPTIONS.seed)
        return attacks._trials(run, drawn, OPTIONS)[0]


@pytest.fixture(scope="module")
def result(workdir):
    """A whole attack, while another process may be writing; nothing in the workdir changes."""
    before = contents(workdir)
    with writer_lock(Layout(workdir)), open_run(workdir, devices=jax.devices()[:1]) as run:
        found = attacks.attack(run, OPTIONS)
        assert not run.writable
    assert contents(workdir) == before
    return found


def contents(workdir):
    """Every byte of a workdir but those of SQLite's shared memory and the lock."""
    files = (path for path in sorted(workdir.rglob("*")) if path.is_file())
    return {str(p): p.read_bytes() for p in files if not p.name.endswith(("-shm", "-wal")) and p.name != "lock"}


# what is played


def test_what_is_played_is_what_an_erasure_publishes(workdir, trials, tmp_path):
    """Bit for bit, for every attacked cluster, after one request for all targets."""
    shutil.copytree(workdir, tmp_path / "copy", copy_function=shutil.copy2)
    names = [name for trial in trials for name in trial.pool.of(FORGOTTEN).ids]
    with small_run(tmp_path / "copy", noisy_source(), small_config(**LEARNT)) as run:
        kept = {trial.pool.key: load_slice(run, run.catalog.manifest().entries[trial.pool.key]) for trial in trials}
        erase.request_erasure(run, names)
        for trial in trials:
            published = load_slice(run, run.catalog.manifest().entries[trial.pool.key])
            assert same_bits(trial.slices[0], kept[trial.pool.key])
            assert same_bits(trial.slices[1], published) and not same_bits(trial.slices[0], published)
            assert not any(same_bits(scratch, published) for scratch in trial.slices[2:])


def same_bits(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


METHODS = {
    "stages": {"tuning__slices": 2},
    "heads": {"tuning__method": "head"},
    "shards": {
        "clustering__partition": "random",
        "clustering__shards": 3,
        "tuning__method": "ridge",
        "tuning__expand": 8,
    },
    "backbones": {"clustering__partition": "one", "tuning__method": "backbone", "tuning__epochs": 1},
}


@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_tuned_is_played(method, tmp_path):
    """A world of a cluster's own members gives the published bits, and the logits that predictions are made of."""
    with small_run(tmp_path / "run", config=small_config(**METHODS[method])) as run:
        build(run)
    with open_run(tmp_path / "run", devices=jax.devices()[:1]) as run:
        model, test = load_model(run), run.catalog.live("test")
        worlds = [shadows.Counterfactual(key, run.catalog.members(key)) for key in model.keys]
        slices, images = shadows.tuned(run, run.tuning_spec, worlds)
        assert all(same_bits(made, load_slice(run, ref)) for made, ref in zip(slices, model.refs, strict=True))
        assert images == sum(row.images for row in run.catalog.slices().values())
        found = predict(model, run.images[test.rows])
        logits = shadows.logits(run, slices, test.rows)[found.clusters[:, 0], np.arange(len(test))]
    np.testing.assert_allclose(jax.nn.softmax(logits, axis=-1), found.probabilities, atol=1e-5)


@pytest.mark.parametrize("method", ["heads", "shards"])
def test_other_methods_are_attacked(method, tmp_path):
    """Shards have no prototypes to route by, a closed form has no steps to count; the rest is found as ever."""
    config = small_config(**METHODS[method] | {"tuning__epochs": 40, "tuning__penalty": 1e-3})
    with small_run(tmp_path / "run", noisy_source(), config) as run:
        build(run)
        found = attacks.attack(run, OPTIONS)
    assert found.skipped == (("common",) if method == "heads" else ("relearn", "common", "routing"))
    assert found.leaks == () and not {"lira", "ulira"} & {*found.blind, *found.powerless}
    assert found.text().count("nothing to attack") == len(found.skipped)


def test_who_takes_part(run, trials):
    """Targets are live, unsampled, of their cluster, and the hardest; images outside are routed there, and as hard."""
    sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
    splits, forgotten = {}, []
    for split in ("train", "test"):
        splits |= dict.fromkeys(run.catalog.live(split).ids, split)
    for pool, _, _, roles, scores, cast in trials:
        assert pool.of(FORGOTTEN, RETAINED).ids == run.catalog.members(pool.key).ids
        assert sample.isdisjoint(pool.of(FORGOTTEN).ids) and len(pool.of(RETAINED)) >= targets.LEFT
        assert {splits[name] for name in pool.of(OUTSIDE, VALIDATION).ids} <= {"test"}
        assert (roles == pool.roles[pool.watched]).all() and scores.margins.shape == (3, len(roles))
        able = roles != VALIDATION
        assert (cast.inside.sum(axis=0) >= 8 * able).all() and not cast.inside[:, ~able].any()
        assert not (cast.inside == cast.drawn)[:, able].all()
        forgotten += pool.of(FORGOTTEN).ids
    assert len(forgotten) == OPTIONS.targets
    unseen = np.concatenate([trial.scores.margins[2, trial.roles == FORGOTTEN] for trial in trials])
    stays = np.concatenate([trial.shadows.never[:, trial.roles == RETAINED].mean(axis=0) for trial in trials])
    assert unseen.mean() < stays.mean() - 1, "the hardest were to be taken"


def test_populations_are_tuned_on_whom_they_say(trials):
    """Who was drawn scores higher in shadows, nobody forgotten does in the slices that unlearned or never saw."""
    for _, _, _, roles, _, cast in trials:
        hard = np.isin(roles, (FORGOTTEN, OUTSIDE))
        gap = cast.shadows[:, hard][cast.inside[:, hard]].mean() - cast.shadows[:, hard][~cast.inside[:, hard]].mean()
        assert gap > 2
        gone, inside = roles == FORGOTTEN, cast.inside[:, roles == FORGOTTEN]
        for column in (cast.unlearned, cast.never):
            assert column[:, gone].mean() < cast.shadows[:, gone][inside].mean() - 2
        unlike = (cast.unlearned != cast.shadows).any(axis=1)
        assert (unlike == inside.any(axis=1)).all(), "a shadow that drew none of them has nothing to unlearn"


# what is found


def test_the_controls_work_and_erased_records_are_not_found(result):
    assert {one.name for one in result.findings} == set(ATTACKS) - {"common"} and result.skipped == ("common",)
    found = {one.name: one.found for one in result.findings}
    for name in ("loss", "rmia", "lira", "ulira", "klom", "relearn"):
        assert found[name] == (True, False, False), name
    assert result.leaks == result.powerless == result.shifted == () and {*result.blind} <= {"routing"}
    assert result.code == 0
    ulira = next(one for one in result.findings if one.name == "ulira")
    assert ulira.auc[0].low > 0.5 and ulira.auc[1].low < 0.6 and ulira.quality[0] < ulira.quality[1]
    assert all(rate is None for rates in ulira.rates for rate in rates), "16 records, 256 pairs"
    shares = result.accuracies
    assert shares.forgotten[0] > shares.forgotten[1] + 0.2 and shares.gap[0] > shares.gap[1] and shares.gap[2] == 0
    assert result.images > 0 and result.slices == (1 + 3 + 1 + 3 * 16) * result.clusters + targets.SCOUTS * 5


def test_pretending_to_unlearn_is_found(run, trials):
    """A leak: the old slice is kept. Everything else is as it was."""
    leaky = [(t.roles, dataclasses.replace(t.shadows, unlearned=t.shadows.shadows)) for t in trials]
    for name, attack in (("ulira", ulira), ("klom", klom)):
        assert attack(leaky, philox(0, name)).found == (True, True, False)
    found = relearn(run, [t.pool for t in trials], [pretended(t).slices for t in trials], [t.again for t in trials])
    assert found.found[:2] == (True, True) and found.steps[1] == found.steps[0]
    for name in ("loss", "rmia", "lira"):
        played = [pretended(trial) for trial in trials]
        assert attacks._membership(name, played, philox(0, name)).found == (True, True, False)


def pretended(trial):
    """The trial with the kept slice in the place of the unlearned one."""
    scores = shadows.Scores(*(part[[0, 0, 2]] for part in (trial.scores.margins, trial.scores.right)))
    return trial._replace(scores=scores, slices=(*trial.slices[:1] * 2, *trial.slices[2:]))


def test_relearning_watches_every_step(run, trials, monkeypatch):
    pool, slices, seen = trials[0].pool, trials[0].slices, []
    monkeypatch.setattr(relearning, "until", lambda losses, level: seen.append((losses, level)) or 0)
    relearn(run, [pool], [slices], [trials[0].again])
    played = (trials[0].again, *slices)
    level, *wanted = statistics.losses(shadows.scored(run, played, pool.of(FORGOTTEN)).margins).mean(axis=1)
    for (losses, goal), start in zip(seen, wanted, strict=True):
        assert len(losses) >= relearning.STEPS + 1 and goal == pytest.approx(level)
        assert losses[0] == pytest.approx(start) and losses[1] < losses[0]
    assert all(losses[-1] < 0.2 * losses[0] for losses, _ in seen[1:])


def test_the_control_of_relearning_is_measured(run, trials):
    """The level is that of another slice tuned with the records; a published one that forgot them fails there."""
    for trial in trials:
        assert not same_bits(trial.again, trial.slices[0])
    cast = [trial.pool for trial in trials], [trial.again for trial in trials]
    forgot = [(trial.slices[1], *trial.slices[1:]) for trial in trials]
    found = relearn(run, cast[0], forgot, cast[1])
    assert not found.found[0] and min(found.steps[0]) > 0 and found.steps[0] == found.steps[1]
    alone = relearn(run, cast[0][:1], [trials[0].slices], cast[1][:1])
    assert alone.least == 1 / (1 + len(trials[0].slices[2:])) > statistics.DOUBT and alone.found == (False,) * 3


def test_a_residue_is_found(trials):
    """A weaker leak: half of what the records had left in the slices stays."""
    half = []
    for trial in trials:
        between = (trial.shadows.shadows + trial.shadows.unlearned) / 2
        half.append((trial.roles, dataclasses.replace(trial.shadows, unlearned=between)))
    assert ulira(half, philox(0, "ulira")).found[1] and klom(half, philox(0, "klom")).found[1]


# routing


def test_routing_is_the_distance_to_the_prototype(run, workdir, tmp_path):
    found = routing.routing(run, 0)
    clustering, live = load_clustering(run.layout, run.catalog.manifest().clustering), run.catalog.live("train")
    sampled = np.isin(live.ids, clustering.sample)
    near = cdist(run.features(live), clustering.prototypes).min(axis=1)
    assert found.published.auc == pytest.approx(roc_auc_score(sampled, -near))
    assert (found.clusters, found.single) == (len(clustering.keys), 0) and found.public is not None
    shutil.copytree(workdir, tmp_path / "copy", copy_function=shutil.copy2)
    order = philox(0, "attack", "routing").permutation(len(clustering.sample))
    gone = [clustering.sample[i] for i in order[: len(order) // 2]]
    with small_run(tmp_path / "copy", noisy_source(), small_config(**LEARNT)) as copy:
        erase.request_erasure(copy, gone)
        after = load_clustering(copy.layout, copy.catalog.manifest().clustering)
    near = cdist(run.features(live), after.prototypes).min(axis=1)
    counts = np.isin(live.ids, gone) | ~np.isin(live.ids, [*clustering.sample, *after.sample])
    assert found.erased.auc == pytest.approx(roc_auc_score(np.isin(live.ids, gone)[counts], -near[counts]))


def test_prototypes_of_single_records_are_private_features(tmp_path):
    config = small_config(clustering__cut="auto:30", clustering__max_members=0, clustering__min_members=0)
    with small_run(tmp_path / "run", config=config) as run:
        build(run)
        found = routing.routing(run, 0)
        counted = Counter(load_clustering(run.layout, run.catalog.manifest().clustering).labels.tolist())
    assert found.single == sum(count == 1 for count in counted.values()) == 30
    assert found.published.auc > 0.99 and found.found == (True, False, False)
    assert found.published.p < 1e-9 and found.erased.p > 0.005 and found.public.p > 0.005


def test_public_prototypes_say_nothing(tmp_path):
    with small_run(tmp_path / "run", config=small_config(clustering__sample_from="public")) as run:
        build(run)
        found = routing.routing(run, 0)
        members = run.catalog.members(run.catalog.live("train").clusters[0]).ids
        able, refused = targets._able(run, members)
        stays = refused["its cluster would keep fewer than 4 members"]
        assert len(stays) == targets.LEFT and sorted([*able, *stays]) == sorted(members)
    assert found.found == (False, False, False) and found.erased is found.public is None and found.single == 0


# the command


def test_the_command(workdir, capsys, tmp_path):
    files = [f"--json={tmp_path}/a.json", f"--figure={tmp_path}/roc.png"]
    arguments = ["attack", f"--workdir={workdir}", "--targets=8", "--shadows=4", "--attacks=loss,lira,routing", *files]
    before = contents(workdir)
    assert main(arguments) == 0
    out, values = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert contents(workdir) == before and (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert values["ok"] and values["targets"] == 8 and set(values["findings"]) == {"loss", "lira", "routing"}
    assert f"{values['findings']['lira']['columns'][0]['auc']:.3f} [" in out and "kept = control" in out
    assert "too few images for some false positive rates: 1.0% needs 100, 0.1% needs 1000" in out
    assert not any(name in out + (tmp_path / "a.json").read_text() for name in ("digit-", "hand-"))


def found_of(rng, *shifts):
    """What LiRA finds where members lie so much above others in the three slices; the same noise in all."""
    noise = rng.normal(size=120) + 0.3 * rng.normal(size=(3, 120))
    return membership.membership("lira", noise[:, :60] + np.array(shifts)[:, None], noise[:, 60:], rng)


def test_a_leak_is_found_also_where_training_images_differ_from_others(result, rng):
    """A slice that never saw the records tells them from test images, too: what counts is what is above that."""
    found = found_of(rng, 3.0, 2.5, 0.8)
    assert [round(column.auc, 2) for column in found.columns] == pytest.approx([0.98, 0.96, 0.71], abs=0.04)
    assert all(column.p < 1e-4 for column in found.columns)
    leaky = dataclasses.replace(result, findings=(found,))
    assert leaky.leaks == ("lira",) and leaky.code == 1 and not leaky.values()["ok"]
    assert "FINDS ERASED RECORDS; SHIFTED REFERENCE" in leaky.text()
    clean = dataclasses.replace(result, findings=(found_of(rng, 3.0, 0.8, 0.8),))
    assert clean.leaks == () and clean.shifted == ("lira",) and clean.code == 0
    assert "differs from test images already without having seen the records; beyond that it finds" in clean.text()
    nothing = dataclasses.replace(result, findings=(found_of(rng, 1.2, 1.2, 1.2),))
    assert nothing.blind == nothing.shifted == ("lira",) and nothing.code == 3 and not nothing.values()["ok"]
    assert "INCONCLUSIVE: SHIFTED REFERENCE" in nothing.text() and "nothing can be said" in nothing.text()


def test_a_leak_and_a_blind_attack_are_said_loudly(result, workdir, monkeypatch, capsys, rng):
    leaky, blind = found_of(rng, 2.0, 2.0, 0.0), found_of(rng, 0.0, 0.0, 0.0)
    monkeypatch.setattr(attacks, "attack", lambda *_: dataclasses.replace(result, findings=(leaky,)))
    assert main(["attack", f"--workdir={workdir}"]) == 1
    text = capsys.readouterr().out
    assert "FINDS ERASED RECORDS\n" in text and "LEAK: erased records found by lira" in text
    monkeypatch.setattr(attacks, "attack", lambda *_: dataclasses.replace(result, findings=(blind,)))
    assert main(["attack", f"--workdir={workdir}"]) == 3
    text = capsys.readouterr().out
    assert "POSITIVE CONTROL FAILED" in text and "nothing can be said" in text
    alone = relearning.Relearn(((0,), (30,), (30,)), (0.25, 1.0, 1.0), 3)
    few = dataclasses.replace(result, findings=(alone,))
    assert few.powerless == ("relearn",) and few.blind == () and few.code == 3
    assert "NO POWER" in few.text() and "no chance falls below 0.25" in few.text() and "FAILED" not in few.text()
    working = dataclasses.replace(result, findings=(alone, found_of(rng, 2.0, 0.0, 0.0)))
    assert working.code == 0 and "NO POWER" in working.text() and "no attack finds an erased record" in working.text()


def test_the_figure_draws_without_pyplot(tmp_path):
    """A program of its own: nothing else may have imported pyplot, and no backend is chosen for the caller."""
    code = (
        "import sys, numpy as np, matplotlib\n"
        "from pathlib import Path\n"
        "from lmeraser_jax.attacks import membership, report\n"
        "scores = np.random.default_rng(0).normal(size=(3, 300))\n"
        "found = membership.membership('lira', scores[:, :150] + 1, scores[:, 150:], np.random.default_rng(0))\n"
        "report.figure([found], Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "folder" / "roc.png")], check=True)
    assert (tmp_path / "folder" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_without_matplotlib_is_refused_before_the_work(workdir, monkeypatch, capsys):
    monkeypatch.setattr(attacks, "attack", lambda *_: pytest.fail("the work was begun"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["attack", f"--workdir={workdir}", "--figure=roc.png"]) == 2
    assert "figures need matplotlib; install it with: pip install matplotlib" in capsys.readouterr().err


# the common head


def test_the_common_head_is_attacked(tmp_path):
    """What is played is what an erasure publishes; a head of all records by heart gives them away, until they go."""
    config = small_config(
        **METHODS["heads"] | {"common__method": "ridge", "common__penalty": 1e-4, "common__expand": 64}
    )
    with small_run(tmp_path / "run", noisy_source(), config) as run:
        build(run)
        options = dataclasses.replace(OPTIONS, attacks=("loss", "common"))
        found = attacks.attack(run, options)
        assert found.skipped == () and found.shadows == OPTIONS.shadows
        one = found.findings[1]
        assert one.name == "common" and one.found[:2] == (True, False) and one.columns[0].members == OPTIONS.targets
        assert one.beyond[1].value == 0, "a formula has no random streams"
        drawn = targets.draw(run, (), OPTIONS.targets, OPTIONS.seed)
        pool = common_head.everybody(run, run.catalog.manifest().entries[SliceKind.COMMON], drawn.pools, OPTIONS.seed)
        names = pool.of(FORGOTTEN).ids
        assert pool.of(FORGOTTEN, RETAINED).ids == run.catalog.live("train").ids and len(names) == OPTIONS.targets
        assert {run.catalog.live("test").ids.index(name) for name in pool.of(OUTSIDE).ids}
        (played,), _ = shadows.tuned(run, run.common_spec, [shadows.unlearned_world(pool)])
        kept = load_slice(run, pool.ref)
        erase.request_erasure(run, names)
        published = load_slice(run, run.catalog.manifest().entries[SliceKind.COMMON])
        assert same_bits(played, published) and not same_bits(kept, published)


def test_bad_input_is_told_at_once(run, workdir, capsys, tmp_path):
    def refused(*flags):
        code = main(["attack", f"--workdir={workdir}", *flags])
        assert code == 2
        return capsys.readouterr().err

    message = refused("--attacks=lira,spy", "--shadows=3", "--targets=1")
    assert "--attacks=spy" in message and "legal: loss, rmia, lira, ulira, klom, relearn, common, routing" in message
    assert "--shadows=3: must be at least 4" in message and "--targets=1: must be at least 2" in message
    assert "--targets=5000: must be at most " in refused("--targets=5000")
    sampled = load_clustering(run.layout, run.catalog.manifest().clustering).sample[0]
    message = refused(f"--records=nobody,{sampled}")
    assert "--records=nobody: no live training record" in message
    assert f"--records={sampled}: sampled for the clustering" in message
    assert "--figure=a.jpg" in refused("--figure=a.jpg")
    assert "ROC curves are those of" in refused("--figure=a.png", "--attacks=ulira,klom")
    (tmp_path / "file").write_text("")
    assert "roc.png cannot be written" in refused(f"--figure={tmp_path}/file/roc.png")
    with small_run(tmp_path / "empty", noisy_source()):
        pass
    workdir = tmp_path / "empty"
    assert "has no published state to attack" in refused()


def test_a_workdir_without_test_images_has_nothing_to_compare_with(tmp_path):
    with small_run(tmp_path / "run", small_source(test=0)) as run:
        build(run)
        with pytest.raises(UserError, match="has no test or hold-out images to compare with"):
            attacks.attack(run, Options(targets=2, attacks=("loss",)))
        assert attacks.attack(run, Options(attacks=("routing",))).findings[0].name == "routing"
        one_head = dataclasses.replace(
            run.config, tuning=dataclasses.replace(run.config.tuning, method="prompts+one head")
        )
        (message,) = targets.problems(dataclasses.replace(run, config=one_head), (), 2)
        assert "all clusters are one slice" in message and "legal: --attacks=routing" in message
        erase.request_erasure(run, run.catalog.live("train").ids[:1], defer=True)
        with pytest.raises(UserError, match="an erasure is not finished"):
            attacks.attack(run, Options(attacks=("routing",)))


def test_named_records_are_the_targets(run):
    sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
    able, _ = targets._able(run, run.catalog.live("train").ids)
    assert len(able) <= 70 and sample.isdisjoint(able)
    drawn = targets.draw(run, able[:3], 64, 0)
    assert sorted(name for pool in drawn.pools for name in pool.of(FORGOTTEN).ids) == able[:3] and drawn.slices == 0
    assert not any(len(pool.of(VALIDATION)) for pool in drawn.pools)


def test_an_erasure_meanwhile_voids_the_result(workdir, tmp_path, monkeypatch):
    shutil.copytree(workdir, tmp_path / "copy", copy_function=shutil.copy2)
    play = attacks._trials

    def meanwhile(run, drawn, options):
        done = play(run, drawn, options)
        with small_run(tmp_path / "copy", noisy_source(), small_config(**LEARNT)) as writer:
            erase.request_erasure(writer, drawn.pools[0].of(FORGOTTEN).ids[:1])
        return done

    monkeypatch.setattr(attacks, "_trials", meanwhile)
    with (
        open_run(tmp_path / "copy", devices=jax.devices()[:1]) as run,
        pytest.raises(UserError, match="were erased while"),
    ):
        attacks.attack(run, Options(targets=16, attacks=("loss",)))
