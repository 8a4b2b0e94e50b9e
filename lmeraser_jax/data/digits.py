"""scikit-learn's bundled digits: 1,797 real 8x8 scans, no download; the embedded experiment.

The scans come in the order in which people wrote them, but without the writers' names, so a run of 16
consecutive scans stands for one owner ("hand-000", ...). Even runs are public, odd runs private; of the
private scans every third is a test image.
"""

from typing import Any

import numpy as np

from lmeraser_jax.data.source import Contents, Item, Source

RUN = 16


def load() -> Source:
    """1,797 items of shape (8, 8, 1); ids are "digit-0000" and so on, the position in the data set."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # grey levels 0..16
    items = []
    for i, label in enumerate(digits.target):
        run = i // RUN
        private = "test" if i % 3 == 0 else "train"
        split = "public" if run % 2 == 0 else private
        items.append(Item(f"digit-{i:04d}", split, int(label), f"hand-{run:03d}"))
    names = tuple(str(name) for name in digits.target_names)
    return Source("digits", names, (8, 8, 1), items, lambda positions: Contents(images[list(positions)]))
