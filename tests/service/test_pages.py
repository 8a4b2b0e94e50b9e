"""The console's pages, of a service whose threads do not run: nothing is predicted and nothing is served meanwhile."""

import contextlib
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from helpers import small_run

from lmeraser_jax.service import pages
from lmeraser_jax.service.app import create_app
from lmeraser_jax.service.auth import make_token
from lmeraser_jax.service.settings import Settings
from lmeraser_jax.storage import requests
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.rows import Edit
from lmeraser_jax.storage.workdir import Layout
from lmeraser_jax.unlearning import binding, erase

pytestmark = pytest.mark.usefixtures("fast")
ADDRESSES = ("/", "/erase", "/receipts", "/receipts?verify=true", "/requests/done", "/requests/done?verify=true")
HOSTILE = ['"><script>x</script>', "</textarea><b>", "{{ 7*7 }}", " a\u2028b ", "a,'b'", "&lt;", "ü\u202e"]


class Reader(HTMLParser):
    """What a page holds, as a browser reads it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}  # of fields of forms, by name
        self.visible, self._field = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag == "input" and (values.get("type") != "checkbox" or "checked" in values):
            self.texts[values["name"]] = values["value"]
        if tag == "textarea":
            self._field = values["name"]
            self.texts[self._field] = ""

    def handle_endtag(self, tag):
        self._field = ""

    def handle_data(self, data):
        if self._field:  # a newline right behind the tag is not part of the text
            self.texts[self._field] = (self.texts[self._field] + data).removeprefix("\n")
        self.visible += data


@pytest.fixture(scope="module")
def template(fast, fast_template, tmp_path_factory) -> Path:
    """A workdir with a finished request."""
    root = Path(shutil.copytree(fast_template, tmp_path_factory.mktemp("pages") / "run"))
    with small_run(root) as run:
        erase.request_erasure(run, [run.catalog.live("train").ids[0]], request="done", reason="<i>asked</i>")
    return root


@pytest.fixture
def workdir(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def client_of(root: Path, tokens: Path | None = None, **options) -> TestClient:
    layout = Layout(root)
    config = binding.stored_config(layout)
    assert config is not None
    app = create_app(Settings(layout, config, tokens=tokens))
    return TestClient(app, "http://127.0.0.1", follow_redirects=False, **options)


@contextlib.contextmanager
def catalog_of(root: Path):
    with contextlib.closing(Catalog(root / "catalog.db")) as catalog:
        yield catalog


def test_pages_have_headings_labels_and_nothing_from_elsewhere(workdir):
    client = client_of(workdir)
    form = client.post("/erase", data={"records": live(workdir)[0]}).text
    for text in (*(client.get(address).text for address in ADDRESSES), client.get("/requests/none").text, form):
        page = Reader(text)
        names = [tag for tag, _ in page.tags]
        assert [names.count(tag) for tag in ("h1", "main", "header", "nav", "title")] == [1] * 5
        assert not {"script", "style", "img"} & set(names)
        labelled = {values.get("for") for tag, values in page.tags if tag == "label"}
        for tag, values in page.tags:
            assert not {"style", "onclick"} & values.keys()
            assert all(values.get(name, "/")[0] in "/?#" for name in ("href", "src", "action")), values
            assert tag != "th" or "scope" in values
            if tag == "textarea" or tag == "input" and "type" not in values:
                assert values["id"] in labelled


def live(root: Path) -> list[str]:
    with catalog_of(root) as catalog:
        return list(catalog.live("train").ids)


def test_each_page_needs_its_role(workdir, tmp_path):
    tokens = tmp_path / "tokens.json"
    secrets = {role: make_token(tokens, role, [role]) for role in ("read", "erase", "predict")}
    client = client_of(workdir, tokens)
    for address in ADDRESSES:
        allowed = {"/erase": {"erase"}, "/requests": {"read", "erase"}}.get(address[:9].split("?")[0], {"read"})
        for role, secret in secrets.items():
            answer = client.get(address, auth=("anyone", secret))
            assert answer.status_code == (200 if role in allowed else 403), (address, role)
        for answer in (client.get(address), client.get(address, auth=("read", "wrong"))):
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic ")
            assert "a token is needed" in Reader(answer.text).visible
    assert client.post("/erase", data={"step": "erase"}, auth=("", secrets["read"])).status_code == 403

    def body():
        raise AssertionError("the body of a caller without a token is not read")
        yield b""

    assert client.post("/erase", content=body()).status_code == 401
    assert client.get("/console.css").status_code == 200


def test_the_form_estimates_and_erases_what_was_estimated_once(workdir):
    client, (first, second, *_) = client_of(workdir), live(workdir)
    data = {"records": f"{first}\r\n\r\n{second}", "reason": "art. 17", "quarantine": "true", "step": "estimate"}
    estimate = client.post("/erase", data=data)
    page = Reader(estimate.text)
    assert estimate.status_code == 200 and "Erase 2 records for good" in page.visible
    assert page.texts["records"].split() == [first, second] and page.texts["quarantine"] == "true"
    buttons = [values["value"] for tag, values in page.tags if tag == "button"]
    assert buttons == ["change", "erase"]  # the Enter key presses the first
    name = page.texts["request"]
    with catalog_of(workdir) as catalog:
        assert requests.get(catalog, name) is None
    again = Reader(client.post("/erase", data=page.texts | {"step": "change"}).text)
    assert again.texts | {"quarantine": "true"} == page.texts and "estimate" in str(again.tags)
    for _ in range(2):  # pressed twice
        answer = client.post("/erase", data=page.texts | {"step": "erase"})
        assert (answer.status_code, answer.headers["location"]) == (303, f"/requests/{name}")
    with catalog_of(workdir) as catalog:
        (request,) = requests.listed(catalog, only_open=True)
    assert len(request.body["records"]) == 2 and request.body["quarantine"] and request.body["reason"] == "art. 17"
    waiting = client.get(f"/requests/{name}").text
    assert 'http-equiv="refresh"' in waiting and "art. 17" in waiting
    overview = Reader(client.get("/").text).visible
    assert "Requests1" in overview and "Accepted1" in overview
    for address in ("/", f"/requests/{name}", "/receipts?verify=true"):
        assert first not in client.get(address).text


@pytest.mark.parametrize("step", ["estimate", "erase"])
def test_errors_stand_on_the_form_with_what_was_typed(workdir, step):
    client, typed = client_of(workdir), "\n".join(HOSTILE)
    data = {"records": typed, "owners": typed, "request": "t-1", "requester": HOSTILE[0], "quarantine": "true"}
    answer = client.post("/erase", data=data | {"step": step})
    page = Reader(answer.text)
    assert answer.status_code == 422 and page.texts == data | {"reason": ""}
    assert "nothing is erased:\n- unknown records: " in page.visible and "owners: " in page.visible
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    empty = client.post("/erase", data={"step": step})
    assert empty.status_code == 422 and "say what to erase" in empty.text
    other = client.post("/erase", data={"records": live(workdir)[0], "request": "done", "step": "erase"})
    assert other.status_code == 409 and "was used for another request" in other.text
    with catalog_of(workdir) as catalog:
        assert not requests.any_open(catalog)


def test_names_are_lines_as_they_stand_however_many(workdir):
    text = "\n".join(f"{number} {'x' * 1000}" for number in range(1200))  # more than starlette's default
    many = client_of(workdir).post("/erase", data={"records": text})
    assert many.status_code == 422 and "(1200 in all)" in many.text
    assert pages._names(" a\r\n\r\n b,\u2028c \n\t\nd\x0be") == [" a", " b,\u2028c ", "d\x0be"]


def test_a_form_of_another_site_is_refused(workdir):
    client, data = client_of(workdir), {"records": live(workdir)[0], "step": "erase"}
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://elsewhere.example"}, {"Origin": "null"}):
        assert client.post("/erase", data=data, headers=headers).status_code == 403
    same = {"Sec-Fetch-Site": "same-origin", "Origin": "http://127.0.0.1"}
    assert client.post("/erase", data=data, headers=same).status_code == 303


def test_a_finished_request_shows_its_receipt_and_whether_it_holds(workdir):
    client = client_of(workdir)
    page = Reader(client.get("/requests/done?verify=true").text)
    assert "Verified:" in page.visible and "<i>asked</i>" in page.visible and "refresh" not in str(page.tags)
    address = "/v1/erasures/done/receipt"
    assert address in str(page.tags) and client.get(address).status_code == 200
    assert "1 receipt" in Reader(client.get("/receipts?verify=true").text).visible
    layout = Layout(workdir)
    layout.receipt("done").write_text(layout.receipt("done").read_text().replace("asked", "wanted"))
    for path in layout.slices.iterdir():
        shutil.rmtree(path)
    for address in ("/requests/done?verify=true", "/receipts?verify=true"):
        text = client.get(address).text
        assert "failed:" in text and "was edited" in text and "cannot be read" in text and str(workdir) not in text


def test_requests_are_filtered_and_shown_a_page_at_a_time(workdir, monkeypatch):
    monkeypatch.setattr(pages, "ROWS", 2)
    client, names = client_of(workdir), live(workdir)
    for number in range(3):
        client.post("/erase", data={"records": names[number], "request": f"r{number}", "step": "erase"})

    def shown(address: str) -> tuple[list[str], str]:
        text = client.get(address).text
        return re.findall(r'href="/requests/([^"]+)"', text), "".join(re.findall('href="([^"]+)">Older', text))

    first, older = shown("/")
    second, last = shown(older.replace("&amp;", "&"))
    assert (first, second, last) == (["r2", "r1"], ["r0", "done"], "")
    assert shown("/?show=purged")[0] == ["done"] and shown("/?show=waiting&after=r1")[0] == ["r0"]
    assert shown("/?kind=rectify")[0] == []
    for query, legal in (("show=strange", ", ".join(pages.CHOICES)), ("kind=strange", "all, erase, rectify")):
        answer = client.get(f"/?{query}")
        assert answer.status_code == 422 and f"is strange; legal: {legal}" in Reader(answer.text).visible


def test_erased_records_are_counted_without_owners_and_rectified_ones(workdir):
    with catalog_of(workdir) as catalog:
        first, second, *_ = catalog.live("train").ids
        owner = catalog.live("train").owners[0]
        edit = Edit(second, 0, "content", np.zeros(64, np.uint8))
        requests.accept_edits(catalog, "given", lambda: [edit])
        assert requests.count_erased(catalog) == 1
        erasure = requests.accept(catalog, [first], [owner]).body
        assert erasure["shared"] == [catalog.salted("tombstone", second)]  # the owner's, too: now its new version is
        assert requests.count_erased(catalog) == 1 + len(erasure["records"]) + 1
