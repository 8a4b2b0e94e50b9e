"""One row of a comparison: a method on a data set with a seed, at one point of an experiment."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmeraser_jax.errors import UserError, join_limited
from lmeraser_jax.hashing import digest
from lmeraser_jax.storage.atomic_files import write_bytes, write_json

NOTE = "comparison.json"  # what a folder compares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured at one point.

    Attributes:
        experiment: methods | removal (share erased) | cut (of the tree) | epochs | sequence (of requests).
        dataset, backbone: names for people.
        method: name of a method, as in --methods.
        seed: of the run.
        x: place on the experiment's axis: share erased, threshold or K, epoch, requests served; 0 for methods.
        series: which of several curves of an experiment, such as the kind of a sequence; "" for the only one.
        records: live training records.
        clusters: K, slices that predict.
        accuracy, balanced: shares of right answers on the images asked about; balanced is the mean over the classes.
        images_full, seconds_full: images passed forward and backward through the backbone to make everything, and the
            seconds of that, from the plan to the purge, compiling included (of the methods only; 0 elsewhere). No
            image is for heads on features, which are computed once.
        images_request: mean over uniformly drawn records of the images an erasure of that record passes.
        images_worst: the largest of them.
        seconds_request: seconds of a uniformly drawn request, from the plan to the purge: the mean of the next two, as
            frequent as their records are; 0 where none was served.
        records_request: mean over these records of the members of all slices that are made again.
        parameters_request: mean numbers in these slices.
        parameters: numbers in all slices.
        expected_share: of the data re-tuned by a uniform unsampled request, sum(m_k^2) / N^2.
        sampled_share: of the records that are sampled, whose erasure also re-clusters.
        spent: images passed since the start of a sequence, 0 elsewhere.
        tested: images that were asked about.
        passes: images passed forward through the backbone for one answer.
        seconds_unsampled, seconds_sampled: mean seconds of requests that were really served, for a record that is not
            sampled and for one that is, whose erasure also re-clusters; 0 where none was served.
        majority: share of right answers of who always names the class with the most training records; 0: not known.
        source: names the entry of `Results.sources` that says where the row comes from; "" where that is not known.
    """

    experiment: str
    dataset: str
    backbone: str
    method: str
    seed: int
    x: float = 0.0
    series: str = ""
    records: int
    clusters: int
    accuracy: float
    balanced: float
    images_full: int
    seconds_full: float = 0.0
    images_request: float = 0.0
    images_worst: float = 0.0
    seconds_request: float = 0.0
    records_request: float = 0.0
    parameters_request: float = 0.0
    parameters: int = 0
    expected_share: float = 0.0
    sampled_share: float = 0.0
    spent: float = 0.0
    tested: int = 0
    passes: float = 0.0
    seconds_unsampled: float = 0.0
    seconds_sampled: float = 0.0
    majority: float = 0.0
    source: str = ""

    @property
    def point(self) -> tuple[str, str, str, str, int, float, str]:
        """What makes a row one of its kind."""
        return self.experiment, self.dataset, self.backbone, self.method, self.seed, self.x, self.series


@dataclasses.dataclass(frozen=True)
class Results:
    """All rows of a comparison.

    Attributes:
        rows: at most one of a `point`.
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


def load(path: Path) -> Results:
    """Reads results.json. Raises `UserError` where it is none."""
    try:
        tree = json.loads(path.read_text("utf-8"))
        sources = tree.get("sources", {}).items()  # none in files of earlier versions
        sources = {str(name): {str(k): str(v) for k, v in one.items()} for name, one in sources}
        return Results(_rows(tree["rows"]), str(tree["command"]), str(tree["machine"]), sources)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not the results.json of a comparison: {_why(error)}") from error


def bound(folder: Path) -> dict[str, Any] | None:
    """What a folder's comparison is bound to: {"config", "plan"}; None where nothing was compared yet.

    Raises:
        UserError: the file that says it is damaged.
    """
    path = folder / NOTE
    try:
        tree = json.loads(path.read_text("utf-8"))
        if not all(isinstance(tree[name], dict) for name in ("config", "plan")):
            raise TypeError("config and plan must be objects")
        return tree
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {_why(error)}; name another --workdir") from error


@dataclasses.dataclass(frozen=True)
class Done:
    """What a task has left: its rows, the digest of the settings they were made with, and where they come from."""

    settings: str
    source: Mapping[str, str]
    rows: tuple[Measurement, ...]

    @property
    def name(self) -> str:
        """Of the source."""
        return digest(dict(self.source))[:12]

    def save(self, path: Path) -> None:
        rows = [dataclasses.asdict(row) for row in self.rows]
        write_json(path, {"settings": self.settings, "source": dict(self.source), "rows": rows})


def load_done(path: Path) -> Done:
    """Reads what a task has left. Raises `UserError` where it is none."""
    try:
        tree = json.loads(path.read_text("utf-8"))
        return Done(tree["settings"], tree["source"], _rows(tree["rows"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{path} holds no rows of a comparison: {_why(error)}; delete it, and it is made again"
        raise UserError(what) from error


def _why(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _rows(values: Sequence[Mapping[str, Any]]) -> tuple[Measurement, ...]:
    """Raises `ValueError` or `TypeError` that names what is missing, unknown or of another type."""
    fields = {field.name: field for field in dataclasses.fields(Measurement)}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    for number, row in enumerate(values):
        if missing := sorted(needed - set(row)):
            raise ValueError(f"row {number} has no {join_limited(missing)}")
        if unknown := sorted(set(row) - set(fields)):
            raise ValueError(f"row {number} has {join_limited(unknown)}, which this version does not know")
        for name, value in row.items():
            legal = str if fields[name].type in ("str", str) else int | float
            if isinstance(value, bool) or not isinstance(value, legal):
                raise TypeError(f"row {number}: {name} is {value!r}")
    return tuple(Measurement(**row) for row in values)


def save(folder: Path, results: Results) -> None:
    """Writes results.json and results.csv, each completely or not at all."""
    write_bytes(folder / "results.json", json.dumps(results.values(), indent=1).encode())
    lines = [[field.name for field in dataclasses.fields(Measurement)]]
    lines += [[str(value) for value in dataclasses.astuple(row)] for row in results.rows]
    write_bytes(folder / "results.csv", _csv(lines))


def _csv(lines: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
