"""From rows to tables: means and deviations over seeds, paired intervals, report.md and report.html.

All methods of a comparison share the split and the backbone of a seed. Two methods are therefore compared seed by seed:
the mean of their differences, with Student's 95 % interval.
"""

import base64
import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from lmeraser_jax.experiments.results import Measurement, Results
from lmeraser_jax.storage.atomic_files import write_bytes

MISSING_TEXT = "–"  # in place of a number that was not measured
METHOD = attrgetter("method")
REFERENCE = "lmeraser"  # the method that others are compared with
Key = TypeVar("Key", bound=Hashable)
Rows = Sequence[Measurement]
Titles = Mapping[str, str]  # {name of a method, data set or backbone: what people read}
Pictures = Sequence[tuple[str, bytes]]  # figures: (heading, SVG)
NOTES = (
    "Mean over seeds ± sample standard deviation (n - 1). Bold: the best mean.",
    "A seed redraws clusters, prompts, heads and the order of images; also the split where the data have none, and the"
    " backbone where it is trained here. Otherwise all seeds share them, and ± does not contain the sampling error of"
    ' the test set, sqrt(p (1 - p) / n) for an accuracy p on n images: the column "error of the test set".',
    "Differences are means over the seeds that both methods have, in percentage points, with Student's 95 % interval;"
    " one seed, or equal differences in all seeds, give no interval. Each is judged for itself, without a correction"
    " for their number.",
    "A request erases one record, drawn uniformly; sampled records, whose erasure also re-clusters, are counted as"
    " often as they occur. 100 % is a full tuning. Heads on features and closed forms pass no image.",
)


class Spread(NamedTuple):
    """Mean, sample standard deviation (n - 1; 0 for one seed), and range of one number per seed; NaN if not known."""

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)


def spread(values: Iterable[float]) -> Spread:
    """Of one value per seed; unknown without any, or with one that is not finite."""
    array = np.asarray(list(values), np.float64)
    if not len(array) or not np.isfinite(array).all():
        return Spread()
    sd = float(array.std(ddof=1)) if np.ptp(array) > 0 else 0.0  # of equal numbers the sum may round
    return Spread(float(array.mean()), sd, float(array.min()), float(array.max()))


def amount(value: float, like: float) -> str:
    """Three digits, or all before the point below 10,000, such as 0.0312, 3,185, 69.8k; with the decimals of `like`."""
    like = abs(like)
    size, unit = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if like >= max(pair[0], 1e4)), (1, ""))
    digits = math.floor(math.log10(like / size)) + 1 if like else 1
    decimals = 0 if like == int(like) and size == 1 else max(0, 3 - digits)
    return f"{value / size:,.{decimals}f}{unit}"


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number of a row to show."""

    title: str  # of a column or an axis, with the unit
    of: Callable[[Measurement], float]  # NaN where the row does not have it
    best: Callable[[Iterable[float]], float] | None = min  # chooses the best of several means; None: none is better
    percent: bool = False  # shown with two decimals; else with three digits

    def format(self, value: float, like: float | None = None) -> str:
        """A number with the decimals of a second one."""
        return f"{value:.2f}" if self.percent else amount(value, value if like is None else like)

    def show(self, value: Spread) -> str:
        """The mean and, where seeds differ, the standard deviation."""
        if not value.known:
            return MISSING_TEXT
        mean = self.format(value.mean)
        return f"{mean} ± {self.format(value.sd, value.mean)}" if value.sd > 0 else mean


def request_cost(row: Measurement) -> float:
    """Images of a mean request in percent of a full tuning; 0 where a full tuning passes none."""
    if row.images_full > 0:
        return 100 * row.images_request / row.images_full
    return 0.0 if row.images_request == 0 else math.nan


def _test_error(row: Measurement) -> float:
    """Standard error in points of an accuracy on n images, sqrt(p (1 - p) / n)."""
    variance = row.accuracy * (1 - row.accuracy)
    return 100 * math.sqrt(variance / row.tested) if row.tested > 0 and variance >= 0 else math.nan


ACCURACY = Quantity("accuracy (%)", lambda row: 100 * row.accuracy, max, True)
BALANCED = Quantity("balanced accuracy (%)", lambda row: 100 * row.balanced, max, True)
TEST_ERROR = Quantity("error of the test set (points)", _test_error, None, True)
COST = Quantity("images per request (% of a full tuning)", request_cost)
IMAGES = Quantity("images per request", lambda row: row.images_request)
WORST = Quantity("images at worst", lambda row: row.images_worst)
SECONDS = Quantity("time per request (s)", lambda row: row.seconds_request or math.nan)  # 0: not measured
UNSAMPLED = Quantity("record not sampled (s)", lambda row: row.seconds_unsampled or math.nan)
SAMPLED = Quantity("sampled record (s)", lambda row: row.seconds_sampled or math.nan)
PASSES = Quantity("forward passes per prediction", lambda row: row.passes or math.nan)
RECORDS = Quantity("records affected per request", lambda row: row.records_request)
PARAMETERS = Quantity("parameters affected per request", lambda row: row.parameters_request)
FULL = Quantity("time of a full tuning, cold (s)", lambda row: row.seconds_full or math.nan)
CLUSTERS = Quantity("clusters", lambda row: row.clusters, None)
SPENT = Quantity("images passed since the start", lambda row: row.spent)
COLUMNS = (BALANCED, TEST_ERROR, COST, IMAGES, WORST, SECONDS, UNSAMPLED, SAMPLED, PASSES, RECORDS, PARAMETERS, FULL)


def grouped(rows: Iterable[Measurement], key: Callable[[Measurement], Key]) -> dict[Key, list[Measurement]]:
    """The rows by a key; keys in the order in which they appear."""
    groups: dict[Key, list[Measurement]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def places_of(rows: Rows) -> dict[tuple[str, str], list[Measurement]]:
    """The rows of `methods` by data set and backbone."""
    return grouped((row for row in rows if row.experiment == "methods"), attrgetter("dataset", "backbone"))


def spreads(
    rows: Iterable[Measurement], quantity: Quantity, key: Callable[[Measurement], Key] = METHOD
) -> dict[Key, Spread]:
    """Spreads over the rows with the same key."""
    return {name: spread(map(quantity.of, group)) for name, group in grouped(rows, key).items()}


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Mean difference of two methods' numbers by seed, and both ends of Student's interval; None without a number.

    mean(d) ± t(n - 1, 0.975) sd(d) / sqrt(n), sd with n - 1. The ends are NaN if d does not vary: the seeds have not
    redrawn what d depends on.
    """
    from scipy.stats import t

    differences = np.array([first[seed] - second[seed] for seed in first if seed in second], np.float64)
    n = len(differences)
    if not n or not np.isfinite(differences).all():
        return None
    mean, sd = float(differences.mean()), float(differences.std(ddof=1)) if n > 1 else 0.0
    reach = float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if sd > 1e-9 else math.nan
    return mean, mean - reach, mean + reach


def printable(text: object) -> str:
    """In one line with single spaces; control characters, which SVG and HTML refuse, become �."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def title_of(name: str, titles: Titles, longest: int = 200) -> str:
    """What people read in place of a name, cut after `longest` characters."""
    text = printable(titles.get(name, name)) or MISSING_TEXT
    return text if len(text) <= longest else text[: longest - 1] + "…"


class Cell(NamedTuple):
    """A text of a table; `best` marks the best of its column."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table of plain texts, not escaped."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def methods_table(rows: Rows, titles: Titles) -> Table:
    """Of one data set and backbone: a row for every method, and for always naming the largest class; the best first."""
    accuracies = spreads(rows, ACCURACY)
    names = sorted(accuracies, key=lambda name: -accuracies[name].mean if accuracies[name].known else math.inf)
    reference = REFERENCE if REFERENCE in accuracies else rows[0].method
    columns = [quantity for quantity in COLUMNS if any(quantity.of(row) > 0 for row in rows)]
    cells = [
        [Cell(title_of(name, titles)) for name in names],
        _column(ACCURACY, accuracies, names),
        [Cell(_difference(rows, name, reference)) for name in names],
        *(_column(quantity, spreads(rows, quantity), names) for quantity in columns),
        _column(CLUSTERS, spreads(rows, CLUSTERS), names),
    ]
    heads = ["method", ACCURACY.title, f"minus {title_of(reference, titles)} (points)"]
    heads += [quantity.title for quantity in (*columns, CLUSTERS)]
    lines = list(zip(*cells))
    majority = spread(100 * row.majority for row in rows if row.majority > 0)
    if majority.known:
        line = Cell("always the largest class"), Cell(ACCURACY.show(majority)), *[Cell("")] * (len(heads) - 2)
        better = sum(accuracies[name].known and accuracies[name].mean >= majority.mean for name in names)
        lines.insert(better, line)
    seeds, records = len({row.seed for row in rows}), max(row.records for row in rows)
    caption = f"{title_of(rows[0].dataset, titles)}, {title_of(rows[0].backbone, titles)}"
    return Table(f"{caption}: {records:,} records, {seeds} seed{'s' if seeds > 1 else ''}", tuple(heads), tuple(lines))


def _column(quantity: Quantity, values: Mapping[str, Spread], names: Sequence[str]) -> list[Cell]:
    """Cells of one quantity; those that read like the best mean are marked, unless all do."""
    means = {name: values[name].mean for name in names if values[name].known}
    texts = {name: quantity.format(mean) for name, mean in means.items()}
    best = ""
    if quantity.best and len(set(texts.values())) > 1:
        best = quantity.format(quantity.best(means.values()))
    return [Cell(quantity.show(values[name]), texts.get(name) == best) for name in names]


def _difference(rows: Rows, name: str, reference: str) -> str:
    accuracies = {key: {row.seed: ACCURACY.of(row) for row in group} for key, group in grouped(rows, METHOD).items()}
    difference = paired_difference(accuracies[name], accuracies[reference])
    if name == reference or difference is None:
        return MISSING_TEXT
    mean, low, high = difference
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else f"{mean:+.2f}"


def tables(rows: Rows, titles: Titles) -> list[Table]:
    """A table of the methods for every data set and backbone."""
    return [methods_table(group, titles) for group in places_of(rows).values()]


def write_report(folder: Path, results: Results, titles: Titles, pictures: Pictures = ()) -> list[Path]:
    """Writes the report of a comparison: see `write_tables`."""
    sources = [results.sources[row.source] for row in results.rows if row.source]
    return write_tables(folder, NOTES, tables(results.rows, titles), sources, pictures)


def write_tables(
    folder: Path,
    notes: Sequence[str],
    shown: Sequence[Table],
    sources: Iterable[Mapping[str, str]],
    pictures: Pictures = (),
) -> list[Path]:
    """Writes report.html, which needs no other file and no network, and report.md; each completely or not at all.

    Templates escape every text that comes from rows, titles or commands.
    """
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=select_autoescape(["html.jinja"]), trim_blocks=True)
    environment.filters["md"] = _escape_markdown
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    texts = dict.fromkeys(map(_source_text, sources))
    content = {"notes": notes, "tables": shown, "sources": texts, "pictures": pictures}
    paths = [folder / "report.html", folder / "report.md"]
    for path in paths:
        write_bytes(path, environment.get_template(f"{path.name}.jinja").render(content).encode())
    return paths


def _source_text(source: Mapping[str, str]) -> str:
    parts = (source["command"], source["machine"], source.get("date", ""))
    return " · ".join(printable(text) for text in parts if text)


def _escape_markdown(text: str) -> str:
    """Keeps a text inside its cell, and from being read as HTML, emphasis or a link."""
    return re.sub(r"[\\`*_|\[\]]", r"\\\g<0>", text).replace("<", "&lt;")
