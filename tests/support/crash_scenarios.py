"""What is killed or gets no disk space: workdirs, commands on them, and the needles that may not be left afterwards.

Tuning, features and pretraining are fast fakes, deterministic functions of their inputs: what is tried is the store.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fakes import fast_fakes
from helpers import small_config, small_source, with_items, without

from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import pretrain
from lmeraser_jax.storage import atomic_files, requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning import build as build
from lmeraser_jax.unlearning import erase, rollback
from lmeraser_jax.unlearning.artifacts import load_clustering
from lmeraser_jax.unlearning.run import Run, open_run, prepare_run

CONFIG = small_config()
RETUNED = small_config(tuning__head_rate=0.02)


def owned_source():
    """Sixty training records, each with an owner of its own."""
    source = small_source(train=60, test=5, public=5)
    items = [item._replace(owner=f"owner of {item.id}") for item in source.items]
    return with_items(source, items, source.read(0, len(items)).images)


SOURCE = owned_source()
LATER = {item.id for item in SOURCE.items if item.split == "train"} - {item.id for item in small_source(45, 5, 5).items}


# ---- fast fakes


def install_fakes() -> None:
    vit = dataclasses.replace(pretrain.architecture(CONFIG, 1, 10), classes=0)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), backbone_lib.graph(vit)[1])
    made = backbone_lib.make(vit, params, (0.5,), (0.5,))
    pretrain.pretrain = lambda *_: (made, 0.5)
    fast_fakes(pytest.MonkeyPatch())  # for as long as the process lives


# ---- scenarios: a workdir, and a command that is killed and repeated


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`make` makes the workdir and returns needles; `command` is killed; there are so many receipts at the end."""

    make: Callable[[Path], dict[str, bytes]]
    command: Callable[[Path], Any]
    receipts: int = 0


def train(folder: Path, source=SOURCE, config=CONFIG, **how: bool) -> None:
    with prepare_run(folder, config, source=source, **how) as (run, _):
        build.repair(run)
        build.build(run)


def chosen(run: Run) -> list[str]:
    """A sampled and an unsampled record."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    sample = load_clustering(run.layout, manifest.clustering).sample
    return [sample[3], next(name for name in run.catalog.live("train").ids if name not in sample)]


def needles(run: Run, ids: Sequence[str]) -> dict[str, bytes]:
    """What nobody may find any more once the records are erased; every one of them is there now."""
    catalog, records, manifest = run.catalog, run.catalog.live("train"), run.catalog.manifest()
    assert manifest is not None
    clustering, found = load_clustering(run.layout, manifest.clustering), {}
    for name in ids:
        table = records.take(np.array([records.ids.index(name)]))
        row = int(table.rows[0])
        found[f"id {name}"], found[f"owner of {name}"] = name.encode(), table.owners[0].encode()
        found[f"content of {name}"] = table.contents[0].encode()
        found[f"pixels of {name}"] = bytes(run.images[row])
        found[f"feature of {name}"] = run.features(table).tobytes()
        for digest_ in (one for one in catalog.slices() if row in catalog.rows_of(one)):
            made = catalog.slice(digest_)
            assert made is not None
            found[f"slice {digest_}"], found[f"params of {digest_}"] = digest_.encode(), made.params_digest.encode()
            files = sorted(run.layout.slice(digest_).rglob("d/*"), key=lambda path: path.stat().st_size)
            packed = files[-1].read_bytes()  # parameters lie compressed
            found[f"parameters of {digest_}"] = packed[len(packed) // 2 :][:64]
        if name in clustering.sample:
            place = clustering.labels[clustering.sample.index(name)]
            found[f"id {name} in a clustering"] = name.encode("utf-32-le")
            found[f"key of {name}"] = clustering.keys[place].encode()
            found[f"prototype of {name}"] = clustering.prototypes[place].tobytes()
            found[f"clustering of {name}"] = clustering.digest.encode()
    missing = [name for name in found if name not in search(run.layout.root, found)[0]]
    assert not missing, f"the search is blind to {missing}"
    return found


def search(root: Path, wanted: dict[str, bytes]) -> tuple[dict[str, str], int]:
    """{needle: file or name that holds it}, and how many bytes were looked at."""
    found, size = {}, 0
    for path in root.rglob("*"):
        content = str(path.relative_to(root)).encode() + (path.read_bytes() if path.is_file() else b"")
        size += len(content)
        found |= {name: str(path) for name, needle in wanted.items() if needle in content}
    return found, size


def trained(folder: Path) -> dict[str, bytes]:
    train(folder)
    with open_run(folder, write=True) as run:
        return needles(run, chosen(run))


def two_waiting(folder: Path) -> dict[str, bytes]:
    found = trained(folder)
    with open_run(folder) as run:
        one, other = chosen(run)
        erase.request_erasure(run, [one], request="r-1", defer=True)
        erase.request_erasure(run, owners=[f"owner of {other}"], request="r-2", defer=True)
    return found


def before_more(folder: Path) -> dict[str, bytes]:
    train(folder, without(SOURCE, LATER))
    with open_run(folder, write=True) as run:
        ids = chosen(run)[:1]
        found = needles(run, ids)
        erase.request_erasure(run, ids, request="r-0")
        return found


def tuned_twice(folder: Path) -> dict[str, bytes]:
    train(folder)
    train(folder, config=RETUNED, retune=True)
    return {}


def half_purged(folder: Path) -> dict[str, bytes]:
    found = trained(folder)
    real, calls = atomic_files.sync_folder, []

    def cut(path: Path) -> None:
        real(path)
        calls.append(path)
        if path.name == "clusterings" and path.parent == folder and Catalog(folder / "catalog.db").erased():
            raise InterruptedError

    with open_run(folder, write=True) as run, contextlib.suppress(InterruptedError):
        ids = chosen(run)
        atomic_files.sync_folder = cut
        erase.request_erasure(run, ids, request="r-1")
    atomic_files.sync_folder = real
    with open_run(folder) as run:
        (request,) = requests.listed(run.catalog, only_open=True)
        assert request.state == "published" and len(run.catalog.erased()) == 2
    return found


def unlearn(folder: Path) -> None:
    with open_run(folder, write=True) as run:
        earlier = requests.get(run.catalog, "r-1")
        ids = chosen(run) if earlier is None else json.loads((folder.parent / "ids.json").read_text())
        (folder.parent / "ids.json").write_text(json.dumps(ids))
        erase.request_erasure(run, ids, request="r-1", quarantine=True)


def process(folder: Path) -> None:
    with open_run(folder, write=True) as run:
        erase.process(run)


def add(folder: Path) -> None:
    train(folder, reimport=True)


def roll_back(folder: Path) -> None:
    with open_run(folder, write=True) as run:
        manifest = run.catalog.manifest()
        assert manifest is not None
        rollback.rollback(run, min(manifest.entries), to="1")


SCENARIOS = {
    "train": Scenario(lambda folder: {}, train),
    "unlearn": Scenario(trained, unlearn, 1),
    "process": Scenario(two_waiting, process, 2),
    "add": Scenario(before_more, add, 1),
    "rollback": Scenario(tuned_twice, roll_back),
    "purge": Scenario(half_purged, process, 1),
}
