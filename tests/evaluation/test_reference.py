import itertools
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from complaints import complaint
from PIL import Image
from processes import in_processes
from standins import Source, flat, pixel_network, run_ranks, settings

from drift.data import views as view_module
from drift.data.datasets import ImageFiles
from drift.data.images import BadImage
from drift.data.views import center_view
from drift.evaluation import reference as module
from drift.evaluation.moments import FeatureStatistics
from drift.evaluation.reference import (
    Reference,
    load_statistics,
    measure_images,
    open_reference,
    self_test,
)
from drift.evaluation.store import FeatureStore
from drift.runtime.processes import Ranks


@pytest.fixture
def network():
    return pixel_network()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "cache"))


def measure(source, network, *, seed=0, size=4, batch_size=7, workers=1, on_bad_image="error", **how):
    hardware = {"sample_batch": batch_size, "workers": workers}
    sections = {"data": {"image_size": size}, "encode": {"on_bad_image": on_bad_image}, "hardware": hardware}
    return measure_images(source, network, settings(seed, **sections), **how)


def test_part_of_the_real_images(network, tmp_path, monkeypatch):
    def mean(images, seed, folder="a", batch_size=7):
        monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / folder))
        source = Source(50, seed=0)
        return measure(source, network, seed=seed, batch_size=batch_size, images=images).statistics.mean

    some = mean(20, 1)
    assert np.array_equal(mean(20, 1, "b", batch_size=3), some)
    assert not np.allclose(mean(20, 2), some)
    np.testing.assert_allclose(mean(5000, 1), flat(Source(50, seed=0).images).mean(0), rtol=1e-12)


def test_ranks_share_the_real_images(network, monkeypatch):
    """Also one that is late to look, when others could have marked theirs as done."""
    look, sources, calls = FeatureStore.missing, [Source(50, seed=0) for _ in range(3)], itertools.count()

    def look_late(store):
        if next(calls) == 1:
            time.sleep(0.5)
        return look(store)

    monkeypatch.setattr(FeatureStore, "missing", look_late)
    pixels = flat(sources[0].images)
    for found in run_ranks(3, lambda ranks: measure(sources[ranks.rank], network, ranks=ranks, workers=3)):
        assert np.array_equal(found.features[:], pixels.astype(np.float32))
        np.testing.assert_allclose(found.statistics.mean, pixels.mean(0), rtol=1e-12)
        assert found.statistics.accuracy == 1
    assert sorted(index for source in sources for index in source.loaded) == list(range(50))


def test_a_reference_is_measured_once_for_what_it_depends_on(network, monkeypatch):
    def loaded(digest="d", of_network="n", **changes):
        source = Source(50, seed=0)
        source.digest, network.digest = digest, of_network
        measure(source, network, **changes)
        return len(source.loaded)

    assert loaded() == 50
    assert loaded(batch_size=13) == 0
    assert loaded(seed=3) == 0  # all of them are taken, whatever the seed
    assert loaded(digest="other") == loaded(of_network="other") == loaded(size=3) == 50
    assert loaded(images=20) == 20
    with monkeypatch.context() as patched:
        patched.setattr(view_module, "center_view", lambda image, size: center_view(image, size)[::-1])
        assert loaded() == 50
    assert loaded() == 0
    monkeypatch.setattr(module, "version", lambda package: "another")
    assert loaded() == 50


def test_what_was_interrupted_goes_on(network, tmp_path, monkeypatch):
    class Interrupted(Source):
        def load(self, index):
            if index == 30:
                raise KeyboardInterrupt
            return super().load(index)

    whole = measure(Source(50, seed=0), network)
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "x"))
    with pytest.raises(KeyboardInterrupt):
        measure(Interrupted(50, seed=0), network)
    again, seen = Source(50, seed=0), []
    found = measure(again, network, on_images=seen.append)
    assert 21 <= min(again.loaded) <= 28 and sorted(again.loaded) == list(range(min(again.loaded), 50))
    assert seen == sorted(seen) and seen[-1] == 50
    assert np.array_equal(found.statistics.covariance, whole.statistics.covariance)


@pytest.fixture
def damaged(tmp_path):
    """Twelve images in a folder, of which one is cut short, one is empty, and one is a text."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    whole = (folder / "03.png").read_bytes()
    for name, content in (("03", whole[: len(whole) // 2]), ("07", b""), ("09", b"no image")):
        (folder / f"{name}.png").write_bytes(content)
    return folder, pixels[[0, 1, 2, 4, 5, 6, 8, 10, 11]]


def test_images_that_do_not_decode_are_named_or_left_out(network, damaged, capsys):
    folder, kept = damaged

    def refused():
        message = complaint(lambda: measure(ImageFiles(folder), network))
        assert message.startswith("3 of 12 images do not decode: ")
        assert "encode.on_bad_image: skip" in message
        for name in ("03.png (", "07.png (an empty file)", "09.png (of no known image format)"):
            assert f"{folder}/{name}" in message

    refused()
    found = measure(ImageFiles(folder), network, on_bad_image="skip")
    assert "left out 3 of 12 images" in capsys.readouterr().out
    np.testing.assert_allclose(found.statistics.mean, flat(kept).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(flat(kept), rowvar=False), rtol=1e-10)
    assert found.statistics.count == len(found.features) == 9
    assert np.array_equal(found.features[:], flat(kept).astype(np.float32))
    assert np.array_equal(np.concatenate([block for _, block in found.features.blocks()]), flat(kept))
    assert np.array_equal(found.features[np.array([8, 3])], flat(kept)[[8, 3]])
    refused()  # whoever has skipped them before
    assert measure(ImageFiles(folder), network, on_bad_image="skip").digest == found.digest
    for name in ("00", "01"):
        (folder / f"{name}.png").write_bytes(b"")
    message = complaint(lambda: measure(ImageFiles(folder), network, on_bad_image="skip"))
    assert "7 real images of " in message and " that decode: too few for" in message


def test_a_label_stays_with_its_image_where_others_are_left_out(network):
    class Damaged(Source):
        def load(self, index):
            if index in (0, 7, 31):
                raise BadImage(self.name(index), "broken")
            return super().load(index)

        def name(self, index):
            return f"image {index}"

    sources = [Damaged(50, seed=0) for _ in range(2)]
    kept = np.delete(np.arange(50), [0, 7, 31])
    for source in sources:
        source.labels[9] = 1  # looks like class 0
    how = {"on_bad_image": "skip"}
    for found in run_ranks(2, lambda ranks: measure(sources[ranks.rank], network, ranks=ranks, **how)):
        assert found.statistics.accuracy == 46 / 47
        np.testing.assert_allclose(found.statistics.mean, flat(sources[0].images[kept]).mean(0), rtol=1e-12)


def test_a_repaired_image_is_measured_whenever_the_run_is_interrupted(network, damaged, monkeypatch):
    """Of the same size, so that the folder looks as before."""
    folder, kept = damaged
    content = (folder / "11.png").read_bytes()
    (folder / "11.png").write_bytes(content[:-20] + bytes(20))
    assert measure(ImageFiles(folder), network, on_bad_image="skip").statistics.count == 8
    (folder / "11.png").write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure(ImageFiles(folder), network, on_bad_image="skip")
    found = measure(ImageFiles(folder), network, on_bad_image="skip")
    assert found.statistics.count == len(found.features) == 9
    np.testing.assert_allclose(found.statistics.mean, flat(kept).mean(0), rtol=1e-12)


def test_another_run_that_measures_the_same_is_waited_for(network, monkeypatch):
    entered, go, told = threading.Event(), threading.Event(), []

    def tell(text, **how):
        told.append(text)
        go.set()

    monkeypatch.setattr(module, "print", tell, raising=False)
    first, second = Source(50, seed=0), Source(50, seed=0)
    load = first.load

    def slowly(index):
        entered.set()
        go.wait(30)
        return load(index)

    first.load = slowly
    threads = [threading.Thread(target=measure, args=(source, network)) for source in (first, second)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert (len(first.loaded), len(second.loaded)) == (50, 0)
    assert len(told) == 1 and ": waiting for another run that measures the same images (process " in told[0]


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_reference_from_npz(tmp_path, keys):
    mu, sigma = np.arange(3.0, dtype=np.float32), np.eye(3)
    np.savez(tmp_path / "ref.npz", **dict(zip(keys, (mu, sigma), strict=True)))
    found = load_statistics(tmp_path / "ref.npz", 3)
    assert np.array_equal(found.statistics.mean, mu) and np.array_equal(found.statistics.covariance, sigma)
    assert found.statistics.mean.dtype == np.float64 and found.features is None


def test_a_measured_reference_is_used_elsewhere_by_its_file_alone(network, tmp_path):
    network.digest = "a"
    measured = measure(Source(50, seed=0), network)
    copy = measured.file.rename(tmp_path / "train.npz")
    found = load_statistics(copy, 7, "a")
    pixels = flat(Source(50, seed=0).images)
    np.testing.assert_allclose(found.statistics.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(pixels, rowvar=False), rtol=1e-10)
    assert (found.statistics.accuracy, found.statistics.count, found.features) == (1, 50, None)
    message = complaint(lambda: load_statistics(copy, 7, "b"))
    assert message.startswith(f"fid.reference = {copy}: was measured with another feature network")


def test_reference_that_does_not_fit(tmp_path):
    path = tmp_path / "ref.npz"

    def refused(dimension=3, **arrays):
        if arrays:
            np.savez(path, **arrays)
        message = complaint(lambda: load_statistics(path, dimension))
        assert str(path) in message
        return message

    assert "no such file" in refused()
    mu, sigma = np.zeros(3), np.eye(3)
    assert "has the arrays mu, cov, and no sigma" in refused(mu=mu, cov=sigma)
    assert "2048" in refused(2048, mu=mu, sigma=sigma)
    for wrong in (np.diag([1, np.nan, 1]), np.triu(np.ones((3, 3))), -sigma, sigma + 1j, sigma.astype(str)):
        assert "no mean and covariance" in refused(mu=mu, sigma=wrong)
    assert "cannot be read" in refused(mu=np.array([None, 1, 2], object), sigma=sigma)
    whole = path.read_bytes()
    array = (tmp_path / "array.npy").open("w+b")
    np.save(array, mu)
    array.seek(0)
    for content in (whole[:200], b"", b"no arrays", array.read()):
        path.write_bytes(content)
        assert "cannot be read" in refused()
    np.savez(path, mu=mu, sigma=sigma)
    content = bytearray(path.read_bytes())
    content[content.find(sigma.tobytes()) + 8] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in refused()


def test_too_few_images(network):
    message = complaint(lambda: measure(Source(7, seed=0), network))
    assert message.startswith("7 real images of train: too few") and "more than 7" in message


def test_a_folder_is_read_with_the_centre_crop(network, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / "images" / str(i % 2) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images/notes.txt").touch()
    images = open_reference(str(tmp_path / "images"), "digits", None, 10)
    found = measure(images, network)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    np.testing.assert_allclose(found.features[:], flat(pixels[order, :, 1:5]))
    assert found.statistics.accuracy is None  # nobody has said what they show
    (tmp_path / "images/0/00.png").rename(tmp_path / "images/0/99.png")
    assert open_reference(str(tmp_path / "images"), "digits", None, 10).digest != images.digest


def test_what_a_reference_may_be(tmp_path):
    assert len(open_reference("held_out", "digits", None, 10)) == 360
    for name, told in (("a/b.npz", "no such file"), ("a/b", "no such folder"), (f"{tmp_path}/", "no images")):
        assert told in complaint(lambda name=name: open_reference(name, "digits", None, 10))


def test_self_test_of_known_distances(network):
    reference = measure(Source(60, seed=1), network)
    found = self_test(reference, seed=5)
    assert abs(found["same"]) < 1e-5
    expected = np.trace(reference.statistics.covariance) / 100
    assert found["shift"]["measured"] == pytest.approx(expected, rel=1e-6)
    pixels = flat(Source(60, seed=1).images)
    # sum of squares, less the part of the mean that the unbiased covariance takes for its own
    expected = 0.01 * ((pixels**2).sum() / 60 + np.trace(np.cov(pixels, rowvar=False)) / 60)
    assert found["scale"]["measured"] == pytest.approx(expected, rel=1e-6)

    chosen = np.zeros(60, bool)
    chosen[module.numpy_generator(5, "fid/halves").permutation(60)[:30]] = True
    a, b = (pixels[part] for part in (chosen, ~chosen))
    sigma = [np.cov(x, rowvar=False) for x in (a, b)]
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma[0]) + np.trace(sigma[1])
    expected -= 2 * np.trace(scipy.linalg.sqrtm(sigma[0] @ sigma[1]).real)
    assert found["halves"] == pytest.approx(expected, rel=1e-6)
    assert self_test(reference, seed=6)["halves"] != pytest.approx(expected, rel=1e-3)


def statistics_of(covariance):
    return Reference("x.npz", "", FeatureStatistics(np.zeros(len(covariance)), covariance), Path("x.npz"))


def test_there_is_no_floor_without_enough_features(network):
    few = measure(Source(15, seed=1), network)
    assert self_test(few, seed=0)["halves"] is None is self_test(statistics_of(np.eye(3)), seed=0)["halves"]


def test_a_covariance_that_is_none_fails_the_self_test():
    sigma = np.array([[1.0, 2.0], [2.0, 1.0]])  # symmetric, with a negative eigenvalue
    message = complaint(lambda: self_test(statistics_of(sigma), seed=0))
    assert message.startswith("self-test of the reference x.npz: 'same' gives")


def measure_without_waiting(ranks: Ranks, folder: Path) -> None:
    source = Source(50, seed=0)
    load = source.load

    def late(index):
        time.sleep(0.02 * ranks.rank)
        return load(index)

    source.load = late
    os.environ["DRIFT_WORK_DIR"] = str(folder)
    found = measure(source, pixel_network(), ranks=ranks)
    assert np.array_equal(found.features[:], flat(source.images).astype(np.float32))
    assert found.statistics.mean == pytest.approx(flat(source.images).mean(0), rel=1e-12)


@pytest.mark.slow
def test_processes_on_gpus_wait_for_each_others_rows(tmp_path):
    """Sums on a GPU make no host wait, so it took rows for measured that another had not written yet."""
    assert in_processes(measure_without_waiting, 2, tmp_path, like_nccl=True) == [0, 0]
