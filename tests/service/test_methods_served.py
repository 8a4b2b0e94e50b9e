"""A service with the real program: approximate answers that become exact, and a language model."""

import pytest
from helpers import small_run
from servers import NEVER, form, images_of, in_base64, png, serving
from text_problem import line, text_config, text_folder, text_run

from lmeraser_jax.data.queries import Query
from lmeraser_jax.evaluation import answers
from lmeraser_jax.evaluation.language import Sampling
from lmeraser_jax.service import worker
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning.audit import audit
from lmeraser_jax.unlearning.build import build
from lmeraser_jax.unlearning.run import open_run
from lmeraser_jax.unlearning.verify import verify_all

pytestmark = pytest.mark.slow


def test_an_approximate_answer_is_marked_until_the_exact_one_is_there(real_workdir):
    with serving(real_workdir) as server:
        client, images = server.client, images_of(real_workdir, 60)
        with small_run(real_workdir) as run:
            sampled = set(run.catalog.sample("train", 30).ids)
        name = next(each for each in server.records() if each not in sampled)
        key, body = server.records()[name], {"records": [name], "request": "N-1", "mode": "newton"}
        assert client.post("/v1/erasures", json=body | {"quarantine": True}).status_code == 422
        assert client.post("/v1/erasures", json=body).json()["mode"] == "newton"
        assert worker.serve_once(Layout(real_workdir), NEVER), "not the policy's business"
        entered = client.get("/v1/erasures/N-1").json()
        if entered["state"] == "accepted":  # CG did not converge: it is served exactly, and says why
            assert entered["mode"] == "exact" and entered["problem"]
        else:
            server.follow()
            rows = client.post("/v1/predict", files=form(*map(png, images))).json()["predictions"]
            assert entered["state"] == "approximated" and len(entered["approximate"]) == 1
            assert {row["cluster"] for row in rows if row["approximate"]} == {key}
        server.settle()
        rows = client.post("/v1/predict", files=form(*map(png, images))).json()["predictions"]
        assert not any(row["approximate"] for row in rows)
        assert client.get("/v1/erasures/N-1/receipt").json()["request"]["id"] == "N-1"
        with small_run(real_workdir) as run:
            assert audit(run).ok and all(each.ok for each in verify_all(run.layout, run.catalog))


def test_a_language_model_answers_erases_by_text_and_rectifies(tmp_path):
    root, config = tmp_path / "it's a secret place" / "run", text_config(text_folder(tmp_path))
    with text_run(root, config) as (run, _):
        build(run)
    lines = [line(i) for i in range(4)]
    with serving(root) as server:
        client, sampling = server.client, Sampling(3, 0.5, 7)
        for candidates in ([], ["w28 w0", "w29"]):
            body = {"queries": [{"query": each["query"], "candidates": candidates} for each in lines]}
            answer = client.post("/v1/predict", json=body | {"max_tokens": 3, "temperature": 0.5, "seed": 7}).json()
            with open_run(root) as run:
                queries = [Query(str(n), each["query"], tuple(candidates)) for n, each in enumerate(lines)]
                expected, failures = answers.answer(run, queries, sampling)
            assert not failures
            for row, wanted in zip(answer["predictions"], expected, strict=True):
                assert row == {name: wanted[name] for name in row} and {"answer", "cluster", "approximate"} <= set(row)
        for body in ({"images": [in_base64(b"x")]}, {"queries": [{"query": "w1 " * 40}]}, {"queries": []}):
            assert client.post("/v1/predict", json=body).status_code == 422
        many = {"queries": [{"query": "w1"}], "max_tokens": 10**6}
        assert client.post("/v1/predict", json=many).status_code == 422
        text = {name: lines[0][name] for name in ("query", "response")}
        assert client.post("/v1/erasures", json={"texts": [text], "request": "L-1"}).json()["records"] == 1
        edits = [{"id": lines[1]["id"], "response": "w30"}]
        assert client.post("/v1/rectifications", json={"edits": edits, "request": "L-2"}).status_code == 202
        server.settle()
        assert client.get("/v1/erasures/L-1").json()["state"] == "purged"
        assert (
            client.get("/v1/rectifications/L-2/receipt").is_success and client.get("/v1/receipts/verify").json()["ok"]
        )
        assert client.get("/v1/model").json()["task"] == "language"
