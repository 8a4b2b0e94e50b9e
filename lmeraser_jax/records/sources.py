"""The configured source: one place that knows all of them."""

from lmeraser_jax.config import Data
from lmeraser_jax.records.source import Source


def load(data: Data) -> Source:
    """Opens the source that `data.source` names."""
    if data.source == "npz":
        from lmeraser_jax.records import npz

        return npz.load(data.path)
    if data.source == "folder":
        from lmeraser_jax.records import folder

        return folder.load(data.path, data.store_size or data.image_size, data.labels)
    from lmeraser_jax.records import digits

    return digits.load()
