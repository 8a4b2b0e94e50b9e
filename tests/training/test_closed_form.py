"""Closed-form heads: against scikit-learn, and sums that are the same bits in any order and after any removal."""

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
    rounded = closed_form.fixed_point(features) / closed_form.STEPS
    penalty, onehot = 0.3, np.eye(CLASSES)[labels]
    scaler = StandardScaler().fit(rounded)
    known = Ridge(alpha=penalty * len(labels)).fit(scaler.transform(rounded), onehot)
    found, _ = closed_form.ridge(closed_form.sums(features, labels, CLASSES), penalty)
    wanted = closed_form.SHARPNESS * known.predict(scaler.transform(rounded))
    np.testing.assert_allclose(rounded @ found.kernel + found.bias, wanted, atol=2e-5)


def test_the_nearest_class_mean_is_that_of_scikit_learn():
    features, labels = members(300)
    wanted, _ = members(500, seed=1)
    known = NearestCentroid().fit(closed_form.fixed_point(features), labels)
    found, _ = closed_form.solve(Tuning(method="ncm"), features, labels, CLASSES)
    rounded = closed_form.fixed_point(wanted)
    answers = (rounded / closed_form.STEPS @ found.kernel + found.bias).argmax(axis=1)
    np.testing.assert_array_equal(answers, known.predict(rounded))


def test_a_class_without_members_is_never_the_answer():
    features, labels = members(60)
    kept = labels != 2
    for what in ("ncm", "ridge"):
        part, _ = closed_form.solve(Tuning(method=what), features[kept], labels[kept], CLASSES)
        assert not ((features @ part.kernel + part.bias).argmax(axis=1) == 2).any(), what


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 1000))
def test_what_is_left_after_removals_is_what_there_would_have_been(kept, gone, seed):
    features, labels = members(kept + gone, seed)
    order = np.random.default_rng(seed).permutation(kept + gone)
    features, labels = features * 37.7, labels  # some beyond the largest
    whole = closed_form.sums(features[order], labels[order], CLASSES)
    left = whole - closed_form.sums(features[kept:], labels[kept:], CLASSES)
    fresh = closed_form.sums(features[:kept], labels[:kept], CLASSES)
    for field in ("products", "by_class", "counts"):
        assert getattr(left, field).tobytes() == getattr(fresh, field).tobytes(), field
    for what in ("ridge", "ncm"):
        direct, _ = closed_form.solve(Tuning(method=what), features[:kept], labels[:kept], CLASSES)
        again, _ = closed_form.solve(Tuning(method=what), features[:kept][::-1], labels[:kept][::-1], CLASSES)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(direct[:3], again[:3], strict=True)), what


def test_sums_of_any_piece_size_are_the_same_bits(monkeypatch):
    features, labels = members(101)
    whole = closed_form.sums(features, labels, CLASSES)
    monkeypatch.setattr(closed_form, "PIECE", 7)
    pieces = closed_form.sums(features, labels, CLASSES)
    assert np.array_equal(whole.products, pieces.products) and np.array_equal(whole.by_class, pieces.by_class)


def test_float64_holds_every_sum_of_a_piece():
    largest = (closed_form.LARGEST * closed_form.STEPS) ** 2 * closed_form.PIECE
    assert largest < 2**53


def test_the_loss_is_what_the_formula_makes_small():
    """Ridge: the squared error on one-hot labels; nearest class mean: the squared distance to one's own mean."""
    features, labels = members(50)
    part, loss = closed_form.solve(Tuning(method="ridge"), features, labels, CLASSES)
    rounded, onehot = closed_form.fixed_point(features) / closed_form.STEPS, np.eye(CLASSES)[labels]
    wrong = (rounded @ part.kernel.astype(np.float64) + part.bias) / closed_form.SHARPNESS - onehot
    assert loss == pytest.approx((wrong**2).sum(axis=1).mean(), rel=1e-4)
    part, loss = closed_form.solve(Tuning(method="ncm"), features, labels, CLASSES)
    own = np.stack([rounded[labels == y].mean(axis=0) for y in range(CLASSES)])[labels]
    assert loss == pytest.approx(((rounded - own) ** 2).sum(axis=1).mean())


class Read:
    """Features that note which rows are read."""

    def __init__(self, values):
        self.values, self.rows = values, []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.rows += rows.tolist()
        return self.values[rows]


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 30), st.integers(0, 1000))
def test_a_tally_without_members_is_that_of_the_others_and_reads_only_those_who_go(kept, gone, strangers, seed):
    everyone = kept + gone + strangers
    features, labels = members(everyone, seed)
    features = features * 37.7  # some beyond the largest
    rows = np.random.default_rng(seed).permutation(everyone).astype(np.int32)[: kept + gone]
    stays = np.sort(np.random.default_rng(seed + 1).permutation(kept + gone)[:kept])
    whole = closed_form.kept_sums(features[rows], labels[rows], rows, CLASSES)
    read = Read(features)
    left = whole.without(rows[stays], labels, read)
    fresh = closed_form.kept_sums(features[rows[stays]], labels[rows[stays]], rows[stays], CLASSES)
    for name in ("products", "by_class", "counts"):
        assert getattr(left.total, name).tobytes() == getattr(fresh.total, name).tobytes(), name
    assert all(np.array_equal(getattr(left, name), getattr(fresh, name)) for name in ("rows", "labels", "checks"))
    assert sorted(read.rows) == sorted(set(rows.tolist()) - set(rows[stays].tolist())) and len(read.rows) == gone


def test_a_subtraction_that_would_not_be_exact_is_refused():
    features, labels = members(20)
    rows = np.arange(15, dtype=np.int32)
    whole = closed_form.kept_sums(features[rows], labels[rows], rows, CLASSES)
    other_labels, other_features = labels.copy(), features.copy()
    other_labels[3] = (labels[3] + 1) % CLASSES
    other_features[14, 0] = np.nextafter(features[14, 0], np.float32(9))
    assert whole.without(rows[:14], labels, features) is not None
    assert whole.without(rows[:14], other_labels, features) is None, "who stays has another label"
    assert whole.without(rows[:14], labels, other_features) is None, "who goes has another feature"
    assert whole.without(rows[:13], labels, features[:14]) is None, "a row that is not there"
    assert whole.without(np.array([0, 1, 17], np.int32), labels, features) is None, "somebody joined"
    assert whole.without(rows[:14][::-1], labels, features) is None, "another order of ids"


def test_a_tally_is_read_back_or_not_at_all(tmp_path):
    features, labels = members(30)
    whole = closed_form.kept_sums(features, labels, np.arange(30, dtype=np.int32), CLASSES)
    assert closed_form.load_sums(tmp_path) is None
    closed_form.save_sums(tmp_path, whole)
    found = closed_form.load_sums(tmp_path)
    assert np.array_equal(found.total.products, whole.total.products) and np.array_equal(found.checks, whole.checks)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for place in range(0, len(content), 97):  # a bit that turns is noticed, or was no number's
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        turned = closed_form.load_sums(tmp_path)
        for name in ("products", "by_class", "counts"):
            assert turned is None or np.array_equal(getattr(turned.total, name), getattr(whole.total, name))
    file.write_bytes(content[: len(content) // 2])
    assert closed_form.load_sums(tmp_path) is None


def test_random_cosines_approximate_the_kernel_of_directions():
    """Mean of products of cosines -> half the Gaussian kernel of the features' directions (Rahimi and Recht)."""
    features, _ = members(20)
    found = closed_form.expanded(features, 20_000)
    assert np.array_equal(found[:, :WIDTH], features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gaps = ((unit[:, None] - unit[None]) ** 2).sum(axis=-1)
    kernel = found[:, WIDTH:] @ found[:, WIDTH:].T / 20_000
    np.testing.assert_allclose(kernel, 0.5 * np.exp(-0.5 * closed_form.BANDWIDTH**2 * gaps), atol=0.03)
    on_device = closed_form.expanded(jnp.asarray(features), 50)
    np.testing.assert_allclose(on_device, closed_form.expanded(features, 50), atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a ridge head of all records, whose sums are kept."""
    root = tmp_path_factory.mktemp("ridge") / "run"
    with pytest.MonkeyPatch.context() as patch, small_run(root, config=RIDGE) as run:
        patch.setattr(closed_form, "TALLIED", 1)
        build(run)
    return root


@pytest.fixture
def summed(monkeypatch):
    """How many members each call of `sums` added up."""
    counts, sums = [], closed_form.sums
    monkeypatch.setattr(closed_form, "TALLIED", 1)
    monkeypatch.setattr(closed_form, "sums", lambda x, *rest: counts.append(len(x)) or sums(x, *rest))
    return counts


def tallies(run):
    return sorted(path.parent.name for path in run.layout.slices.glob(f"*/{closed_form.TALLY}"))


def test_an_erasure_subtracts_and_gives_the_bits_of_never_having_had_them(trained, tmp_path, summed, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    everyone = []
    with small_run(tmp_path / "run", config=RIDGE) as run:
        records, features = run.catalog.live("train").ids, Run.features
        with monkeypatch.context() as patch:
            patch.setattr(Run, "features", lambda run, table: everyone.append(len(table)) or features(run, table))
            for names in (records[3:4], records[40:45]):
                erase.request_erasure(run, names)
                assert tallies(run) == [run.catalog.manifest().entries[key] for key in run.catalog.manifest().entries]
        assert summed == [1, 5] and not everyone, "nobody else's features are read"
        found = state(run)
        assert audit(run).ok and not purge.leftovers(run)
    gone = {*records[3:4], *records[40:45]}
    with small_run(tmp_path / "fresh", without(small_source(), gone), RIDGE) as run:
        build(run)
        assert summed[-1] == len(records) - 6 and differences(found, state(run)) == []


def no_tally(run):
    (path,) = run.layout.slices.glob(f"*/{closed_form.TALLY}")
    path.unlink()


def other_tally(run, **sums):
    """Readable sums that are not those of the slice."""
    (path,) = run.layout.slices.glob(f"*/{closed_form.TALLY}")
    kept = closed_form.load_sums(path.parent)
    total = dataclasses.replace(kept.total, **sums) if sums else kept.total + kept.total
    closed_form.save_sums(path.parent, dataclasses.replace(kept, total=total))


def other_products(run):
    other_tally(run, products=2**20 * np.eye(16, dtype=np.int64))


def rotten_feature(run):
    """Of the record that is going to be erased."""
    (path,) = run.layout.records.glob("features-*.f32")
    view = RowFile(path, (16,), np.float32).view("r+")
    view[run.catalog.live("train").rows[7]] += 0.5
    view.flush()


def another_program(run):
    run.catalog.db.execute("UPDATE slices SET program='another'")


def other_settings(run):
    run.catalog.db.execute("UPDATE slices SET tuning=replace(tuning, '\"penalty\":0.1', '\"penalty\":0.2')")


@pytest.mark.parametrize(
    "harm", [no_tally, other_tally, other_products, rotten_feature, another_program, other_settings]
)
def test_what_cannot_be_subtracted_exactly_is_added_up_again(trained, tmp_path, summed, harm):
    shutil.copytree(trained, tmp_path / "run")
    with small_run(tmp_path / "run", config=RIDGE) as run:
        harm(run)
        erase.request_erasure(run, run.catalog.live("train").ids[7:8])
        assert summed[-1] == 99 and audit(run).ok


def test_a_kill_before_the_sums_are_kept_costs_one_sum(trained, tmp_path, summed, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    with small_run(tmp_path / "run", config=RIDGE) as run:
        records = run.catalog.live("train").ids
        with monkeypatch.context() as patch:
            patch.setattr(closed_form, "save_sums", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                erase.request_erasure(run, records[:1])
    with small_run(tmp_path / "run", config=RIDGE) as run:
        assert build(run).adopted == 1 and not tallies(run)
        erase.request_erasure(run, records[1:2])
        erase.request_erasure(run, records[2:3])
        assert summed == [1, len(records) - 2, 1] and audit(run).ok
