"""What `lmeraser choose` tries by default for a budget, what that costs, and the config file that it writes. No JAX."""

import math
from collections.abc import Sequence
from pathlib import Path

from lmeraser_jax.config import Config, settings_of
from lmeraser_jax.errors import UserError
from lmeraser_jax.experiments import methods
from lmeraser_jax.experiments.methods import ADAPTIVE, LORA, METHODS, RANDOM, Method
from lmeraser_jax.experiments.summary import printable
from lmeraser_jax.storage.atomic_files import write_bytes

COMMON = {"common.method": "linear", "common.penalty": 0.03, "common.expand": 0, "common.balanced": False}
FINEST = {"clustering.cut": "0", "clustering.max_members": 0, "clustering.min_members": 0}  # a cluster a sampled record
EVERYONE = {"inference.nearest": 0, "inference.aggregate": "mean"}
SAMPLED = 2.4  # measured: of n clusters, one for each sampled record, the mean request passes at most this many again
BACKWARD = 3  # forward passes that cost as much as one forward and backward


def parse_budget(text: str) -> float:
    """A share of the data and of the images of a full tuning, from a text such as 3% or 0.03."""
    legal = "a share above 0 %, at most 100 %, such as 3% or 0.03"
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UserError(f"--budget={text}: must be {legal}" if text else f"--budget is missing: {legal}")
    return value


def _clusters(count: int) -> Method:
    """LMEraser with a cluster for each of so many sampled records, beside a common logistic head."""
    changes = {"clustering.sample_size": count, "inference.nearest": min(8, count)}
    return Method(
        f"lmeraser-{count}", f"{count} clusters, prompt + head, logistic", ADAPTIVE | FINEST | COMMON | changes
    )


def _shards(count: int) -> Method:
    """Random shards, of which the mean request passes the share 1 / count again, beside a common logistic head."""
    changes = RANDOM | COMMON | EVERYONE | {"clustering.shards": count}
    return Method(f"shards-{count}", f"{count} shards, prompt + head, logistic", changes)


def _lora_shards(count: int) -> Method:
    """The same with adapters of the backbone in place of the prompt."""
    return Method(f"lora-shards-{count}", f"{count} shards, LoRA, logistic", {**_shards(count).changes, **LORA})


SIZED = {"lmeraser": _clusters, "shards": _shards, "lora-shards": _lora_shards}


def candidates(budget: float) -> tuple[Method, ...]:
    """The methods to try for a budget, the cheapest first.

    Heads of all records in closed form; as many clusters, and as few shards, as keep the mean request within it.
    """
    closed = (METHODS[name] for name in ("logistic", "logistic-weak", "logistic-balanced", "ridge"))
    shards = math.ceil(1 / budget)
    return (*closed, _clusters(math.ceil(SAMPLED / budget)), _shards(shards), _lora_shards(shards))


def load(names: Sequence[str]) -> tuple[Method, ...]:
    """Methods as `methods.load`, and those of `SIZED` for any number, such as shards-4."""
    known = dict(METHODS)
    for name in names:
        kind, _, count = name.rpartition("-")
        if kind in SIZED and count.isdecimal() and int(count) > 0:
            known[name] = SIZED[kind](int(count))
    return methods.load(names, known, "candidates", "".join(f"{kind}-N, " for kind in SIZED))


def most_clusters(config: Config) -> int:
    """Shards, or sampled records, each of which may become a cluster."""
    clustering = config.clustering
    return clustering.sample_size if clustering.partition == "adaptive" else clustering.parts


def expected_passes(config: Config, records: int, held_out: int, requests: int) -> float:
    """Roughly, in images that pass forward: the work of tuning, of some requests and of answers to the hold-out."""
    tuning, clusters = config.tuning, most_clusters(config)
    if tuning.closed or tuning.method == "head" and config.data.augment == "none":
        return 0.0
    tuned = max(tuning.epochs * records, clusters * tuning.min_steps * tuning.batch)
    again = min(1.0, 2 * requests / clusters)  # of sampled and of other records
    answering = 1 + min(config.inference.nearest or clusters, clusters)
    return BACKWARD * tuned * (1 + again) + held_out * answering


def write_config(path: Path, config: Config, comments: Sequence[str]) -> None:
    """Writes all settings as an experiment file, with comments above; completely or not at all."""
    header = f'"""Chosen by lmeraser choose.\n\n  lmeraser train --config={path.name} --workdir=DIR\n"""\n'
    lines = [
        *(f"# {printable(comment)}" for comment in comments),
        "from lmeraser_jax.config import default_config\n\n",
        "def get_config():\n    config = default_config()",
        *(f"    config.{name} = {value!r}" for name, value, _ in settings_of(config)),
        "    return config\n",
    ]
    write_bytes(path, "\n".join([header, *lines]).encode())
