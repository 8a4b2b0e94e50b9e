"""The configured source: one place that knows all of them."""

import dataclasses
import re

from lmeraser_jax.config import Data
from lmeraser_jax.data.source import Source
from lmeraser_jax.errors import UserError, join_limited, raise_all

FOLDERS = ("train_split", "holdout_split", "test_split", "public_split", "store_size", "store_width")
ONLY = {"dataset": ("tfds",), "labels": ("folder",)} | dict.fromkeys(FOLDERS, ("folder", "tfds"))


def load(data: Data, own_test: bool = True) -> Source:
    """Opens the source that `data.source` names, with the owners that `data.owner_pattern` finds.

    Args:
        data: settings.
        own_test: an .npz must have test images unless `data.test_share` draws some.

    Raises:
        UserError: a source that cannot be used, a setting that it does not take, a pattern without a match.
    """
    _refuse_foreign(data)
    source = _opened(data, own_test and not data.test_share)
    return _with_owners(source, data.owner_pattern) if data.owner_pattern else source


def _opened(data: Data, own_test: bool) -> Source:
    if data.source == "npz":
        from lmeraser_jax.data import npz

        return npz.load(data.path, own_test=own_test, max_pixels=data.max_pixels)
    if data.source == "folder":
        from lmeraser_jax.data import folder

        return folder.load(data)
    if data.source == "tfds":
        from lmeraser_jax.data import tfds

        return tfds.load(data)
    from lmeraser_jax.data import digits

    return digits.load()


def _refuse_foreign(data: Data) -> None:
    """A setting that the source would ignore is a mistake."""
    raise_all(
        [
            f"--config.data.{name}={getattr(data, name)}: goes with data.source={' or '.join(taken)}, not {data.source}"
            for name, taken in ONLY.items()
            if getattr(data, name) and data.source not in taken
        ]
    )


def _with_owners(source: Source, pattern: str) -> Source:
    """Owners from ids; an id that does not match keeps the owner it has."""
    search, items, found = re.compile(pattern).search, [], False
    for item in source.items:
        match = search(item.id)
        owner = "/".join(filter(None, match.groups())) if match else ""
        found = found or bool(owner)
        items.append(item._replace(owner=owner) if owner else item)
    if not found:
        few = join_limited(item.id for item in source.items[:3])
        raise UserError(f"--config.data.owner_pattern={pattern!r} finds no owner in any id; ids look like: {few}")
    return dataclasses.replace(source, items=items)
