"""A headless Chromium that opens one file and tells what happened, over its debugging pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)

# What a page looks like once its images are there; of every image, its own size, and where it stands on the page.
_LOOK = """
Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => ({
  images: [...document.images].map(image => {
    const box = image.getBoundingClientRect();
    return {natural: image.naturalWidth, width: box.width, height: box.height, left: box.left, right: box.right,
            shown: image.checkVisibility(),
            source: [...image.currentSrc].reduce((sum, letter) => (31 * sum + letter.charCodeAt(0)) | 0, 0)};
  }),
  result: RESULT,
  page_width: document.documentElement.scrollWidth,
  colour: getComputedStyle(document.body).backgroundColor,
}))
"""


class Browser:
    """One process, for as long as the context lasts."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        assert CHROMIUM
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        command = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "chromium", CHROMIUM, *_FLAGS, f"--user-data-dir={self._profile}"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._incoming = os.fdopen(self._read, "rb")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        self._incoming.close()

    def open(self, path: Path, width: int, dark: bool = False, script: str = "") -> SimpleNamespace:
        """Open a file in a window of this width, wait for its images, run a script if there is one, and look.

        Returns:
            What `_LOOK` found: `images`, the script's `result`, the background's `colour`, and `page_width`, which is
            more than the window's where the page scrolls sideways; the `messages` of its console and of uncaught
            errors; and `requests`, the addresses that it asked for.
        """
        self._events = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", session, features=scheme)
        self._call("Page.navigate", session, url=path.resolve().as_uri())
        while not self._told("Page.loadEventFired"):
            self._events.append(self._receive())
        look = _LOOK.replace("RESULT", script or "null")
        found = self._call("Runtime.evaluate", session, expression=look, awaitPromise=True, returnByValue=True)
        self._call("Target.closeTarget", targetId=target)
        messages = self._told("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        requests = [told["request"]["url"] for told in self._told("Network.requestWillBeSent")]
        return SimpleNamespace(messages=[*map(json.dumps, messages)], requests=requests, **found["result"]["value"])

    def _told(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self._events if event["method"] in methods]

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        message = bytearray()
        while (character := self._incoming.read(1)) != b"\0":
            assert character, "the browser has closed its pipe"
            message += character
        return dict(json.loads(message))
