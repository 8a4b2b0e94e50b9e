"""Attacks on a small workdir: what they tune in memory is what an erasure publishes, controls work, leaks are found."""

import dataclasses
import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from fakes import fast_fakes
from helpers import small_config, small_run, small_source, with_items
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from lmeraser_jax.cli.main import main
from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.attacks import attack as attacks
from lmeraser_jax.evaluation.attacks import (
    options,
    relearn,
    routing,
    shadows,
    statistics,
    targets,
    unlearned,
)
from lmeraser_jax.evaluation.attacks.options import ATTACKS, Options
from lmeraser_jax.evaluation.attacks.report import Finding
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, OUTSIDE, RETAINED, VALIDATION
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.hashing import philox
from lmeraser_jax.storage.workdir import Layout, writer_lock
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.artifacts import load_clustering, load_slice
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run

LEARNT = {"tuning__lanes": shadows.LANES, "tuning__epochs": 40, "tuning__head_rate": 0.05}  # one program with shadows
OPTIONS = Options(targets=16, shadows=16, seed=1)


def noisy_source():
    """Digits of which two in three, in every split, have a random label: a slice can only learn them by heart."""
    source, draw = small_source(train=100, test=100), np.random.default_rng(5)
    items = [item._replace(label=int(draw.integers(10))) if draw.random() < 0.67 else item for item in source.items]
    return with_items(source, items, source.read(range(len(items))).rows)


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


@pytest.fixture
def writer(workdir, tmp_path):
    """A writer on a copy of the workdir."""
    shutil.copytree(workdir, tmp_path / "copy", copy_function=shutil.copy2)
    with small_run(tmp_path / "copy", noisy_source(), small_config(**LEARNT)) as run:
        yield run


@pytest.fixture(scope="module")
def attacked(workdir):
    """A whole attack and its trials, while another process may be writing; nothing in the workdir changes."""
    before, trials, real = contents(workdir), [], attacks._trials
    with (
        pytest.MonkeyPatch.context() as patch,
        writer_lock(Layout(workdir)),
        open_run(workdir, devices=jax.devices()[:1]) as run,
    ):
        patch.setattr(attacks, "_trials", lambda *arguments: trials.extend(real(*arguments)) or trials)
        result = attacks.attack(run, OPTIONS)
        assert not run.writable
    assert contents(workdir) == before
    return result, trials


@pytest.fixture
def result(attacked):
    return attacked[0]


@pytest.fixture
def trials(attacked):
    return attacked[1]


def contents(workdir):
    """Every byte of a workdir but those of SQLite's shared memory and the lock."""
    files = (path for path in sorted(workdir.rglob("*")) if path.is_file())
    return {str(p): p.read_bytes() for p in files if not p.name.endswith(("-shm", "-wal")) and p.name != "lock"}


def same_bits(first, second):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_the_unlearned_slice_is_what_an_erasure_publishes(trials, writer):
    """Bit for bit, for every attacked cluster, after one request for all targets."""
    names = [name for trial in trials for name in trial.pool.of(FORGOTTEN).ids]
    kept = {trial.pool.key: load_slice(writer, writer.catalog.manifest().entries[trial.pool.key]) for trial in trials}
    erase.request_erasure(writer, names)
    for trial in trials:
        published = load_slice(writer, writer.catalog.manifest().entries[trial.pool.key])
        assert same_bits(trial.slices[0], kept[trial.pool.key])
        assert same_bits(trial.slices[1], published) and not same_bits(trial.slices[0], published)
        assert not any(same_bits(scratch, published) for scratch in trial.slices[2:])
        assert not same_bits(trial.again, trial.slices[0])


SHARDS = {"clustering__partition": "random", "clustering__shards": 3, "tuning__method": "ridge", "tuning__expand": 8}
METHODS = {
    "heads": {"tuning__method": "head"},
    "shards": SHARDS,
    "backbones": {"clustering__partition": "one", "tuning__method": "backbone", "tuning__epochs": 1},
    "adapters": {"tuning__method": "lora", "tuning__rank": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_slices_of_every_method_are_tuned_in_memory_as_they_are_published(method, tmp_path):
    """A cluster's own members give the published bits, and the logits that predictions are made of."""
    with small_run(tmp_path / "run", config=small_config(**METHODS[method])) as run:
        build(run)
    with open_run(tmp_path / "run", devices=jax.devices()[:1]) as run:
        model, test = load_model(run), run.catalog.live("test")
        clusters = [(key, run.catalog.members(key)) for key in model.keys]
        slices = shadows.tune_counterfactuals(run, run.tuning_spec, clusters)
        assert all(same_bits(slice_, load_slice(run, ref)) for slice_, ref in zip(slices, model.refs, strict=True))
        answers = predict(model, run.images[test.rows])
        logits = shadows.logits(run, slices, test.rows)[answers.clusters[:, 0], np.arange(len(test))]
    np.testing.assert_allclose(jax.nn.softmax(logits, axis=-1), answers.probabilities, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "skipped"), [("heads", ()), ("shards", ("relearn", "routing"))])
def test_slices_of_other_methods_are_attacked(method, skipped, tmp_path):
    """Shards have no prototypes to route by, a closed form has no steps to count."""
    config = small_config(**METHODS[method] | {"tuning__epochs": 40, "tuning__penalty": 1e-3})
    with small_run(tmp_path / "run", noisy_source(), config) as run:
        build(run)
        result = attacks.attack(run, OPTIONS)
    assert result.skipped == skipped and result.text().count("nothing to attack") == len(skipped)
    assert result.leaks == () and all(f.detected[0] for f in result.findings if f.name in ("lira", "ulira"))


def test_targets_are_the_hardest_and_others_are_as_hard(run, trials):
    """Targets are live, unsampled and of their cluster; images outside are routed there."""
    sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
    test, forgotten = set(run.catalog.live("test").ids), []
    for trial in trials:
        pool, sets = trial.pool, trial.shadow_sets
        assert pool.of(FORGOTTEN, RETAINED).ids == run.catalog.members(pool.key).ids
        assert sample.isdisjoint(pool.of(FORGOTTEN).ids) and len(pool.of(RETAINED)) >= options.FEWEST_MEMBERS
        assert test.issuperset(pool.of(OUTSIDE, VALIDATION).ids)
        assert (sets.roles == pool.roles).all() and trial.margins.shape == (3, len(pool.roles))
        in_shadows = sets.roles != VALIDATION
        assert (sets.inside.sum(axis=0) >= 8 * in_shadows).all() and not sets.inside[:, ~in_shadows].any()
        assert not (sets.inside == sets.drawn)[:, in_shadows].all()
        forgotten += pool.of(FORGOTTEN).ids
    assert len(forgotten) == OPTIONS.targets
    unseen = np.concatenate([trial.margins[2, trial.pool.roles == FORGOTTEN] for trial in trials])
    retained = np.concatenate(
        [trial.shadow_sets.never[:, trial.pool.roles == RETAINED].mean(axis=0) for trial in trials]
    )
    assert unseen.mean() < retained.mean() - 1, "the hardest were to be taken"


def test_populations_are_tuned_on_the_records_that_they_name(trials):
    """Records that were drawn score higher; forgotten ones do not in the slices that unlearned or never saw them."""
    for sets in (trial.shadow_sets for trial in trials):
        hard = np.isin(sets.roles, (FORGOTTEN, OUTSIDE))
        kept, inside = sets.kept[:, hard], sets.inside[:, hard]
        assert kept[inside].mean() - kept[~inside].mean() > 2
        forgotten = sets.roles == FORGOTTEN
        inside = sets.inside[:, forgotten]
        for margins in (sets.unlearned, sets.never):
            assert margins[:, forgotten].mean() < sets.kept[:, forgotten][inside].mean() - 2
        changed = (sets.unlearned != sets.kept).any(axis=1)
        assert (changed == inside.any(axis=1)).all(), "a shadow that drew none of them has nothing to unlearn"


def test_the_controls_work_and_erased_records_are_not_found(result):
    assert {finding.name for finding in result.findings} == set(ATTACKS) and result.skipped == ()
    for finding in result.on_slices:
        assert finding.detected == (True, False, False), finding.name
    values = result.values()
    assert not [*values["leaks"], *values["powerless"], *values["shifted"]] and {*values["blind"]} <= {"routing"}
    assert result.code == 0 and result.accuracies["forgotten"][0] > result.accuracies["forgotten"][1] + 0.2


def leaking(trial):
    """The trial with the kept slice in the place of the unlearned one: an "unlearning" that does nothing."""
    sets = dataclasses.replace(trial.shadow_sets, unlearned=trial.shadow_sets.kept)
    slices = *trial.slices[:1] * 2, *trial.slices[2:]
    return trial._replace(margins=trial.margins[[0, 0, 2]], slices=slices, shadow_sets=sets)


def test_an_unlearning_that_does_nothing_is_found(run, trials):
    trials = [leaking(trial) for trial in trials]
    for name in set(ATTACKS) - {"routing", "relearn"}:
        assert attacks._finding(run, name, trials, OPTIONS).detected == (True, True, False), name
    finding = attacks._finding(run, "relearn", trials, OPTIONS)
    assert finding.detected[:2] == (True, True) and finding.values["steps"][1] == finding.values["steps"][0]


def test_a_residue_is_found(trials):
    """A weaker leak: half of what the records had left in the slices stays."""
    sets = [trial.shadow_sets for trial in trials]
    residue = [dataclasses.replace(s, unlearned=(s.kept + s.unlearned) / 2) for s in sets]
    assert all(attack(residue, philox(0, "residue")).detected[1] for attack in (unlearned.ulira, unlearned.klom))


def test_relearning_watches_every_step(run, trials):
    """The losses begin where the slices are, and fall to nearly nothing; ragged records and padding change nothing."""
    pool, slices = trials[0].pool, trials[0].slices
    records = pool.of(FORGOTTEN)
    losses = relearn.losses_while_relearning(run, pool.key, records, slices, len(records))
    start = statistics.losses(shadows.score(run, slices, records)[0]).mean(axis=1)
    assert losses.shape == (len(slices), relearn.STEPS + 1)
    np.testing.assert_allclose(losses[:, 0], start, rtol=1e-4)
    assert (losses[:, 1] < losses[:, 0]).all() and (losses[1:, -1] < 0.2 * losses[1:, 0]).all()
    padded = relearn.losses_while_relearning(run, pool.key, records, slices, len(records) + 7)
    np.testing.assert_allclose(padded, losses, rtol=1e-3, atol=1e-4)


def test_the_control_of_relearning_is_measured(run, trials):
    """A published slice that forgot the records fails as a control; one cluster alone has no power."""
    pools, again = [trial.pool for trial in trials], [trial.again for trial in trials]
    forgot = relearn.relearn(run, pools, [(trial.slices[1], *trial.slices[1:]) for trial in trials], again)
    steps = forgot.values["steps"]
    assert not forgot.detected[0] and min(steps[0]) > 0 and steps[0] == steps[1]
    single = relearn.relearn(run, pools[:1], [trials[0].slices], again[:1])
    assert single.smallest_p == 1 / (1 + len(trials[0].slices[2:])) > statistics.SIGNIFICANT
    assert single.powerless and single.detected == (False,) * 3


def test_routing_is_the_distance_to_the_prototype(run, writer):
    values = routing.routing(run, 0).values
    clustering, live = load_clustering(run.layout, run.catalog.manifest().clustering), run.catalog.live("train")
    near = cdist(run.features(live), clustering.prototypes).min(axis=1)
    assert values["published"].auc.value == pytest.approx(roc_auc_score(np.isin(live.ids, clustering.sample), -near))
    assert (values["clusters"], values["single"]) == (len(clustering.keys), 0) and values["public"] is not None
    order = philox(0, "attack", "routing").permutation(len(clustering.sample))
    erased = [clustering.sample[i] for i in order[: len(order) // 2]]
    erase.request_erasure(writer, erased)
    after = load_clustering(writer.layout, writer.catalog.manifest().clustering)
    near = cdist(run.features(live), after.prototypes).min(axis=1)
    counts = np.isin(live.ids, erased) | ~np.isin(live.ids, [*clustering.sample, *after.sample])
    area = roc_auc_score(np.isin(live.ids, erased)[counts], -near[counts])
    assert values["erased"].auc.value == pytest.approx(area)


def test_prototypes_of_single_records_are_private_features_and_public_ones_say_nothing(tmp_path, monkeypatch):
    fast_fakes(monkeypatch)
    config = small_config(clustering__cut="auto:30", clustering__max_members=0, clustering__min_members=0)
    with small_run(tmp_path / "single", config=config) as run:
        build(run)
        finding = routing.routing(run, 0)
        sizes = Counter(load_clustering(run.layout, run.catalog.manifest().clustering).labels.tolist())
    assert finding.values["single"] == sum(size == 1 for size in sizes.values()) == 30
    assert finding.values["published"].auc.value > 0.99 and finding.detected == (True, False, False)
    with small_run(tmp_path / "public", config=small_config(clustering__sample_from="public")) as run:
        build(run)
        finding = routing.routing(run, 0)
        members = run.catalog.members(run.catalog.live("train").clusters[0]).ids
        eligible, refused = options.eligible(run.layout, run.catalog, members)
    assert finding.detected == (False, False, False) and finding.values["single"] == 0
    assert finding.values["erased"] is finding.values["public"] is None
    kept = refused[f"its cluster would keep fewer than {options.FEWEST_MEMBERS} members"]
    assert len(kept) == options.FEWEST_MEMBERS and sorted([*eligible, *kept]) == sorted(members)


@pytest.mark.slow
def test_the_command_writes_a_table_and_json(workdir, capsys, tmp_path):
    arguments = ["attack", f"--workdir={workdir}", "--targets=8", "--shadows=4", "--attacks=loss,lira,routing"]
    arguments.append(f"--json={tmp_path}/a.json")
    before = contents(workdir)
    assert main(arguments) == 0
    out, text = capsys.readouterr().out, (tmp_path / "a.json").read_text()
    values = json.loads(text)
    assert contents(workdir) == before
    assert values["ok"] and values["targets"] == 8 and set(values["findings"]) == {"loss", "lira", "routing"}
    assert f"{values['findings']['lira']['columns'][0]['auc']['value']:.3f} [" in out and "kept = control" in out
    assert "too few records for some false positive rates: 1.0% needs 100, 0.1% needs 1000" in out
    assert not any(name in out + text for name in ("digit-", "hand-")), "no record is named"


def lira_finding(*shifts):
    """What LiRA finds where members lie so much above others in the three slices; the same noise in all."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=120) + 0.3 * rng.normal(size=(3, 120))
    return attacks.membership("lira", noise[:, :60] + np.array(shifts)[:, None], noise[:, 60:], rng)


def test_exit_codes_and_verdicts(result, workdir, monkeypatch, capsys):
    """A slice that never saw the records may tell them from test images, too: what counts is what is above that."""
    weak = Finding("relearn", (False,) * 3, 0.25, [("steps", "0", "30", "30")], {})
    good = lira_finding(2.0, 0.0, 0.0)
    cases = [
        ((lira_finding(2.0, 2.0, 0.0),), 1, ["FINDS ERASED RECORDS\n", "LEAK: erased records found by lira"]),
        ((lira_finding(3.0, 2.5, 0.8),), 1, ["FINDS ERASED RECORDS; SHIFTED REFERENCE", "LEAK"]),
        ((lira_finding(3.0, 0.8, 0.8),), 0, ["SHIFTED REFERENCE: differs from test", "; beyond that it finds"]),
        ((lira_finding(1.2, 1.2, 1.2),), 3, ["INCONCLUSIVE: SHIFTED REFERENCE", "nothing can be said"]),
        ((lira_finding(0.0, 0.0, 0.0),), 3, ["POSITIVE CONTROL FAILED", "nothing can be said"]),
        ((weak,), 3, ["NO POWER", "no chance falls below 0.25"]),
        ((weak, good), 0, ["NO POWER", "no attack finds an erased record"]),
    ]
    for findings, code, texts in cases:
        attack = dataclasses.replace(result, findings=findings)
        monkeypatch.setattr(attacks, "attack", lambda *_, attack=attack: attack)
        assert main(["attack", f"--workdir={workdir}"]) == code, texts
        out = capsys.readouterr().out
        assert all(text in out for text in texts), out
        assert attack.values()["ok"] == (code == 0) and bool(attack.leaks) == (code == 1)
        assert attack.values()["powerless"] == (["relearn"] if weak in findings else [])


def test_bad_input_is_refused_at_once(run, workdir, capsys, tmp_path):
    def refused(*flags, workdir=workdir):
        assert main(["attack", f"--workdir={workdir}", *flags]) == 2
        return capsys.readouterr().err

    message = refused("--attacks=lira,spy", "--shadows=3", "--targets=1")
    assert "--attacks=spy" in message and "legal: loss, lira, ulira, klom, relearn, routing" in message
    assert "--shadows=3: must be at least 4" in message and "--targets=1: must be at least 2" in message
    assert "--targets=5000: must be at most " in refused("--targets=5000")
    sampled = load_clustering(run.layout, run.catalog.manifest().clustering).sample[0]
    message = refused("--records=nobody", f"--records={sampled}")
    assert "--records=nobody: no live training record" in message
    assert f"--records={sampled}: sampled for the clustering" in message
    with small_run(tmp_path / "empty", noisy_source()):
        pass
    assert "has no published state to attack" in refused(workdir=tmp_path / "empty")


def test_a_workdir_without_test_images_has_nothing_to_compare_with(tmp_path, monkeypatch):
    fast_fakes(monkeypatch)
    with small_run(tmp_path / "run", small_source(test=0)) as run:
        build(run)
        with pytest.raises(UserError, match="has no test or hold-out records to compare with"):
            attacks.attack(run, Options(targets=2, attacks=("loss",)))
        assert attacks.attack(run, Options(attacks=("routing",))).findings[0].name == "routing"
        erase.request_erasure(run, run.catalog.live("train").ids[:1], defer=True)
        with pytest.raises(UserError, match="an erasure is not finished"):
            attacks.attack(run, Options(attacks=("routing",)))


def test_named_records_are_the_targets(run):
    sample = set(load_clustering(run.layout, run.catalog.manifest().clustering).sample)
    eligible, _ = options.eligible(run.layout, run.catalog, run.catalog.live("train").ids)
    assert len(eligible) <= 70 and sample.isdisjoint(eligible)
    pools = targets.draw(run, eligible[:3], 64, 0)
    assert sorted(name for pool in pools for name in pool.of(FORGOTTEN).ids) == eligible[:3]
    assert not any(len(pool.of(VALIDATION)) for pool in pools)


def test_an_erasure_during_the_attack_voids_the_result(writer, monkeypatch):
    real = attacks._trials

    def erased_meanwhile(run, options):
        trials = real(run, options)
        erase.request_erasure(writer, trials[0].pool.of(FORGOTTEN).ids[:1])
        return trials

    monkeypatch.setattr(attacks, "_trials", erased_meanwhile)
    with (
        open_run(writer.layout.root, devices=jax.devices()[:1]) as run,
        pytest.raises(UserError, match="were erased while"),
    ):
        attacks.attack(run, Options(targets=16, attacks=("loss",)))
