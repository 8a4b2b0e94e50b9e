"""A real `lmeraser serve` that is killed, ended, doubled, or not allowed to write."""

import os
import random
import signal
import subprocess
import time

import pytest
from helpers import small_run
from servers import form, images_of, png, process, wait_until

from lmeraser_jax.unlearning import purge
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.verify import verify_all

pytestmark = pytest.mark.slow
CANARY = "kanarienvogel"


def check(root, count):
    """Asserts that all requests are served exactly, and that nothing is left of what they erased."""
    with small_run(root) as run:
        assert audit(run).ok and not run.catalog.erased() and not run.catalog.quarantined()
        assert purge.leftovers(run) == []
        verdicts = verify_all(run.layout, run.catalog)
        assert all(each.ok for each in verdicts) and len(run.catalog.receipts()) == count


def finished(client, name):
    return wait_until(lambda: client.get(f"/v1/erasures/{name}").json()["state"] == "purged", 90)


def test_the_worker_and_the_server_are_killed_at_random_moments(real_workdir, tmp_path):
    draw, log, files = random.Random(1), tmp_path / "log", form(*map(png, images_of(real_workdir, 8)))
    files += [("image", (f"{CANARY}.png", files[0][1][1]))]
    with small_run(real_workdir) as run:
        names = run.catalog.live("train").ids
    for number, victim in enumerate(("worker", "server", "worker")):
        with process(real_workdir, log=log) as server:
            finished(server.client, f"K-{number - 1}") if number else None
            body = {"records": [names[9 * number]], "request": f"K-{number}", "requester": CANARY, "quarantine": True}
            assert server.client.post("/v1/erasures", json=body).status_code == 202
            time.sleep(draw.uniform(0, 6))
            if victim == "server":
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
                continue
            os.kill(server.worker, signal.SIGKILL)
            assert server.client.post("/v1/predict", files=files).status_code == 200
            finished(server.client, f"K-{number}")
            assert server.client.get(f"/v1/erasures/{CANARY}").status_code == 404
            assert server.end() in (0, -signal.SIGTERM)
    check(real_workdir, 3)
    lines = log.read_text()
    assert "Traceback" not in lines and CANARY not in lines and "the worker ended with code -9" in lines


def test_two_servers_of_one_workdir(real_workdir, tmp_path):
    with small_run(real_workdir) as run:
        names = run.catalog.live("train").ids
    with process(real_workdir, log=tmp_path / "a") as one, process(real_workdir, log=tmp_path / "b") as other:
        for number, server in enumerate((one, other)):
            body = {"records": [names[9 * number]], "request": f"D-{number}"}
            assert server.client.post("/v1/erasures", json=body).status_code == 202
        for number, server in enumerate((other, one)):
            finished(server.client, f"D-{number}")
        version = one.client.get("/v1/model").json()["manifest"]
        files = form(*map(png, images_of(real_workdir, 8)))
        wait_until(lambda: one.client.post("/v1/predict", files=files).json()["manifest"] == version)
        assert (
            one.client.post("/v1/predict", files=files).json() == other.client.post("/v1/predict", files=files).json()
        )
        for server in (one, other):
            wait_until(lambda s=server: s.client.get("/v1/model").json()["worker"]["problem"] == "", 15)
    check(real_workdir, 2)


def test_a_workdir_that_cannot_be_written(real_workdir, tmp_path):
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here: {error}")
    seen = tmp_path / "seen" / "it's a secret place" / "run"
    seen.mkdir(parents=True)
    mount = 'mount --bind "$0" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, str(real_workdir), str(seen))
    with small_run(real_workdir) as run:
        name = run.catalog.live("train").ids[0]
    with process(seen, log=tmp_path / "log", prefix=prefix) as server:
        files = form(*map(png, images_of(real_workdir, 8)))
        assert len(server.client.post("/v1/predict", files=files).json()["predictions"]) == 8
        assert server.client.get("/v1/model").json()["worker"]["problem"] == "the workdir cannot be written"
        assert server.client.get("/v1/receipts/verify").json()["ok"]
        assert server.client.post("/v1/erasures/estimate", json={"records": [name]}).status_code == 200
        refused = server.client.post("/v1/erasures", json={"records": [name]})
        assert refused.status_code == 503 and "cannot be written" in refused.json()["detail"], refused.text
    assert "Traceback" not in (tmp_path / "log").read_text()
