"""The arrays of a checkpoint, read without Orbax and JAX: for commands that must start fast.

Orbax writes every array as Zarr into an OCDBT database; TensorStore alone reads that.
"""

import json
import math
from pathlib import Path

import numpy as np
import tensorstore

from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.atomic_files import disk_use

RATIO = 40_000  # bytes of arrays that one byte of the files can stand for: Zstandard gives at most 32,768
SHOWN = 2000  # characters of an error in a message
DESCRIPTION = "/.zarray"  # what the key of an array's description ends with


def read_arrays(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of one step, of the newest by default: {"path/to/leaf": array}.

    Raises:
        UserError: nothing readable is there, or its description calls for more than the files can hold.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    if not steps:
        raise UserError(f"{folder} holds no checkpoint")
    place = folder / str(max(steps) if step is None else step)
    try:
        base = (place / "arrays").absolute().as_uri() + "/"
        database = {"driver": "ocdbt", "base": base}
        keys = [key.decode() for key in tensorstore.KvStore.open(database).result().list().result()]
        names = [key.removesuffix(DESCRIPTION) for key in keys if key.endswith(DESCRIPTION)]
        specs = [{"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}} for name in names]
        stores = [future.result() for future in [tensorstore.open(spec) for spec in specs]]
        size = sum(math.prod(store.shape) * store.dtype.numpy_dtype.itemsize for store in stores)
        if size > RATIO * disk_use(folder):  # never allocate for a promise
            raise ValueError(f"it calls for {size} bytes, more than its files can hold")
        reads = [store.read() for store in stores]
        arrays = {name: np.asarray(read.result()) for name, read in zip(names, reads, strict=True)}
        notes = json.loads((place / "metadata" / "metadata").read_text(encoding="utf-8"))
        return arrays | {name: np.zeros(shape, dtype) for name, (dtype, shape) in notes["empty"].items()}
    except Exception as error:  # TensorStore raises nearly every kind over damaged files
        raise UserError(f"the checkpoint {folder} cannot be read: {str(error)[:SHOWN]}") from error
