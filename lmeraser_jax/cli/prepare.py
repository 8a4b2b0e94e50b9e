"""lmeraser prepare: download a data set of TensorFlow Datasets, or convert a published set of texts.

  lmeraser prepare --dataset=cifar10 [--data_dir=DIR]
  lmeraser prepare --config.public.source=tfds
  lmeraser prepare --pack=tallrec --path=book_valid.jsonl.gz --path=book_test.jsonl.gz --out=FILE.jsonl
  lmeraser prepare --pack=movielens --path=FOLDER --out=FILE.jsonl

A set of TensorFlow Datasets is written as array_record files. Only this needs TensorFlow: python -m pip install
'lmeraser_jax[prepare]'. The other commands read the files without it.

With --pack the command reads TALLRec's examples, or MovieLens's movies.csv and ratings.csv, and writes queries and
responses as JSON lines for --config.data.source=text. Files may be gzips. TALLRec's files with "test" in their name
become test records. Of MovieLens a query has the ten films that a user rated before and 20 candidates, the response is
the film that followed, and the user is the owner; the last film of each user is a test record, the four before it are
private ones.
"""

import contextlib
import importlib.util
import json
import logging
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lmeraser_jax.cli import common
from lmeraser_jax.cli.common import Flag
from lmeraser_jax.config.paths import absolute
from lmeraser_jax.data import text_packs, tfds_paths
from lmeraser_jax.data.source import WITHOUT_LABELS
from lmeraser_jax.errors import UserError, join_limited, raise_all
from lmeraser_jax.storage import atomic_files

NEEDED = ("tensorflow", "importlib_resources")
FLAG = "--dataset"
FLAGS = (
    Flag("dataset", "", "TFDS's name: NAME, NAME/CONFIG or NAME/CONFIG:VERSION; else data.dataset or public.dataset"),
    Flag("data_dir", absolute, "TFDS's data folder; else the set's path, $TFDS_DATA_DIR or ~/tensorflow_datasets"),
    Flag("pack", "", "convert this set of texts instead", choices=("", *text_packs.PACKS)),
    Flag("path", (absolute,), "with --pack: a file of TALLRec's, may be repeated; or MovieLens's folder"),
    Flag("out", absolute, "with --pack: the new file of JSON lines"),
)


def run(arguments: common.Arguments) -> int:
    if arguments["pack"]:
        return _convert(arguments)
    config = common.config_of(arguments)
    public = config.public.source == "tfds" and not (arguments["dataset"] or config.data.dataset)
    data = config.public if public else config.data
    dataset = arguments["dataset"] or data.dataset
    data_dir = arguments["data_dir"] or (data.path if data.source == "tfds" else "")
    if not dataset:
        default = f"--config.public.source=tfds stands for {config.public.dataset}, public photographs"
        raise UserError(f"{FLAG}=NAME is missing: the name of a TFDS data set, such as cifar10; {default}")
    before = tfds_paths.find(dataset, data_dir, FLAG)
    folder = before or _prepare(dataset, tfds_paths.data_folder(data_dir))
    from lmeraser_jax.data import tfds  # loads TensorFlow Datasets

    prepared = tfds.open_prepared(folder, labelled=False)
    texts = tfds.text_features(prepared.builder.info)
    classes = [] if texts else list(prepared.fields.class_names)
    next_command = _next_command(dataset, data_dir, prepared.name, public or not (texts or classes))
    content = f"{len(classes)} classes: {join_limited(classes) or 'a public set for ' + WITHOUT_LABELS}"
    if texts:
        content = f"features that may hold query, response and owner: {join_limited(texts)}"
        next_command += " --config.text.features=QUERY,RESPONSE --config.tuning.method=lora"
    lines = [
        f"{prepared.name} {'was prepared before, nothing changed' if before else 'is prepared'}: {folder}",
        *(f"  {split:<12}{count:>9} records" for split, count in prepared.sizes.items()),
        f"  {content}",
        f"next: {next_command}",
    ]
    values = {"dataset": prepared.name, "folder": str(folder), "new": before is None, "splits": prepared.sizes}
    common.show(arguments, "\n".join(lines), values | {"classes": classes, "next": next_command})
    return 0


def _convert(arguments: common.Arguments) -> int:
    """Writes a set of texts as JSON lines. Raises `UserError`: a flag is missing or of no use, the file exists."""
    pack, out = arguments["pack"], Path(arguments["out"])
    problems = [
        f"--{name}={arguments[name]} does not go with --pack" for name in ("dataset", "data_dir") if arguments[name]
    ]
    problems += [f"--{name} is missing for --pack={pack}" for name in ("path", "out") if not arguments[name]]
    if arguments["out"] and out.exists():
        problems.append(f"--out={out} exists already; name a new file")
    raise_all(problems)
    lines = text_packs.PACKS[pack]([Path(path) for path in arguments["path"]])
    common.check_target("out", str(out))
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    atomic_files.write_bytes(out, text.encode())
    splits = Counter(line["split"] for line in lines)
    settings = f"--config.data.source=text --config.data.path={shlex.quote(str(out))} --config.text.context=512"
    command = (
        f"lmeraser train --workdir=runs/{pack} {settings} --config.tuning.method=lora --config.backbone.weights=FILE"
    )
    shown = [f"{out}: {len(lines)} records", *(f"  {split:<12}{count:>9}" for split, count in splits.items())]
    values = {"pack": pack, "file": str(out), "splits": dict(splits), "next": command}
    common.show(arguments, "\n".join([*shown, f"next: {command}"]), values)
    return 0


def _next_command(dataset: str, data_dir: str, full: str, public: bool) -> str:
    """What trains on the data set, or adapts a backbone; its config is named even where it is TFDS's default."""
    name, _, version = full.rpartition("/")
    short = name.replace("/", "-")
    if ":" in dataset:
        name = f"{name}:{version}"
    group = "public" if public else "data"
    path = f" --config.{group}.path={shlex.quote(data_dir)}" if data_dir else ""
    settings = f"--config.{group}.source=tfds --config.{group}.dataset={name}{path} --config.backbone.weights=FILE"
    return f"lmeraser {f'adapt --out={short}' if public else f'train --workdir=runs/{short}'} {settings}"


def missing() -> list[str]:
    """The modules that writing needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def _prepare(dataset: str, root: Path) -> Path:
    """Downloads and writes a data set; returns its folder. What was downloaded is kept if something fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets at length
    import tensorflow_datasets

    from lmeraser_jax.data import tfds

    builder = _builder(dataset, root)
    if not tfds.text_features(builder.info):
        tfds.find_fields(dataset, builder.info, labelled=False)  # before hours of download
    print(f"preparing {dataset} in {root}; a server that does not answer is tried for minutes", file=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for every attempt
    if not sys.stderr.isatty():
        tensorflow_datasets.disable_progress_bar()
    options = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)  # those are never array_record
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
            builder.download_and_prepare(file_format="array_record", download_config=options)
    except Exception as error:  # a builder may raise anything
        advice = f"run the same command again, downloads are kept in {root}"
        text = f"{dataset} could not be prepared: {_one_line(error)}; {advice}"
        raise UserError(text + _instructions(dataset, root, builder)) from error
    return Path(builder.data_dir)


def _builder(dataset: str, root: Path) -> Any:
    """TFDS's builder. Raises `UserError`: no such name, config or version, or what writing needs is not installed."""
    import tensorflow_datasets

    name, config, _ = tfds_paths.parse(dataset, FLAG)
    tfds_paths.check_name(name, FLAG)
    absent = missing()
    if absent:
        raise UserError(
            f"writing {dataset} needs {' and '.join(absent)}: python -m pip install 'lmeraser_jax[prepare]'"
            " (reading it does not)"
        )
    try:
        configs = list(tensorflow_datasets.builder_cls(name).builder_configs)
        if not config or config in configs:
            return tensorflow_datasets.builder(dataset, data_dir=str(root))
    except Exception as error:  # builders check their versions and import what they need in their own ways
        raise UserError(f"{FLAG}={dataset} cannot be prepared: {_one_line(error)}") from error
    raise UserError(f"{FLAG}={dataset}: {name} has no config {config}; it has {join_limited(configs) or 'none'}")


def _instructions(dataset: str, root: Path, builder: Any) -> str:
    """TFDS's instructions for a set that a person has to download; "" for the others."""
    steps = str(builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").strip().splitlines()
    if not steps:
        return ""
    manual = root / "downloads" / "manual"
    heading = f"{dataset} has files that a person must download; TFDS looks for them in {manual} and says:"
    return "\n".join(["", heading, *(f"  {line.strip()}" for line in steps)])


def _one_line(error: Exception) -> str:
    """The exception in one line, without the instructions that TFDS adds."""
    return " ".join(f"{type(error).__name__}: {error}".split()).partition(" using instructions:")[0][:400]
