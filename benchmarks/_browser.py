"""A headless Chromium or Chrome, driven over the DevTools protocol through two pipes: standard library only."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
OURS = ("file:", "data:", "about:", "blob:")
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", "--disable-dev-shm-usage"),
)


def find() -> str | None:
    """The browser's program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._number, self._rest, self._session = 0, b"", ""
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def close(self) -> None:
        """Let go of the pipes."""
        self._out.close()
        self._in.close()

    def wait(self, event: str) -> None:
        """Until the browser tells of it."""
        while self._read().get("method") != event:
            pass

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in.fileno(), 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def show(self, file: Path, width: int, *, dark: bool = False, printed: bool = False, height: int = 844) -> None:
        """Open a file at a width, in CSS pixels."""
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if printed else "screen", features=[scheme])
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of an expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def overflow(self) -> tuple[int, list[str]]:
        """(CSS pixels that the page is wider than the window, what reaches out of it)."""
        script = """(() => {
            const wide = document.documentElement.clientWidth;
            const inside = element => element.parentElement && element.parentElement.closest('.scroll');
            const out = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > wide + 1 && !inside(e));
            return [document.documentElement.scrollWidth - wide, out.slice(0, 9).map(
                e => e.tagName + ' ' + (e.textContent || '').slice(0, 40))];
        })()"""
        wide, names = self.evaluate(script)
        return int(wide), list(names)

    def picture(self, scale: float = 1.0) -> bytes:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": scale}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """As it is printed, on A4."""
        answer = self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(answer["data"])

    @property
    def foreign(self) -> list[str]:
        """Requests that left the file."""
        return [url for url in self.requests if not url.startswith(OURS)]


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A page in a browser of its own, which ends with it."""
    child_in, to_browser = os.pipe()
    from_browser, child_out = os.pipe()

    def pipes() -> None:  # the protocol's pipes are 3 and 4
        first, second = os.dup(child_in), os.dup(child_out)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *SWITCHES, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=pipes,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_in)
        os.close(child_out)
        page: Page | None = None
        try:
            page = Page(to_browser, from_browser)
            yield page
        finally:
            process.terminate()
            process.wait()
            if page is not None:
                page.close()
