"""Closed-form heads: against scikit-learn, and sums that are the same bits in any order and after any removal."""

import contextlib
import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config, small_run, small_source, without
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.row_file import RowFile
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.training import closed_form
from lmeraser_jax.unlearning import erase, purge
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import Run

CLASSES, WIDTH = 4, 12
RIDGE = small_config(clustering__partition="one", tuning__method="ridge")


def members(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around a mean for each class; the spread differs between features."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    means = np.random.default_rng(9).normal(size=(CLASSES, WIDTH))
    noise = rng.normal(size=(count, WIDTH)) * np.linspace(0.1, 3, WIDTH)
    return (means[labels] + noise).astype(np.float32), labels


def test_ridge_is_that_of_scikit_learn():
    features, labels = members(200)
    rounded = closed_form.to_fixed_point(features) / closed_form.SCALE
    penalty, onehot = 0.3, np.eye(CLASSES)[labels]
    scaler = StandardScaler().fit(rounded)
    known = Ridge(alpha=penalty * len(labels)).fit(scaler.transform(rounded), onehot)
    head, _ = closed_form.ridge(closed_form.add_up(features, labels, CLASSES), penalty)
    wanted = closed_form.SHARPNESS * known.predict(scaler.transform(rounded))
    np.testing.assert_allclose(rounded @ head.kernel + head.bias, wanted, atol=2e-5)


def test_the_nearest_class_mean_is_that_of_scikit_learn():
    features, labels = members(300)
    others, _ = members(500, seed=1)
    known = NearestCentroid().fit(closed_form.to_fixed_point(features), labels)
    head, _ = closed_form.solve_members(Tuning(method="ncm"), features, labels, CLASSES)
    rounded = closed_form.to_fixed_point(others)
    answers = (rounded / closed_form.SCALE @ head.kernel + head.bias).argmax(axis=1)
    np.testing.assert_array_equal(answers, known.predict(rounded))


def test_a_class_without_members_is_never_the_answer():
    features, labels = members(60)
    others = labels != 2
    for method in ("ncm", "ridge"):
        head, _ = closed_form.solve_members(Tuning(method=method), features[others], labels[others], CLASSES)
        assert not ((features @ head.kernel + head.bias).argmax(axis=1) == 2).any(), method


def assert_same_sums(sums: closed_form.Sums, expected: closed_form.Sums) -> None:
    for name in ("products", "by_class", "counts"):
        assert getattr(sums, name).tobytes() == getattr(expected, name).tobytes(), name


def test_sums_are_the_same_bits_in_any_order_and_in_any_chunks(monkeypatch):
    features, labels = members(101)
    whole = closed_form.add_up(features, labels, CLASSES)
    order = np.random.default_rng(0).permutation(101)
    assert_same_sums(closed_form.add_up(features[order], labels[order], CLASSES), whole)
    for method in ("ridge", "ncm"):
        head, _ = closed_form.solve_members(Tuning(method=method), features, labels, CLASSES)
        shuffled, _ = closed_form.solve_members(Tuning(method=method), features[order], labels[order], CLASSES)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(head[:3], shuffled[:3], strict=True)), method
    monkeypatch.setattr(closed_form, "CHUNK", 7)
    assert_same_sums(closed_form.add_up(features, labels, CLASSES), whole)


def test_float64_holds_every_sum_of_a_chunk():
    largest = (closed_form.LARGEST * closed_form.SCALE) ** 2 * closed_form.CHUNK
    assert largest < 2**53


def test_the_loss_is_the_number_that_the_formula_minimises():
    """Ridge: the squared error on one-hot labels; nearest class mean: the squared distance to one's own mean."""
    features, labels = members(50)
    head, loss = closed_form.solve_members(Tuning(method="ridge"), features, labels, CLASSES)
    rounded, onehot = closed_form.to_fixed_point(features) / closed_form.SCALE, np.eye(CLASSES)[labels]
    wrong = (rounded @ head.kernel.astype(np.float64) + head.bias) / closed_form.SHARPNESS - onehot
    assert loss == pytest.approx((wrong**2).sum(axis=1).mean(), rel=1e-4)
    head, loss = closed_form.solve_members(Tuning(method="ncm"), features, labels, CLASSES)
    own = np.stack([rounded[labels == y].mean(axis=0) for y in range(CLASSES)])[labels]
    assert loss == pytest.approx(((rounded - own) ** 2).sum(axis=1).mean())


class Watched:
    """Features that note which rows are read."""

    def __init__(self, values):
        self.values, self.rows = values, []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.rows += rows.tolist()
        return self.values[rows]


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 30), st.integers(0, 1000))
def test_sums_after_a_subtraction_are_those_of_the_others_and_read_only_the_removed(left, removed, strangers, seed):
    count = left + removed + strangers
    features, labels = members(count, seed)
    features = features * 37.7  # some beyond the largest
    rows = np.random.default_rng(seed).permutation(count).astype(np.int32)[: left + removed]
    remaining = rows[np.sort(np.random.default_rng(seed + 1).permutation(left + removed)[:left])]
    watched = Watched(features)
    sums = closed_form.keep_sums(features[rows], labels[rows], rows, CLASSES).without(remaining, labels, watched)
    fresh = closed_form.keep_sums(features[remaining], labels[remaining], remaining, CLASSES)
    assert_same_sums(sums.total, fresh.total)
    assert all(np.array_equal(getattr(sums, name), getattr(fresh, name)) for name in ("rows", "labels", "checksums"))
    assert sorted(watched.rows) == sorted(set(rows.tolist()) - set(remaining.tolist()))


def test_a_subtraction_that_would_not_be_exact_is_refused():
    features, labels = members(20)
    rows = np.arange(15, dtype=np.int32)
    whole = closed_form.keep_sums(features[rows], labels[rows], rows, CLASSES)
    other_labels, other_features = labels.copy(), features.copy()
    other_labels[3] = (labels[3] + 1) % CLASSES
    other_features[14, 0] = np.nextafter(features[14, 0], np.float32(9))
    assert whole.without(rows[:14], labels, features) is not None
    assert whole.without(rows[:14], other_labels, features) is None, "a remaining member has another label"
    assert whole.without(rows[:14], labels, other_features) is None, "the removed member has another feature"
    assert whole.without(rows[:13], labels, features[:14]) is None, "a row that is not there"
    assert whole.without(np.array([0, 1, 17], np.int32), labels, features) is None, "a member was added"
    assert whole.without(rows[:14][::-1], labels, features) is None, "another order of ids"


def test_sums_are_read_back_or_not_at_all(tmp_path):
    features, labels = members(30)
    whole = closed_form.keep_sums(features, labels, np.arange(30, dtype=np.int32), CLASSES)
    assert closed_form.load_sums(tmp_path) is None
    closed_form.save_sums(tmp_path, whole)
    read = closed_form.load_sums(tmp_path)
    assert_same_sums(read.total, whole.total)
    assert np.array_equal(read.checksums, whole.checksums)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for place in range(0, len(content), 97):  # a flipped bit is noticed, or is in no number
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        flipped = closed_form.load_sums(tmp_path)
        if flipped is not None:
            assert_same_sums(flipped.total, whole.total)
    file.write_bytes(content[: len(content) // 2])
    assert closed_form.load_sums(tmp_path) is None


def test_random_cosines_approximate_the_kernel_of_directions():
    """Mean of products of cosines -> half the Gaussian kernel of the features' directions (Rahimi and Recht)."""
    features, _ = members(20)
    expanded = closed_form.expand(features, 20_000)
    assert np.array_equal(expanded[:, :WIDTH], features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gaps = ((unit[:, None] - unit[None]) ** 2).sum(axis=-1)
    kernel = expanded[:, WIDTH:] @ expanded[:, WIDTH:].T / 20_000
    np.testing.assert_allclose(kernel, 0.5 * np.exp(-0.5 * closed_form.BANDWIDTH**2 * gaps), atol=0.03)
    on_device = closed_form.expand(jnp.asarray(features), 50)
    np.testing.assert_allclose(on_device, closed_form.expand(features, 50), atol=1e-5)


# -- in a workdir --


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a ridge head of all records, whose sums are kept."""
    root = tmp_path_factory.mktemp("ridge") / "run"
    with pytest.MonkeyPatch.context() as patch, small_run(root, config=RIDGE) as run:
        patch.setattr(closed_form, "KEPT_FROM", 1)
        build(run)
    return root


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def added_up(monkeypatch):
    """How many members each call of `add_up` had."""
    counts, add_up = [], closed_form.add_up

    def watched(features, labels, classes):
        counts.append(len(features))
        return add_up(features, labels, classes)

    monkeypatch.setattr(closed_form, "KEPT_FROM", 1)
    monkeypatch.setattr(closed_form, "add_up", watched)
    return counts


def slices_with_sums(run):
    return sorted(path.parent.name for path in run.layout.slices.glob(f"*/{closed_form.SUMS_FILE}"))


def test_an_erasure_subtracts_and_gives_the_bits_of_never_having_had_them(workdir, tmp_path, added_up, monkeypatch):
    def no_features(run, table):
        raise AssertionError("other records' features are read")

    with small_run(workdir, config=RIDGE) as run:
        records = run.catalog.live("train").ids
        with monkeypatch.context() as patch:
            patch.setattr(Run, "features", no_features)
            for names in (records[3:4], records[40:45]):
                erase.request_erasure(run, names)
                assert slices_with_sums(run) == sorted(run.catalog.manifest().entries.values())
        assert added_up == [1, 5]
        after = state(run)
        assert audit(run).ok and not purge.leftovers(run)
    erased = {*records[3:4], *records[40:45]}
    with small_run(tmp_path / "fresh", without(small_source(), erased), RIDGE) as run:
        build(run)
        assert added_up[-1] == len(records) - 6 and differences(after, state(run)) == []


@pytest.mark.parametrize("change", ["no sums", "other sums", "other products", "feature", "fingerprint", "settings"])
def test_sums_from_which_nothing_can_be_subtracted_exactly_are_added_up_again(workdir, added_up, change):
    with small_run(workdir, config=RIDGE) as run:
        (path,) = run.layout.slices.glob(f"*/{closed_form.SUMS_FILE}")
        sums = closed_form.load_sums(path.parent)
        products = dataclasses.replace(sums.total, products=2**20 * np.eye(16, dtype=np.int64))
        others = {"other sums": sums.total + sums.total, "other products": products}
        settings = "tuning=replace(tuning, '\"penalty\":0.1', '\"penalty\":0.2')"
        columns = {"fingerprint": "fingerprint='another'", "settings": settings}
        if change == "no sums":
            path.unlink()
        elif change in others:
            closed_form.save_sums(path.parent, dataclasses.replace(sums, total=others[change]))
        elif change in columns:
            with contextlib.closing(Catalog(run.layout.catalog)) as other:
                other.db.execute(f"UPDATE slices SET {columns[change]}")
        else:  # the feature of the record that is going to be erased
            (features,) = run.layout.records.glob("features-*.f32")
            view = RowFile(features, (16,), np.float32).view("r+")
            view[run.catalog.live("train").rows[7]] += 0.5
            view.flush()
        erase.request_erasure(run, run.catalog.live("train").ids[7:8])
        assert added_up[-1] == 99 and audit(run).ok


def test_a_kill_before_the_sums_are_written_costs_adding_up_once(workdir, added_up, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with small_run(workdir, config=RIDGE) as run:
        records = run.catalog.live("train").ids
        with monkeypatch.context() as patch:
            patch.setattr(closed_form, "save_sums", kill)
            with pytest.raises(KeyboardInterrupt):
                erase.request_erasure(run, records[:1])
    with small_run(workdir, config=RIDGE) as run:
        assert build(run).adopted == 1 and not slices_with_sums(run)
        erase.request_erasure(run, records[1:2])
        erase.request_erasure(run, records[2:3])
        assert added_up == [1, len(records) - 2, 1] and audit(run).ok
