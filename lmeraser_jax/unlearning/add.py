"""Learning new records: what another source holds joins the workdir, and only the slices it touches are tuned.

Adding is "import, reconcile". A record is drawn, sampled and assigned by its id, so the state is the one that
training on everything at once would have given.
"""

import dataclasses
from pathlib import Path

from lmeraser_jax.config import Config, Data
from lmeraser_jax.data import load
from lmeraser_jax.data.source import Source
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import Imported, add_source
from lmeraser_jax.unlearning.build import BuildReport, build
from lmeraser_jax.unlearning.run import Run


def add(run: Run, source: Source) -> tuple[Imported, BuildReport]:
    """Adds a source's training images to a workdir and brings it to the state that its live records call for.

    Adding twice changes nothing; an interrupted `add` is repeated. What the workdir's config says of its own
    data stays as it was.

    Args:
        run: opened for writing.
        source: with the workdir's classes and image shape; ids must be new, or name the same image and label.

    Raises:
        UserError: the source does not fit (nothing is added then), or a cluster's loss was not finite.
    """
    assert run.writable, "adding needs a run that holds the writer lock"
    imported = add_source(run.layout, run.catalog, source, run.config)
    return imported, build(run)


def open_source(run: Run, path: str, labels: str = "") -> Source:
    """Opens an .npz file or a folder of images with the workdir's own data settings.

    Args:
        run: opened.
        path: the file, or a folder laid out as the workdir's config says.
        labels: CSV of labels and owners, for a folder.

    Raises:
        UserError: another kind of source, or one that cannot be used.
    """
    kind = _kind(path)
    if labels and kind != "folder":
        raise UserError(f"--labels={labels}: goes with a folder of images; an .npz holds its own labels and owners")
    return load.load(_settings(run.config, run.catalog.get("dataset")["shape"], kind, path, labels), own_test=False)


def _kind(path: str) -> str:
    if not path:
        raise UserError("--source=FILE.npz or --source=FOLDER is missing: the images to add")
    if Path(path).is_dir():
        return "folder"
    if path.endswith(".npz"):
        if not Path(path).is_file():
            raise UserError(f"--source={path}: no such file")
        return "npz"
    if path in ("digits", "tfds") or not Path(path).exists():
        raise UserError(
            f"--source={path}: must be an .npz file or a folder of images that exists; a data set of scikit-learn or"
            " TensorFlow Datasets is named by --config.data.source when a workdir is made"
        )
    raise UserError(f"--source={path}: must be an .npz file or a folder of images")


def _settings(config: Config, shape: list[int], kind: str, path: str, labels: str) -> Data:
    """The workdir's data settings for another path and kind; folders for roles only where they are there."""
    data = config.data
    own = kind == "folder" == data.source
    splits = {f"{split}_split": "" for split in ("train", "holdout", "test", "public")}
    if own:
        there = {name: getattr(data, name) for name in splits}
        splits |= {name: folder for name, folder in there.items() if folder and (Path(path) / folder).is_dir()}
    train = (data.train_split if own else "") or "train"
    if kind == "folder" and not (Path(path) / train).is_dir():
        raise UserError(f"--source={path}: has no folder {train}; the images to add are {train}/<class>/<file> in it")
    store = (
        {"store_size": shape[0], "store_width": shape[1]} if kind == "folder" else {"store_size": 0, "store_width": 0}
    )
    return dataclasses.replace(data, source=kind, path=path, labels=labels, dataset="", **splits, **store)
