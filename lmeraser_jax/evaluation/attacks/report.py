"""What an attack found, as a table and a verdict for people, as values for machines, and as ROC curves.

No record is named anywhere: a report outlives erasures.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmeraser_jax.evaluation import plotting
from lmeraser_jax.evaluation.attacks.statistics import RATES, SIGNIFICANT

COLUMNS = ("kept = control", "unlearned", "from scratch")
ROUTES = ("published", "after erasing", "from public records")
WIDTHS = (10, 38, 26, 26, 26)
LEAK, UNKNOWN = 1, 3  # exit codes


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """What one attack finds.

    Attributes:
        name: of the attack.
        detected: whether kept records are told beyond what from scratch gives, whether erased ones are, and whether
            something is wrong with from scratch itself. For routing: whether each column tells who was sampled.
        smallest_p: the smallest chance that the test of the kept records can give.
        lines: rows of the table: what is measured, and a cell for each column.
        values: what the lines are made of, for machines.
        note: what is said in place of a verdict.
        curves: false and true positive rates of the ROC curve for each column; empty for other attacks.
    """

    name: str
    detected: tuple[bool, ...]
    smallest_p: float
    lines: list[tuple[str, ...]]
    values: dict[str, Any]
    note: str = ""
    curves: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @property
    def powerless(self) -> bool:
        return self.smallest_p >= SIGNIFICANT

    def verdict(self) -> str:
        """One line for people."""
        if self.note:
            return self.note
        kept, unlearned, reference = self.detected
        shift = "DOUBTFUL REFERENCE: slices that never saw the records differ from each other; try another --seed"
        if self.curves:
            shift = "SHIFTED REFERENCE: differs from test images already without having seen the records"
        if unlearned:
            return f"FINDS ERASED RECORDS; {shift}" if reference else "FINDS ERASED RECORDS"
        if self.powerless:
            few = f"with so few slices or records no chance falls below {self.smallest_p:.2g}"
            return f"NO POWER: {few}, so it finds nothing, kept or erased; raise --shadows or --targets"
        if not kept:
            missed = "it misses records that are kept, so its silence means nothing"
            return f"INCONCLUSIVE: {shift}, and {missed}" if reference else f"POSITIVE CONTROL FAILED: {missed}"
        clean = "finds records that are kept, and not those that were erased"
        return f"{shift}; beyond that it {clean}" if reference else clean


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Shares of right answers of the three slices: forgotten, retained, and images that no slice saw."""

    forgotten: tuple[float, ...]
    retained: tuple[float, ...]
    unseen: tuple[float, ...]

    @property
    def gap(self) -> tuple[float, ...]:
        """Mean absolute difference to the slices tuned from scratch."""
        shares = np.array(dataclasses.astuple(self))
        return tuple(np.abs(shares - shares[:, -1:]).mean(axis=0).tolist())

    def lines(self) -> list[tuple[str, ...]]:
        rows = [*dataclasses.asdict(self).items(), ("mean gap to from scratch", self.gap)]
        return [(name, *(f"{share:.4f}" for share in shares)) for name, shares in rows]


@dataclasses.dataclass(frozen=True)
class Attack:
    """A whole attack.

    Attributes:
        clusters, targets, outside: attacked clusters, records erased in memory, images to compare them with.
        shadows: of a cluster and population; 0: none were needed.
        slices, images, seconds: slices tuned for it, images passed, and the time of everything.
        accuracies: None where no slice was attacked.
        findings: one per attack.
        skipped: attacks that had nothing to attack: no prototypes to route by, or no steps to count.
    """

    clusters: int
    targets: int
    outside: int
    shadows: int
    slices: int
    images: int
    seconds: float
    accuracies: Accuracies | None
    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]

    @property
    def on_slices(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.name != "routing")

    @property
    def leaks(self) -> tuple[str, ...]:
        """Attacks that find erased records, beyond what they find where no slice ever saw them."""
        return tuple(finding.name for finding in self.findings if finding.detected[1])

    @property
    def powerless(self) -> tuple[str, ...]:
        """Attacks whose test could find nothing, whatever there is."""
        return tuple(finding.name for finding in self.findings if finding.powerless)

    @property
    def blind(self) -> tuple[str, ...]:
        """Attacks that miss even records that are kept, though they could find them."""
        return tuple(finding.name for finding in self.findings if not finding.detected[0] and not finding.powerless)

    @property
    def shifted(self) -> tuple[str, ...]:
        """Attacks that tell something of slices that never saw the records."""
        return tuple(finding.name for finding in self.on_slices if finding.detected[2])

    @property
    def code(self) -> int:
        """Exit code: 1 an attack finds erased records; 3 none can say anything; 0 one that works finds none."""
        if self.leaks:
            return LEAK
        return 0 if any(finding.detected[0] for finding in self.on_slices) else UNKNOWN

    def values(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.accuracies is not None:
            values["accuracies"] = dataclasses.asdict(self.accuracies) | {"gap": self.accuracies.gap}
        values["findings"] = {
            finding.name: finding.values | {"detected": finding.detected} for finding in self.findings
        }
        values |= {name: getattr(self, name) for name in ("leaks", "blind", "powerless", "shifted")}
        return _json_values(values | {"ok": self.code == 0})

    def text(self) -> str:
        return "\n".join([*self._head(), *self._table(), "", *self._verdict()])

    def _head(self) -> Iterator[str]:
        if not self.clusters:
            return
        yield (
            f"{self.targets} records of {self.clusters} clusters erased in memory, told from {self.outside} images that"
            " no model saw"
        )
        yield f"tuned {self.slices} slices, {self.images} images passed, {self.seconds:.0f} s in all"
        short = [f"{rate:.1%} needs {math.ceil(1 / rate)}" for rate in RATES if self.outside * rate < 1]
        if short:
            yield f"too few images for some false positive rates: {', '.join(short)}"

    def _table(self) -> Iterator[str]:
        if self.accuracies is not None:
            yield from ("", _row("attack", "", *COLUMNS))
            for finding in self.on_slices:
                yield from _rows(finding.name, finding.lines)
            yield from _rows("accuracy", self.accuracies.lines())
        for finding in self.findings:
            if finding.name == "routing":
                yield from ("", _row("attack", "", *ROUTES), *_rows("routing", finding.lines))

    def _verdict(self) -> Iterator[str]:
        yield from (f"{finding.name + ':':<9} {finding.verdict()}" for finding in self.findings)
        yield from (f"{name + ':':<9} nothing to attack here" for name in self.skipped)
        if self.leaks:
            yield f"LEAK: erased records found by {', '.join(self.leaks)}; lmeraser audit says whether a bit is wrong"
        elif self.code == 0:
            yield f"no attack finds an erased record (found: less than {SIGNIFICANT:.1%} by chance)"
        else:
            reason = "routing does not look for them"
            if self.on_slices:
                reason = "no attack finds even records that are kept; raise --targets or --shadows"
            yield f"nothing can be said of erased records: {reason}"


def _rows(name: str, lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield from (_row("" if place else name, *line) for place, line in enumerate(lines))


def _row(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _json_values(value: Any) -> Any:
    """The value as JSON can hold it: dataclasses become objects, numbers that are not finite become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@plotting.styled
def figure(findings: Sequence[Finding], path: Path) -> None:
    """Draws the ROC curves of the membership attacks on logarithmic axes, a panel for each column. PNG.

    Bars are the intervals of the true positive rates that the table has.

    Args:
        findings: those of other attacks are not drawn.
        path: the file.
    """
    drawn = [finding for finding in findings if finding.curves]
    whole = plotting.blank(13, 4.4)
    panels = whole.subplots(1, len(COLUMNS), sharey=True)
    least = min([0.05, *(0.5 / finding.values["columns"][0].others for finding in drawn)])  # a decade at least
    for place, (panel, title) in enumerate(zip(panels, COLUMNS, strict=True)):
        for finding in drawn:
            false, true = finding.curves[place]
            (line,) = panel.plot(np.maximum(false, least), np.maximum(true, least), label=finding.name)
            for rate, estimate in zip(RATES, finding.values["columns"][place].rates, strict=True):
                if estimate is not None:
                    panel.vlines(rate, max(estimate.low, least), max(estimate.high, least), color=line.get_color())
        panel.plot([least, 1], [least, 1], color="grey", linewidth=0.8, linestyle="--", label="chance")
        panel.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1), title=title)
        panel.set_xlabel("false positive rate")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(plotting.ticked)
            axis.set_minor_formatter(plotting.unlabelled)
    panels[0].set_ylabel("true positive rate")
    panels[0].legend(loc="lower right")
    plotting.save(whole, path)
