import hashlib
import json

import numpy as np
import pytest
import torch

from drift.data.latents import LatentStore, check_meta, latent_files, write_latents
from drift.errors import UserError

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


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rows_follow_the_order_that_was_asked_for(folder, arrays, shape, as_tensor):
    indices = np.random.default_rng(1).integers(0, N, shape)  # with repetitions
    rows = LatentStore.open(folder).rows(torch.from_numpy(np.asarray(indices)) if as_tensor else indices)
    assert rows.dtype == torch.float32 and rows.shape == (*shape, 4, 3, 5)
    expected = torch.from_numpy(arrays[0])[torch.as_tensor(indices)].float()
    assert torch.equal(rows, expected)


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


def test_check_meta_refuses_what_contradicts_the_settings(folder):
    store = LatentStore.open(folder)
    check_meta(store, view="center", crop_scale=(0.2, 1.0), vae="not in the file")
    with pytest.raises(
        UserError, match=r'train_meta\.json: view is "center", but the settings say "augmented"'
    ):
        check_meta(store, view="augmented")
    with pytest.raises(UserError, match=r"crop_scale is \[0.2, 1.0\], but the settings say \[0.5, 1.0\]"):
        check_meta(store, crop_scale=(0.5, 1.0))
