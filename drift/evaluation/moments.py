"""Gaussian fits to feature vectors, and the Fréchet distance between two of them."""

import warnings
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

AllReduceSum = Callable[[Tensor], Tensor]

# A square root whose square is further from the product than this (relative, Frobenius) is not taken, nor one
# whose trace has an imaginary part of more than this share. Rounding leaves 1e-12 of both where all is well.
_TOLERANCE = 1e-6


def alone(tensor: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return tensor


class Moments:
    """Count, mean and covariance of feature vectors that arrive in batches, in float64.

    Parts are merged by the update of Chan, Golub and LeVeque (1979), which does not subtract large sums.
    """

    def __init__(self, dimension: int, device: str | torch.device = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        """Sum of outer products of the deviations from the mean."""

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[D, D]`."""
        assert self.count > 1
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Take in features `[B, D]`."""
        batch = Moments(len(self.mean), self.mean.device)
        features = features.to(self.mean)
        batch.count = len(features)
        batch.mean = features.mean(0)
        deviations = features - batch.mean
        batch.scatter = deviations.T @ deviations
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Take in what `other` has seen."""
        count = self.count + other.count
        if count == 0:
            return
        shift = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        self.mean += shift * (other.count / count)
        self.count = count

    def all_reduce(self, all_reduce_sum: AllReduceSum) -> "Moments":
        """The moments of what all processes have seen; every process must call it."""
        merged = Moments(len(self.mean), self.mean.device)
        merged.count = int(all_reduce_sum(self.mean.new_tensor(self.count)))
        merged.mean = all_reduce_sum(self.mean * self.count) / merged.count
        shift = self.mean - merged.mean
        merged.scatter = all_reduce_sum(self.scatter + self.count * torch.outer(shift, shift))
        return merged


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
            warnings.simplefilter("ignore")  # of singular matrices, which the check below is for
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
