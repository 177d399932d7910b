"""A page to play with a generator: the picture follows the sliders, one forward pass for each of their moves.

`drift demo` serves it on this machine. On a Hugging Face Space, `app.py` is:

    from drift.interop import DriftPipeline
    from drift.interop.demo import build

    build(DriftPipeline.from_pretrained("OWNER/NAME")).launch()
"""

import base64
import io
import platform
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from drift.evaluation.pictures import VISIBLE_SIDE
from drift.interop.pipeline import DriftPipeline
from drift.interop.recipe import MOST, Artist, Recipe, grid, read_recipe
from drift.models.generator import Generator
from drift.runtime.errors import UserError

_LOSSLESS = 2**19  # pixels; of a larger picture a JPEG is shown and a PNG saved, so that sliders stay quick
_CLASSES = MOST  # on a page of the gallery
_THUMBNAIL = 128
_QUIET: dict[str, Any] = {"show_progress": "hidden"}
_LIVE: dict[str, Any] = {
    **_QUIET,
    "queue": False,
    "trigger_mode": "always_last",
}  # moves during a pass become one
_DOWNLOAD = "(name, data) => Object.assign(document.createElement('a'), {download: name, href: data}).click()"
_STYLE = """
img { width: 100% } .pixels { image-rendering: pixelated }
> img { max-height: 80vh; object-fit: contain }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); gap: .5rem }
button { overflow-wrap: anywhere; cursor: pointer }
"""
_CHOOSE = """element.addEventListener('click', event => {
    const button = event.target.closest('button')
    if (button) trigger('select', {index: Number(button.value), value: button.innerText})
})"""


def build(
    pipe: DriftPipeline, copies: Mapping[str, Callable[[], Generator]] | None = None, label: int = 0
) -> gr.Blocks:
    """The page, with class `label` chosen.

    `copies` loads the copies of the generator's weights, such as EMA copies; `pipe` has the first one.
    """
    page = _Page(Artist(pipe, copies))
    codebooks, classes = (pipe.generator.config[key] for key in ("style_codebooks", "num_classes"))
    names = [(page.artist.name(number), number) for number in range(classes)]
    with gr.Blocks(title="drift", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        with gr.Row():
            with gr.Column(min_width=320):
                picture = gr.HTML(elem_id="picture", css_template=_STYLE, apply_default_css=False)
            with gr.Column(min_width=320):
                controls = _controls(names, codebooks, list(page.artist.copies), label)
                with gr.Row():
                    save = gr.Button("Save as PNG", variant="primary", elem_id="save")
                    opened = gr.UploadButton("Open a saved one", file_types=[".png"], type="binary")
                saved = [gr.Textbox(visible=False) for _ in range(2)]
        with gr.Accordion("Choose a class by its picture", open=classes <= _CLASSES) as accordion:
            with gr.Row(visible=classes > _CLASSES):
                find = gr.Textbox("", label="Names with", placeholder="all")
                number = gr.Slider(1, max(2, -(-classes // _CLASSES)), 1, step=1, label="Page")
            gallery = gr.HTML(
                elem_id="gallery", css_template=_STYLE, apply_default_css=False, js_on_load=_CHOOSE
            )

        inputs = [controls[field.name] for field in fields(Recipe)]
        gr.on([*(control.input for control in inputs), blocks.load], page.show, inputs, picture, **_LIVE)
        save.click(page.save, inputs, saved, **_QUIET).then(None, saved, None, js=_DOWNLOAD)
        opened.upload(page.open, opened, inputs, **_QUIET).success(page.show, inputs, picture, **_LIVE)
        turns = [find.submit, number.release, accordion.expand]
        if classes <= _CLASSES:
            turns.append(blocks.load)
        gr.on(turns, page.gallery, [find, number], gallery, **_QUIET)
        chosen = gallery.select(page.choose, None, controls["label"], **_QUIET)
        chosen.then(page.show, inputs, picture, **_LIVE)
    return blocks


def _controls(names: list[tuple[str, int]], codebooks: int, copies: list[str], label: int) -> dict[str, Any]:
    """A component for each member of `Recipe`."""
    start = Recipe(label=label, weights=copies[0])
    made: dict[str, Any] = {"label": gr.Dropdown(names, value=label, label="Class")}
    made["omega"] = gr.Slider(1, 4, start.omega, step=0.01, label="omega: CFG strength, 1 is none")
    for seed, blend, to_seed, most, step in (
        ("seed", "seed_blend", "to_seed", 1, 0.01),
        ("style", "style_blend", "to_style", codebooks, 1),
    ):
        with gr.Row(visible=most > 0):
            made[seed] = _number(getattr(start, seed), seed.capitalize())
            made[blend] = gr.Slider(0, max(most, 1), 0, step=step, label="Blend", scale=3)
            made[to_seed] = _number(getattr(start, to_seed), f"{seed.capitalize()} 2")
    with gr.Row():
        made["count"] = gr.Slider(1, MOST, start.count, step=1, label="Images")
        made["weights"] = gr.Dropdown(copies, value=copies[0], label="Weights", visible=len(copies) > 1)
    return made


def _number(value: int, label: str) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=0, min_width=70)


class _Page:
    """What the page does; one at a time draws, however many look at it."""

    def __init__(self, artist: Artist):
        self.artist, self.lock = artist, threading.Lock()
        self.hardware = hardware(artist.pipe.device)

    def show(self, *values: Any) -> str:
        """The picture and how long it took, as HTML."""
        with self.lock, _told():
            recipe = _recipe(values)
            images, times = self.artist.draw(recipe)
        picture, name = grid(images), self.artist.name(recipe.label)
        kind = "png" if picture.width * picture.height <= _LOSSLESS else "jpeg"
        shown = _image(
            picture, kind, alt=f"{recipe.count} images of {name}", pixels=images.shape[1] < VISIBLE_SIDE
        )
        milliseconds = 1000 * sum(times)
        return (
            f"{shown}<p>{recipe.count} images in {milliseconds:.0f} ms, "
            f"{milliseconds / recipe.count:.1f} ms each: network {1000 * times.network:.0f} ms, "
            f"decoder {1000 * times.decoder:.0f} ms. {escape(self.hardware)}.</p>"
        )

    def save(self, *values: Any) -> tuple[str, str]:
        """Name and content of a PNG file."""
        with self.lock, _told():
            recipe = _recipe(values)
            file = self.artist.png(recipe)
        name = f"{self.artist.name(recipe.label)} omega {recipe.omega:g} seed {recipe.seed}"
        return re.sub(r"[^\w.]+", "-", name) + ".png", _data(file, "png")

    def open(self, file: bytes) -> list[Any]:
        """The controls as they were when a file was saved."""
        with _told():
            recipe, digest = read_recipe(io.BytesIO(file))
        if digest != self.artist.digest and recipe.weights == self.artist.weights:
            gr.Warning("The picture was made by another generator or decoder, and will look different.")
        return list(asdict(recipe).values())

    def gallery(self, find: str, number: int) -> str:
        """A page of classes whose names have `find` in them, each with a sample, as HTML."""
        artist = self.artist
        names = {n: artist.name(n) for n in range(artist.pipe.generator.config["num_classes"])}
        found = [n for n, name in names.items() if find.strip().lower() in name.lower()]
        labels = found[_CLASSES * (int(number) - 1) :][:_CLASSES] or found[:_CLASSES]
        if not labels:
            return "No class has such a name."
        with self.lock, _told():
            images = artist.one_of_each(labels)
        buttons = []
        for label, image in zip(labels, images, strict=True):
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            shown = _image(image, "png", pixels=image.width < VISIBLE_SIDE)
            buttons.append(f'<button value="{label}">{shown}{escape(names[label])}</button>')
        return f'<div class="classes">{"".join(buttons)}</div>'

    def choose(self, event: gr.SelectData) -> int:
        """The class of a picture in the gallery."""
        return event.index


@contextmanager
def _told() -> Iterator[None]:
    """What the user can mend is told on the page."""
    try:
        yield
    except (UserError, FloatingPointError) as error:
        raise gr.Error(str(error), print_exception=False) from None


def _recipe(values: tuple[Any, ...]) -> Recipe:
    """A number that is being typed counts as 0 while there is none."""
    whole: list[Any] = [0 if value is None else value for value in values]
    return Recipe(*whole)


def hardware(device: torch.device) -> str:
    """What the networks run on, in words."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    names = []
    with suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    threads = torch.get_num_threads()
    return f"{next(iter(names), platform.machine())}, {threads} thread{'s' * (threads > 1)}"


def _image(image: Image.Image, kind: str, alt: str = "", pixels: bool = False) -> str:
    """An image as HTML, whose `pixels` stay squares."""
    image.save(file := io.BytesIO(), format=kind, compress_level=1, quality=90)
    look = "pixels" if pixels else "smooth"
    return f'<img class="{look}" alt="{escape(alt)}" src="{_data(file.getvalue(), kind)}">'


def _data(file: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
