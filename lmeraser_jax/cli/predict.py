"""lmeraser predict: predict image files or folders: label, probability and cluster key.

  lmeraser predict --workdir=runs/digits scan.png folder/ [--format=table|csv|json]

In a folder it takes the files that an import would take. A file that cannot be read stops no other: it has a line on
standard error and a place in the JSON of --json, and the exit code is 1.
"""

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.data import folder
from lmeraser_jax.errors import UserError, raise_all

TAKES_FILES = True
FLAGS = (Flag("format", "table", "how to print", choices=("table", "csv", "json")),)


def run(arguments: common.Arguments) -> int:
    common.workdir_of(arguments)  # refuses a missing one first
    files, failures = _files(arguments.files)
    with common.opened(arguments) as run_:
        from lmeraser_jax.evaluation.predict import predict_files
        from lmeraser_jax.evaluation.serving import Predictor

        common.warn_if_unfinished(run_)
        answers = predict_files(run_, files, Predictor(run_))
        columns = zip(files, answers.labels, answers.probabilities.max(axis=1), answers.clusters, strict=True)
        rows = [
            {
                "file": _printable(file),
                "label": run_.classes[label],
                "probability": round(float(probability), 6),
                "cluster": answers.keys[clusters[0]],
                "approximate": any(answers.keys[k] in answers.approximate for k in clusters if k >= 0),
            }
            for file, label, probability, clusters in columns
            if label >= 0
        ]
    failures |= {_printable(files[position]): reason for position, reason in answers.unreadable.items()}
    values = {"predictions": rows, "unreadable": [{"file": name, "reason": text} for name, text in failures.items()]}
    common.show(arguments, _text(rows, arguments["format"]), values)
    for name, reason in failures.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _files(arguments: list[str]) -> tuple[list[Path], dict[str, str]]:
    """The image files that the arguments name, and {argument that names none: why}."""
    if not arguments:
        raise UserError("name image files or a folder: lmeraser predict --workdir=DIR FILE ...")
    files, failures = [], {}
    for path in map(Path, arguments):
        if path.is_dir():
            images, others = folder.list_images(path)
            files += [path / name for name in images]
            if not images:
                failures[_printable(path)] = f"holds no images ({', '.join(folder.SUFFIXES)})"
            if others:
                common.warn(f"{path}: not used: {folder.count_files(others)}")
        elif path.exists():
            files.append(path)
        else:
            failures[_printable(path)] = "no such file or folder"
    if not files:
        raise_all([f"{name}: {reason}" for name, reason in failures.items()])
    return files, failures


def _printable(path: Path) -> str:
    """A path for people and for JSON; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _text(rows: list[dict[str, Any]], format_: str) -> str:
    if format_ == "json":
        return json.dumps(rows, indent=2)
    if format_ == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["file", "label", "probability", "cluster", "approximate"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue().rstrip("\n")
    width = max((len(row["file"]) for row in rows), default=4)
    lines = [f"{'file':<{width}}  {'label':<16}{'probability':>11}  cluster"]
    for row in rows:
        line = f"{row['file']:<{width}}  {row['label']:<16}{row['probability']:>11.3f}  {row['cluster'][:12]}"
        lines.append(line + "  approximate" * row["approximate"])
    return "\n".join(lines)
