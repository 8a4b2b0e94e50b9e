"""What a service answers while its workdir can answer less, or nothing."""

import contextlib
import sqlite3
import threading

import numpy as np
from servers import form, images_of, png, serving, wait_until

from lmeraser_jax.evaluation.predict import predict


def test_quarantine_holds_from_the_commit_on_until_nothing_answers(workdir):
    with serving(workdir) as server:
        client, files = server.client, form(*map(png, images_of(workdir, 60)))
        clusters = {key: name for name, key in server.records().items()}

        def answering():
            answer = client.post("/v1/predict", files=files)
            return answer, {row["cluster"] for row in answer.json().get("predictions", ())}

        (answer, answered), quarantined = answering(), set()
        while answered:
            quarantined.add(min(answered))
            body = {"records": [clusters[min(answered)]], "quarantine": True}
            assert client.post("/v1/erasures", json=body).status_code == 202
            answer, answered = answering()
            assert answered.isdisjoint(quarantined), "the other clusters answer in its place"
        assert quarantined == set(clusters)
        assert answer.status_code == 503 and "quarantined" in answer.json()["detail"]
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
        server.settle()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/predict", files=files).status_code == 200


def test_a_full_queue_is_refused_for_a_moment_and_answers_again(workdir):
    release, entered = threading.Event(), threading.Event()

    def slow(model, rows):
        entered.set()
        release.wait(30)
        return predict(model, rows)

    with serving(workdir) as server:
        images = images_of(workdir, 4)
        answering, most = server.service.answering, server.service.settings.limits.queue
        first = answering.submit(images, slow)
        assert entered.wait(30)
        second = answering.submit(np.resize(images, (most, *images.shape[1:])), predict)
        refused = server.client.post("/v1/predict", files=form(png(images[0])))
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert server.client.get("/healthz").status_code == 200
        release.set()
        assert len(first.result(60).answers.labels) == 4 and len(second.result(60).answers.labels) == most
        assert server.client.post("/v1/predict", files=form(png(images[0]))).status_code == 200


def test_a_workdir_without_a_published_state(workdir):
    with contextlib.closing(sqlite3.connect(workdir / "catalog.db")) as db:
        db.executescript("DELETE FROM manifests; DELETE FROM entries")
    with serving(workdir) as server:
        refused = server.client.post("/v1/predict", files=form(png(images_of(workdir, 1)[0])))
        assert server.client.get("/readyz").status_code == 503 and server.client.get("/healthz").status_code == 200
        assert refused.status_code == 503 and "no tuned cluster" in refused.json()["detail"]
        assert "no published state" in server.client.get("/v1/model").json()["detail"]
