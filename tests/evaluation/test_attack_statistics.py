"""What attacks are scored with, against scikit-learn, closed forms and literal transcriptions; known ground truth."""

import itertools

import numpy as np
import pytest
from scipy import special, stats
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score, roc_curve

from lmeraser_jax.evaluation.attacks import membership, relearn, routing, statistics
from lmeraser_jax.evaluation.attacks.shadows import FORGOTTEN, RETAINED, VALIDATION, ShadowSets, halves
from lmeraser_jax.evaluation.attacks.unlearned import BINS, EMPTY, KlomPair, PopulationPair, klom, klom_pair, ulira


def area(shift):
    """AUC of two normal distributions with deviation 1."""
    return stats.norm.cdf(shift / np.sqrt(2))


# margins


def test_margins_are_log_odds_and_stay_finite(rng):
    logits, labels = rng.normal(size=(3, 50, 7)) * 4, rng.integers(0, 7, 50)
    p = np.take_along_axis(special.softmax(logits, axis=-1), labels[None, :, None].repeat(3, 0), -1)[..., 0]
    found = statistics.margins(logits, labels)
    np.testing.assert_allclose(found, np.log(p / (1 - p)), atol=1e-10)
    np.testing.assert_allclose(statistics.losses(found), -np.log(p), atol=1e-10)
    huge = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
    np.testing.assert_allclose(statistics.margins(huge, np.array([0, 0])), [1e4, -2e4])
    np.testing.assert_allclose(statistics.losses(np.array([800.0, -800.0])), [np.exp(-800.0), 800.0])


# curves


@pytest.mark.parametrize("digits", [12, 1])  # one digit: many ties
def test_curves_against_scikit_learn(rng, digits):
    for _ in range(20):
        members, others = np.round(rng.normal(0.7, 1, 37), digits), np.round(rng.normal(0, 1, 111), digits)
        truth, scores = np.repeat([1, 0], [37, 111]), np.concatenate([members, others])
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        for found, wanted in zip(statistics.roc(members, others), (false, true), strict=True):
            np.testing.assert_allclose(found, wanted)
        result = statistics.separation(members, others)
        assert result.auc == pytest.approx(roc_auc_score(truth, scores))
        cuts = [((members >= cut).mean() + (others < cut).mean()) / 2 for cut in [*scores, np.inf]]
        assert result.accuracy == pytest.approx(max(cuts))
        assert [rate and rate.value for rate in result.rates] == [pytest.approx(true[false <= 0.01].max()), None]
        found = statistics.rate_at(members, others, 1 / 111)
        assert found is not None and found.value == pytest.approx(true[false <= 1.001 / 111].max())
        assert statistics.rate_at(members, others, 1 / 112) is None  # one of 111 is more than that


@pytest.mark.parametrize("digits", [12, 0])
def test_delong_against_its_definition(rng, digits):
    members, others = np.round(rng.normal(0.8, 1, 23), digits), np.round(rng.normal(0, 1, 31), digits)
    wins = np.array([[(a > b) + 0.5 * (a == b) for b in others] for a in members])
    spread = np.var(wins.mean(axis=1), ddof=1) / 23 + np.var(wins.mean(axis=0), ddof=1) / 31
    np.testing.assert_allclose(statistics.delong(members, others), (wins.mean(), np.sqrt(spread)))


def test_the_interval_is_as_wide_as_a_bootstrap_and_covers_the_truth(rng):
    members, others = rng.normal(0.8, 1, 80), rng.normal(0, 1, 160)
    auc, error = statistics.delong(members, others)
    draws = [
        roc_auc_score(np.repeat([1, 0], [80, 160]), np.concatenate([rng.choice(members, 80), rng.choice(others, 160)]))
        for _ in range(400)
    ]
    assert np.std(draws) == pytest.approx(error, rel=0.15)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)  # Hanley and McNeil (1982)
    hanley = auc * (1 - auc) + 79 * (q1 - auc**2) + 159 * (q2 - auc**2)
    assert np.sqrt(hanley / (80 * 160)) == pytest.approx(error, rel=0.15)
    cover = [statistics.separation(rng.normal(0.8, 1, 60), rng.normal(0, 1, 90)) for _ in range(400)]
    assert np.mean([one.low <= area(0.8) <= one.high for one in cover]) == pytest.approx(0.95, abs=0.03)


def test_chance_is_told_from_an_effect(rng):
    null = [statistics.separation(*rng.normal(size=(2, 50))).p for _ in range(500)]
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert statistics.separation(rng.normal(1, 1, 50), rng.normal(0, 1, 50)).p < statistics.DOUBT
    assert statistics.separation(rng.normal(-1, 1, 50), rng.normal(0, 1, 50)).p > 0.9
    tiny = statistics.separation(np.array([3.0, 2.0]), np.array([1.0, 0.0]))
    assert tiny.auc == 1 and tiny.p > 0.1, "two records prove nothing"


def test_rates_have_the_interval_of_a_binomial(rng):
    """Clopper and Pearson by quantiles of beta distributions; of records, where scores are several of each."""
    members, others = rng.normal(1, 1, 80), rng.normal(0, 1, 400)
    for m, counts in ((80, None), (20, (20, 100))):
        found = statistics.rate_at(members, others, 0.01, counts)
        assert found is not None
        k = round(found.value * m)
        assert found.low == pytest.approx(stats.beta.ppf(0.025, k, m - k + 1))
        assert found.high == pytest.approx(stats.beta.ppf(0.975, k + 1, m - k))
    assert statistics.rate_at(members, others, 0.01, (20, 99)) is None
    assert str(statistics.Estimate(0.5, 0.25, 0.75)) == "0.500 [0.25, 0.75]"
    none = statistics.rate_at(np.full(30, -9.0), others, 0.01)
    assert none is not None and (none.value, none.low) == (0, 0) and none.high == pytest.approx(1 - 0.025 ** (1 / 30))


# one slice beside another


def test_a_surplus_is_the_difference_of_areas_and_its_chance_that_of_exchanges(rng):
    """Against all exchanges of ranks, record by record, for so few records that they can be listed."""
    members, others = rng.normal(size=(2, 4)) + [[1.5], [0.5]], rng.normal(size=(2, 5))
    truth, scores = np.repeat([1, 0], [4, 5]), np.concatenate([members, others], axis=1)
    found = statistics.surplus(members, others, rng)
    assert found.value == pytest.approx(roc_auc_score(truth, scores[0]) - roc_auc_score(truth, scores[1]))
    ranks, every = stats.rankdata(scores, axis=1), []
    for mask in np.indices((2,) * 9).reshape(9, -1).T.astype(bool):
        pair = np.where(mask, ranks[1], ranks[0]), np.where(mask, ranks[0], ranks[1])
        every.append(roc_auc_score(truth, pair[0]) - roc_auc_score(truth, pair[1]))
    assert found.p == pytest.approx(np.mean(np.array(every) >= found.value - 1e-9), abs=0.05)
    same = statistics.surplus(members[[0, 0]], others[[0, 0]], rng)
    assert (same.value, same.p, same.least) == (0, 1, 1)
    assert statistics.surplus(members[[0, 1], :2], others[[0, 1], :1] - 9, rng).least > 0.1, "few records prove nothing"


def test_a_surplus_is_told_from_chance(rng):
    """What both slices share, hard records and a shift, cancels; what the first alone knows is found."""

    def scores(gain, seen=40):
        share = rng.normal(0, 3, seen + 60)
        both = share + 0.7 * rng.normal(size=(2, seen + 60))
        both[0, :seen] += gain
        both[:, :seen] += 2.0  # members differ from others under either
        return both[:, :seen], both[:, seen:]

    null = [statistics.surplus(*scores(0.0), rng).p for _ in range(100)]
    assert stats.kstest(null, "uniform").pvalue > 0.001
    members, others = scores(1.0)
    assert statistics.surplus(members, others, rng).p < statistics.DOUBT
    assert statistics.surplus(members[::-1], others[::-1], rng).p > 0.9


def test_an_area_over_records_is_the_area_over_scores_with_a_wider_interval(rng):
    owner, level = np.repeat(np.arange(40), 10), rng.normal(1, 2, 40)
    members, others = level[owner] + rng.normal(size=400), rng.normal(size=400)
    parts = [[scores[owner == i] for i in range(40)] for scores in (members, others)]
    found = statistics.clustered_auc(*parts, rng)
    assert found is not None
    truth = np.repeat([1, 0], 400)
    assert found.value == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])))
    draws = []
    for _ in range(300):
        chosen = np.concatenate([np.flatnonzero(owner == i) for i in rng.integers(40, size=40)])
        draws.append(roc_auc_score(truth, np.concatenate([members[chosen], others[chosen]])))
    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)
    alone = statistics.separation(members, others)
    assert alone.high - alone.low < 0.6 * (found.high - found.low), "ten scores of a record are not ten records"
    members = rng.normal(1, 1, 400)  # records alike: DeLong's interval
    alone = statistics.separation(members, others)
    parts = [[scores[owner == i] for i in range(40)] for scores in (members, others)]
    found = statistics.clustered_auc(*parts, rng)
    assert found is not None and found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.35)
    assert statistics.clustered_auc([np.zeros(0)], [np.zeros(3)], rng) is None


# moments and permutations


def test_moments_against_masked_arrays(rng):
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


def test_gaussian_is_a_normal_density(rng):
    values, mean, deviation = rng.normal(size=(3, 9))
    wanted = stats.norm.logpdf(values, mean, np.abs(deviation)) + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(statistics.gaussian(values, mean, np.abs(deviation)), wanted)


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
        found = statistics.permuted(lambda rows, v=values: (rows @ v)[:, None], first, strata, rng)
        chances.append(statistics.tested(found[:, 0]).p)
    assert stats.kstest(chances, "uniform").pvalue > 0.01
    shifted = statistics.permuted(lambda rows: (rows @ (first * 9.0))[:, None], first, strata, rng)[:, 0]
    assert statistics.tested(shifted).p < 0.005 and statistics.tested(-shifted).p == 1


# membership


def shadow_margins(rng, records, models, shift):
    """Margins of shadows under known Gaussians: each record with its own mean and spread; members are shifted."""
    mean, spread = rng.normal(0, 5, records), rng.uniform(0.5, 2, records)
    inside = halves(models, records, rng)
    return mean, spread, inside, mean + spread * (rng.normal(size=(models, records)) + shift * inside)


def test_halves_are_halves(rng):
    inside = halves(64, 200, rng)
    assert (inside.sum(axis=0) == 32).all() and np.abs(inside.sum(axis=1) - 100).max() < 40
    assert (halves(5, 30, rng).sum(axis=0) == 2).all()
    assert np.abs(np.corrcoef(inside[:, :8], rowvar=False) - np.eye(8)).max() < 0.5


def test_lira_is_the_likelihood_ratio(rng):
    _, _, inside, shadows = shadow_margins(rng, 7, 24, 1.0)
    margins = rng.normal(size=(3, 7))
    found = membership.lira(margins, shadows, inside)
    for c in range(3):
        for j in range(7):
            seen, unseen = shadows[inside[:, j], j], shadows[~inside[:, j], j]
            ratio = stats.norm.logpdf(margins[c, j], seen.mean(), seen.std(ddof=1))
            assert found[c, j] == pytest.approx(
                ratio - stats.norm.logpdf(margins[c, j], unseen.mean(), unseen.std(ddof=1))
            )


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_lira_finds_as_much_as_there_is(rng, shift):
    """Gaussian margins: the best possible AUC is known. The loss alone sees little of it."""
    mean, spread, inside, shadows = shadow_margins(rng, 2000, 128, shift)
    member = np.arange(2000) < 1000
    noise = mean + spread * rng.normal(size=(3, 2000))
    margins = noise + spread * shift * member * np.array([[1], [0], [0]])
    scores = membership.lira(margins, shadows, inside)
    result = membership.membership("lira", scores[:, member], scores[:, ~member], rng)
    assert result.columns[0].auc == pytest.approx(area(shift), abs=0.03)
    assert result.beyond[0].value == pytest.approx(area(shift) - 0.5, abs=0.05)
    assert result.found == (shift > 0, False, False)
    alone = membership.membership("loss", margins[:, member], margins[:, ~member], rng)
    assert shift == 0 or alone.columns[0].auc < result.columns[0].auc - 0.1


def test_rmia_against_a_literal_transcription(rng):
    _, _, inside, shadows = shadow_margins(rng, 12, 10, 1.0)
    margins = rng.normal(size=(2, 12))
    found = membership.rmia(
        membership.relative(margins, shadows, inside), membership.relative(margins, shadows, inside)[:, 8:]
    )

    def p(margin):
        return 1 / (1 + np.exp(-margin))

    for c in range(2):
        ratio = []
        for j in range(12):
            out = np.mean([p(shadows[i, j]) for i in range(10) if not inside[i, j]])
            ratio.append(p(margins[c, j]) / (((1 + 0.3) * out + (1 - 0.3)) / 2))
        for j in range(12):
            assert found[c, j] == np.mean([ratio[j] / ratio[z] >= membership.GAMMA for z in range(8, 12)])
    level = membership.rmia(np.log([[2.0, 1.9]]), np.zeros((1, 3)))
    assert level.tolist() == [[1.0, 0.0]], "twice as likely is enough"


def test_rmia_finds_members(rng):
    mean, spread, inside, shadows = shadow_margins(rng, 1000, 8, 2.0)
    member = np.arange(1000) < 300
    margins = mean + spread * (rng.normal(size=(3, 1000)) + 2.0 * member * np.array([[1], [0], [0]]))
    ratios = membership.relative(margins, shadows, inside)
    scores = membership.rmia(ratios, ratios[:, 700:])
    result = membership.membership("rmia", scores[:, member], scores[:, 300:700], rng)
    assert result.found == (True, False, False) and result.columns[0].auc > 0.65
    far = membership.relative(np.full((1, 1), -900.0), np.full((2, 1), -900.0), np.array([[True], [False]]))
    assert np.isfinite(far).all(), "tiny probabilities must not end as infinite"


# populations


def populations(rng, kept, unlearned, models=64, records=24):
    """A pool of three roles: forgotten records have `kept` or `unlearned` spreads more than where nobody saw them."""
    roles = np.arange(records) % 3
    roles = np.array([FORGOTTEN, RETAINED, VALIDATION])[roles]
    mean, inside, drawn = rng.normal(0, 3, records), *(halves(models, records, rng) for _ in range(2))
    inside, drawn = inside & (roles != VALIDATION), drawn & (roles != VALIDATION)
    noise = rng.normal(size=(3, models, records)) + mean
    learned = [2.0 * (mask & (roles == RETAINED)) for mask in (inside, inside, drawn)]
    seen = inside & (roles == FORGOTTEN)
    shadows, after, never = noise + np.stack(learned)
    return [(roles, Shadows(inside, shadows + kept * seen, after + unlearned * seen, drawn, never))]


@pytest.mark.parametrize(("kept", "unlearned"), [(2.0, 0.0), (2.0, 2.0), (0.0, 0.0)])
def test_ulira_and_klom_find_a_known_leak_and_nothing_else(rng, kept, unlearned):
    trials = [part for _ in range(4) for part in populations(rng, kept, unlearned)]
    found, far = ulira(trials, rng), klom(trials, rng)
    assert found.found == far.found == (kept > 0, unlearned > 0, False)
    values = [part.value for part in found.forgotten]
    for value, shift in zip(values, (kept, unlearned, 0.0), strict=True):
        assert value == pytest.approx(stats.norm.cdf(shift / 2), abs=0.06)
    assert found.rates == ((None, None),) * 3, "32 records, of however many slices each is asked"
    for auc, shift in zip(found.auc, (kept, unlearned, 0.0), strict=True):
        assert auc is not None and auc.low < auc.value < auc.high
        assert auc.value == pytest.approx(area(shift), abs=0.06) and (auc.low > 0.5) == (shift > 0)
    assert all(part.value == pytest.approx(0.5, abs=0.06) and part.p > 0.001 for part in found.retained)
    floor = far.mean["forgotten"][2]
    assert (far.mean["forgotten"][0] > 1.5 * floor) == (kept > 0)
    assert (far.mean["forgotten"][1] > 1.5 * floor) == (unlearned > 0)
    for role in ("retained", "validation"):
        assert far.mean[role][:2] == pytest.approx((far.mean[role][2],) * 2, rel=0.25)
        assert far.high[role][1] > far.mean[role][1]


def test_ulira_tells_rates_where_records_are_many_enough(rng):
    found = ulira(populations(rng, 2.0, 0.0, records=330), rng)
    for rates, shift in zip(found.rates, (2.0, 0.0, 0.0), strict=True):
        assert rates[0] is not None and rates[1] is None, "110 forgotten records"
        assert rates[0].value == pytest.approx(stats.norm.sf(stats.norm.isf(0.01) - shift), abs=0.12)
        assert rates[0].low <= rates[0].value <= rates[0].high and rates[0].high - rates[0].low > 0.03
    assert found.quality[0] < found.quality[1] - 0.1 and found.quality[1] == pytest.approx(found.quality[2], abs=0.15)


def test_ulira_accuracies_against_a_literal_transcription(rng):
    margins, first = rng.normal(size=(80, 3)), rng.random((80, 3)) < 0.7
    rows, fitted = np.arange(80) < 44, np.arange(80) % 2 == 0
    found = PopulationPair(margins, first, np.ones_like(first), rows, fitted).accuracies(rows[None])[0]
    for j in range(3):
        one, two = margins[rows & fitted & first[:, j], j], margins[~rows & fitted, j]
        densities = [lambda x, part=part: stats.norm.logpdf(x, part.mean(), part.std(ddof=1)) for part in (one, two)]
        hits = [densities[0](x) > densities[1](x) for x in margins[rows & ~fitted & first[:, j], j]]
        rejections = [densities[0](x) <= densities[1](x) for x in margins[~rows & ~fitted, j]]
        assert found[j] == pytest.approx((np.mean(hits) + np.mean(rejections)) / 2)


def test_few_shadows_say_nothing_rather_than_nonsense(rng):
    found = ulira(populations(rng, 5.0, 0.0, models=4), rng)
    assert all(part is None or 0 <= part.value <= 1 for part in (*found.forgotten, *found.retained))
    assert not found.found[1]
    alone = ulira(populations(rng, 5.0, 0.0, models=2), rng)
    assert alone.forgotten[0] is None is alone.retained[0] and alone.found == (False,) * 3 and alone.least == 1
    assert {line[1] for line in alone.lines() if line[0].startswith("accuracy")} == {"-"}


def divergences(margins, oracles):
    group = np.ones(len(margins), bool)
    return KlomPair(margins, np.ones_like(margins, bool), group, oracles).divergences(group[None])[0]


def test_klom_against_a_literal_transcription(rng):
    """As the benchmark of its authors computes it: shared bins, and where an oracle's bin is empty a small number."""
    margins, oracles = rng.normal(0.5, 1, (16, 5)), rng.normal(0, 1, (16, 5))
    margins[0, 0], oracles[:, 1], margins[:, 1] = 250.0, 2.0, 2.0  # clipped; all in one place
    found = divergences(margins, oracles)
    for j in range(5):
        one, two = np.clip(margins[:, j], -100, 100), np.clip(oracles[:, j], -100, 100)
        low, high = min(one.min(), two.min()), max(one.max(), two.max())
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        p, q = (np.histogram(part, edges)[0] / 16 for part in (one, two))
        assert found[j] == pytest.approx(stats.entropy(p, np.where(q > 0, q, EMPTY * (p > 0))) if j != 1 else 0)


def test_klom_asks_of_slices_that_a_forgotten_record_was_in(rng):
    """Kept and unlearned slices are those that had it; oracles, the other half of them, are all that are there."""
    ((roles, scores),) = populations(rng, 2.0, 1.0, records=6)
    chosen = np.flatnonzero(roles == FORGOTTEN)
    for column, slices in enumerate((scores.shadows, scores.unlearned)):
        pair = KlomPair.of(scores, roles == FORGOTTEN, FORGOTTEN, column)
        found = pair.divergences(pair.group[None])[0]
        for j, divergence in zip(chosen, found, strict=True):
            every = np.concatenate([slices[:, j], scores.never[:, j]])
            edges = np.linspace(every.min(), every.max(), BINS + 1)
            pairs = (slices[scores.inside[:, j], j], scores.never[32:, j])
            p, q = (np.histogram(part, edges)[0] / 32 for part in pairs)
            assert divergence == pytest.approx(stats.entropy(p, np.where(q > 0, q, EMPTY * (p > 0))))


def test_klom_comes_near_the_divergence_of_two_gaussians(rng):
    shift, many = 0.8, 200_000
    found = divergences(rng.normal(shift, 1, (many, 1)), rng.normal(0, 1, (many, 1)))
    assert found[0] == pytest.approx(shift**2 / 2, rel=0.1)


# forgetting quality


def test_epsilon_is_that_of_the_best_threshold():
    """Two tenths of either kind on the wrong side: log(0.8 / 0.2), wherever the threshold leaves none on a side."""
    low, high = np.zeros(8), np.ones(8)
    unlearned, never = np.append(high, low[:2]), np.append(low, high[:2])
    assert forgetting.epsilon(unlearned, never) == pytest.approx(np.log(4))
    assert forgetting.epsilon(never, unlearned) == pytest.approx(np.log(4)), "told from below as well"
    assert forgetting.epsilon(high, low) == forgetting.epsilon(low, high) == np.inf
    assert forgetting.epsilon(high, high) == forgetting.epsilon(unlearned, unlearned) == 0
    assert forgetting.epsilon(high, unlearned) == 0, "a threshold at which one rate is 0 does not count"


def test_epsilon_of_randomised_response(rng):
    """A right answer with probability e / (1 + e): epsilon is 1 (Warner, 1965)."""
    heads = rng.random((2, 100_000)) < np.e / (1 + np.e)
    found = forgetting.epsilon(*(part.astype(float)[:2000] for part in (heads[0], ~heads[1])))
    assert found == pytest.approx(1.0, abs=0.15)


def test_quality_halves_from_bin_to_bin():
    assert forgetting.quality(np.array([0.0, 0.49])) == 1
    assert forgetting.quality(np.array([0.5, 0.99])) == 0.5
    assert forgetting.quality(np.array([0.0, 1.2])) == (1 + 0.25) / 2
    assert forgetting.quality(np.array([6.2])) == forgetting.quality(np.array([np.inf])) == 2.0**-12


# relearning and routing


def test_relearning_counts_steps():
    assert relearn.until(np.array([0.1, 0.05]), 0.1) == 0
    assert relearn.until(np.array([2.0, 1.0, 0.11, 0.1]), 0.1) == 2
    assert relearn.until(np.array([2.0, 1.0, 0.12, 0.1]), 0.1) == 3
    assert relearn.until(np.full(relearn.STEPS + 1, 2.0), 0.1) == relearn.STEPS
    assert relearn.Relearn(((0,) * 8, (5,) * 8, (5,) * 8), (2**-8, 1.0, 1.0), 3).found == (True, False, False)


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 5, 20])
def test_relearning_has_as_many_slices_as_it_takes(clusters):
    count = relearn.scratch_for(clusters, 1000)
    assert relearn.least(clusters, count) < statistics.DOUBT
    assert count == 3 or relearn.least(clusters, count - 1) >= statistics.DOUBT
    quickest = np.tile(np.arange(count + 1), (clusters, 1))
    assert relearn.faster(quickest) == pytest.approx(relearn.least(clusters, count))
    assert relearn.scratch_for(clusters, count) == count and relearn.scratch_for(clusters, 3) == 3


def test_relearning_faster_is_told_from_chance(rng):
    """Each of four slices of a cluster is the fastest once in four times, where they are alike."""
    steps = np.array([[1, 5, 6, 7], [2, 4, 8, 9], [3, 9, 5, 4]])
    assert relearn.faster(steps) == pytest.approx(4**-3)
    assert relearn.faster(steps[:, ::-1]) > 0.8 and relearn.faster(np.full((9, 4), 3)) == pytest.approx(1)
    assert relearn.faster(np.tile(steps[:1], (9, 1))) == pytest.approx(4**-9)
    deals = [sum(deal) for deal in itertools.product(*steps[:, [1, 0, 2, 3]].tolist())]
    assert relearn.faster(steps[:, [1, 0, 2, 3]]) == pytest.approx(np.mean(np.array(deals) <= 5 + 4 + 9))
    null = [relearn.faster(rng.integers(0, 60, (5, 4))) for _ in range(200)]
    assert stats.kstest(null, "uniform").pvalue > 0.01


def test_distances_to_the_nearest_prototype(rng):
    features, prototypes = (rng.normal(size=(n, 6)).astype(np.float32) for n in (50, 9))
    np.testing.assert_allclose(
        routing.distances(features, prototypes), cdist(features, prototypes).min(axis=1), rtol=1e-5
    )
