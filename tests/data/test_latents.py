import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from complaints import complaint

from drift.data import latents as module
from drift.data.latents import LatentReader, LatentStore, check_meta, latent_files, write_latents
from drift.runtime.errors import UserError

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
    hashes = {
        name: hashlib.sha256((folder / f"train_{name}.npy").read_bytes()).hexdigest()
        for name in ("latents", "labels")
    }
    assert store.meta["sha256"] == hashes


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (2, 3, 4), (200,)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_follow_the_order_that_was_asked_for(folder, arrays, shape, as_tensor):
    indices = np.random.default_rng(1).integers(0, N, shape)  # with repetitions
    given = torch.from_numpy(np.asarray(indices)) if as_tensor else indices
    store = LatentStore.open(folder)
    expected = torch.from_numpy(arrays[0])[torch.as_tensor(indices)]
    read, rows = store.read(given), store.rows(given)
    assert read.dtype == torch.float16 and torch.equal(read, expected)
    assert rows.dtype == torch.float32 and torch.equal(rows, expected.float())


def test_neighbours_are_read_at_once_and_nothing_twice(folder, monkeypatch):
    store, reads, preadv = LatentStore.open(folder), [], os.preadv

    def spy(file, buffers, position):
        reads.append((position - store.latents.offset, sum(len(buffer) for buffer in buffers)))
        return preadv(file, buffers, position)

    monkeypatch.setattr(os, "preadv", spy)
    store.read(np.array([[23, 4, 9, 3], [0, 4, 5, 23]]))
    size = 4 * 3 * 5 * 2  # bytes of a row
    assert reads == [(row * size, count * size) for row, count in [(0, 1), (3, 3), (9, 1), (23, 1)]]


def test_reads_may_give_less_than_was_asked_for(folder, arrays, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, position: preadv(file, [buffers[0][:77]], position)
    )
    assert np.array_equal(LatentStore.open(folder).read(np.arange(N)), arrays[0])


def test_threads_do_not_disturb_each_other(folder, arrays):
    store = LatentStore.open(folder)
    wanted = np.random.default_rng(2).integers(0, N, (200, 50))
    with ThreadPoolExecutor(4) as pool:
        for indices, rows in zip(wanted, pool.map(store.read, wanted), strict=True):
            assert np.array_equal(rows, arrays[0][indices])


def test_a_row_that_does_not_exist_is_a_bug(folder):
    store = LatentStore.open(folder)
    for row in (-1, N):
        with pytest.raises(AssertionError):
            store.read(np.array([0, row]))


def test_a_folder_that_is_removed_or_replaced_stays_readable(folder, arrays):
    store = LatentStore.open(folder)
    write_latents(folder, "train", -arrays[0], arrays[1], {})
    for path in latent_files(folder):
        path.unlink()
    assert np.array_equal(store.read(np.arange(N)), arrays[0])


def test_a_file_that_is_cut_short_later_is_one_line(folder, arrays):
    store = LatentStore.open(folder)
    os.truncate(latent_files(folder)[0], store.latents.offset + 10 * 120 + 50)
    assert np.array_equal(store.read(np.arange(10)), arrays[0][:10])
    for rows in ([10], [23], [0, 23]):
        message = complaint(lambda rows=rows: store.rows(np.array(rows)))
        assert message.startswith(f"{folder}/train_latents.npy: cannot be read (it has been cut short)")
        assert "run again once it is back" in message


def test_a_disk_that_is_gone_is_one_line(folder, monkeypatch):
    def preadv(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = LatentStore.open(folder)
    monkeypatch.setattr(os, "preadv", preadv)
    message = complaint(lambda: store.read(np.array([3])))
    assert f"{folder}/train_latents.npy: cannot be read (Input/output error)" in message


def test_a_store_closes_its_file(folder):
    def opened():
        return [
            name for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}") == path
        ]

    path = os.path.realpath(latent_files(folder)[0])
    store = LatentStore.open(folder)
    assert opened()
    del store
    assert not opened()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, N, 4096])
def test_a_reader_gives_the_rows_in_two_steps(folder, arrays, monkeypatch, on_device, at_once):
    monkeypatch.setattr(module, "_LOADED_AT_ONCE", at_once)
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
    assert message.endswith("set it to false")


@pytest.mark.parametrize(
    ("meta", "per_image"),
    [
        ({}, 1),
        ({"view": "augmented", "crops": 4}, 4),
        ({"view": "augmented"}, 1),
        ({"view": "center", "mirror": True}, 2),
        ({"view": "center", "mirror": False}, 1),
        ({"view": "center"}, 1),
        ({"view": "augmented", "crops": 4, "images": 6}, 4),
        ({"view": "center", "mirror": True, "images": 12}, 2),
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
        (
            {"view": "augmented", "crops": 4, "images": 7},
            "7 images of 4 rows each are not the 24 latents beside",
        ),
        ({"view": "augmented", "crops": 7}, "3 images of 7 rows each are not the 24 latents beside it"),
        (
            {"view": "center", "mirror": True},
            "the labels of the 2 rows of an image differ; rerun",
        ),
        ({"view": "centre"}, "view is 'centre', neither center nor augmented"),
    ],
)
def test_rows_of_an_image_that_cannot_be_are_one_line(tmp_path, arrays, meta, message):
    latents, _ = arrays
    write_latents(tmp_path, "train", latents, np.arange(len(latents)) % 5, meta)
    assert f"train_meta.json: {message}" in complaint(lambda: LatentStore.open(tmp_path).per_image)


def test_files_of_the_prior_need_nothing_in_their_meta(folder):
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


def cut_latents(paths):
    paths[0].write_bytes(paths[0].read_bytes()[:-3])


def lengthen_latents(paths):
    with open(paths[0], "ab") as file:
        file.write(b"\0")


def cut_header(paths):
    paths[1].write_bytes(paths[1].read_bytes()[:40])


def empty_file(paths):
    paths[0].write_bytes(b"")


def pickled(paths):
    np.save(paths[1], np.array([{}] * N, object), allow_pickle=True)


def fewer_labels(paths):
    np.save(paths[1], np.zeros(N - 1, np.int64))


def float32(paths):
    np.save(paths[0], np.zeros((N, 4, 3, 5), np.float32))


def flat(paths):
    np.save(paths[0], np.zeros((N, 60), np.float16))


def int32(paths):
    np.save(paths[1], np.zeros(N, np.int32))


def fortran(paths):
    np.save(paths[0], np.asfortranarray(np.load(paths[0])))


def no_rows(paths):
    np.save(paths[0], np.zeros((0, 4, 3, 5), np.float16))


def large_label(paths):
    np.save(paths[1], np.arange(N) % 7)


def negative_label(paths):
    np.save(paths[1], np.arange(N) % 3 - 1)


def half_json(paths):
    paths[2].write_text('{"num_classes": ')


def json_list(paths):
    paths[2].write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda paths: paths[0].unlink(), "train_latents.npy: is missing"),
        (lambda paths: paths[1].unlink(), "train_labels.npy: is missing"),
        (lambda paths: paths[2].unlink(), "train_meta.json: is missing"),
        (cut_latents, "train_latents.npy: is cut short"),
        (lengthen_latents, r"train_latents.npy: has \d+ bytes where its header announces \d+"),
        (cut_header, "train_labels.npy: is cut short"),
        (empty_file, "train_latents.npy: is cut short"),
        (pickled, "train_labels.npy: is cut short or no .npy file"),
        (fewer_labels, f"train_labels.npy: {N - 1} labels for the {N} latents"),
        (float32, "train_latents.npy: holds float32 in 4 dimensions, not float16 in 4"),
        (flat, "train_latents.npy: holds float16 in 2 dimensions, not float16 in 4"),
        (fortran, "train_latents.npy: is stored column after column"),
        (int32, "train_labels.npy: holds int32 in 1 dimensions, not int64 in 1"),
        (no_rows, "train_latents.npy: holds no rows"),
        (large_label, "train_labels.npy: labels 0 to 6 are not all in 0 to 5"),
        (negative_label, "train_labels.npy: labels -1 to 1 are not all in 0 to 5"),
        (half_json, "train_meta.json: is not JSON"),
        (json_list, "train_meta.json: holds list, not an object"),
    ],
)
def test_damaged_files_are_one_line_with_the_way_out(folder, damage, message):
    damage(latent_files(folder))
    with pytest.raises(UserError, match=message) as error:
        LatentStore.open(folder)
    assert "\n" not in str(error.value) and "rerun encode (dvc repro)" in str(error.value)


STATED = {
    "view": "center",
    "image_size": 256,
    "vae": "somebody/vae",
    "vae_revision": "31f26fd",
    "scaling_factor": 0.18215,
    "crop_scale": (0.2, 1.0),
}


@pytest.mark.parametrize(
    ("key", "wanted", "message"),
    [
        (
            "view",
            "augmented",
            'view is "center", but this stage needs "augmented"; *; name the folder of that view',
        ),
        ("image_size", 512, "image_size is 256, but data.image_size is 512; *; correct data.image_size"),
        ("vae", "vae", 'vae is "somebody/vae", but encode.vae is "vae"; *; correct encode.vae'),
        (
            "vae_revision",
            None,
            'vae_revision is "31f26fd", but encode.vae_revision is null; *; correct encode.vae_revision',
        ),
        (
            "scaling_factor",
            0.13025,
            "scaling_factor is 0.18215, but that of encode.vae is 0.13025; *; correct encode.vae",
        ),
        (
            "crop_scale",
            (0.5, 1.0),
            "crop_scale is [0.2, 1.0], but the settings say [0.5, 1.0]; *; correct the setting",
        ),
    ],
)
def test_check_meta_refuses_what_contradicts_the_settings(tmp_path, arrays, key, wanted, message):
    write_latents(tmp_path, "train", *arrays, STATED)
    store = LatentStore.open(tmp_path)
    check_meta(store, **STATED, posterior="not in the file")
    way_out = "rerun encode (dvc repro) or fetch it (dvc pull), or"
    expected = f"{tmp_path}/train_meta.json: " + message.replace("*;", way_out)
    assert complaint(lambda: check_meta(store, **{**STATED, key: wanted})) == expected


def test_check_meta_takes_a_scale_that_was_rounded(tmp_path, arrays):
    write_latents(tmp_path, "train", *arrays, STATED)
    store = LatentStore.open(tmp_path)
    check_meta(store, scaling_factor=float(np.float32(0.18215)))
    with pytest.raises(UserError):
        check_meta(store, scaling_factor=0.18216)
