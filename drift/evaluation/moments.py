"""Gaussian fits to feature vectors, and the Fréchet distance between two of them."""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


class Moments:
    """Count, mean and covariance of feature vectors that arrive in batches, in float64.

    Batches are merged by the update of Chan, Golub and LeVeque (1979), which does not subtract large sums.
    """

    def __init__(self, dimension: int, device: str | torch.device = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._scatter = self.mean.new_zeros(dimension, dimension)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[D, D]`."""
        assert self.count > 1
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Take in features `[B, D]`."""
        features = features.to(self.mean)
        mean, count = features.mean(0), self.count + len(features)
        deviations, shift = features - mean, mean - self.mean
        self._scatter += deviations.T @ deviations
        self._scatter += torch.outer(shift, shift) * (self.count * len(features) / count)
        self.mean += shift * (len(features) / count)
        self.count = count


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fit to the features of a set of images, and how often their labels were recognised."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]
    accuracy: float | None = None
    """Share of images whose predicted label is theirs; None where the network does not classify."""
    count: int | None = None
    """Number of images, if known."""

    @classmethod
    def of(cls, moments: Moments, accuracy: float | None = None) -> "FeatureStatistics":
        mean, covariance = moments.mean.cpu().numpy(), moments.covariance.cpu().numpy()
        return cls(mean, covariance, accuracy, moments.count)

    def distance(self, other: "FeatureStatistics") -> float:
        """Squared Fréchet distance."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of N(mu1, sigma1) and N(mu2, sigma2) (Dowson and Landau 1982).

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^1/2. The last trace is the sum of the roots
    of the eigenvalues of sigma1^1/2 sigma2 sigma1^1/2. Unlike SciPy's root of the product, which clean-fid
    takes, these exist for singular covariances too. Raises `FloatingPointError` if an argument or the result
    is not finite.
    """
    for name, array in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(array).all():
            raise FloatingPointError(f"Fréchet distance: {name} is not finite")
    values, vectors = scipy.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    difference = mu1 - mu2
    distance = float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
    if not np.isfinite(distance):
        raise FloatingPointError(f"the Fréchet distance is {distance}")
    return distance
