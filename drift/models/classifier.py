"""A small convolutional image classifier: labels, and the features of a Fréchet distance.

It replaces Inception where the images are not photographs: its penultimate layer is the feature vector, and
its predictions show whether a generated image is of the class that was asked for.
"""

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from drift.models.base import PretrainedModel, require_at_least


class ImageClassifier(PretrainedModel):
    """Stages of two 3x3 convolutions, the average over the image, a feature vector, a linear head.

    Args:
        image_size: side in pixels of the square images that it was trained on.
        widths: channels of each stage; every stage halves the image.
        feature_dim: length of the feature vector.
        num_classes: classes of the linear head.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        widths: tuple[int, ...] = (16, 32, 96),
        feature_dim: int = 64,
        num_classes: int = 10,
    ):
        super().__init__()
        require_at_least(
            1, image_size=image_size, widths=widths, feature_dim=feature_dim, num_classes=num_classes
        )
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            for stride in (2, 1):
                layers.append(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
        self.stages = nn.Sequential(*layers)
        self.project = nn.Linear(channels, feature_dim, bias=False)
        # Every dimension has mean 0 and variance 1 over training images, so that all of them count in a
        # Fréchet distance. No activation follows: it would make them less Gaussian, and some constant.
        self.norm = nn.BatchNorm1d(feature_dim, affine=False)
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations `[B, feature_dim]` of images `[B, 3, S, S]` in 0..255."""
        x = self.stages(images / 127.5 - 1)  # [B, C, S / 2^stages, S / 2^stages]
        return self.norm(self.project(x.mean(dim=(2, 3))))

    def logits(self, features: Tensor) -> Tensor:
        """Class logits `[B, num_classes]` of `features [B, feature_dim]`."""
        return self.head(features)
