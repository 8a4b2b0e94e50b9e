"""Tables and the figure of a comparison of unlearning on text; files of its rows."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmeraser_jax.evaluation.attacks.statistics import Estimate
from lmeraser_jax.experiments import figures
from lmeraser_jax.experiments.forgetting import TITLES, Forgetting
from lmeraser_jax.experiments.summary import MISSING_TEXT, Cell, Table, amount, spread, write_tables
from lmeraser_jax.storage.atomic_files import write_bytes

COLUMNS = {  # {field: (title, decimals; None: three digits)}
    "loss_edited": ("loss, edited", 2),
    "accuracy_edited": ("accuracy, edited", 3),
    "accuracy_kept": ("accuracy, kept", 3),
    "loss_heldout": ("loss, held out", 2),
    "kl_edited": ("KL, edited", 2),
    "kl_kept": ("KL, kept", 2),
    "recognition": ("AUC, edited against held out", 2),
    "truth_ratio": ("truth ratio", 2),
    "forget_quality": ("forget quality", 3),
    "hit_ratio": ("hit ratio at 1", 3),
    "answer_auc": ("AUC of yes against no", 3),
    "preference": ("prefers the correction", 2),
    "loss_base": ("loss, the model's own texts", 2),
    "seconds": ("seconds", None),
    "processor": ("processor seconds", None),
    "passes": ("passes", 1),
    "share": ("share of a full tuning", 3),
    "share_record": ("share for one record", 3),
    "residual": ("residual", 2),
}
ANSWERS = ("hit_ratio", "answer_auc")  # with an interval, of questions
HEADINGS = {
    "removal": "Removal: the records of some owners leave",
    "query": "Query modification: records were tuned on with another record's query, then corrected",
    "response": "Response correction: records were tuned on with a wrong response, then corrected",
}
NOTES = (
    "Mean over seeds ± sample standard deviation. A seed draws owners, records, first values and order.",
    "Losses are mean cross-entropies of response tokens, accuracies shares of these tokens, KL is from the model that"
    " was tuned again on the edited records: compare it with the row of another seed, its floor. An AUC of 1 means that"
    " every edited record is better known than any held-out one. The forget quality is a p-value: few records can never"
    " make it small.",
    "A pass is one gradient of the loss of all records, or one product with its curvature; losses alone are not"
    " counted. Seconds are without compilation; processor seconds are those of all threads.",
    "Hit ratio at 1: share of test records where the right candidate is the likeliest, with Wilson's 95 % interval."
    " AUC of yes against no: how well log p(yes) - log p(no) tells the test records whose answer is yes, with DeLong's"
    " 95 % interval. Of several seeds the deviation stands there instead, without the sampling error of the records.",
    "Only tuning again and the exact methods guarantee anything. The calibrated step, ascent, difference and NPO stop"
    " at the loss of held-out records and never see a model that was tuned again.",
)


def tables(rows: Sequence[Forgetting]) -> list[Table]:
    """A table for each edit of so many records: a line for each method, in the order of `TITLES`."""
    return [_table(group) for group in _groups(rows)]


def _groups(rows: Sequence[Forgetting]) -> list[list[Forgetting]]:
    """The rows of each edit of so many records."""
    keys = dict.fromkeys((row.edit, row.edited) for row in rows)
    return [[row for row in rows if (row.edit, row.edited) == key] for key in keys]


def _table(rows: Sequence[Forgetting]) -> Table:
    columns = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    lines = []
    for method in [name for name in TITLES if any(row.method == name for row in rows)]:
        own = [row for row in rows if row.method == method]
        lines.append((Cell(TITLES[method]), *(Cell(_shown(name, own)) for name in columns)))
    seeds, row = len({row.seed for row in rows}), rows[0]
    counts = [f"{row.edited} of {row.records} records", f"{seeds} seed{'s' if seeds > 1 else ''}"]
    counts += [f"{row.questions} questions"] if row.questions else []
    caption = f"{HEADINGS[row.edit]} ({', '.join(counts)})"
    return Table(caption, ("method", *(COLUMNS[name][0] for name in columns)), tuple(lines))


def _shown(name: str, rows: Sequence[Forgetting]) -> str:
    known, decimals = [value for row in rows if (value := getattr(row, name)) is not None], COLUMNS[name][1]
    if not known:
        return MISSING_TEXT
    if name in ANSWERS and len(known) == 1:
        assert rows[0].answer_low is not None and rows[0].answer_high is not None
        return str(Estimate(known[0], rows[0].answer_low, rows[0].answer_high))
    value = spread(known)
    mean, sd = (amount(x, value.mean) if decimals is None else f"{x:.{decimals}f}" for x in (value.mean, value.sd))
    return f"{mean} ± {sd}" if value.sd > 0 else mean


@figures.style()
def tradeoff(rows: Sequence[Forgetting]):
    """Forgetting against kept accuracy, its cost and the right answers of questions: means over the seeds.

    A line of panels for each number of removed records; None without a removal.
    """
    removed = [row for row in rows if row.edit == "removal"]
    if not removed:
        return None
    names = [name for name in TITLES if any(row.method == name for row in removed)]
    looks = {name: (figures.COLOURS[i % 7], figures.MARKERS[i % 8]) for i, name in enumerate(names)}
    panels = {"accuracy_kept": "token accuracy on kept records", "share": "share of the passes of a full tuning"}
    panels |= {name: COLUMNS[name][0] for name in ANSWERS if any(getattr(row, name) is not None for row in removed)}
    groups = _groups(removed)
    figure = figures.blank(figures.WIDTH, 0.9 + 3.7 * len(groups))
    for group, line in zip(groups, figure.subplots(len(groups), len(panels), squeeze=False), strict=True):
        for panel, (horizontal, title) in zip(line, panels.items(), strict=True):
            for name in names:
                chosen = [row for row in group if row.method == name]
                x, y = ([getattr(row, field) for row in chosen] for field in (horizontal, "accuracy_edited"))
                colour, marker = looks[name]
                panel.plot(x, y, marker, color=colour, alpha=0.35, markersize=4)
                panel.plot(spread(x).mean, spread(y).mean, marker, color=colour, markersize=9, label=TITLES[name])
            panel.set_ylabel(f"token accuracy on {group[0].edited} forgotten records")
            panel.set_xlabel(title)
            panel.grid(True, color=figures.PALE, linewidth=0.8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def write(
    folder: Path, rows: Sequence[Forgetting], sources: Sequence[Mapping[str, str]], pictures: bool = True
) -> list[Path]:
    """Writes results.json, results.csv, the report and, with `pictures`, the figure; returns the report's files."""
    tree = {"rows": [dataclasses.asdict(row) for row in rows], "sources": list(map(dict, sources))}
    write_bytes(folder / "results.json", json.dumps(tree, indent=1).encode())
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Forgetting))
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_bytes(folder / "results.csv", text.getvalue().encode())
    drawn = figures.write_figure(folder, "forgetting", tradeoff(rows)) if pictures else []
    shown = [("Forgetting, kept accuracy and cost", drawn[-1].read_bytes())] if drawn else []
    return [*write_tables(folder, NOTES, tables(rows), sources, shown), *drawn]
