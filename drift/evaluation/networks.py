"""The networks whose features the Fréchet distance compares, each with the resizing that belongs to it."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from unittest import mock
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor

from drift.evaluation.batches import in_batches
from drift.models.base import model_files
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_readable, sha256, without_wrappers
from drift.runtime.torchvision import ensure_torchvision

INCEPTION = "inception"
INCEPTION_DIMENSION = 2048  # width of Inception-v3's last pooling layer
INCEPTION_SIZE = 299  # pixels
TORCHSCRIPT = (".pt", ".ts", ".torchscript")
CONNECT_TIMEOUT = 20  # seconds without an answer after which a download is given up

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
    workers: int = 1
    """Threads that resize; the resizers release Python's lock while they compute."""

    def __post_init__(self):
        self.pool = ThreadPoolExecutor(max(1, self.workers))

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


def load_feature_network(
    name: str,
    mode: str = "clean",
    device: str | torch.device = "cpu",
    workers: int = 1,
    inception: str | None = None,
) -> FeatureNetwork:
    """The feature network `name`, ready on `device`.

    - `inception`: clean-fid's extractor with the resizing of its `mode` (`clean`, `legacy_tensorflow` or
      `legacy_pytorch`), from the file `inception` if one is named, and else from PyTorch's cache, into which
      it is downloaded.
    - A TorchScript file: float32 `[B, 3, S, S]` in 0..255 -> `[B, D]`, after the resizing of clean-fid's
      `clean` to its attribute `image_size` (299 without one). Its code runs, so trust its source.
    - The folder of an image classifier of this project, which sees images resized in the same way.

    Raises `UserError` if a file is missing, damaged or of something else.
    """
    device = torch.device(device)
    if name == INCEPTION:
        return _load_inception(mode, device, workers, inception)
    if name.endswith(TORCHSCRIPT):
        return _load_torchscript(name, device, workers)
    return _load_classifier(name, device, workers)


def fetch(url: str, path: Path, digest: str) -> None:
    """Make sure that `path` is the file published at `url`, whose SHA-256 begins with `digest`.

    Raises `UserError` if it cannot be downloaded, or if `path` cannot be read or holds something else.
    clean-fid's own download checks no digest, has no timeout, and keeps the file in a shared `/tmp`.
    """
    way_out = "name a copy of Inception's weights in fid.inception"
    if os.path.lexists(path):
        check_readable(path, str(path), way_out)
        if not sha256(path).startswith(digest):
            raise UserError(f"{path}: damaged, or not the file published at {url}; delete it, or {way_out}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", flush=True)
        with urlopen(url, timeout=CONNECT_TIMEOUT) as answer, atomic_write(path) as file:
            shutil.copyfileobj(answer, file)
            file.flush()
            if not sha256(file.name).startswith(digest):
                raise OSError("what arrived is not the published file")
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{path}: Inception's weights are missing and cannot be downloaded ({reason}); "
            f"get {url} where there is a network and put it there, or name your copy in fid.inception"
        ) from None


def _inception_file(mode: str) -> tuple[str, Path, str]:
    """URL of the weights for a clean-fid mode, their path in the user's PyTorch cache, and their digest."""
    if mode not in _INCEPTION_DIGESTS:
        raise UserError(f"feature network mode {mode}: allowed: {', '.join(_INCEPTION_DIGESTS)}")
    ensure_torchvision()
    if mode == "legacy_pytorch":
        from cleanfid.inception_pytorch import FID_WEIGHTS_URL as url
    else:
        from cleanfid.downloads_helper import inception_url as url
    return url, Path(torch.hub.get_dir(), "checkpoints", Path(url).name), _INCEPTION_DIGESTS[mode]


def _load_inception(mode: str, device: torch.device, workers: int, local: str | None) -> FeatureNetwork:
    url, path, digest = _inception_file(mode)
    if local is None:
        fetch(url, path, digest)
    else:
        path = Path(local)
        check_readable(path, f"fid.inception = {path}", "correct the path")
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
        except (
            RuntimeError,
            UnpicklingError,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"fid.inception = {path}: damaged, or not Inception's weights for this fid.mode ({reason}); "
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
        workers=workers,
    )


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


def _load_torchscript(name: str, device: torch.device, workers: int) -> FeatureNetwork:
    ensure_torchvision()
    from cleanfid.resize import make_resizer

    check_readable(name, f"feature network {name}", "correct fid.features")
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"feature network {name}: damaged or not TorchScript ({reason})") from None
    size = int(getattr(network, "image_size", INCEPTION_SIZE))
    with torch.inference_mode():
        found = network(torch.zeros(1, 3, size, size, device=device))
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"feature network {name}: gives {shape} for an image; it must give [1, D] features")
    digest, resize = _digest(str(size), sha256(name)), make_resizer("PIL", False, "bicubic", (size, size))
    return FeatureNetwork(name, found.shape[1], digest, device, resize, network, workers=workers)


def _load_classifier(folder: str, device: torch.device, workers: int) -> FeatureNetwork:
    if not Path(folder).is_dir():
        raise UserError(
            f"feature network {folder}: there is no such folder; name one, or a TorchScript file "
            f"({', '.join(TORCHSCRIPT)}), or write {INCEPTION}"
        )
    ensure_torchvision()
    from cleanfid.resize import make_resizer

    network = ImageClassifier.from_pretrained(folder).to(device).eval().requires_grad_(False)
    size = network.config.image_size
    return FeatureNetwork(
        folder,
        network.config.feature_dim,
        _digest(*map(sha256, model_files(Path(folder)))),
        device,
        make_resizer("PIL", False, "bicubic", (size, size)),
        network.features,
        network.logits,
        labels=True,
        workers=workers,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256(":".join(parts).encode()).hexdigest()
