"""A headless Chromium over its debugging pipe, and what a page has to be like in it: nothing overlaps, nothing is cut off, no complaint."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
           "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars")  # fmt: skip

# Texts by where they are drawn; two that share more than a pixel in both directions overlap, one beyond its box or the page is cut off.
PROBLEMS = """
(() => {
  const found = [], texts = [], page = document.scrollingElement, shown = s => s.trim().slice(0, 40);
  if (page.scrollWidth > window.innerWidth + 1) found.push(`the page is ${page.scrollWidth} wide in ${window.innerWidth}`);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const owner = node.parentElement;
    if (!node.data.trim() || owner.closest('title, style, script')) continue;
    if (!owner.checkVisibility({contentVisibilityAuto: true, checkVisibilityCSS: true})) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    for (const box of owner.closest('svg') ? [owner.getBoundingClientRect()] : range.getClientRects()) {
      if (box.width < 1 || box.height < 1) continue;
      texts.push([box.left, box.top + scrollY, box.right, box.bottom + scrollY, shown(node.data), node]);
      if (box.left < -1 || box.right > window.innerWidth + 1) found.push(`cut off at the page's edge: ${shown(node.data)}`);
      const frame = owner.closest('svg')?.getBoundingClientRect();
      if (frame && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1))
        found.push(`outside of its chart: ${shown(node.data)}`);
    }
  }
  for (const element of document.querySelectorAll('td, th, pre, figure, .tile, p, li, summary'))
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
      found.push(`<${element.tagName}> holds more than it shows: ${shown(element.textContent)}`);
  texts.sort((a, b) => a[1] - b[1]);
  texts.forEach((a, i) => {
    for (let j = i + 1; j < texts.length && texts[j][1] < a[3] - 1.5; j++) {
      const b = texts[j];
      if (a[5] !== b[5] && Math.min(a[2], b[2]) - Math.max(a[0], b[0]) > 1.5 && Math.min(a[3], b[3]) - b[1] > 3)
        found.push(`${a[4]} | overlaps | ${b[4]}`);
    }
  });
  return [found, texts.length];
})()
"""


def chromium() -> str | None:
    """The browser's program, if there is one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Browser:
    """One page of a browser that is closed at the end of the `with`. `events`: what it told besides answers, in order."""

    program: str
    events: list[dict[str, Any]] = field(default_factory=list)
    _number: int = 0
    _buffer: bytes = b""
    _session: str | None = None

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        (there, self._write), (self._read, back) = os.pipe(), os.pipe()

        def pipes() -> None:  # the browser reads from 3 and writes to 4
            source, sink = os.dup(there), os.dup(back)
            os.dup2(source, 3)
            os.dup2(sink, 4)

        command = [self.program, *OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._write)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 2**16)
            assert piece, "the browser has ended"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def show(self, file: Path, *, width: int, dark: bool = False, paper: bool = False, opened: bool = False) -> None:
        """Load a page as a screen of `width`, or as paper of that width; `opened`: with every <details> open."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=scheme)
        self.events.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        if opened:
            self.value("document.querySelectorAll('details').forEach(one => one.open = true)")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def problems(self) -> list[str]:
        """What is wrong with the page as it is shown."""
        found, texts = self.value(PROBLEMS)
        assert texts > 20, "the check sees the texts"
        return list(dict.fromkeys(found))

    def complaints(self) -> list[str]:
        """What the console says, and every request beyond the file itself."""
        said = []
        for event in self.events:
            method, told = event.get("method"), event.get("params", {})
            if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                said.append(json.dumps(told)[:300])
            if method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
                said.append(f"asks for {told['request']['url']}")
        return said

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
