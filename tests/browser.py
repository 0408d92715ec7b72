"""A headless Chromium that tests drive by its DevTools protocol over a pipe: no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowUp": (38, ""), "ArrowDown": (40, "")}


class Browser:
    """A running browser; `page()` opens one with storage of its own, as another person's browser would have."""

    def __init__(self, profile: Path) -> None:
        to_browser, our_end = os.pipe()
        self._read, from_browser = os.pipe()
        self._write = our_end

        def ends() -> None:  # the protocol is spoken on the descriptors 3 and 4
            a, b = os.dup(to_browser), os.dup(from_browser)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
             "--disable-background-networking", "--disable-dev-shm-usage", f"--user-data-dir={profile}"],
            preexec_fn=ends, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._held, self._number = b"", 0
        self.said: list[dict[str, Any]] = []  # events that nobody waited for

    def ask(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """A command's result. Raises RuntimeError for what the browser refuses."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])
            self.said.append(found)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(message))

    def page(self, address: str, width: int = 1000, height: int = 760) -> Page:
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        made = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable", session)
        self.ask(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        made.go(address)
        return made

    def close(self) -> None:
        for end in (self._write, self._read):
            os.close(end)
        self._process.kill()
        self._process.wait()


class Page:
    """One page. `js` evaluates an expression; keys are those of a keyboard, as the browser itself makes them."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def go(self, address: str) -> None:
        self.browser.ask("Page.navigate", self.session, url=address)
        self.wait("document.readyState === 'complete'")

    def js(self, code: str) -> Any:
        found = self.browser.ask(
            "Runtime.evaluate", self.session, expression=code, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{code}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, code: str, seconds: float = 60) -> Any:
        """The value of an expression when it is true; one that throws, on a page that is being loaded, is not."""

        def get() -> Any:
            try:
                return self.js(code)
            except RuntimeError:
                return None

        return waited(get, code, seconds)

    def key(self, key: str, modifiers: int = 0) -> None:
        """Press a key; `modifiers` 2 is Ctrl."""
        code, text = KEYS.get(key, (ord(key[0].upper()), key))
        said = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        down = said | ({"type": "keyDown", "text": text} if text and not modifiers else {"type": "rawKeyDown"})
        self.browser.ask("Input.dispatchKeyEvent", self.session, **down)
        self.browser.ask("Input.dispatchKeyEvent", self.session, **said, type="keyUp")

    def write(self, text: str) -> None:
        """Put a text where the caret is."""
        self.browser.ask("Input.insertText", self.session, text=text)

    def picture(self, path: Path) -> None:
        found = self.browser.ask("Page.captureScreenshot", self.session, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def errors(self) -> list[str]:
        """What went wrong in the page's script, or was refused by its policy."""
        self.js("0")
        out = []
        for said in self.browser.said:
            if said.get("sessionId") == self.session:
                if said["method"] == "Runtime.exceptionThrown":
                    out.append(str(said["params"]["exceptionDetails"]))
                entry = said["params"].get("entry", {})
                if entry.get("source") in ("security", "javascript"):
                    out.append(entry["text"])
        return out


def waited(get: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What `get` gives when it is true; an AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := get():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")
