"""The networks whose features the Fréchet distance compares, each with the resizing that belongs to it."""

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from drift.evaluation.batches import in_batches
from drift.models.base import model_files
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError
from drift.runtime.files import check_readable, sha256, without_wrappers
from drift.runtime.torchvision import ensure_torchvision
from drift.settings import Fid

INCEPTION = "inception"
INCEPTION_DIMENSION = 2048  # width of Inception-v3's last pooling layer
INCEPTION_SIZE = 299  # pixels
TORCHSCRIPT = (".pt", ".ts", ".torchscript")

# SHA-256 of the published weights, by clean-fid's mode. The TorchScript file is stylegan2-ada-pytorch's;
# of pytorch-fid's weights these are the first eight digits, which their file name carries.
_TORCHSCRIPT_DIGEST = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_INCEPTION_DIGESTS = {
    "clean": _TORCHSCRIPT_DIGEST,
    "legacy_tensorflow": _TORCHSCRIPT_DIGEST,
    "legacy_pytorch": "6726825d",
}


@dataclass
class FeatureNetwork:
    """A frozen network that turns 8-bit images into feature vectors, and perhaps those into class logits."""

    name: str
    dimension: int
    digest: str
    """Hash of the weights and of the resizing: features are comparable where it is equal."""
    device: torch.device
    resize: Callable[[np.ndarray], np.ndarray]
    """uint8 `[H, W, 3]` -> `[S, S, 3]` in 0..255."""
    extract: Callable[[Tensor], Tensor]
    """float32 `[B, 3, S, S]` in 0..255 -> `[B, D]`."""
    classify: Callable[[Tensor], Tensor] | None = None
    """Features `[B, D]` -> logits `[B, classes]`."""
    labels: bool = False
    """Whether the classes are those of the data, so that predictions can be compared with labels."""
    published: bool | None = None
    """Whether the weights are those that everybody's FID is measured with; None if there are no such."""
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """Threads that resize; the resizers release Python's lock while they compute."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` -> float32 features `[B, D]`."""
        return self.features(self.resized(images))

    def resized(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` -> float32 `[B, S, S, 3]` in 0..255, on the CPU and in any thread."""
        return torch.from_numpy(np.stack(list(self.pool.map(self.resize, images.cpu().numpy())))).float()

    @torch.inference_mode()
    def features(self, resized: Tensor) -> Tensor:
        """What `resized` gives -> float32 features `[B, D]`."""
        pixels = resized.to(self.device).permute(0, 3, 1, 2).contiguous()
        # A caller's mixed precision would change the features, and with them every distance
        with torch.autocast(self.device.type, enabled=False):
            return in_batches(self.extract, pixels).float()

    @torch.inference_mode()
    def logits(self, features: Tensor | np.ndarray) -> Tensor:
        """Features `[B, D]` -> logits `[B, classes]`; only where there is a `classify`."""
        assert self.classify is not None
        with torch.autocast(self.device.type, enabled=False):
            return self.classify(torch.as_tensor(features).to(self.device))


def load_feature_network(fid: Fid, device: str | torch.device = "cpu", workers: int = 1) -> FeatureNetwork:
    """The feature network `fid.features`, ready on `device`.

    - `inception`: clean-fid's extractor with the resizing of `fid.mode`, from the file `fid.inception` if it
      is named, and else from PyTorch's cache, into which it is downloaded.
    - A TorchScript file: float32 `[B, 3, S, S]` in 0..255 -> `[B, D]`, after the resizing of clean-fid's
      `clean` to its attribute `image_size` (299 without one). Its code runs, so trust its source.
    - The folder of an image classifier of this project, which sees images resized in the same way.

    Raises `UserError` if a file is missing, damaged or of something else.
    """
    device = torch.device(device)
    ensure_torchvision()
    if fid.features == INCEPTION:
        network = _load_inception(fid.mode, device, fid.inception)
    elif fid.features.endswith(TORCHSCRIPT):
        network = _load_torchscript(fid.features, device)
    else:
        network = _load_classifier(fid.features, device)
    network.pool = ThreadPoolExecutor(max(1, workers))
    return network


def _load_inception(mode: str, device: torch.device, local: str | None) -> FeatureNetwork:
    digest = _INCEPTION_DIGESTS[mode]
    if local is None:
        path, what = _download_inception(mode), "Inception's weights"
    else:
        path, what = Path(local), f"fid.inception = {local}"
        check_readable(path, what, "correct the path")
    found = sha256(path)
    if not found.startswith(digest):
        print(f"note: {path} is not the published file for fid.mode {mode}: its numbers are not comparable")
    # clean-fid calls torchvision by a deprecated argument, and one of its resizers switches all warnings off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid.resize import build_resizer

        resize = build_resizer(mode)
        try:
            extract, weight = _inception_layers(mode, path, device)
        except Exception as error:  # PyTorch raises exceptions of seven kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{what}: damaged, or not Inception's weights for this fid.mode ({reason}); "
                "get a fresh copy or choose another mode"
            ) from None
    return FeatureNetwork(
        INCEPTION,
        INCEPTION_DIMENSION,
        _digest(mode, found),
        device,
        resize,
        extract,
        # Without the bias, as the original Inception Score is computed (OpenAI's improved-gan, issue 39)
        classify=lambda features: features @ weight.T,
        published=found.startswith(digest),
    )


def _inception_file(mode: str) -> tuple[str, Path]:
    """URL of the weights for a clean-fid mode, and their path in PyTorch's cache.

    clean-fid's own download checks no digest, and keeps the file in a shared `/tmp`.
    """
    if mode == "legacy_pytorch":
        from cleanfid.inception_pytorch import FID_WEIGHTS_URL as url
    else:
        from cleanfid.downloads_helper import inception_url as url
    return url, Path(torch.hub.get_dir(), "checkpoints", Path(url).name)


def _download_inception(mode: str) -> Path:
    """The weights in PyTorch's cache, whole; `UserError` if they cannot be had."""
    digest, (url, path) = _INCEPTION_DIGESTS[mode], _inception_file(mode)
    way_out = "name a copy of Inception's weights in fid.inception"
    if not os.path.lexists(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"downloading {url} to {path}", flush=True)
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: of another digest
            raise UserError(
                f"{path}: Inception's weights are missing and cannot be downloaded ({error}); get {url} "
                f"where there is a network and put it there, or {way_out}"
            ) from None
    check_readable(path, str(path), way_out)
    if not sha256(path).startswith(digest):
        raise UserError(f"{path}: damaged, or not the file published at {url}; delete it, or {way_out}")
    return path


def _inception_layers(
    mode: str, path: Path, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What extracts features, as clean-fid does it, and the weights `[1008, 2048]` of the last layer."""
    if mode == "legacy_pytorch":
        from cleanfid import inception_pytorch

        weights = without_wrappers(torch.load(path, map_location="cpu", weights_only=True))
        with mock.patch.object(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: weights):
            port = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).to(device).eval()
        return lambda images: port(images / 255)[0].flatten(1), weights["fc.weight"].to(device)
    network = torch.jit.load(path, map_location=device).eval()
    weight, layers = network.output.weight.detach(), network.layers
    if mode == "legacy_tensorflow":
        return partial(network, return_features=True), weight
    return lambda images: layers((images - 128) / 128), weight


def _load_torchscript(name: str, device: torch.device) -> FeatureNetwork:
    check_readable(name, f"feature network {name}", "correct fid.features")
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"feature network {name}: damaged or not TorchScript ({reason})") from None
    size = int(getattr(network, "image_size", INCEPTION_SIZE))
    with torch.inference_mode():
        found = network(torch.zeros(1, 3, size, size, device=device))
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(shape, list) or len(shape) != 2:
        raise UserError(f"feature network {name}: gives {shape} for an image; it must give [1, D] features")
    return FeatureNetwork(
        name, shape[1], _digest(str(size), sha256(name)), device, _clean_resizer(size), network
    )


def _load_classifier(folder: str, device: torch.device) -> FeatureNetwork:
    if not Path(folder).is_dir():
        raise UserError(
            f"feature network {folder}: there is no such folder; name one, or a TorchScript file "
            f"({', '.join(TORCHSCRIPT)}), or write {INCEPTION}"
        )
    network = ImageClassifier.from_pretrained(folder).requires_grad_(False)
    nn.Module.to(network, device)  # diffusers' own has no types
    return FeatureNetwork(
        folder,
        network.config["feature_dim"],
        _digest(*map(sha256, model_files(Path(folder)))),
        device,
        _clean_resizer(network.config["image_size"]),
        network.features,
        network.logits,
        labels=True,
    )


def _clean_resizer(size: int) -> Callable[[np.ndarray], np.ndarray]:
    from cleanfid.resize import make_resizer

    return make_resizer("PIL", False, "bicubic", (size, size))


def _digest(*parts: str) -> str:
    return hashlib.sha256(":".join(parts).encode()).hexdigest()
