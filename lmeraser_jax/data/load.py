"""The configured source: one place that knows all of them."""

import dataclasses
import re

from lmeraser_jax.config import Data
from lmeraser_jax.data import text
from lmeraser_jax.data.names import list_names
from lmeraser_jax.data.source import Source
from lmeraser_jax.data.text import Encoder
from lmeraser_jax.errors import UserError, raise_all

IN_FOLDERS = ("train_split", "holdout_split", "test_split", "public_split", "store_size", "store_width")
SOURCES_OF = {"dataset": ("tfds",), "labels": ("folder",)} | dict.fromkeys(IN_FOLDERS, ("folder", "tfds"))


def load(data: Data, own_test: bool = True, labelled: bool = True, encoder: Encoder | None = None) -> Source:
    """Opens the source that `data.source` names, with the owners that `data.owner_pattern` finds.

    With `own_test` an .npz must have test images unless `data.test_share` draws some. Unless `labelled`, images may
    have no label, which is -1 then. Texts need an `encoder`. Raises `UserError` for a source that cannot be used, a
    setting that it would ignore, a pattern without a match.
    """
    raise_all(
        [
            f"--config.data.{name}={value}: goes with data.source={' or '.join(sources)}, not {data.source}"
            for name, sources in SOURCES_OF.items()
            if (value := getattr(data, name)) and data.source not in sources
        ]
    )
    source = _open(data, own_test and not data.test_share, labelled, encoder)
    return _with_owners(source, data.owner_pattern) if data.owner_pattern else source


def _open(data: Data, own_test: bool, labelled: bool, encoder: Encoder | None) -> Source:
    """Imports the source's module when it is used: TFDS and scikit-learn take a while."""
    if data.source == "text":
        assert encoder is not None
        return text.load(data, encoder)
    if data.source == "npz":
        from lmeraser_jax.data import npz

        return npz.load(data.path, own_test, data.max_pixels, labelled)
    if data.source == "folder":
        from lmeraser_jax.data import folder

        return folder.load(data, labelled)
    if data.source == "tfds":
        from lmeraser_jax.data import tfds

        return tfds.load(data, labelled, encoder)
    from lmeraser_jax.data import digits

    return digits.load()


def _with_owners(source: Source, pattern: str) -> Source:
    """Owners from ids; an id that does not match keeps the owner it has."""
    search, items, matched = re.compile(pattern).search, [], False
    for item in source.items:
        match = search(item.id)
        owner = "/".join(filter(None, match.groups())) if match else ""
        matched = matched or bool(owner)
        items.append(item._replace(owner=owner) if owner else item)
    if not matched:
        examples = list_names(item.id for item in source.items[:3])
        raise UserError(f"--config.data.owner_pattern={pattern!r} finds no owner in any id; ids look like: {examples}")
    return dataclasses.replace(source, items=items)
