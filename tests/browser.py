"""A real headless Chromium, driven through its DevTools protocol: `CHROMIUM_BIN`, or `chromium` or a Chrome on PATH."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = "no Chromium here: set CHROMIUM_BIN, or install Debian's package chromium"


def find_chromium() -> str | None:
    """Path of the browser; None where there is none."""
    return os.environ.get("CHROMIUM_BIN") or next((found for name in _NAMES if (found := shutil.which(name))), None)


@dataclass(eq=False)
class Tab:
    """One page that is open."""

    socket: aiohttp.ClientWebSocketResponse
    #: What its console said that is no mere information: errors, refused resources, exceptions.
    complaints: list[str] = field(default_factory=list)
    #: Everything that it has fetched.
    fetched: list[str] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; what happens meanwhile is noted."""
        number = next(self._numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=30)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 30.0) -> Any:
        """The first true value of an expression."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{expression} did not become true within {timeout_s:.0f} s; {self.complaints}") from None
        return value

    async def prefer(self, scheme: str) -> None:
        """dark or light."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self, path: Path) -> None:
        """The whole page, PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"].get("exception", parameters)))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.fetched.append(parameters["request"]["url"])


@asynccontextmanager
async def open_tab(folder: Path, url: str, width: int = 1440, height: int = 900, scheme: str = "dark") -> AsyncIterator[Tab]:
    """A browser of its own, with one tab on `url`; `folder` holds its profile. `scheme`: dark or light."""
    chromium = find_chromium()
    assert chromium is not None, NO_BROWSER
    profile = folder / "profile"
    flags = (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-extensions", "--remote-debugging-port=0", f"--user-data-dir={profile}",
        f"--window-size={width},{height}", "about:blank",
    )
    log = (folder / "chromium.log").open("wb")
    process = await asyncio.create_subprocess_exec(chromium, *flags, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            while not (profile / "DevToolsActivePort").is_file() or not (profile / "DevToolsActivePort").read_text().strip():
                assert process.returncode is None, (folder / "chromium.log").read_text()
                await asyncio.sleep(0.05)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (page, *_) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.call(f"{domain}.enable")
                await tab.prefer(scheme)
                await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
                await tab.call("Emulation.setScrollbarsHidden", hidden=True)
                await tab.call("Page.navigate", url=url)
                yield tab
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        log.close()
