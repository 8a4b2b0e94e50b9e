"""The rows of a comparison, and the files that hold them.

comparison.json has the settings that a folder's comparison is bound to, rows/TASK.json the rows of one finished task,
results.json and results.csv all rows.
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.atomic_files import write_bytes

BINDING = "comparison.json"
TIMES = ("seconds_full", "seconds_request", "seconds_unsampled", "seconds_sampled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row: a method on a data set with a seed, at one point of an experiment.

    Images are counted where they pass forward and backward through the backbone. Costs of requests are of uniformly
    drawn records, sampled ones counted; seconds are from the plan to the purge, and 0 where nothing was timed.
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
    share_request: float = 0.0  # mean share of the records that a request passes again, with all of their slices
    common_weight: float = 0.0  # of the common head among the answers; 0 without one
    balanced_error: float = 0.0  # standard error of `balanced`
    majority: float = 0.0  # accuracy of always naming the class with the most training records; 0: not known
    source: str = ""  # key of the entry of `Results.sources` that says where the row comes from

    @property
    def point(self) -> tuple[str, str, str, str, int, float, str]:
        """Identifies a row among all rows."""
        return self.experiment, self.dataset, self.backbone, self.method, self.seed, self.x, self.series

    def without_times(self) -> "Measurement":
        """The row without what differs from run to run."""
        return dataclasses.replace(self, source="", **dict.fromkeys(TIMES, 0.0))


@dataclasses.dataclass(frozen=True)
class Results:
    """All rows of a comparison."""

    rows: tuple[Measurement, ...]  # at most one for each `point`
    # {name: {"command", "machine", "version", "date"}} of the commands that the rows come from
    sources: Mapping[str, dict[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FinishedTask:
    """The content of rows/TASK.json."""

    settings: str  # digest of those that the rows were made with
    source: dict[str, str]  # the command that made them, see `Results.sources`
    rows: tuple[Measurement, ...]

    @property
    def source_name(self) -> str:
        return digest(self.source)[:12]


def load_task(path: Path) -> FinishedTask:
    """Reads the rows of a task. Raises `UserError` where the file is damaged, as do the other readers."""
    with _reading(path, f"{path} holds no rows of a comparison: %s; delete it, and its task is done again") as tree:
        return FinishedTask(tree["settings"], tree["source"], _rows(tree["rows"]))


def collect(folder: Path) -> Results:
    """All rows that are on disk in a comparison's folder, in the order of their tasks' names."""
    tasks = [load_task(path) for path in sorted((folder / "rows").glob("*.json"))]
    rows = tuple(dataclasses.replace(row, source=task.source_name) for task in tasks for row in task.rows)
    return Results(rows, {task.source_name: task.source for task in tasks})


def merge(results: Results, others: Mapping[str, Results]) -> Results:
    """Results with the rows of other comparisons, {folder: results}; the first row of each point is kept.

    Raises `UserError` where two of them have different numbers at the same point, times apart.
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
    write_bytes(folder / "results.json", json.dumps(dataclasses.asdict(results), indent=1).encode())
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Measurement))
    writer.writerows(dataclasses.astuple(row) for row in results.rows)
    write_bytes(folder / "results.csv", text.getvalue().encode())


def load(path: Path) -> Results:
    """Reads a results.json."""
    with _reading(path, f"{path} is not the results.json of a comparison: %s") as tree:
        return Results(_rows(tree["rows"]), {name: dict(source) for name, source in tree["sources"].items()})


def read_binding(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder's comparison is bound to, {"config", "options"}; None where there is none yet."""
    path = folder / BINDING
    if not path.exists():
        return None
    with _reading(path, f"{path} is damaged: %s; name another --workdir") as tree:
        return {"config": dict(tree["config"]), "options": dict(tree["options"])}


@contextlib.contextmanager
def _reading(path: Path, message: str) -> Iterator[Any]:
    """The content of a JSON file; whatever is wrong with it becomes a `UserError` with the reason in the message."""
    try:
        yield json.loads(path.read_text("utf-8"))
    except KeyError as error:
        raise UserError(message % f"{error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(message % error) from error


def _rows(values: Sequence[Mapping[str, Any]]) -> tuple[Measurement, ...]:
    """Raises `TypeError` for a row that lacks a field, has an unknown one, or a text in place of a number."""
    rows = tuple(Measurement(**fields) for fields in values)
    for row, field in itertools.product(rows, dataclasses.fields(Measurement)):
        value, legal = getattr(row, field.name), str if field.type is str else int | float
        if not isinstance(value, legal):
            raise TypeError(f"{field.name} is {value!r}")
    return rows
