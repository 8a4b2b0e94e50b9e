"""Figures of a comparison: what is drawn is what numpy says, and depends on nothing but the rows."""

import dataclasses
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from comparison_rows import TITLES, recorded, row
from numpy.testing import assert_allclose

from lmeraser_jax import interrupt
from lmeraser_jax.experiments import figures, summary

NAMES = {title: name for name, title in TITLES.items()}


@pytest.fixture(scope="module")
def rows():
    """Recorded rows, and some of them again with another backbone."""
    originals = recorded().rows
    copied = [r for r in originals if r.method == "lmeraser" and r.experiment != "cut"]
    return [*originals, *(dataclasses.replace(r, backbone="other") for r in copied)]


@pytest.fixture(scope="module")
def drawn(rows):
    return {name: draw(rows, TITLES) for name, (_, draw) in figures.FIGURES.items()}


def values_of(rows, field, **wanted):
    return [getattr(r, field) for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]


def bars_of(container, axis):
    """Means and the ends of the bars as drawn."""
    points, _, bars = container.lines
    means = points.get_xdata(orig=False) if axis == 0 else points.get_ydata(orig=False)
    return means, np.array([segment[:, axis] for segment in bars[0].get_segments()])


def test_dots_are_means_and_bars_go_from_the_lowest_to_the_highest_seed(rows, drawn):
    assert [panel.get_title() for panel in drawn["accuracy"].axes] == ["digits · small ViT", "digits · other"]
    panel = drawn["accuracy"].axes[0]
    order = [NAMES.get(label.get_text(), label.get_text()) for label in panel.get_yticklabels()]
    for container, field in zip(panel.containers, ("accuracy", "balanced")):
        means, ends = bars_of(container, 0)
        expected = [values_of(rows, field, experiment="methods", backbone="small ViT", method=name) for name in order]
        assert_allclose(means, [100 * np.mean(values) for values in expected])
        assert_allclose(ends, [(100 * min(values), 100 * max(values)) for values in expected])
        if field == "accuracy":
            assert list(means) == sorted(means, reverse=True), "the best one on top"


def test_curves_are_means_along_the_axis(rows, drawn):
    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    wanted = {"experiment": "removal", "method": "lmeraser", "backbone": "small ViT"}
    line = drawn["removal"].axes[0].containers[0].lines[0]
    assert_allclose(line.get_xdata(orig=False), shares)
    means = [100 * np.mean(values_of(rows, "accuracy", **wanted, x=x)) for x in shares]
    assert_allclose(line.get_ydata(orig=False), means)
    panels = {(panel.get_title(), panel.get_ylabel()): panel for panel in drawn["sequences"].axes}
    spent = panels["digits · uniform", summary.SPENT.title]
    expected = values_of(rows, "spent", experiment="sequence", series="uniform", backbone="small ViT")
    assert_allclose(spent.containers[0].lines[0].get_ydata(orig=False), expected)


def beaten(point, points):
    """Whether another (cost, accuracy) is at least as good in both."""
    return any(cost <= point[0] and accuracy >= point[1] and (cost, accuracy) != point for cost, accuracy in points)


def test_the_line_of_the_best_trade_offs(rows, drawn):
    panel, places = drawn["tradeoff"].axes[0], {}
    for r in rows:
        if (r.experiment, r.backbone) == ("methods", "small ViT"):
            cost = 100 * r.images_request / r.images_full if r.images_full else 0.0
            places.setdefault(r.method, []).append((cost, 100 * r.accuracy))
    points = [tuple(np.mean(values, axis=0)) for values in places.values()]
    (front,) = [line for line in panel.lines if line.get_gid() == "front"]
    assert_allclose(front.get_xydata(), sorted(point for point in points if not beaten(point, points)))
    assert len(panel.containers) == len(points)


def test_every_figure_has_a_legend_of_all_that_it_draws(drawn):
    for name, figure in drawn.items():
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(labels) == len(set(labels)) >= len(figure.axes[0].containers) > 0, name
        assert all(panel.get_xlabel() for panel in figure.axes), name
    titles = {figures.title_of(name, TITLES) for name in {r.method for r in recorded().rows}}
    assert {text.get_text() for text in drawn["tradeoff"].legends[0].get_texts()} == titles


def test_rows_without_an_experiment_give_no_figure():
    for name, (_, draw) in figures.FIGURES.items():
        assert draw([], TITLES) is None, name
    assert figures.accuracy([row(experiment="cut")], TITLES) is None


def test_names_of_any_kind_are_drawn():
    for name in ("$\\frac{$", "<script>&", "日本語 \U0001f600", "two\nlines\0\u202e", "W" * 99, "", "_own"):
        rows = [row(method=name, dataset=name), row(dataset=name)]
        rows += [row(experiment="epochs", method=name, x=x, dataset=name) for x in (1.0, 2.0)]
        shown = "".join(c if c.isprintable() else "�" for c in " ".join(name.split())) or "–"
        shown = shown if len(shown) <= 40 else shown[:39] + "…"
        for kind in ("accuracy", "tradeoff", "epochs"):
            figure = figures.FIGURES[kind][1](rows, {})
            assert figure.axes[0].get_title().partition(" · vit-b")[0] == shown
            labels = [text.get_text().strip() for text in figure.legends[0].get_texts()]
            assert kind == "accuracy" or shown in labels
        ElementTree.fromstring(figures.picture(figure, "svg"))


def test_the_same_bytes_whatever_the_user_s_settings_are():
    rows = [row(accuracy=0.8 + seed / 100, seed=seed, method=name) for seed in (0, 1) for name in ("lmeraser", "ncm")]
    before, drawn = dict(matplotlib.rcParams), []
    for changes in ({}, {"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": "other"}):
        with matplotlib.rc_context(changes):
            drawn.append([figures.picture(figures.accuracy(rows, {}), kind) for kind in ("png", "svg")])
    assert drawn[0] == drawn[1] and b"<dc:date>" not in drawn[0][1]
    assert dict(matplotlib.rcParams) == before


def test_files_are_written_and_stale_ones_removed(tmp_path):
    rows = [row(seed=seed) for seed in (0, 1)] + [row(experiment="removal", x=x) for x in (0.0, 0.5)]
    paths, plates = figures.write_figures(tmp_path, rows, TITLES)
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir()) and len(plates) == len(paths) / 2 == 3
    fewer, _ = figures.write_figures(tmp_path, rows[:2], TITLES)
    assert sorted(fewer) == sorted((tmp_path / "figures").iterdir()) and len(fewer) == len(paths) - 2
    interrupt.request_stop()
    with pytest.raises(interrupt.Stopped):
        figures.write_figures(tmp_path, rows, TITLES)
    interrupt._requested.clear()
