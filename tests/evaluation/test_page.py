"""The report: all numbers, nothing to fetch, no scripts of strangers, and no sideways scrolling."""

import base64
import copy
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from drift.evaluation.page import Curve, render_page, sweep_curves, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def entry(omega, fid, decay=0.995):
    return {
        "omega": omega, "ema_decay": decay, "fid": fid, "kid": 0.00123 * omega,
        "inception_score": 9.1 + omega,
        "inception_score_std": 0.2, "precision": 0.8123, "recall": 0.7 - omega / 100, "accuracy": 0.98,
    }  # fmt: skip


SWEEP = [entry(1.0, 3.25), entry(1.5, 2.125), entry(2.0, 4.5)]
RESULT = {
    "best": SWEEP[1],
    "sweep": SWEEP,
    "floor": 1.5,
    "training": 0.75,
    "images": 1000,
    "classifier_accuracy_real": 0.994,
    "self_test": {
        "same": 1e-9,
        "shift": {"expected": 1.0, "measured": 1.0},
        "scale": {"expected": 2.0, "measured": 2.0},
        "halves": 1.5,
    },
    "protocol": {
        "features": "pretrained/digits_classifier", "features_sha256": "0123456789abcdef" * 4,
        "reference": "held_out", "reference_images": 360, "generator": {"code": ["abc"]},
        "published_weights": None,
    },
}  # fmt: skip


def png(width=1600):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def page(result=RESULT, **changes):
    parts = {
        "title": "generator: 1000 images per omega",
        "settings": {"seed": 0, "temps": [0.02, 0.05], "drift": {"hidden": 96, "root": None}},
        "pictures": [("Samples", "A row per class.", png()), ("Omega", "A column per omega.", png(300))],
        "training": [Curve("Loss", "step", "loss", {"": (range(100), range(1, 101))}, log_y=True)],
    }
    return render_page(result, **parts | changes)


class Reader(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data.strip())


def test_every_number_of_the_sweep_is_there():
    text = Reader(page()).text
    for point in SWEEP:
        for number in (f"{point['omega']:g}", f"{point['fid']:.2f}", f"{point['inception_score']:.2f}"):
            assert number in text
    for number in ("0.75", "1.50", "0.00123", "0.812", "98.0%", "held_out", "drift.hidden", "0.02, 0.05"):
        assert number in text, number
    assert any("180 images each" in part for part in text)


def test_nothing_is_fetched_and_nothing_runs():
    reader = Reader(page())
    assert "script" not in reader.tags and "link" not in reader.tags
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), value
    assert "@import" not in page() and not re.findall(r"url\((?!#)", page())


def test_hostile_names_are_only_text():
    hostile = "<script>alert(1)</script>\"'&"
    text = page(
        title=hostile, settings={hostile: hostile}, pictures=[(hostile, hostile, png())],
        training=[Curve(hostile, hostile, hostile, {hostile: ([1, 2], [1, 2])}, explanation=hostile)],
    )  # fmt: skip
    assert "script" not in Reader(text).tags
    assert text.count("&lt;script&gt;") >= 6


def test_only_what_was_measured_is_shown():
    bare = {"omega": 1.0, "fid": 3.25}
    result = RESULT | {
        "best": bare,
        "sweep": [bare],
        "floor": None,
        "training": None,
        "classifier_accuracy_real": None,
        "self_test": {"same": 0.0, "halves": None},
    }
    text = page(result, training=())
    assert [curve.title for curve in sweep_curves(result)] == ["FID"]
    assert "3.25" in text and "KID" not in text and "floor" not in text and "accuracy" not in text


def test_a_line_for_each_ema_decay():
    result = copy.deepcopy(RESULT)
    result["sweep"] += [entry(1.0, 5.0, 0.999), entry(2.0, 6.0, 0.999)]
    curve = sweep_curves(result)[0]
    assert curve.lines == {
        "EMA 0.995": ((1.0, 1.5, 2.0), (3.25, 2.125, 4.5)),
        "EMA 0.999": ((1.0, 2.0), (5.0, 6.0)),
    }
    assert curve.reference == ("real training images", 0.75)


def test_equal_runs_give_equal_pages_with_ids_of_their_own(tmp_path):
    assert page() == page()
    ids = [value for name, value in Reader(page()).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    for used in re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page()):
        assert used in ids
    write_page(tmp_path / "index.html", RESULT, title="t", settings={}, pictures=[])
    assert "3.25" in (tmp_path / "index.html").read_text()


def test_pictures_keep_their_bytes():
    found = [value for name, value in Reader(page()).attributes if name == "src"]
    assert [base64.b64decode(value.partition(",")[2]) for value in found] == [png(), png(300)]


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on PATH: the page is not laid out by a real browser"
)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(tmp_path, width):
    """In a frame of this width, since a window of Chromium cannot be narrower than 500 pixels."""
    (tmp_path / "index.html").write_text(page(title="a long title " + "x" * 120))
    (tmp_path / "frame.html").write_text(
        f"""<iframe id="f" src="index.html" width="{width}" height="800" style="border:0"></iframe>
        <pre id="p"></pre>
        <script>f.onload = () => {{
          const page = f.contentDocument.documentElement;
          const shown = f.contentDocument.querySelectorAll("img, svg");
          p.textContent = JSON.stringify({{
            inner: f.contentWindow.innerWidth, scroll: page.scrollWidth,
            widths: [...shown].map(x => x.getBoundingClientRect().width)}});
        }};</script>"""
    )
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom",
         (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(re.search(r"<pre id=\"p\">(.*?)</pre>", done.stdout, re.S)[1])
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert len(found["widths"]) == 9 and all(100 < shown <= width for shown in found["widths"])
