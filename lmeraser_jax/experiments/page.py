"""The report of a comparison: report.html, which needs no other file and no network, and its figures as PNG and SVG.

Every text that comes from rows, titles or the command is escaped; figures are images inside the page, whose policy
lets a browser load nothing and run nothing.
"""

import base64
import html
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lmeraser_jax import interrupt
from lmeraser_jax.evaluation.plotting import picture
from lmeraser_jax.experiments import curves, figures, findings, tables, tradeoff, uncertainty
from lmeraser_jax.experiments.results import Measurement, Results
from lmeraser_jax.experiments.summary import (
    ABSENT,
    ACCURACY,
    UNTITLED,
    Rows,
    Titles,
    main,
    of,
    on_several,
    printable,
    spreads,
    unique,
)
from lmeraser_jax.experiments.tables import escaped, listed
from lmeraser_jax.progress import progress
from lmeraser_jax.storage.atomic_files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --soft: #5a5a5a; --line: #d8d8d8; --mark: #e3f1e8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --soft: #a8a8a8; --line: #3a3d42; --mark: #1f3a2b; }
}
body { margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h2 { margin: 3rem 0 0.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.4rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); white-space: nowrap; }
caption { text-align: left; font-weight: 600; padding: 0.8rem 0 0.3rem; }
.best { background: var(--mark); font-weight: 700; }
.best::after { content: " \\2605"; }
td:not(.best)::after { content: " \\2605"; visibility: hidden; }
figure { margin: 1rem 0 0; }
figure img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
code { white-space: pre-wrap; }
.source { color: var(--soft); font-size: 0.875rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
"""
MOST = 3  # commands or machines under a figure
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Plate(NamedTuple):
    """A figure of the page: the name of its files, its heading, the rows in it, its drawing, and what is said of it."""

    name: str
    heading: str
    rows: Callable[[Rows], Rows]
    draw: "Callable[[Rows, Titles], Figure | None]"
    says: Callable[[Rows, Titles], list[str]]


def _of(experiment: str) -> Callable[[Rows], Rows]:
    return lambda rows: of(rows, experiment)


PLATES = (
    Plate("accuracy", "Accuracy (paper Fig. 3)", main, figures.accuracy, findings.accuracy),
    Plate("tradeoff", "Accuracy against cost", main, tradeoff.tradeoff, findings.tradeoff),
    Plate("backbones", "Backbones (paper Fig. 4)", on_several, figures.backbones, findings.backbones),
    Plate("epochs", "Accuracy over epochs (paper Fig. 5)", _of("epochs"), curves.epochs, findings.epochs),
    Plate("removal", "Removal of data (paper Fig. 6, left)", _of("removal"), curves.removal, findings.removal),
    Plate("cut", "Number of clusters (paper Fig. 6, right)", _of("cut"), curves.cut, findings.cut),
    Plate("affected", "What a request affects (paper Fig. 7)", main, figures.affected, findings.affected),
    Plate("effort", "Time and images of a request (paper Table 3)", main, figures.effort, findings.effort),
    Plate(
        "partitions",
        "Adaptive clusters or random (paper Fig. 8)",
        lambda rows: figures.rows_of_pair(rows, *figures.PARTITIONS),
        figures.partitions,
        findings.partitions,
    ),
    Plate(
        "heads",
        "One head or many (paper Fig. 9)",
        lambda rows: figures.rows_of_pair(rows, *figures.HEADS),
        figures.heads,
        findings.heads,
    ),
    Plate("sequences", "Sequences of requests", _of("sequence"), curves.sequences, findings.sequences),
)


def write_report(folder: Path, results: Results, titles: Titles = UNTITLED, montage: bytes | None = None) -> list[Path]:
    """Writes report.html and figures/NAME.png and .svg; each completely or not at all, the page last.

    Args:
        folder: made if need be; files of an earlier report are replaced, figures that are no longer there removed.
        results: rows, and the commands and machines that they come from.
        titles: what people read in place of a method's, data set's or backbone's name.
        montage: PNG of clusters and prompts to show, such as `report.picture` draws. It holds private images.

    Returns:
        What was written; the page is the first.

    Raises:
        UserError: matplotlib is missing.
    """
    shown, written = {}, []
    with progress("figures", len(PLATES)) as done:
        for plate in PLATES:
            interrupt.raise_if_stopped()
            figure = plate.draw(results.rows, titles)
            for kind in ("png", "svg"):
                path = folder / "figures" / f"{plate.name}.{kind}"
                if figure is None:
                    path.unlink(missing_ok=True)
                else:
                    data = picture(figure, kind)
                    shown[plate.name] = (data, *figure.get_size_inches())  # the SVG is the last
                    write_bytes(path, data)
                    written.append(path)
            done.advance(1, plate.name)
    page = folder / "report.html"
    write_bytes(page, _page(results, titles, shown, montage).encode())
    return [page, *written]


def _page(results: Results, titles: Titles, shown: Mapping[str, tuple], montage: bytes | None) -> str:
    rows = results.rows
    parts = [tables.not_numbers(rows, titles), "<h2>Methods</h2>", tables.methods(rows, titles)]
    parts += ["<h2>What a request takes (paper Table 3)</h2>", tables.requests(rows, titles)]
    parts += [_plate(plate, results, titles, *shown[plate.name]) for plate in PLATES if plate.name in shown]
    absent = [plate.heading for plate in PLATES if plate.name not in shown]
    parts += ["<h2>Not measured</h2>", listed(absent)] if absent else []
    if montage:
        note = "Clusters with members, prompt, and prompt on a member. These are private images: share with care."
        parts.append(f"<h2>Clusters and prompts</h2><p>{note}</p><figure>{_image(montage, 'png', note)}</figure>")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width"><title>Comparison of unlearning methods</title>'
    notes = ("Means over seeds. ★: the best mean. " + uncertainty.SEEDS, uncertainty.test_error(rows), uncertainty.RULE)
    intro = "".join(f"<p>{escaped(note)}</p>" for note in notes if note)
    body = f"<h1>Comparison of unlearning methods</h1>{intro}{_source(results, rows)}{''.join(parts)}"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def _image(data: bytes, kind: str, alternative: str, size: str = "") -> str:
    media = "image/svg+xml" if kind == "svg" else "image/png"
    return f'<img alt="{escaped(alternative)}"{size} src="data:{media};base64,{base64.b64encode(data).decode()}">'


def _source(results: Results, rows: Rows) -> str:
    """Where the numbers of some rows come from: seeds, machines, commands."""
    counts = [found.seeds for found in spreads(rows, ACCURACY, _place).values()]
    seeds = " to ".join(map(str, unique((min(counts), max(counts))))) if counts else "0"
    plain = {"command": results.command, "machine": results.machine}
    sources = [plain | dict(results.sources.get(row.source, {})) for row in rows] or [plain]
    machines = _few((source["machine"] for source in sources), escaped)
    commands = _few((source["command"] for source in sources), _code)
    return f'<p class="source">seeds per point: {seeds} · machine: {machines} · command: {commands}</p>'


def _code(text: str) -> str:
    return f"<code>{html.escape(printable(text))}</code>"


def _few(texts: Iterable[str], written: Callable[[str], str]) -> str:
    """The first of several different texts, and how many more there are."""
    different = unique(filter(None, texts))
    more = f" and {len(different) - MOST} more, see results.json" if len(different) > MOST else ""
    return "; ".join(map(written, different[:MOST])) + more or ABSENT


def _place(row: Measurement) -> tuple:
    return row.dataset, row.backbone, row.method, row.experiment, row.x, row.series


def _plate(plate: Plate, results: Results, titles: Titles, svg: bytes, width: float, height: float) -> str:
    rows = plate.rows(results.rows)
    says = plate.says(results.rows, titles)
    size = f' width="{96 * width:.0f}" height="{96 * height:.0f}"'  # CSS pixels to the inch
    image = _image(svg, "svg", f"{plate.heading}. {' '.join(says)}", size)
    return f"<h2>{escaped(plate.heading)}</h2>{listed(says)}<figure>{image}</figure>{_source(results, rows)}"
