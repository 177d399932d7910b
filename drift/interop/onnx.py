"""A pipeline's networks in ONNX, which runs without PyTorch: onnxruntime, in a browser too.

`generator.onnx` takes `noise [B, C, h, w]`, `labels [B]`, `omega [B]` and `style_indices [B, S]`, as
`Generator.forward` does, and gives `latents [B, C, h, w]`. `decoder.onnx` makes `images [B, 3, H, W]` around
[-1, 1] of these. Floats are float32, whole numbers int64, and B is free.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drift.evaluation.sample import draw_inputs
from drift.interop.pipeline import DriftPipeline, autoencoder_kind
from drift.models.generator import StyleEmbedder
from drift.runtime.errors import UserError

GENERATOR_FILE, DECODER_FILE = "generator.onnx", "decoder.onnx"
_OPSET = 18  # what PyTorch's exporter writes natively; browsers know it
_LARGEST = 1_900_000_000  # bytes of weights in one file; a message of protobuf has 2 GiB at most


def check_onnx() -> None:
    """Raise `UserError` if what PyTorch's exporter needs is not installed."""
    missing = [name for name in ("onnx", "onnx_ir", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--onnx needs {', '.join(missing)}: pip install -c constraints.txt -e '.[onnx]', or leave it out"
        )


def export_onnx(pipeline: DriftPipeline, folder: Path, *, include_decoder: bool = True) -> None:
    """Write `generator.onnx` into `folder` and, if the pipeline has a VAE, `decoder.onnx`.

    Weights of more than 1.9 GB go into a file `.onnx.data` beside it. `check_onnx` comes
    first.
    """
    noise, style = draw_inputs(range(2), pipeline.generator.config, 0)  # two, since 1 is no free dimension
    inputs = {
        "noise": noise,
        "labels": torch.zeros(2, dtype=torch.long),
        "omega": torch.ones(2),
        "style_indices": style,
    }
    with _styles_by_sum(pipeline.generator.style_embedder):
        _write(pipeline.generator, inputs, "latents", folder / GENERATOR_FILE)
    if include_decoder and pipeline.vae is not None:
        _write(_Decoder(pipeline.vae), {"latents": noise}, "images", folder / DECODER_FILE)


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae, self.decode = vae, autoencoder_kind(vae).decode_by  # pyright: ignore[reportArgumentType]

    def forward(self, latents: Tensor) -> Tensor:
        return self.decode(self.vae, latents)


@contextmanager
def _styles_by_sum(embedder: StyleEmbedder | None) -> Iterator[None]:
    """Style embeddings by lookup and sum: of `embedding_bag` the exporter makes a loop over the batch."""
    if embedder is None:
        yield
        return

    def forward(indices: Tensor) -> Tensor:
        first = torch.arange(embedder.codebooks) * embedder.entries
        return F.embedding(indices + first, embedder.weight).sum(1)

    embedder.forward = forward
    try:
        yield
    finally:
        del embedder.forward  # the class's own


def _write(network: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # ONNX knows no largest B. For 64 and more, diffusers lays out memory anew, which is nothing there
    batch = torch.export.Dim("batch", max=63)
    shapes = tuple({0: batch} for _ in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own parts warn of each other
        # Strict tracing fails in the decoder's NumPy, and nothing else frees B without context tokens
        traced = torch.export.export(
            network.eval(),
            tuple(inputs.values()),
            dynamic_shapes=shapes,
            strict=not isinstance(network, _Decoder),
        )
        program = torch.onnx.export(
            traced,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # it has the exporting machine's paths
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    program.save(path, external_data=weights > _LARGEST)
