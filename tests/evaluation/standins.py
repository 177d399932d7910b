"""Small stand-ins: images whose features are known by looking, Inception's interface, ranks in threads."""

import threading

import numpy as np
import pytest
import torch
from imports import ROOT
from PIL import Image

from drift.evaluation.networks import FeatureNetwork
from drift.runtime.torchvision import ensure_torchvision
from drift.settings import Settings, load_settings

ensure_torchvision()  # before whatever imports torchvision
CLASSES = 3
DIGITS = load_settings(ROOT / "presets/digits.yaml")


def settings(seed: int = 0, **sections: dict) -> Settings:
    """Those of the digits with other values of some keys: `fid={"images": 60}`."""
    changed = {name: getattr(DIGITS, name).model_copy(update=keys) for name, keys in sections.items()}
    return DIGITS.model_copy(update={"seed": seed, **changed})


class Source:
    """Real images in memory: noise around a grey that tells the class."""

    split, passed_over = "train", ""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % CLASSES
        greys = 40 + 80 * self.labels[:, None, None, None]
        self.images = (greys + rng.integers(-30, 31, (count, 4, 4, 3))).astype(np.uint8)
        self.digest = f"{count} {seed}"
        self.loaded = []

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        self.loaded.append(int(index))
        return Image.fromarray(self.images[index])


class Decoder:
    def decode(self, latents):
        return latents


class Painter:
    """Generates the greys of `Source`; below omega 1.2 every fifth noise gives the next class instead."""

    config = {"in_channels": 3, "input_size": 4, "style_codebooks": 1, "style_entries": 2}  # noqa: RUF012
    device = torch.device("cpu")

    def __call__(self, noise, labels, omega, style_indices):
        slips = (noise[:, 0, 0, 0] > 0.84) & (omega < 1.2)
        grey = 40 + 80 * ((labels + slips) % CLASSES)
        return (grey[:, None, None, None] + 8 * noise) / 127.5 - 1


def flat(images):
    """The features of images `[N, H, W, 3]`, as NumPy sees them."""
    return np.asarray(images).reshape(len(images), -1)[:, :7].astype(np.float64)


def pixel_network():
    """Seven pixels are the features, their mean grey tells the class."""
    return FeatureNetwork(
        name="pixels",
        dimension=7,
        digest="pixels",
        device=torch.device("cpu"),
        resize=lambda image: image,
        extract=lambda x: x.permute(0, 2, 3, 1).flatten(1)[:, :7],
        classify=lambda f: -(f.mean(1, keepdim=True) - torch.tensor([40.0, 120.0, 200.0])).abs(),
        labels=True,
    )


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 7, stride=6)
        self.mix = torch.nn.Linear(8 * 4 * 4, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(torch.tanh(2 * self.conv(x)), [4, 4])
        return torch.relu(self.mix(x.flatten(1)))


class Inception(torch.nn.Module):
    """`layers`, `output` and the arguments of `forward` as in inception-2015-12-05.pt, which also resizes."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.output = torch.nn.Linear(2048, 1008)

    def forward(
        self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = torch.nn.functional.interpolate(x, [299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 127.5) / 127.5)
        if return_features:
            return features
        if no_output_bias:
            return torch.nn.functional.linear(features, self.output.weight).softmax(1)
        return self.output(features).softmax(1)


def save_inception(path):
    torch.manual_seed(0)
    model = Inception()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    torch.jit.script(model).save(str(path))


def random_port():
    """Inception as pytorch-fid ports it, with random weights of a size that lets the images through."""
    from cleanfid import inception_pytorch

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = inception_pytorch.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.eval()


class Rank:
    """What `Ranks` offers, for one of several threads."""

    device = torch.device("cpu")

    def __init__(self, rank, barrier, slots):
        self.rank, self.world_size, self.first = rank, len(slots), rank == 0
        self._barrier, self._slots = barrier, slots

    def barrier(self):
        self._barrier.wait()

    def from_first(self, value):
        self._slots[self.rank] = value
        self._barrier.wait()
        found = self._slots[0]
        self._barrier.wait()
        return found


def run_ranks(world_size, work):
    """`work(ranks)` of every rank, in threads that really wait for each other."""
    barrier = threading.Barrier(world_size, timeout=60)
    slots, results = [None] * world_size, [None] * world_size

    def run(rank):
        try:
            results[rank] = work(Rank(rank, barrier, slots))
        except BaseException as error:
            results[rank] = error
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
