import errno
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from complaints import complaint
from overflow import Overflowing
from PIL import Image

from drift.autoencoders.kl import VAE
from drift.data.images import FolderImages, augmented_view, center_view, open_images
from drift.data.latents import LatentStore, check_meta
from drift.runtime.errors import Stopped, UserError
from drift.runtime.files import RowFile
from drift.runtime.seeds import numpy_generator
from drift.runtime.torchvision import ensure_torchvision
from drift.training import encode as encoding
from drift.training.encode import encode_view

SIZE = 16
CENTER = {"view": "center", "mirror": True, "posterior": "mean"}
AUGMENTED = {"view": "augmented", "mirror": False, "posterior": "sample"}


class PoolingVAE:
    """Means of 4x4 patches for latents: exact in any batch, so that whole files can be compared."""

    id, revision, digest, scaling_factor = "pooling", None, "0" * 64, 0.5
    device, precision = torch.device("cpu"), "float32"

    def __init__(self, spread: float = 0.0, shift: float = 0.0):
        self.spread, self.shift = spread, shift
        self.batches: list[int] = []
        self.before_pass = lambda: None

    def latent_shape(self, image_size):
        return 4, image_size // 4, image_size // 4

    def moments(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
        self.before_pass()
        self.batches.append(len(images))
        planes = F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 4)
        mean = torch.cat([planes, planes[:, :1]], 1) + self.shift
        return mean, torch.full_like(mean, self.spread)

    def scale(self, z):
        return z * self.scaling_factor


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, count in (("ant", 5), ("bee", 6)):
        (root / "train" / label).mkdir(parents=True)
        for i in range(count):
            shape = (*rng.integers(SIZE, 60, 2), 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / "train" / label / f"{i}.png")
    return root


@pytest.fixture
def damaged_root(root, tmp_path):
    """A copy in which a JPEG has lost its end, a PNG is a text, and a PNG's header is cut."""
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    jpeg = io.BytesIO()
    Image.open(copy / "train" / "ant" / "1.png").save(jpeg, "JPEG")
    (copy / "train" / "ant" / "1.jpeg").write_bytes(jpeg.getvalue()[:-60])
    (copy / "train" / "ant" / "1.png").unlink()
    (copy / "train" / "bee" / "0.png").write_text("no image")
    whole = (copy / "train" / "bee" / "5.png").read_bytes()
    (copy / "train" / "bee" / "5.png").write_bytes(whole[:20])
    return copy


def encode(root: Path, folder: Path, vae: PoolingVAE | None = None, **changes) -> Path:
    arguments = {
        "dataset": "folder",
        "image_size": SIZE,
        "crops": 3,
        "crop_scale": (0.2, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": True,
        "seed": 0,
        "on_bad_image": "error",
        "batch_size": 6,
    }
    source = open_images("folder", str(root), "train", 2)
    return encode_view(source, vae or PoolingVAE(), folder, **(arguments | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pooled(view: np.ndarray) -> np.ndarray:
    """What PoolingVAE makes of one picture, in NumPy."""
    planes = view.astype(np.float64).reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    return 0.5 * (planes[[0, 1, 2, 0]] / 127.5 - 1)


# What is written


def test_center_rows_are_each_image_and_its_mirror(root, tmp_path):
    store = LatentStore.open(encode(root, tmp_path, **CENTER))
    source = open_images("folder", str(root), "train", 2)
    assert store.shape == (22, 4, 4, 4)
    assert store.labels.tolist() == [0] * 10 + [1] * 12
    for i in range(len(source)):
        expected = pooled(center_view(source.load(i), SIZE))
        assert np.abs(store.latents[2 * i] - expected).max() < 1e-3
        assert np.abs(store.latents[2 * i + 1] - expected[:, :, ::-1]).max() < 1e-3
    alone = LatentStore.open(encode(root, tmp_path / "alone", **CENTER | {"mirror": False}))
    assert np.array_equal(alone.latents, store.latents[::2])


def test_augmented_rows_are_crops_that_depend_on_seed_image_and_crop_alone(root, tmp_path):
    settings = AUGMENTED | {"posterior": "mean"}
    store = LatentStore.open(encode(root, tmp_path / "a", **settings))
    source = open_images("folder", str(root), "train", 2)
    assert store.shape == (33, 4, 4, 4) and store.labels.tolist() == [0] * 15 + [1] * 18
    for i, crop in ((0, 0), (4, 2), (10, 1)):
        rng = numpy_generator(0, "encode/crop", i, crop)
        view = augmented_view(source.load(i), SIZE, (0.2, 1.0), (3 / 4, 4 / 3), True, rng)
        assert np.abs(store.latents[3 * i + crop] - pooled(view)).max() < 1e-3
    assert len({row.tobytes() for row in store.latents}) == 33

    fewer = LatentStore.open(encode(root, tmp_path / "b", **settings, crops=2))
    kept = np.arange(33).reshape(11, 3)[:, :2].ravel()
    assert np.array_equal(fewer.latents, store.latents[kept])
    other = LatentStore.open(encode(root, tmp_path / "c", **settings, seed=1))
    assert not (other.latents[:] == store.latents).all((1, 2, 3)).any()


def test_a_sample_is_mean_plus_std_times_noise_of_its_own(root, tmp_path):
    mean = LatentStore.open(encode(root, tmp_path / "mean", **CENTER)).latents[:].astype(np.float64)
    sample = encode(root, tmp_path / "sample", PoolingVAE(spread=3.0), **CENTER | {"posterior": "sample"})
    noise = (LatentStore.open(sample).latents - mean) / (0.5 * 3.0)  # [22, 4, 4, 4]
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    correlation = np.corrcoef(noise.reshape(22, -1)) - np.eye(22)
    assert np.abs(correlation).max() < 0.6  # 64 numbers a row: 0.125 is one standard deviation


def test_an_autoencoder_of_diffusers(root, tmp_path):
    ensure_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "sample_size": SIZE}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    model = AutoencoderKL(**sizes, **blocks, scaling_factor=0.7).eval()
    model.save_pretrained(tmp_path / "vae")
    vae = VAE.from_pretrained(str(tmp_path / "vae"))
    store = LatentStore.open(encode(root, tmp_path / "work", vae, **CENTER))

    source = open_images("folder", str(root), "train", 2)
    views = [center_view(source.load(i), SIZE) for i in range(len(source))]
    images = np.stack([view[:, ::side] for view in views for side in (1, -1)])
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    assert np.allclose(store.latents, latents.numpy() * 0.7, rtol=2e-3, atol=1e-4)
    assert store.meta["vae_sha256"] == vae.digest and store.meta["scaling_factor"] == 0.7
    check_meta(store, vae=str(tmp_path / "vae"), vae_revision=None)


def test_meta_tells_how_the_latents_were_made(root, tmp_path):
    export = encode(root, tmp_path, **AUGMENTED)
    assert sorted(contents(export)) == ["train_labels.npy", "train_latents.npy", "train_meta.json"]
    hashes = {
        name: hashlib.sha256((export / f"train_{name}.npy").read_bytes()).hexdigest()
        for name in ("latents", "labels")
    }
    source = open_images("folder", str(root), "train", 2)
    assert json.loads((export / "train_meta.json").read_text()) == {
        "dataset": "folder",
        "dataset_split": "train",
        "images": 11,
        "images_sha256": source.digest,
        "skipped_images": {"count": 0, "names": []},
        "class_names": ["ant", "bee"],
        "num_classes": 2,
        "view": "augmented",
        "image_size": SIZE,
        "crops": 3,
        "crop_scale": [0.2, 1.0],
        "crop_ratio": [3 / 4, 4 / 3],
        "flip": True,
        "seed": 0,
        "posterior": "sample",
        "vae": "pooling",
        "vae_revision": None,
        "vae_sha256": "0" * 64,
        "vae_precision": "float32",
        "scaling_factor": 0.5,
        "versions": {
            "python": json.loads((export / "train_meta.json").read_text())["versions"]["python"],
            "torch": torch.__version__,
            **{name: version(name) for name in ("diffusers", "numpy", "pillow")},
        },
        "shape": [33, 4, 4, 4],
        "dtype": "float16",
        "sha256": hashes,
    }
    check_meta(LatentStore.open(export), vae="pooling", view="augmented", image_size=SIZE)


# However it is written


@pytest.mark.parametrize("view", [CENTER, AUGMENTED], ids=["center", "augmented"])
@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 100}, {"workers": 2}], ids=str)
def test_batches_and_workers_change_no_byte(root, tmp_path, view, how):
    vae = PoolingVAE(spread=0.1)
    got = encode(root, tmp_path / "a", vae, **view, **how)
    assert max(vae.batches) <= how.get("batch_size", 6)
    assert contents(got) == contents(encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **view))


class Meeting:
    """To threads what `Ranks.highest` is to processes."""

    def __init__(self, world_size):
        self.numbers: list[int] = []
        self.barrier = threading.Barrier(world_size, self.all_are_here, timeout=60)

    def all_are_here(self):
        self.highest, self.numbers = max(self.numbers), []

    def __call__(self, number):
        self.numbers.append(number)
        self.barrier.wait()
        return self.highest


def encode_in_threads(root, folder, world_size, vae=None, of_rank=lambda rank: {}, **settings):
    """Ranks as threads: they share nothing but the folder and the barrier."""
    meet = Meeting(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [
            pool.submit(
                encode,
                root,
                folder,
                rank=rank,
                world_size=world_size,
                meet=meet,
                **{"vae": vae or PoolingVAE(spread=0.1), **settings, **of_rank(rank)},
            )
            for rank in range(world_size)
        ]
    return ranks


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_change_no_byte(root, tmp_path, world_size):
    ranks = encode_in_threads(root, tmp_path / "a", world_size, **AUGMENTED, batch_size=3)
    exports = {rank.result() for rank in ranks}
    assert len(exports) == 1
    expected = encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **AUGMENTED)
    assert contents(exports.pop()) == contents(expected)


@pytest.fixture
def kills(tmp_path, monkeypatch):
    """Copies of tmp_path/run after each of its writes and renames: what a kill at that moment would leave."""
    folders = []

    def copy_after(call):
        def call_and_copy(*arguments):
            call(*arguments)
            if (tmp_path / "run").exists():
                folders.append(shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(folders)}"))

        return call_and_copy

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", copy_after(os.replace))
        patched.setattr(RowFile, "write", copy_after(RowFile.write))
        yield lambda: patched.undo() or folders


def test_a_run_killed_after_any_write_goes_on_with_the_blocks_that_are_missing(root, tmp_path, kills):
    expected = contents(encode(root, tmp_path / "run", PoolingVAE(spread=0.1), **AUGMENTED))
    passes = []
    for folder in kills():
        vae = PoolingVAE(spread=0.1)
        assert contents(encode(root, folder, vae, **AUGMENTED)) == expected
        passes.append(len(vae.batches))
    # labels and marks; then latents and marks of each of six blocks; then the meta file
    assert passes == [6, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_a_killed_run_goes_on_with_other_batches_and_ranks(root, tmp_path):
    vae = PoolingVAE(spread=0.1)
    vae.before_pass = lambda: shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(vae.batches)}")
    expected = contents(encode(root, tmp_path / "run", vae, **AUGMENTED))
    ranks = encode_in_threads(root, tmp_path / "killed-3", 2, **AUGMENTED, batch_size=9)
    assert all(contents(rank.result()) == expected for rank in ranks)


def test_what_is_left_of_a_killed_run_is_shared_evenly(root, tmp_path):
    """Of eleven blocks five are left, those of the second of two processes."""
    whole = encode(root, tmp_path / "run", PoolingVAE(spread=0.1), **AUGMENTED)
    expected = contents(whole)
    (whole / "train_meta.json").unlink()
    np.save(whole / "images_done.npy", np.array([1, 0] * 5 + [1], np.uint8))
    vaes = [PoolingVAE(spread=0.1) for _ in range(2)]
    ranks = encode_in_threads(
        root, tmp_path / "run", 2, of_rank=lambda rank: {"vae": vaes[rank]}, **AUGMENTED, batch_size=3
    )
    assert all(contents(rank.result()) == expected for rank in ranks)
    assert sorted(len(vae.batches) for vae in vaes) == [2, 3]


def test_a_finished_run_is_not_run_again(root, tmp_path):
    export = encode(root, tmp_path, **CENTER)
    expected = contents(export)
    np.save(
        export / "images_done.npy", np.ones(11, np.uint8)
    )  # as a kill between the last two steps leaves it
    vae = PoolingVAE()
    assert contents(encode(root, tmp_path, vae, **CENTER)) == expected and not vae.batches
    shutil.move(export, tmp_path / "published")
    assert contents(encode(root, tmp_path, vae, **CENTER)) == expected and vae.batches


# Images that do not decode

SKIP = {"on_bad_image": "skip"}


@pytest.mark.parametrize("view", [CENTER, AUGMENTED], ids=["center", "augmented"])
@pytest.mark.parametrize("how", [{}, {"batch_size": 100}, {"workers": 2}], ids=str)
def test_skipped_images_leave_no_rows(root, damaged_root, tmp_path, view, how, capsys):
    how = view | how
    got = LatentStore.open(encode(damaged_root, tmp_path / "a", PoolingVAE(spread=0.1), **how, **SKIP))
    every = LatentStore.open(encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **how))
    rows = len(every) // 11
    # Samples keep their noise and crops, which follow the number of the image among all
    decode = np.repeat(np.array([1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool), rows)
    assert np.array_equal(got.latents, every.latents[decode])
    assert np.array_equal(got.labels, every.labels[decode]) and len(got) == 8 * rows
    skipped = {"count": 3, "names": ["ant/1.jpeg", "bee/0.png", "bee/5.png"]}
    assert got.meta["skipped_images"] == skipped and got.meta["images"] == 11
    assert got.per_image == rows
    assert "left out 3 of 11 images" in capsys.readouterr().out
    expected = tmp_path / "expected.npy"
    np.save(expected, every.latents[decode])
    assert (got.folder / "train_latents.npy").read_bytes() == expected.read_bytes()


def test_with_nothing_to_skip_the_files_are_those_of_error(root, tmp_path):
    skipping = contents(encode(root, tmp_path / "a", **CENTER, **SKIP))
    assert skipping == contents(encode(root, tmp_path / "b", **CENTER))


def test_skipping_goes_on_after_a_kill_at_any_moment(damaged_root, tmp_path, kills):
    result = encode(damaged_root, tmp_path / "run", PoolingVAE(spread=0.1), **AUGMENTED, **SKIP)
    expected, whole = contents(result), []
    for folder in kills():
        vae = PoolingVAE(spread=0.1)
        whole.append((folder / result.name / "train_meta.json").exists())
        got = encode(damaged_root, folder, vae, **AUGMENTED, **SKIP)
        assert contents(got) == expected
        assert [path.name for path in folder.iterdir() if path.is_dir()] == [got.name]
        assert bool(vae.batches) != whole[-1]
    assert sum(whole) == 1  # the meta file comes last


def test_ranks_skip_alike(damaged_root, tmp_path):
    ranks = encode_in_threads(damaged_root, tmp_path / "a", 3, **AUGMENTED, **SKIP)
    (export,) = {rank.result() for rank in ranks}
    alone = encode(damaged_root, tmp_path / "b", PoolingVAE(spread=0.1), **AUGMENTED, **SKIP)
    assert contents(export) == contents(alone)


def test_after_an_error_skipping_keeps_what_is_done(damaged_root, tmp_path):
    with pytest.raises(UserError, match=r"keep what is done and leave them out \(encode.on_bad_image: skip"):
        encode(damaged_root, tmp_path / "a", **CENTER, batch_size=2)
    vae = PoolingVAE()
    skipping = encode(damaged_root, tmp_path / "a", vae, **CENTER, **SKIP, batch_size=2)
    assert vae.batches == [2, 2, 2]  # once more for each damaged image, which may have been repaired
    assert contents(skipping) == contents(encode(damaged_root, tmp_path / "b", **CENTER, **SKIP))
    with pytest.raises(UserError, match="3 of 11 images do not decode"):
        encode(damaged_root, tmp_path / "a", **CENTER)
    assert not skipping.exists()


def test_a_class_is_not_skipped_as_a_whole(root, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    for path in (copy / "train" / "bee").iterdir():
        path.write_bytes(b"")
    told = complaint(lambda: encode(copy, tmp_path / "work", **CENTER, **SKIP))
    assert told.startswith("1 of 2 classes have no image that decodes: bee; ")
    for path in (copy / "train" / "ant").iterdir():
        path.write_bytes(b"")
    told = complaint(lambda: encode(copy, tmp_path / "none", **CENTER, **SKIP))
    assert told.startswith("2 of 2 classes have no image that decodes: ant, bee; ")


def test_a_disk_without_room_for_the_copy_is_told(damaged_root, tmp_path, monkeypatch):
    vae = PoolingVAE()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        vae.before_pass = lambda: patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        told = complaint(lambda: encode(damaged_root, tmp_path / "a", vae, **CENTER, **SKIP))
    assert "the latents need" in told and vae.batches
    got = encode(damaged_root, tmp_path / "a", **CENTER, **SKIP)
    assert contents(got) == contents(encode(damaged_root, tmp_path / "b", **CENTER, **SKIP))


def test_images_that_do_not_decode_are_told_together_in_one_line(damaged_root, tmp_path):
    with pytest.raises(UserError) as error:
        encode(damaged_root, tmp_path, **CENTER, batch_size=2)
    message = str(error.value)
    assert "\n" not in message and message.startswith("3 of 11 images do not decode: ")
    for name in ("ant/1.jpeg (image file is truncated", "bee/0.png (of no known image format", "bee/5.png ("):
        assert name in message
    assert not (tmp_path / "latents" / "train_meta.json").exists()


def test_repaired_images_let_the_run_finish(root, damaged_root, tmp_path):
    with pytest.raises(UserError):
        encode(damaged_root, tmp_path / "a", **CENTER)
    whole = tmp_path / "damaged" / "train"
    for name in ("bee/0.png", "bee/5.png"):
        shutil.copy(root / "train" / name, whole / name)
    with pytest.raises(UserError, match=r"^1 of 11 images do not decode: .*ant/1.jpeg"):
        encode(damaged_root, tmp_path / "a", **CENTER)
    (whole / "ant" / "1.jpeg").unlink()
    shutil.copy(root / "train" / "ant" / "1.png", whole / "ant" / "1.png")
    got = encode(damaged_root, tmp_path / "a", **CENTER)
    assert contents(got) == contents(encode(root, tmp_path / "b", **CENTER))


def test_a_message_names_the_first_few_of_many(root, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    for path in (copy / "train" / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^6 of 11 .*bee/0.*bee/1.*bee/2.* and 3 more; repair") as error:
        encode(copy, tmp_path / "work", **CENTER)
    assert "bee/3" not in str(error.value)


def test_every_rank_raises_for_an_image_of_any(damaged_root, tmp_path):
    ranks = encode_in_threads(damaged_root, tmp_path, 3, **CENTER, batch_size=2)
    assert len({str(rank.exception()) for rank in ranks}) == 1
    assert all(isinstance(rank.exception(), UserError) for rank in ranks)


def test_an_error_number_of_a_decoder_is_not_one_of_the_disk(root, tmp_path, monkeypatch):
    decode = Image.open

    def refuse(file):  # as decoders do that are sent by damaged bytes to a place before the file
        if file.getvalue() == (root / "train" / "bee" / "2.png").read_bytes():
            raise OSError(errno.EINVAL, "Invalid argument")
        return decode(file)

    monkeypatch.setattr(Image, "open", refuse)
    told = complaint(lambda: encode(root, tmp_path, **CENTER))
    assert told.startswith("1 of 11 images do not decode") and "bee/2.png" in told


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_memory_does_not_hold_is_named_and_not_left_out(root, tmp_path, monkeypatch, workers):
    decode = Image.open

    def refuse(file):
        if file.getvalue() == (root / "train" / "bee" / "2.png").read_bytes():
            raise MemoryError
        return decode(file)

    monkeypatch.setattr(Image, "open", refuse)
    told = complaint(lambda: encode(root, tmp_path, **CENTER, **SKIP, workers=workers))
    assert told.startswith(f"{root}/train/bee/2.png: no memory to decode it; lower hardware.workers")
    assert encoding._UNDECODABLE not in np.load(tmp_path / "latents" / "images_done.npy")


def test_files_passed_over_are_told_before_the_work(root, tmp_path, capsys):
    copy = tmp_path / "images"
    shutil.copytree(root, copy)
    for name in ("ant/1.gif", "bee/2.gif", "bee/3.gif"):
        (copy / "train" / name).touch()
    vae = PoolingVAE()
    vae.before_pass = lambda: told.append(capsys.readouterr().out)
    told = []
    encode(copy, tmp_path / "a", vae, **CENTER)
    assert f"{copy}/train: 3 other files passed over: 3 .gif; images end in" in told[0]
    assert "passed over" not in "".join(told[1:]) + capsys.readouterr().out


# What goes wrong


def vanish(root, copy, after):
    """A copy of the images, and a VAE that takes it away in the pass after so many."""
    shutil.copytree(root, copy)
    vae = PoolingVAE(spread=0.1)
    vae.before_pass = lambda: len(vae.batches) == after and copy.rename(copy.with_name("gone"))
    return vae


@pytest.mark.parametrize("how", [{}, {"workers": 2}, SKIP], ids=str)
def test_a_folder_that_vanishes_is_no_heap_of_damaged_images(root, tmp_path, how):
    copy = tmp_path / "images"
    vae = vanish(root, copy, after=1)
    told = complaint(lambda: encode(copy, tmp_path / "a", vae, **AUGMENTED, **how, batch_size=3))
    assert str(copy / "train") in told and "cannot be read (No such file or directory)" in told
    assert told.endswith("run again once it can be, what is done is kept")
    marks = np.load(tmp_path / "a" / "latents" / "images_done.npy")
    assert set(marks) == {encoding._TO_DO, encoding._DONE}

    copy.with_name("gone").rename(copy)
    vae = PoolingVAE(spread=0.1)
    got = encode(copy, tmp_path / "a", vae, **AUGMENTED, **how, batch_size=3)
    assert len(vae.batches) == np.count_nonzero(marks == encoding._TO_DO)
    assert contents(got) == contents(encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **AUGMENTED))


def test_a_name_that_is_no_utf8_can_be_told_to_the_other_ranks(root, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(root, copy)
    (copy / "train" / "bee").rename(copy / "train" / "b\udcff")
    vae = PoolingVAE(spread=0.1)
    vae.before_pass = lambda: len(vae.batches) == 6 and (copy / "train").rename(copy / "gone")
    told = complaint(lambda: encode(copy, tmp_path / "a", vae, **AUGMENTED, batch_size=3))
    assert "cannot be read" in told and (tmp_path / "a" / "stopping").exists()


def test_every_rank_tells_the_same_of_a_folder_that_vanishes(root, tmp_path):
    vae = vanish(root, tmp_path / "images", after=0)
    once = threading.Lock()
    take_away = vae.before_pass
    vae.before_pass = lambda: once.acquire(blocking=False) and take_away()
    ranks = encode_in_threads(tmp_path / "images", tmp_path / "a", 3, vae, **AUGMENTED, batch_size=3)
    assert all(isinstance(rank.exception(), UserError) for rank in ranks)
    assert len({str(rank.exception()) for rank in ranks}) == 1


def test_a_full_disk_is_told_as_such_while_the_network_goes_on(root, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    vae = PoolingVAE(spread=0.1)
    with monkeypatch.context() as patched:
        vae.before_pass = lambda: len(vae.batches) == 1 and patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError) as error:
            encode(root, tmp_path / "a", vae, **AUGMENTED, batch_size=3)
    assert error.value.errno == errno.ENOSPC
    assert Path(error.value.filename).parent == tmp_path / "a" / "latents"
    assert len(vae.batches) <= 5  # of 11; at most so many blocks are ahead of the disk
    got = encode(root, tmp_path / "a", PoolingVAE(spread=0.1), **AUGMENTED)
    assert contents(got) == contents(encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **AUGMENTED))


def test_disk_and_network_work_at_the_same_time(root, tmp_path, monkeypatch):
    """The rows of the first block are only written once the network is at the second."""
    second_pass, write = threading.Event(), RowFile.write
    vae = PoolingVAE(spread=0.1)
    vae.before_pass = lambda: len(vae.batches) == 1 and second_pass.set()

    def write_later(*arguments):
        assert second_pass.wait(10)
        write(*arguments)

    monkeypatch.setattr(RowFile, "write", write_later)
    encode(root, tmp_path, vae, **AUGMENTED)


@pytest.fixture
def deadly(monkeypatch, tmp_path):
    """Makes image 5 kill the process that decodes it by a signal, until the test calls `undo`."""
    load = FolderImages.load

    def kill_by(number):
        def die(self, index):
            if index == 5:
                (tmp_path / "died").touch()
                os.kill(os.getpid(), number)
            return load(self, index)

        monkeypatch.setattr(FolderImages, "load", die)
        return monkeypatch

    return kill_by


def test_a_helper_that_is_killed_is_told_with_a_way_out(root, tmp_path, deadly):
    deadly(signal.SIGKILL)
    told = complaint(lambda: encode(root, tmp_path / "a", **CENTER, workers=2, batch_size=2))
    assert "a process that decodes images is gone" in told and "hardware.workers" in told
    assert f", reading {root}/train/bee/0.png; " in told  # image 5
    deadly(signal.SIGKILL).undo()
    got = encode(root, tmp_path / "a", **CENTER)
    assert contents(got) == contents(encode(root, tmp_path / "b", **CENTER))


# Signals


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_run_after_the_block(root, tmp_path, workers):
    vae = PoolingVAE(spread=0.1)
    with pytest.raises(
        Stopped, match=r"^encode augmented: SIGINT after 3 of 11 images; run it again"
    ) as stopped:
        asked = {"asked_to_stop": lambda: signal.SIGINT * (len(vae.batches) == 3)}
        encode(root, tmp_path / "a", vae, **AUGMENTED, **asked, workers=workers, batch_size=3)
    assert stopped.value.code == 130
    vae = PoolingVAE(spread=0.1)
    got = encode(root, tmp_path / "a", vae, **AUGMENTED, batch_size=3)
    assert len(vae.batches) == 8
    assert contents(got) == contents(encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **AUGMENTED))


def test_a_signal_to_helpers_as_well_is_no_loss(root, tmp_path, deadly):
    deadly(signal.SIGTERM)
    asked = {"asked_to_stop": lambda: signal.SIGTERM * (tmp_path / "died").exists()}
    with pytest.raises(Stopped, match=r"SIGTERM after [0-5] of 11"):
        encode(root, tmp_path, **AUGMENTED, **asked, workers=1, batch_size=3)


def test_a_signal_to_one_rank_stops_all_of_them(root, tmp_path):
    def of_rank(rank):
        def asked_to_stop():
            end = time.monotonic() + 30
            while rank != 1 and not (tmp_path / "a" / "stopping").exists():
                assert time.monotonic() < end, "waited in vain"
                time.sleep(0.01)
            return signal.SIGTERM if rank == 1 else 0

        return {"asked_to_stop": asked_to_stop}

    vae = PoolingVAE(spread=0.1)
    ranks = encode_in_threads(root, tmp_path / "a", 3, vae, of_rank, **AUGMENTED, batch_size=3)
    stopped = [rank.exception() for rank in ranks]
    assert all(isinstance(error, Stopped) and error.code == 143 for error in stopped)
    assert [str(error)[:40] for error in stopped] == ["encode augmented: SIGTERM after 3 of 11 ", "", ""]
    got = encode(root, tmp_path / "a", PoolingVAE(spread=0.1), **AUGMENTED)
    assert contents(got) == contents(encode(root, tmp_path / "b", PoolingVAE(spread=0.1), **AUGMENTED))


# Progress


def test_the_log_counts_the_images_of_all_ranks(root, tmp_path):
    for rank in encode_in_threads(root, tmp_path, 2, **AUGMENTED, batch_size=3):
        rank.result()
    lines = [json.loads(line) for line in (tmp_path / "logs.jsonl").read_text().splitlines()]
    assert {(line["steps"], line["unit"]) for line in lines} == {(11, "img")}
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 11


# What goes wrong otherwise


def test_latents_beyond_float16_name_the_image(root, tmp_path):
    class OneLarge(PoolingVAE):
        def moments(self, images):
            mean, std = super().moments(images)
            if len(self.batches) == 2:  # images 3, 4, 5, each with its mirror
                mean[3, 0, 1, 1] = 2e5
            return mean, std

    with pytest.raises(FloatingPointError, match=r"ant/4.png: its latents are not finite in float16"):
        encode(root, tmp_path, OneLarge(), **CENTER)
    with pytest.raises(FloatingPointError, match=r"ant/0.png"):
        encode(root, tmp_path / "nan", PoolingVAE(shift=float("nan")), **CENTER)


@pytest.fixture
def partly_white(tmp_path):
    """Nine images, two of which hold a white pixel."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / f"images/train/{name}").mkdir(parents=True)
    for i in range(9):
        pixels = rng.integers(5, 250, (SIZE, SIZE, 3), np.uint8)
        if i in (1, 8):
            pixels[3, 5] = 255
        Image.fromarray(pixels).save(tmp_path / f"images/train/{'a' if i < 5 else 'b'}/{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_what_overflows_in_bfloat16_is_encoded_in_float32(partly_white, tmp_path, capsys, posterior):
    def latents(name, precision):
        vae = VAE(Overflowing(), name, precision=precision)
        export = encode(
            partly_white, tmp_path / name, vae, view="center", mirror=False, posterior=posterior, batch_size=3
        )
        store = LatentStore.open(export)
        assert store.meta["vae_precision"] == precision
        return vae, store.latents

    _, expected = latents("float32", "float32")
    assert "float32" not in capsys.readouterr().out
    vae, found = latents("bfloat16", "bfloat16")
    assert capsys.readouterr().out.count("computed again in float32") == 1
    assert vae.recomputed == 2  # of three blocks, of which the rest does not overflow
    same = [np.array_equal(a, b) for a, b in zip(found, expected, strict=True)]
    assert same == [i in (1, 8) for i in range(9)]  # neighbours in a block keep what bfloat16 gave them
    np.testing.assert_allclose(found, expected, atol=0.01)
    vae.tell_recomputed()
    assert "2 batches" in capsys.readouterr().out


def test_what_is_not_finite_in_float32_either_is_an_error(partly_white, tmp_path):
    broken = Overflowing()
    broken.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"a/0.png: its latents are not finite"):
        encode(partly_white, tmp_path / "out", VAE(broken, "broken", precision="bfloat16"), **CENTER)


def test_a_disk_without_room_is_told_before_the_work(root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    vae = PoolingVAE()
    with pytest.raises(UserError, match=r"the latents need .* GiB, the disk has 0.0 GiB free"):
        encode(root, tmp_path, vae, **CENTER)
    assert not vae.batches
