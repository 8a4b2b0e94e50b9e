"""A small real problem for the tests: a few dozen digits, a random frozen ViT, seconds to tune."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.data import digits
from lmeraser_jax.data.source import Contents, Item, Source
from lmeraser_jax.unlearning.rectify import Change
from lmeraser_jax.unlearning.run import Run, prepare_run

SMALL = {
    "data": {"image_size": 8},
    "backbone": {"patch": 4, "width": 16, "depth": 1, "heads": 2, "mlp": 32},
    "pretraining": {"epochs": 0},  # a random backbone is as frozen as a trained one
    "clustering": {"sample_size": 30, "cut": "auto:5", "max_members": 10, "min_members": 3, "feature_batch": 16},
    "tuning": {"prompt_width": 1, "batch": 4, "lanes": 2, "epochs": 2, "min_steps": 5, "scan_steps": 8},
    "inference": {"batch": 16},
}


def small_config(**overrides: Any) -> Config:
    """The small config; overrides are named group__setting, or seed."""
    tree = {group: dict(values) for group, values in SMALL.items()}
    for name, value in overrides.items():
        group, _, setting = name.partition("__")
        if setting:
            tree.setdefault(group, {})[setting] = value
        else:
            tree[group] = value
    return settings.from_dict(tree)


def small_source(train: int = 100, test: int = 20, public: int = 40) -> Source:
    """The first so many digits of each split."""
    source, limits = digits.load(), {"train": train, "test": test, "public": public}
    chosen = []
    for split, limit in limits.items():
        chosen += [i for i, item in enumerate(source.items) if item.split == split][:limit]
    chosen.sort()
    return with_items(source, [source.items[i] for i in chosen], source.read(range(len(source.items))).rows[chosen])


def with_items(source: Source, items: Sequence[Item], images: np.ndarray) -> Source:
    return dataclasses.replace(source, items=list(items), read=lambda positions: Contents(images[list(positions)]))


def without(source: Source, ids: set[str]) -> Source:
    """The source as if the records had never been there."""
    rest = [i for i, item in enumerate(source.items) if item.id not in ids]
    return with_items(source, [source.items[i] for i in rest], source.read(range(len(source.items))).rows[rest])


def changed(source: Source, ids: set[str], label: Callable[[int], int]) -> Source:
    """The source with other pixels and labels for some records."""
    images = source.read(range(len(source.items))).rows.copy()
    items = []
    for i, item in enumerate(source.items):
        if item.id in ids:
            images[i] = 255 - images[i]
            item = item._replace(label=label(item.label))
        items.append(item)
    return with_items(source, items, images)


def rectified(source: Source, changes: Sequence[Change]) -> Source:
    """The source as if the records had been correct from the start."""
    images, items = source.read(range(len(source.items))).rows.copy(), list(source.items)
    place = {item.id: i for i, item in enumerate(items)}
    for change in changes:
        i = place[change.id]
        images[i] = images[i] if change.image is None else change.image
        items[i] = items[i] if change.label is None else items[i]._replace(label=change.label)
    return with_items(source, items, images)


@contextlib.contextmanager
def small_run(workdir, source: Source | None = None, config: Config | None = None, devices: int = 1):
    """An opened small run on the first so many devices."""
    config, source = config or small_config(), source or small_source()
    with prepare_run(workdir, config, devices=jax.devices()[:devices], source=source) as (run, _):
        yield run


def files_of(run: Run, name: str) -> dict[str, tuple[int, int]]:
    """{file: (inode, time of change)} below a slice: equal only if nothing was written again."""
    files = {path: path.stat() for path in run.layout.slice(name).rglob("*") if path.is_file()}
    return {str(path): (status.st_ino, status.st_mtime_ns) for path, status in files.items()}


def merged(params, adapters, scale):
    """A copy of nested parameters with W + scale A B in place of each kernel that has an adapter."""
    copied = dict(params)
    for name, below in adapters.items():
        if "lora_a" in below:
            change = scale * below["lora_a"].astype(np.float64) @ below["lora_b"]
            copied[name] = params[name] | {"kernel": (params[name]["kernel"] + change).astype(np.float32)}
        else:
            copied[name] = merged(params[name], below, scale)
    return copied
