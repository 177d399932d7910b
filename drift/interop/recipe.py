"""Pictures that can be made again: a `Recipe`, the samples it asks for, and the PNG file that holds both."""

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

import drift
from drift.evaluation.batches import BATCH
from drift.evaluation.pictures import image_grid, visible_scale
from drift.evaluation.sample import draw_inputs
from drift.interop.pipeline import DriftPipeline
from drift.models.generator import Generator
from drift.runtime.digests import tensors_digest
from drift.runtime.errors import UserError
from drift.runtime.seeds import torch_generator

COLUMNS = 4
MOST = BATCH
"""Samples of one picture: a forward pass sees as many anyway."""


@dataclass(frozen=True)
class Recipe:
    """All that a picture depends on, beside the generator and its decoder. Texts of numbers become numbers.

    With the same number as `seed` and `style`, and nothing blended, sample i is that of the stage fid.
    Raises `UserError` for what no picture could have.
    """

    label: int = 0
    omega: float = 1.0
    """CFG strength."""
    seed: int = 0
    """Of the noise."""
    seed_blend: float = 0.0
    """How far the noise is on its way from `seed` (0) to `to_seed` (1)."""
    to_seed: int = 1
    style: int = 0
    """Seed of the style indices."""
    style_blend: int = 0
    """Codebooks whose index is of `to_style`; always the same ones are swapped first."""
    to_style: int = 1
    count: int = 16
    """Samples: numbers 0, 1, ... of the seeds."""
    weights: str = "model"
    """The copy of the generator's weights."""

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            try:
                object.__setattr__(self, field.name, kind(value))
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{field.name} = {value!r}: a number is needed") from None
        ranges = {
            "seed_blend": (0, 1),
            "style_blend": (0, math.inf),
            "count": (1, MOST),
            "omega": (0, math.inf),
        }
        for name, (least, most) in ranges.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f"{name} = {value:g}: allowed: {least} to {most}")


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Row by row along the great circle from `start` to `end`, both `[B, ...]`.

    Normal noise keeps its norm on the way; the middle of a straight line is shorter by the square root of 2.
    """
    rows, others = start.flatten(1).double(), end.flatten(1).double()
    angles = torch.cosine_similarity(rows, others).clamp(-1, 1).acos().clamp(1e-6, math.pi - 1e-6)[:, None]
    mixed = ((1 - share) * angles).sin() * rows + (share * angles).sin() * others
    return (mixed / angles.sin()).to(start.dtype).view_as(start)


def blended_inputs(recipe: Recipe, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Noise `[B, C, h, w]` and style indices `[B, S]` for a generator with `config`.

    Blended noise is on the great circle between two noises. Blended style takes single codebooks from the
    second style, so that the network sees nothing that it was not trained on.
    """

    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        return draw_inputs(range(recipe.count), config, seed)

    noise, style = drawn(recipe.seed)
    if recipe.style != recipe.seed:
        style = drawn(recipe.style)[1]
    if recipe.seed_blend:
        noise = slerp(noise, drawn(recipe.to_seed)[0], recipe.seed_blend)
    if recipe.style_blend:
        order = torch.randperm(style.shape[1], generator=torch_generator("recipe/codebooks"))
        chosen = order[: recipe.style_blend]
        style[:, chosen] = drawn(recipe.to_style)[1][:, chosen]
    return noise, style


class Times(NamedTuple):
    """Seconds for all samples of a picture."""

    network: float
    decoder: float
    """With what else happens until the images are on the CPU."""


class Artist:
    """A pipeline that draws recipes. It swaps its generator where another copy of the weights is wanted."""

    def __init__(self, pipe: DriftPipeline, copies: Mapping[str, Callable[[], Generator]] | None = None):
        """`copies` loads the copies of the weights, of which `pipe` has the first one."""
        self.pipe, self.copies = pipe, copies or {"model": lambda: pipe.generator}
        self.weights = next(iter(self.copies))
        self.digest = _digest(pipe)

    def draw(self, recipe: Recipe) -> tuple[np.ndarray, Times]:
        """Images uint8 `[recipe.count, H, W, 3]`, in one forward pass; `UserError` as from the pipeline."""
        self._take(recipe.weights)
        noise, style = blended_inputs(recipe, self.pipe.generator.config)
        labels, begun = [recipe.label] * recipe.count, _now()
        with _passes(self.pipe.generator) as marks:
            images = self.pipe(labels, recipe.omega, noise=noise, style_indices=style)[0]
        network = sum(marks)
        times = Times(network, _now() - begun - network)
        return np.stack([np.asarray(image) for image in images]), times

    def one_of_each(self, labels: list[int]) -> list[Image.Image]:
        """Sample 0 of seed 0 of each class, without guidance."""
        return list(self.pipe(labels, generator=self.pipe.sample_generators(0, [0] * len(labels)))[0])

    def name(self, label: int) -> str:
        """The first name of a class, or its number, in characters that every file can hold."""
        name = self.pipe.id2label.get(label, str(label)).split(",")[0]
        return name.encode("utf-8", "backslashreplace").decode()

    def png(self, recipe: Recipe) -> bytes:
        """The picture as a PNG file, which `read_recipe` knows how to read."""
        picture = grid(self.draw(recipe)[0])
        told = {"class": self.name(recipe.label), **asdict(recipe), "generator": self.digest}
        info = PngInfo()
        for key, value in {**told, "Software": f"drift {drift.__version__}"}.items():
            info.add_text(key, str(value))
        picture.save(file := io.BytesIO(), format="PNG", pnginfo=info)
        return file.getvalue()

    def _take(self, weights: str) -> None:
        if weights == self.weights:
            return
        if weights not in self.copies:
            raise UserError(f"weights = {weights}: there are {', '.join(self.copies)}")
        generator = self.copies[weights]()
        self.pipe.register_modules(generator=nn.Module.to(generator, self.pipe.device))
        self.weights, self.digest = weights, _digest(self.pipe)


def grid(images: np.ndarray) -> Image.Image:
    """Images uint8 `[B, H, W, 3]` as one picture, as large as `drift sample` makes them."""
    return image_grid(images, min(COLUMNS, len(images)), scale=visible_scale(images.shape[1]))


def read_recipe(file: str | Path | io.BytesIO) -> tuple[Recipe, str]:
    """The recipe in a PNG file, and the digest of the generator and decoder that drew it.

    Raises `UserError` if it is no such file.
    """
    try:
        with Image.open(file, formats=["PNG"]) as image:
            told = {**image.info}
        return Recipe(**{field.name: told[field.name] for field in fields(Recipe)}), told["generator"]
    except (OSError, ValueError, SyntaxError, KeyError):
        raise UserError(
            "this is no PNG file that drift has made, or its text was removed on the way"
        ) from None


@contextmanager
def _passes(module: nn.Module) -> Iterator[list[float]]:
    """When each forward pass of `module` began, as a negative number, and ended."""
    marks: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: marks.append(-_now())),
        module.register_forward_hook(lambda *_: marks.append(_now())),
    ]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def _now() -> float:
    """Seconds, once the device has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _digest(pipe: DriftPipeline) -> str:
    """SHA-256 of the weights of all networks of a pipeline."""
    return tensors_digest(
        (f"{part}.{name}", tensor)
        for part, module in sorted(pipe.components.items())
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict().items()
    )
