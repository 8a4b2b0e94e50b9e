"""What is checked after a kill or a failure: the published state, what a finished command left, and what it said."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from crash_scenarios import Scenario, search

from lmeraser_jax.hashing import digest
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning import audit, purge
from lmeraser_jax.unlearning.run import open_run

SERVED = ("clustering", "sample", "prototypes", "slices", "parameters")
ALLOWED = {"config.json", "catalog.db", "catalog.db-wal", "catalog.db-shm", "backbone", "records", "clusterings"}
ALLOWED |= {"slices", "receipts", "metrics.jsonl", "lock", "scratch"}


def plain(value: Any) -> Any:
    """A state as JSON: bytes by their digest."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else json.loads(json.dumps(value))


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


def mixed(found: dict | None, old: dict | None, new: dict) -> tuple[str, list[str]]:
    """Which of two states a killed command left, and everything that is of neither."""
    if found is None:
        return "old", [] if old is None else ["nothing is published any more"]
    sides = {"new": new} | ({} if old is None else {"old": old})
    side = next((name for name, one in sides.items() if all(one[part] == found[part] for part in SERVED)), "mixed")
    if side == "mixed":
        return side, ["the published state is neither the old nor the new one"]
    records = [one["records"] for one in sides.values()]
    wrong = {name for name, one in found["records"].items() if one not in [known.get(name) for known in records]}
    homes = sides[side]["assignment"]
    wrong |= {name for name, key in found["assignment"].items() if key != homes.get(name, "")}
    return side, [f"record {name} is of neither state" for name in sorted(wrong)]


def finished(folder: Path) -> bool:
    """Whether every request counts as purged."""
    with contextlib.closing(Catalog(folder / "catalog.db")) as catalog:
        return not requests.any_open(catalog)


def unfinished(folder: Path, scenario: Scenario, wanted: dict[str, bytes]) -> tuple[list[str], int]:
    """What a finished command should not have left, and how many bytes were searched."""
    with open_run(folder) as run:
        lines = purge.leftovers(run)
        lines += [f"open request {one.id}" for one in requests.listed(run.catalog, only_open=True)]
        lines += [f"erased, not purged: {name}" for name in run.catalog.erased()]
        lines += [f"quarantined: {key}" for key in run.catalog.quarantined()]
        links = run.catalog.receipts()
        made = {one.id for one in requests.listed(run.catalog)}
    files = {path.stem: json.loads(path.read_text()) for path in (folder / "receipts").glob("*")}
    if not len(links) == scenario.receipts == len(files) or not made == set(files) == {one.request for one in links}:
        lines.append(f"receipts {sorted(files)}, chain {links}, requests {sorted(made)}, not {scenario.receipts}")
    previous = ""
    for number, link in enumerate(links, 1):
        body = dict(files.get(link.request, {}))
        own = body.pop("digest", None)
        if (number, previous, digest(body), own) != (link.sequence, body.get("previous"), link.digest, link.digest):
            lines.append(f"receipt {link.request} is not chained")
        previous = link.digest
    found, size = search(folder, wanted)
    lines += [f"{name} is still in {place}" for name, place in found.items()]
    lines += [f"temporary: {path}" for path in folder.rglob(".*")]
    lines += [f"temporary: {name}" for name in {path.name for path in folder.iterdir()} - ALLOWED]
    lines += [f"temporary: {path}" for path in folder.glob("scratch/*")]
    return lines, size


def misreported(answer: dict[str, Any], log: Path) -> list[str]:
    """What is wrong with how a failing command ended: exit code 2 and one line about it, or done after all."""
    lines = log.read_text().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    ended = (answer.get("code"), len(said), said == lines[-1:], "Traceback" in "".join(lines))
    if ended in ((2, 1, True, False), (0, 0, lines == [], False)):
        return answer.get("problems", [])
    return [*answer.get("problems", []), f"ended with code {ended[0]} and: {lines}"]
