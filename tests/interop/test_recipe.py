"""Pictures and their recipes: the samples of the stage fid, blends, PNG files that can be made again."""

import io
import math

import numpy as np
import pytest
import torch
from complaints import complaint
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_generator import SIZES, write_generator

from drift.interop import DriftPipeline
from drift.interop.pipeline import open_copies
from drift.interop.recipe import Artist, Recipe, blended_inputs, grid, read_recipe, slerp
from drift.runtime.errors import UserError


@pytest.fixture
def artist(pipe):
    return Artist(pipe)


def test_nothing_blended_gives_the_samples_of_the_pipeline(artist, pipe):
    drawn, times = artist.draw(Recipe(label=1, omega=2.5, seed=5, style=5, count=3))
    expected = pipe([1] * 3, 2.5, pipe.sample_generators(5, range(3))).images
    assert np.array_equal(drawn, np.stack([np.asarray(image) for image in expected]))
    assert times.network > 0 and times.decoder > 0


def test_the_ends_of_both_blends_are_the_other_seeds(artist):
    there = artist.draw(Recipe(seed_blend=1, to_seed=7, style_blend=3, to_style=7, count=3))[0]
    assert np.array_equal(there, artist.draw(Recipe(seed=7, style=7, count=3))[0])
    assert not np.array_equal(there, artist.draw(Recipe(count=3))[0])


def test_slerp_follows_the_circle():
    start, end = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]])
    third = slerp(start, end, 1 / 3)
    torch.testing.assert_close(third[0, 0], 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    torch.testing.assert_close(third[1], start[1])  # on its way to itself
    assert torch.equal(slerp(start, end, 0.0), start) and torch.equal(slerp(start, end, 1.0), end)


def test_blended_noise_keeps_its_norm():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 8, 4, 16, 16, generator=generator)
    norms = [slerp(start, end, share).flatten(1).norm(dim=1) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert all((0.9 * norms[0] < norm).all() and (norm < 1.1 * norms[0]).all() for norm in norms)
    assert (((start + end) / 2).flatten(1).norm(dim=1) < 0.8 * norms[0]).all()


def test_styles_are_blended_codebook_by_codebook():
    first, second = (blended_inputs(Recipe(style=style), SIZES)[1] for style in (0, 1))
    swapped = [set()]
    for count in range(1, SIZES["style_codebooks"] + 1):
        mixed = blended_inputs(Recipe(style_blend=count), SIZES)[1]
        swapped.append({s for s in range(mixed.shape[1]) if torch.equal(mixed[:, s], second[:, s])})
        kept = [s for s in range(mixed.shape[1]) if s not in swapped[-1]]
        assert torch.equal(mixed[:, kept], first[:, kept])
        assert len(swapped[-1]) == count and swapped[-2] < swapped[-1]


def test_a_picture_can_be_made_again_from_its_file(artist, pipe):
    recipe = Recipe(2, 1.37, 3, 0.61, 4, 5, 1, 6, count=5)
    file = artist.png(recipe)
    found, digest = read_recipe(io.BytesIO(file))
    assert found == recipe and digest == Artist(pipe).digest
    picture = np.asarray(Image.open(io.BytesIO(file)))
    assert np.array_equal(picture, np.asarray(grid(Artist(pipe).draw(found)[0])))
    for text in (b"tEXtclass\x007", b"tEXtomega\x001.37", b"tEXtseed\x003", b"tEXtSoftware\x00drift 0."):
        assert text in file


def test_it_says_which_class_by_a_name_that_files_can_hold(tmp_path):
    source = write_generator(tmp_path / "generator", names=["a\udcff, b", "\u732b", "7"])
    artist = Artist(DriftPipeline.from_pretrained(source))
    for label, name in enumerate(["a\\udcff", "\u732b", "7"]):
        file = artist.png(Recipe(label, count=1))
        assert Image.open(io.BytesIO(file)).info["class"] == name


@pytest.mark.parametrize("damage", ["text file", "jpeg", "no text", "omega = x", "count = 1e9", "cut"])
def test_other_files_are_refused(artist, damage):
    file = artist.png(Recipe(count=1))
    image = Image.open(io.BytesIO(file))
    if damage == "cut":
        file = file[:40]
    elif damage == "text file":
        file = b"omega = 1"
    else:
        info = PngInfo()
        key, _, value = damage.partition(" = ")
        for name, text in {**image.info, key: value}.items() if value else ():
            info.add_text(name, text)
        image.save(other := io.BytesIO(), format="JPEG" if damage == "jpeg" else "PNG", pnginfo=info)
        file = other.getvalue()
    complaint(lambda: read_recipe(io.BytesIO(file)))


@pytest.mark.parametrize(
    "wrong",
    [{"seed_blend": 1.5}, {"count": 0}, {"omega": math.nan}, {"style_blend": -1}, {"label": math.inf}],
)
def test_recipes_that_nobody_can_follow_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_copies_of_the_weights_take_turns(tmp_path):
    source, other = write_generator(tmp_path / "one"), write_generator(tmp_path / "two", seed=1)
    (other / "diffusion_pytorch_model.safetensors").rename(
        source / "diffusion_pytorch_model.ema_05.safetensors"
    )
    copies = open_copies(source, first="ema_0.5")
    assert list(copies) == ["ema_05", "model"]
    artist = Artist(DriftPipeline.from_pretrained(source, variant="ema_0.5"), copies)
    drawn = {}
    for weights in ("ema_05", "model", "ema_05"):
        images = artist.draw(Recipe(weights=weights, count=2))[0]
        assert np.array_equal(images, drawn.setdefault(weights, (images, artist.digest))[0])
        assert artist.digest == drawn[weights][1]
    assert drawn["model"][1] != drawn["ema_05"][1]
    alone = Artist(DriftPipeline.from_pretrained(source))
    assert np.array_equal(alone.draw(Recipe(count=2))[0], drawn["model"][0])
    with pytest.raises(UserError, match="ema_09"):
        artist.draw(Recipe(weights="ema_09"))
