"""Numbers that show imbalance: balanced accuracy, the largest class as an answer, classes with their shares."""

import dataclasses
import json

import numpy as np
import pytest
from fakes import fast_fakes
from helpers import small_run, small_source, without
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from lmeraser_jax.evaluation import linear_head, overview
from lmeraser_jax.evaluation.accuracy import balanced_accuracy, class_scores, evaluate
from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.unlearning.build import build


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Digits with few sixes and no nines left to train on; nines stay among the test images."""
    source = small_source(train=120, test=40)
    sixes = [item.id for item in source.items if item.split == "train" and item.label == 6]
    nines = {item.id for item in source.items if item.split == "train" and item.label == 9}
    with pytest.MonkeyPatch.context() as patch:
        fast_fakes(patch)
        with small_run(tmp_path_factory.mktemp("run") / "w", without(source, nines | set(sixes[3:]))) as run:
            build(run)
            yield run


@pytest.fixture(scope="module")
def result(run):
    return evaluate(run)


def test_balanced_accuracy_and_class_scores(rng):
    """As scikit-learn has them, for classes of any size."""
    for _ in range(20):
        labels = rng.choice(5, 200, p=[0.7, 0.2, 0.06, 0.04, 0.0]).astype(np.int32)
        answers = np.where(rng.random(200) < 0.6, labels, rng.integers(0, 5, 200)).astype(np.int32)
        present = np.unique(labels)
        recalls = recall_score(labels, answers, labels=present, average=None)
        np.testing.assert_allclose(balanced_accuracy(labels, answers), recalls.mean())
        scores = class_scores(labels, answers, "abcde")
        np.testing.assert_allclose([scores["abcde"[label]]["accuracy"] for label in present], recalls)
        assert [score["images"] for score in scores.values()] == np.bincount(labels, minlength=5).tolist()
        assert scores["e"] == {"images": 0, "accuracy": None}


def test_evaluation_against_scikit_learn(run, result):
    test, train = run.catalog.live("test"), run.catalog.live("train")
    answers = predict(load_model(run), run.images[test.rows]).labels
    assert result.accuracy == pytest.approx(accuracy_score(test.labels, answers))
    assert result.balanced == pytest.approx(balanced_accuracy_score(test.labels, answers))
    always = DummyClassifier(strategy="most_frequent").fit(train.labels[:, None], train.labels)
    assert result.largest == run.classes[always.predict([[0]])[0]]
    assert result.majority == pytest.approx(always.score(test.labels[:, None], test.labels))
    assert result.majority_balanced == pytest.approx(1 / len(set(test.labels.tolist())))
    head = linear_head.fit_predict(run.features(train), train.labels, run.features(test))
    assert result.linear == pytest.approx(accuracy_score(test.labels, head))
    assert result.linear_balanced == pytest.approx(balanced_accuracy_score(test.labels, head))
    assert result.linear != result.linear_balanced != result.balanced
    hits = sum(score["images"] * (score["accuracy"] or 0) for score in result.classes.values())
    assert hits == pytest.approx(result.accuracy * len(test))


def test_table_and_values(run, result):
    head, names, *rows = result.table().splitlines()[:5]
    assert head == "test: 40 images" and names.split() == ["accuracy", "balanced"]
    scores = [(result.accuracy, result.balanced), (result.linear, result.linear_balanced)]
    scores.append((result.majority, result.majority_balanced))
    for row, (accuracy, balanced) in zip(rows, scores, strict=True):
        assert len(row) == len(names) and row.endswith(f"{accuracy:>10.4f}{balanced:>10.4f}")
    assert "LMEraser" in rows[0] and "linear head" in rows[1] and f"always {result.largest}," in rows[2]
    values = json.loads(json.dumps(result.values()))
    assert list(values["classes"]) == list(run.classes) and values["classes"]["6"] == result.classes["6"]
    plain = evaluate(run, linear=False)
    assert plain == dataclasses.replace(result, linear=None, linear_balanced=None)
    assert "linear" not in plain.table()


def test_overview_shows_the_classes(run):
    train, shown = run.catalog.live("train"), overview.overview(run.layout, run.catalog, run.config)
    assert {row.name: row.records for row in shown.classes} == {
        name: int((train.labels == label).sum()) for label, name in enumerate(run.classes)
    }
    records = [row.records for row in shown.classes]
    assert records == sorted(records, reverse=True) and records[-1] == 0 and shown.imbalance == records[0] / 3
    assert sum(row.share for row in shown.classes) == pytest.approx(1)
    head, *rows = shown.class_table().splitlines()
    assert "10 classes (1 without records)" in head
    assert f"the largest has {records[0] / 3:.1f} times the records of the smallest" in head
    assert [row.split()[:2] for row in rows] == [[c.name, str(c.records)] for c in shown.classes]
    assert shown.class_table() in shown.table() and len({len(row) for row in rows}) == 1
    assert json.loads(json.dumps(shown.values()))["classes"][9] == {"name": "9", "records": 0, "share": 0.0}


def test_many_classes_show_their_ends(run):
    rows = tuple(overview.ClassRow(f"class {i}", 50 - i, (50 - i) / 1000) for i in range(40))
    shown = dataclasses.replace(overview.overview(run.layout, run.catalog, run.config), classes=rows, imbalance=50 / 11)
    lines = shown.class_table().splitlines()
    assert [line.split()[1] for line in lines[1:6] + lines[7:]] == [*"01234", *map(str, range(35, 40))]
    assert "40 classes, the largest has 4.5 times" in lines[0] and "30 classes between" in lines[6]
    assert len(dataclasses.replace(shown, classes=rows[:12]).class_table().splitlines()) == 13
    assert len(shown.values()["classes"]) == 40
