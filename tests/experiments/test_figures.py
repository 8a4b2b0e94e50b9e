"""Figures of a comparison: what is drawn is what numpy says, nothing overlaps, nothing depends on where it is drawn."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from comparison_rows import METHODS, TITLES, results, row
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from numpy.testing import assert_allclose

from lmeraser_jax.errors import UserError
from lmeraser_jax.evaluation.plotting import picture
from lmeraser_jax.experiments import curves, figures, simulation, summary, uncertainty
from lmeraser_jax.experiments.drawing import looks
from lmeraser_jax.experiments.labels import name_points, parted
from lmeraser_jax.experiments.tradeoff import tradeoff

DRAWN = [
    *(figures.accuracy, figures.backbones, figures.affected, figures.effort, figures.partitions, figures.heads),
    *(tradeoff, curves.epochs, curves.removal, curves.cut, curves.sequences),
]


@pytest.fixture(scope="module")
def drawn():
    """Every figure of the made-up rows, by name."""
    rows = results().rows
    return {draw.__name__: draw(rows, TITLES) for draw in DRAWN}


def numbers(rows, field, **wanted):
    """Mean and standard deviation, written out."""
    found = [getattr(r, field) for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]
    return np.mean(found), np.std(found, ddof=1)


def dots_of(container):
    """Means and standard deviations as drawn: the points, and half the lengths of their bars."""
    points, _, (bars,) = container.lines
    ends = [segment[:, 0] if len(segment) else (math.nan, math.nan) for segment in bars.get_segments()]
    return points.get_xdata(orig=False), np.diff(ends)[:, 0] / 2


def test_dots_are_means_and_bars_standard_deviations(drawn):
    rows, panel = results().rows, drawn["accuracy"].axes[1]
    assert panel.get_title() == "CIFAR-100"
    names = {title: name for name, title in TITLES.items()}
    order = [names[label.get_text()] for label in drawn["accuracy"].axes[0].get_yticklabels()]
    assert sorted(order) == sorted(METHODS)
    for container, field in zip(panel.containers, ("accuracy", "balanced")):
        expected = [
            numbers(rows, field, experiment="methods", dataset="cifar100", backbone="vit-b-22k", method=name)
            for name in order
        ]
        means, deviations = dots_of(container)
        assert_allclose(means, [100 * mean for mean, _ in expected])
        assert_allclose(deviations, [100 * sd for _, sd in expected], rtol=1e-6)
    assert panel.containers[1].lines[0].get_markerfacecolor() == "white"  # balanced accuracy is hollow
    assert panel.containers[0].lines[0].get_markerfacecolor() != "white"


def test_costs_are_means_on_a_logarithmic_axis(drawn):
    rows, (records, parameters) = results().rows, drawn["affected"].axes
    assert records.get_xscale() == parameters.get_xscale() == "log"
    names = {title: name for name, title in TITLES.items()}
    order = [names[label.get_text()] for label in records.get_yticklabels()]
    for panel, field in ((records, "records_request"), (parameters, "parameters_request")):
        means, _ = dots_of(panel.containers[2])  # the third data set
        wanted = {"experiment": "methods", "dataset": "ham10000", "backbone": "vit-b-22k"}
        assert_allclose(means, [numbers(rows, field, **wanted, method=name)[0] for name in order])


def test_curves_are_means_in_a_band_of_standard_deviations(drawn):
    rows, panel = results().rows, drawn["removal"].axes[0]
    line, band = panel.lines[0], panel.collections[0]
    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    wanted = {"experiment": "removal", "method": "lmeraser"}
    expected = np.array([numbers(rows, "accuracy", **wanted, x=share) for share in shares]) * 100
    assert_allclose(line.get_xdata(), [100 * share for share in shares])
    assert_allclose(line.get_ydata(), expected[:, 0])
    corners = band.get_paths()[0].vertices
    for share, (mean, sd) in zip(shares, expected):
        heights = corners[np.isclose(corners[:, 0], 100 * share), 1]
        assert_allclose([heights.min(), heights.max()], [mean - sd, mean + sd])
    accuracy, clusters = drawn["cut"].axes
    assert accuracy.get_ylabel().startswith("accuracy (%)\n") and clusters.get_ylabel() == "clusters"
    assert_allclose(clusters.lines[0].get_ydata(), [int(900 * 0.6 ** (cut - 6)) for cut in (7, 8, 9, 10, 11)])


def test_what_was_spent_starts_where_it_is_not_nothing(drawn):
    spent, accuracy = drawn["sequences"].axes[:2]
    assert spent.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    line = spent.lines[0]
    assert math.isnan(line.get_ydata()[0]) and line.get_ydata()[-1] == 100 * 20_000 * METHODS["lmeraser"][2]
    assert len(accuracy.lines) == 10 and len({(at.get_color(), at.get_linestyle()) for at in accuracy.lines}) == 10


def test_many_curves_are_parted_by_their_series():
    rows = [
        row(experiment="sequence", method=f"m{m}", series=series, x=x, spent=x, accuracy=m / 20)
        for m in range(8)
        for series in ("uniform", "bursts")
        for x in (0.0, 1.0)
    ]
    titles = [panel.get_title() for panel in curves.sequences(rows).axes]
    assert titles == ["cifar10 · uniform"] * 2 + ["cifar10 · bursts"] * 2


def test_bars_on_logarithmic_axes_go_from_the_lowest_to_the_highest_seed():
    seconds = {"lmeraser": (1.0, 1.0, 10.0), "ncm": (0.01, 0.1, 1.0), "single": (30.0, 31.0, 32.0)}
    assert np.mean(seconds["ncm"]) < np.std(seconds["ncm"], ddof=1) < np.mean(seconds["lmeraser"])
    rows = [row(method=m, seed=i, seconds_request=s) for m, found in seconds.items() for i, s in enumerate(found)]
    panel, images = figures.effort(rows).axes
    order = [label.get_text() for label in panel.get_yticklabels()]
    ends = np.array([bar[:, 0] for bar in panel.containers[0].lines[2][0].get_segments()])
    assert_allclose(ends, [(min(seconds[name]), max(seconds[name])) for name in order])
    assert panel.get_xlim()[0] < ends.min() and ends.max() < panel.get_xlim()[1]
    assert images.get_xlim()[0] > 0  # all alike: a bar of no length


def test_a_bar_that_begins_at_nothing_begins_at_the_place_of_nothing():
    panel = figures.effort([row(seed=s, images_request=x) for s, x in enumerate((0.0, 50.0, 100.0))]).axes[1]
    ((start, end),) = [bar[:, 0] for bar in panel.containers[0].lines[2][0].get_segments()]
    assert panel.get_xticklabels()[0].get_text() == "0" and end == pytest.approx(100)
    assert panel.get_xlim()[0] < start == pytest.approx(panel.get_xticks()[0])


def test_bars_and_axes_stay_inside_of_what_is_possible():
    rows = [row(method=m, seed=s, accuracy=a) for m in ("single", "ncm") for s, a in enumerate((1.0, 1.0, 0.9))]
    rows += [row(method="low", seed=s, accuracy=a) for s, a in enumerate((0.0, 0.0, 0.1))]
    panel = figures.accuracy(rows).axes[0]
    ends = np.concatenate([bar[:, 0] for bar in panel.containers[0].lines[2][0].get_segments()])
    assert ends.min() == 0 and ends.max() == 100 and panel.get_xlim() == (0, 100)
    assert panel.get_xlabel() == "accuracy (%)"  # from 0, nothing to note


@pytest.mark.parametrize("name", ["accuracy", "heads", "partitions", "tradeoff", "removal", "cut", "epochs"])
def test_axes_that_are_zoomed_in_say_so(drawn, name):
    found = []
    for panel in drawn[name].axes:
        for (_, high), title in ((panel.get_xlim(), panel.get_xlabel()), (panel.get_ylim(), panel.get_ylabel())):
            if title.startswith("accuracy"):
                low, _, end = title.partition("zoomed in: ")[2].partition(" to ")
                assert 0 < float(low) < float(end) <= 100 and high == pytest.approx(float(end))
                found.append(title)
    assert found


def test_figures_say_what_their_bars_are(drawn):
    rows = [row(seed=s, tested=n) for s, n in ((0, 400), (1, 2500))]  # 0.9: 1.5 and 0.6 points
    error = "Standard error from 400 to 2,500 test images alone: 0.6 to 1.5 points."
    deviation, extent = "one standard deviation over seeds each way", "from the lowest to the highest seed"
    accuracy, seconds = summary.ACCURACY, summary.SECONDS
    assert uncertainty.bars(rows, [accuracy]) == f"Bars and bands: {deviation}. {error}"
    assert uncertainty.bars(rows, [seconds]) == f"Bars and bands: {extent}."
    both = f"Bars and bands: {deviation}; on logarithmic axes {extent}."
    assert uncertainty.bars([row(), row(seed=1)], [seconds, accuracy]) == both
    assert uncertainty.bars([row()], [accuracy]) == "One seed: no bars."
    for figure in drawn.values():
        assert figure.get_supxlabel().startswith("Bars and bands: ")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_front_against_brute_force(points):
    def beaten(a):
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points)

    front = summary.pareto(points)
    assert sorted(front) == [i for i, point in enumerate(points) if not beaten(point)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_front_without_numbers_that_are_none():
    assert summary.pareto([(math.nan, 99.0), (1.0, math.nan), (2.0, 50.0), (math.inf, 60.0)]) == [2]


@pytest.mark.parametrize("draw", DRAWN)
def test_nothing_to_draw(draw):
    assert draw([]) is None


@pytest.mark.parametrize(
    ("draw", "rows"),
    [
        (figures.backbones, [row(), row(dataset="svhn", backbone="vit-tiny")]),  # no data set has two
        (figures.partitions, [row(), row(method="rndpart", dataset="svhn")]),  # no data set has both
        (figures.heads, [row(), row(method="rndpart")]),
        (figures.affected, [row(records_request=0.0, parameters_request=0.0)]),
        (figures.effort, [row(images_request=0.0, seconds_request=math.nan)]),
        (figures.accuracy, [row(experiment="cut")]),
        (tradeoff, [row(experiment="epochs")]),
        (curves.epochs, [row(), row(experiment="epochs", x=math.nan)]),
        (curves.removal, [row(), row(experiment="cut")]),
    ],
)
def test_missing_experiments_give_none(draw, rows):
    assert draw(rows) is None


def test_spread_is_what_numpy_says(rng):
    values = rng.normal(size=7)
    assert_allclose(summary.spread(values)[:2], [np.mean(values), np.std(values, ddof=1)])
    assert summary.spread(values)[3:] == (min(values), max(values))
    assert summary.spread([3.5]) == (3.5, 0.0, 1, 3.5, 3.5)
    assert summary.spread([0.463] * 5).sd == 0, "whatever the sum rounds to"
    for broken in ([], [1.0, math.nan], [math.inf], [-math.inf, math.inf]):
        assert not summary.spread(broken).known


def test_one_seed_and_numbers_that_are_none():
    figure = figures.accuracy([row(), row(method="ncm", accuracy=math.nan), row(method="ncm", seed=1)])
    accuracy, balanced = figure.axes[0].containers
    means, deviations = dots_of(accuracy)
    assert_allclose(means, [90.0, math.nan])
    assert deviations[0] == 0
    assert_allclose(dots_of(balanced)[0], [80.0, 80.0])
    assert len(picture(figure, "svg")) > 1000
    figure = tradeoff([row(), row(method="ncm", accuracy=math.inf)])
    assert [text.get_text() for text in figure.axes[0].texts] == ["lmeraser"]


def test_cost_of_what_passes_no_image():
    assert summary.cost(row(images_full=0, images_request=0.0)) == 0
    assert math.isnan(summary.cost(row(images_full=0, images_request=1.0)))
    assert summary.cost(row(images_full=200, images_request=3.0)) == 1.5


def test_the_backbone_that_most_methods_were_measured_on():
    rows = [row(backbone="a"), row(backbone="b"), row(backbone="b", method="ncm"), row(dataset="svhn", backbone="c")]
    assert summary.main(rows) == rows[1:]


def boxes_of(texts):
    """Where the words are; an annotation's own box holds its line, too, and places the words first."""
    return [(text, text.get_window_extent() and Text.get_window_extent(text)) for text in texts]


@pytest.mark.parametrize("name", ["tradeoff", "removal", "epochs", "sequences", "cut"])
def test_names_cover_neither_each_other_nor_points(drawn, name):
    figure = drawn[name]
    for panel in figure.axes:
        named = boxes_of(text for text in panel.texts if isinstance(text, Annotation))
        assert len(named) >= 1
        for (a, first), (b, second) in itertools.combinations(named, 2):
            assert not first.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9)), (a, b)
        for text, box in named:
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
            for container in panel.containers:
                assert not box.contains(*panel.transData.transform(container.lines[0].get_xydata()[0])), text


def test_names_stay_inside_the_panel():
    panel = Figure((5, 4)).subplots()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    corners = list(itertools.product((0.0, 0.5, 1.0), (0.0, 0.5, 1.0)))
    for text, box in boxes_of(name_points(panel, corners, ["a long name"] * 9, ["black"] * 9, [])):
        assert panel.bbox.x0 <= box.x0 and box.x1 <= panel.bbox.x1, text
        assert panel.bbox.y0 <= box.y0 and box.y1 <= panel.bbox.y1, text


def test_names_keep_clear_of_markers_in_a_crowd():
    panel = Figure((5, 4)).subplots()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    crowd = [(0.9, 0.9 - 0.035 * i) for i in range(8)]
    named = boxes_of(name_points(panel, crowd, ["a method"] * 8, ["black"] * 8, []))
    for text, box in named:
        assert not any(box.contains(*panel.transData.transform(point)) for point in crowd), text
    for (_, first), (_, second) in itertools.combinations(named, 2):
        assert not first.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9))


@pytest.mark.parametrize("seed", range(4))
def test_lines_from_names_to_points_do_not_cross(seed):
    """In a crowd; crossings by solving for them."""
    panel = Figure((5, 4)).subplots()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    crowd = [(float(x), float(y)) for x, y in np.random.default_rng(seed).uniform(0.05, 0.35, (10, 2))]
    pixels = panel.figure.dpi / 72
    lines = [
        (panel.transData.transform(name.xy), np.array(name.get_position()) * pixels)
        for name in name_points(panel, crowd, ["a long method"] * 10, ["black"] * 10, [])
    ]
    for (a, along), (b, beside) in itertools.combinations(lines, 2):
        both = np.stack([along, -beside], axis=1)
        if abs(np.linalg.det(both)) > 1e-6:
            parts = np.linalg.solve(both, b - a)
            assert not ((0 < parts) & (parts < 1)).all(), (a, b)


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=8), st.floats(1, 12))
def test_parted_places(wanted, gap):
    wanted = sorted(wanted)
    found = parted(wanted, gap, 0.0, 100.0)
    assert (np.diff(found) >= gap - 1e-9).all()
    if gap * (len(wanted) - 1) <= 100:
        assert found[0] >= -1e-9 and found[-1] <= 100 + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(wanted)) and wanted[0] >= 0 and wanted[-1] <= 100:
        assert_allclose(found, wanted, atol=1e-9)  # nothing is moved that need not be


def test_every_text_is_large_enough_and_every_axis_has_a_title(drawn):
    for name, figure in drawn.items():
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) >= 9, name
        assert all(panel.get_xlabel() for panel in figure.axes), name


def test_methods_differ_in_colour_and_marker_and_keep_them():
    found = looks(range(50))
    assert len(set(found.values())) == 50 and all(found[i] == looks(range(20))[i] for i in range(20))
    rows = [row(method="retrain"), row(), row(method="rndpart", accuracy=0.7)]
    rows += [row(experiment="removal", x=x, method=name) for x in (0.0, 0.5) for name in ("rndpart", "lmeraser")]
    of_pair = {c.get_label(): c.lines[0].get_color() for c in figures.partitions(rows).axes[0].containers}
    (panel,) = curves.removal(rows).axes
    of_curves = {text.get_text(): line.get_color() for line, text in zip(panel.lines, panel.texts)}
    assert of_pair == of_curves and len(set(of_pair.values())) == 2


def test_the_same_bytes_wherever_they_are_drawn():
    rows = [row(accuracy=0.8 + seed / 100, seed=seed, method=name) for seed in range(2) for name in ("lmeraser", "ncm")]
    before = dict(matplotlib.rcParams)
    first = [picture(figures.accuracy(rows), kind) for kind in ("png", "svg")]
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context(
        {"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": "other", "axes.facecolor": "red"}
    ):
        second = [picture(figures.accuracy(rows), kind) for kind in ("png", "svg")]
    assert first == second
    assert b"<dc:date>" not in first[1] and first[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["$\\frac{$", "<script>&", "日本語 \U0001f600", "two\nlines\0\u202e", "W" * 99, ""])
def test_names_of_any_kind(name):
    rows = [row(method=name, dataset=name), row(dataset=name)]
    rows += [row(experiment="epochs", method=method, x=x, dataset=name) for x in (1.0, 2.0) for method in (name, "b")]
    shown = "".join(c if c.isprintable() else "�" for c in " ".join(name.split())) or "–"
    shown = shown if len(shown) <= 30 else shown[:29] + "…"
    for figure in (figures.accuracy(rows), tradeoff(rows), curves.epochs(rows)):
        assert figure.axes[0].get_title() == shown
        ElementTree.fromstring(picture(figure, "svg"))
    assert shown in [label.get_text() for label in figures.accuracy(rows).axes[0].get_yticklabels()]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    for draw in (lambda: figures.accuracy([row()]), lambda: simulation._draw("x.png", [1.0], [])):
        with pytest.raises(UserError, match=r"^figures need matplotlib; .* pip install matplotlib$"):
            draw()


def test_the_picture_of_a_plan_has_ticks_for_people(monkeypatch):
    kept = []
    monkeypatch.setattr(simulation.plotting, "save", lambda figure, path: kept.append(figure))
    band = simulation.Band(1.0, 0.1, 0.8, 1.2, 0.01)
    panel = simulation._Panel("seconds", [1.0, 2.0], [band, band], 1.0, {})
    for requests in ([0.1, 10.0], [2.0, 9.0]):
        simulation._draw("x.png", requests, [panel, panel])
        kept[-1].draw_without_rendering()
        assert not any("$" in text.get_text() for text in kept[-1].findobj(Text))
    wide, narrow = (figure.axes[0] for figure in kept)
    assert {"0.1", "1", "10"} <= {label.get_text() for label in wide.get_xticklabels()}
    assert {"3", "6"} <= {label.get_text() for label in narrow.get_xticklabels(minor=True)}


def test_matplotlib_is_loaded_where_it_draws_and_pyplot_never():
    code = """
import sys
from lmeraser_jax.experiments import page
assert "matplotlib" not in sys.modules and "jax" not in sys.modules
from comparison_rows import row
from lmeraser_jax.evaluation.plotting import picture
picture(page.tradeoff.tradeoff([row()]), "png")
assert "matplotlib.pyplot" not in sys.modules
"""
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests / 'support'}{os.pathsep}{tests.parent}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [
        (0.0, None, "0"),
        (1.0, None, "1"),
        (0.03124, None, "0.0312"),
        (27.614, None, "27.6"),
        (3185.0, None, "3,185"),
        (69_840.0, None, "69.8k"),
        (85.8e6, None, "85.8M"),
        (2e9, None, "2.00G"),
        (12.34, 3185.0, "12"),
        (1234.0, 69_840.0, "1.2k"),
    ],
)
def test_numbers_for_people(value, like, text):
    assert summary.amount(value, like) == text


def test_quantities_show_a_deviation_where_there_is_one():
    rows = [dataclasses.replace(row(), accuracy=a) for a in (0.90, 0.94)]
    (found,) = summary.spreads(rows, summary.ACCURACY, summary.by_method).values()
    assert summary.ACCURACY.shown(found) == "92.00 ± 2.83"
    assert summary.ACCURACY.shown(summary.spread([92.0])) == "92.00"
    assert summary.ACCURACY.shown(summary.MISSING) == "–"
