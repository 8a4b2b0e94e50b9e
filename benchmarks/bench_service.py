"""The HTTP service under load: throughput beside plain predictions, latency, erasures meanwhile, memory.

  python benchmarks/bench_service.py [--workdir=DIR] [--parts=ready,memory] [--quick] [--minutes=30] [--json=FILE]

One `lmeraser serve` with a worker of its own, and clients in this process, over the loopback interface:

  throughput   images per second of calls with 64 images each, from 4 connections, over those of `predict` in a loop at
               the same batch, in turns; both with all cores, which the service shares with its clients
  half load    times of calls with one image at random moments, at half the rate that 8 connections reach
  erasures     calls in a loop during 20 erasures with quarantine: failures; calls that two states answered (an image
               has one answer per manifest and cluster); calls after the commit that used a quarantined cluster
  ready        seconds from start to the first answer, with made-up slices of so many clusters
  memory       resident memory of the service at the end of each tenth of so many minutes of load

Without --workdir: scikit-learn's digits. --quick: a tenth of everything.
"""

import contextlib
import dataclasses
import http.client
import io
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from PIL import Image
from reporting import deliver, log, new_parser, spread, timed
from workloads import train_digits

from lmeraser_jax.evaluation.predict import load_model, predict
from lmeraser_jax.unlearning.run import open_run

PARTS = ("throughput", "half_load", "erasures", "ready", "memory")
BATCH, CALLERS = 64, 4
ROUND = 4.0  # seconds of a round of throughput, about
JSON = {"Content-Type": "application/json"}


def main() -> None:
    parser = new_parser(__doc__, quick="a tenth of everything")
    parser.add_argument("--workdir", default="", help="a trained workdir of images; 20 records are erased")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    parser.add_argument("--minutes", type=float, default=30.0, help="of load, whose memory is watched")
    parser.add_argument("--clusters", type=int, default=2000, help="of the workdir whose start is timed")
    arguments = parser.parse_args()
    share, result = 0.1 if arguments.quick else 1.0, {}
    clusters = int(arguments.clusters * share)
    measures: dict[str, Callable[[Path, Server], dict[str, Any]]] = {
        "throughput": lambda workdir, server: throughput(workdir, server, rounds=max(2, int(10 * share))),
        "half_load": lambda workdir, server: half_load(workdir, server, calls=int(2000 * share)),
        "erasures": lambda workdir, server: erasures(workdir, server, int(20 * share), least=int(10_000 * share)),
        "memory": lambda workdir, server: memory(workdir, server, 60 * share * arguments.minutes),
    }
    chosen = arguments.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(arguments.workdir or folder + "/trained")
        if not arguments.workdir and set(chosen) & set(measures):
            train_digits(workdir, arguments.quick)
        for name in chosen:
            if name == "ready":
                result[name] = ready(Path(folder) / "many", clusters)
            else:
                with serving(workdir) as server:
                    result[name] = measures[name](workdir, server)
            log({name: result[name]})
    deliver("bench_service.py", result, arguments.json)


class Server:
    """A running service."""

    def __init__(self, process: subprocess.Popen[bytes], port: int):
        self.process, self.port = process, port

    def call(
        self, body: bytes, path: str = "/v1/predict", headers: dict[str, str] = JSON, connection: Any = None
    ) -> Any:
        """The JSON that a call gives. Raises `RuntimeError` for any other status than 200 and 202."""
        own = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        own.request("POST" if body else "GET", path, body or None, headers if body else {})
        answer = own.getresponse()
        text = answer.read()
        if connection is None:
            own.close()
        if answer.status not in (200, 202):
            raise RuntimeError(f"{answer.status}: {text[:200]!r}")
        return json.loads(text)

    def resident(self) -> int:
        """Memory of the service in bytes, without its worker."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@contextlib.contextmanager
def serving(workdir: Path) -> Iterator[Server]:
    """A service on a free port, from its first answer on; ended at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lmeraser_jax.cli.main", "serve", f"--workdir={workdir}", f"--port={port}"]
    command.append(f"--config.inference.batch={BATCH}")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    server = Server(process, port)
    try:
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    break
            assert process.poll() is None, "the service has ended"
            time.sleep(0.02)
        yield server
    finally:
        process.terminate()
        process.wait()


def started(workdir: Path) -> float:
    """Seconds from the start of a service to its readiness."""
    start = time.perf_counter()
    with serving(workdir):
        return time.perf_counter() - start


def ready(workdir: Path, clusters: int) -> dict[str, Any]:
    """Starts of a service with made-up slices."""
    synthetic.make(workdir, records=10 * clusters, clusters=clusters, sample=2 * clusters, sample_from="private")
    return {"clusters": clusters, "start": spread([started(workdir) for _ in range(3)])}


def form(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """A multipart body of PNG files, and its headers."""
    border, body = "lmeraserbenchmark", io.BytesIO()
    for number, pixels in enumerate(images):
        head = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{number}.png"\r\n'
        body.write(f"{head}Content-Type: image/png\r\n\r\n".encode())
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(body, "PNG")
        body.write(b"\r\n")
    body.write(f"--{border}--\r\n".encode())
    return body.getvalue(), {"Content-Type": f"multipart/form-data; boundary={border}"}


def images_of(workdir: Path, count: int) -> np.ndarray:
    """Images of a workdir, drawn with replacement: uint8 [count, h, w, c]."""
    with open_run(workdir) as run:
        return np.array(run.images[np.random.default_rng(0).integers(0, len(run.images), count)])


def in_parallel(callers: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def throughput(workdir: Path, server: Server, rounds: int) -> dict[str, Any]:
    """Images per second over HTTP and in a plain loop, in turns."""
    with open_run(workdir) as run:
        inference = dataclasses.replace(run.config.inference, batch=BATCH)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, inference=inference))
        model, images = load_model(run), images_of(workdir, BATCH)
        body, headers = form(images)
        predict(model, images)
        calls = int(np.clip(ROUND / (CALLERS * timed(predict, model, images)), 2, 100))  # of each caller

        def over_http(_: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            for _ in range(calls):
                server.call(body, headers=headers, connection=connection)

        rates: dict[str, list[float]] = {"http": [], "plain": []}
        for turn in range(rounds + 1):
            took = {"http": timed(in_parallel, CALLERS, over_http)}
            took["plain"] = timed(lambda: [predict(model, images) for _ in range(calls * CALLERS)])
            for name, seconds in took.items():
                if turn:
                    rates[name].append(calls * CALLERS * BATCH / seconds)
    share = statistics.median(a / b for a, b in zip(rates["http"], rates["plain"], strict=True))
    return {f"{name}_images_per_s": round(statistics.median(each), 1) for name, each in rates.items()} | {
        "share": round(share, 3)
    }


def half_load(workdir: Path, server: Server, calls: int) -> dict[str, Any]:
    """Times of single images at half of the rate that 8 connections reach."""
    body, headers = form(images_of(workdir, 1))

    def loop(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        for _ in range(calls // 10):
            server.call(body, headers=headers, connection=connection)

    one = statistics.median(timed(server.call, body, "/v1/predict", headers) for _ in range(5))
    calls = int(np.clip(calls, 50, 20 * ROUND / one))
    full = 8 * (calls // 10) / timed(in_parallel, 8, loop)
    rng, seconds = np.random.default_rng(1), []
    due = time.perf_counter() + np.cumsum(rng.exponential(2 / full, calls))
    turns = iter(due.tolist())
    guard = threading.Lock()

    def answer(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while True:
            with guard:
                moment = next(turns, None)
            if moment is None:
                return
            time.sleep(max(0.0, moment - time.perf_counter()))
            server.call(body, headers=headers, connection=connection)
            seconds.append(time.perf_counter() - moment)  # with what it waited for a free connection

    in_parallel(16, answer)
    return {"full_calls_per_s": round(full, 1), "half_load": spread(seconds)}


def erasures(workdir: Path, server: Server, count: int, least: int) -> dict[str, Any]:
    """Predictions in a loop, at least so many images, while records are erased one after the other."""
    rng, images = np.random.default_rng(2), images_of(workdir, BATCH)
    with open_run(workdir) as run:
        live = run.catalog.live("train")
        records = [live.ids[k] for k in rng.permutation(len(live.ids))[:count]]
        clusters = dict(zip(live.ids, live.clusters, strict=True))
    body, headers = form(images)
    answers: list[tuple[float, dict[str, Any]]] = []
    failures: list[str] = []
    done = threading.Event()

    def loop(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while not done.is_set() or len(answers) * BATCH < least:
            start = time.monotonic()
            try:
                answers.append((start, server.call(body, headers=headers, connection=connection)))
            except (RuntimeError, OSError) as error:
                failures.append(str(error))

    callers = threading.Thread(target=in_parallel, args=(2, loop))
    callers.start()
    late, served = [], []
    for record in records:
        key, start, before = clusters[record], time.monotonic(), server.call(b"", "/v1/model")["manifest"]
        accepted = server.call(json.dumps({"records": [record], "quarantine": True}).encode(), "/v1/erasures")
        committed = time.monotonic()
        while server.call(b"", f"/v1/erasures/{accepted['id']}")["state"] not in ("published", "purged"):
            time.sleep(0.02)
        served.append(time.monotonic() - start)
        began = [answer for start, answer in list(answers) if start > committed and answer["manifest"] == before]
        late += [answer for answer in began if any(row["cluster"] == key for row in answer["predictions"])]
    done.set()
    callers.join()
    return {
        "erasures": count,
        "predictions": BATCH * len(answers),
        "failures": len(failures),
        "manifests": len({answer["manifest"] for _, answer in answers}),
        "mixed": mixed([answer for _, answer in answers]),
        "seconds_to_published": spread(served),
        "calls_begun_after_the_commit_that_used_a_quarantined_cluster": len(late),
    }


def mixed(answers: list[dict[str, Any]]) -> int:
    """How many calls gave an image other numbers than the first call that the same manifest and cluster answered."""
    first: dict[tuple[int, int, str], tuple[Any, ...]] = {}
    wrong = 0
    for answer in answers:
        rows = enumerate(answer["predictions"])
        own = {(answer["manifest"], k, row["cluster"]): (row["label"], row["probability"]) for k, row in rows}
        wrong += any(first.setdefault(place, value) != value for place, value in own.items())
    return wrong


def memory(workdir: Path, server: Server, seconds: float) -> dict[str, Any]:
    """Resident memory of the service under load, in MB."""
    body, headers = form(images_of(workdir, BATCH))
    end, sizes = time.monotonic() + seconds, []

    def loop(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while time.monotonic() < end:
            server.call(body, headers=headers, connection=connection)

    callers = threading.Thread(target=in_parallel, args=(2, loop))
    callers.start()
    for _ in range(10):
        time.sleep(seconds / 10)
        sizes.append(round(server.resident() / 1e6, 1))
    callers.join()
    return {"minutes": round(seconds / 60, 1), "megabytes": sizes}


if __name__ == "__main__":
    main()
