import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from complaints import complaint

from drift.data import latents as module
from drift.data.latents import LatentReader, LatentStore, check_meta, latent_files, write_latents
from drift.runtime.files import sha256

N = 24


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, 4, 3, 5)).astype(np.float16), rng.permutation(np.arange(N) % 5)


@pytest.fixture
def folder(tmp_path, arrays):
    write_latents(tmp_path, "train", *arrays, {"num_classes": 6, "view": "center", "crop_scale": (0.2, 1.0)})
    return tmp_path


def test_round_trip(folder, arrays):
    latents, labels = arrays
    store = LatentStore.open(folder)
    assert isinstance(store.latents, np.memmap) and store.latents.mode == "r"
    assert len(store) == N and store.shape == (N, 4, 3, 5)
    assert np.array_equal(store.latents, latents) and np.array_equal(store.labels, labels)
    assert store.labels.dtype == np.int64
    assert store.num_classes == 6 and store.class_names == list("012345")
    assert store.meta["shape"] == [N, 4, 3, 5] and store.meta["dtype"] == "float16"
    assert store.meta["sha256"] == {
        name: sha256(folder / f"train_{name}.npy") for name in ("latents", "labels")
    }


def test_files_from_elsewhere_need_nothing_in_their_meta(folder):
    ours = LatentStore.open(folder).digest
    (folder / "train_meta.json").write_text(json.dumps({"count": N}))
    store = LatentStore.open(folder)
    assert store.num_classes == 5 and store.class_names == list("01234")
    assert store.digest == ours  # from the files, equal to that from the meta file
    check_meta(store, view="augmented", image_size=256)


def test_digest_follows_each_file(tmp_path, arrays):
    latents, labels = arrays
    digests = set()
    for case, (a, b) in enumerate([(latents, labels), (latents[::-1], labels), (latents, labels[::-1])]):
        write_latents(tmp_path / str(case), "train", a, b, {})
        digests.add(LatentStore.open(tmp_path / str(case)).digest)
    assert len(digests) == 3


@pytest.fixture
def pixels(tmp_path):
    """A folder of pixels, and their levels `[24, 3, 4, 4]`."""
    levels = np.random.default_rng(4).integers(0, 256, (N, 3, 4, 4), np.uint8)
    write_latents(tmp_path / "pixels", "train", levels, np.arange(N) % 5, {})
    return tmp_path / "pixels", levels


@pytest.mark.parametrize("on_device", [False, True])
def test_pixels_stay_8_bit_until_they_are_on_the_device(pixels, on_device):
    folder, levels = pixels
    store = LatentStore.open(folder)
    assert store.dtype == np.uint8 and store.meta["dtype"] == "uint8"
    assert latent_files(folder)[0].stat().st_size == 128 + levels.nbytes
    indices = np.random.default_rng(3).integers(0, N, (5, 6))
    assert np.array_equal(store.read(indices), levels[indices])
    expected = levels[indices].astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(store.rows(indices), expected)
    reader = LatentReader(store, torch.device("cpu"), on_device=on_device)
    fetched = reader.fetch(indices)
    assert on_device or (fetched.dtype == torch.uint8 and fetched.nbytes == expected.nbytes / 4)
    for part in (slice(None), slice(1, 3)):
        latents = reader.place(fetched[part])
        assert latents.dtype == torch.float32 and np.array_equal(latents, expected[part])


# Reading


@pytest.mark.parametrize("large_row", [1, 2**16])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4), (200,)])
def test_rows_follow_the_order_that_was_asked_for(folder, arrays, shape, large_row, monkeypatch):
    monkeypatch.setattr(module, "_LARGE_ROW", large_row)  # one is read by several threads
    monkeypatch.setattr(module, "_BUFFERS", 2)
    indices = np.random.default_rng(1).integers(0, N, shape)  # with repetitions
    store = LatentStore.open(folder)
    expected = torch.from_numpy(arrays[0])[torch.as_tensor(indices)]
    for given in (indices, torch.from_numpy(np.asarray(indices))):
        read, rows = store.read(given), store.rows(given)
        assert read.dtype == torch.float16 and torch.equal(read, expected)
        assert rows.dtype == torch.float32 and torch.equal(rows, expected.float())


@pytest.mark.parametrize("most", [77, 2**31])
def test_neighbours_are_read_at_once_and_nothing_twice(folder, arrays, monkeypatch, most):
    store, reads, preadv = LatentStore.open(folder), [], os.preadv

    def spy(file, buffers, position):  # which may read less than it was asked for
        reads.append((position - store.latents.offset, sum(map(len, buffers))))
        return preadv(file, [buffers[0][:most]] if most < 1000 else buffers, position)

    monkeypatch.setattr(os, "preadv", spy)
    indices = np.array([[23, 4, 9, 3], [0, 4, 5, 23]])
    assert np.array_equal(store.read(indices), arrays[0][indices])
    size = 4 * 3 * 5 * 2  # bytes of a row
    if most > 1000:
        assert reads == [(row * size, count * size) for row, count in [(0, 1), (3, 3), (9, 1), (23, 1)]]


def test_threads_do_not_disturb_each_other(folder, arrays):
    store = LatentStore.open(folder)
    wanted = np.random.default_rng(2).integers(0, N, (200, 50))
    with ThreadPoolExecutor(4) as pool:
        for indices, rows in zip(wanted, pool.map(store.read, wanted), strict=True):
            assert np.array_equal(rows, arrays[0][indices])


def test_a_folder_that_is_removed_or_replaced_stays_readable_and_is_closed(folder, arrays):
    store, path = LatentStore.open(folder), os.path.realpath(latent_files(folder)[0])
    write_latents(folder, "train", -arrays[0], arrays[1], {})
    for file in latent_files(folder):
        file.unlink()
    assert np.array_equal(store.read(np.arange(N)), arrays[0])

    def opened():
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return any(os.readlink(link) == f"{path} (deleted)" for link in links if link.is_symlink())

    assert opened()
    del store
    assert not opened()


def test_a_file_that_is_cut_short_or_a_disk_that_is_gone_is_one_line(folder, arrays, monkeypatch):
    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = LatentStore.open(folder)
    os.truncate(latent_files(folder)[0], store.latents.offset + 10 * 120 + 50)
    assert np.array_equal(store.read(np.arange(10)), arrays[0][:10])
    for rows in ([10], [0, 23]):
        message = complaint(lambda rows=rows: store.rows(np.array(rows)))
        assert message.startswith(f"{folder}/train_latents.npy: cannot be read (it has been cut short)")
    monkeypatch.setattr(os, "preadv", preadv)
    message = complaint(lambda: store.read(np.array([3])))
    assert f"{folder}/train_latents.npy: cannot be read (Input/output error)" in message


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("at_once", [7 * 60, 2**20])
def test_a_reader_gives_the_rows_in_two_steps(folder, arrays, monkeypatch, on_device, at_once):
    monkeypatch.setattr(module, "_BLOCK", at_once)
    store = LatentStore.open(folder)
    reader = LatentReader(store, torch.device("cpu"), on_device=on_device)
    if on_device:  # nothing is read any more
        monkeypatch.setattr(store, "read", None)
    indices = np.random.default_rng(3).integers(0, N, (5, 6))
    fetched = reader.fetch(indices)
    assert fetched.dtype == (torch.int64 if on_device else torch.float16)
    for part in (slice(None), slice(1, 3)):  # the trainers place a batch in parts
        latents = reader.place(fetched[part])
        assert latents.dtype == torch.float32
        assert np.array_equal(latents, arrays[0][indices[part]].astype(np.float32))


def test_latents_that_do_not_fit_onto_the_device_are_one_line(folder, monkeypatch):
    def empty(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    store = LatentStore.open(folder)
    monkeypatch.setattr(torch, "empty", empty)
    message = complaint(lambda: LatentReader(store, torch.device("cpu"), on_device=True))
    assert message.startswith("hardware.latents_on_device = true: 0.0 GiB of latents do not fit")


# Rows of an image


@pytest.mark.parametrize(
    ("meta", "per_image"),
    [
        ({}, 1),
        ({"view": "augmented", "crops": 4}, 4),
        ({"view": "center", "mirror": False}, 1),
        ({"view": "augmented", "crops": 4, "images": 6}, 4),
        ({"view": "center", "mirror": True, "images": 15, "skipped_images": {"count": 3, "names": []}}, 2),
    ],
)
def test_rows_of_an_image(tmp_path, arrays, meta, per_image):
    latents, labels = arrays
    write_latents(tmp_path, "train", latents, np.repeat(labels[::per_image], per_image), meta)
    assert LatentStore.open(tmp_path).per_image == per_image


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"view": "augmented", "crops": 4, "images": 7}, "7 images of 4 rows each are not the 24 latents"),
        ({"view": "augmented", "crops": 7}, "3 images of 7 rows each are not the 24 latents beside it"),
        ({"view": "center", "mirror": True}, "the labels of the 2 rows of an image differ; rerun"),
        ({"view": "centre"}, "view is 'centre', neither center nor augmented"),
    ],
)
def test_rows_of_an_image_that_cannot_be_are_one_line(tmp_path, arrays, meta, message):
    write_latents(tmp_path, "train", arrays[0], np.arange(N) % 5, meta)
    assert f"train_meta.json: {message}" in complaint(lambda: LatentStore.open(tmp_path).per_image)


# Damage


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (0, Path.unlink, "train_latents.npy: is missing"),
        (1, Path.unlink, "train_labels.npy: is missing"),
        (2, Path.unlink, "train_meta.json: is missing"),
        (0, lambda path: os.truncate(path, path.stat().st_size - 3), "train_latents.npy: is cut short"),
        (
            0,
            lambda path: os.truncate(path, 9999),
            "train_latents.npy: has 9999 bytes where its header announces",
        ),
        (1, lambda path: os.truncate(path, 40), "train_labels.npy: is cut short"),
        (0, lambda path: os.truncate(path, 0), "train_latents.npy: is cut short"),
        (
            1,
            lambda path: np.save(path, np.array([{}] * N, object)),
            "train_labels.npy: is cut short or no .npy",
        ),
        (1, lambda path: np.save(path, np.zeros(N - 1, np.int64)), f"{N - 1} labels for the {N} latents"),
        (0, lambda path: np.save(path, np.zeros((N, 4, 3, 5))), "holds float64 in 4 dimensions, not float16"),
        (0, lambda path: np.save(path, np.zeros((N, 60), np.float16)), "holds float16 in 2 dimensions"),
        (0, lambda path: np.save(path, np.asfortranarray(np.load(path))), "is stored column after column"),
        (0, lambda path: np.save(path, np.zeros((0, 4, 3, 5), np.float16)), "holds no rows"),
        (1, lambda path: np.save(path, np.arange(N) % 7), "labels 0 to 6 are not all in 0 to 5"),
        (1, lambda path: np.save(path, np.arange(N) % 3 - 1), "labels -1 to 1 are not all in 0 to 5"),
        (2, lambda path: path.write_text('{"num_classes": '), "train_meta.json: is not JSON"),
        (2, lambda path: path.write_text("[]"), "train_meta.json: holds list, not an object"),
    ],
)
def test_damaged_files_are_one_line_with_the_way_out(folder, file, damage, message):
    damage(latent_files(folder)[file])
    found = complaint(lambda: LatentStore.open(folder))
    assert message in found and "rerun encode (dvc repro)" in found


# Latents of other settings


STATED = {"view": "center", "image_size": 256, "vae": "somebody/vae", "vae_revision": "31f26fd",
          "scaling_factor": 0.18215, "crop_scale": (0.2, 1.0)}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "wanted", "message"),
    [
        ("view", "augmented", 'view is "center", but the view asked for is "augmented"'),
        ("image_size", 512, "image_size is 256, but data.image_size is 512"),
        ("vae_revision", None, 'vae_revision is "31f26fd", but encode.autoencoder.revision is null'),
        ("scaling_factor", 0.18216, "scaling_factor is 0.18215, but the scaling_factor asked for is 0.18216"),
        ("crop_scale", (0.5, 1.0), "crop_scale is [0.2, 1.0], but the crop_scale asked for is [0.5, 1.0]"),
    ],
)
def test_check_meta_refuses_what_contradicts_the_settings(tmp_path, arrays, key, wanted, message):
    write_latents(tmp_path, "train", *arrays, STATED)
    store = LatentStore.open(tmp_path)
    check_meta(store, **STATED, posterior="not in the file")
    check_meta(store, scaling_factor=float(np.float32(0.18215)))
    found = complaint(lambda: check_meta(store, **{**STATED, key: wanted}))
    assert found.startswith(f"{tmp_path}/train_meta.json: {message}; rerun encode")
