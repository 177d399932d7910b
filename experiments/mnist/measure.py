"""How far generated digits are from real ones, and whether they are read as asked."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drift.runtime.seeds import numpy_generator, torch_generator
from experiments.common import w2_squared
from experiments.mnist.digits import Digits
from experiments.mnist.networks import CLASSES, Autoencoder, DigitClassifier, LatentGenerator

AT_ONCE = 100  # on a CPU twice as fast as a thousand


class Judge(NamedTuple):
    """What measures: networks in evaluation mode, and the real test images of each class."""

    autoencoder: Autoencoder
    classifier: DigitClassifier
    latents: list[Tensor]
    """`[n, latent_dim]` of each class."""
    images: list[Tensor]
    """Float32 `[n, 1, 28, 28]` of each class, in [0, 1]."""

    @classmethod
    def of(cls, autoencoder: Autoencoder, classifier: DigitClassifier, test: Digits) -> "Judge":
        images = [test.inputs(test.labels == label) for label in range(CLASSES)]
        return cls(autoencoder, classifier, [encode(autoencoder, part) for part in images], images)

    def distances(self, latents: list[Tensor]) -> dict[str, float]:
        """W2^2 to the test latents and images, the mean over the classes, of as many latents of each."""
        decoded = [decode(self.autoencoder, part) for part in latents]
        pairs = zip(latents, self.latents, decoded, self.images, strict=True)
        values = [(apart(x, y), apart(a, b)) for x, y, a, b in pairs]
        latent, image = np.mean(values, axis=0)
        return {"w2_latent": float(latent), "w2_image": float(image)}

    def accuracy(self, images: list[Tensor]) -> float:
        """Share of the images of each class that the classifier reads as that class."""
        right = [read(self.classifier, part) == label for label, part in enumerate(images)]
        return float(torch.cat(right).float().mean())

    def measure(self, generator: LatentGenerator, omega: float, samples: int, seed: int) -> dict[str, float]:
        """Distances of as many samples as there are real ones, accuracy of `samples` per class."""
        counts = [max(samples, len(part)) for part in self.latents]
        latents = generate(generator, omega, counts, seed)
        as_many = [part[: len(real)] for part, real in zip(latents, self.latents, strict=True)]
        decoded = [decode(self.autoencoder, part[:samples]) for part in latents]
        return self.distances(as_many) | {"accuracy": self.accuracy(decoded)}

    def floor(self, train: Digits, seed: int) -> dict[str, float]:
        """The same of real training images, encoded and decoded, in the place of generated ones."""
        latents = []
        for label, real in enumerate(self.latents):
            rows = np.flatnonzero(train.labels == label)
            chosen = numpy_generator(seed, "mnist/floor", label).choice(rows, len(real), replace=False)
            latents.append(encode(self.autoencoder, train.inputs(torch.from_numpy(chosen))))
        decoded = [decode(self.autoencoder, part) for part in latents]
        return self.distances(latents) | {"accuracy": self.accuracy(decoded)}


def apart(x: Tensor, y: Tensor) -> float:
    """W2^2 of vectors or images of equal shapes."""
    return w2_squared(x.flatten(1).numpy(), y.flatten(1).numpy())


@torch.no_grad()
def generate(generator: LatentGenerator, omega: float, counts: list[int], seed: int) -> list[Tensor]:
    """So many latents of each class; sample i of a class has the same noise whatever the counts are."""
    found = []
    for label, count in enumerate(counts):
        noise = torch.randn(
            count, generator.config.noise_dim, generator=torch_generator(seed, "mnist/samples", label)
        )
        found.append(generator(noise, torch.full((count,), label), torch.full((count,), omega)))
    return found


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    return torch.cat([autoencoder.encoder(part) for part in images.split(AT_ONCE)])


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    return torch.cat([autoencoder.decoder(part) for part in latents.split(AT_ONCE)])


@torch.no_grad()
def read(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """The digit that each image is taken for, `[n]`."""
    return torch.cat([classifier(part).argmax(1) for part in images.split(AT_ONCE)])
