"""A generator of pixels: its pipeline needs no VAE, loaded, exported and sampled."""

import json
import shutil

import numpy as np
import pytest
import torch
from complaints import complaint
from huggingface_hub import ModelCard
from PIL import Image
from small_generator import write_generator

from drift import cli
from drift.autoencoders.pixels import Pixels
from drift.evaluation.pictures import draw_images
from drift.evaluation.sample import ImageDecoder
from drift.interop.card import Card, export_pipeline
from drift.interop.pipeline import DriftPipeline
from drift.models.generator import Generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"in_channels": 3, "input_size": 8}
    return write_generator(tmp_path_factory.mktemp("pixels") / "generator", vae="pixels", **sizes)


def test_images_are_the_generators_output_in_8_bits(folder):
    pipe = DriftPipeline.from_pretrained(folder)
    assert pipe.vae is None and pipe.makes_pixels
    how = {"class_labels": [0, 2], "omega": 1.5}
    made = lambda kind: pipe(**how, generator=pipe.sample_generators(9, [4, 5]), output_type=kind).images  # noqa: E731
    levels = np.clip(np.rint((made("latent").double().numpy() + 1) * 127.5), 0, 255)
    assert 0 < levels.mean() < 255 and np.array_equal(made("pt").numpy() * 255, levels)
    of_fid = draw_images(
        Generator.from_pretrained(folder), ImageDecoder(Pixels(), 3), [(0, 4, 1.5), (2, 5, 1.5)], 9, 2
    )
    assert np.array_equal(np.stack([np.asarray(image) for image in made("pil")]), of_fid)


@pytest.mark.parametrize("include_vae", [True, False])
def test_an_export_is_whole_without_a_vae_and_can_be_sampled(
    folder, tmp_path, monkeypatch, capsys, include_vae
):
    (tmp_path / "pixels").mkdir()  # which the id does not mean
    monkeypatch.chdir(tmp_path)
    files = dict(export_pipeline(folder, tmp_path / "out", Card("px"), include_vae=include_vae))
    assert not any(name.startswith("vae/") for name in files)
    assert "| VAE | none: the generator makes pixels |" in ModelCard.load(tmp_path / "out/README.md").text
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["vae"] == [None, None] and index["vae_reference"] == {"id": "pixels", "revision": None}
    pictures = []
    for source in (folder, tmp_path / "out"):
        sample = ["sample", str(source), "--classes", "1", "--count", "2", "--files", "--device", "cpu"]
        assert cli.main([*sample, "--out", str(tmp_path / "png")]) == 0, capsys.readouterr().err
        pictures.append([np.asarray(Image.open(path)) for path in sorted((tmp_path / "png/1").iterdir())])
        shutil.rmtree(tmp_path / "png")
    assert len(pictures[0]) == 2 and np.array_equal(*pictures)


def test_an_imported_generator_is_told_to_make_pixels(folder, generator_folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "imported")
    (bare / "settings.yaml").unlink()
    assert "which VAE it needs; name it" in complaint(lambda: DriftPipeline.from_pretrained(bare))
    pipe = DriftPipeline.from_pretrained(bare, vae="pixels")
    assert pipe([1]).images[0].size == (8, 8)
    pipe.save_pretrained(tmp_path / "saved")
    again = DriftPipeline.from_pretrained(tmp_path / "saved")
    assert again.makes_pixels and torch.equal(
        again.generator.position_embedding, pipe.generator.position_embedding
    )
    told = complaint(lambda: DriftPipeline.from_pretrained(generator_folder, vae="pixels"))
    assert told == "a generator of 4 channels makes no pixels; name its VAE"
