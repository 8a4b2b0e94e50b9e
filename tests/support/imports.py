"""Small sources with pixels that tests can make again, and what an import must leave as it was."""

import dataclasses

import numpy as np
import pytest

from lmeraser_jax.config import Config
from lmeraser_jax.data.source import Contents, Item, Source, content_hash
from lmeraser_jax.errors import UserError
from lmeraser_jax.storage.ingest import image_file, import_source

SHAPE = (3, 4, 1)


def numbered_source(count=30, **changes) -> Source:
    """Records 0, 1, ...: every fifth public, the one after it a test image. Pixels depend on the position."""
    splits = ("public", "test", "train", "train", "train")
    items = [Item(f"id-{i:05d}", splits[i % 5], i % 3, f"owner-{i // 4}") for i in range(count)]
    return with_items(items, **changes)


def with_items(items, **changes) -> Source:
    def read(positions):
        return Contents(np.stack([pixels(items[position]) for position in positions]))

    return dataclasses.replace(Source("made", ("a", "b", "c"), SHAPE, items, read), **changes)


def blank_source(items, classes=("a", "b"), shape=(2, 2, 1)) -> Source:
    """Items without pixels worth looking at."""
    return Source("x", tuple(classes), shape, items, lambda rows: Contents(np.zeros((len(rows), *shape), np.uint8)))


def pixels(item) -> np.ndarray:
    seed = int(item.id.removeprefix("id-"))
    return np.random.default_rng(seed).integers(0, 256, SHAPE, np.uint8)


def snapshot(layout, catalog) -> tuple:
    tables = [
        catalog.db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in ("records", "meta", "events")
    ]
    return tables, layout.images.read_bytes() if layout.images.exists() else b""


def check_pixels(layout, catalog):
    """Every live record's row holds its own pixels."""
    table = catalog.live("train", "holdout", "test", "public")
    view = image_file(layout, catalog).view()
    for name, row, content in zip(table.ids, table.rows, table.contents, strict=True):
        np.testing.assert_array_equal(view[row], pixels(Item(name, "", 0)))
        assert content == content_hash(view[row])


def refusal(workdir, source, config=Config()) -> str:  # noqa: B008
    """The message of an import that must fail and leave everything as it was."""
    before = snapshot(*workdir)
    with pytest.raises(UserError) as caught:
        import_source(*workdir, source, config)
    assert snapshot(*workdir) == before
    return str(caught.value)
