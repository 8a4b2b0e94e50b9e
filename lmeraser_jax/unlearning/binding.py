"""Which settings of a command may differ from those that a workdir was made with.

Loads no JAX: the command line refuses a config before it does, `unlearning.run` again under the lock.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from lmeraser_jax import config as settings
from lmeraser_jax.config import NOT_IN_RECIPE, Config, Tuning
from lmeraser_jax.config.paths import same
from lmeraser_jax.errors import UserError, raise_all
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.ingest import import_settings
from lmeraser_jax.storage.workdir import Layout, read_config

FREE = ("inference", "checkpoints")  # groups that no published number depends on
LISTED = 10  # slices in a message
PATHS = ("data.path", "data.labels", "public.path", "backbone.weights")
MOVABLE = ("data.path", "data.labels", "backbone.weights")  # `run.prepare_run` compares what lies there
Settings = Mapping[str, Any]
UNBOUND = {"data": ("skip_unreadable", "max_pixels"), "tuning": NOT_IN_RECIPE}  # they change neither records nor slices


def stored_config(layout: Layout) -> Config | None:
    """The config a workdir was made with, or None."""
    tree = read_config(layout)
    return settings.from_dict(tree) if tree is not None else None


def finished_config(layout: Layout, config: Config | None) -> Config:
    """The stored config of a finished workdir.

    Raises:
        UserError: no workdir, not finished yet, or `config` differs from the stored one in more than `FREE`.
    """
    layout.require()
    stored = stored_config(layout)
    if stored is None or not layout.backbone.exists():
        raise UserError(f"{layout.root} is not complete yet; finish it with: lmeraser train {layout.flag}")
    if config is not None:
        _check_state(layout, stored, config, FREE)
    return stored


def check_training(layout: Layout, catalog: Catalog, config: Config, retune: bool = False) -> None:
    """Refuses a config that contradicts the images or the published state of a workdir: see `run.prepare_run`."""
    stored = stored_config(layout)
    if stored is not None and catalog.manifest() is not None:
        may_tune = retune or requests.any_open(catalog)
        _check_state(layout, stored, config, (*FREE, "tuning", "common") if may_tune else FREE, MOVABLE)
    refuse_misfits(catalog, config.tuning, catalog.pins().values())
    dataset = catalog.get("dataset")
    if dataset is not None:
        _check_unchanged(layout, "import", dataset["settings"], import_settings(config), "data.")


def check_backbone(layout: Layout, inputs: Settings, config: Config) -> None:
    """Refuses a config that contradicts the `backbone_inputs` that a workdir's backbone was made with."""
    _check_unchanged(layout, "backbone", inputs, backbone_inputs(config), movable=MOVABLE)


def check_sample(catalog: Catalog, config: Config) -> None:
    """Refuses a sample that the imported records cannot give; erasures may shrink it later."""
    clustering = config.clustering
    if clustering.partition != "adaptive" or config.samples_public_set or catalog.get("dataset") is None:
        return
    count = catalog.counts().get("train" if clustering.sample_from == "private" else "public", 0)
    first = catalog.manifest() is None and not requests.any_open(catalog)
    if first and clustering.sample_size > count:
        legal = f"at most the number of {clustering.sample_from} records, {count}"
        raise UserError(f"--config.clustering.sample_size={clustering.sample_size}: must be {legal}")


def backbone_inputs(config: Config) -> dict[str, Any]:
    """The settings that a backbone depends on."""
    inputs = {"backbone": dataclasses.asdict(config.backbone), "data": {"image_size": config.data.image_size}}
    if not config.backbone.weights or config.pretraining.start == "weights":
        inputs |= {"pretraining": dataclasses.asdict(config.pretraining), "seed": config.seed}
        inputs["public"] = dataclasses.asdict(config.public)
        inputs["data"]["resize_size"] = config.data.resize_size
    return inputs


def _check_state(
    layout: Layout, stored: Config, config: Config, free: tuple[str, ...], movable: tuple[str, ...] = ()
) -> None:
    old, new = settings.to_dict(stored), settings.to_dict(config)
    for tree in (old, new):
        for group, names in UNBOUND.items():
            for name in names:
                del tree[group][name]
        for group in free:
            del tree[group]
    _check_unchanged(layout, "state", old, new, movable=movable)


def _check_unchanged(
    layout: Layout, thing: str, old: Settings, new: Settings, prefix: str = "", movable: tuple[str, ...] = ()
) -> None:
    reason = "was made with another config (workdir -> flags); use a new --workdir or drop:"
    hint, lines = f"; if it has moved, lmeraser train {layout.flag} with this flag compares what lies there", []
    for line in differences(old, new, prefix):
        name = line.partition(":")[0]
        if name not in movable or "''" in line:
            lines.append(line + hint if name in MOVABLE else line)
    raise_all(lines, f"the {thing} in {layout.root} {reason}")


def differences(old: Settings, new: Settings, prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf that differs between two trees; two paths to one place do not."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif a != b and not (name.removeprefix("config.") in PATHS and same(str(a), str(b))):
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines


def refuse_misfits(catalog: Catalog, tuning: Tuning, refs: Iterable[str]) -> None:
    """Raises `UserError` unless slices have the shapes that the tuning settings give: one stack of slices answers."""
    known, problems = catalog.slices(), []
    rows = [known[name] for name in (ref.partition("@")[0] for ref in refs) if name in known]
    texts = {row.tuning for row in rows} - {""}
    changed = {text: differences(_shape(Tuning(**json.loads(text))), _shape(tuning)) for text in texts}
    for row in rows:
        problems += (f"cluster {row.cluster[:12]}, {line}" for line in changed.get(row.tuning, ()))
    remedy = "tune all clusters with lmeraser train --retune, and unpin those that lmeraser rollback has pinned"
    raise_all(problems, f"some slices are of another form than the tuning settings give; {remedy}:", LISTED)


def _shape(tuning: Tuning) -> dict[str, Any]:
    """What slices that answer together must have in common, beside the backbone and the classes: above all, shapes."""
    own = {name: getattr(tuning, name) if tuning.method == "lora" else 0 for name in ("rank", "alpha", "lora_layers")}
    own["own backbone"] = tuning.method == "backbone"
    return {"prompt_width": tuning.active_prompt_width, "expand": tuning.expand, **own}


def without_paths(config: Config) -> dict[str, Any]:
    """The config as nested dicts without places: what lies there binds, wherever that is."""
    tree = settings.to_dict(config)
    for group, _, name in (path.partition(".") for path in PATHS):
        del tree[group][name]
    return tree
