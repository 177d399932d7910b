"""Gaussian fits to feature vectors, and the Fréchet distance between two of them."""

import warnings

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

# A square root is refused if its square differs from the product by more than this (relative, Frobenius norm)
# or its trace has a larger imaginary share. Rounding leaves 1e-12 of both where all is well.
_TOLERANCE = 1e-6


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


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of N(mu1, sigma1) and N(mu2, sigma2) (Dowson and Landau 1982).

    |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^1/2. The root is SciPy's, as in clean-fid,
    where it holds: its square is the product, its trace is real. Otherwise (nearly singular covariances) the
    trace is the sum of the roots of the eigenvalues of sigma1^1/2 sigma2 sigma1^1/2, which always exists.
    Raises `FloatingPointError` if an argument or the result is not finite.
    """
    for name, array in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(array).all():
            raise FloatingPointError(f"Fréchet distance: {name} is not finite")
    cross = trace_by_square_root(sigma1, sigma2)
    if cross is None:
        cross = trace_by_eigenvalues(sigma1, sigma2)
    difference = mu1 - mu2
    distance = float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
    if not np.isfinite(distance):
        raise FloatingPointError(f"the Fréchet distance is {distance}")
    return distance


def trace_by_square_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float | None:
    """Trace of SciPy's square root of `sigma1 sigma2`, or None if that is not one."""
    product = sigma1 @ sigma2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about singular matrices, which the check below finds
            root = scipy.linalg.sqrtm(product)
    except (scipy.linalg.LinAlgError, ValueError):
        return None
    if not np.isfinite(root).all():
        return None
    trace = np.trace(root)
    residual = np.linalg.norm(root @ root - product)
    if residual > _TOLERANCE * np.linalg.norm(product) or abs(trace.imag) > _TOLERANCE * abs(trace):
        return None
    return float(trace.real)


def trace_by_eigenvalues(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """Trace of the square root of `sigma1 sigma2`, positive semidefinite but for rounding."""
    values, vectors = scipy.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return float(np.sqrt(scipy.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum())
