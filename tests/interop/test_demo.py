"""The page of drift demo without a browser: what its controls call."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from imports import ROOT
from PIL import Image
from small_generator import write_generator

from drift.interop import DriftPipeline
from drift.interop.recipe import Artist, Recipe, grid

gradio = pytest.importorskip("gradio", reason="drift demo needs Gradio, of the extra demo")


def images(html):
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


@pytest.fixture
def page(pipe):
    from drift.interop.demo import _Page

    return _Page(Artist(pipe))


def test_a_page_is_built(pipe):
    from drift.interop.demo import build

    blocks = build(pipe, label=2)
    assert isinstance(blocks, gradio.Blocks) and not blocks.analytics_enabled
    inputs = [block for block in blocks.blocks.values() if hasattr(block, "value")]
    values = {block.label: block.value for block in inputs}
    assert values["Class"] == 2 and values["Seed"] == 0 and values["Seed 2"] == 1


def test_it_shows_what_is_drawn_and_how_long_that_took(page):
    (shown,) = images(html := page.show(1, 2.0, None, 0.5, 3, 0, 2, 1, 5, "model"))
    expected = grid(page.artist.draw(Recipe(1, 2.0, 0, 0.5, 3, 0, 2, 1, 5))[0])
    assert np.array_equal(shown, np.asarray(expected))
    assert re.search(
        r"5 images in \d+ ms, [\d.]+ ms each: network \d+ ms, decoder \d+ ms\. .*, \d threads?\.", html
    )


def test_what_is_saved_can_be_opened_again(page):
    values = [1, 2.5, 3, 0.25, 4, 5, 2, 6, 7, "model"]
    name, data = page.save(*values)
    assert name == "cat-omega-2.5-seed-3.png"
    assert page.open(base64.b64decode(data.partition(",")[2])) == values


def test_the_gallery_shows_one_image_of_each_class_that_is_asked_for(page, pipe):
    html = page.gallery(" C", 1)
    assert re.findall(r'value="(\d)"', html) == ["0", "1"]  # tench, cat
    first = pipe([0], generator=pipe.sample_generators(0, [0])).images[0]
    assert np.array_equal(images(html)[0], np.asarray(first))
    assert re.findall(r'value="(\d)"', page.gallery("", 9)) == ["0", "1", "2"]
    assert "<button" not in page.gallery("dog", 1)


def test_a_name_is_text_on_the_page(tmp_path):
    from drift.interop.demo import _Page

    source = write_generator(tmp_path / "generator", names=['<b onclick="x">', "cat", "7"])
    page = _Page(Artist(DriftPipeline.from_pretrained(source)))
    html = page.show(*([0, 1.0] + [0] * 6 + [1, "model"])) + page.gallery("", 1)
    assert "<b" not in html.replace("<button", "") and '"x"' not in html


def test_a_mistake_is_told_on_the_page(page):
    for position, wrong in ((8, 0), (9, "ema_09"), (3, 2)):
        values = [0, 1.0, 0, 0.0, 1, 0, 0, 1, 1, "model"]
        values[position] = wrong
        with pytest.raises(gradio.Error):
            page.show(*values)
    with pytest.raises(gradio.Error):
        page.open(b"GIF89a")


def test_the_documented_code_runs(pipe, generator_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(Artist(pipe).png(Recipe(1, 3.0, count=3)))
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda blocks: launched.append(blocks))
    again, app, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/demo.md").read_text(), re.DOTALL)
    for code in (again, app):
        for source in ("artifacts/generator", "OWNER/NAME"):
            code = code.replace(source, str(generator_folder))
        exec(code, {})
    first, second = (np.asarray(Image.open(name)) for name in ("picture.png", "again.png"))
    assert np.array_equal(first, second) and len(launched) == 1
