"""Every route of a service, with a real client: the answers are those of the library and of the command line."""

import contextlib
import dataclasses
import json
import threading

import numpy as np
import pytest
from commands import call
from servers import form, in_base64, png, wait_until

from lmeraser_jax.evaluation.serving import Predictor
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.unlearning import erase
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.run import open_run
from lmeraser_jax.unlearning.verify import verify_all

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def images(server):
    """uint8 [20, h, w, c]: more than a device batch."""
    with open_run(server.root) as run:
        return np.array(run.images[:20])


def test_predictions_are_those_of_the_library_and_of_the_command_line(server, images, tmp_path, capsys):
    files = [png(pixels) for pixels in images]
    answer = server.client.post("/v1/predict", files=form(*files)).json()
    assert answer == server.client.post("/v1/predict", json={"images": list(map(in_base64, files))}).json()
    with open_run(server.root) as run:
        predictor = Predictor(run)
        expected = predictor(images)
        assert answer["manifest"] == predictor.state.version == run.catalog.manifest().version
        names = run.classes
    for row, probabilities, clusters in zip(
        answer["predictions"], expected.probabilities, expected.clusters, strict=True
    ):
        wanted = {name: round(float(p), 6) for name, p in zip(names, probabilities, strict=True)}
        assert (row["probabilities"], row["cluster"]) == (wanted, expected.keys[clusters[0]])
    for number, raw in enumerate(files):
        (tmp_path / f"{number:02}.png").write_bytes(raw)
    code, out, _ = call(capsys, "predict", f"--workdir={server.root}", tmp_path, "--format=json")
    printed = json.loads(out)
    assert (
        code == 0 and [set(row) for row in printed] == [{"file", "label", "probability", "cluster", "approximate"}] * 20
    )
    assert [{name: row[name] for name in printed[0] if name != "file"} for row in answer["predictions"]] == [
        {name: value for name, value in row.items() if name != "file"} for row in printed
    ]


def test_an_erasure_from_its_estimate_to_its_verified_receipt(server):
    client, (name, *_) = server.client, server.records()
    with open_run(server.root) as run:
        expected = erase.estimate(run, requests.resolve(run.catalog, [name]))
    assert client.post("/v1/erasures/estimate", json={"records": [name]}).json() == json.loads(
        json.dumps(dataclasses.asdict(expected))
    )
    body = {"records": [name], "request": "R-1", "requester": "desk", "reason": "ticket 7", "quarantine": True}
    accepted = client.post("/v1/erasures", json=body)
    assert accepted.status_code == 202 and accepted.headers["location"] == "/v1/erasures/R-1"
    entered = accepted.json()
    assert (entered["id"], entered["state"], entered["records"], entered["reason"]) == (
        "R-1",
        "accepted",
        1,
        "ticket 7",
    )
    assert client.post("/v1/erasures", json=body).json()["created"] == entered["created"], "the same request"
    assert client.get("/v1/erasures/R-1").json()["age"] >= entered["age"]
    assert client.get("/v1/erasures/R-1/receipt").status_code == 404
    assert name not in server.records()
    server.settle()
    finished = client.get("/v1/erasures/R-1").json()
    assert finished["state"] == "purged" and finished["manifest"]["after"] > finished["manifest"]["before"]
    receipt = client.get("/v1/erasures/R-1/receipt")
    assert receipt.content == (server.root / "receipts" / "R-1.json").read_bytes()
    again = client.post("/v1/erasures", json=body)
    assert again.status_code == 200 and again.json()["state"] == "purged"
    verified = client.get("/v1/receipts/verify").json()
    with open_run(server.root) as run:
        assert audit(run).ok
        assert [row["request"] for row in verified["verdicts"]] == [
            v.request for v in verify_all(run.layout, run.catalog)
        ]
    assert verified["ok"] and "R-1" in str(verified)
    (server.root / "receipts" / "R-1.json").write_bytes(receipt.content.replace(b"ticket 7", b"ticket 8"))
    assert not client.get("/v1/receipts/verify").json()["ok"]
    (server.root / "receipts" / "R-1.json").write_bytes(receipt.content)


def test_records_are_named_by_owner_and_by_pixels_and_rectified(server, images):
    client, names = server.client, sorted(server.records())
    with open_run(server.root) as run:
        rows = run.catalog.rows(names)
        labels = dict(run.catalog.db.execute("SELECT id,label FROM records"))
        pixels = np.array(run.images[rows[names[3]]])
    alike = client.post("/v1/erasures/estimate", json={"images": [in_base64(png(pixels))]}).json()
    assert alike == client.post("/v1/erasures/estimate", json={"records": [names[3]]}).json()
    label = str((labels[names[4]] + 1) % 10)
    edits = [{"id": names[4], "label": label}, {"id": names[5], "image": in_base64(png(255 - pixels))}]
    answer = client.post("/v1/rectifications", json={"edits": edits, "request": "E-1", "reason": "wrong"})
    assert answer.status_code == 202 and answer.headers["location"] == "/v1/rectifications/E-1"
    assert answer.json()["kind"] == "rectify" and answer.json()["records"] == 2
    assert client.get("/v1/erasures/E-1").status_code == 404, "of another kind"
    server.settle()
    assert client.get("/v1/rectifications/E-1/receipt").json()["request"]["reason"] == "wrong"
    nothing = client.post("/v1/rectifications", json={"edits": edits})
    assert nothing.status_code == 200 and nothing.json()["id"] is None
    with open_run(server.root) as run:
        row = run.catalog.rows([names[5]])[names[5]]
        assert np.array_equal(run.images[row], 255 - pixels)
        assert run.catalog.db.execute("SELECT label FROM records WHERE id=?", (names[4],)).fetchone() == (int(label),)


def test_lists_have_filters_and_pages(server):
    client, names = server.client, sorted(server.records())[10:15]
    for number, name in enumerate(names):
        client.post("/v1/erasures", json={"records": [name], "request": f"P-{number}"})
    assert client.get("/v1/erasures?state=accepted").json()["next"] is None
    link, seen = "/v1/erasures?state=accepted&count=2", []
    while link:
        page = client.get(link).json()
        seen += [row["id"] for row in page["erasures"]]
        link = page["next"]
    assert seen == ["P-4", "P-3", "P-2", "P-1", "P-0"]
    assert {row["kind"] for row in client.get("/v1/rectifications").json()["rectifications"]} <= {"rectify"}
    for query in ("state=done", "count=0", "count=501", "count=x"):
        assert client.get(f"/v1/erasures?{query}").status_code == 422
    server.settle()
    assert client.get("/v1/erasures?state=accepted").json()["erasures"] == []
    assert {f"P-{number}" for number in range(5)} <= {
        row["id"] for row in client.get("/v1/erasures?state=purged&state=published").json()["erasures"]
    }


def test_the_model_its_figures_and_its_description(server):
    client = server.client
    model = client.get("/v1/model").json()
    with contextlib.closing(Catalog(server.root / "catalog.db")) as catalog:
        manifest = catalog.manifest()
        assert model["manifest"] == manifest.version and {row["key"] for row in model["clusters"]} == set(
            manifest.clusters
        )
        assert model["fingerprint"] == json.loads(manifest.fingerprint)
        live = {split: count for split, count in model["records"]["live"].items() if count}
        assert live == catalog.counts() and model["records"]["erased"] == requests.count_erased(catalog)
        assert sum(row["members"] for row in model["clusters"]) == len(catalog.live("train"))
    assert model["worker"]["alive"]
    assert client.get("/healthz").text == "ok" and client.get("/readyz").text == "ready"
    figures = client.get("/metrics").text
    counts = {state: 0 for state in requests.STATES} | {"purged": len(list((server.root / "receipts").glob("*")))}
    assert all(f'lmeraser_requests{{state="{state}"}} {count}.0' in figures for state, count in counts.items())
    assert f"lmeraser_manifest {model['manifest']}.0" in figures and "lmeraser_batch_fill_bucket" in figures
    described = client.get("/openapi.json").json()
    assert {"image", "images", "queries"} <= set(
        json.dumps(described["paths"]["/v1/predict"]).replace('"', " ").split()
    )
    assert len(described["paths"]) >= 10


def test_the_same_request_at_once_is_accepted_once_and_another_under_its_id_refused(server):
    client, names = server.client, sorted(server.records())
    answers = []

    def send(body):
        answers.append(client.post("/v1/erasures", json=body))

    same = [{"records": names[-1:], "request": "T-1", "reason": "twice"}] * 4
    threads = [
        threading.Thread(target=send, args=(body,)) for body in [*same, {"records": names[-2:-1], "request": "T-1"}]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert codes in ([202] * 4 + [409], [202] + [409] * 4)
    entered = client.get("/v1/erasures/T-1").json()
    assert all(answer.json()["created"] == entered["created"] for answer in answers if answer.status_code == 202)
    for other in ({"records": names[-3:-2]}, {"records": names[-1:], "reason": "another"}):
        refused = client.post("/v1/erasures", json={"reason": entered["reason"]} | other | {"request": "T-1"})
        assert refused.status_code == 409 and "T-1" in refused.json()["detail"]
    server.settle()


def test_a_change_by_another_process_is_followed_and_mixes_no_answer(server, images):
    """As `lmeraser unlearn` beside the service: each answer is the one of the state that it names."""
    client, bodies, done = server.client, form(*map(png, images[:6])), threading.Event()
    answers, states = [], {}

    def ask():
        while not done.is_set():
            answers.append(client.post("/v1/predict", files=bodies).raise_for_status().json())

    def note(run):
        predictor = Predictor(run)
        expected = predictor(images[:6])
        states[predictor.state.version] = [
            (expected.keys[cluster[0]], round(float(p.max()), 6))
            for cluster, p in zip(expected.clusters, expected.probabilities, strict=True)
        ]

    asking = threading.Thread(target=ask)
    with open_run(server.root, write=True) as run:
        note(run)
        asking.start()
        for number in range(3):
            erase.request_erasure(run, [sorted(server.records())[number]])
            note(run)
            wait_until(lambda: answers and answers[-1]["manifest"] == max(states))
        done.set()
        asking.join()
    assert len({answer["manifest"] for answer in answers}) >= 3
    for answer in answers:
        rows = [(row["cluster"], row["probability"]) for row in answer["predictions"]]
        assert rows == states[answer["manifest"]]
