"""Adding records: the training images of another source join the workdir, and only the slices they touch are tuned.

Adding is "import, build". A record is drawn, sampled and assigned by its id, so the state is the one that training on
everything at once would have given.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lmeraser_jax.config import Data
from lmeraser_jax.data import load
from lmeraser_jax.data.source import Source
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import Imported, import_source

if TYPE_CHECKING:  # both load JAX, which refusing a source does without
    from lmeraser_jax.unlearning.build import BuildReport
    from lmeraser_jax.unlearning.run import Run

SPLITS = ("train_split", "holdout_split", "test_split", "public_split")


def add(run: "Run", source: Source) -> "tuple[Imported, BuildReport]":
    """Adds a source's training images to a workdir and brings it to the state that its live records call for.

    Adding twice changes nothing; an interrupted `add` is repeated. What the workdir's config says of its own
    data stays as it was.

    Args:
        run: opened for writing.
        source: with the workdir's classes and image shape; ids must be new, or name the same image and label.

    Raises:
        UserError: the source does not fit (nothing is added then), or a cluster's loss was not finite.
    """
    from lmeraser_jax.unlearning.build import build

    assert run.writable, "adding needs a run that holds the writer lock"
    imported = import_source(run.layout, run.catalog, source, run.config, adding=True)
    return imported, build(run)


def check_source(path: str, labels: str = "", text: bool = False) -> None:
    """Refuses what is neither an .npz file nor a folder, and labels without a folder. See `open_source`."""
    if text:
        if labels or not Path(path).is_file():
            flags = f"--source={path}" + f" --labels={labels}" * bool(labels)
            raise UserError(f"{flags}: the workdir holds text; --source must be a file of JSON lines that exists")
        return
    if not path:
        raise UserError("--source=FILE.npz or --source=FOLDER is missing: the images to add")
    is_folder = Path(path).is_dir()
    if labels and not is_folder:
        raise UserError(f"--labels={labels}: goes with a folder of images; an .npz holds its own labels and owners")
    if path.endswith(".npz") and not Path(path).exists():
        raise UserError(f"--source={path}: no such file")
    if not is_folder and not (path.endswith(".npz") and Path(path).is_file()):
        raise UserError(
            f"--source={path}: must be an .npz file or a folder of images that exists; a data set of scikit-learn or"
            " TensorFlow Datasets is named by --config.data.source when a workdir is made"
        )


def open_source(run: "Run", path: str, labels: str = "") -> Source:
    """Opens what holds records to add: an .npz file, a folder laid out as the workdir's config says, or JSON lines.

    `labels` is a CSV beside a folder.

    Raises:
        UserError: another kind of source, or one that cannot be used.
    """
    data = run.config.data
    check_source(path, labels, run.config.is_text)
    changes = {"source": "npz", "store_size": 0, "store_width": 0, **dict.fromkeys(SPLITS, "")}
    encoder = run.encoder if run.config.is_text else None
    if encoder is not None:
        changes["source"] = "text"
    elif Path(path).is_dir():
        height, width, _ = run.catalog.get("dataset")["shape"]
        changes = {"source": "folder", "store_size": height, "store_width": width, **_split_folders(data, path)}
    data = dataclasses.replace(data, path=path, labels=labels, dataset="", **changes)
    return load.load(data, own_test=False, encoder=encoder)


def _split_folders(data: Data, path: str) -> dict[str, str]:
    """{setting: folder} of the splits that lie below a path under the names that the workdir's config gives them."""
    folders = {name: getattr(data, name) if data.source == "folder" else "" for name in SPLITS}
    train = folders["train_split"] or "train"
    if not (Path(path) / train).is_dir():
        raise UserError(f"--source={path}: has no folder {train}; the images to add are {train}/<class>/<file> in it")
    return {name: folder if (Path(path) / folder).is_dir() else "" for name, folder in folders.items()}
