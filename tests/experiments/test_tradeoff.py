"""The figure of trade-offs: the fronts of numpy, axes inside of what is possible, and nothing hides anything."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from comparison_rows import METHODS, TITLES, digits, results, row
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from lmeraser_jax.experiments import summary
from lmeraser_jax.experiments.labels import side_by_side
from lmeraser_jax.experiments.tradeoff import lowest_to_scale, tradeoff


@pytest.fixture(scope="module")
def drawn():
    return tradeoff(results().rows, TITLES)


def fronts(panel):
    return [line for line in panel.lines if line.get_gid() == "front"]


def places_of(panel):
    return np.array([container.lines[0].get_xydata()[0] for container in panel.containers])


def test_the_front_that_is_drawn(drawn):
    rows, panel = results().rows, drawn.axes[0]
    here = [r for r in rows if (r.experiment, r.dataset, r.backbone) == ("methods", "cifar10", "vit-b-22k")]
    means = {
        name: np.mean([(100 * r.images_request / r.images_full, 100 * r.accuracy) for r in here if r.method == name], 0)
        for name in METHODS
    }
    best = [
        name
        for name, (cost, score) in means.items()
        if not any(c <= cost and s >= score and other != name for other, (c, s) in means.items())
    ]
    (front,) = fronts(panel)
    best.sort(key=lambda name: means[name][0])
    assert_allclose(front.get_ydata()[:-1], [means[name][1] for name in best])
    assert front.get_drawstyle() == "steps-post"
    costs = [means[name][0] for name in best]
    (gap,) = {
        line.get_xdata()[0]
        for line in panel.lines
        if line.get_linestyle() == "--" and list(line.get_ydata()) == [0, 1]  # upright
    }
    assert costs[0] == 0  # which has a place of its own, behind a line
    assert panel.get_xlim()[0] < front.get_xdata()[0] < gap < min(cost for cost, _ in means.values() if cost)
    assert_allclose(front.get_xdata()[1:-1], costs[1:])
    assert [label.get_text() for label in panel.get_xticklabels()][:2] == ["0", "1"]


def test_a_trade_off_is_drawn_to_scale_but_for_what_would_squeeze_the_rest():
    rows = digits()
    figure = tradeoff(rows)
    (panel,) = figure.axes
    assert panel.get_xlim()[1] < 150 and panel.get_ylim()[1] <= 100  # no cost above 100 %, and half a marker
    assert [label.get_text() for label in panel.get_xticklabels()][-1] == "100"
    (line,) = {at.get_ydata()[0] for at in panel.lines if at.get_linestyle() == "--" and list(at.get_xdata()) == [0, 1]}
    places = places_of(panel)
    below = places[:, 1] < line
    assert below.sum() == 1 and len(places) == 13
    (text,) = [text.get_text() for text in panel.texts if "%" in text.get_text()]
    assert text == "lmeraser-top5 (77.6 %)"
    best = summary.spreads(rows, summary.ACCURACY, summary.by_method)
    assert_allclose(np.sort(places[~below, 1]), sorted(s.mean for name, s in best.items() if name != "lmeraser-top5"))
    assert np.ptp(places[~below, 1]) > 0.3 * np.ptp(panel.get_ylim())  # it was 0.1
    assert "Below a dashed line" in figure.get_supxlabel()
    nothing, least = panel.get_xticks()[:2]
    free = [x for x, _ in places if x < math.sqrt(nothing * least)]
    assert len(free) == 3 and np.median(free) == pytest.approx(nothing)  # what costs nothing stands around 0


@pytest.mark.parametrize(
    ("means", "lowest"),
    [
        ([98.9, 98.0, 97.0, 96.4, 77.6], 96.4),
        ([98.9, 98.0, 97.0, 77.6, 40.0], 97.0),  # two, far from each other
        ([98.9, 98.0, 97.0, 93.5], 93.5),  # near enough
        ([98.9, 98.9, 98.9, 98.5], 98.5),  # all alike
        ([98.0, 97.0, 50.0], 50.0),  # two make no scale
        ([98.0, 97.0, 96.0, 50.0, 49.0, 48.0, 47.0], 47.0),  # more than half
        ([], 0.0),
    ],
)
def test_the_lowest_accuracy_that_is_to_scale(means, lowest):
    assert lowest_to_scale(means) == lowest


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=10))
def test_what_would_cover_each_other_stands_side_by_side(found):
    centres = np.array([(x, y) for x, y, _ in found], float)
    bars = np.array([(y - reach, y + reach) for _, y, reach in found], float)
    moved = centres[:, 0] + side_by_side(centres, bars, 6.0, 3.0)
    assert moved[0] == centres[0, 0]
    for i, j in itertools.combinations(range(len(found)), 2):
        gap = abs(moved[i] - moved[j])
        if abs(centres[i, 1] - centres[j, 1]) < 6:
            assert gap >= 6 - 1e-6
        elif bars[i, 0] < bars[j, 1] and bars[j, 0] < bars[i, 1]:
            assert gap >= 3 - 1e-6
    if len(found) == 1 or (np.diff(np.sort(centres[:, 0])) >= 6).all():
        assert_allclose(moved, centres[:, 0])  # nothing is moved that need not be


@pytest.mark.parametrize("count", [2, 5])
def test_methods_with_the_same_numbers_are_all_seen(count):
    figure = tradeoff([row(), *(row(method=f"m{i}", accuracy=0.8) for i in range(count))])
    (panel,) = figure.axes
    pixels = panel.transData.transform(places_of(panel))
    distances = np.hypot(*(pixels[:, None] - pixels[None]).transpose(2, 0, 1))
    assert distances[~np.eye(len(pixels), dtype=bool)].min() > 6 * figure.dpi / 72
    assert_allclose(np.sort(places_of(panel)[:, 1]), [80.0] * count + [90.0])


def test_methods_that_all_cost_nothing_have_an_axis_from_nothing_to_everything():
    (panel,) = tradeoff([row(method=m, images_full=0, images_request=0.0) for m in ("ridge", "ncm")]).axes
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels[0] == "0" and labels[-1] == "100"
    assert {container.lines[0].get_xdata()[0] < panel.get_xticks()[1] for container in panel.containers} == {True}


def test_a_second_front_over_the_passes_of_a_prediction(drawn):
    assert [panel.get_xlabel() for panel in drawn.axes[:2]] == [summary.COST.title, summary.PASSES.title]
    rows = [
        row(method=m, accuracy=a, passes=p, images_request=i)
        for m, a, p, i in (("ncm", 0.7, 1.0, 0.0), ("lmeraser", 0.9, 2.0, 10.0), ("sisa-vote", 0.8, 10.0, 5.0))
    ]
    cost, passes = tradeoff(rows).axes
    assert_allclose(fronts(cost)[0].get_ydata(), [70, 80, 90, 90])
    assert_allclose(fronts(passes)[0].get_ydata(), [70, 90, 90])
    assert_allclose(fronts(passes)[0].get_xdata()[:2], [1, 2])
    unknown = [dataclasses.replace(r, passes=0.0) for r in rows]
    assert len(tradeoff(unknown).axes) == 1  # not measured
