"""Metrics against torch-fidelity, clean-fid and loops."""

import numpy as np
import pytest
import torch
from standins import run_ranks
from torch_fidelity_shim import calculate_precision_recall_full, isc_features_to_metric

from drift.evaluation.metrics import InceptionScore, kernel_distance, precision_recall
from drift.evaluation.moments import alone
from drift.runtime.seeds import derive_seed, numpy_generator


def sets(seed=0, n=300, m=250, dimension=5):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal((m, dimension))
    generated = 0.7 * rng.standard_normal((n, dimension)) + 0.4
    return generated.astype(np.float32), real.astype(np.float32)


@pytest.mark.parametrize("count", [100, 137])
def test_inception_score_is_torch_fidelitys(count):
    logits = 3 * torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    order = numpy_generator(3, "fid/inception_score").permutation(count)
    expected = isc_features_to_metric(logits[order], splits=10, shuffle=False)

    def work(rank, all_reduce_sum):
        score = InceptionScore(count, 7, seed=3)
        for part in (
            torch.randperm(count, generator=torch.Generator().manual_seed(1))[rank::3].contiguous().split(13)
        ):
            score.update(part, logits[part])
        return score.compute(all_reduce_sum)

    for mean, std in run_ranks(3, work):
        assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
        assert std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_of_what_is_known():
    """Every class as often and for sure: nearly their number, in whatever order; always one answer: 1."""
    labels = np.repeat(np.arange(50), 200)  # class after class, as the files of a folder
    sure = 1000 * torch.eye(50)[labels]
    shuffled = isc_features_to_metric(sure, splits=10, shuffle=True)["inception_score_mean"]
    assert 48 < shuffled < 50
    for order in (np.arange(10_000), np.arange(10_000).reshape(50, 200).T.reshape(-1)):
        score = InceptionScore(10_000, 50, seed=0)
        score.update(torch.arange(10_000), sure[order])
        assert score.compute(alone)[0] == pytest.approx(shuffled, rel=0.01)
    score = InceptionScore(200, 50, seed=0)
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
    found = precision_recall(generated, real, images=10_000, seed=0)
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

    some, others = (
        rows[numpy_generator(7, "fid/precision_recall", name).permutation(len(rows))[:25]]
        for name, rows in (("generated", generated), ("real", real))
    )
    expected = covered(some, others), covered(others, some)
    assert precision_recall(generated, real, images=25, seed=7) == pytest.approx(expected)


@pytest.mark.parametrize("sorted_by_class", ["real", "generated", "both"])
def test_a_part_of_sets_that_are_sorted_by_class_is_of_all_classes(sorted_by_class):
    """A perfect generator of 50 classes: the first thousand images of each side would have precision 0.2."""
    rng = np.random.default_rng(0)
    centres, labels = 10 * rng.standard_normal((50, 8)), np.repeat(np.arange(50), 100)
    generated, real = (centres[labels] + rng.standard_normal((5000, 8)) for _ in range(2))
    some = rng.permutation(5000)[:1000]
    expected = calculate_precision_recall_full(*(torch.from_numpy(x[some]) for x in (generated, real)), 3)
    assert min(expected) > 0.7
    in_turn = np.arange(5000).reshape(50, 100).T.reshape(-1)
    if sorted_by_class == "real":
        generated = generated[in_turn]
    elif sorted_by_class == "generated":
        real = real[in_turn]
    found = precision_recall(generated, real, images=1000, seed=0)
    assert found == pytest.approx(expected, abs=0.06)
