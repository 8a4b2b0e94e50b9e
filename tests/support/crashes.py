"""Real processes that are killed or get no disk space, and what is checked afterwards.

`Pool` runs this file as fork servers. A server imports everything once but starts no JAX backend; every task is
done by two forked children: the first runs a command on a copy of a workdir and is killed with SIGKILL, or its disk
fails; the second opens what is left, checks it, runs the command again and checks the end.
"""

import contextlib
import functools
import json
import os
import queue
import shutil
import signal
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
from crash_checks import finished, misreported, mixed, published, unfinished
from crash_points import Points
from crash_scenarios import SCENARIOS, install_fakes, search

from lmeraser_jax.cli import main
from lmeraser_jax.cli import rollback as command
from lmeraser_jax.storage.catalog import Catalog


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
    main.without_echoes()
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
