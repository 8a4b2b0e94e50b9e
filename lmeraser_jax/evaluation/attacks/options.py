"""What an attack is asked for, and why a workdir does not allow it: checked before JAX is loaded."""

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from lmeraser_jax.data.names import list_lookalikes, list_names
from lmeraser_jax.data.record_table import RecordTable
from lmeraser_jax.errors import join_limited, raise_all
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning.artifacts import load_clustering

ATTACKS = ("loss", "lira", "ulira", "klom", "relearn", "routing")
UNKNOWN = "no live training record"
FEWEST_MEMBERS = 4  # that a cluster keeps


@dataclasses.dataclass(frozen=True)
class Options:
    """What to attack and how: see `lmeraser attack --help`."""

    targets: int = 64
    shadows: int = 64
    attacks: tuple[str, ...] = ATTACKS
    records: tuple[str, ...] = ()
    seed: int = 0

    @property
    def on_slices(self) -> bool:
        return set(self.attacks) != {"routing"}

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        problems = []
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            problems.append(f"--attacks={join_limited(unknown)}: no such attack; legal: {', '.join(ATTACKS)}")
        if self.shadows < 4:
            problems.append(f"--shadows={self.shadows}: must be at least 4, two with and two without each record")
        if self.records and len(set(self.records)) < 2:
            problems.append(f"--records={list_names(self.records)}: must be at least 2 different ids")
        if not self.records and self.targets < 2:
            problems.append(f"--targets={self.targets}: must be at least 2")
        return problems


def check(layout: Layout, catalog: Catalog, options: Options) -> None:
    """Raises `UserError` with everything that is wrong with the options, or that a workdir does not allow."""
    raise_all(options.problems() + _workdir_problems(layout, catalog, options))


def _workdir_problems(layout: Layout, catalog: Catalog, options: Options) -> list[str]:
    root, manifest, ids = layout.root, catalog.manifest(), options.records
    if manifest is None or not manifest.clusters:
        return [f"--workdir={root} has no published state to attack; run: lmeraser train {layout.flag}"]
    if requests.any_open(catalog):
        return [f"an erasure is not finished; finish it with: lmeraser process {layout.flag}"]
    if not options.on_slices:
        return []
    problems = []
    if not len(unseen_images(catalog)):
        hint = "set --config.data.test_share when the workdir is made"
        problems.append(f"--workdir={root} has no test or hold-out records to compare with; {hint}")
    allowed, refused = eligible(layout, catalog, ids or catalog.live("train").ids)
    if ids:
        problems += [f"--records={list_names(names)}: {reason}" for reason, names in refused.items()]
        alike = list_lookalikes(refused.get(UNKNOWN, ()), catalog.live("train").ids)
        problems += [f"did you mean {alike}?"] if alike else []
    elif options.targets > len(allowed):
        problems.append(f"--targets={options.targets}: must be at most {len(allowed)}, the records that can be targets")
    return problems


def eligible(layout: Layout, catalog: Catalog, ids: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The ids that can be targets together, in their order, and the others by reason."""
    manifest, live, pinned = catalog.manifest(), catalog.live("train"), catalog.pins()
    assert manifest is not None
    sampled = set(load_clustering(layout, manifest.clustering).sample)
    clusters, contents = (dict(zip(live.ids, column, strict=True)) for column in (live.clusters, live.contents))
    copies, members = Counter(live.contents), Counter(live.clusters)
    allowed: list[str] = []
    refused: dict[str, list[str]] = {}

    def reason_against(name: str) -> str:
        if name not in clusters:
            return UNKNOWN
        if name in sampled:
            return "sampled for the clustering, so that erasing it re-clusters (the attack routing is about these)"
        if clusters[name] in pinned or clusters[name] not in manifest.entries:
            return "in a cluster that is pinned or not published"
        if copies[contents[name]] > 1:
            return "another record has the same content"
        if members[clusters[name]] <= FEWEST_MEMBERS:
            return f"its cluster would keep fewer than {FEWEST_MEMBERS} members"
        return ""

    for name in dict.fromkeys(ids):
        reason = reason_against(name)
        if reason:
            refused.setdefault(reason, []).append(name)
        else:
            members[clusters[name]] -= 1
            allowed.append(name)
    return allowed, refused


def unseen_images(catalog: Catalog) -> RecordTable:
    """Test and hold-out images that are no copy of a training image."""
    records, trained = catalog.live("test", "holdout"), set(catalog.live("train").contents)
    return records.take(np.array([i for i, content in enumerate(records.contents) if content not in trained], np.int64))
