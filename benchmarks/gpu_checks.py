"""The parts of the GPU suite that work on whole workdirs, or on bits: exactness, determinism, a request, adaptation.

Each is a generator that yields figures as they come, {name: value}.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from gpu_settings import Settings
from reporting import timed

from lmeraser_jax import config
from lmeraser_jax.data.source import Contents, Item, Source
from lmeraser_jax.hashing import arrays_digest
from lmeraser_jax.models import pretrain
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training.train_step import mesh_of
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.audit import audit, differences, state
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import prepare_run

Figures = Iterator[dict[str, Any]]
CLASSES = 10
METHODS = {
    "prompt+head": {"prompt_width": 1},
    "lora": {"method": "lora", "rank": 2, "prompt_width": 1},
    "head": {"method": "head"},
    "ridge": {"method": "ridge"},
}
PINS = {  # flags of XLA that may be needed for equal bits; the first that suffices is the one to set
    "nothing": "",
    "autotuning off": "--xla_gpu_autotune_level=0",
    "deterministic operations": "--xla_gpu_deterministic_ops=true",
    "both": "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0",
}
VIT_B = {"patch": 16, "width": 768, "depth": 12, "heads": 12, "mlp": 3072}
TINY = {"patch": 4, "width": 16, "depth": 1, "heads": 2, "mlp": 32}


def random_source(records: int, side: int) -> Source:
    """So many private and a few public images of noise, each class of another colour, for every owner three."""
    rng = np.random.default_rng(0)
    splits = ["train"] * records + ["test"] * 2 * CLASSES + ["public"] * 2 * CLASSES
    items = [Item(f"image-{i:05d}", split, i % CLASSES, f"owner-{i // 3}") for i, split in enumerate(splits)]
    colours = rng.integers(60, 196, (CLASSES, 1, 1, 3))
    images = colours[[item.label for item in items]] + rng.integers(-60, 60, (len(items), side, side, 3))
    names = tuple(f"class-{k}" for k in range(CLASSES))
    return Source(
        "noise", names, (side, side, 3), items, lambda positions: Contents(images[list(positions)].astype(np.uint8))
    )


def without(source: Source, ids: set[str]) -> Source:
    """The source as if the records had never been there."""
    rest = [i for i, item in enumerate(source.items) if item.id not in ids]
    read = source.read
    return Source(
        source.name,
        source.class_names,
        source.shape,
        [source.items[i] for i in rest],
        lambda positions: read([rest[i] for i in positions]),
    )


def exactness(settings: Settings) -> Figures:
    """Erasing and never having had: every stored number compared, and an audit. Raises where anything differs."""
    for method in ["prompt+head", "ridge"] if settings.quick else METHODS:
        source = random_source(60, 8)
        tree = {
            "data": {"image_size": 8},
            "backbone": TINY,
            "pretraining": {"epochs": 0},
            "clustering": {"sample_size": 20, "cut": "auto:4", "max_members": 10, "min_members": 3},
            "tuning": {"batch": 4, "lanes": 2, "epochs": 2, "min_steps": 5} | METHODS[method],
        }
        with tempfile.TemporaryDirectory() as folder:
            first, second = (Path(folder) / name for name in ("erased", "never"))
            with prepare_run(first, config.from_dict(tree), jax.devices()[:1], source) as (run, _):
                build(run)
                erased = {run.catalog.live("train").ids[i] for i in (0, 7)}
                erase.request_erasure(run, erased)
                verdict, published = audit(run), state(run)
            with prepare_run(second, config.from_dict(tree), jax.devices()[:1], without(source, erased)) as (run, _):
                build(run)
                lines = [*verdict.differences, *differences(published, state(run))]
        assert not lines, f"{method}: {lines}"
        yield {method: f"{verdict.identical} of {verdict.checked} slices bit-identical"}


def determinism(settings: Settings) -> Figures:
    """Two processes that compile for themselves, at the same time: which flags give both the same bits."""
    for name, flags in PINS.items():
        variables = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        call = [sys.executable, __file__, *["--quick"] * settings.quick]
        running = [subprocess.Popen(call, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        answers = [process.communicate()[0] for process in running]
        assert not any(process.returncode for process in running), f"a process failed with {flags or 'no flags'}"
        equal = answers[0] == answers[1]
        yield {f"same bits with {name} pinned": equal}
        if equal:
            yield {"needed XLA_FLAGS": flags or "none"}
            return


def digest_of_slices(quick: bool) -> str:
    """Of the losses and slices of some steps on two blocks of a ViT-B/16."""
    from gpu_parts import vit_program

    final, losses = vit_program(Settings(quick), lanes=2, batch=2 if quick else 32, blocks=2)()
    return arrays_digest({"losses": losses, **flatten(final.slice)})


def request(settings: Settings) -> Figures:
    """The paper's request: 258 images for 50 epochs, ViT-B/16 at 224 px, warm; then predictions of the same workdir."""
    import bench_predict

    records, epochs, side = (11, 2, 8) if settings.quick else (259, 50, 32)
    tree = {
        "data": {"image_size": 16 if settings.quick else 224},
        "backbone": ({"weights": settings.vit} if settings.vit else TINY if settings.quick else VIT_B),
        "pretraining": {"epochs": 0},
        "clustering": {"partition": "one"},
        "tuning": {
            **{"batch": 4 if settings.quick else 64, "lanes": 1, "epochs": epochs, "min_steps": 1},
            **{"prompt_width": 2 if settings.quick else 30},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        source = random_source(records + 1, side)
        with prepare_run(folder, config.from_dict(tree), jax.devices()[:1], source) as (run, _):
            build(run)
            ids = run.catalog.live("train").ids
            erase.request_erasure(run, ids[:1])  # everything is compiled and read after it
            seconds = timed(erase.request_erasure, run, ids[1:2])
            yield {"images": records - 1, "epochs": epochs, "request_s": seconds}
            if not settings.quick:
                yield {"faster_than_the_paper": 27.61 / seconds}  # on eight V100 (its Table 3)
            latency = {f"batch_{n}": bench_predict.measured(run, n, 3 if settings.quick else 50) for n in (1, 16, 128)}
            yield {"predictions": latency}


def adaptation(settings: Settings) -> Figures:
    """Images per second of public training of a whole ViT-B/16."""
    count, batch = (8, 4) if settings.quick else (512, 64)
    tree = {
        "data": {"image_size": 16 if settings.quick else 224},
        "backbone": TINY if settings.quick else VIT_B,
        "pretraining": {"epochs": 5, "batch": batch},
    }
    chosen, rng = config.from_dict(tree), np.random.default_rng(0)
    side = chosen.data.image_size
    images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    public = pretrain.PublicSet(images, rng.integers(0, CLASSES, count).astype(np.int32), CLASSES)
    begins: list[float] = []  # of the epochs: each is one call of the program, and ends before the next one begins
    orders = pretrain._epoch_rows

    def timed_orders(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        begins.append(time.perf_counter())
        return orders(*arguments)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(pretrain, "_epoch_rows", timed_orders):
        pretrain.pretrain(Path(folder) / "steps", public, chosen, mesh_of(jax.devices()[:1]))
    yield {"images_per_s": count / float(np.median(np.diff(begins)[1:]))}  # the first epoch compiles


if __name__ == "__main__":
    print(digest_of_slices("--quick" in sys.argv))
