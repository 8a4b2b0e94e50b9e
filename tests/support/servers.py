"""Real servers of a workdir, in a thread of the test's process or in a process of their own, and real clients."""

import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from lmeraser_jax.service import worker
from lmeraser_jax.service.app import make_server
from lmeraser_jax.service.context import Service
from lmeraser_jax.service.settings import Policy, Settings
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import binding
from lmeraser_jax.unlearning.run import open_run

NEVER = Policy(max_wait=1e9)  # the worker serves nothing: a test does it, with `worker.serve_once`


class Server:
    """A server in a thread."""

    def __init__(self, root: Path, server: uvicorn.Server):
        self.root, self.app, self.port = root, server.config.app, server.servers[0].sockets[0].getsockname()[1]
        self.service: Service = self.app.state.service
        self.client = client_of(self.port)

    def settle(self) -> None:
        """Serves what waits, as the worker would."""
        assert worker.serve_once(Layout(self.root), Policy())
        self.follow()

    def follow(self) -> None:
        """Waits until the published state answers."""
        version = int(self.client.get("/v1/model").json()["manifest"])
        wait_until(lambda: self.service.metrics.manifest._value.get() == version)

    def records(self) -> dict[str, str]:
        """{id of a live private record: its cluster}."""
        with contextlib.closing(Catalog(self.root / "catalog.db")) as catalog:
            live = catalog.live("train")
            return dict(zip(live.ids, live.clusters, strict=True))


@contextlib.contextmanager
def serving(root: Path, **settings: Any) -> Iterator[Server]:
    """A server on a free port in a thread of this process, ready to answer."""
    layout = Layout(root)
    config = binding.stored_config(layout)
    assert config is not None
    server = make_server(Settings(layout, **({"config": config, "policy": NEVER} | settings)), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        running = Server(root, server)
        wait_until(lambda: running.service.answering.problem != "the model is being loaded")
        with running.client:
            yield running
    finally:
        server.should_exit = True
        thread.join()


class Process:
    """`lmeraser serve` in a process of its own."""

    def __init__(self, root: Path, flags: tuple[str, ...], log: Path, prefix: tuple[str, ...]):
        command = [
            *prefix,
            sys.executable,
            "-m",
            "lmeraser_jax.cli.main",
            "serve",
            f"--workdir={root}",
            "--port=0",
            *flags,
        ]
        # 2 devices, as the tests have, so that predictions have the same batches
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
        self.log, start = log, log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stderr=file, env=environment)
        try:
            self._wait(start)
        except BaseException:
            self.process.kill()
            raise

    def _wait(self, start: int) -> None:
        """Until it answers; its address is in the log from `start` on."""
        pattern = r"running on http://127\.0\.0\.1:(\d+)"
        match = wait_until(lambda: re.search(pattern, self.log.read_bytes()[start:].decode(), re.IGNORECASE), 60)
        self.client = client_of(int(match[1]))
        wait_until(lambda: self.client.get("/readyz").status_code == 200, 60)

    @property
    def worker(self) -> int:
        """The process id of the worker."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return int(" ".join(path.read_text() for path in children).split()[0])

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends the server, unless it has ended, and returns its exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)


@contextlib.contextmanager
def process(root: Path, *flags: str, log: Path, prefix: tuple[str, ...] = ()) -> Iterator[Process]:
    """A server in a process, ready to answer, and killed at the end if it runs."""
    server = Process(root, flags, log, prefix)
    try:
        yield server
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.end()


def client_of(port: int, token: str = "") -> httpx.Client:
    """A client that asserts of every answer that it has the strict headers, and of every error what it looks like."""

    def check(response: httpx.Response) -> None:
        text = response.read().decode()
        assert response.headers["cache-control"] == "no-store" and "default-src 'none'" in str(response.headers)
        assert "access-control-allow-origin" not in response.headers
        if not response.url.path.endswith("/receipt"):  # its command for an audit names the workdir
            assert "secret place" not in text, text
        if response.is_error and response.headers["content-type"].partition(";")[0] != "text/html":
            assert response.headers["content-type"] == "application/problem+json", text
            body = response.json()
            assert body["status"] == response.status_code and body["detail"] and "Traceback" not in text

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hooks = {"response": [check]}
    address = f"http://127.0.0.1:{port}"  # no certificates are loaded for it, which takes long
    return httpx.Client(base_url=address, headers=headers, event_hooks=hooks, timeout=60, verify=False)


def wait_until(holds: Callable[[], Any], seconds: float = 30) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := holds():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def images_of(root: Path, count: int) -> np.ndarray:
    """The first images of a workdir, uint8 [count, h, w, c]."""
    with open_run(root) as run:
        return np.array(run.images[:count])


def png(pixels: np.ndarray) -> bytes:
    """An image file of uint8 [h, w, 1] or [h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def in_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def form(*raws: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """Files of a form, for `httpx`."""
    return [("image", (f"{number}.png", raw)) for number, raw in enumerate(raws)]
