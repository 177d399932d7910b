"""Metrics against torch-fidelity, clean-fid and loops."""

import numpy as np
import pytest
import torch
from standins import run_ranks
from torch_fidelity_shim import calculate_precision_recall_full, isc_features_to_metric

from drift.evaluation.metrics import InceptionScore, kernel_distance, precision_recall
from drift.evaluation.moments import alone
from drift.seeds import derive_seed


def sets(seed=0, n=300, m=250, dimension=5):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal((m, dimension))
    generated = 0.7 * rng.standard_normal((n, dimension)) + 0.4
    return generated.astype(np.float32), real.astype(np.float32)


@pytest.mark.parametrize("count", [100, 137])
def test_inception_score_is_torch_fidelitys(count):
    logits = 3 * torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)

    def work(rank, all_reduce_sum):
        score = InceptionScore(count, 7)
        for part in (
            torch.randperm(count, generator=torch.Generator().manual_seed(1))[rank::3].contiguous().split(13)
        ):
            score.update(part, logits[part])
        return score.compute(all_reduce_sum)

    for mean, std in run_ranks(3, work):
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
        assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_of_what_is_known():
    """Every class as often and for sure: their number; always the same answer: 1."""
    sure = 1000 * torch.eye(5).repeat(40, 1)
    score = InceptionScore(200, 5)
    score.update(torch.arange(200), sure)
    assert score.compute(alone) == (pytest.approx(5), pytest.approx(0, abs=1e-9))
    score = InceptionScore(200, 5)
    score.update(torch.arange(200), sure[:1].expand(200, -1))
    assert score.compute(alone)[0] == pytest.approx(1)


def test_kernel_distance_is_cleanfids_and_leaves_numpys_state():
    from cleanfid import fid as cleanfid

    generated, real = sets()
    np.random.seed(derive_seed(3, "fid/kid") % 2**32)
    expected = cleanfid.kernel_distance(real, generated)
    np.random.seed(11)
    state = np.random.get_state()[1].copy()
    assert kernel_distance(real, generated, seed=3) == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(np.random.get_state()[1], state)
    assert kernel_distance(real, generated, seed=4) != expected


def test_kernel_distance_is_the_unbiased_estimate():
    """With fewer than 1000 samples of equal number each subset is the whole set, in another order."""
    generated, real = (x[:40].astype(np.float64) for x in sets())
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    off = ~np.eye(40, dtype=bool)
    expected = kernel(real, real)[off].mean() + kernel(generated, generated)[off].mean()
    expected -= 2 * kernel(real, generated).mean()
    assert kernel_distance(real, generated, seed=0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_are_torch_fidelitys(seed, monkeypatch):
    generated, real = sets(seed)
    expected = calculate_precision_recall_full(*(torch.from_numpy(x).double() for x in (generated, real)), 3)
    monkeypatch.setattr("drift.evaluation.metrics.BLOCK", 64)  # several blocks
    found = precision_recall(generated, real, images=10_000)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.2 < found[1] < found[0] < 1


def test_precision_and_recall_by_a_loop():
    generated, real = sets(n=30, m=40)

    def covered(points, others):
        count = 0
        for point in points:
            for i, other in enumerate(others):
                distances = sorted(np.linalg.norm(other - x) for j, x in enumerate(others) if j != i)
                if np.linalg.norm(point - other) <= distances[2]:
                    count += 1
                    break
        return count / len(points)

    expected = covered(generated[:25], real[:25]), covered(real[:25], generated[:25])
    assert precision_recall(generated, real, images=25) == pytest.approx(expected)
