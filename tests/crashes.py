"""Real processes that are killed or get no disk space, and what is checked afterwards.

`Pool` runs this file as fork servers. A server imports everything once but starts no JAX backend; every task is
done by two forked children: the first runs a command on a copy of a workdir and is killed with SIGKILL, or its disk
fails; the second opens what is left, checks it, runs the command again and checks the end. Tuning, features and
pretraining are fast fakes, deterministic functions of their inputs: what is tried here is the store.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import queue
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers import small_config, small_source, with_items, without

from lmeraser_jax import audit, planning, purge, receipts, rollback, shares, unlearning
from lmeraser_jax import reconcile as build
from lmeraser_jax import run as runs
from lmeraser_jax.artifacts import load_clustering
from lmeraser_jax.backbones import backbone as frozen
from lmeraser_jax.backbones import pretrain
from lmeraser_jax.cli import main
from lmeraser_jax.cli import rollback as command
from lmeraser_jax.digests import digest
from lmeraser_jax.records.cache import RowFile
from lmeraser_jax.run import Run, opened, prepared
from lmeraser_jax.slices import Slice
from lmeraser_jax.store import checkpoints, layout, requests
from lmeraser_jax.store.catalog import Catalog
from lmeraser_jax.tracking import Tuned

SERVED = ("clustering", "sample", "prototypes", "slices", "parameters")
ALLOWED = {"config.json", "catalog.db", "catalog.db-wal", "catalog.db-shm", "backbone", "records", "clusterings"}
ALLOWED |= {"slices", "receipts", "metrics.jsonl", "lock", "scratch"}
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


def fake_tune(problem, backbone, jobs, images, labels, mesh):
    """Slices from the jobs' inputs alone, handed over as `tuning.tune` does."""
    size = backbone.config.image_size
    shapes = ((4 * (size - 1),), (backbone.config.feature_size, problem.classes), (problem.classes,))
    for job in jobs:
        members = [(images[row].tobytes(), int(labels[row])) for row in job.rows]
        seed = hashlib.sha256(repr((job.key, members, problem.tuning, problem.seed)).encode()).digest()
        rng = np.random.default_rng(list(seed))
        part = Slice(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
        for step in (*job.snapshots, job.steps):
            yield Tuned(job, step, part, 0.5, None, 0.01)


class FakeExtractor:
    """Sixteen pixel means of an image."""

    def __init__(self, *_):
        pass

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), 16, -1).mean(axis=2).astype(np.float32)


def fake_assign(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    return ((features[:, None] - prototypes[None]) ** 2).sum(axis=2).argmin(axis=1).astype(np.int32)


def install_fakes() -> None:
    vit = dataclasses.replace(pretrain.architecture(CONFIG, 1, 10), classes=0)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), frozen.graph(vit)[1])
    made = frozen.make(vit, params, (0.5,), (0.5,))
    pretrain.pretrain = lambda *_: (made, 0.5)
    shares.tune = audit.tune = fake_tune
    runs.Extractor = FakeExtractor
    planning.clusters.assign = fake_assign


# ---- scenarios: a workdir, and a command that is killed and repeated


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`make` makes the workdir and returns needles; `command` is killed; there are so many receipts at the end."""

    make: Callable[[Path], dict[str, bytes]]
    command: Callable[[Path], Any]
    receipts: int = 0


def train(folder: Path, source=SOURCE, config=CONFIG, **how: bool) -> None:
    with prepared(folder, config, source=source, **how) as (run, _):
        build.repair(run)
        build.reconcile(run)


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
            found[f"slice {digest_}"], found[f"params of {digest_}"] = digest_.encode(), made.params.encode()
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
    with opened(folder, write=True) as run:
        return needles(run, chosen(run))


def two_waiting(folder: Path) -> dict[str, bytes]:
    found = trained(folder)
    with opened(folder) as run:
        one, other = chosen(run)
        unlearning.request_erasure(run, [one], request="r-1", defer=True)
        unlearning.request_erasure(run, owners=[f"owner of {other}"], request="r-2", defer=True)
    return found


def before_more(folder: Path) -> dict[str, bytes]:
    train(folder, without(SOURCE, LATER))
    with opened(folder, write=True) as run:
        ids = chosen(run)[:1]
        found = needles(run, ids)
        unlearning.request_erasure(run, ids, request="r-0")
        return found


def tuned_twice(folder: Path) -> dict[str, bytes]:
    train(folder)
    train(folder, config=RETUNED, retune=True)
    return {}


def half_purged(folder: Path) -> dict[str, bytes]:
    found = trained(folder)
    real, calls = layout.sync_folder, []

    def cut(path: Path) -> None:
        real(path)
        calls.append(path)
        if path.name == "clusterings" and path.parent == folder and Catalog(folder / "catalog.db").erased():
            raise InterruptedError

    with opened(folder, write=True) as run, contextlib.suppress(InterruptedError):
        ids = chosen(run)
        layout.sync_folder = cut
        unlearning.request_erasure(run, ids, request="r-1")
    layout.sync_folder = real
    with opened(folder) as run:
        (request,) = requests.listed(run.catalog, only_open=True)
        assert request.state == "published" and len(run.catalog.erased()) == 2
    return found


def unlearn(folder: Path) -> None:
    with opened(folder, write=True) as run:
        earlier = requests.get(run.catalog, "r-1")
        ids = chosen(run) if earlier is None else json.loads((folder.parent / "ids.json").read_text())
        (folder.parent / "ids.json").write_text(json.dumps(ids))
        unlearning.request_erasure(run, ids, request="r-1", quarantine=True)


def process(folder: Path) -> None:
    with opened(folder, write=True) as run:
        unlearning.process(run)


def add(folder: Path) -> None:
    train(folder, reimport=True)


def roll_back(folder: Path) -> None:
    with opened(folder, write=True) as run:
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


# ---- labelled points


class Points:
    """Counts the labelled points that a process passes; at the `die_at`-th it is killed, or a write fails.

    Args:
        die_at: which; None: none.
        error: name of the error that the operating system reports; "" to be killed.
        lasting: every later point fails too.
    """

    def __init__(self, die_at: int | None = None, error: str = "", lasting: bool = False):
        self.die_at, self.error, self.lasting, self.labels = die_at, error, lasting, []

    def __call__(self, label: str, partly: Callable[[], Any] | None = None) -> None:
        """`partly` does a part of what comes next, so that it ends in its middle."""
        self.labels.append(label)
        passed = len(self.labels) - 1
        if self.die_at is None or passed < self.die_at or passed > self.die_at and not self.lasting:
            return
        if partly is not None and passed == self.die_at:
            partly()
        if not self.error:
            os.kill(os.getpid(), signal.SIGKILL)
        if label.split()[-1] in ("begin", "commit", "Catalog.flush"):
            full = self.error == "ENOSPC"
            raise sqlite3.OperationalError("database or disk is full" if full else "disk I/O error")
        number = getattr(errno, self.error)
        raise OSError(number, os.strerror(number))

    def around(self, function, half=None, only_from: tuple[str, ...] = (), idle: Callable[..., bool] | None = None):
        """Points around the calls of a function, but for those from elsewhere and for idle ones."""
        name = function.__qualname__

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if only_from and not caller.startswith(only_from) or idle is not None and idle(*args):
                return function(*args, **kwargs)
            self(f"before {name}")
            if half is not None:
                self(f"halfway {name}", lambda: half(*args, **kwargs))
            result = function(*args, **kwargs)
            self(f"after {name}")
            return result

        return wrapper

    def install(self) -> None:
        """Wraps everything that writes, renames, removes or commits, in every module that uses it."""
        overwrite, rmtree = RowFile.overwrite, shutil.rmtree

        def half_append(file, rows):
            file.path.parent.mkdir(exist_ok=True)
            with open(file.path, "ab") as raw:
                raw.write(rows.tobytes()[: rows.nbytes // 2 + 1])

        def half_removed(path, *_, **__):
            for file in [one for one in Path(path).rglob("*") if one.is_file()][::2]:
                os.remove(file)

        def half_written(path, data):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])

        wrapped = [(checkpoints.save, None), (layout.publish_folder, None), (layout.write_bytes, half_written)]
        wrapped += [(layout.write_json, None), (layout.remove_others, None)]
        modules = [module for name, module in sys.modules.items() if name.startswith("lmeraser_jax")]
        for function, half in wrapped:
            wrapper = self.around(function, half)
            for module in modules:
                for name in [name for name, value in vars(module).items() if value is function]:
                    setattr(module, name, wrapper)
        RowFile.append = self.around(RowFile.append, half_append)
        RowFile.overwrite = self.around(overwrite, lambda file, rows: overwrite(file, rows[: (len(rows) + 1) // 2]))
        RowFile.truncate, RowFile.sync = self.around(RowFile.truncate), self.around(RowFile.sync)
        Catalog.flush, Catalog.transaction = self.around(Catalog.flush), self._transaction(Catalog.transaction)
        ours = ("lmeraser_jax", "pathlib")
        os.replace, os.unlink = self.around(os.replace, None, ours), self.around(os.unlink, None, ours)
        shutil.rmtree = self.around(rmtree, half_removed, ours[:1], lambda path, *_: not Path(path).exists())

        self._trace_statements()

    def _trace_statements(self) -> None:
        """Also a point before every statement that begins, ends or is a transaction, whoever executes it."""
        real = Catalog.__init__

        def traced(catalog, path):
            real(catalog, path)

            def before(statement: str) -> None:
                verb = statement.split()[0].upper()
                alone = verb in ("INSERT", "UPDATE", "DELETE") and not catalog.db.in_transaction
                named = self.labels and self.labels[-1] in ("before begin", "before commit")
                if (verb in ("BEGIN", "COMMIT") or alone) and not named:
                    self(f"statement {verb}")

            catalog.db.set_trace_callback(before)

        Catalog.__init__ = traced

    def _transaction(self, real):
        @contextlib.contextmanager
        def transaction(catalog):
            if catalog.db.in_transaction:
                with real(catalog):
                    yield
                return
            self("before begin")
            with real(catalog):
                self("after begin")
                yield
                self("before commit")
            self("after commit")

        return transaction


# ---- what is checked


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
    with opened(folder) as run:
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
    with opened(folder) as run:
        lines = purge.leftovers(run)
        lines += [f"open request {one.id}" for one in requests.listed(run.catalog, only_open=True)]
        lines += [f"erased, not purged: {name}" for name in run.catalog.erased()]
        lines += [f"quarantined: {key}" for key in run.catalog.quarantined()]
        links = receipts.chain(run.catalog)
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


# ---- the server


def prepare(root: Path, name: str) -> dict[str, Any]:
    """Makes a scenario's workdir, and runs its command undisturbed: {labels, seconds, old, new, needles}."""
    scenario, template = SCENARIOS[name], root / name / "template"
    template.parent.mkdir()
    wanted = scenario.make(template)
    old, points = published(template), Points()
    end = root / name / "end"
    if template.exists():
        shutil.copytree(template, end)
    points.install()
    start = time.perf_counter()
    scenario.command(end)
    seconds = time.perf_counter() - start
    lines, _ = unfinished(end, scenario, wanted)
    assert not lines, lines
    facts = {"labels": list(points.labels), "seconds": seconds, "old": old, "new": published(end)}
    facts["needles"] = {needle: value.hex() for needle, value in wanted.items()}
    (root / name / "facts.json").write_text(json.dumps(facts))
    return {"labels": facts["labels"], "seconds": seconds}


def attack(task: dict[str, Any], folder: Path, ready: Callable[[], None]) -> dict[str, Any]:
    """The first child: runs the command, to be killed or to fail."""
    jax.devices()
    if "point" in task:
        Points(task["point"], task.get("error", ""), task.get("lasting", False)).install()
    if "pages" in task:
        allow_pages(task["pages"])
    ready()
    return {"code": through_main(SCENARIOS[task["scenario"]].command, folder)}


def through_main(work: Callable[[Path], Any], folder: Path) -> int:
    """The exit code of a command that does this work."""
    command.run = lambda _: work(folder) or 0
    return main.main(["rollback", f"--workdir={folder}"])


def allow_pages(more: int) -> None:
    """The catalog gets no more than so many new pages."""
    real = Catalog.__init__

    def limited(catalog, path):
        real(catalog, path)
        pages = catalog.db.execute("PRAGMA page_count").fetchone()[0]
        catalog.db.execute(f"PRAGMA max_page_count={pages + more}")

    Catalog.__init__ = limited


def mount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], check=True)


def limit(folder: Path, room: int) -> None:
    """Leaves so many bytes of room on the file system mounted at a folder."""
    use = os.statvfs(folder)
    size = (use.f_blocks - use.f_bavail) * use.f_frsize + room
    mount(folder, f"remount,size={max(size, use.f_frsize)}")  # 0 would be no limit


def misreported(answer: dict[str, Any], log: Path) -> list[str]:
    """What is wrong with how a failing command ended: exit code 2 and one line about it, or done after all."""
    lines = log.read_text().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    ended = (answer.get("code"), len(said), said == lines[-1:], "Traceback" in "".join(lines))
    if ended in ((2, 1, True, False), (0, 0, lines == [], False)):
        return answer.get("problems", [])
    return [*answer.get("problems", []), f"ended with code {ended[0]} and: {lines}"]


def inspect(root: Path, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The second child: what is left, the same command again, the end."""
    name = task["scenario"]
    facts = json.loads((root / name / "facts.json").read_text())
    wanted = {needle: bytes.fromhex(value) for needle, value in facts["needles"].items()}
    there = search(folder, wanted)[0]  # before anybody opens the catalog, which would tidy its log
    side, lines = mixed(published(folder), facts["old"], facts["new"])
    if side == "new" and there and finished(folder):
        lines.append(f"said to be purged, but still there: {there}")
    SCENARIOS[name].command(folder)
    if published(folder) != facts["new"]:
        lines.append("the same command again gives another state")
    more, size = unfinished(folder, SCENARIOS[name], wanted)
    return {"state": side, "problems": lines + more, "searched": size}


def in_child(work: Callable[[Callable[[], None]], dict[str, Any]], log: Path, delay: float | None = None):
    """(exit status, result) of work in a forked child; killed so many seconds after it says that it is ready."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        with open(log, "wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            result = work(lambda: None if os.write(send, b"\n") else None)
        except BaseException:
            result = {"problems": [traceback.format_exc()]}
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as file:
        if delay is not None and file.read(1):
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        text = file.read()
    return os.waitpid(child, 0)[1], json.loads(text) if text.strip() else {}


def serve(root: Path) -> None:
    """Answers a task a line, as JSON."""
    install_fakes()
    log = root / f"log-{os.getpid()}"
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "prepare":
            _, answer = in_child(lambda _, name=task["scenario"]: prepare(root, name), log)
        else:
            answer = tried(root, task, log)
        print(json.dumps(answer | task), flush=True)


def tried(root: Path, task: dict[str, Any], log: Path) -> dict[str, Any]:
    """One task: the attack, then the inspection, on a copy of the scenario's workdir."""
    home = Path(tempfile.mkdtemp(dir=root))
    folder, template = home / "run", root / task["scenario"] / "template"
    if "room" in task:
        mount(home, "size=64m")
    if template.exists():
        shutil.copytree(template, folder)
    if "room" in task:
        limit(home, task["room"])
    status, answer = in_child(functools.partial(attack, task, folder), log, task.get("delay"))
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    failing = task["do"] == "fault"
    wrong = misreported(answer, log) if failing else answer.get("problems", [])
    if "room" in task:
        limit(home, 64 << 20)
    _, found = in_child(lambda _: inspect(root, task, folder), log)
    if "room" in task:
        subprocess.run(["umount", str(home)], check=True)
    problems = wrong + found.pop("problems", ["the inspection died"])
    if not problems:
        shutil.rmtree(home)
    return found | {"hit": answer.get("code") == 2 if failing else killed, "problems": problems}


class Pool:
    """Two fork servers that share the tasks.

    Args:
        root: folder for everything.
        mounting: they have mounts of their own, which go with them.
    """

    def __init__(self, root: Path, mounting: bool = False):
        command = ["unshare", "--mount"] if mounting else []
        command += [sys.executable, "-W", "ignore", __file__, str(root)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.servers = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]

    def close(self) -> None:
        for server in self.servers:
            server.stdin.close()
            server.wait(60)
            server.stdout.close()

    def prepare(self, *names: str) -> dict[str, dict[str, Any]]:
        """Makes scenarios ready: {name: {labels, seconds}}, what their commands pass undisturbed."""
        answers = self.map([{"do": "prepare", "scenario": name} for name in names])
        assert not [answer for answer in answers if "problems" in answer], answers
        return {answer["scenario"]: answer for answer in answers}

    def map(self, tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to tasks, in the order in which they came in."""
        waiting, answers = queue.SimpleQueue(), []
        for task in tasks:
            waiting.put({"do": "kill", **task})

        def work(server) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    print(json.dumps(waiting.get_nowait()), file=server.stdin, flush=True)
                    answers.append(json.loads(server.stdout.readline()))

        threads = [threading.Thread(target=work, args=(server,)) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == len(tasks), "a server died"
        return answers


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
