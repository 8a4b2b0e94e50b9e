"""The console in a real browser: ask, watch it finish, verify."""

import contextlib
import shutil

import numpy as np
import pytest
from browser import Browser
from servers import process, wait_until

from lmeraser_jax.service.auth import make_token
from lmeraser_jax.storage.catalog import Catalog
from lmeraser_jax.storage.workdir import Layout

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_ask_watch_it_finish_and_verify(trained_workdir, tmp_path):
    tokens, layout = tmp_path / "tokens.json", Layout(trained_workdir)
    secret = make_token(tokens, "officer", ["read", "erase"])
    with contextlib.closing(Catalog(layout.catalog)) as catalog:
        record = catalog.live("train").ids[0]
    with (
        process(trained_workdir, f"--tokens={tokens}", log=tmp_path / "log") as server,
        contextlib.closing(Browser(str(CHROMIUM), tmp_path / "profile")) as browser,
    ):
        address = server.client.base_url.netloc.decode()
        browser.open(f"http://officer:{secret}@{address}/erase")
        browser.type("records", f"{record}\nnobody")
        browser.press("button.main")
        assert "unknown records: nobody" in browser.text("[role=alert]")
        check_screens(browser)
        browser.type("records", record)
        browser.type("request", "ticket-1")
        browser.press("button.main")
        assert browser.text(".figures dd") == "1" and browser.text("button.danger") == "Erase 1 record for good"
        check_screens(browser)
        browser.press("button.danger")
        assert browser.evaluate("location.pathname") == "/requests/ticket-1"
        wait_until(lambda: is_finished(browser), 120)  # the page loads itself again
        check_screens(browser)
        browser.press("a.button")
        assert browser.text("[role=status]").startswith("Verified:")
        for path in ("/", "/receipts?verify=true"):
            browser.open(f"http://{address}{path}")
            check_screens(browser)
            assert "ticket-1" in browser.text("main")
            assert record not in browser.evaluate("document.documentElement.outerHTML")
        assert browser.text("[role=status]").startswith("Verified:")
    assert layout.receipt("ticket-1").is_file()


def is_finished(browser: Browser) -> bool:
    try:
        return browser.evaluate("document.readyState == 'complete' && !!document.getElementById('receipt')")
    except AssertionError:  # the page went away meanwhile
        return False


def check_screens(browser: Browser) -> None:
    """There is something on the page, light or dark as asked for, and it is no wider than the screen."""
    for width, scheme in SCREENS:
        pixels = browser.screenshot(width, scheme)
        assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert pixels.shape[1] == width and len(np.unique(pixels[..., 0])) > 20  # not blank
        assert (pixels.mean() > 128) == (scheme == "light")
