"""What attacks are scored with, against scikit-learn, closed forms and literal transcriptions; known ground truth."""

import itertools

import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import roc_auc_score

from lmeraser_jax.evaluation.attacks import attack, relearn, statistics
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, RETAINED, VALIDATION, ShadowSets, halves
from lmeraser_jax.evaluation.attacks.unlearned import BINS, EMPTY, KlomPair, PopulationPair, klom, klom_pair, ulira


def area(shift):
    """AUC of two normal distributions with deviation 1."""
    return stats.norm.cdf(shift / np.sqrt(2))


def test_margins_are_log_odds_and_stay_finite(rng):
    logits, labels = rng.normal(size=(3, 50, 7)) * 4, rng.integers(0, 7, 50)
    p = np.take_along_axis(special.softmax(logits, axis=-1), labels[None, :, None].repeat(3, 0), -1)[..., 0]
    margins = statistics.margins(logits, labels)
    np.testing.assert_allclose(margins, np.log(p / (1 - p)), atol=1e-10)
    np.testing.assert_allclose(statistics.losses(margins), -np.log(p), atol=1e-10)
    huge = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
    np.testing.assert_allclose(statistics.margins(huge, np.array([0, 0])), [1e4, -2e4])
    np.testing.assert_allclose(statistics.losses(np.array([800.0, -800.0])), [np.exp(-800.0), 800.0])


@pytest.mark.parametrize("digits", [12, 1])  # one digit: many ties
def test_areas_intervals_and_rates_are_their_definitions(rng, digits):
    members, others = np.round(rng.normal(0.7, 1, 37), digits), np.round(rng.normal(0, 1, 111), digits)
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in others] for a in members])
    reach = 1.95996 * np.sqrt(np.var(wins.mean(axis=1), ddof=1) / 37 + np.var(wins.mean(axis=0), ddof=1) / 111)
    result, area = statistics.separation(members, others), wins.mean()
    assert (result.auc.value, result.auc.low, result.auc.high) == pytest.approx((area, area - reach, area + reach))
    cuts = [*members, *others, np.inf]
    rate = max((members >= cut).mean() for cut in cuts if (others >= cut).mean() <= 0.01)
    assert [estimate and estimate.value for estimate in result.rates] == [pytest.approx(rate), None]
    assert statistics.rate_at(members, others, 1 / 110) is not None
    assert statistics.rate_at(members, others, 1 / 112) is None, "one of 111 is more than that"


def test_rates_have_the_interval_of_a_binomial(rng):
    """Clopper and Pearson by quantiles of beta distributions."""
    members, others = rng.normal(1, 1, 80), rng.normal(0, 1, 400)
    rate = statistics.rate_at(members, others, 0.01)
    assert rate is not None
    k = round(rate.value * 80)
    assert rate.low == pytest.approx(stats.beta.ppf(0.025, k, 80 - k + 1))
    assert rate.high == pytest.approx(stats.beta.ppf(0.975, k + 1, 80 - k))
    assert str(statistics.Estimate(0.5, 0.25, 0.75)) == "0.500 [0.25, 0.75]"
    none = statistics.rate_at(np.full(30, -9.0), others, 0.01)
    assert none is not None and (none.value, none.low) == (0, 0) and none.high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_an_auc_difference_has_the_chance_of_all_exchanges_of_ranks(rng):
    """For so few records that the exchanges can be listed."""
    members, others = rng.normal(size=(2, 4)) + [[1.5], [0.5]], rng.normal(size=(2, 5))
    truth, scores = np.repeat([1, 0], [4, 5]), np.concatenate([members, others], axis=1)
    result = statistics.auc_difference(members, others, rng)
    assert result.value == pytest.approx(roc_auc_score(truth, scores[0]) - roc_auc_score(truth, scores[1]))
    ranks, exchanges = stats.rankdata(scores, axis=1), []
    for mask in np.indices((2,) * 9).reshape(9, -1).T.astype(bool):
        pair = np.where(mask, ranks[1], ranks[0]), np.where(mask, ranks[0], ranks[1])
        sums = [stats.rankdata(scores)[:4].sum() for scores in pair]
        exchanges.append((sums[0] - sums[1]) / (4 * 5))
    assert result.p == pytest.approx(np.mean(np.array(exchanges) >= result.value - 1e-9), abs=0.05)
    same = statistics.auc_difference(members[[0, 0]], others[[0, 0]], rng)
    assert (same.value, same.p, same.smallest_p) == (0, 1, 1)
    few = statistics.auc_difference(members[[0, 1], :2], others[[0, 1], :1] - 9, rng)
    assert few.smallest_p > 0.1, "few records prove nothing"


def test_an_auc_difference_ignores_what_both_slices_share(rng, monkeypatch):
    """Hard records and a shift cancel; what the first slice alone knows is found."""
    monkeypatch.setattr(statistics, "ROUNDS", 250)

    def scores(gain):
        both = rng.normal(0, 3, 100) + 0.7 * rng.normal(size=(2, 100))
        both[:, :40] += [[2.0 + gain], [2.0]]  # members differ from others under either
        return both[:, :40], both[:, 40:]

    null = [statistics.auc_difference(*scores(0.0), rng).p for _ in range(60)]
    assert stats.kstest(null, "uniform").pvalue > 0.001
    members, others = scores(1.0)
    assert statistics.auc_difference(members, others, rng).p < statistics.SIGNIFICANT
    assert statistics.auc_difference(members[::-1], others[::-1], rng).p > 0.9


def test_moments_are_those_of_masked_arrays(rng):
    values, valid = rng.normal(1e3, 2, (40, 6)), rng.random((40, 6)) < 0.7
    rows = rng.random((5, 40)) < 0.6
    mean, deviation = statistics.moments(values, valid, rows)
    for r in range(5):
        masked = np.ma.array(values, mask=~(valid & rows[r][:, None]))
        np.testing.assert_allclose(mean[r], masked.mean(axis=0))
        np.testing.assert_allclose(deviation[r], masked.std(axis=0, ddof=1))


def test_few_values_share_a_deviation_and_none_have_no_mean(rng):
    values, valid = rng.normal(size=(20, 3)), np.zeros((20, 3), bool)
    valid[:5, 0], valid[:12, 1] = True, True
    mean, deviation = (part[0] for part in statistics.moments(values, valid, np.ones((1, 20), bool)))
    few, many = values[:5, 0], values[:12, 1]
    together = np.sqrt((few.var() * 5 + many.var() * 12) / (4 + 11))
    np.testing.assert_allclose(deviation, [together, many.std(ddof=1), together])
    np.testing.assert_allclose(mean[:2], [few.mean(), many.mean()])
    assert np.isnan(mean[2])


def test_permutations_keep_strata_and_give_uniform_chances(rng):
    first, strata = np.arange(20) < 8, np.arange(20) % 2
    seen = []
    statistics.permuted(lambda rows: seen.append(rows) or rows.sum(axis=1, keepdims=True), first, strata, rng)
    deals = np.concatenate(seen)
    assert len(deals) == 1 + statistics.ROUNDS and (deals[0] == first).all()
    for stratum in (0, 1):
        assert (deals[:, strata == stratum].sum(axis=1) == 4).all()
    np.testing.assert_allclose(deals[1:].mean(axis=0), 0.4, atol=0.06)
    chances = []
    for _ in range(200):
        values = rng.normal(size=20)
        sums = statistics.permuted(lambda rows, v=values: (rows @ v)[:, None], first, strata, rng)
        chances.append(statistics.tested(sums[:, 0]).p)
    assert stats.kstest(chances, "uniform").pvalue > 0.01
    shifted = statistics.permuted(lambda rows: (rows @ (first * 9.0))[:, None], first, strata, rng)[:, 0]
    assert statistics.tested(shifted).p < 0.005 and statistics.tested(-shifted).p == 1


def shadow_margins(rng, records, models, shift):
    """Margins of shadows under known Gaussians: each record with its own mean and deviation; members are shifted."""
    mean, deviation = rng.normal(0, 5, records), rng.uniform(0.5, 2, records)
    inside = halves(models, records, rng)
    return mean, deviation, inside, mean + deviation * (rng.normal(size=(models, records)) + shift * inside)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_lira_finds_as_much_as_there_is(rng, shift, monkeypatch):
    """Gaussian margins: the best possible AUC is known. The loss alone sees little of it."""
    monkeypatch.setattr(statistics, "ROUNDS", 250)
    mean, deviation, inside, shadows = shadow_margins(rng, 1000, 128, shift)
    member = np.arange(1000) < 500
    kept_only = np.array([[1], [0], [0]])
    margins = mean + deviation * (rng.normal(size=(3, 1000)) + shift * member * kept_only)
    scores = attack.lira(margins, shadows, inside)
    result = attack.membership("lira", scores[:, member], scores[:, ~member], rng)
    assert result.values["columns"][0].auc.value == pytest.approx(area(shift), abs=0.04)
    assert result.values["differences"][0].value == pytest.approx(area(shift) - 0.5, abs=0.08)
    assert result.detected == (shift > 0, False, False)
    loss = attack.membership("loss", margins[:, member], margins[:, ~member], rng)
    assert shift == 0 or loss.values["columns"][0].auc.value < result.values["columns"][0].auc.value - 0.1


def populations(rng, kept, unlearned, models=64, records=24):
    """A pool of three roles: forgotten records lie `kept` or `unlearned` deviations above where nothing saw them."""
    roles = np.array([FORGOTTEN, RETAINED, VALIDATION])[np.arange(records) % 3]
    mean, inside, drawn = rng.normal(0, 3, records), *(halves(models, records, rng) for _ in range(2))
    inside, drawn = inside & (roles != VALIDATION), drawn & (roles != VALIDATION)
    learned = [2.0 * (mask & (roles == RETAINED)) for mask in (inside, inside, drawn)]
    saw = inside & (roles == FORGOTTEN)
    shadows, after, never = rng.normal(size=(3, models, records)) + mean + np.stack(learned)
    return ShadowSets(roles, inside, shadows + kept * saw, after + unlearned * saw, drawn, never)


@pytest.mark.parametrize(("kept", "unlearned"), [(2.0, 0.0), (2.0, 2.0), (0.0, 0.0)])
def test_ulira_and_klom_find_a_known_leak_and_nothing_else(rng, kept, unlearned):
    pools, shifts = [populations(rng, kept, unlearned) for _ in range(4)], (kept, unlearned, 0.0)
    likelihood, distance = ulira(pools, rng), klom(pools, rng)
    assert likelihood.detected == distance.detected == (kept > 0, unlearned > 0, False)
    for tested, shift in zip(likelihood.values["forgotten"], shifts, strict=True):
        assert tested.value == pytest.approx(stats.norm.cdf(shift / 2), abs=0.06)
    floor = distance.values["floor"]
    assert [tested.value > 1.5 * floor for tested in distance.values["forgotten"]] == [kept > 0, unlearned > 0]


def test_ulira_accuracies_are_those_of_a_literal_transcription(rng):
    margins, first = rng.normal(size=(80, 3)), rng.random((80, 3)) < 0.7
    rows, fitted = np.arange(80) < 44, np.arange(80) % 2 == 0
    accuracies = PopulationPair(margins, rows, first, fitted).accuracies(rows[None])[0]
    for j in range(3):
        fits = margins[rows & fitted & first[:, j], j], margins[~rows & fitted, j]
        densities = [lambda x, part=part: stats.norm.logpdf(x, part.mean(), part.std(ddof=1)) for part in fits]
        hits = [densities[0](x) > densities[1](x) for x in margins[rows & ~fitted & first[:, j], j]]
        rejections = [densities[0](x) <= densities[1](x) for x in margins[~rows & ~fitted, j]]
        assert accuracies[j] == pytest.approx((np.mean(hits) + np.mean(rejections)) / 2)


def test_few_shadows_say_nothing_rather_than_nonsense(rng):
    few = ulira([populations(rng, 5.0, 0.0, models=4)], rng)
    assert not few.detected[1]
    two = ulira([populations(rng, 5.0, 0.0, models=2)], rng)
    assert two.values["forgotten"][0] is None
    assert two.detected == (False,) * 3 and two.smallest_p == 1
    assert {line[1] for line in two.lines if line[0].startswith("accuracy")} == {"-"}


def literal_divergence(margins, oracles, span):
    """As the benchmark of KLoM's authors computes it; a small number where an oracle's bin is empty."""
    edges = np.linspace(span.min(), span.max(), BINS + 1)
    p, q = (np.histogram(part, edges)[0] / len(part) for part in (margins, oracles))
    return stats.entropy(p, np.where(q > 0, q, EMPTY * (p > 0)))


def divergences(margins, oracles):
    group = np.ones(len(margins), bool)
    return KlomPair(margins, np.ones_like(margins, bool), group, oracles).divergences(group[None])[0]


def test_klom_is_its_literal_transcription(rng):
    margins, oracles = rng.normal(0.5, 1, (16, 5)), rng.normal(0, 1, (16, 5))
    margins[0, 0], oracles[:, 1], margins[:, 1] = 250.0, 2.0, 2.0  # clipped; all in one place
    values = divergences(margins, oracles)
    margins, expected = np.minimum(margins, 100), np.zeros(5)
    for j in (0, 2, 3, 4):
        pair = margins[:, j], oracles[:, j]
        expected[j] = literal_divergence(*pair, np.concatenate(pair))
    np.testing.assert_allclose(values, expected)
    shift, count = 0.8, 200_000
    wide = divergences(rng.normal(shift, 1, (count, 1)), rng.normal(0, 1, (count, 1)))
    assert wide[0] == pytest.approx(shift**2 / 2, rel=0.1), "the divergence of two Gaussians"


def test_klom_looks_at_slices_that_a_forgotten_record_was_in(rng):
    """Kept and unlearned slices are those that had it; the bins span all margins."""
    sets = populations(rng, 2.0, 1.0, records=6)
    for column, slices in enumerate((sets.kept, sets.unlearned)):
        pair = klom_pair(sets, column)
        values = pair.divergences(pair.in_first[None])[0]
        for j, divergence in zip(np.flatnonzero(sets.roles == FORGOTTEN), values, strict=True):
            span = np.concatenate([slices[:, j], sets.never[:, j]])
            expected = literal_divergence(slices[sets.inside[:, j], j], sets.never[32:, j], span)
            assert divergence == pytest.approx(expected)


def test_relearning_counts_steps():
    for losses, steps in (([0.1, 0.05], 0), ([2.0, 1.0, 0.11, 0.1], 2), ([2.0, 1.0, 0.12, 0.1], 3)):
        assert relearn.steps_until(np.array(losses), 0.1) == steps, losses
    assert relearn.steps_until(np.full(relearn.STEPS + 1, 2.0), 0.1) == relearn.STEPS


def test_relearning_has_as_many_slices_as_it_takes():
    for clusters in (1, 2, 3, 4, 5, 20):
        count = relearn.scratch_for(clusters, 1000)
        chances = [relearn.chance_of_so_few(np.tile(np.arange(s + 1), (clusters, 1))) for s in (count, count - 1)]
        assert chances[0] < statistics.SIGNIFICANT and (count == 3 or chances[1] >= statistics.SIGNIFICANT), clusters
        assert relearn.scratch_for(clusters, count) == count and relearn.scratch_for(clusters, 3) == 3, clusters


def test_relearning_faster_is_told_from_chance(rng):
    """Each of four slices of a cluster is the fastest once in four times, where they are alike."""
    steps = np.array([[1, 5, 6, 7], [2, 4, 8, 9], [3, 9, 5, 4]])
    chance = relearn.chance_of_so_few
    assert chance(steps) == pytest.approx(4**-3)
    assert chance(steps[:, ::-1]) > 0.8 and chance(np.full((9, 4), 3)) == pytest.approx(1)
    assert chance(np.tile(steps[:1], (9, 1))) == pytest.approx(4**-9)
    deals = [sum(deal) for deal in itertools.product(*steps[:, [1, 0, 2, 3]].tolist())]
    assert chance(steps[:, [1, 0, 2, 3]]) == pytest.approx(np.mean(np.array(deals) <= 5 + 4 + 9))
    null = [chance(rng.integers(0, 60, (5, 4))) for _ in range(200)]
    assert stats.kstest(null, "uniform").pvalue > 0.01
