"""What an attack found, as a table and a verdict for people, as values for machines, and as ROC curves.

No record is named anywhere: a report outlives erasures.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lmeraser_jax.evaluation import plotting
from lmeraser_jax.evaluation.attacks.membership import Membership
from lmeraser_jax.evaluation.attacks.statistics import DOUBT, RATES

COLUMNS = ("kept = control", "unlearned", "from scratch")
ROUTES = ("published", "after erasing", "from public records")
WIDTHS = (10, 38, 26, 26, 26)
FOUND, UNKNOWN = 1, 3  # exit codes


class Finding(Protocol):
    """What one attack found.

    `found` says whether kept records are told beyond what from scratch gives, whether erased ones are, and whether
    something is wrong with from scratch itself. For routing: whether each of its columns tells who was sampled.
    `least` is the smallest chance that the test of the kept ones can give.
    """

    @property
    def name(self) -> str: ...
    @property
    def found(self) -> tuple[bool, ...]: ...
    @property
    def least(self) -> float: ...
    def lines(self) -> list[tuple[str, ...]]: ...
    def values(self) -> dict[str, Any]: ...


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
        return [(what, *(f"{share:.4f}" for share in shares)) for what, shares in rows]


@dataclasses.dataclass(frozen=True)
class Attack:
    """A whole attack.

    Attributes:
        clusters, targets, outside: attacked clusters, records erased in memory, images to tell them from.
        shadows: of a cluster and population; 0: none were needed.
        slices, images, seconds: what was tuned for it, images passed, and the time of everything.
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
    def leaks(self) -> tuple[str, ...]:
        """Attacks that find erased records, beyond what they find where no slice ever saw them."""
        return tuple(one.name for one in self.findings if one.found[1])

    @property
    def powerless(self) -> tuple[str, ...]:
        """Attacks whose test could find nothing, whatever there is."""
        return tuple(one.name for one in self.findings if one.least >= DOUBT)

    @property
    def blind(self) -> tuple[str, ...]:
        """Attacks that miss even records that are kept, though they could find them."""
        return tuple(one.name for one in self.findings if not one.found[0] and one.least < DOUBT)

    @property
    def shifted(self) -> tuple[str, ...]:
        """Attacks that tell something of slices that never saw the records."""
        return tuple(one.name for one in self.findings if one.found[2] and one.name != "routing")

    @property
    def code(self) -> int:
        """Exit code: 1 an attack finds erased records; 3 none can say anything; 0 one that works finds none."""
        if self.leaks:
            return FOUND
        return 0 if any(one.found[0] for one in self.findings if one.name != "routing") else UNKNOWN

    def values(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.accuracies is not None:
            plain["accuracies"] = dataclasses.asdict(self.accuracies) | {"gap": self.accuracies.gap}
        plain["findings"] = {one.name: one.values() for one in self.findings}
        plain |= {name: getattr(self, name) for name in ("leaks", "blind", "powerless", "shifted")}
        return _finite(plain | {"ok": self.code == 0})

    def text(self) -> str:
        return "\n".join([*self._head(), *self._rows(), "", *self._verdict()])

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

    def _rows(self) -> Iterator[str]:
        blocks = [(one.name, one.lines()) for one in self.findings if one.name != "routing"]
        if self.accuracies is not None:
            yield from ("", _row("attack", "", *COLUMNS))
            for name, lines in [*blocks, ("accuracy", self.accuracies.lines())]:
                yield from (_row(name * (place == 0), *line) for place, line in enumerate(lines))
        for one in self.findings:
            if one.name == "routing":
                yield from ("", _row("attack", "", *ROUTES))
                yield from (_row("routing", *line) for line in one.lines())

    def _verdict(self) -> Iterator[str]:
        yield from (_verdict(one) for one in self.findings)
        yield from (f"{name + ':':<9} nothing to attack here" for name in self.skipped)
        if self.leaks:
            yield f"LEAK: erased records found by {', '.join(self.leaks)}; lmeraser audit says whether a bit is wrong"
        elif self.code == UNKNOWN:
            asked = {one.name for one in self.findings} - {"routing"}
            why = "no attack finds even records that are kept; raise --targets or --shadows"
            yield f"nothing can be said of erased records: {why if asked else 'routing does not look for them'}"
        else:
            yield f"no attack finds an erased record (found: less than {DOUBT:.1%} by chance)"


def _verdict(one: Finding) -> str:
    return f"{one.name + ':':<9} {_routed(one) if one.name == 'routing' else _said(one)}"


def _said(one: Finding) -> str:
    kept, unlearned, reference = one.found
    missed = "misses records that are kept, so its silence means nothing"
    told = "finds records that are kept, and not those that were erased"
    if unlearned:
        return "FINDS ERASED RECORDS" + f"; {_shift(one)}" * reference
    if one.least >= DOUBT:
        few = f"with so few slices or records no chance falls below {one.least:.2g}"
        return f"NO POWER: {few}, so it finds nothing, kept or erased; raise --shadows or --targets"
    if reference:
        return f"{_shift(one)}; beyond that it {told}" if kept else f"INCONCLUSIVE: {_shift(one)}, and it {missed}"
    return told if kept else f"POSITIVE CONTROL FAILED: it {missed}"


def _shift(one: Finding) -> str:
    if isinstance(one, Membership):
        return "SHIFTED REFERENCE: differs from test images already without having seen the records"
    return "DOUBTFUL REFERENCE: slices that never saw the records differ from each other; try another --seed"


def _routed(one: Finding) -> str:
    shown = "tell" if one.found[0] else "do not tell"
    return f"the published prototypes {shown} who was sampled" + _single(one.values())


def _single(values: dict[str, Any]) -> str:
    if values["source"] == "public":
        return "; they are made of public records"
    return f"; {values['single']} of {values['clusters']} are the feature of one private record"


def _row(*cells: str) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _finite(value: Any) -> Any:
    """Values that JSON has: numbers that are none become null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@plotting.styled
def figure(findings: Sequence[Finding], path: Path) -> None:
    """Draws the ROC curves of the membership attacks on logarithmic axes, a panel for each column. PNG.

    Bars are the intervals of the true positive rates that the table has.

    Args:
        findings: those of other attacks are not drawn.
        path: the file.
    """
    shown = [one for one in findings if isinstance(one, Membership)]
    whole = plotting.blank(13, 4.4)
    panels = whole.subplots(1, len(COLUMNS), sharey=True)
    least = min([0.05, *(0.5 / one.columns[0].others for one in shown)])  # a decade at least
    for place, (panel, title) in enumerate(zip(panels, COLUMNS, strict=True)):
        for one in shown:
            false, true = one.curves[place]
            (line,) = panel.plot(np.maximum(false, least), np.maximum(true, least), label=one.name)
            for rate, told in zip(RATES, one.columns[place].rates, strict=True):
                if told is not None:
                    panel.vlines(rate, max(told.low, least), max(told.high, least), color=line.get_color())
        panel.plot([least, 1], [least, 1], color="grey", linewidth=0.8, linestyle="--", label="chance")
        panel.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1), title=title)
        panel.set_xlabel("false positive rate")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(plotting.ticked)
            axis.set_minor_formatter(plotting.unlabelled)
    panels[0].set_ylabel("true positive rate")
    panels[0].legend(loc="lower right")
    plotting.save(whole, path)
