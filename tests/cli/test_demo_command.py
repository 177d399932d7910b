"""drift demo: what it refuses, and its page in a real browser."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_browser
from imports import ROOT
from PIL import Image
from project import free_port

from drift import cli
from drift.interop.recipe import Artist, Recipe, grid, read_recipe

ENVIRONMENT = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy")
GRADIO = "drift demo needs Gradio, of the extra demo"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back what the command changes in it for Gradio."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere"),
        (["--class", "dog"], "'dog'"),
        (["--class", "3"], "the classes are 0 to 2"),
        (["--weights", "ema_0.5"], "ema_05"),
        (["--device", "abacus"], "abacus"),
        (["--port", "70000"], "--port 70000"),
    ],
)
def test_it_refuses_in_one_line(refusal, arguments, told):
    pytest.importorskip("gradio", reason=GRADIO)
    assert told in refusal("demo", arguments)


def test_a_port_in_use_is_named_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli.main(["demo", "nowhere", "--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port {port}: is in use; name another\n"


def test_without_gradio_it_names_the_extra(monkeypatch, capsys, generator_folder):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "drift.interop.demo", raising=False)
    assert cli.main(["demo", str(generator_folder), "--port", str(free_port())]) == 2
    told = "error: drift demo needs Gradio: pip install -c constraints.txt -e '.[demo]'\n"
    assert capsys.readouterr().err == told


@pytest.fixture(scope="module")
def server(generator_folder):
    """The address of drift demo, which Ctrl-C ends without a word."""
    pytest.importorskip("gradio", reason=GRADIO)
    process = subprocess.Popen(
        [sys.executable, "-m", "drift.cli", "demo", generator_folder, "--port", str(free_port())],
        env={**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9", "no_proxy": "other"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        assert said.endswith("Ctrl-C ends it\n"), process.stderr.read()
        yield said.split()[0]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "")
    finally:
        process.kill()


class Page(Browser):
    """The page of drift demo; `folder` gets what is downloaded."""

    def __init__(self, url, folder, width, height):
        super().__init__(folder, width, height)
        self.call("Page.navigate", url=url)
        self.wait("!!document.querySelector('#picture img') && !!document.querySelector('#gallery img')")

    def source(self):
        return self.run("document.querySelector('#picture img').src")

    def picture(self):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.source().partition(",")[2]))))

    def changed(self, before):
        """Wait for another picture."""
        self.wait(f"document.querySelector('#picture img').src !== {before!r}")

    def drag(self, slider, share, moves):
        """Move the handle of slider number `slider` there in `moves` moves."""
        where = self.run(
            f"(() => {{ const all = document.querySelectorAll('input[type=range]'); all[{slider}]"
            f".scrollIntoView({{block: 'center'}}); const box = all[{slider}].getBoundingClientRect();"
            "return [box.left, box.right, box.top + box.height / 2] })()"
        )
        left, right, y = where
        mouse = {"y": y, "button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=left + 8, **mouse)
        for move in range(1, moves + 1):
            x = left + 8 + (right - left - 16) * share * move / moves
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, **mouse)
            time.sleep(0.02)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, **mouse)

    def values(self):
        """What all sliders stand at."""
        return self.run("[...document.querySelectorAll('input[type=range]')].map(slider => +slider.value)")

    def settled(self):
        """The picture, once it has not changed for a while."""
        before = None
        while before != (before := self.source()):
            time.sleep(1.0)
        return self.picture()


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_picture_follows_the_sliders(server, pipe, tmp_path, width, height):
    artist = Artist(pipe)
    page = Page(server, tmp_path, width, height)
    try:
        assert np.array_equal(page.picture(), drawn(artist, Recipe()))
        for slider in (0, 1, 2):  # omega, seeds, styles
            before = page.source()
            page.drag(slider, 0.5, moves=20)
            page.changed(before)
        shown, (omega, blend, swapped, *_) = page.settled(), page.values()
        assert 2 < omega < 3 and 0.4 < blend < 0.6 and swapped in (1, 2)
        recipe = Recipe(omega=omega, seed_blend=blend, style_blend=swapped)
        assert np.array_equal(shown, drawn(artist, recipe))

        page.run("document.querySelector('#gallery button[value=\"1\"]').click()")
        page.wait("document.querySelector('#picture img').alt.endsWith('cat')")
        page.run("document.querySelector('#save').click()")
        file = saved(tmp_path)
        assert re.fullmatch(r"cat-omega-2\.\d+-seed-0\.png", file.name)
        cat = Recipe(label=1, omega=omega, seed_blend=blend, style_blend=swapped)
        assert read_recipe(file) == (cat, artist.digest)
        assert np.array_equal(np.asarray(Image.open(file)), drawn(artist, cat))

        page.drag(1, 1.0, moves=2)
        page.settled()
        page.upload(file)
        page.wait(f"+document.querySelectorAll('input[type=range]')[1].value === {blend}")
        assert np.array_equal(page.settled(), drawn(artist, cat))

        assert page.run("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / f"{width}.png")
        assert page.console == []
        assert [url for url in page.requests if not url.startswith(("data:", server))] == []
    finally:
        page.close()


def drawn(artist, recipe):
    return np.asarray(grid(artist.draw(recipe)[0]))


def saved(folder: Path) -> Path:
    """The file that a browser has downloaded, once it is whole."""
    end = time.monotonic() + 30
    while not (files := list(folder.glob("*.png"))):
        assert time.monotonic() < end, "nothing was downloaded"
        time.sleep(0.05)
    return files[0]
