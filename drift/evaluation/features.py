"""The networks whose features the Fréchet distance compares, each with the resizing that belongs to it."""

import hashlib
import platform
import socket
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drift.errors import UserError
from drift.files import sha256
from drift.models.classifier import ImageClassifier
from drift.torchvision_shim import ensure_torchvision

INCEPTION = "inception"
INCEPTION_DIMENSION = 2048  # width of Inception-v3's last pooling layer
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
    """A frozen network that turns 8-bit images into feature vectors, and perhaps into class predictions."""

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
    workers: int = 1
    """Threads that resize; the resizers leave Python's lock while they compute."""

    def __post_init__(self):
        self._pool = ThreadPoolExecutor(max(1, self.workers))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 `[B, H, W, 3]` -> float32 features `[B, D]` and predicted labels `[B]`.

        The labels are None where the network does not classify.
        """
        resized = np.stack(list(self._pool.map(self.resize, images.cpu().numpy())))  # [B, S, S, 3]
        pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device, torch.float32).contiguous()
        # A caller's mixed precision would change the features, and with them every distance
        with torch.autocast(self.device.type, enabled=False):
            features = self.extract(pixels).float()
            predicted = None if self.classify is None else self.classify(features).argmax(1)
        return features, predicted


def check_feature_network(name: str, mode: str = "clean") -> None:
    """Make sure that `load_feature_network(name, mode)` will find its files.

    Inception's weights are downloaded if they are missing. Raises `UserError` if that fails, or if `name`
    is neither `inception` nor the folder of an image classifier.
    """
    if name == INCEPTION:
        fetch(*_inception_file(mode))
    elif not Path(name).is_dir():
        raise UserError(f"feature network {name}: there is no such folder; name one or write {INCEPTION}")
    else:
        ImageClassifier.from_pretrained(name)


def load_feature_network(
    name: str, mode: str = "clean", device: str | torch.device = "cpu", workers: int = 1
) -> FeatureNetwork:
    """The feature network `name`, ready on `device`.

    `inception` is clean-fid's extractor with the resizing of its `mode` (`clean`, `legacy_tensorflow` or
    `legacy_pytorch`). Anything else is the folder of an image classifier of this project, which sees images
    resized as clean-fid's `clean` does. Raises what `check_feature_network` does.
    """
    check_feature_network(name, mode)
    device = torch.device(device)
    if name == INCEPTION:
        return _load_inception(mode, device, workers)
    return _load_classifier(name, device, workers)


def fetch(url: str, path: Path, digest: str) -> None:
    """Make sure that `path` is the file published at `url`, whose SHA-256 begins with `digest`.

    A missing file is downloaded under another name and renamed when it is complete. Raises `UserError` if
    it cannot be had, or if `path` holds something else.
    """
    if path.exists():
        if not sha256(path).startswith(digest):
            raise UserError(f"{path}: damaged, or not the file published at {url}; delete it and run again")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(CONNECT_TIMEOUT):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the digest differs
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{path}: Inception's weights are missing and cannot be downloaded ({reason}); "
            f"get {url} where there is a network and put it there"
        ) from None


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torch.hub's downloader has no timeout of its own and would wait for ever behind a silent firewall
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _inception_file(mode: str) -> tuple[str, Path, str]:
    """URL of the weights for a clean-fid mode, the path where clean-fid looks for them, and their digest."""
    if mode not in _INCEPTION_DIGESTS:
        raise UserError(f"feature network mode {mode}: allowed: {', '.join(_INCEPTION_DIGESTS)}")
    ensure_torchvision()
    if mode == "legacy_pytorch":
        from cleanfid.inception_pytorch import FID_WEIGHTS_URL as url

        folder = Path(torch.hub.get_dir(), "checkpoints")
    else:
        from cleanfid.downloads_helper import inception_url as url

        folder = Path("./" if platform.system() == "Windows" else "/tmp")
    return url, folder / Path(url).name, _INCEPTION_DIGESTS[mode]


def _load_inception(mode: str, device: torch.device, workers: int) -> FeatureNetwork:
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    # clean-fid calls torchvision by a deprecated argument, and one of its resizers switches all warnings off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract = build_feature_extractor(mode, device, use_dataparallel=False)
        resize = build_resizer(mode)
    _, path, _ = _inception_file(mode)
    digest = _digest(mode, sha256(path))
    return FeatureNetwork(INCEPTION, INCEPTION_DIMENSION, digest, device, resize, extract, workers=workers)


def _load_classifier(folder: str, device: torch.device, workers: int) -> FeatureNetwork:
    ensure_torchvision()
    from cleanfid.resize import make_resizer

    network = ImageClassifier.from_pretrained(folder).to(device).eval().requires_grad_(False)
    size = network.config.image_size
    return FeatureNetwork(
        name=folder,
        dimension=network.config.feature_dim,
        digest=_digest(*(sha256(Path(folder, part)) for part in ("config.json", "model.safetensors"))),
        device=device,
        resize=make_resizer("PIL", False, "bicubic", (size, size)),
        extract=network.features,
        classify=network.logits,
        workers=workers,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256(":".join(parts).encode()).hexdigest()
