"""What an evaluation writes: pictures, the table, the page, and files for other people's scripts."""

import base64
import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from standins import Decoder

from drift.evaluation.outputs import flat_metrics, sweep_summary, write_sweep_csv
from drift.evaluation.page import render_page
from drift.evaluation.pictures import draw_images, image_grid, save_png
from drift.evaluation.report import format_report, print_report
from drift.evaluation.sample import ImageDecoder


def entry(omega, fid, decay=0.995):
    return {
        "omega": omega, "ema_decay": decay, "fid": fid, "kid": 0.00123 * omega,
        "inception_score": 9.1 + omega, "inception_score_std": 0.2, "precision": 0.8123,
        "recall": 0.7 - omega / 100, "accuracy": 0.98,
    }  # fmt: skip


SWEEP = [entry(1.0, 3.25), entry(1.5, 2.125), entry(2.0, 4.5)]
MEASURED = {
    "best": SWEEP[1], "sweep": SWEEP, "floor": 1.5, "training": 0.75, "images": 1000,
    "classifier_accuracy_real": 0.994, "self_test": {"same": 1e-9, "halves": 1.5},
    "protocol": {
        "features": "pretrained/digits_classifier", "reference": "held_out", "reference_images": 360,
        "reference_digest": "abc", "floor_images": 70, "mode": "clean", "latent_scale_factor": 0.18215,
        "generator_folder": "artifacts/generator",
    },
}  # fmt: skip
BARE = MEASURED | {"floor": None, "training": None, "classifier_accuracy_real": None}
BARE |= {"best": {"omega": 1.0, "ema_decay": None, "fid": 3.25}}
BARE |= {"sweep": [BARE["best"]]}

# Numbers


def test_metrics_are_at_most_ten_flat_numbers():
    numbers = flat_metrics(MEASURED)
    assert len(numbers) <= 10 and all(type(number) is float for number in numbers.values())
    assert (numbers["fid"], numbers["omega"], numbers["fid_of_training_images"]) == (2.125, 1.5, 0.75)
    assert "inception_score_std" not in numbers
    assert flat_metrics(BARE) == {"omega": 1.0, "fid": 3.25}


def test_files_of_the_sweep(tmp_path):
    entries = [
        {"omega": 1.0, "ema_decay": 0.9, "fid": 8.25, "accuracy": 0.5},
        {"omega": 1.5, "ema_decay": None, "fid": 7.0, "kid": 0.25, "dir": "png/gen_omega_1.5"},
    ]
    write_sweep_csv(tmp_path / "sweep.csv", entries)
    head, *rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert head == "omega,ema_decay,fid,kid,inception_score,inception_score_std,precision,recall,accuracy,dir"
    assert rows == ["1.0,0.9,8.25,,,,,,0.5,", "1.5,,7.0,0.25,,,,,,png/gen_omega_1.5"]
    settings = SimpleNamespace(hardware=SimpleNamespace(sample_batch=10, workers=2))
    summary = sweep_summary(MEASURED | {"sweep": entries, "best": entries[1]}, settings)
    assert summary == {
        "ckpt": "artifacts/generator", "use_ema": True, "num_gen": 1000, "batch_size": 10,
        "fid": {"mode": "clean", "batch_size": 10, "workers": 2}, "real_dir": "held_out", "real_stats": "abc",
        "latent_scale_factor": 0.18215, "omegas": [1.0, 1.5], "best": entries[1],
        "results": [entries[0] | {"dir": None}, entries[1]],
    }  # fmt: skip


def test_the_table_has_a_row_per_point_and_the_best_marked(tmp_path, capsys):
    lines = format_report(MEASURED).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "(best)" not in lines[2] and "3.25" in lines[2] and "98.0%" in lines[2] and "0.00123" in lines[2]
    assert "1.5 (best)" in lines[3] and "KID" in lines[0]
    told = "\n".join(lines[5:])
    assert "180 images each): 1.50" in told and "70 real training images, as if generated: 0.75" in told
    assert "KID" not in format_report(BARE) and "floor" not in format_report(BARE)
    (tmp_path / "protocol.json").write_text(json.dumps(MEASURED))
    print_report(tmp_path / "protocol.json", [tmp_path / "a.csv", tmp_path / "b.html"], "png")
    said = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in said] == ["curve:", "report:", "images:"]


# The page


def page(tmp_path, measured=MEASURED, **changes):
    log = tmp_path / "logs.jsonl"
    log.write_text(
        "".join(json.dumps({"step": s, "loss": 1.0, "drift_rms": 2 - s / 9}) + "\n" for s in range(9))
    )
    parts = {"settings": {"drift": {"hidden": 96}}, "pictures": {"Samples": b"a PNG"}, "training_log": log}
    return render_page(measured, **parts | changes)


def test_the_page_has_everything_and_fetches_nothing(tmp_path):
    text = page(tmp_path)
    for point in SWEEP:
        assert f"{point['fid']:.2f}" in text and f"{point['inception_score']:.2f}" in text
    for found in ("held_out", '"hidden": 96'):
        assert found in text.replace("&quot;", '"')
    images = re.findall(r'src="([^"]*)"', text)
    data = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images]
    assert data[0] == b"a PNG" and data[1].startswith(b"\x89PNG") and len(data) == 2
    assert not re.search(r"<script|<link|href=|@import|url\(", text)
    assert page(tmp_path) == text


def test_hostile_names_are_only_text(tmp_path):
    hostile = "<script>alert(1)</script>\"'&"
    measured = copy.deepcopy(MEASURED)
    measured["protocol"]["generator_folder"] = measured["protocol"]["features"] = hostile
    text = page(tmp_path, measured, settings={hostile: hostile}, pictures={hostile: b""})
    assert "<script" not in text and text.count("&lt;script&gt;") >= 8


def test_a_page_of_the_least_and_of_several_ema_decays(tmp_path):
    assert "3.25" in page(tmp_path, BARE, training_log=tmp_path / "none")
    several = MEASURED | {"sweep": [*SWEEP, entry(1.0, 5.0, 0.999)]}
    assert page(tmp_path, several) != page(tmp_path)


# Pictures


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 200, (5, 32, 48, 3)).astype(np.uint8)


@pytest.mark.parametrize(("pad", "scale"), [(2, 1), (0, 1), (1, 3)])
def test_every_pixel_is_where_it_belongs(images, pad, scale):
    images = images[:, :4, :6]
    grid = np.asarray(image_grid(torch.from_numpy(images), columns=3, pad=pad, scale=scale))
    assert grid.shape == (2 * (4 * scale + pad) + pad, 3 * (6 * scale + pad) + pad, 3)
    expected = np.full_like(grid, 255)
    for index, y, x in np.ndindex(5, 4 * scale, 6 * scale):
        row = pad + (index // 3) * (4 * scale + pad) + y
        column = pad + (index % 3) * (6 * scale + pad) + x
        expected[row, column] = images[index, y // scale, x // scale]
    assert np.array_equal(grid, expected)


def test_labels_stand_at_their_rows_and_columns(images):
    plain = np.asarray(image_grid(images, columns=3))
    labels = {"row_labels": ["tench", ""], "column_labels": ["", "w 2", ""]}
    labelled = np.asarray(image_grid(images, columns=3, **labels))
    top, left = (labelled.shape[i] - plain.shape[i] for i in (0, 1))
    assert top > 8 and left > 10
    assert np.array_equal(labelled[top:, left:], plain)
    rows = np.flatnonzero((labelled[top:, :left] < 128).any((1, 2)))
    assert abs((rows.min() + rows.max()) / 2 - 18) < 4  # about the middle of the first row
    columns = np.flatnonzero((labelled[:top] < 128).any((0, 2))) - left
    assert abs((columns.min() + columns.max()) / 2 - (2 + 50 + 24)) < 4  # of the second column


def test_png_has_the_pixels_and_no_date(images, tmp_path):
    grid = image_grid(images, columns=2, row_labels=["a", "b", "c"])
    for name in ("one.png", "two.png"):
        save_png(tmp_path / name, grid)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.info == {}
        assert np.array_equal(np.asarray(image), np.asarray(grid))


def test_images_are_of_their_label_sample_and_omega():
    class Stripes:
        """Red tells the class, green the noise, blue the style index and omega."""

        config = {"in_channels": 3, "input_size": 16, "style_codebooks": 1, "style_entries": 5}  # noqa: RUF012
        device = torch.device("cpu")

        def __call__(self, noise, labels, omega, style_indices):
            blue = style_indices[:, 0] / 10 * omega / 4
            levels = torch.stack([labels / 10, noise.mean((1, 2, 3)), blue], 1)
            return levels[:, :, None, None].expand(-1, 3, 16, 16)

    wanted = [(label, sample, omega) for label in (7, 2) for sample in range(3) for omega in (1.0, 4.0)]
    decode = ImageDecoder(Decoder(), 5)
    found = draw_images(Stripes(), decode, wanted, 3, 5)
    assert torch.equal(found, draw_images(Stripes(), decode, wanted, 3, 12))
    red, green, blue = found[:, 0, 0].reshape(2, 3, 2, 3).numpy().astype(float).transpose(3, 0, 1, 2)
    assert (red == np.rint(127.5 + 12.75 * np.array([7, 2]))[:, None, None]).all()
    assert (green == green[:1, :, :1]).all() and len(np.unique(green)) == 3
    assert (blue == blue[:1]).all()
    assert blue[0, :, 1] - 127.5 == pytest.approx(4 * (blue[0, :, 0] - 127.5), abs=4)
