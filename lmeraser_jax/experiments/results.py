"""The rows of a comparison, and the files that hold them.

comparison.json     the settings that a folder's comparison is bound to
rows/TASK.json      the rows of one finished task, with the digest of their settings
results.json, .csv  all rows
"""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.atomic_files import write_bytes, write_json

BINDING = "comparison.json"
Content = TypeVar("Content")
TIMES = ("seconds_full", "seconds_request", "seconds_unsampled", "seconds_sampled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row: a method on a data set with a seed, at one point of an experiment.

    A full tuning makes everything. Images are counted where they pass forward and backward through the backbone; heads
    on features pass none, because features are computed once. Costs of requests are of uniformly drawn records, sampled
    ones counted; seconds are from the plan to the purge, and 0 where nothing was timed.
    """

    experiment: str  # methods | removal | cut | epochs | sequence
    dataset: str  # name for people
    backbone: str  # name for people
    method: str  # as in --methods
    seed: int
    x: float = 0.0  # share erased, threshold or K, epoch, requests served; 0 for methods
    series: str = ""  # one of several curves of an experiment, such as the kind of a sequence; "" for the only one
    records: int  # live training records
    clusters: int  # K, slices that predict
    accuracy: float  # share of right answers on the images of the split
    balanced: float  # mean of the accuracies within the classes
    images_full: int  # of a full tuning
    seconds_full: float = 0.0  # of a full tuning, cold: compilation is included
    images_request: float = 0.0  # mean over planned erasures
    images_worst: float = 0.0  # largest of them
    seconds_request: float = 0.0  # expected: seconds_unsampled and seconds_sampled, as frequent as their records are
    records_request: float = 0.0  # mean members of all slices that are tuned again
    parameters_request: float = 0.0  # mean parameters in these slices
    parameters: int = 0  # in all slices
    expected_share: float = 0.0  # of the data, re-tuned for an unsampled record, sum(m_k^2) / N^2
    sampled_share: float = 0.0  # of the records that are sampled, whose erasure also re-clusters
    spent: float = 0.0  # images passed since the start of a sequence
    tested: int = 0  # images of the split
    passes: float = 0.0  # images passed forward through the backbone for one prediction
    seconds_unsampled: float = 0.0  # mean of the requests that were served for records that are not sampled
    seconds_sampled: float = 0.0  # mean of those for sampled records
    majority: float = 0.0  # accuracy of always naming the class with the most training records; 0: not known
    source: str = ""  # key of the entry of `Results.sources` that says where the row comes from; "": not known

    @property
    def point(self) -> tuple[str, str, str, str, int, float, str]:
        """Identifies a row among all rows."""
        return self.experiment, self.dataset, self.backbone, self.method, self.seed, self.x, self.series

    def without_times(self) -> "Measurement":
        """The row without what differs from run to run."""
        return dataclasses.replace(self, source="", **dict.fromkeys(TIMES, 0.0))


@dataclasses.dataclass(frozen=True)
class Results:
    """All rows of a comparison.

    Attributes:
        rows: at most one for each `point`.
        command, machine: the last command, and where it ran.
        sources: {name: {"command", "machine", "version", "date"}} of the commands that the rows come from.
    """

    rows: tuple[Measurement, ...]
    command: str = ""
    machine: str = ""
    sources: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"command": self.command, "machine": self.machine, "sources": dict(self.sources), "rows": rows}


@dataclasses.dataclass(frozen=True)
class FinishedTask:
    """The rows of a task, the digest of the settings they were made with, and the command that made them."""

    settings: str
    source: Mapping[str, str]
    rows: tuple[Measurement, ...]

    @property
    def source_name(self) -> str:
        return digest(dict(self.source))[:12]

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))


def load_task(path: Path) -> FinishedTask:
    """Reads the rows of a task. Raises `UserError` where the file is damaged."""

    def parse(tree: Any) -> FinishedTask:
        return FinishedTask(tree["settings"], tree["source"], _rows(tree["rows"]))

    return _read(path, parse, "{path} holds no rows of a comparison: {reason}; delete it, and its task is done again")


def collect(folder: Path, command: str, machine: str) -> Results:
    """All rows that are on disk in a comparison's folder, in the order of their tasks' names."""
    tasks = [load_task(path) for path in sorted((folder / "rows").glob("*.json"))]
    rows = tuple(dataclasses.replace(row, source=task.source_name) for task in tasks for row in task.rows)
    return Results(rows, command, machine, {task.source_name: task.source for task in tasks})


def merge(results: Results, others: Mapping[str, Results]) -> Results:
    """Results with the rows of other comparisons, {folder: results}; the first row of each point is kept.

    Raises:
        UserError: two of them have different numbers at the same point, times apart.
    """
    rows, clashes = {row.point: row for row in results.rows}, []
    for folder, other in others.items():
        for row in other.rows:
            if rows.setdefault(row.point, row).without_times() != row.without_times():
                clashes.append(f"{folder}: {row.experiment} of {row.method}, {row.dataset}, seed {row.seed}")
    if clashes:
        where = join_limited(sorted(set(clashes)))
        raise UserError(f"--merge: another folder has different results for the same point; leave one out: {where}")
    sources = {name: source for other in (*others.values(), results) for name, source in other.sources.items()}
    return dataclasses.replace(results, rows=tuple(rows.values()), sources=sources)


def save(folder: Path, results: Results) -> None:
    """Writes results.json and results.csv, each completely or not at all."""
    write_bytes(folder / "results.json", json.dumps(results.values(), indent=1).encode())
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Measurement))
    writer.writerows(dataclasses.astuple(row) for row in results.rows)
    write_bytes(folder / "results.csv", text.getvalue().encode())


def load(path: Path) -> Results:
    """Reads a results.json. Raises `UserError` where the file is none."""

    def parse(tree: Any) -> Results:
        sources = {name: dict(source) for name, source in tree["sources"].items()}
        return Results(_rows(tree["rows"]), str(tree["command"]), str(tree["machine"]), sources)

    return _read(path, parse, "{path} is not the results.json of a comparison: {reason}")


def read_binding(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder's comparison is bound to, {"config", "options"}; None where there is none yet.

    Raises:
        UserError: the file is damaged.
    """

    def parse(tree: Any) -> dict[str, Any]:
        return {"config": dict(tree["config"]), "options": dict(tree["options"])}

    path = folder / BINDING
    return _read(path, parse, "{path} is damaged: {reason}; name another --workdir") if path.exists() else None


def _read(path: Path, parse: Callable[[Any], Content], message: str) -> Content:
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(message.format(path=path, reason=reason)) from error


def _rows(values: Sequence[Mapping[str, Any]]) -> tuple[Measurement, ...]:
    """Raises `ValueError` that names what is missing, unknown or of another type."""
    fields = {field.name: field for field in dataclasses.fields(Measurement)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    problems = []
    for number, row in enumerate(values):
        if missing := sorted(required - set(row)):
            problems.append(f"row {number} has no {join_limited(missing)}")
        if unknown := sorted(set(row) - set(fields)):
            problems.append(f"row {number} has {join_limited(unknown)}, which this version does not know")
        for name in fields.keys() & row.keys():
            legal = str if fields[name].type is str else int | float
            if isinstance(row[name], bool) or not isinstance(row[name], legal):
                problems.append(f"row {number}: {name} is {row[name]!r}")
    raise_all(problems, limit=10)
    return tuple(Measurement(**row) for row in values)
