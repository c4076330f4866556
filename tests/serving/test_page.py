"""The web page in a browser: headless Chromium, driven over its debugging protocol, on a scripted engine."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time

import pytest
import uvicorn

from dsv3_jax.serving.server import Address, bind
from tests.serving.test_server import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (apt install chromium)")


class Browser:
    """One page. Messages are JSON on two pipes, each ended by a zero byte."""

    def __init__(self, folder):
        from_browser, its_out = os.pipe()
        its_in, self._to_browser = os.pipe()
        self._answers = os.fdopen(from_browser, "rb")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        command = " ".join([CHROMIUM, *options, f"--user-data-dir={folder}", f"3<&{its_in} 4>&{its_out} 2>/dev/null"])
        self.process = subprocess.Popen(["bash", "-c", f"exec {command}"], pass_fds=(its_in, its_out))
        os.close(its_in)
        os.close(its_out)
        self._count, self._session = 0, None

    def send(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:  # others are events
            raw = b""
            while not raw.endswith(b"\0"):
                byte = self._answers.read(1)
                assert byte, "the browser has ended"
                raw += byte
            answer = json.loads(raw[:-1])
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url):
        target = self.send("Target.createTarget", url=url)["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.until("document.readyState === 'complete' && document.querySelector('#prompt') !== null")

    def value(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=20):
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}; the page says {self.value(TEXT)!r}"
            time.sleep(0.05)

    def type(self, text):
        self.value("document.querySelector('#prompt').focus()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = dict(
                key="Enter", code="Enter", windowsVirtualKeyCode=13, **({"text": "\r"} if kind == "keyDown" else {})
            )
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def click(self, element):
        self.value(f"document.querySelector('{element}').click()")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._to_browser)
        self._answers.close()


TEXT = "document.body.innerText"
IDLE = "!document.querySelector('#send').disabled"


@contextlib.contextmanager
def on_page(folder, *arguments, **how):
    """A browser that looks at the page of a server of `Served`."""
    served, bound = Served(*arguments, **how), bind(Address(port=0))
    server = uvicorn.Server(uvicorn.Config(served.server.app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    browser = Browser(folder)
    try:
        browser.open(f"http://127.0.0.1:{bound.getsockname()[1]}/")
        yield served, browser
    finally:
        browser.close()
        server.should_exit = True
        thread.join()


def said(browser, kind):
    return browser.value(f"[...document.querySelectorAll('.{kind}')].map((box) => box.innerText.trim())")


def test_a_chat(tmp_path):
    """Two turns: the answers stream in, the second request holds the first turn, and the figures are shown."""
    with on_page(tmp_path, "Hello wörld <b>", pause=0.01) as (served, browser):
        browser.until("document.querySelector('#model').textContent === 'tiny'")
        for turn in (1, 2):
            browser.type(f"question {turn}")
            browser.until(f"document.querySelectorAll('.assistant').length === {turn} && {IDLE}")
        assert said(browser, "user") == ["question 1", "question 2"]
        assert said(browser, "assistant") == ["Hello wörld <b>"] * 2  # never as HTML
        figures = browser.value("document.querySelector('#figures').textContent")
        assert figures.startswith("17 tokens, ")
        assert " tokens/s, first after " in figures
        prompt = bytes(t for t in served.engine.requests[1].prompt if t < 256).decode()
        assert "<user>question 1" in prompt
        assert "<assistant>Hello wörld <b>" in prompt
        assert "<user>question 2" in prompt


def test_stop_and_new_chat(tmp_path):
    """Both end the request; what came before it stays on the page, or in no later chat."""
    with on_page(tmp_path, "x" * 150, pause=0.05) as (served, browser):
        browser.type("first")
        browser.until("document.querySelector('.assistant').innerText.includes('xx')")
        browser.click("#stop")
        browser.until(IDLE)
        assert set(said(browser, "assistant")[0]) == {"x"}
        assert len(said(browser, "assistant")[0]) < 150
        browser.type("second")
        browser.until("document.querySelectorAll('.assistant').length === 2")
        browser.click("#clear")
        browser.until(IDLE)
        assert said(browser, "user") == said(browser, "assistant") == said(browser, "error") == []
        browser.type("third")
        browser.until("document.querySelector('.assistant').innerText.includes('xx')")
        prompt = bytes(t for t in served.engine.requests[-1].prompt if t < 256).decode()
        assert "third" in prompt
        assert "first" not in prompt
        assert "second" not in prompt


def test_an_error_and_the_raw_completion(tmp_path):
    """An error of the server is shown and leaves the page usable; without a chat template, text is continued."""
    with on_page(tmp_path, "more", template=None) as (served, browser):
        browser.value("document.querySelector('#tokens').value = 50")
        browser.type("a question")
        browser.until(f"document.querySelectorAll('.error').length === 1 && {IDLE}")
        browser.click("#raw")
        browser.type("once upon")
        browser.until(f"document.querySelectorAll('.assistant').length === 2 && {IDLE}")
        assert said(browser, "assistant")[1] == "more"
        assert bytes(t for t in served.engine.requests[-1].prompt if t < 256) == b"once upon"


def test_the_api_key(tmp_path):
    """Requests without it are refused in words; with it they are answered."""
    with on_page(tmp_path, "yes", address=Address(api_key="secret")) as (served, browser):
        browser.type("may I?")
        browser.until(f"document.querySelectorAll('.error').length === 1 && {IDLE}")
        assert "API key" in said(browser, "error")[0]
        browser.value("document.querySelector('#key').value = 'secret'")
        browser.type("now?")
        browser.until(f"document.querySelectorAll('.assistant').length === 2 && {IDLE}")
        assert said(browser, "assistant")[1] == "yes"
        assert b"may I?" not in bytes(t for t in served.engine.requests[-1].prompt if t < 256)  # it had no answer
