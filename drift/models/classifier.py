"""A small convolutional image classifier: labels, and the features of a Fréchet distance.

Where the images are not photographs, it takes the place of Inception: its penultimate layer is the feature
vector, and its predictions tell whether a generated image shows the class that was asked for.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from drift.models.base import PretrainedModel
from drift.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Sizes of an `ImageClassifier`."""

    image_size: int = 32
    """Side in pixels of the square images that it was trained on."""
    widths: tuple[int, ...] = (16, 32, 96)
    """Channels of each stage; every stage halves the image."""
    feature_dim: int = 64
    """Length of the feature vector."""
    num_classes: int = 10
    """Classes of the linear head."""

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"widths is {list(self.widths)}: give a number of at least 1 for each stage")
        for name in ("image_size", "feature_dim", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number of at least 1")


class ImageClassifier(PretrainedModel):
    """Stages of two 3x3 convolutions, the average over the image, a feature vector, a linear head."""

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        channels = 3
        for width in config.widths:
            for stride in (2, 1):
                layers.append(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
        self.stages = nn.Sequential(*layers)
        self.project = nn.Linear(channels, config.feature_dim, bias=False)
        # Every dimension has mean 0 and variance 1 over training images, so that all of them count in a
        # Fréchet distance. No activation follows: it would make them less Gaussian, and some constant.
        self.norm = nn.BatchNorm1d(config.feature_dim, affine=False)
        self.head = nn.Linear(config.feature_dim, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations `[B, feature_dim]` of images `[B, 3, S, S]` in 0..255."""
        x = self.stages(images / 127.5 - 1)  # [B, C, S / 2^stages, S / 2^stages]
        return self.norm(self.project(x.mean(dim=(2, 3))))

    def logits(self, features: Tensor) -> Tensor:
        """Class logits `[B, num_classes]` of `features [B, feature_dim]`."""
        return self.head(features)
