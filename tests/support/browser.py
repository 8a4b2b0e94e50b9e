"""A headless Chromium, driven by its DevTools protocol over a pipe: JSON messages that end with a zero byte."""

import base64
import io
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Browser:
    """One page. Raises `AssertionError` where the browser reports an error."""

    def __init__(self, program: str, profile: Path):
        from_us, self._to_browser = os.pipe()
        self._from_browser, from_browser = os.pipe()
        redirected = f'exec "$@" 3<&{from_us} 4>&{from_browser}'  # the descriptors of the protocol
        command = ["bash", "-c", redirected, "bash", program, *FLAGS, f"--user-data-dir={profile}"]
        command += ["--remote-debugging-pipe", "about:blank"]
        log = open(profile.with_suffix(".log"), "wb")
        with log:
            self._process = subprocess.Popen(command, pass_fds=(from_us, from_browser), stdout=log, stderr=log)
        os.close(from_us)
        os.close(from_browser)
        self._messages, self._numbers = b"", itertools.count(1)
        self._session: dict[str, str] = {}
        pages = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")

    def close(self) -> None:
        os.close(self._to_browser)
        os.close(self._from_browser)
        self._process.terminate()
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        answer = self._read_until(lambda each: each.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read_until(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._messages:
                chunk = os.read(self._from_browser, 1 << 20)
                assert chunk, "the browser has ended"
                self._messages += chunk
            raw, _, self._messages = self._messages.partition(b"\0")
            message = json.loads(raw)
            if wanted(message):
                return message

    def _wait_for_page(self) -> None:
        self._read_until(lambda each: each.get("method") == "Page.loadEventFired")

    def open(self, address: str) -> None:
        assert "errorText" not in self.call("Page.navigate", url=address)
        self._wait_for_page()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, name: str, text: str) -> None:
        """Types into the field of a form."""
        self.evaluate(f"document.getElementById({json.dumps(name)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, selector: str) -> None:
        """Presses a button or follows a link, and waits for the next page."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")
        self._wait_for_page()

    def screenshot(self, width: int, scheme: str) -> np.ndarray:
        """The whole page uint8 [h, w, 3] at a width, in the color scheme "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
