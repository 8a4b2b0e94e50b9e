"""Random histories of requests over HTTP against the plain-Python model of `history.History`."""

import hypothesis
import jax
import pytest
from fastapi.testclient import TestClient
from history import CONFIG, POOL, History
from hypothesis.stateful import invariant

from lmeraser_jax.service.app import create_app
from lmeraser_jax.service.settings import Policy, Settings
from lmeraser_jax.service.worker import serve_once
from lmeraser_jax.storage import requests
from lmeraser_jax.unlearning.run import prepare_run


@pytest.fixture(scope="module", autouse=True)
def backbone_folder(tmp_path_factory, fast_files):
    """The backbone of every history, made once."""
    with prepare_run(tmp_path_factory.mktemp("backbone") / "run", CONFIG, jax.devices()[:1], POOL) as (run, _):
        History.backbone_folder = run.layout.backbone


class ServedHistory(History):
    """The same history: requests come over HTTP, each twice, and the worker's own loop serves them."""

    def enter(self, source=None):
        super().enter(source)
        app = create_app(Settings(self.run.layout, CONFIG))  # not started: no thread and no worker of its own
        self.client = TestClient(app, "http://127.0.0.1")

    def request(self, names, owners, name, quarantine, defer):
        body = {"records": names, "owners": owners, "request": name, "quarantine": quarantine}
        for _ in range(2):
            answer = self.client.post("/v1/erasures", json=body)
            assert answer.status_code == 202 and answer.headers["location"] == f"/v1/erasures/{name}"
        unlike = self.client.post("/v1/erasures", json=body | {"owners": [*owners, "owner-0", "owner-1"]})
        assert unlike.status_code in (409, 422) and f"request {name}: was used" in unlike.text
        if not defer:
            self.serve()

    def serve(self):
        if not requests.any_open(self.run.catalog):  # what was added alone is no business of the worker's
            return super().serve()
        self.stack.close()  # the model's own run holds the writer lock
        assert serve_once(self.run.layout, Policy())
        self.enter()

    @invariant()
    def the_service_says_what_the_model_says(self):
        if not hasattr(self, "run"):
            return
        listed = self.client.get("/v1/erasures", params={"count": 500}).json()["erasures"]
        assert {each["id"] for each in listed} == set(self.requests)
        model = self.client.get("/v1/model").json()
        assert model["records"]["live"]["train"] == len(self.live)
        assert model["open_requests"] == sum(each["state"] != "purged" for each in listed)
        for each in listed:
            receipt = self.client.get(f"/v1/erasures/{each['id']}/receipt")
            assert receipt.status_code == (200 if each["state"] == "purged" else 404)
        assert self.client.get("/v1/receipts/verify").json()["ok"]


@pytest.mark.slow
def test_random_histories_of_requests_over_http():
    settings = hypothesis.settings(
        max_examples=12,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # a shorter history takes minutes to find
    )
    hypothesis.stateful.run_state_machine_as_test(ServedHistory, settings=settings)
