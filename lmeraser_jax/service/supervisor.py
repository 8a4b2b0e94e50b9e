"""Keeps a worker running beside the service: one that ends is started again."""

import json
import subprocess
import sys
import threading
import time

from lmeraser_jax.service.metrics import Metrics
from lmeraser_jax.service.problems import log
from lmeraser_jax.service.settings import Settings

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a worker is started again
STEADY = 30.0  # seconds after which a worker counts as sound
GRACE = 60.0  # seconds for a worker to end where nothing is lost; killed later, it loses nothing either


class Supervisor:
    """Starts the worker of a workdir, listens to it, and starts it again when it ends."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self.problem = ""  # what the worker could not do last, without any path
        self._command = [sys.executable, "-m", "lmeraser_jax.service.worker", f"--workdir={settings.layout.root}"]
        limits = {"max_wait": settings.policy.max_wait, "max_batch": settings.policy.max_batch}
        limits["signing_key"] = settings.signing_key
        self._command += [f"--{name}={value}" for name, value in limits.items() if value is not None]
        self._metrics, self._stopping = metrics, threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ends the worker where nothing is lost."""
        self._stopping.set()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()  # tells it to end
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                code: int | str = self._run_once()
            except OSError as error:  # no process or no memory for one, just now
                code = f"none: it could not be started ({error.strerror})"
            if self._stopping.is_set():
                return
            pause = FIRST_PAUSE if time.monotonic() - started > STEADY else min(2 * pause, LONGEST_PAUSE)
            log.warning("the worker ended with code %s; it is started again in %.1f s", code, pause)
            self._metrics.restarts.inc()
            self._stopping.wait(pause)

    def _run_once(self) -> int:
        """Runs a worker to its end and returns its exit code."""
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )  # a session of its own: Ctrl+C in the terminal is for the service, which then ends the worker
        self._process = process
        assert process.stdout is not None and process.stdin is not None
        if self._stopping.is_set():  # told to stop before the worker was there
            process.stdin.close()
        for line in process.stdout:
            try:
                self.problem = str(json.loads(line)["problem"])
            except (ValueError, LookupError, TypeError):
                continue  # whatever a library prints
            if self.problem:
                log.warning("the worker: %s", self.problem)
        process.stdout.close()
        code = process.wait()
        process.stdin.close()
        return code
