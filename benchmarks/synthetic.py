"""A synthetic workdir with a large catalog: real tables, clustering and slices, random numbers instead of training.

Cluster sizes fall as 1 / (rank + 10): with 1,000,000 records in 2,000 clusters from about 19,000 to about 100.
"""

import itertools
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lmeraser_jax import config as settings
from lmeraser_jax.config import Config
from lmeraser_jax.data.source import Item
from lmeraser_jax.hashing import arrays_digest, digest
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models.vit import ViT, ViTConfig
from lmeraser_jax.storage import checkpoints
from lmeraser_jax.storage.atomic_files import write_json
from lmeraser_jax.storage.catalog import Catalog, sample_rank
from lmeraser_jax.storage.ingest import import_settings
from lmeraser_jax.storage.rows import SliceRow
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.training.clustering import Clustering
from lmeraser_jax.training.slices import Slice, init_slice
from lmeraser_jax.unlearning.artifacts import save_clustering
from lmeraser_jax.unlearning.plan import constants_digest, sampled
from lmeraser_jax.unlearning.run import Run, open_run

PIECE = 1_000_000  # features drawn at a time
SIDE, CLASSES, OWNED = 8, 10, 5  # pixels, classes, records of one owner


def config_of(sample: int, clusters: int, sample_from: str = "private") -> Config:
    """A small ViT and prompt; the tuning of a slice is not what is measured."""
    return settings.from_dict(
        {
            "data": {"image_size": SIDE},
            "backbone": {"patch": 4, "width": 16, "depth": 1, "heads": 2, "mlp": 32},
            "clustering": {
                **{"sample_size": sample, "cut": f"auto:{clusters}", "sample_from": sample_from},
                **{"max_members": 0, "min_members": 0},
            },
            "tuning": {"prompt_width": 1, "batch": 16, "lanes": 2, "epochs": 1, "min_steps": 1},
            "inference": {"batch": 16},
        }
    )


def copy(folder: Path, keep: str, records: int, clusters: int, sample: int, sample_from: str = "private") -> None:
    """Puts a synthetic workdir into a folder: a copy of the one in `keep`, which is made first where it is missing."""
    if not keep:
        return make(folder, records, clusters, sample, sample_from)
    source = Path(keep) / f"{records}-{clusters}-{sample}-{sample_from}"
    if not source.exists():
        make(source.with_suffix(".making"), records, clusters, sample, sample_from)
        source.with_suffix(".making").rename(source)
    shutil.copytree(source, folder)


def make(folder: Path, records: int, clusters: int, sample: int, sample_from: str, even: bool = False) -> None:
    """Writes the workdir, with clusters that are `even` or of the sizes above."""
    layout = Layout(folder)
    layout.prepare()
    config, catalog = config_of(sample, clusters, sample_from), Catalog(layout.catalog)
    _write_backbone(layout, config)
    layout.records.mkdir()
    public = sample if sample_from == "public" else 0
    with open(layout.images, "wb") as file:
        file.truncate((records + public) * SIDE * SIDE)  # a sparse file: all black
    write_json(layout.config, settings.to_dict(config))
    names = [f"image-{i:07d}" for i in range(records)]
    public_names = [f"public-{i:07d}" for i in range(public)]
    pool = public_names or names
    sample_ids = sorted(sorted(pool, key=lambda name: sample_rank(config.seed, name))[:sample])
    rng = np.random.default_rng(0)
    weights = np.ones(clusters) if even else 1 / (np.arange(clusters) + 10)
    cluster_of = rng.choice(clusters, records + public, p=weights / weights.sum()).astype(np.int32)
    place = {name: i for i, name in enumerate(names + public_names)}
    where = np.array([place[name] for name in sample_ids])
    cluster_of[where[:clusters]] = np.arange(clusters)  # a cluster has at least one sampled record
    features = rng.normal(size=(clusters, 16)).astype(np.float32)[cluster_of]
    for start in range(0, len(features), PIECE):  # ten million records at once would fill the memory
        piece = features[start : start + PIECE]
        piece += 0.05 * rng.normal(size=piece.shape).astype(np.float32)
    indexes = catalog.db.execute("SELECT name,sql FROM sqlite_master WHERE type='index' AND sql!=''").fetchall()
    with catalog.transaction():
        for name, _ in indexes:  # they are made anew at the end, which is faster than to insert in random order
            catalog.db.execute(f"DROP INDEX {name}")
        catalog.set("dataset", _dataset(config))
        catalog.set("rank_seed", config.seed)
        catalog.set("rows", records + public)
        private = (Item(name, "train", i % CLASSES, f"owner-{i // OWNED:07d}") for i, name in enumerate(names))
        others = (Item(name, "public", i % CLASSES) for i, name in enumerate(public_names))
        contents = map(digest, itertools.chain(names, public_names))
        catalog.add_records(itertools.chain(private, others), range(records + public), contents)
    catalog.close()
    with open_run(folder, devices=jax.devices()[:1], write=True) as run:
        run.feature_file().append(features)
        _publish(run, names, cluster_of, sample_ids, cluster_of[where], features[where])
        with run.catalog.transaction():
            for _, definition in indexes:
                run.catalog.db.execute(definition)


def _dataset(config: Config) -> dict:
    names = [str(i) for i in range(CLASSES)]
    return {"settings": import_settings(config), "classes": names, "shape": [SIDE, SIDE, 1], "name": "synthetic"}


def _write_backbone(layout: Layout, config: Config) -> None:
    b = config.backbone
    vit = ViTConfig(image_size=SIDE, patch=b.patch, channels=1, width=b.width, depth=b.depth, heads=b.heads, mlp=b.mlp)
    params = nnx.to_pure_dict(nnx.split(ViT(vit, nnx.Rngs(0)), nnx.Param)[1])
    backbone_lib.save(layout.backbone, backbone_lib.make(vit, jax.device_get(params), (0.5,), (0.5,)), {}, {})


def _publish(
    run: Run, names: list[str], cluster_of: np.ndarray, sample_ids: list[str], labels: np.ndarray, features
) -> None:
    """A clustering of the sample, a slice of every cluster, and the manifest that names them."""
    clusters = int(cluster_of.max()) + 1
    by_cluster = [[] for _ in range(clusters)]
    for name, k in zip(sample_ids, labels):
        by_cluster[k].append(name)
    keys = [digest(members) for members in by_cluster]
    order = np.argsort(keys)
    rank = np.argsort(order).astype(np.int32)  # place of cluster k among the sorted keys
    prototypes = np.stack([features[labels == k].mean(axis=0, dtype=np.float64) for k in order]).astype(np.float32)
    name = sampled(run)[1]
    save_clustering(run.layout, Clustering(name, tuple(sample_ids), rank[labels], tuple(sorted(keys)), prototypes))
    slices = {key: digest(["slice", key]) for key in keys}
    arrays = _write_slices(run, list(slices.values()))
    rows = np.argsort(cluster_of[: len(names)], kind="stable")
    ends = np.cumsum(np.bincount(cluster_of[: len(names)], minlength=clusters))
    with run.catalog.transaction():
        for key, members in zip(keys, np.split(rows, ends[:-1])):
            row = SliceRow(
                slices[key],
                key,
                arrays_digest(arrays),
                len(members),
                len(members),
                1,
                0.5,
                0.01,
                "synthetic",
                time.time(),
            )
            run.catalog.add_slice(row, members)
        constants = constants_digest(run.recipe_constants)
        run.catalog.publish(
            name, run.fingerprint, constants, slices, ((row, keys[k]) for row, k in enumerate(cluster_of))
        )


def _write_slices(run: Run, names: list[str]) -> dict[str, np.ndarray]:
    """One checkpoint, linked under every name."""
    slice_: Slice = init_slice(jax.random.key(0), run.config.tuning, run.backbone.config, CLASSES)
    arrays = checkpoints.flatten(slice_)
    first = run.layout.slice(names[0])
    checkpoints.save(first, arrays, {}, step=1)
    for name in names[1:]:
        shutil.copytree(first, run.layout.slice(name), copy_function=os.link)
    return arrays


def unsampled(run: Run, count: int, seed: int = 1) -> list[str]:
    """Live records that are not sampled, drawn uniformly."""
    others = sorted(set(run.catalog.live("train").ids) - set(sampled(run)[0].ids))
    return [others[i] for i in np.random.default_rng(seed).choice(len(others), count, replace=False)]
