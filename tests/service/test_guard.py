"""What a service refuses: tokens that may not, sizes, times, forms, images, names and other sites."""

import json
import logging
import socket
import struct
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from commands import call, refused
from servers import client_of, form, in_base64, png, serving

from lmeraser_jax.errors import UserError
from lmeraser_jax.service import auth
from lmeraser_jax.service.auth import ROLES, Caller, Guard, make_token, read_tokens
from lmeraser_jax.service.settings import Limits
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.atomic_files import write_json

pytestmark = pytest.mark.usefixtures("fast")
OPEN = {("GET", path) for path in ("/healthz", "/readyz", "/openapi.json", "/console.css")}
NEEDS = {"/v1/predict": {"predict"}, "/v1/model": {"read"}, "/v1/receipts/verify": {"read"}, "/metrics": {"read"}}
NEEDS |= {"/": {"read"}, "/receipts": {"read"}, "/erase": {"erase"}}
CANARY = "kanarienvogel"


@pytest.fixture(scope="module")
def guarded(fast, fast_template, tmp_path_factory):
    """A server with a token of each role, and the tokens: (server, {role: token}, their file)."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.json"
    tokens = {role: make_token(file, f"who {role}s", [role]) for role in ROLES}
    root = tmp_path_factory.mktemp("it's a secret place") / "run"
    root.symlink_to(fast_template)  # nothing is changed
    with serving(root, tokens=file, limits=Limits(body=100_000, seconds=0.5, inputs=3)) as running:
        yield running, tokens, file


def routes_of(server) -> list[tuple[str, str]]:
    """(method, path) of every route of the app."""
    groups = [getattr(each, "original_router", None) for each in server.app.routes]  # a newer FastAPI nests them
    routes = [*server.app.routes, *(route for group in groups if group for route in group.routes)]
    return sorted({(m, each.path) for each in routes for m in getattr(each, "methods", None) or () if m != "HEAD"})


def test_every_route_asks_for_a_token_and_its_role(guarded):
    server, tokens, _ = guarded
    listed = routes_of(server)
    assert len(listed) > 16
    for method, path in listed:
        place = path.replace("{request}", "R-1").replace("{name}", "R-1")
        if (method, path) in OPEN:
            assert server.client.request(method, place).status_code == 200
            continue
        erases = method == "POST"
        roles = NEEDS.get(path, {"erase"} if erases else {"erase", "read"})
        for token in ("", "x" * 43, tokens["read"][:-1], tokens["read"] + "é"):
            headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
            refused = server.client.request(method, place, json={}, headers=headers)
            assert refused.status_code == 401 and "basic" in refused.headers["www-authenticate"].lower(), path
            assert (refused.headers.get("connection") == "close") == erases, "no byte of a body is waited for"
        for role in ROLES:
            headers = {"Authorization": f"Bearer {tokens[role]}"}
            answer = server.client.request(method, place, json={} if erases else None, headers=headers)
            assert (answer.status_code == 403) == (role not in roles), (path, role)


def test_a_token_is_withdrawn_and_a_damaged_file_lets_nobody_in(guarded):
    server, tokens, file = guarded
    sound, rows = file.read_text(), json.loads(file.read_text())["tokens"]
    assert not any(token in sound for token in tokens.values()) and file.stat().st_mode & 0o077 == 0
    with client_of(server.port, tokens["read"]) as client:
        assert client.get("/v1/model").status_code == 200
        assert client.get("/v1/model", auth=("anyone", tokens["read"])).status_code == 200, "the basic scheme"
        file.write_text(json.dumps({"tokens": [row for row in rows if row["roles"] != ["read"]]}))
        assert client.get("/v1/model").status_code == 401
        strange = [rows[0] | {"roles": ["admin"]}, rows[0] | {"sha256": "ab"}, {"name": 1}, 7]
        for text in ("{", "[]", *(json.dumps({"tokens": [row]}) for row in strange)):
            file.write_text(text)
            with pytest.raises(UserError):
                read_tokens(file)
            assert client.get("/v1/model").status_code == 503
        file.unlink()
        assert client.get("/v1/model").status_code == 503
        file.write_text(sound)
        assert client.get("/v1/model").status_code == 200
    for name, roles in (("who reads", ["read"]), ("", ["read"]), ("a\n", ["read"]), ("new", []), ("new", ["admin"])):
        with pytest.raises(UserError):
            make_token(file, name, roles)
    assert file.read_text() == sound


def predicts(guarded):
    server, tokens, _ = guarded
    return client_of(server.port, tokens["predict"])


def test_bodies_that_are_too_large(guarded):
    with predicts(guarded) as client:
        chunks = (b"x" * 10_000 for _ in range(20))
        for content in (b"x" * 100_001, chunks):
            refused = client.post("/v1/predict", content=content, headers={"Content-Type": "application/json"})
            assert refused.status_code == 413 and refused.headers["connection"] == "close"
        assert client.post("/v1/predict", json={"images": ["AAAA"] * 4}).status_code == 422
        assert client.post("/v1/predict", files=form(*[b"x"] * 4)).status_code == 400
        assert client.post("/v1/predict", files=form()).status_code == 415


@pytest.mark.parametrize(
    "start", [b"GET /healthz HT", b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1"]
)
def test_a_slow_client_is_hung_up_on(guarded, start):
    server, tokens, _ = guarded
    head = start.replace(
        b"\r\n\r\n", f"\r\nContent-Type: application/json\r\nAuthorization: Bearer {tokens['predict']}\r\n\r\n".encode()
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head)
        began, answer = time.monotonic(), b""
        while piece := connection.recv(4096):
            answer += piece
        assert 0.4 < time.monotonic() - began < 5
        assert not answer if start[:3] == b"GET" else b" 408 " in answer.partition(b"\r\n")[0]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_forms_bodies_and_images_that_cannot_be_read(guarded):
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nabc'
    forms = [
        b"",
        b"garbage",
        b"--x\r\ngarbage",
        part,
        part + b"\r\n" + part,
        part.replace(b'name="image"; ', b"") + b"\r\n--x--",
    ]
    broken = ["", "[", '{"images":', '{"images": ["\\ud800"]}', '{"\\ud800": 1}', "[" * 100_000]
    bodies = ["[]", '{"images": 7}', '{"images": ["AAAA"], "temperature": NaN}', '{"images": ["!"]}', "{}"]
    bodies += ['{"queries": [{"query": "w1"}]}']
    with predicts(guarded) as client:
        for content in forms:
            answer = client.post(
                "/v1/predict", content=content, headers={"Content-Type": "multipart/form-data; boundary=x"}
            )
            assert answer.status_code == 400, content
        assert (
            client.post("/v1/predict", content=part, headers={"Content-Type": "multipart/form-data"}).status_code == 400
        )
        text = part.replace(b'; filename="a.png"', b"") + b"\r\n--x--"
        assert (
            client.post(
                "/v1/predict", content=text, headers={"Content-Type": "multipart/form-data; boundary=x"}
            ).status_code
            == 422
        )
        for content in (*broken, *bodies):
            answer = client.post("/v1/predict", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == (400 if content in broken else 422), content
        sound = png(np.zeros((8, 8, 1), "uint8"))
        for raw in (b"", b"GIF89a", sound[:40], bomb(60_000, 60_000), bomb(2**31 - 1, 1)):
            answer = client.post("/v1/predict", json={"images": [in_base64(sound), in_base64(raw)]})
            assert answer.status_code == 422 and [each["pointer"] for each in answer.json()["errors"]] == ["/images/1"]


def test_other_sites_and_other_names_of_the_service(server):
    def post(headers):
        return server.client.post("/v1/erasures/estimate", json={"records": ["x"]}, headers=headers)

    own = f"127.0.0.1:{server.port}"
    for headers in (
        {},
        {"Origin": f"http://{own}"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Host": "localhost"},
        {"Host": "[::1]:80"},
    ):
        assert post(headers).status_code == 422, headers
    foreign = [
        {"Origin": origin}
        for origin in ("http://evil.example", "null", "http://[::1", f"http://evil.{own}", f"http://{own}0")
    ]
    foreign += [{"Sec-Fetch-Site": site} for site in ("cross-site", "same-site")]
    foreign += [{"Host": host} for host in ("evil.example", "127.0.0.1.evil.example", "[::1", "", "10.0.0.1")]
    for headers in foreign:
        assert post(headers).status_code == 403, headers
    assert server.client.get("/v1/model", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link"


def test_strange_names_are_refused_and_name_nothing_else(server):
    client, name = server.client, sorted(server.records())[0]
    for each in ("../x", "..%2f..%2fcatalog.db", "%2e%2e%2f%2e%2e", "a%00b", "%ff", "R-1%0d%0aX: 1", "é", "x" * 5000):
        for end in ("", "/receipt"):
            assert client.get(f"/v1/erasures/{each}{end}").status_code == 404, each
    names = [
        name.upper() + "x",
        name + "\u200b",
        f" {name}",
        name[:-1] + "\uff10",
        "../" + name,
        "\ud800",
        "",
        "\0",
        "x" * 10**5,
    ]
    for each in names:
        for body in ({"records": [each]}, {"owners": [each]}):
            answer = client.post("/v1/erasures", content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == 422, each
    for each in ("../x", "a/b", "", ".hidden", "\ud800", "x" * 65, "a\n", "%2f"):
        body = json.dumps({"records": [name], "request": each, "reason": "" if each else "\ud800"})
        answer = client.post("/v1/erasures", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, each
    for body in (
        {},
        {"records": [name], "typo": 1},
        {"records": name},
        {"records": [1]},
        {"records": [name], "mode": "x"},
    ):
        assert client.post("/v1/erasures", json=body).status_code == 422, body
    for raw in (b"\xff", b"{", b"records"):
        answer = client.post("/v1/erasures", content=raw, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, raw
    assert name in server.records() and client.get("/v1/erasures").json()["erasures"] == []


def test_what_was_sent_is_neither_logged_nor_counted_nor_written_to_a_file(server, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", None)
    client, large = server.client, png(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), "uint8"))
    assert len(large) > 1 << 21
    assert client.post("/v1/predict", files=[("image", (f"{CANARY}.png", large))]).status_code == 200
    client.post("/v1/predict", files=[("image", (f"{CANARY}.png", CANARY.encode())), (CANARY, CANARY.encode())])
    client.post("/v1/predict", json={"images": [CANARY], CANARY: CANARY})
    body = {"records": [CANARY], "owners": [CANARY], "request": CANARY, "requester": CANARY, "reason": CANARY}
    client.post("/v1/erasures", json=body)
    client.get(f"/v1/erasures/{CANARY}", headers={"Authorization": f"Bearer {CANARY}", "User-Agent": CANARY})
    client.get(f"/{CANARY}?state={CANARY}")
    client.request(CANARY.upper(), "/v1/model")

    def fail(*_):
        raise RuntimeError(CANARY)

    with monkeypatch.context() as patch:
        patch.setattr(requests, "page", fail)
        failed = client.get("/v1/erasures")
    assert failed.status_code == 500 and CANARY not in failed.text
    assert CANARY not in client.get("/metrics").text.lower()
    own = [each.getMessage() for each in caplog.records if each.name.partition(".")[0] not in ("httpx", "httpcore")]
    own = [line for line in own if " HTTP/1.1" not in line]  # of uvicorn's access log, which pytest brings back
    assert any("/v1/erasures/{request}" in line for line in own) and any("RuntimeError in" in line for line in own)
    assert CANARY not in str(own).lower()


def test_the_command_makes_tokens_that_the_service_takes(tmp_path, capsys):
    path = tmp_path / "tokens.json"
    code, out, _ = call(capsys, "tokens", f"--tokens={path}", "--name=crm", "--role=predict", "--role=read")
    secret = out.splitlines()[0]
    assert code == 0 and secret not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert Guard(path).caller_of(f"Bearer {secret}") == Caller("crm", frozenset({"predict", "read"}))
    assert "--name=crm: has a token" in refused(capsys, "tokens", f"--tokens={path}", "--name=crm", "--role=read")
    message = refused(capsys, "tokens", f"--tokens={path}", "--role=all")
    assert "--name=: must be" in message and "legal: predict, erase, read" in message
    assert "cannot be" in refused(capsys, "tokens", f"--tokens={path}/x", "--name=a", "--role=read")


def test_commands_at_once_lose_no_token(tmp_path, monkeypatch):
    """Each would write what it read before the others wrote."""
    monkeypatch.setattr(auth, "write_json", lambda *arguments: (time.sleep(0.05), write_json(*arguments)))
    names = [f"desk {number}" for number in range(3)]
    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: make_token(tmp_path / "made" / "tokens.json", name, ["read"]), names))
    assert sorted(token.caller.name for token in read_tokens(tmp_path / "made" / "tokens.json")) == names


def test_millions_of_wrong_elements_have_a_short_answer(server):
    for address, body in (
        ("/v1/predict", {"images": [1] * 100_000}),
        ("/v1/erasures", {"owners": [1] * 100_000}),
        ("/v1/rectifications", {"edits": [1] * 100_000}),
    ):
        answer = server.client.post(address, json=body)
        assert answer.status_code == 422 and len(answer.json()["errors"]) == 1, address


@pytest.mark.slow
def test_a_repeated_request_cannot_change_its_mode(workdir):
    with serving(workdir) as server:
        first, second = sorted(server.records())[:2]

        def status(request, **details):
            record = {"quarantined": first, "moded": second}[request]
            return server.client.post(
                "/v1/erasures", json={"records": [record], "request": request, **details}
            ).status_code

        assert status("quarantined", quarantine=True) == 202 and status("quarantined", mode="newton") in (409, 422)
        assert status("moded", mode="newton") == 202 and status("moded", mode="newton") == 202
        assert status("moded", mode="warm") == 409 and status("moded", quarantine=True) == 422
        assert status("moded") == 202
        states = {
            each["id"]: (each["mode"], each["quarantine"])
            for each in server.client.get("/v1/erasures").json()["erasures"]
        }
        assert states == {"quarantined": ("exact", True), "moded": ("newton", False)}
        with server.service.catalog() as catalog:  # as the worker does where no slice can stand in
            requests.note(catalog, "moded", mode="exact", problem="it did not converge")
        assert status("moded", mode="newton") == 202 and status("moded") == 202


@pytest.mark.slow
def test_what_no_slice_of_a_new_method_can_do_is_refused(workdir, capsys):
    with serving(workdir) as server:
        assert call(capsys, "train", f"--workdir={workdir}", "--retune", "--config.tuning.method=ridge")[0] == 0
        body = {"records": [min(server.records())], "mode": "newton"}
        answer = server.client.post("/v1/erasures", json=body)
        assert answer.status_code == 422 and "ridge" in answer.json()["detail"], answer.text
