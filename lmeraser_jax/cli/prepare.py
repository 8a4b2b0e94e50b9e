"""lmeraser prepare: download a data set of TensorFlow Datasets and write it as array_record files.

  lmeraser prepare --dataset=cifar10 [--data_dir=DIR]

Only this command needs TensorFlow: python -m pip install 'lmeraser_jax[prepare]'. What it wrote is read without.
"""

import contextlib
import importlib.util
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from lmeraser_jax.cli import common
from lmeraser_jax.errors import UserError, join_limited

NEEDED = ("tensorflow", "importlib_resources")
FLAG = "--dataset"


def define(flags: common.Flags) -> None:
    text = "TFDS's name: NAME, NAME/CONFIG or NAME/CONFIG:VERSION; by default --config.data.dataset"
    absl_flags.DEFINE_string("dataset", "", text, flag_values=flags)
    text = "TFDS's data folder; by default --config.data.path, $TFDS_DATA_DIR or ~/tensorflow_datasets"
    absl_flags.DEFINE_string("data_dir", "", text, flag_values=flags)


def run(arguments: common.Arguments) -> int:
    data = common.config_of(arguments).data
    dataset = arguments["dataset"] or data.dataset
    data_dir = arguments["data_dir"] or (data.path if data.source == "tfds" else "")
    if not dataset:
        raise UserError(f"{FLAG}=NAME is missing: the name of a TFDS data set, such as cifar10")
    from lmeraser_jax.data import tfds, tfds_paths

    folder = tfds_paths.find(dataset, data_dir, FLAG)
    new = folder is None
    if folder is None:
        folder = _prepare(dataset, tfds_paths.data_folder(data_dir))
    prepared = tfds.open_prepared(folder)
    classes = prepared.fields.class_names
    following = _next(dataset, data_dir, prepared.name)
    lines = [
        f"{prepared.name} {'is prepared' if new else 'was prepared before, nothing changed'}: {folder}",
        *(f"  {split:<12}{count:>9} images" for split, count in prepared.sizes.items()),
        f"  {len(classes)} classes: {join_limited(classes)}",
        f"next: {following}",
    ]
    values = {
        "dataset": prepared.name,
        "folder": str(folder),
        "new": new,
        "splits": prepared.sizes,
        "classes": list(classes),
        "next": following,
    }
    common.show(arguments, "\n".join(lines), values)
    return 0


def _next(dataset: str, data_dir: str, full: str) -> str:
    """The command that trains on the data set; its config is named even where it is TFDS's default."""
    name, _, version = full.rpartition("/")
    name, short = (f"{name}:{version}" if ":" in dataset else name), name.replace("/", "-")
    path = f" --config.data.path={shlex.quote(data_dir)}" if data_dir else ""
    settings = f"--config.data.source=tfds --config.data.dataset={name}{path} --config.backbone.weights=FILE"
    return f"lmeraser train --workdir=runs/{short} {settings}"


def missing() -> list[str]:
    """The modules that writing needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def _prepare(dataset: str, root: Path) -> Path:
    """Downloads and writes a data set; returns its folder. What was downloaded is kept if something fails."""
    from lmeraser_jax.data import tfds, tfds_paths

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets at length
    builder = _builder(dataset, root)
    tfds.find_fields(dataset, builder.info)  # before hours of download
    import tensorflow_datasets

    print(f"preparing {dataset} in {root}; servers that do not answer are asked for minutes", file=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for every attempt
    if not sys.stderr.isatty():
        tensorflow_datasets.disable_progress_bar()
    options = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)  # those are never array_record
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
            builder.download_and_prepare(file_format="array_record", download_config=options)
    except Exception as error:  # a builder may raise anything
        raise UserError(_failure(dataset, root, builder, error)) from error
    folder = tfds_paths.find(dataset, str(root), FLAG)
    assert folder is not None, builder.data_dir
    return folder


def _builder(dataset: str, root: Path) -> Any:
    """TFDS's builder. Raises `UserError`: no such name, config or version, or what writing needs is not installed."""
    import tensorflow_datasets

    from lmeraser_jax.data import tfds_paths

    name, config, _ = tfds_paths.parse(dataset, FLAG)
    tfds_paths.check_name(name, FLAG)
    if absent := missing():
        raise UserError(
            f"writing {dataset} needs {' and '.join(absent)}: python -m pip install 'lmeraser_jax[prepare]'"
            " (reading it does not)"
        )
    try:
        configs = list(tensorflow_datasets.builder_cls(name).builder_configs)
        if config and config not in configs:
            raise UserError(
                f"{FLAG}={dataset}: {name} has no config {config}; it has {join_limited(configs) or 'none'}"
            )
        return tensorflow_datasets.builder(dataset, data_dir=str(root))
    except UserError:
        raise
    except Exception as error:  # builders check their versions and import what they need in their own ways
        raise UserError(f"{FLAG}={dataset} cannot be prepared: {_told(error)}") from error


def _failure(dataset: str, root: Path, builder: Any, error: Exception) -> str:
    """Why, and what now; for sets that a person has to download, TFDS's instructions."""
    text = f"{dataset} could not be prepared: {_told(error)}; run the same command again, downloads are kept in {root}"
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return text
    steps = "\n".join(f"  {line.strip()}" for line in str(builder.MANUAL_DOWNLOAD_INSTRUCTIONS).strip().splitlines())
    manual = root / "downloads" / "manual"
    return (
        f"{text}\n{dataset} has files that a person must download; TFDS looks for them in {manual} and says:\n{steps}"
    )


def _told(error: Exception) -> str:
    """The exception in one line; instructions that TFDS adds are left to `_failure`."""
    return " ".join(f"{type(error).__name__}: {error}".split()).partition(" using instructions:")[0][:400]
