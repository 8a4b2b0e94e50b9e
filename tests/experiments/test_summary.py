"""Tables of a comparison: numbers against an independent calculation, pages that are safe for any name."""

import base64
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
from comparison_rows import TITLES, recorded, row
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from lmeraser_jax.experiments import summary
from lmeraser_jax.experiments.results import Results
from lmeraser_jax.experiments.summary import write_report

EVIL = "<script>alert('1')</script>\"'&<img src=x onerror=alert(2)>|[a](http://x)**"


class Reader(HTMLParser):
    """Tags with attributes, and text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def table_of(rows, titles=TITLES):
    """{(title of the row, head of the column): cell} of the first table."""
    table = summary.tables(rows, titles)[0]
    assert all(len(line) == len(table.heads) for line in table.rows)
    return {(line[0].text, head): cell for line in table.rows for head, cell in zip(table.heads, line)}


def test_the_numbers_of_a_table_come_from_the_rows():
    """Recorded rows of five seeds; means, deviations and intervals by numpy and scipy."""
    rows = [r for r in recorded().rows if r.experiment == "methods"]
    cells = table_of(rows)
    ours = {r.seed: r for r in rows if r.method == "lmeraser"}
    for name in ("lmeraser", "linear-head", "sisa-vote", "single"):
        mine = {r.seed: r for r in rows if r.method == name}
        shares = [100 * r.accuracy for r in mine.values()]
        accuracy = f"{np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f}"
        assert cells[TITLES[name], "accuracy (%)"].text == accuracy
        costs = [100 * r.images_request / r.images_full if r.images_full else 0.0 for r in mine.values()]
        cost = cells[TITLES[name], "images per request (% of a full tuning)"].text
        assert float(cost.split(" ± ")[0]) == pytest.approx(np.mean(costs), rel=1e-2)
        errors = [100 * math.sqrt(r.accuracy * (1 - r.accuracy) / 299) for r in mine.values()]
        assert cells[TITLES[name], summary.TEST_ERROR.title].text.startswith(f"{np.mean(errors):.2f}")
        pairs = [(100 * mine[seed].accuracy, 100 * ours[seed].accuracy) for seed in ours]
        if name != "lmeraser":
            low, high = scipy.stats.ttest_rel(*zip(*pairs)).confidence_interval(0.95)
            difference = f"{np.mean(np.subtract(*zip(*pairs))):+.2f} [{low:+.2f}, {high:+.2f}]"
            assert cells[TITLES[name], "minus LMEraser (points)"].text == difference


def test_simpler_methods_stand_where_their_accuracy_puts_them():
    """The best mean comes first and is marked; always naming the largest class is a row as well."""
    means = (("lmeraser", 0.9), ("ncm", 0.8))
    rows = [row(method=name, seed=s, accuracy=mean, majority=0.85) for name, mean in means for s in (0, 1)]
    rows += [row(method="linear-head", accuracy=0.95, images_full=0, images_request=0.0)]
    (table,) = summary.tables(rows, TITLES)
    assert [(line[0].text, *line[1]) for line in table.rows] == [
        ("linear head", "95.00", True),
        ("LMEraser", "90.00", False),
        ("always the largest class", "85.00", False),
        ("nearest class mean", "80.00", False),
    ]
    cells = table_of(rows)
    cost = "images per request (% of a full tuning)"
    assert cells["linear head", cost] == ("0", True) and cells["LMEraser", cost] == ("5", False)
    assert table.caption == "CIFAR-10, vit-b-22k: 100 records, 2 seeds"
    assert "forward passes per prediction" not in table.heads, "no row has it"


def test_numbers_that_are_none_are_shown_as_missing():
    rows = [row(), row(method="ncm", accuracy=math.nan), row(method="ncm", seed=1, seconds_request=math.inf)]
    cells = table_of(rows)
    for head, text in (("accuracy (%)", "–"), ("time per request (s)", "–"), ("balanced accuracy (%)", "80.00")):
        assert cells["nearest class mean", head].text == text


def test_every_data_set_and_backbone_has_a_table():
    rows = [row(backbone="a"), row(backbone="b"), row(backbone="b", method="ncm"), row(dataset="svhn", backbone="c")]
    tables = summary.tables(rows, TITLES)
    assert [table.caption.partition(":")[0] for table in tables] == ["CIFAR-10, a", "CIFAR-10, b", "svhn, c"]
    assert [len(table.rows) for table in tables] == [1, 2, 1]


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=9))
def test_intervals_of_paired_differences_against_scipy(values):
    first, second = np.array(values, float).T / 10
    assume(np.ptp(first - second) > 0)
    difference = summary.paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert_allclose(difference, (np.mean(first - second), expected.low, expected.high), atol=1e-9)


def test_one_seed_or_equal_differences_give_no_interval():
    for first, second in (({0: 91.0, 1: 5.0}, {0: 90.0, 7: 1.0}), ({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})):
        mean, low, high = summary.paired_difference(first, second)
        assert mean == 1 and math.isnan(low) and math.isnan(high)
    assert summary.paired_difference({0: 1.0}, {1: 1.0}) is None
    assert summary.paired_difference({0: 1.0}, {0: math.nan}) is None


def test_a_spread_is_what_numpy_says(rng):
    values = rng.normal(size=7)
    assert_allclose(summary.spread(values)[:2], [np.mean(values), np.std(values, ddof=1)])
    assert summary.spread(values)[2:] == (min(values), max(values))
    assert summary.spread([0.463] * 5).sd == 0, "whatever the sum rounds to"
    for broken in ([], [1.0, math.nan], [math.inf]):
        assert not summary.spread(broken).known


def test_numbers_have_three_digits():
    values = (0.0, 1.0, 0.03124, 27.614, 3185.0, 69_840.0, 85.8e6, 2e9)
    texts = ["0", "1", "0.0312", "27.6", "3,185", "69.8k", "85.8M", "2.00G"]
    assert [summary.amount(value, value) for value in values] == texts
    assert summary.amount(12.34, 3185.0) == "12" and summary.amount(1234.0, 69_840.0) == "1.2k"


@pytest.fixture
def hostile(tmp_path):
    """(report.html, report.md) of rows whose names are hostile."""
    rows = [row(method=m, dataset=EVIL, backbone=EVIL, source="s") for m in ("lmeraser", "single")]
    results = Results(tuple(rows), {"s": {"command": f"compare '{EVIL}'", "machine": EVIL}})
    paths = write_report(tmp_path, results, {"single": EVIL}, [(EVIL, b"<svg/>")])
    return [path.read_text("utf-8") for path in paths]


def test_the_page_escapes_every_name_and_loads_nothing(hostile):
    read = Reader(hostile[0])
    tags = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ul", "li", "img", "div"}
    assert {tag for tag, _ in read.tags} == tags | {"table", "thead", "tbody", "tr", "th", "td"}
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert read.text.count(EVIL) >= 6 and EVIL not in hostile[0]
    images = [attributes["src"].partition(";base64,") for tag, attributes in read.tags if tag == "img"]
    assert [(kind, base64.b64decode(data)) for kind, _, data in images] == [("data:image/svg+xml", b"<svg/>")]
    assert "default-src 'none'" in hostile[0] and "url(" not in hostile[0] and "@import" not in hostile[0]
    assert set(re.findall(r"""(?:src|href)=["']?(\w+:)""", hostile[0])) == {"data:"}


def test_names_stay_inside_their_cell_of_the_markdown_table(hostile):
    lines = hostile[1].splitlines()
    assert "<script" not in hostile[1]
    for start in [i for i, line in enumerate(lines) if line.startswith("|---")]:
        columns = lines[start].count("|")
        table = [lines[start - 1], *lines[start + 1 : lines.index("", start)]]
        assert len(table) >= 2
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {columns}


def test_a_recorded_comparison_has_a_report(tmp_path):
    write_report(tmp_path, recorded(), TITLES)
    shown = Reader((tmp_path / "report.html").read_text("utf-8")).text
    text = (tmp_path / "report.md").read_text("utf-8")
    for name in ("LMEraser", "linear head", "always the largest class", "Sources"):
        assert name in shown and name in text
    assert write_report(tmp_path, Results(()), TITLES)[0].read_text("utf-8").count("<table>") == 0


def test_the_sources_are_those_of_the_rows(tmp_path):
    sources = {name: {"command": f"compare {name}", "machine": "box", "date": "today"} for name in "abc"}
    rows = (row(source="a"), row(method="ncm", source="b"), row(method="ridge", source="a"))
    write_report(tmp_path, Results(rows, sources), TITLES)
    listed = (tmp_path / "report.md").read_text("utf-8").partition("## Sources\n\n")[2].splitlines()
    assert listed == ["- compare a · box · today", "- compare b · box · today"]
