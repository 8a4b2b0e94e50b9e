"""What an attack found, as a table and a verdict for people, and as values for machines.

No record is named anywhere: a report outlives erasures.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lmeraser_jax.evaluation.attacks.statistics import RATES, SIGNIFICANT

COLUMNS = ("kept = control", "unlearned", "from scratch")
ROUTES = ("published", "after erasing", "from public records")
MEMBERSHIP = ("loss", "lira")  # attacks that compare the records with images outside
WIDTHS = (10, 38, 26, 26, 26)
LEAK, UNKNOWN = 1, 3  # exit codes


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """What one attack finds.

    `detected` says whether kept records are told beyond what from scratch gives, whether erased ones are, and whether
    something is wrong with from scratch itself; for routing, whether each column tells who was sampled.
    """

    name: str  # of the attack
    detected: tuple[bool, ...]
    smallest_p: float  # the smallest chance that the test of the kept records can give
    lines: list[tuple[str, ...]]  # rows of the table: what is measured, and a cell for each column
    values: dict[str, Any]  # what the lines are made of, for machines
    note: str = ""  # said in place of a verdict

    @property
    def powerless(self) -> bool:
        return self.smallest_p >= SIGNIFICANT

    def verdict(self) -> str:
        """One line for people."""
        if self.note:
            return self.note
        kept, unlearned, reference = self.detected
        shift = "DOUBTFUL REFERENCE: slices that never saw the records differ from each other; try another --seed"
        if self.name in MEMBERSHIP:
            shift = "SHIFTED REFERENCE: differs from test records already without having seen the records"
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
class Attack:
    """A whole attack."""

    clusters: int  # attacked
    targets: int  # records erased in memory
    outside: int  # images to compare them with
    shadows: int  # of a cluster and population; 0: none were needed
    seconds: float
    accuracies: dict[str, tuple[float, ...]]  # shares of right answers of the three slices; empty: none was attacked
    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]  # attacks that had nothing to attack: no prototypes to route by, or no steps to count

    @property
    def on_slices(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.name != "routing")

    @property
    def leaks(self) -> tuple[str, ...]:
        """Attacks that find erased records, beyond what they find where no slice ever saw them."""
        return tuple(finding.name for finding in self.findings if finding.detected[1])

    @property
    def code(self) -> int:
        """Exit code: 1 an attack finds erased records; 3 none can say anything; 0 one that works finds none."""
        if self.leaks:
            return LEAK
        return 0 if any(finding.detected[0] for finding in self.on_slices) else UNKNOWN

    def values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["findings"] = {f["name"]: f["values"] | {"detected": f["detected"]} for f in values["findings"]}
        return values | {
            "ok": self.code == 0,
            "leaks": self.leaks,
            "blind": [f.name for f in self.findings if not f.detected[0] and not f.powerless],
            "powerless": [f.name for f in self.findings if f.powerless],
            "shifted": [f.name for f in self.on_slices if f.detected[2]],
        }

    def text(self) -> str:
        return "\n".join([*self._head(), *self._table(), "", *self._verdict()])

    def _head(self) -> Iterator[str]:
        if not self.clusters:
            return
        yield (
            f"{self.targets} records of {self.clusters} clusters erased in memory, told from {self.outside} records"
            f" that no model saw; {self.seconds:.0f} s"
        )
        short = [f"{rate:.1%} needs {math.ceil(1 / rate)}" for rate in RATES if self.outside * rate < 1]
        if short:
            yield f"too few records for some false positive rates: {', '.join(short)}"

    def _table(self) -> Iterator[str]:
        if self.accuracies:
            yield from ("", _row("attack", "", *COLUMNS))
            for finding in self.on_slices:
                yield from _rows(finding.name, finding.lines)
            shares = self.accuracies.items()
            yield from _rows("accuracy", [(name, *(f"{share:.4f}" for share in row)) for name, row in shares])
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
