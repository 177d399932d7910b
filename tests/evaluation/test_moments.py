import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from standins import run_ranks

from drift.evaluation import moments as module
from drift.evaluation.moments import Moments, frechet_distance, trace_by_eigenvalues, trace_by_square_root
from drift.runtime.torchvision import ensure_torchvision


def by_eigenvalues(mu1, sigma1, mu2, sigma2):
    """The distance by another road: tr sqrt(s1 s2) from the eigenvalues of the symmetric s1^1/2 s2 s1^1/2."""
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross


def test_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 6))
    s1, s2 = rng.uniform(0.5, 3, (2, 6))  # standard deviations
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_commuting_gaussians_and_a_shift():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    s1, s2 = rng.uniform(0.5, 3, (2, 5))
    sigma1, sigma2 = (basis * s1**2) @ basis.T, (basis * s2**2) @ basis.T
    zero, shift = np.zeros(5), np.full(5, 2.0)
    assert frechet_distance(zero, sigma1, zero, sigma2) == pytest.approx(((s1 - s2) ** 2).sum(), rel=1e-9)
    assert frechet_distance(shift, sigma1, zero, sigma1) == pytest.approx(5 * 2.0**2, rel=1e-9)


def test_distance_of_any_gaussians_is_symmetric_and_silent():
    rng = np.random.default_rng(2)
    a, b = (
        np.cov(rng.standard_normal((50, 8)) @ rng.standard_normal((8, 8)), rowvar=False) for _ in range(2)
    )
    mu1, mu2 = rng.standard_normal((2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance = frechet_distance(mu1, a, mu2, b)
    assert distance == pytest.approx(by_eigenvalues(mu1, a, mu2, b), rel=1e-8)
    assert distance == pytest.approx(frechet_distance(mu2, b, mu1, a), rel=1e-8)


def test_distance_that_is_not_finite_is_an_error():
    mu, sigma = np.zeros(2), np.eye(2)
    with pytest.raises(FloatingPointError, match="sigma2"):
        frechet_distance(mu, sigma, mu, np.full((2, 2), np.nan))
    with pytest.raises(FloatingPointError, match="distance is inf"), np.errstate(over="ignore"):
        frechet_distance(np.full(2, 1e200), sigma, mu, sigma)


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [3, 500, 0, 7, 490], [1] * 1000])
def test_moments_are_numpys(sizes):
    rng = np.random.default_rng(0)
    # Far from the origin, where sums of squares would lose the covariance
    values = rng.standard_normal((1000, 6)) @ rng.standard_normal((6, 6)) + 1e6
    moments = Moments(6)
    for part in torch.from_numpy(values).split(sizes):
        if len(part):
            moments.update(part)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(values, rowvar=False), rtol=1e-6, atol=1e-8)


def test_moments_of_parts_merge():
    values = torch.randn(301, 5, generator=torch.Generator().manual_seed(0)) * 3 + 10
    parts = [Moments(5) for _ in range(3)]  # the third sees nothing
    parts[0].update(values[:100])
    parts[1].update(values[100:150])
    parts[1].update(values[150:])
    expected = np.cov(values.double().numpy(), rowvar=False)

    for reduced in run_ranks(3, lambda rank, all_reduce_sum: parts[rank].all_reduce(all_reduce_sum)):
        assert reduced.count == 301
        np.testing.assert_allclose(reduced.mean, values.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(reduced.covariance, expected, rtol=1e-10)

    for part in parts[1:]:
        parts[0].merge(part)
    np.testing.assert_allclose(parts[0].covariance, expected, rtol=1e-10)


def covariances(seed, dimension=24, samples=60):
    rng = np.random.default_rng(seed)
    return [
        np.cov(
            rng.standard_normal((samples, dimension)) @ rng.standard_normal((dimension, dimension)),
            rowvar=False,
        )
        for _ in range(2)
    ]


@pytest.mark.filterwarnings("ignore:The `disp` argument")
@pytest.mark.parametrize("seed", range(4))
def test_distance_is_cleanfids(seed):
    ensure_torchvision()
    from cleanfid import fid as cleanfid

    sigma1, sigma2 = covariances(seed)
    mu1, mu2 = np.random.default_rng(seed).standard_normal((2, 24))
    expected = cleanfid.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_both_roads_to_the_trace_agree():
    for seed in range(5):
        a, b = covariances(seed)
        assert trace_by_square_root(a, b) == pytest.approx(trace_by_eigenvalues(a, b), rel=1e-9)


def test_singular_covariances():
    """Of projections, whose closed form is known: the planes share the first axis alone."""
    a, b = np.diag([4.0, 1, 0, 0]), np.diag([9.0, 0, 1, 0])
    expected = 4 + 1 + 9 + 1 - 2 * np.sqrt(4 * 9)
    assert frechet_distance(np.zeros(4), a, np.zeros(4), b) == pytest.approx(expected, rel=1e-9)
    # Twenty samples in thirty dimensions
    rng = np.random.default_rng(0)
    a, b = (np.cov(rng.standard_normal((20, 30)), rowvar=False) for _ in range(2))
    mu = np.zeros(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = frechet_distance(mu, a, mu, b)
        assert abs(frechet_distance(mu, a, mu, a)) < 1e-6
    # tr (ab)^1/2 is the nuclear norm of a^1/2 b^1/2
    roots = [(v * np.sqrt(w.clip(0))) @ v.T for w, v in (np.linalg.eigh(x) for x in (a, b))]
    expected = np.trace(a) + np.trace(b) - 2 * np.linalg.norm(roots[0] @ roots[1], "nuc")
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "root",
    [lambda product: product, lambda product: np.full_like(product, np.nan), lambda p: 1j * np.eye(len(p))],
)
def test_a_broken_square_root_is_noticed(monkeypatch, root):
    a, b = covariances(0)
    mu = np.zeros(len(a))
    expected = frechet_distance(mu, a, mu, b)
    monkeypatch.setattr(module.scipy.linalg, "sqrtm", root)
    assert trace_by_square_root(a, b) is None
    assert frechet_distance(mu, a, mu, b) == pytest.approx(expected, rel=1e-9)


def test_a_root_that_cannot_be_taken_is_noticed(monkeypatch):
    def fail(product):
        raise scipy.linalg.LinAlgError("no")

    a, b = covariances(0)
    monkeypatch.setattr(module.scipy.linalg, "sqrtm", fail)
    assert trace_by_square_root(a, b) is None
