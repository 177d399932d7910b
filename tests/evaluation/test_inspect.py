"""`drift inspect`: numbers against NumPy and plain loops, warnings, refusals, pixels of the pictures."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from complaints import complaint
from imports import ROOT
from PIL import Image

from drift import cli
from drift.autoencoders.kl import VAE
from drift.data.bank import held_out_rows
from drift.data.datasets import DigitImages, open_images
from drift.data.latents import LatentStore, latent_files, write_latents
from drift.data.levels import to_uint8
from drift.data.views import Augmented, Center
from drift.evaluation import inspect_latents as inspection_of_latents
from drift.evaluation.inspect_features import check_feature_sets, inspect_features
from drift.evaluation.inspect_latents import (
    density,
    histogram_picture,
    inspect_latents,
    latent_warnings,
    measure_latents,
    shown_channels,
)
from drift.evaluation.inspect_mae import fill_in, inspect_mae, masked_errors
from drift.evaluation.inspection import Look, SourceImages, bands
from drift.features import MAEEncoder
from drift.models.mae import LatentMAE, draw_mask
from drift.runtime.processes import Ranks
from drift.runtime.seeds import torch_generator
from drift.settings import load_settings
from drift.training.encode import EncodeOptions, encode_view
from stages import mae as mae_stage

VAE_FOLDER = "pretrained/digits_vae"
CLASSES, IMAGES = 3, 4  # per class
SCALE = 3  # that an image of 32 pixels is shown at
STEP = SCALE * 32 + 2  # from one image of a picture to the next
MAE = {
    "in_channels": 4,
    "base_channels": 16,
    "layers": (1, 1, 1, 1),
    "norm_groups": 8,
    "num_classes": CLASSES,
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the settings name the VAE from there


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of images, of their latents in both views, and `params.yaml`; one image does not decode.

    The images are digits, which the VAE knows, and none that looks like its mirror image.
    """
    folder = tmp_path_factory.mktemp("world")
    digits = DigitImages(None, "train")
    for number, digit in enumerate((2, 4, 7)):
        for position, index in enumerate(np.flatnonzero(digits.labels == digit)[:IMAGES]):
            path = folder / "images" / "train" / "abc"[number] / f"{number * IMAGES + position:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digits.load(index).resize((48, 48), Image.Resampling.BICUBIC).save(path)
    bad = folder / "images" / "train" / "a" / "01.png"
    bad.write_bytes(bad.read_bytes()[:60])

    content = load_settings(ROOT / "presets/digits.yaml").model_dump(mode="json", exclude_unset=True)
    content["data"] |= {"dataset": "folder", "root": str(folder / "images"), "classes": CLASSES}
    content["encode"] |= {"crops": 2, "mirror": True}
    content["mae"] |= {"held_out": 3, "steps": 4, "batch_size": 8, "warmup_steps": 1}
    content["mae"] |= {"finetune_steps": 2, "finetune_ramp_steps": 1, "evaluate_every": 2}
    content["drift"]["classes_per_step"] = CLASSES
    content["fid"] |= {"reference": str(folder / "images"), "picture_classes": CLASSES}
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        settings = load_settings(folder / "params.yaml")
        source = open_images("folder", settings.data.root, "train", CLASSES)
        for view in ("center", "augmented"):
            crops = Augmented(crops=2, crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0), flip=False)
            of_view = Center(mirror=True) if view == "center" else crops
            options = EncodeOptions(
                view=of_view, image_size=32, posterior="mean", seed=0, on_bad_image="skip"
            )
            vae, alone = VAE.from_pretrained(VAE_FOLDER), Ranks(0, 1, torch.device("cpu"))
            encoded = encode_view(source, vae, folder / "work" / view, options, alone, batch_size=8)
            shutil.copytree(encoded, folder / view)
    return folder


@pytest.fixture
def settings(world):
    return load_settings(world / "params.yaml")


@pytest.fixture
def copy(world, tmp_path):
    """The centre latents, to be tampered with."""
    return Path(shutil.copytree(world / "center", tmp_path / "latents"))


@pytest.fixture(scope="module")
def trained(world):
    """An MAE as the stage makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("DRIFT_WORK_DIR", str(world / "mae_work"))
        arguments = ["--latents", world / "augmented", "--out", world / "mae"]
        arguments += ["--params", world / "params.yaml"]
        arguments += ["--plot", world / "plot.csv", "--held-out-plot", world / "held_out.csv"]
        assert mae_stage.main([str(argument) for argument in arguments]) == 0
    return world / "mae"


def random_mae(config: dict = MAE) -> LatentMAE:
    torch.manual_seed(0)
    return LatentMAE(**config).eval()


def make_store(folder, latents, labels=None, **meta) -> LatentStore:
    labels = np.arange(len(latents)) % CLASSES if labels is None else labels
    write_latents(folder, "train", latents, labels, meta)
    return LatentStore.open(folder)


def normal(n=60, shape=(4, 8, 8)) -> np.ndarray:
    """Latents whose channels have mean 0 and standard deviation 1."""
    latents = np.random.default_rng(1).standard_normal((n, *shape))
    return (latents - latents.mean((0, 2, 3), keepdims=True)) / latents.std((0, 2, 3), keepdims=True)


def cell(picture: np.ndarray, index: int, kind: int, n: int, kinds: int) -> np.ndarray:
    """The image of thing `index` in its `kind`, at its own size, from a picture of `bands`."""
    columns, strips = min(8, n), -(-n // 8)
    height = len(picture) // strips
    top = (index // 8) * height + height - kinds * STEP + kind * STEP
    left = picture.shape[1] - (columns - index % 8) * STEP
    block = picture[top : top + 32 * SCALE, left : left + 32 * SCALE]
    assert np.array_equal(block, block[::SCALE, ::SCALE].repeat(SCALE, 0).repeat(SCALE, 1))
    return block[::SCALE, ::SCALE]


def read_meta(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "meta.json").read_text())


def read_png(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def decoded(latents: torch.Tensor) -> np.ndarray:
    return to_uint8(VAE.from_pretrained(VAE_FOLDER).decode(latents)).numpy()


# Statistics


@pytest.mark.parametrize("block", [1, 600, 10**6])
def test_statistics_are_those_of_the_whole_array(tmp_path, monkeypatch, block):
    latents = normal() * np.array([0.3, 1, 2, 30])[:, None, None] + np.array([0, 1, -0.5, 3])[:, None, None]
    latents[7], latents[11, 2, 3, 3] = 0.25, np.nan
    latents[12, :2, 0, 0] = np.inf, -np.inf
    latents[13] = 0
    latents[59, 3, 7, 7] = np.nan
    monkeypatch.setattr(inspection_of_latents, "_BLOCK", block)
    numbers, counts = measure_latents(make_store(tmp_path, latents), CLASSES)
    stored = latents.astype(np.float16).astype(np.float64)
    parts = [(numbers["channels"][c], counts[c], stored[:, c]) for c in range(4)]
    for found, count, values in [*parts, (numbers["all"], counts.sum(0), stored)]:
        finite = values[np.isfinite(values)]
        assert found["mean"] == pytest.approx(finite.mean(), rel=1e-12, abs=1e-14)
        assert found["std"] == pytest.approx(finite.std(), rel=1e-12)
        assert (found["min"], found["max"]) == (finite.min(), finite.max())
        assert (found["nans"], found["infinities"]) == (np.isnan(values).sum(), np.isinf(values).sum())
        edges = np.linspace(-5, 5, 31)
        histogram = np.histogram(finite, edges)[0] / (finite.size * np.diff(edges))
        np.testing.assert_allclose(density(count, edges), histogram, rtol=1e-12)
    assert numbers["not_finite_rows"] == {"count": 3, "first": [11, 12, 59]}
    assert numbers["constant_rows"] == {"count": 2, "first": [7, 13]}
    assert numbers["rows_per_class"] == [20, 20, 20]


def test_without_any_finite_number_there_are_no_statistics(tmp_path):
    numbers, counts = measure_latents(make_store(tmp_path, np.full((3, 4, 8, 8), np.nan)), CLASSES)
    found = numbers["all"]
    assert found["nans"] == 768 and math.isnan(found["mean"]) and math.isnan(found["max"])
    assert "768 NaN" in latent_warnings(numbers, 1.0, CLASSES, [])[0]
    assert histogram_picture(numbers, counts).size == (800, 450)


def test_statistics_of_pixels_are_those_of_the_levels(tmp_path):
    levels = np.random.default_rng(0).integers(90, 120, (60, 3, 8, 8), np.uint8)
    levels[7] = 100
    numbers, counts = measure_latents(make_store(tmp_path, levels), CLASSES)
    assert counts.shape == (3, 256)
    values = levels.astype(np.float64) / 127.5 - 1
    for found, count, of in [
        *((numbers["channels"][c], counts[c], values[:, c]) for c in range(3)),
        (numbers["all"], counts.sum(0), values),
    ]:
        assert (found["mean"], found["std"]) == pytest.approx((of.mean(), of.std()), abs=1e-7)
        assert (found["min"], found["max"]) == pytest.approx((of.min(), of.max()), abs=1e-7)
        edges = np.linspace(-1.003, 1.003, 31)  # no level is near one
        histogram = np.histogram(of, edges)[0] / (of.size * np.diff(edges))
        np.testing.assert_allclose(density(count, edges), histogram, rtol=1e-12)
    assert numbers["not_finite_rows"]["count"] == 0
    assert numbers["constant_rows"] == {"count": 1, "first": [7]}
    warnings = latent_warnings(numbers, None, CLASSES, [])
    assert len(warnings) == 1 and "1 row (7) with one and the same number" in warnings[0]


def warnings_of(tmp_path, latents, labels=None, scaling_factor=1.82155):
    store = make_store(tmp_path, latents, labels)
    numbers, _ = measure_latents(store, max(CLASSES, store.num_classes))
    return latent_warnings(numbers, scaling_factor, CLASSES, ["ape", "bee", "cat"])


def test_good_latents_have_no_warnings(tmp_path):
    assert warnings_of(tmp_path, normal()) == []
    # The SD-VAE on ImageNet, as EDM2 has its channels
    mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    sd = (mean[:, None, None] + std[:, None, None] * normal()) * 0.18215
    assert warnings_of(tmp_path, sd, scaling_factor=0.18215) == []


def nan_at_2(latents):
    latents[2, 1, 4, 4] = np.nan
    return latents


def constant_at_5(latents):
    latents[5] = -1.5
    return latents


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x / 1.82155, "as if the scaling factor had been left out (1.82155)"),
        (lambda x: x * 1.82155, "had been applied twice"),
        (lambda x: x * 20, "of all latents is 20, expected 0.7 to 1.4"),
        (nan_at_2, "1 NaN and 0 infinite numbers in 1 row (2)"),
        (constant_at_5, "1 row (5) with one and the same number"),
        (lambda x: x + np.array([0, 3, 0, 0])[:, None, None], "the mean of channel 1 is 3"),
        (lambda x: x * np.array([1, 1, 1, 1e-3])[:, None, None], "channel 3 is nearly constant"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, change, told):
    assert any(told in line for line in warnings_of(tmp_path, change(normal())))


def test_classes(tmp_path):
    assert warnings_of(tmp_path, normal(), np.arange(60) % 2) == ["no latents of 1 class (cat)"]
    over = warnings_of(tmp_path, normal(), np.arange(60) % 5)
    assert over == ["labels up to 4, but data.classes is 3"]


# Which image a row is of


@pytest.mark.parametrize("view", ["center", "augmented"])
def test_each_row_finds_its_image(world, settings, view):
    """The decoded latents tell: of all images, a row's own is the nearest, in its own orientation."""
    store = LatentStore.open(world / view)
    assert len(store) == 2 * (CLASSES * IMAGES - 1)
    sources = SourceImages(store, settings)
    pictures = np.stack([sources.picture(row) for row in range(len(store))]).astype(float)
    images = decoded(store.rows(np.arange(len(store)))).astype(float)
    apart = np.abs(images[:, None] - pictures[None]).mean((2, 3, 4))
    nearest = apart.argmin(1)
    if view == "augmented":  # both rows of an image have the same picture
        nearest = nearest // 2 * 2 + np.arange(len(store)) % 2
    assert nearest.tolist() == list(range(len(store)))
    assert "01.png" not in {Path(sources.name(row)).name for row in range(len(store))}  # was left out
    assert sources.name(2) == "a/02.png" and sources.exact == (view == "center")


def test_other_images_are_refused(world, settings, copy, tmp_path):
    images = Path(shutil.copytree(world / "images", tmp_path / "images"))
    assert SourceImages(LatentStore.open(copy), settings, str(images)).name(0) == "a/00.png"
    shutil.copy(images / "train" / "b" / "04.png", images / "train" / "b" / "new.png")

    def look(root):
        how = Look(images=root)
        return complaint(lambda: inspect_latents(copy, settings, tmp_path / "out", how))

    told = look(str(images))
    assert str(images) in told and "are not those that were encoded" in told
    assert "--compare-images nowhere: there is no such folder" in look("nowhere")
    meta_path = latent_files(copy)[2]
    meta = json.loads(meta_path.read_text())
    meta_path.write_text(json.dumps({k: v for k, v in meta.items() if k != "images_sha256"}))
    assert "has no images_sha256" in look("")
    assert not (tmp_path / "out").exists()


# drift inspect latents


def test_the_picture_has_each_latent_above_its_image(world, settings, tmp_path):
    found = inspect_latents(world / "center", settings, tmp_path / "out", Look(13, images=""))
    meta = read_meta(tmp_path)
    assert meta["warnings"] == [] and not any(line.startswith("warning") for line in found)
    files = ["latents.png", "histogram.png", "meta.json"]
    assert found[-3:] == [f"written: {tmp_path / 'out' / name}" for name in files]
    store = LatentStore.open(world / "center")
    assert meta["latents"]["digest"] == store.digest and meta["files"] == ["latents.png", "histogram.png"]
    picture = read_png(tmp_path / "out" / "latents.png")
    rows = [shown["row"] for shown in meta["shown"]]
    assert len(set(rows)) == 13
    assert [shown["label"] for shown in meta["shown"]] == sorted(store.labels[rows])
    expected = decoded(store.rows(np.array(rows)))
    for index, shown in enumerate(meta["shown"]):
        image = cell(picture, index, 0, 13, 2).astype(int)
        assert np.abs(image - expected[index]).max() <= 1  # the VAE rounds otherwise in other batches
        with Image.open(world / "images" / "train" / shown["image"]) as source:
            expected_source = np.asarray(source.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        if shown["row"] % 2:  # the mirror image
            expected_source = expected_source[:, ::-1]
        assert np.abs(cell(picture, index, 1, 13, 2) - expected_source).max() <= 1
    assert (picture[-STEP:, -3 * STEP :] == 255).all()  # the places of three that there are not


def test_the_same_again_and_another_seed(world, settings, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        inspect_latents(world / "augmented", settings, tmp_path / name, Look(4, seed))
    one, two, three = (
        [(tmp_path / name / file).read_bytes() for file in ("latents.png", "histogram.png", "meta.json")]
        for name in ("one", "two", "three")
    )
    assert one == two and one[0] != three[0] and one[1] == three[1]


def test_latents_of_other_images_or_labels_are_told(world, settings, tmp_path):
    meta = json.loads(latent_files(world / "center")[2].read_text())
    latents, labels = (np.load(path) for path in latent_files(world / "center")[:2])
    shuffled = np.random.default_rng(3).permutation(len(latents))
    write_latents(tmp_path / "latents", "train", latents[shuffled], labels, meta)
    found = inspect_latents(tmp_path / "latents", settings, tmp_path / "out", Look(images=""))
    assert any("differ from their images" in line for line in found)
    write_latents(tmp_path / "latents", "train", latents, labels[::-1], meta)
    told = complaint(lambda: SourceImages(LatentStore.open(tmp_path / "latents"), settings))
    assert "labels are not those of the images" in told


def test_a_latent_that_is_not_finite_is_red(settings, tmp_path):
    make_store(tmp_path / "latents", nan_at_2(normal(3)))
    inspect_latents(tmp_path / "latents", settings, tmp_path / "out", Look(3))
    picture = read_png(tmp_path / "out" / "latents.png")
    colours = [tuple(cell(picture, index, 0, 3, 1)[0, 0]) for index in range(3)]
    assert colours.count((200, 0, 0)) == 1


def test_the_histogram_shows_the_channels(tmp_path):
    picture = np.asarray(histogram_picture(*measure_latents(make_store(tmp_path, normal()), CLASSES)))
    blue = (np.abs(picture.astype(int) - (31, 119, 180)).sum(-1) < 30).nonzero()
    assert blue[1].max() - blue[1].min() > 300  # the first curve crosses the picture


def test_of_many_channels_the_extreme_ones_are_shown(tmp_path):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((60, 40, 2, 2))
    latents[:, 30] += 1
    latents[:, 5] *= 3
    numbers, counts = measure_latents(make_store(tmp_path, latents), CLASSES)
    stored = latents.astype(np.float16).astype(np.float64)
    std, mean = stored.std((0, 2, 3)), stored.mean((0, 2, 3))
    assert shown_channels(numbers["channels"]) == sorted({5, 30, int(std.argmin()), int(mean.argmin())})
    np.testing.assert_allclose([channel["std"] for channel in numbers["channels"]], std, rtol=1e-12)
    assert histogram_picture(numbers, counts).size == (800, 450)
    assert warnings_of(tmp_path, latents) == []
    shifted = warnings_of(tmp_path, latents + 3 * (np.arange(40) < 9)[:, None, None])
    assert sum("the mean of" in line for line in shifted) == 5
    assert shifted[-1] == "and so for 4 more channels"


# drift inspect mae


def naive_error(latents, masks, guess) -> float:
    """Mean over samples of the squared error per masked place, summed over channels, place by place.

    A place of a mask is 2 x 2 of a latent; `guess` makes of a sample `[C, H, W]`, without these, its output.
    """
    errors = []
    for x, mask in zip(latents, masks, strict=True):
        hidden = [(y, z) for y in range(8) for z in range(8) if mask[y // 2, z // 2]]
        seen = x.clone()
        for y, z in hidden:
            seen[:, y, z] = 0
        output = guess(seen)
        errors.append(np.mean([float((output[:, y, z] - x[:, y, z]).square().sum()) for y, z in hidden]))
    return float(np.mean(errors))


def test_the_masked_error_is_that_of_a_plain_loop(world, settings, tmp_path):
    model = random_mae()
    model.save_pretrained(tmp_path / "mae")
    found = inspect_mae(tmp_path / "mae", world / "center", settings, tmp_path / "out", Look(2))
    meta, store = read_meta(tmp_path), LatentStore.open(world / "center")

    @torch.no_grad()
    def of_network(seen):
        return model.reconstruct(seen[None])[0][0]

    def naive(rows, *masking, guess=of_network):
        masks = torch.cat([draw_mask((1, 4, 4), 0.5, torch_generator(*masking, int(r))) for r in rows])
        return pytest.approx(naive_error(store.rows(np.array(rows)), masks, guess), rel=1e-5)

    shown = [entry["row"] for entry in meta["shown"]]
    errors = [entry["masked_error"] for entry in meta["shown"]]
    assert np.mean(errors) == naive(shown, 0, "inspect/mask")
    held_out = held_out_rows(22, 2, 3, settings.seed)
    others = np.setdiff1d(np.arange(22), held_out)
    for name, rows in (("held out", held_out), ("others", others)):
        measured = meta["masked_error"][name]
        assert measured["rows"] == len(rows)
        assert measured["error"] == naive(rows, 0, "mae/held_out")
        means = store.rows(rows).mean(dim=(0, 2, 3))[:, None, None].expand(4, 8, 8)
        assert measured["of_means"] == naive(rows, 0, "mae/held_out", guess=lambda _, means=means: means)
    assert any("it has learnt nothing" in line for line in found)


def test_the_masked_error_of_folded_pixels_is_that_of_the_training(tmp_path):
    """Squares of 2 places are masked, of 4 pixels each."""
    model = random_mae({**MAE, "in_channels": 3, "input_patch_size": 4})
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(model.unfold(model.fold(pixels)), pixels)
    hidden, output = fill_in(model, pixels, np.arange(5), 0.5, 0, "inspect/mask")
    masks = torch.cat([draw_mask((1, 2, 2), 0.5, torch_generator(0, "inspect/mask", i)) for i in range(5)])
    assert torch.equal(hidden[:, 0], masks.repeat_interleave(8, 1).repeat_interleave(8, 2))
    with torch.no_grad():
        expected, _ = model(pixels, masks)
    torch.testing.assert_close(masked_errors(pixels, output, hidden, fold=4), expected)


def test_on_the_latents_of_its_training_the_error_is_that_of_the_log(world, settings, trained, tmp_path):
    out = tmp_path / "out"
    inspect_mae(trained, world / "augmented", settings, out)
    last = json.loads((trained / "logs.jsonl").read_text().splitlines()[-1])
    error = json.loads((out / "meta.json").read_text())["masked_error"]["held out"]["error"]
    assert error == pytest.approx(last["held_out"], rel=1e-6)
    found = inspect_mae(trained, world / "augmented", settings.model_copy(update={"seed": 5}), out)
    assert any("seed was 0" in line for line in found)


def test_the_picture_of_the_mae(world, settings, trained, tmp_path):
    inspect_mae(trained, world / "center", settings, tmp_path / "out", Look(5, 3, ""))
    meta = read_meta(tmp_path)
    picture = read_png(tmp_path / "out" / "mae.png")
    store, model = LatentStore.open(world / "center"), LatentMAE.from_pretrained(trained)
    for index, shown in enumerate(meta["shown"]):
        source, latent, masked, filled, network = (
            cell(picture, index, kind, 5, 5).astype(int) for kind in range(5)
        )
        x = store.rows(np.array([shown["row"]]))
        mask = draw_mask((1, 4, 4), 0.5, torch_generator(3, "inspect/mask", shown["row"]))[0].numpy()
        original = decoded(x)[0].astype(int)
        seen = x.clone()
        for y, z in np.argwhere(mask):
            seen[0, :, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2] = 0
            assert (masked[8 * y : 8 * y + 8, 8 * z : 8 * z + 8] == 128).all()
        for y, z in np.argwhere(~mask):
            block = (slice(8 * y, 8 * y + 8), slice(8 * z, 8 * z + 8))
            assert np.abs(masked[block] - original[block]).max() <= 1
        with torch.no_grad():
            output = model.reconstruct(seen)[0]
        hidden = torch.from_numpy(mask.repeat(2, 0).repeat(2, 1))
        assert np.abs(latent - original).max() <= 1
        assert np.abs(filled - decoded(torch.where(hidden, output, x))[0]).max() <= 1
        assert np.abs(network - decoded(output)[0]).max() <= 1
        assert np.abs(source - original).mean() < 12


# Feature sets


def check(model, n=12, drop=True, guard=1e-3, latents=None):
    latents = torch.from_numpy(normal(n)).float() if latents is None else latents
    encoder = MAEEncoder(model, drop_duplicates=drop)
    return {c.name: c for c in check_feature_sets(encoder, latents, guard=guard)}


def test_the_scale_is_the_mean_distance_of_a_plain_loop():
    found = check(random_mae())
    with torch.no_grad():
        sets = random_mae().encode(torch.from_numpy(normal(12)).float(), drop_duplicates=True)
    assert set(found) == {*sets, "global"}
    for name in ("norm_x", "conv1", "layer2_std_2", "layer3_mean", "layer4"):
        values = sets[name].double().numpy()  # [M, L, C]
        apart = [
            np.linalg.norm(values[i, l] - values[j, l])
            for i in range(12)
            for j in range(12)
            for l in range(values.shape[1])
            if i != j
        ]
        assert found[name].scale == pytest.approx(np.mean(apart) / math.sqrt(values.shape[2]), rel=1e-4)
        assert found[name].rms == pytest.approx(math.sqrt((values**2).mean()), rel=1e-5)
        assert (found[name].locations, found[name].channels) == values.shape[1:]
    assert found["global"].channels == 256
    for one in found.values():
        assert one.problem is None and not one.by_construction
        assert one.not_finite == one.constant_channels == 0


def test_a_stage_of_zeros_and_an_encoder_that_does_not_look_at_its_input():
    model = random_mae()
    for parameter in model.encoder.stages[3].parameters():
        parameter.data.zero_()
    found = check(model)
    assert {c.problem for name, c in found.items() if not name.startswith("layer4")} == {None}
    assert found["layer4"].problem == "constant" and found["layer4"].constant_channels == 1
    model = random_mae()
    model.encoder.stem.conv.weight.data.zero_()
    model.encoder.stem.norm.bias.data.normal_()
    found = check(model)["layer1"]
    assert found.problem == "the same for every sample"  # the edges differ from the middle
    assert found.constant_channels < 1


def test_weights_that_are_not_finite(world, settings, tmp_path):
    model = random_mae()
    model.encoder.stages[2][0].conv1.weight.data[0, 0, 0, 0] = math.nan
    model.save_pretrained(tmp_path / "mae")
    found = check(model)
    assert found["layer2"].problem is None and found["layer3"].problem == "not finite"
    assert 0 < found["layer3"].not_finite <= 1
    report = inspect_mae(tmp_path / "mae", world / "center", settings, tmp_path / "out")
    assert any("its weights are not finite" in line for line in report)
    assert read_meta(tmp_path)["masked_error"]["others"]["error"] is None
    report = inspect_features(world / "center", settings, tmp_path / "out", mae=tmp_path / "mae")
    assert any(line.startswith("warning: feature sets that are not finite: layer3") for line in report)
    assert any(line.startswith("layer3_mean ") and line.endswith("<- not finite") for line in report)
    meta = read_meta(tmp_path)
    bad = {name for name, one in found.items() if one.problem}
    assert {one["name"] for one in meta["feature_sets"] if one["problem"]} == bad


def test_features_below_the_guard_of_the_field():
    latents = 1e-4 * torch.from_numpy(normal(12)).float()
    assert "smaller than the field's guard" in check(random_mae(), latents=latents)["global"].problem
    assert check(random_mae(), latents=latents, guard=1e-6)["global"].problem is None


def test_sets_that_are_constant_by_construction_are_no_warning():
    """With one channel per group in the first two stages, whatever the weights are."""
    model = random_mae({"base_channels": 16, "layers": (1, 1, 1, 1), "norm_groups": 16, "num_classes": 3})
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.normal_()
            module.bias.data.normal_()
    found = check(model)
    assert {name for name, c in found.items() if c.by_construction} == {"layer1_mean", "layer1_std"}
    for name, one in found.items():
        if one.by_construction:
            assert one.scale < 1e-5 and one.problem is None
        else:
            assert one.scale > 1e-3 and one.problem is None, name
    # Kept duplicates: the std of the one location of layer 4
    kept = check(model, drop=False)
    assert kept["layer4_std"].by_construction and not kept["layer4_mean"].by_construction
    assert kept["layer4_std"].scale == 0


def test_neighbours_are_those_of_a_plain_loop(world, settings, trained, tmp_path):
    """By the mean distance over locations; the mirror image of a latent is left out."""
    out = tmp_path / "out"
    inspect_features(world / "center", settings, out, Look(5, 3), mae=trained, sets=("conv1", "global"))
    meta, picture = read_meta(tmp_path), read_png(out / "neighbours.png")
    store = LatentStore.open(world / "center")
    latents = store.rows(np.arange(22))
    with torch.no_grad():
        sets = MAEEncoder(LatentMAE.from_pretrained(trained)).encode(latents)
    queries = [one["row"] for one in meta["shown"]]
    same = []
    for name in ("conv1", "global"):
        values = sets[name].double().numpy()  # [22, L, C]
        for query, found in zip(queries, meta["neighbours"][name]["rows"], strict=True):
            apart = {
                row: np.mean(
                    [np.linalg.norm(values[row, l] - values[query, l]) for l in range(values.shape[1])]
                )
                for row in range(22)
                if row // 2 != query // 2
            }
            assert found == sorted(apart, key=apart.get)[:7]
            same += [store.labels[row] == store.labels[query] for row in found]
    shares = [meta["neighbours"][name]["same_class"] for name in ("conv1", "global")]
    assert np.mean(shares) == pytest.approx(np.mean(same))
    assert [*meta["neighbours"]] == ["conv1", "global"] and 0.2 < meta["same_class_by_chance"] < 0.5

    left, step = picture.shape[1] - 8 * STEP, STEP
    top = picture.shape[0] - 5 * step  # of the last block
    near = meta["neighbours"]["global"]["rows"]
    for place, query in enumerate(queries):
        for column, row in enumerate([query, *near[place]]):
            y, x = top + place * step, left + column * step
            tile = picture[y : y + 96 : SCALE, x : x + 96 : SCALE].astype(int)
            assert np.abs(tile - decoded(latents[row : row + 1])[0])[1:-1, 1:-1].max() <= 1
            framed = (tile[0] == (200, 0, 0)).all()
            assert framed == (store.labels[row] != store.labels[query])


# Refusals


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def set_meta(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("file", "tamper", "told"),
    [
        (0, flip_a_byte, "is not what train_meta.json was written for"),
        (1, flip_a_byte, "labels"),
        (0, cut, "is cut short"),
        (2, cut, "is not JSON"),
        (2, Path.unlink, "is missing"),
        (2, lambda path: path.write_text("[1]"), "holds list"),
        (2, set_meta(num_classes="3"), 'num_classes is "3"'),
        (2, set_meta(num_classes=2), "labels 0 to 2"),
        (2, set_meta(class_names=["a", "b"]), "class_names is"),
        (2, set_meta(shape=[1, 2]), "shape is [1, 2]"),
        (2, set_meta(view="side"), 'view is "side"'),
        (2, set_meta(sha256={}), "sha256.latents is {}"),
        (2, set_meta(skipped_images={"count": 1}), "skipped_images.names is"),
        (2, set_meta(images=50), "49 images"),
        (2, set_meta(mirror=1), "mirror is 1"),
        (2, set_meta(image_size=64), "image_size is 64"),
        (2, set_meta(vae_sha256="0" * 64), "other weights of pretrained/digits_vae"),
    ],
)
def test_what_was_changed_is_named_and_nothing_written(settings, copy, tmp_path, file, tamper, told):
    path = latent_files(copy)[file]
    tamper(path)
    message = complaint(lambda: inspect_latents(copy, settings, tmp_path / "out"))
    assert told in message and str(copy) in message
    if "labels 0 to 2" not in told:
        assert path.name in message
    assert not (tmp_path / "out").exists()


def test_a_wrong_folder_view_or_shape(world, settings, tmp_path):
    def look(folder, out=tmp_path / "out", **options):
        return complaint(lambda: inspect_latents(folder, settings, out, **options))

    assert "there is no such folder of latents" in look(tmp_path / "nowhere")
    assert 'view is "center"' in look(world / "center", view="augmented")
    assert "is what is inspected" in look(world / "center", out=world / "center")
    make_store(tmp_path / "latents", normal(6, (4, 4, 4)))
    told = look(tmp_path / "latents")
    assert "latents of [4, 4, 4]" in told and "[4, 8, 8]" in told


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda f: cut(f / "diffusion_pytorch_model.safetensors"), "model.safetensors: damaged"),
        (lambda f: set_meta(base_channels=8)(f / "config.json"), "copying a param with shape"),
        (lambda f: (f / "settings.yaml").write_text("{"), "settings.yaml: line 1 is not YAML"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_an_mae_that_was_changed(world, settings, trained, tmp_path, tamper, told):
    folder = Path(shutil.copytree(trained, tmp_path / "mae"))
    tamper(folder)
    message = complaint(lambda: inspect_mae(folder, world / "center", settings, tmp_path / "out"))
    assert told in message and str(folder) in message
    assert not (tmp_path / "out").exists()


def test_an_mae_of_other_inputs(world, settings, tmp_path):
    def look(config):
        random_mae(config).save_pretrained(tmp_path / "mae")
        return complaint(lambda: inspect_mae(tmp_path / "mae", world / "center", settings, tmp_path / "out"))

    shape = {"base_channels": 8, "layers": (1, 1, 1, 1), "norm_groups": 2}
    assert "3 channels" in look(dict(in_channels=3, **shape))
    assert "cannot be masked in squares of 6x6" in look(dict(input_patch_size=3, **shape))
    assert "cannot be masked in squares" in look(dict(patch_size=3, **shape))


def test_one_image_has_no_features_to_compare(settings, tmp_path):
    random_mae().save_pretrained(tmp_path / "mae")
    make_store(tmp_path / "latents", normal(1))
    settings = settings.model_copy(update={"mae": settings.mae.model_copy(update={"held_out": 0})})
    latents, out = tmp_path / "latents", tmp_path / "out"
    looked = lambda: inspect_features(latents, settings, out, mae=tmp_path / "mae")  # noqa: E731
    assert "features of one image" in complaint(looked)
    assert any("of 1 latents" in line for line in inspect_mae(tmp_path / "mae", latents, settings, out))


# Pictures


def test_bands_put_kinds_below_each_other_and_go_on_below():
    colours = np.arange(10, 130, 10, dtype=np.uint8)  # of 12 things
    one = np.broadcast_to(colours[:, None, None, None], (12, 32, 32, 3))
    captions = ["Mergus serrator, the red-breasted merganser"] * 12
    picture = np.asarray(bands({"one": one, "two": one + 100}, captions))
    for index, colour in enumerate(colours):
        assert (cell(picture, index, 0, 12, 2) == colour).all()
        assert (cell(picture, index, 1, 12, 2) == colour + 100).all()
    left = picture.shape[1] - 8 * STEP
    assert (picture[:, : left - 4] < 128).any()  # the names of the kinds
    heads = picture[: len(picture) // 2 - 2 * STEP - 2, left : left + STEP]
    assert (heads < 128).any() and (heads[:, -2:] == 255).all()  # a long caption stays within its image


# The command


def run(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command_prints_numbers_warnings_and_files(world, tmp_path, capsys, trained):
    params = ["--params", world / "params.yaml", "--out", tmp_path / "a"]
    some = ["--count", 3, "--compare-images"]
    code, out, err = run(capsys, "latents", world / "center", *params, *some)
    assert (code, err) == (0, "")
    assert "mean" in out and "difference:" in out and "warning" not in out
    assert f"written: {tmp_path / 'a' / 'latents.png'}" in out

    make_store(tmp_path / "unscaled", np.load(latent_files(world / "center")[0]) / 1.82155)
    code, out, _ = run(capsys, "latents", tmp_path / "unscaled", *params)
    assert code == 0 and "warning: the standard deviation of all latents is" in out

    more = ["--latents", world / "augmented", *params, "--compare-images", world / "images"]
    code, out, _ = run(capsys, "mae", trained, *more)
    assert code == 0 and "masked error:" in out
    code, out, _ = run(capsys, "features", "--mae", trained, "--sets", "layer2", "global", *more)
    assert code == 0 and "layer3_mean_2" not in out and "layer3_mean " in out
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"mae.png", "neighbours.png", "meta.json"}
    code, out, _ = run(
        capsys, "features", "latent", "{encoder: mae, duplicates: keep}", "--mae", trained, *more
    )
    assert code == 0 and "features:     latent, mae" in out and "layer3_mean_2" in out
    for encoder, told in (("nope", "features.0 = 'nope': allowed: "), ("{", "{encoder: NAME")):
        code, _, err = run(capsys, "features", encoder, *more)
        assert code == 2 and told in err
    code, _, err = run(capsys, "features", "latent", "--sets", "layer2", *more)
    assert code == 2 and "--sets layer2: there is no such feature set, but global" in err


def test_without_a_folder_it_is_that_of_the_view(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(world / "augmented", tmp_path / "artifacts" / "latents" / "augmented")
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    shutil.copy(world / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "latents", "--view", "augmented", "--count", 1)
    assert code == 0 and "outputs/latents-augmented/meta.json" in out
    code, _, err = run(capsys, "latents")
    assert code == 2 and "artifacts/latents/center: there is no such folder" in err
    content = yaml.safe_load((tmp_path / "params.yaml").read_text())
    content["drift"]["view"] = "augmented"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    code, out, _ = run(capsys, "latents", "--count", 1)
    assert code == 0 and "outputs/latents-augmented/meta.json" in out
