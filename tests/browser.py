"""Chromium without a window, driven through its DevTools protocol over a pipe.

    python tests/browser.py docs/page.png       # the picture of docs/index.html in the README
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


class Page:
    """One page. `errors` collects what goes wrong: exceptions, console errors, failed loads, and
    any request that leaves this machine."""

    def __init__(self, profile, width=1440, height=900, dark=False, still=True):
        """profile: an empty folder. dark: what the visitor's machine prefers. still: the visitor
        wants no motion, so that everything is drawn at once."""
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()

        def on_3_and_4():                # where --remote-debugging-pipe reads and writes
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
            for place, end in enumerate(ends, 3):
                os.dup2(end, place)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            close_fds=False, preexec_fn=on_3_and_4, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.replies, self.number, self.unread, self.session = {}, 0, b"", None
        self.errors, self.loaded = [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        features = [dict(name="prefers-color-scheme", value="dark" if dark else "light"),
                    dict(name="prefers-reduced-motion", value="reduce" if still else "")]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.size(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write_end)
        os.close(self.read_end)

    def call(self, method, **params):
        """Send a command; returns its result. Raises RuntimeError with the browser's own words."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        number = self.number
        while number not in self.replies:
            self.read()
        reply = self.replies.pop(number)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def read(self):
        """Take in what the browser says next."""
        while b"\0" not in self.unread:
            more = os.read(self.read_end, 1 << 20)
            if not more:
                raise RuntimeError("the browser has ended")
            self.unread += more
        content, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(content)
        if "id" in message:
            self.replies[message["id"]] = message
            return
        params, method = message["params"], message["method"]
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str([arg.get("value") for arg in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.errors.append(f"asks the network for {url}")

    def open(self, url):
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self.read()

    def size(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)

    def run(self, script):
        """The value of a JavaScript expression; promises are waited for."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{script}: {reply['exceptionDetails']['exception']['description']}")
        return reply["result"].get("value")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            text = key if kind == "keyDown" and len(key) == 1 else ""
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text)

    def picture(self, path, width, height):
        """Save a PNG of the upper left part of the page."""
        clip = dict(x=0, y=0, width=width, height=height, scale=1)
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True,
                        clip=clip)
        Path(path).write_bytes(base64.b64decode(got["data"]))


def main():
    docs = Path(__file__).resolve().parent.parent / "docs"
    with tempfile.TemporaryDirectory() as profile, Page(profile, width=1080) as page:
        page.open((docs / "index.html").as_uri())
        detail = "document.querySelector('#scene-words [data-detail]')"
        bottom = page.run(f"{detail}.getBoundingClientRect().bottom + scrollY")
        page.picture(sys.argv[1], 1080, bottom + 14)


if __name__ == "__main__":
    main()
