import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from drift.errors import UserError
from drift.evaluation.features import FeatureNetwork
from drift.evaluation.fid import (
    FeatureStatistics,
    Moments,
    evaluate_sweep,
    frechet_distance,
    load_statistics,
    real_statistics,
    write_sweep_csv,
)
from drift.evaluation.sample import sample_images

CLASSES = 3


def run_ranks(world_size, work):
    """`work(rank, all_reduce_sum)` of every rank, in threads that really wait for each other."""
    barrier = threading.Barrier(world_size, timeout=30)
    slots, results = [None] * world_size, [None] * world_size

    def run(rank):
        def all_reduce_sum(tensor):
            slots[rank] = tensor
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        results[rank] = work(rank, all_reduce_sum)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def by_eigenvalues(mu1, sigma1, mu2, sigma2):
    """The distance by another road: tr sqrt(s1 s2) from the eigenvalues of the symmetric s1^1/2 s2 s1^1/2."""
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross


class Source:
    """Real images in memory: noise around a grey that tells the class."""

    split = "train"

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % CLASSES
        greys = 40 + 80 * self.labels[:, None, None, None]
        self.images = (greys + rng.integers(-30, 31, (count, 4, 4, 3))).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        return Image.fromarray(self.images[index])


class Decoder:
    def decode(self, latents):
        return latents


class Painter:
    """Generates the greys of `Source`; below omega 1.2 every fifth noise gives the next class instead."""

    config = SimpleNamespace(in_channels=3, input_size=4, style_codebooks=1, style_entries=2)

    def __call__(self, noise, labels, omega, style_indices):
        slips = (noise[:, 0, 0, 0] > 0.84) & (omega < 1.2)
        grey = 40 + 80 * ((labels + slips) % CLASSES)
        return (grey[:, None, None, None] + 8 * noise) / 127.5 - 1


def flat(images):
    return images.reshape(len(images), -1)[:, :7].double()


@pytest.fixture
def network():
    """Seven pixels are the features, their mean grey tells the class."""
    return FeatureNetwork(
        name="pixels",
        dimension=7,
        digest="",
        device=torch.device("cpu"),
        resize=lambda image: image,
        extract=lambda x: x.permute(0, 2, 3, 1).flatten(1)[:, :7],
        classify=lambda f: -(f.mean(1, keepdim=True) - torch.tensor([40.0, 120.0, 200.0])).abs(),
    )


SWEEP = {"images": 60, "classes": CLASSES, "seed": 5, "batch_size": 8}
REAL = {"image_size": 4, "batch_size": 7}


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


def test_statistics_of_real_images_are_numpys(network):
    source = Source(50, seed=0)
    source.labels[7] = 0  # looks like class 1
    found = real_statistics(source, network, workers=3, **REAL)
    pixels = source.images.reshape(50, -1)[:, :7].astype(float)
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(pixels, rowvar=False), rtol=1e-10)
    assert found.accuracy == 49 / 50


def test_part_of_the_real_images(network):
    source = Source(50, seed=0)
    some = real_statistics(source, network, images=20, seed=1, **REAL)
    again = real_statistics(source, network, images=20, seed=1, image_size=4, batch_size=3)
    other = real_statistics(source, network, images=20, seed=2, **REAL)
    whole = real_statistics(source, network, images=5000, **REAL)
    np.testing.assert_allclose(again.mean, some.mean, rtol=1e-12)
    assert not np.allclose(other.mean, some.mean)
    np.testing.assert_allclose(whole.mean, source.images.reshape(50, -1)[:, :7].mean(0), rtol=1e-12)


def test_identical_images_have_no_distance(network):
    a, b = (real_statistics(Source(50, seed=0), network, image_size=4, batch_size=n) for n in (7, 50))
    assert abs(frechet_distance(a.mean, a.covariance, b.mean, b.covariance)) < 1e-6


def test_ranks_merge_real_images(network):
    alone = real_statistics(Source(50, seed=0), network, **REAL)

    def work(rank, all_reduce_sum):
        return real_statistics(
            Source(50, seed=0), network, rank=rank, world_size=3, all_reduce_sum=all_reduce_sum, **REAL
        )

    for found in run_ranks(3, work):
        np.testing.assert_allclose(found.mean, alone.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, alone.covariance, rtol=1e-10)
        assert found.accuracy == alone.accuracy


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_reference_from_npz(tmp_path, keys):
    mu, sigma = np.arange(3.0, dtype=np.float32), np.eye(3)
    np.savez(tmp_path / "ref.npz", **dict(zip(keys, (mu, sigma), strict=True)))
    found = load_statistics(tmp_path / "ref.npz", 3)
    np.testing.assert_array_equal(found.mean, mu)
    np.testing.assert_array_equal(found.covariance, sigma)
    assert found.mean.dtype == np.float64 and found.accuracy is None


def test_reference_that_does_not_fit(tmp_path):
    path = tmp_path / "ref.npz"

    def complaint(dimension=3):
        with pytest.raises(UserError) as error:
            load_statistics(path, dimension)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "no such file" in complaint()
    np.savez(path, mu=np.zeros(3), cov=np.eye(3))
    assert "mu, cov" in complaint() and "ref_sigma" in complaint()
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert "2048" in complaint(2048)
    path.write_bytes(path.read_bytes()[:200])
    assert "cut short" in complaint()


def test_too_few_images(network):
    reference = FeatureStatistics(np.zeros(7), np.eye(7))
    with pytest.raises(UserError, match=r"7 real images of the split train.*more than 7"):
        real_statistics(Source(7, seed=0), network, **REAL)
    with pytest.raises(UserError, match="5 generated"):
        evaluate_sweep(Painter(), Decoder(), network, reference, omegas=[1.0], **SWEEP | {"images": 5})


def test_sweep_is_what_its_images_give(network):
    held_out = real_statistics(Source(60, seed=1), network, **REAL)
    training = real_statistics(Source(90, seed=2), network, **REAL)
    result = evaluate_sweep(Painter(), Decoder(), network, held_out, training, omegas=[1.0, 1.5], **SWEEP)

    assert [entry["omega"] for entry in result["sweep"]] == [1.0, 1.5]
    for entry in result["sweep"]:
        parts = list(sample_images(Painter(), Decoder(), range(60), entry["omega"], 5, 60, classes=CLASSES))
        _, labels, images = parts[0]
        pixels = images.reshape(60, -1)[:, :7].double().numpy()
        moments = pixels.mean(0), np.cov(pixels, rowvar=False)
        expected = by_eigenvalues(*moments, held_out.mean, held_out.covariance)
        assert entry["fid"] == pytest.approx(expected, rel=1e-6)
        nearest = np.abs(pixels.mean(1, keepdims=True) - [40, 120, 200]).argmin(1)
        assert entry["accuracy"] == pytest.approx((nearest == labels.numpy()).mean())
    assert result["sweep"][0]["accuracy"] < 0.95 < result["sweep"][1]["accuracy"]
    assert result["best"]["fid"] == min(entry["fid"] for entry in result["sweep"])
    assert result["floor"] == pytest.approx(
        by_eigenvalues(training.mean, training.covariance, held_out.mean, held_out.covariance), rel=1e-6
    )
    assert (result["images"], result["classifier_accuracy_real"]) == (60, 1.0)


def test_ranks_and_batches_do_not_change_the_sweep(network):
    reference = real_statistics(Source(60, seed=1), network, **REAL)
    alone = evaluate_sweep(Painter(), Decoder(), network, reference, omegas=[1.0], **SWEEP)

    def work(rank, all_reduce_sum):
        return evaluate_sweep(
            Painter(),
            Decoder(),
            network,
            reference,
            omegas=[1.0],
            rank=rank,
            world_size=2,
            all_reduce_sum=all_reduce_sum,
            **SWEEP | {"batch_size": 13},
        )

    first, second = run_ranks(2, work)
    assert first == second
    assert first["best"]["accuracy"] == alone["best"]["accuracy"]
    assert first["best"]["fid"] == pytest.approx(alone["best"]["fid"], rel=1e-9)
    assert alone["floor"] is None


def test_an_interrupted_sweep_goes_on(network):
    reference = real_statistics(Source(60, seed=1), network, **REAL)
    settings = {"omegas": [1.0, 1.5, 2.0], **SWEEP}
    whole = evaluate_sweep(Painter(), Decoder(), network, reference, **settings)
    seen = []
    rest = evaluate_sweep(
        Painter(),
        Decoder(),
        network,
        reference,
        finished=whole["sweep"][:2],
        on_entry=seen.append,
        **settings,
    )
    assert [entry["omega"] for entry in seen] == [2.0]
    assert rest == whole


def test_without_a_classifier_there_is_no_accuracy(network):
    network.classify = None
    reference = real_statistics(Source(60, seed=1), network, **REAL)
    result = evaluate_sweep(Painter(), Decoder(), network, reference, omegas=[1.0], **SWEEP)
    assert result["best"].keys() == {"omega", "fid"}
    assert result["classifier_accuracy_real"] is None


def test_csv(tmp_path):
    path = tmp_path / "sweep.csv"
    write_sweep_csv(path, [{"omega": 1.0, "fid": 8.25, "accuracy": 0.5}, {"omega": 1.5, "fid": 7.0}])
    assert path.read_bytes() == b"omega,fid,accuracy\n1.0,8.25,0.5\n1.5,7.0,\n"


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_samples_of_the_whole_sweep_are_counted(network, world_size):
    """Of 3 strengths, the first is known already; the last batch of a process may be a smaller one."""
    seen = [[] for _ in range(world_size)]

    def work(rank, all_reduce_sum):
        evaluate_sweep(
            Painter(),
            Decoder(),
            network,
            FeatureStatistics(np.zeros(7), np.eye(7)),
            omegas=(1.0, 1.5, 2.0),
            finished=[{"omega": 1.0, "fid": 1.0}],
            on_images=seen[rank].append,
            rank=rank,
            world_size=world_size,
            all_reduce_sum=all_reduce_sum,
            **{**SWEEP, "images": 50},
        )

    run_ranks(world_size, work)
    batch = SWEEP["batch_size"] * world_size
    of_omega = [min(made, 50) for made in range(batch, 50 + batch, batch)]
    assert seen[0] == [before + made for before in (50, 100) for made in of_omega]
