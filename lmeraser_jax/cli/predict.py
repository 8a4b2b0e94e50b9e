"""lmeraser predict: predict image files or folders: label, probability and cluster key; or let a language model answer.

  lmeraser predict --workdir=runs/digits scan.png folder/ [--format=table|csv|json]
  lmeraser predict --workdir=runs/tofu --query="Where was Lily born?" [--max_tokens=64] [--temperature=0.7]
  lmeraser predict --workdir=runs/tofu --queries=FILE.jsonl

In a folder it takes the files that an import would take. A line of FILE.jsonl is {"query": TEXT}, with an "id" if you
like, text or a whole number (the names are those of --config.text.names). With "candidates": [TEXT, ...] the answer is
the likeliest of these responses, and all have their log-likelihoods. A file or a line that cannot be read stops no
other: it has a line on standard error and a place in the JSON of --json, and the exit code is 1.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.data import folder, queries
from lmeraser_jax.errors import UserError, raise_all

TAKES_FILES = True
OF_IMAGES = ("file", "label", "probability", "cluster", "approximate")  # columns of CSV; the first names a row
OF_QUERIES = ("id", "query", "answer", "cluster", "approximate")
FLAGS = (
    Flag("format", "table", "how to print", choices=("table", "csv", "json")),
    Flag("query", (), "a query to a language model; may be repeated"),
    Flag("queries", absolute, "JSON lines of queries, plain or gzip"),
    Flag(
        "max_tokens", 64, "most tokens of a generated response; of no account where every query has candidates", low=1
    ),
    Flag("temperature", 0.0, "draw tokens from softmax(logits / temperature); 0: the likeliest", low=0),
    Flag("sampling_seed", 0, "another number draws other responses", low=0),
)


def run(arguments: common.Arguments) -> int:
    _, config = common.finished(arguments)
    if config.is_text:
        return _answer_queries(arguments, config.text.names)
    if arguments["query"] or arguments["queries"]:
        raise UserError("--query and --queries are for a language model; this workdir has images: name image files")
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
    failures += [(_printable(files[position]), reason) for position, reason in answers.unreadable.items()]
    return _show(arguments, OF_IMAGES, rows, failures, _table(rows))


def _answer_queries(arguments: common.Arguments, keys: str) -> int:
    """The same for queries to a language model."""
    if arguments.files:
        raise UserError(f"unexpected argument {arguments.files[0]!r}; this workdir has a language model: use --query")
    chosen = [queries.Query(f"--query {number}", text) for number, text in enumerate(arguments["query"], 1)]
    failures = [(query.name, "is empty") for query in chosen if not query.text.strip()]
    chosen = [query for query in chosen if query.text.strip()]
    if arguments["queries"]:
        more, problems = queries.read_queries(Path(arguments["queries"]), keys)
        chosen, failures = chosen + more, failures + problems
    if not chosen:
        raise_all([f"{name}: {reason}" for name, reason in failures])
        raise UserError("name a query: lmeraser predict --workdir=DIR --query=TEXT, or --queries=FILE.jsonl")
    with common.opened(arguments) as run_:
        from lmeraser_jax.evaluation.answers import answer
        from lmeraser_jax.evaluation.language import Sampling

        common.warn_if_unfinished(run_)
        sampling = Sampling(arguments["max_tokens"], arguments["temperature"], arguments["sampling_seed"])
        rows, problems = answer(run_, chosen, sampling)
    lines = [
        f"{row['query']}\n  {row['answer']}\n  cluster {row['cluster'][:12]}" + "  approximate" * row["approximate"]
        for row in rows
    ]
    return _show(arguments, OF_QUERIES, rows, failures + problems, "\n".join(lines))


def _show(
    arguments: common.Arguments,
    columns: Sequence[str],
    rows: list[dict[str, Any]],
    failures: list[tuple[str, str]],
    table: str,
) -> int:
    """Prints the answers, as CSV with these columns; names in the JSON what has none; returns the exit code."""
    unreadable = [{columns[0]: name, "reason": reason} for name, reason in failures]
    formats = {"json": lambda: json.dumps(rows, indent=2), "csv": lambda: _csv(rows, columns), "table": lambda: table}
    common.show(arguments, formats[arguments["format"]](), {"predictions": rows, "unreadable": unreadable})
    for name, reason in failures:
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _files(arguments: list[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The image files that the arguments name, and each argument that names none, with why."""
    if not arguments:
        raise UserError("name image files or a folder: lmeraser predict --workdir=DIR FILE ...")
    files, failures = [], []
    for path in map(Path, arguments):
        if path.is_dir():
            images, others = folder.list_images(path)
            files += [path / name for name in images]
            if not images:
                failures.append((_printable(path), f"holds no images ({', '.join(folder.SUFFIXES)})"))
            if others:
                common.warn(f"{path}: not used: {folder.count_files(others)}")
        elif path.exists():
            files.append(path)
        else:
            failures.append((_printable(path), "no such file or folder"))
    if not files:
        raise_all([f"{name}: {reason}" for name, reason in failures])
    return files, failures


def _printable(path: Path) -> str:
    """A path for people and for JSON; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _csv(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().rstrip("\n")


def _table(rows: list[dict[str, Any]]) -> str:
    width = max((len(row["file"]) for row in rows), default=4)
    lines = [f"{'file':<{width}}  {'label':<16}{'probability':>11}  cluster"]
    for row in rows:
        line = f"{row['file']:<{width}}  {row['label']:<16}{row['probability']:>11.3f}  {row['cluster'][:12]}"
        lines.append(line + "  approximate" * row["approximate"])
    return "\n".join(lines)
