"""A headless Chromium that opens one file and tells what happened, over its debugging pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)

# Of every image: its own size, and where it stands on the page.
_IMAGES = """
Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() =>
  [...document.images].map(image => {
    const box = image.getBoundingClientRect();
    return {natural: image.naturalWidth, width: box.width, height: box.height, left: box.left, right: box.right,
            shown: image.checkVisibility(), source: image.currentSrc.length};
  }))
"""


@dataclass
class Seen:
    """What a page did and how it looked.

    Attributes:
        messages: of the console and of uncaught errors.
        requests: the addresses that were asked for.
        images: size and place of every image.
        page_width: how wide the page's content is; more than the window's width is a page that scrolls sideways.
        colour: of the page's background.
        result: what the script given to `open` returned.
    """

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    page_width: float = 0
    colour: str = ""
    result: Any = None


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

    def open(self, path: Path, width: int, dark: bool = False, script: str = "") -> Seen:
        """Open a file in a window of this width, wait for its images, run a script if there is one, and look."""
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
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())
        seen = Seen(images=self._value(session, _IMAGES))
        seen.result = self._value(session, script) if script else None
        seen.page_width = self._value(session, "document.documentElement.scrollWidth")
        seen.colour = self._value(session, "getComputedStyle(document.body).backgroundColor")
        for event in self._events:
            content = event.get("params", {})
            if event["method"] == "Network.requestWillBeSent":
                seen.requests.append(content["request"]["url"])
            elif event["method"] == "Runtime.consoleAPICalled":
                seen.messages.append(json.dumps(content["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                seen.messages.append(json.dumps(content["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                seen.messages.append(content["entry"]["text"])
        self._call("Target.closeTarget", targetId=target)
        return seen

    def _value(self, session: str, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", session, expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"]["value"]

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
