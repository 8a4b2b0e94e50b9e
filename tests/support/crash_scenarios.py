"""What is killed or gets no disk space: workdirs, commands on them, and the needles that may not be left afterwards.

Tuning, features and pretraining are fast stand-ins, deterministic functions of their inputs: the store is tried.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from fakes import fast_fakes
from helpers import small_config, small_source, with_items, without
from text_problem import text_config, text_folder

from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import pretrain
from lmeraser_jax.storage import atomic_files
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning import build, erase, rollback
from lmeraser_jax.unlearning.approximate import publish_approximate
from lmeraser_jax.unlearning.artifacts import is_approximate, load_clustering
from lmeraser_jax.unlearning.rectify import Change, request_rectification
from lmeraser_jax.unlearning.run import open_run, prepare_run

CONFIG = small_config()
RETUNED = small_config(tuning__head_rate=0.02)


SOURCE = small_source(train=60, test=5, public=5)
LATER = {item.id for item in SOURCE.items if item.split == "train"} - {item.id for item in small_source(45, 5, 5).items}
ITEMS = [item._replace(owner=f"owner of {item.id}") for item in SOURCE.items]  # every record has an owner of its own
SOURCE = with_items(SOURCE, ITEMS, SOURCE.read(range(len(ITEMS))).rows)


def install_fakes(patch: pytest.MonkeyPatch) -> None:
    vit = dataclasses.replace(pretrain.architecture(CONFIG, 1, 10), classes=0)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), backbone_lib.graph(vit)[1])
    backbone = backbone_lib.make(vit, params, (0.5,), (0.5,))
    patch.setattr(pretrain, "pretrain", lambda *_: (backbone, 0.5))
    fast_fakes(patch)


Needles = dict[str, bytes]  # what nobody may find any more once the records are erased
Prepared = tuple[Sequence[str], Needles]  # the ids to erase, and their needles


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A workdir and a command on it."""

    make: Callable[[Path], Prepared]
    command: Callable[[Path, Sequence[str]], object]  # is killed
    receipts: int = 0  # that are there at the end


def train(folder: Path, ids: Sequence[str] = (), source=SOURCE, config=CONFIG, **options: bool) -> Sequence[str]:
    """Returns a sampled record and one that is not."""
    with prepare_run(folder, config, source=source, **options) as (run, _):
        build.repair(run)
        build.build(run)
        sample = load_clustering(run.layout, run.catalog.manifest().clustering).sample
        return [sample[3], next(name for name in run.catalog.live("train").ids if name not in sample)]


def make_trained(folder: Path) -> Prepared:
    ids = train(folder)
    return ids, needles(folder, ids)


def make_with_waiting_requests(folder: Path) -> Prepared:
    ids, wanted = make_trained(folder)
    with open_run(folder) as run:
        erase.request_erasure(run, [ids[0]], request="r-1", defer=True)
        erase.request_erasure(run, owners=[f"owner of {ids[1]}"], request="r-2", defer=True)
    return ids, wanted


def make_before_more_records(folder: Path) -> Prepared:
    ids = train(folder, source=without(SOURCE, LATER))[:1]
    wanted = needles(folder, ids)
    with open_run(folder, write=True) as run:
        erase.request_erasure(run, ids, request="r-0")
    return ids, wanted


def make_tuned_twice(folder: Path) -> Prepared:
    train(folder)
    train(folder, config=RETUNED, retune=True)
    return (), {}


def make_half_purged(folder: Path) -> Prepared:
    ids, wanted = make_trained(folder)
    real = atomic_files.sync_folder

    def cut(path: Path) -> None:
        real(path)
        with contextlib.closing(Catalog(folder / "catalog.db")) as catalog:
            if path == folder / "clusterings" and catalog.erased():
                raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, open_run(folder, write=True) as run:
        patch.setattr(atomic_files, "sync_folder", cut)
        with contextlib.suppress(InterruptedError):
            erase.request_erasure(run, ids, request="r-1")
        assert len(run.catalog.erased()) == 2
    return ids, wanted


def make_approximated(folder: Path) -> Prepared:
    """Approximate slices answer for the clusters of the records, and the process was killed before the exact build."""
    ids, wanted = make_trained(folder)
    with open_run(folder, write=True) as run:
        erase.request_erasure(run, ids, request="r-1", defer=True)
        published = publish_approximate(run, "newton", force=True)
        names = [ref for ref in run.catalog.manifest().entries.values() if is_approximate(ref)]
        assert len(names) == len(published) > 1
    return ids, wanted | {f"slice {name}": name.encode() for name in names}


def make_texts(folder: Path) -> Prepared:
    """Of a language model. Its rows have 16 numbers, as an image of 16 pixels; the owners have other texts, too."""
    (folder.parent / "texts").mkdir()
    config = text_config(text_folder(folder.parent / "texts"), text__context=14)
    ids = train(folder, source=None, config=config)
    return ids, {name: needle for name, needle in needles(folder, ids).items() if not name.startswith("owner ")}


def unlearn(folder: Path, ids: Sequence[str]) -> None:
    with open_run(folder, write=True) as run:
        erase.request_erasure(run, ids, request="r-1", quarantine=True)


def process(folder: Path, ids: Sequence[str]) -> None:
    with open_run(folder, write=True) as run:
        erase.process(run)


def make_to_rectify(folder: Path) -> Prepared:
    """The records keep their ids and owners."""
    ids, wanted = make_trained(folder)
    return ids, {name: needle for name, needle in wanted.items() if not name.startswith(("id ", "owner ", "key "))}


def rectify(folder: Path, ids: Sequence[str]) -> None:
    pictures = np.random.default_rng(3).integers(1, 255, (len(ids), *SOURCE.shape), np.uint8)
    changes = [Change(name, image=picture) for name, picture in zip(ids, pictures, strict=True)]
    with open_run(folder, write=True) as run:
        request_rectification(run, changes, request="r-1", quarantine=True)


def roll_back(folder: Path, ids: Sequence[str]) -> None:
    with open_run(folder, write=True) as run:
        rollback.rollback(run, min(run.catalog.manifest().entries), to="1")


SCENARIOS = {
    "train": Scenario(lambda _: ((), {}), train),
    "unlearn": Scenario(make_trained, unlearn, 1),
    "unlearn texts": Scenario(make_texts, unlearn, 1),
    "newton": Scenario(make_approximated, process, 1),
    "rectify": Scenario(make_to_rectify, rectify, 1),
    "process": Scenario(make_with_waiting_requests, process, 2),
    "add": Scenario(make_before_more_records, functools.partial(train, reimport=True), 1),
    "rollback": Scenario(make_tuned_twice, roll_back),
    "purge": Scenario(make_half_purged, process, 1),
}


def needles(folder: Path, ids: Sequence[str]) -> Needles:
    wanted: Needles = {}
    with open_run(folder) as run:
        catalog, records, manifest = run.catalog, run.catalog.live("train"), run.catalog.manifest()
        clustering = load_clustering(run.layout, manifest.clustering)
        for name in ids:
            table = records.take(np.array([records.ids.index(name)]))
            row = int(table.rows[0])
            wanted[f"id {name}"], wanted[f"owner of {name}"] = name.encode(), table.owners[0].encode()
            wanted[f"content of {name}"] = bytes.fromhex(table.contents[0])
            wanted[f"pixels of {name}"] = bytes(run.images[row])
            wanted[f"feature of {name}"] = run.features(table).tobytes()
            for digest in (digest for digest in catalog.slices() if row in catalog.rows_of(digest)):
                wanted[f"slice {digest}"] = digest.encode()
                wanted[f"params of {digest}"] = catalog.slices()[digest].params_digest.encode()
                files = sorted(run.layout.slice(digest).rglob("d/*"), key=lambda path: path.stat().st_size)
                packed = files[-1].read_bytes()  # parameters lie compressed
                wanted[f"parameters of {digest}"] = packed[len(packed) // 2 :][:64]
            if name in clustering.sample:
                place = clustering.labels[clustering.sample.index(name)]
                wanted[f"id {name} in a clustering"] = name.encode("utf-32-le")
                wanted[f"key of {name}"] = clustering.keys[place].encode()
                wanted[f"prototype of {name}"] = clustering.prototypes[place].tobytes()
                wanted[f"clustering of {name}"] = clustering.digest.encode()
    missing = wanted.keys() - search(folder, wanted).keys()
    assert not missing, f"the search is blind to {missing}"
    return wanted


def search(root: Path, wanted: Needles) -> dict[str, str]:
    """{needle: file or name that holds it}."""
    places = {}
    for path in root.rglob("*"):
        content = str(path.relative_to(root)).encode() + (path.read_bytes() if path.is_file() else b"")
        places |= {name: str(path) for name, needle in wanted.items() if needle in content}
    return places
