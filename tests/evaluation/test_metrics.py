"""Batches, the feature store, and all metrics, against torch-fidelity, clean-fid, closed forms and loops."""

import threading

import numpy as np
import pytest
import standins  # noqa: F401  (before torch-fidelity imports torchvision)
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from drift.evaluation import store as store_module
from drift.evaluation.batches import BATCH, in_batches, one_behind
from drift.evaluation.metrics import inception_score, kernel_distance, precision_recall
from drift.evaluation.moments import Moments, frechet_distance
from drift.evaluation.store import FeatureStore
from drift.runtime.seeds import derive_seed, numpy_generator

# Batches


@pytest.mark.parametrize("rows", [1, 7, BATCH, BATCH + 1, 3 * BATCH])
def test_the_function_sees_one_shape_and_every_row_has_its_result(rows):
    shapes = []

    def difference(a, b):
        shapes.append((a.shape, b.shape))
        return a.sum(1) - b

    a, b = torch.randn(rows, 5), torch.arange(rows)
    assert torch.equal(in_batches(difference, a, b), a.sum(1) - b)
    assert shapes == [((BATCH, 5), (BATCH,))] * -(-rows // BATCH)


def test_work_is_done_in_order_while_the_next_item_is_made():
    """Each is only finished once the next is being made, so one after the other would never end."""
    made = [threading.Event() for _ in range(4)]

    def items():
        for i in range(3):
            made[i].set()
            yield i
        made[3].set()

    def work(i):
        assert made[i + 1].wait(30)
        return 10 * i

    assert list(one_behind(items(), work)) == [(0, 0), (1, 10), (2, 20)]
    with pytest.raises(ZeroDivisionError):
        list(one_behind([1, 0], lambda i: 1 / i))


# The feature store


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)


def test_rows_come_back_in_any_order(tmp_path, features, monkeypatch):
    store = FeatureStore.create(tmp_path / "x", 20, 3)
    assert (store.shape, len(store), len(store.missing())) == ((20, 3), 20, 20)
    first, second = np.array([0, 1, 2, 7, 9, 10]), np.array([3, 4, 5, 6, 8, *range(11, 20)])
    store.write(first, features[first])
    assert store.missing().tolist() == second.tolist()
    with pytest.raises(AssertionError, match="nobody has measured"):
        next(store.blocks())
    FeatureStore(tmp_path / "x").write(second, features[second])
    order = np.random.default_rng(1).permutation(20)[:11]
    assert np.array_equal(store[order], features[order])
    assert store[np.array([], int)].shape == (0, 3)
    monkeypatch.setattr(store_module, "BLOCK", 6)
    rows, blocks = zip(*store.blocks(), strict=True)
    assert [part.start for part in rows] == [0, 6, 12, 18]
    assert np.array_equal(np.concatenate(blocks), features)
    assert np.array_equal(np.load(tmp_path / "x/features.npy"), features)


def test_what_is_there_is_kept_if_it_fits(tmp_path, features):
    store = FeatureStore.create(tmp_path / "x", 20, 3)
    store.write(np.array([4]), features[4:5])
    assert 4 not in FeatureStore.create(tmp_path / "x", 20, 3).missing()
    assert 4 in FeatureStore.create(tmp_path / "x", 21, 3).missing()
    (tmp_path / "x/done.npy").unlink()
    assert len(FeatureStore.create(tmp_path / "x", 21, 3).missing()) == 21


# Fréchet distance


def covariances(seed, dimension=24, samples=60):
    rng = np.random.default_rng(seed)
    mix = lambda: rng.standard_normal((samples, dimension)) @ rng.standard_normal((dimension, dimension))  # noqa: E731
    return [np.cov(mix(), rowvar=False) for _ in range(2)]


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [3, 500, 7, 490], [1] * 1000])
def test_moments_are_numpys(sizes):
    rng = np.random.default_rng(0)
    # Far from the origin, where sums of squares would lose the covariance
    values = rng.standard_normal((1000, 6)) @ rng.standard_normal((6, 6)) + 1e6
    moments = Moments(6)
    for part in torch.from_numpy(values).split(sizes):
        moments.update(part)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(values, rowvar=False), rtol=1e-6, atol=1e-8)


def test_distance_of_commuting_gaussians_and_a_shift():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    s1, s2 = rng.uniform(0.5, 3, (2, 5))  # standard deviations
    sigma1, sigma2 = (basis * s1**2) @ basis.T, (basis * s2**2) @ basis.T
    zero, shift = np.zeros(5), np.full(5, 2.0)
    expected = ((s1 - s2) ** 2).sum() + 5 * 2.0**2
    assert frechet_distance(shift, sigma1, zero, sigma2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_distance_is_cleanfids():
    from cleanfid import fid as cleanfid

    for seed in range(4):
        a, b = covariances(seed)
        mu1, mu2 = np.random.default_rng(seed).standard_normal((2, 24))
        expected = cleanfid.frechet_distance(mu1, a, mu2, b)
        assert frechet_distance(mu1, a, mu2, b) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Of projections, whose closed form is known: the planes share the first axis alone."""
    a, b = np.diag([4.0, 1, 0, 0]), np.diag([9.0, 0, 1, 0])
    expected = 4 + 1 + 9 + 1 - 2 * np.sqrt(4 * 9)
    assert frechet_distance(np.zeros(4), a, np.zeros(4), b) == pytest.approx(expected, rel=1e-9)
    a, b = covariances(0, dimension=30, samples=20)
    mu = np.zeros(30)
    assert abs(frechet_distance(mu, a, mu, a)) < 1e-6 * np.trace(a)
    # tr (ab)^1/2 is the nuclear norm of a^1/2 b^1/2
    roots = [(v * np.sqrt(w.clip(0))) @ v.T for w, v in (np.linalg.eigh(x) for x in (a, b))]
    expected = np.trace(a) + np.trace(b) - 2 * np.linalg.norm(roots[0] @ roots[1], "nuc")
    assert frechet_distance(mu, a, mu, b) == pytest.approx(expected, rel=1e-6)


def test_distance_that_is_not_finite_is_an_error():
    mu, sigma = np.zeros(2), np.eye(2)
    with pytest.raises(FloatingPointError, match="sigma2"):
        frechet_distance(mu, sigma, mu, np.full((2, 2), np.nan))
    with pytest.raises(FloatingPointError, match="distance is inf"), np.errstate(over="ignore"):
        frechet_distance(np.full(2, 1e200), sigma, mu, sigma)


# Inception Score


def score(logits, size, seed):
    rows = (slice(start, start + size) for start in range(0, len(logits), size))
    return inception_score(((r, logits[r]) for r in rows), len(logits), seed)


@pytest.mark.parametrize("count", [100, 137])
def test_inception_score_is_torch_fidelitys(count):
    logits = 3 * torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    order = numpy_generator(3, "fid/inception_score").permutation(count)
    expected = isc_features_to_metric(logits[order], splits=10, shuffle=False)
    wanted = expected["inception_score_mean"], expected["inception_score_std"]
    assert score(logits, 13, seed=3) == pytest.approx(wanted, rel=1e-9)


def test_inception_score_of_what_is_known():
    """Every class as often and for sure: nearly their number, in whatever order; always one answer: 1."""
    labels = np.repeat(np.arange(50), 200)  # class after class, as the files of a folder
    sure = 1000 * torch.eye(50)[labels]
    shuffled = isc_features_to_metric(sure, splits=10, shuffle=True)["inception_score_mean"]
    assert 48 < shuffled < 50
    for order in (np.arange(10_000), np.arange(10_000).reshape(50, 200).T.reshape(-1)):
        assert score(sure[order], 1024, seed=0)[0] == pytest.approx(shuffled, rel=0.01)
    assert score(sure[:200], 200, seed=0)[0] == pytest.approx(1)


# KID, precision and recall


def sets(seed=0, n=300, m=250, dimension=5):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal((m, dimension))
    generated = 0.7 * rng.standard_normal((n, dimension)) + 0.4
    return generated.astype(np.float32), real.astype(np.float32)


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


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_are_torch_fidelitys(seed, monkeypatch):
    generated, real = sets(seed)
    expected = calculate_precision_recall_full(*(torch.from_numpy(x).double() for x in (generated, real)), 3)
    monkeypatch.setattr("drift.evaluation.metrics.BLOCK", 64)  # several blocks
    found = precision_recall(generated, real, images=10_000, seed=0)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.2 < found[1] < found[0] < 1


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
