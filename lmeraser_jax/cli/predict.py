"""lmeraser predict: predict image files or folders: label, probability and cluster key.

lmeraser predict --workdir=runs/digits scan.png folder/ [--format=table|csv|json]
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.data.folder import SUFFIXES
from lmeraser_jax.errors import UserError, raise_all

TAKES_FILES = True
FLAGS = (Flag("format", "table", "how to print", choices=("table", "csv", "json")),)


def run(arguments: common.Arguments) -> int:
    common.workdir_of(arguments)  # refuses a missing one first
    files = _files([Path(name) for name in arguments.files])
    with common.opened(arguments) as run_:
        from lmeraser_jax.data.decode import decode_all
        from lmeraser_jax.evaluation.serving import Predictor

        common.warn_if_unfinished(run_)
        spec = run_.image_spec
        images = decode_all(files, spec.height, spec.width, spec.channels, run_.config.data.max_pixels)
        answers = Predictor(run_)(images)
        columns = zip(files, answers.labels, answers.probabilities.max(axis=1), answers.clusters[:, 0], strict=True)
        rows = [
            {
                "file": str(file),
                "label": run_.classes[label],
                "probability": round(float(probability), 6),
                "cluster": answers.keys[cluster],
            }
            for file, label, probability, cluster in columns
        ]
    common.show(arguments, _text(rows, arguments["format"]), {"predictions": rows})
    return 0


def _files(paths: list[Path]) -> list[Path]:
    """The image files that the arguments name."""
    if not paths:
        raise UserError("name image files or a folder: lmeraser predict --workdir=DIR FILE ...")
    raise_all([f"{path}: no such file or folder" for path in paths if not path.exists()])
    files = []
    for path in paths:
        images = [path]
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not images:
            raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        files += images
    return files


def _text(rows: list[dict[str, Any]], format_: str) -> str:
    if format_ == "json":
        return json.dumps(rows, indent=2)
    if format_ == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue().rstrip("\n")
    width = max(len(row["file"]) for row in rows)
    lines = [f"{'file':<{width}}  {'label':<16}{'probability':>11}  cluster"]
    lines += [f"{r['file']:<{width}}  {r['label']:<16}{r['probability']:>11.3f}  {r['cluster'][:12]}" for r in rows]
    return "\n".join(lines)
