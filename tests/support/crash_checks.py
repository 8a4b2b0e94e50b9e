"""What is checked after a kill or a failure: the old or the new state is there, and the same command finishes it."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from crash_scenarios import SCENARIOS, search

from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning import audit, purge
from lmeraser_jax.unlearning.run import open_run
from lmeraser_jax.unlearning.verify import verify_all

SERVED = ("clustering", "sample", "prototypes", "slices", "parameters")
ALLOWED = {"config.json", "catalog.db", "catalog.db-wal", "catalog.db-shm", "backbone", "records", "clusterings"}
ALLOWED |= {"slices", "packed", "receipts", "metrics.jsonl", "lock", "scratch", "tokenizer"}


class Trial:
    """A scenario's workdir in an empty folder; the states before and after its command, run undisturbed once."""

    def __init__(self, name: str, home: Path):
        self.scenario, self.template, self.home = SCENARIOS[name], home / "template", home
        self.ids, self.needles = self.scenario.make(self.template)
        self.old = published(self.template)
        end = self.copy("end")
        self.run(end)
        self.new = published(end)
        assert not self.unfinished(end), self.unfinished(end)

    def copy(self, name: str) -> Path:
        """A fresh copy of the workdir; a folder that does not exist where the command makes it."""
        folder = self.home / name
        return Path(shutil.copytree(self.template, folder)) if self.template.exists() else folder

    def run(self, folder: Path) -> None:
        self.scenario.command(folder, self.ids)

    def check(self, folder: Path) -> str:
        """Asserts that the old or the new state is there and that the command finishes it. Returns which was there."""
        there = search(folder, self.needles)  # before anybody opens the catalog, which would tidy its log
        state = published(folder)
        side = self._side(state)
        if side == "new":
            with contextlib.closing(Catalog(folder / "catalog.db")) as catalog:
                assert requests.any_open(catalog) or not there, f"said to be purged, but still there: {there}"
        self.run(folder)
        assert published(folder) == self.new, "the same command again gives another state"
        assert not self.unfinished(folder)
        return side

    def _side(self, state: dict[str, Any] | None) -> str:
        if state is None:
            assert self.old is None, "nothing is published any more"
            return "old"
        sides = {"new": self.new} | ({} if self.old is None else {"old": self.old})
        matching = [side for side, known in sides.items() if all(known[part] == state[part] for part in SERVED)]
        assert matching, "the published state is neither the old nor the new one"
        for name, record in state["records"].items():
            assert record in [known["records"].get(name) for known in sides.values()], name
        there = sides[matching[0]]
        for name, cluster in state["assignment"].items():
            replaced = state["records"][name] != there["records"].get(name)  # the new version of a record, or a new one
            assert cluster == ("" if replaced else there["assignment"][name]), name
        return matching[0]

    def unfinished(self, folder: Path) -> list[str]:
        """What a finished command should not have left."""
        with open_run(folder) as run:
            lines = purge.leftovers(run)
            lines += [f"open request {request.id}" for request in requests.listed(run.catalog, only_open=True)]
            lines += [f"erased, not purged: {name}" for name in run.catalog.erased().values()]
            lines += [f"quarantined: {key}" for key in run.catalog.quarantined()]
            lines += [line for verdict in verify_all(run.layout, run.catalog) for line in verdict.findings]
            if len(run.catalog.receipts()) != self.scenario.receipts:
                lines.append(f"receipts: {run.catalog.receipts()}")
        lines += [f"{name} is still in {place}" for name, place in search(folder, self.needles).items()]
        strange = [path for path in folder.iterdir() if path.name not in ALLOWED]
        return lines + [f"temporary: {path}" for path in (*folder.rglob(".*"), *folder.glob("scratch/*"), *strange)]


def published(folder: Path) -> dict[str, Any] | None:
    """The published state of a workdir as a fresh reader finds it, or None."""
    if not (folder / "catalog.db").exists():
        return None
    with contextlib.closing(Catalog(folder / "catalog.db")) as catalog:
        assert catalog.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if catalog.manifest() is None:
            return None
    with open_run(folder) as run:
        return plain(audit.state(run))


def plain(value: Any) -> Any:
    """A state as JSON: bytes by their digest."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else json.loads(json.dumps(value))
