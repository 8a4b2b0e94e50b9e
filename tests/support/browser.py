"""A headless Chromium, driven by its DevTools protocol over a pipe: JSON messages that end with a zero byte."""

import base64
import io
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--hide-scrollbars", "--remote-debugging-pipe")


class Browser:
    """One page. Raises `AssertionError` where the browser reports an error."""

    def __init__(self, program: str, folder: Path):
        from_test, self._input = os.pipe()
        self._output, from_browser = os.pipe()
        redirected = f'exec "$@" 3<&{from_test} 4>&{from_browser}'  # the descriptors of the protocol
        command = ["bash", "-c", redirected, "bash", program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        with open(folder.with_suffix(".log"), "wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(from_test, from_browser), stdout=log, stderr=log)
        os.close(from_test)
        os.close(from_browser)
        self._unread, self._numbers = b"", itertools.count(1)
        self._session: dict[str, str] = {}
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")

    def close(self) -> None:
        os.close(self._input)
        os.close(self._output)
        self._process.terminate()
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._input, json.dumps(message).encode() + b"\0")
        answer = self._read_until(lambda each: each.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read_until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            while b"\0" not in self._unread:
                chunk = os.read(self._output, 1 << 20)
                assert chunk, "the browser has ended"
                self._unread += chunk
            raw, _, self._unread = self._unread.partition(b"\0")
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

    def text(self, selector: str) -> str:
        """What the first such element shows; "" where there is none."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def type(self, name: str, text: str) -> None:
        """Types into a field of a form, in the place of what is there."""
        self.evaluate(f"document.getElementById({json.dumps(name)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, selector: str) -> None:
        """Presses a button or follows a link, and waits for the next page."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")
        self._wait_for_page()

    def screenshot(self, width: int, scheme: str) -> np.ndarray:
        """The whole page uint8 [h, w, 3] at a width in pixels, in the color scheme "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
