"""The report page: escaped, complete in itself, the same bytes twice, and its sentences are what the rows say."""

import base64
import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from comparison_rows import TITLES, digits, results, row
from hypothesis import assume, given
from hypothesis import strategies as st

from lmeraser_jax import interrupt
from lmeraser_jax.experiments import console, findings, page, tables
from lmeraser_jax.experiments.page import write_report
from lmeraser_jax.experiments.results import Results
from lmeraser_jax.experiments.uncertainty import Claim, paired, verdict

EVIL = "<script>alert('1')</script>\"'&<img src=x onerror=alert(2)>"
ALONE = {"meta", "img"}


class Reader(HTMLParser):
    """Tags, attributes and text; fails where tags are not nested."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append((data, "class" in self.tags[-1][1]))


def small(**changes):
    """Two methods, two seeds, and one experiment along an axis."""
    rows = [
        row(method=m, seed=s, accuracy=a + s / 100, **changes)
        for m, a in (("lmeraser", 0.9), ("single", 0.8))
        for s in (0, 1)
    ]
    return rows + [row(experiment="removal", x=x, accuracy=0.9 - x / 10, **changes) for x in (0.0, 0.5)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    evil = small(dataset=EVIL, backbone=EVIL, series=EVIL)
    paths = write_report(
        folder, Results(tuple(evil), f"lmeraser compare  --dataset='{EVIL}'", EVIL), {"single": EVIL}, b"\x89PNG"
    )
    return folder, paths, (folder / "report.html").read_text("utf-8")


def test_what_comes_from_data_is_escaped(written):
    _, _, text = written
    read = Reader(text)
    assert {tag for tag, _ in read.tags} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "p",
            "code",
            "ul",
            "li",
            "figure",
            "img",
            "div",
        ),
        *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    }
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert f"lmeraser compare  --dataset='{EVIL}'" in read.text  # the exact command
    shown = "".join(read.text)
    assert shown.count(EVIL) >= 10 and EVIL not in text
    assert html.unescape(EVIL) == EVIL


def test_the_page_needs_nothing_else(written):
    _, _, text = written
    images = [attributes["src"] for tag, attributes in Reader(text).tags if tag == "img"]
    assert len(images) == 6 and all(re.match(r"data:image/(svg\+xml|png);base64,", image) for image in images)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    for image in images[:-1]:
        svg = base64.b64decode(image.partition(",")[2])
        ElementTree.fromstring(svg)
        links = set(re.findall(rb"https?://[^\s\"<>]+", svg))
        assert all(
            link.startswith(
                (b"http://www.w3.org/", b"https://matplotlib.org/", b"http://purl.org/", b"http://creativecommons.org/")
            )
            for link in links
        )
        assert b"<script" not in svg and not re.findall(rb'href="(?!#)', svg)
    assert images[-1] == "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_files_and_where_they_come_from(written):
    folder, paths, text = written
    assert paths[0] == folder / "report.html"
    assert sorted(paths[1:]) == sorted((folder / "figures").iterdir())
    assert {path.stem for path in paths[1:]} == {"accuracy", "tradeoff", "affected", "effort", "removal"}
    sources = re.findall(r'<p class="source">(seeds per point: [^·]*) ·', text)
    assert (
        sources
        == ["seeds per point: 1 to 2"]
        + ["seeds per point: 2"] * 2
        + ["seeds per point: 1"]
        + ["seeds per point: 2"] * 2
    )
    for heading in ("Backbones", "Accuracy over epochs", "Number of clusters", "Sequences"):
        assert f"<li>{heading}" in text


def test_the_same_bytes_and_nothing_stale(tmp_path):
    first = write_report(tmp_path, Results(tuple(small()), "a", "b"))
    before = {path: path.read_bytes() for path in first}
    assert write_report(tmp_path, Results(tuple(small()), "a", "b")) == first
    assert {path: path.read_bytes() for path in first} == before
    less = write_report(tmp_path, Results(tuple(small()[:1])))
    assert sorted(less[1:]) == sorted((tmp_path / "figures").iterdir()) and len(less) < len(first)


def test_a_report_of_nothing(tmp_path):
    assert write_report(tmp_path, Results(())) == [tmp_path / "report.html"]
    text = "".join(Reader((tmp_path / "report.html").read_text("utf-8")).text)
    assert "not measured" in text and "seeds per point: 0" in text


def test_asked_to_stop_it_leaves_the_old_page(tmp_path):
    (tmp_path / "report.html").write_text("old")
    interrupt.request_stop()
    with pytest.raises(interrupt.Stopped):
        write_report(tmp_path, Results(tuple(small())))
    interrupt._requested.clear()
    assert (tmp_path / "report.html").read_text() == "old"


def test_table_of_methods():
    rows = [row(seed=s, accuracy=a, images_request=40.0) for s, a in ((0, 0.90), (1, 0.94))]
    rows += [row(method="ncm", accuracy=0.925, images_request=0.4, seconds_request=0.0)]
    rows += [row(method="nan", accuracy=0.99, balanced=float("nan"), images_request=0.0, seed=s) for s in (0, 1)]
    cells = Reader(tables.methods(rows, {})).cells
    columns = len(cells) // 3
    ours, ncm, nan = (cells[i * columns : (i + 1) * columns] for i in range(3))
    assert ours[:3] == [("92.00 ± 2.83", False), ("80.00", False), ("4", False)]
    assert ncm[:3] == [("92.50", False), ("80.00", False), ("0.0400", False)]
    assert nan[:3] == [("99.00", True), ("–", False), ("0", True)]
    assert [column[3] for column in (ours, ncm, nan)] == [("0.500", False), ("–", False), ("0.500", False)]  # all alike
    assert "cifar10, vit-b-22k, 100 records" in tables.methods(rows, {})


def test_table_of_requests():
    rows = [row(seconds_request=27.61), row(method="single", seconds_request=3185.0)]
    rows += [row(dataset="svhn", seconds_request=213.81)]
    text = tables.requests(rows, {"svhn": "SVHN"})
    assert Reader(text).cells[:4] == [("27.6", True), ("214", False), ("3,185", False), ("–", False)]
    assert '<th scope="col">SVHN</th>' in text and text.count("<table>") == 2


def test_table_of_requests_for_both_kinds_of_records():
    rows = [row(seconds_request=3.0, seconds_unsampled=2.0, seconds_sampled=7.0), row(method="single")]
    read = Reader(tables.requests(rows, {}))
    names = [text for text in read.text if text.startswith("time per request")]
    assert names == [f"time per request (s){kind}" for kind in ("", ", record not sampled", ", sampled record")]
    assert [text for text, _ in read.cells][:6] == ["3", "0.500", "2", "–", "7", "–"]


def test_who_affects_all_records_and_passes_few_images_is_named():
    whole = {"records": 100, "records_request": 99.0, "images_full": 1000}
    rows = [
        row(records=100, records_request=10.0),
        row(method="beside", images_request=100.0, **whole),
        row(method="single", images_request=990.0, **whole),
        row(method="ridge", images_request=0.0, **whole | {"images_full": 0}),
    ]
    assert findings.affected(rows, {"beside": "beside it"})[-1].endswith("passes no image: beside it, ridge.")
    assert len(findings.affected(rows[::2], {})) == len(findings.affected(rows, {})) - 1


def test_passes_of_a_prediction_and_the_error_of_the_test_set_are_columns():
    rows = [row(passes=2.0, tested=2500), row(method="sisa-vote", passes=10.0, tested=2500)]
    read = Reader(tables.methods(rows, {}))
    assert ("2", True) in read.cells and ("10", False) in read.cells and "forward passes per prediction" in read.text
    assert ("0.60", False) in read.cells and "standard error of the test set (points)" in read.text
    without = Reader(tables.methods([row()], {})).text
    assert "forward passes per prediction" not in without and "standard error of the test set (points)" not in without


def test_numbers_that_are_none_are_named():
    rows = [row(), row(method="ncm", seed=3, accuracy=float("nan"), spent=float("inf"))]
    read = Reader(tables.not_numbers(rows, TITLES))
    assert read.text[1:] == [f"CIFAR-10, nearest class mean, methods, seed 3: {name}" for name in ("accuracy", "spent")]
    assert tables.not_numbers([row()], {}) == ""


def seeded(*values):
    return dict(enumerate(values))


A = seeded(91.0, 92.0, 93.0)
ABOVE, BELOW = seeded(90.0, 90.9, 92.1), seeded(92.0, 93.1, 93.9)  # by about 1 point in every seed
NEAR, APART = seeded(91.1, 91.9, 93.1), seeded(89.0, 92.5, 95.5)
BESIDE = seeded(90.4, 91.35, 92.45)  # less than 1 point, but perhaps more


@pytest.mark.parametrize(
    ("sign", "second", "text"),
    [
        (">", ABOVE, "holds, +1.00 points (95 % interval +0.75 to +1.25, 3 seeds)"),
        (">", BELOW, "contradicted, -1.00 points (95 % interval -1.25 to -0.75, 3 seeds)"),
        (">", NEAR, "undecided, -0.03 points (95 % interval -0.32 to +0.25, 3 seeds)"),
        ("~", NEAR, "holds, -0.03 points (95 % interval -0.32 to +0.25, 3 seeds)"),
        ("~", ABOVE, "differs, +1.00 points (95 % interval +0.75 to +1.25, 3 seeds)"),
        ("~", BELOW, "differs, -1.00 points (95 % interval -1.25 to -0.75, 3 seeds)"),
        ("~", BESIDE, "holds, +0.60 points (95 % interval +0.48 to +0.72, 3 seeds)"),
        ("~", APART, "undecided, -0.33 points (95 % interval -5.93 to +5.27, 3 seeds)"),  # noise confirms nothing
        (">", APART, "undecided, -0.33 points (95 % interval -5.93 to +5.27, 3 seeds)"),
        ("~", seeded(91.0), "one seed decides nothing, +0.00 points"),
        (">", seeded(90.0), "one seed decides nothing, +1.00 points"),
        (">", {2: 92.0, 7: 1.0}, "one seed decides nothing, +1.00 points"),  # the only one in common
        (">", seeded(90.0, 91.0, 92.0), "undecided, +1.00 points in each of 3 seeds"),
        (">", {}, "not measured"),
        ("~", {5: 91.0}, "not measured"),
        ("~", seeded(91.0, float("nan")), "not measured"),
    ],
)
def test_verdicts(sign, second, text):
    assert verdict(Claim("a", sign, "b"), {"a": A, "b": second}) == text
    assert verdict(Claim("a", sign, "c"), {"a": A}) == "not measured"


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=9))
def test_intervals_of_paired_differences_against_scipy(values):
    first, second = np.array(values, float).T / 10
    assume(np.ptp(first - second) > 0)
    found = paired(seeded(*first), seeded(*second))
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found.seeds == len(values) and found.mean == pytest.approx(np.mean(first - second))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_seeds_share_their_split_and_are_compared_with_themselves():
    """What differs between seeds alike for both methods is no doubt about which is better."""
    both = [row(method=m, seed=s, accuracy=a / 100 + (m == "lmeraser") * d / 100)
            for s, (a, d) in enumerate(((60, 2.0), (75, 2.2), (90, 1.8))) for m in ("rndpart", "lmeraser")]  # fmt: skip
    assert findings.partitions(both, {})[0].endswith(
        "cifar10: holds, +2.00 points (95 % interval +1.50 to +2.50, 3 seeds)."
    )


def test_the_digits_decide_little():
    """Three real seeds: neither likeness nor order."""
    rows = digits()
    single, damvp = findings.accuracy(rows, {})[1:]
    assert single.endswith("digits: undecided, -0.33 points (95 % interval -1.17 to +0.50, 3 seeds).")
    assert damvp.endswith("digits: undecided, +0.89 points (95 % interval -0.84 to +2.62, 3 seeds).")


def test_orderings_of_the_paper():
    rows = [
        row(method=m, dataset=d, seed=s, accuracy=(a + s * (1 + (a - 80) / 100)) / 100)
        for m, a in (("lmeraser", 90), ("rndpart", 80))
        for d in ("x", "y")
        for s in range(3)
        if (m, d) != ("rndpart", "y")
    ]
    assert findings.partitions(rows, TITLES) == [
        "Paper: LMEraser is more accurate than random partition. Here:"
        " x: holds, +10.10 points (95 % interval +9.85 to +10.35, 3 seeds); y: not measured."
    ]
    assert findings.heads(rows, {})[0].endswith("Here: x: not measured; y: not measured.")
    assert findings.heads([], {})[0].endswith("Here: not measured.")


def test_cuts_are_compared_seed_by_seed():
    rows = [
        row(experiment="cut", x=x, clusters=k, seed=s, accuracy=(50 + 10 * s + gain + s * gain / 10) / 100)
        for x, k, gain in ((2.0, 40, 0.0), (3.0, 20, 0.5), (4.0, 10, 2.0))
        for s in range(3)
    ]
    assert findings.cut(rows, {})[0].endswith(
        "10 (cut 4) against 40 (cut 2): holds, +2.20 points (95 % interval +1.70 to +2.70, 3 seeds)."
    )


def test_the_page_and_the_console_say_what_deviations_are(tmp_path):
    known = Results(tuple(row(method=m, seed=s, tested=2500) for m in ("lmeraser", "ncm") for s in (0, 1)))
    for results_, sampling in ((known, True), (Results((row(), row(seed=1))), False)):
        write_report(tmp_path, results_)
        shown = "".join(Reader((tmp_path / "report.html").read_text("utf-8")).text)
        assert "± is one sample standard deviation (n - 1) over seeds" in shown and "sqrt(p (1 - p) / n)" in shown
        assert "Student's 95 % interval" in shown and "inside ±1 point" in shown
        lines = console.table(results_, {})
        assert "±: one standard deviation over seeds" in lines
        for text in (shown, lines):
            assert ("Standard error from 2,500 test images alone: 0.6 points." in text) == sampling


def sourced(*names):
    return [row(method=f"m{i}", source=name) for i, name in enumerate(names)]


def test_the_commands_under_a_figure_are_those_of_its_rows(tmp_path):
    sources = {name: {"command": f"compare --methods='{name}'", "machine": f"box {name}"} for name in "abcde"}
    rows = [*sourced("a", "b", "a", ""), row(experiment="removal", source="c"), row(experiment="removal", x=0.5)]
    rows += [row(experiment="epochs", x=x, source=name) for x, name in enumerate("edcb")]
    write_report(tmp_path, Results(tuple(rows), "compare <all>", "box", sources))
    text = (tmp_path / "report.html").read_text("utf-8")

    def under(heading):
        source = text.partition(f"<h2>{heading}")[2].partition('<p class="source">')[2].partition("</p>")[0]
        return html.unescape(source.replace("<code>", "").replace("</code>", ""))

    assert under("Accuracy (paper") == (
        "seeds per point: 1 · machine: box a; box b; box"
        " · command: compare --methods='a'; compare --methods='b'; compare <all>"
    )
    assert under("Removal").endswith("command: compare --methods='c'; compare <all>")
    assert under("Accuracy over epochs").endswith(
        "compare --methods='e'; compare --methods='d'; compare --methods='c' and 1 more, see results.json"
    )
    unknown = Results(tuple(sourced("gone")), "compare", "")
    write_report(tmp_path, unknown)
    assert "machine: – · command: <code>compare</code>" in (tmp_path / "report.html").read_text("utf-8")


def test_the_commands_under_a_pair_are_those_of_its_two_methods(tmp_path):
    sources = {name: {"command": f"command-{name}", "machine": name} for name in "abc"}
    rows = [row(source="a"), row(method="one-head", source="b"), row(method="ncm", source="c")]
    write_report(tmp_path, Results(tuple(rows), "other", "other", sources))
    under = (tmp_path / "report.html").read_text("utf-8").partition("<h2>One head or many")[2]
    assert "command-a" in under and "command-b" in under and "command-c" not in under


def test_the_best_method_that_is_cheap():
    rows = [
        row(method="single", accuracy=0.95, images_request=1000.0),
        row(method="lmeraser", accuracy=0.93, images_request=30.0),
        row(method="ncm", accuracy=0.80, images_request=0.0),
        row(method="costly", accuracy=0.94, images_request=30.1),
        row(method="broken", accuracy=float("nan"), images_request=0.0),
        row(dataset="svhn", method="single", accuracy=0.95, images_request=1000.0),
    ]
    first, second = findings.tradeoff(rows, TITLES)
    assert "at a cost of at most 3 %, LMEraser is the most accurate (93.0 %; a request passes 3 % of" in first
    assert first.endswith("cheapest first: nearest class mean, LMEraser, costly, single prompt.")
    assert "svhn: at a cost of at most 3 %, there is no method." in second
    rows = [row(method=m, accuracy=a, passes=p) for m, a, p in (("a", 0.8, 1.0), ("b", 0.9, 2.0), ("c", 0.7, 3.0))]
    assert findings.tradeoff(rows, {})[0].endswith(" By passes per prediction: a, b.")


def test_savings_fall_and_spending():
    rows = results(methods=("lmeraser", "single", "dam-vp", "retrain"), datasets=("cifar10",), seeds=1).rows
    plain = [
        row(images_request=20.0, seconds_request=2.0),
        row(method="single", images_request=1000.0, seconds_request=80.0),
    ]
    assert findings.effort(plain, TITLES) == [
        "CIFAR-10: a request to LMEraser takes 2 seconds and 20 images;"
        " single prompt 40 times the seconds and 50 times the images; DAM-VP not measured."
    ]
    fall = [row(experiment="removal", x=x, accuracy=a) for x, a in ((0.0, 0.7275), (0.5, 0.6953))]
    assert findings.removal(fall, {}) == [
        "cifar10, accuracy as records are erased: lmeraser from 72.8 to 69.5 % at 50 %, a relative loss of 4.4 %."
    ]
    assert findings.cut([row(experiment="cut", x=7.0, clusters=40)], {})[0].endswith("40 (cut 7): not measured.")
    assert "LMEraser 2.20M" in findings.sequences(rows, TITLES)[0]


@pytest.mark.parametrize("plate", page.PLATES, ids=lambda plate: plate.name)
def test_every_figure_says_something_and_takes_rows_of_any_kind(plate):
    full = results(seeds=2).rows
    assert all(text.endswith(".") for text in plate.says(full, TITLES)) and plate.says(full, TITLES)
    broken = [
        row(experiment=r.experiment, x=r.x, accuracy=float("nan"), images_request=float("inf")) for r in full[::7]
    ]
    plate.says(broken, {})
    plate.says([], {})
