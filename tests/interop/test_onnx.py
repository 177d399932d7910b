"""The networks in ONNX, run by onnxruntime, against PyTorch."""

import importlib.util

import numpy as np
import pytest
import torch
from complaints import complaint
from small_generator import write_generator

from drift.evaluation.sample import draw_inputs
from drift.interop import onnx
from drift.interop.card import Card, export_pipeline
from drift.interop.pipeline import DriftPipeline

COPY = "ema_0999"


def write_copies(folder, **sizes):
    """A generator with another copy of its weights."""
    write_generator(folder / "other", seed=1, depth=1, **sizes)
    write_generator(folder / "generator", depth=1, **sizes)
    other = DriftPipeline.from_pretrained(folder / "other").generator
    other.save_pretrained(folder / "generator", variant=COPY)
    return folder / "generator"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"context_tokens": 0, "style_codebooks": 0}])
def test_they_equal_pytorch_for_any_number_of_samples_and_the_card_tells_how(tmp_path, monkeypatch, sizes):
    from onnxruntime import InferenceSession

    source = write_copies(tmp_path, **sizes)
    export_pipeline(source, tmp_path / "out", Card("x"), weights=COPY, onnx=True)
    pipe = DriftPipeline.from_pretrained(source, variant=COPY)
    files = [tmp_path / f"out/{name}.onnx" for name in ("generator", "decoder")]
    generator, decoder = map(InferenceSession, files)
    assert [each.name for each in generator.get_inputs()] == ["noise", "labels", "omega", "style_indices"]
    for count in (1, 3, 70):
        noise, style = draw_inputs(range(count), pipe.generator.config, 5)
        labels, omega = torch.arange(count) % 3, torch.linspace(1, 4, count)
        expected = {
            kind: pipe(labels, omega, noise=noise, style_indices=style, output_type=kind).images
            for kind in ("latent", "pt")
        }
        inputs = {"noise": noise, "labels": labels, "omega": omega, "style_indices": style}
        (latents,) = generator.run(None, {name: value.numpy() for name, value in inputs.items()})
        np.testing.assert_allclose(latents, expected["latent"], atol=1e-4, rtol=1e-4)
        (images,) = decoder.run(None, {"latents": latents})
        np.testing.assert_allclose((images.clip(-1, 1) + 1) / 2, expected["pt"], atol=0.5 / 255 + 1e-4)
    assert not any(b".py" in file.read_bytes() for file in files)  # no paths of this machine
    program = (tmp_path / "out/README.md").read_text().split("```python\n")[2].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    result = {}
    exec(program, result)
    assert result["images"].shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_without_the_vae_there_is_no_decoder_and_large_weights_have_their_own_file(tmp_path, monkeypatch):
    from onnxruntime import InferenceSession

    pipe = DriftPipeline.from_pretrained(write_copies(tmp_path))
    pipe.vae_reference = {"id": "someone/vae", "revision": None}
    monkeypatch.setattr(DriftPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(onnx, "_LARGEST", 0)
    export_pipeline(tmp_path / "generator", tmp_path / "out", Card("x"), onnx=True, include_vae=False)
    files = {path.name for path in (tmp_path / "out").glob("*.onnx*")}
    assert files == {"generator.onnx", "generator.onnx.data"}
    assert InferenceSession(tmp_path / "out/generator.onnx").get_outputs()[0].shape == ["batch", 4, 4, 4]
    assert "decoder.onnx" not in (tmp_path / "out/README.md").read_text()


def test_without_the_extra_one_line_says_so_before_the_work(generator_folder, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    lacking = lambda name: None if name == "onnxscript" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    told = complaint(lambda: export_pipeline(generator_folder, tmp_path / "out", Card("x"), onnx=True))
    assert told.startswith("--onnx needs onnxscript: pip install -c constraints.txt -e '.[onnx]'")
    assert not list(tmp_path.iterdir())
