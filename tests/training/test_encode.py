"""Encoding: the right rows of the right image, whatever kills, stops or damages it on the way."""

import errno
import io
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from drift.autoencoders.pixels import Pixels
from drift.data.datasets import FolderImages, open_images
from drift.data.latents import LatentStore, file_hashes
from drift.data.views import Augmented, Center, augmented_view, center_view
from drift.runtime.errors import Stopped
from drift.runtime.files import RowFile
from drift.runtime.processes import Ranks
from drift.runtime.seeds import numpy_generator
from drift.training import encode as module
from drift.training.encode import EncodeOptions, encode_view

SIZE = 16
CROPS = Augmented(crops=3, crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True)
CENTER = EncodeOptions(
    view=Center(mirror=True), image_size=SIZE, posterior="mean", seed=0, on_bad_image="error"
)
AUGMENTED = replace(CENTER, view=CROPS, posterior="sample")
ALONE = Ranks(0, 1, torch.device("cpu"))
SKIP = {"on_bad_image": "skip"}


class PoolingVAE:
    """Means of 4x4 patches for latents: exact in any batch, so that whole files can be compared."""

    id, revision, digest, scaling_factor = "pooling", None, "0" * 64, 0.5
    device, precision, storage_dtype = torch.device("cpu"), "float32", np.dtype(np.float16)

    def __init__(self, before_pass=lambda batches: None, spread: float = 0.1):
        self.before_pass, self.spread = before_pass, spread
        self.batches: list[int] = []

    def latent_shape(self, image_size):
        return 4, image_size // 4, image_size // 4

    def encode(self, images, noise=None):
        assert images.dtype == torch.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
        self.before_pass(len(self.batches))
        self.batches.append(len(images))
        planes = F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 4)
        mean = torch.cat([planes, planes[:, :1]], 1)
        return 0.5 * (mean if noise is None else mean + self.spread * noise)


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
def copy(root, tmp_path):
    """Images that a test may change."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


@pytest.fixture
def damaged(copy):
    """A JPEG has lost its end, a PNG is a text, and a PNG's header is cut."""
    jpeg = io.BytesIO()
    Image.open(copy / "train/ant/1.png").save(jpeg, "JPEG")
    (copy / "train/ant/1.jpeg").write_bytes(jpeg.getvalue()[:-60])
    (copy / "train/ant/1.png").unlink()
    (copy / "train/bee/0.png").write_text("no image")
    (copy / "train/bee/5.png").write_bytes((copy / "train/bee/5.png").read_bytes()[:20])
    return copy


def encode(root: Path, folder: Path, options: EncodeOptions, vae=None, ranks=ALONE, **how) -> LatentStore:
    """`how` are changed options, or arguments of `encode_view`."""
    options = replace(options, **{key: how.pop(key) for key in set(how) & set(vars(CENTER))})
    source, how = open_images("folder", str(root), "train", 2), {"batch_size": 6, **how}
    return LatentStore(encode_view(source, vae or PoolingVAE(), folder, options, ranks, **how))


def contents(store: LatentStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


def pooled(view: np.ndarray) -> np.ndarray:
    """What PoolingVAE makes of one picture, in NumPy."""
    planes = view.astype(np.float64).reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    return 0.5 * (planes[[0, 1, 2, 0]] / 127.5 - 1)


def marks(folder: Path) -> np.ndarray:
    return np.load(folder / "images_done.npy")


# What is written


def test_center_rows_are_each_image_and_its_mirror(root, tmp_path):
    store = encode(root, tmp_path, CENTER)
    source = open_images("folder", str(root), "train", 2)
    assert store.shape == (22, 4, 4, 4) and store.labels.tolist() == [0] * 10 + [1] * 12
    for i in range(len(source)):
        expected = pooled(center_view(source.load(i), SIZE))
        assert np.abs(store.latents[2 * i] - expected).max() < 1e-3
        assert np.abs(store.latents[2 * i + 1] - expected[:, :, ::-1]).max() < 1e-3
    alone = encode(root, tmp_path / "alone", CENTER, view=Center(mirror=False))
    assert np.array_equal(alone.latents, store.latents[::2])


def test_augmented_rows_are_crops_that_depend_on_seed_image_and_crop_alone(root, tmp_path):
    store = encode(root, tmp_path / "a", AUGMENTED, posterior="mean")
    source = open_images("folder", str(root), "train", 2)
    assert store.shape == (33, 4, 4, 4) and store.labels.tolist() == [0] * 15 + [1] * 18
    for i, crop in ((0, 0), (4, 2), (10, 1)):
        rng = numpy_generator(0, "encode/crop", i, crop)
        view = augmented_view(source.load(i), SIZE, (0.2, 1.0), (3 / 4, 4 / 3), True, rng)
        assert np.abs(store.latents[3 * i + crop] - pooled(view)).max() < 1e-3
    assert len({row.tobytes() for row in store.latents}) == 33
    fewer = encode(root, tmp_path / "b", AUGMENTED, posterior="mean", view=replace(CROPS, crops=2))
    assert np.array_equal(fewer.latents, store.latents[np.arange(33).reshape(11, 3)[:, :2].ravel()])
    other = encode(root, tmp_path / "c", AUGMENTED, posterior="mean", seed=1)
    assert not (other.latents[:] == store.latents).all((1, 2, 3)).any()


@pytest.mark.parametrize("view", [Center(mirror=True), CROPS], ids=["center", "augmented"])
def test_pixels_are_the_views_themselves(root, tmp_path, view):
    store = encode(root, tmp_path, CENTER, Pixels(), view=view)
    source = open_images("folder", str(root), "train", 2)
    assert store.dtype == np.uint8 and store.shape == (11 * view.per_image, 3, SIZE, SIZE)
    assert (store.meta["vae"], store.meta["dtype"], store.meta["scaling_factor"]) == ("pixels", "uint8", 1.0)
    for i in range(len(source)):
        if view is CROPS:
            rngs = [numpy_generator(0, "encode/crop", i, crop) for crop in range(3)]
            cuts = (CROPS.crop_scale, CROPS.crop_ratio, CROPS.flip)
            expected = [augmented_view(source.load(i), SIZE, *cuts, rng) for rng in rngs]
        else:
            centre = center_view(source.load(i), SIZE)
            expected = [centre, np.fliplr(centre)]
        rows = store.latents[i * view.per_image : (i + 1) * view.per_image]
        assert np.array_equal(rows, np.stack(expected).transpose(0, 3, 1, 2))


def test_a_sample_is_mean_plus_std_times_noise_of_its_own(root, tmp_path):
    mean = encode(root, tmp_path / "mean", CENTER).latents[:].astype(np.float64)
    sample = encode(root, tmp_path / "sample", CENTER, PoolingVAE(spread=3.0), posterior="sample")
    noise = (sample.latents - mean) / (0.5 * 3.0)  # [22, 4, 4, 4]
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    correlation = np.corrcoef(noise.reshape(22, -1)) - np.eye(22)
    assert np.abs(correlation).max() < 0.6  # 64 numbers a row: 0.125 is one standard deviation


def test_the_meta_file_describes_the_latents(root, tmp_path):
    store = encode(root, tmp_path, AUGMENTED)
    assert sorted(contents(store)) == ["train_labels.npy", "train_latents.npy", "train_meta.json"]
    versions = store.meta.pop("versions")
    assert versions["torch"] == torch.__version__ and versions["numpy"] == version("numpy")
    assert store.meta == {
        "dataset": "folder", "dataset_split": "train", "images": 11,
        "images_sha256": open_images("folder", str(root), "train", 2).digest,
        "skipped_images": {"count": 0, "names": []},
        "class_names": ["ant", "bee"], "num_classes": 2,
        "view": "augmented", "image_size": SIZE, "posterior": "sample", "seed": 0,
        "crops": 3, "crop_scale": [0.2, 1.0], "crop_ratio": [3 / 4, 4 / 3], "flip": True,
        "vae": "pooling", "vae_revision": None, "vae_sha256": "0" * 64, "vae_precision": "float32",
        "scaling_factor": 0.5,
        "shape": [33, 4, 4, 4], "dtype": "float16", "sha256": file_hashes(store.folder),
    }  # fmt: skip


# However it is written


@pytest.mark.parametrize("options", [CENTER, AUGMENTED], ids=["center", "augmented"])
@pytest.mark.parametrize("how", [{"batch_size": 1}, {"batch_size": 100}, {"workers": 2}], ids=str)
def test_batches_and_workers_change_no_byte(root, tmp_path, options, how):
    vae = PoolingVAE()
    got = encode(root, tmp_path / "a", options, vae, **how)
    assert max(vae.batches) <= how.get("batch_size", 6)
    assert contents(got) == contents(encode(root, tmp_path / "b", options))


class Thread(Ranks):
    """A rank that shares with the others nothing but the folder and what is in `control`."""

    def highest(self, numbers):
        barrier, given = self.control
        given[self.rank] = list(numbers)
        barrier.wait()
        highest = [max(several) for several in zip(*given.values(), strict=True)]
        barrier.wait()
        return highest


def encode_in_threads(root, folder, world_size, options, of_rank=lambda rank: {}, **how):
    """One future per rank."""
    control = threading.Barrier(world_size, timeout=30), {}

    def run(rank):
        ranks = Thread(rank, world_size, torch.device("cpu"), control)
        return encode(root, folder, options, **{"ranks": ranks, **how, **of_rank(rank)})

    with ThreadPoolExecutor(world_size) as pool:
        return [pool.submit(run, rank) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 16])
@pytest.mark.parametrize("options", [CENTER, replace(AUGMENTED, **SKIP)], ids=["center", "augmented"])
def test_ranks_change_no_byte(request, root, tmp_path, world_size, options):
    images = request.getfixturevalue("damaged") if options.on_bad_image == "skip" else root
    ranks = encode_in_threads(images, tmp_path / "a", world_size, options, batch_size=3)
    expected = contents(encode(images, tmp_path / "b", options))
    assert all(contents(rank.result()) == expected for rank in ranks)
    lines = [json.loads(line) for line in (tmp_path / "a" / "logs.jsonl").read_text().splitlines()]
    assert {(line["steps"], line["unit"]) for line in lines} == {(11, "img")}
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 11


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
    expected = contents(encode(root, tmp_path / "run", AUGMENTED))
    passes = []
    for folder in kills():
        vae = PoolingVAE()
        assert contents(encode(root, folder, AUGMENTED, vae)) == expected
        passes.append(len(vae.batches))
    # marks; then latents and marks of each of six blocks; then labels and the meta file
    assert passes == [6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0]


def test_skipping_goes_on_after_a_kill_too(damaged, tmp_path, kills):
    expected = contents(encode(damaged, tmp_path / "run", AUGMENTED, **SKIP))
    assert all(contents(encode(damaged, folder, AUGMENTED, **SKIP)) == expected for folder in kills())


def test_a_killed_run_shares_what_is_left_evenly_among_other_ranks_and_batches(root, tmp_path):
    run = tmp_path / "run"
    expected = contents(encode(root, run, AUGMENTED))
    np.save(run / "images_done.npy", np.array([1, 0] * 5 + [1], np.uint8))
    vaes = [PoolingVAE(), PoolingVAE()]
    ranks = encode_in_threads(root, run, 2, AUGMENTED, lambda rank: {"vae": vaes[rank]}, batch_size=3)
    assert all(contents(rank.result()) == expected for rank in ranks)
    assert sorted(len(vae.batches) for vae in vaes) == [2, 3]


def test_a_finished_run_gives_its_latents_again(root, tmp_path):
    store = encode(root, tmp_path, CENTER)
    expected, vae = contents(store), PoolingVAE()
    shutil.move(store.folder, tmp_path / "published")
    assert contents(encode(root, tmp_path, CENTER, vae)) == expected and not vae.batches


def test_the_device_computes_the_next_block_before_one_is_stored(root, tmp_path, monkeypatch):
    vae, write, ahead = PoolingVAE(), RowFile.write, []

    def note(*arguments):
        ahead.append(len(vae.batches))
        write(*arguments)

    monkeypatch.setattr(RowFile, "write", note)
    encode(root, tmp_path, AUGMENTED, vae)
    assert ahead == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6]  # latents and marks of each


# Images that do not decode


@pytest.mark.parametrize("options", [CENTER, AUGMENTED], ids=["center", "augmented"])
@pytest.mark.parametrize("how", [{}, {"batch_size": 100}, {"workers": 2}], ids=str)
def test_skipped_images_leave_no_rows(root, damaged, tmp_path, options, how, capsys):
    got = encode(damaged, tmp_path / "a", options, **how, **SKIP)
    every = encode(root, tmp_path / "b", options, **how)
    rows = len(every) // 11
    # Samples keep their noise and crops, which follow the number of the image among all
    decode = np.repeat(np.array([1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool), rows)
    expected = tmp_path / "expected.npy"
    np.save(expected, every.latents[decode])
    assert (got.folder / "train_latents.npy").read_bytes() == expected.read_bytes()
    assert np.array_equal(got.labels, every.labels[decode]) and len(got) == 8 * rows
    skipped = {"count": 3, "names": ["ant/1.jpeg", "bee/0.png", "bee/5.png"]}
    assert got.meta["skipped_images"] == skipped and got.meta["images"] == 11 and got.per_image == rows
    assert "left out 3 of 11 images" in capsys.readouterr().out


def test_images_that_do_not_decode_are_named_at_the_end_and_nothing_is_encoded_twice(root, damaged, tmp_path):
    run = tmp_path / "run"
    message = complaint(lambda: encode(damaged, run, CENTER, batch_size=2))
    assert message.startswith("3 of 11 images do not decode: ") and "encode.on_bad_image: skip" in message
    for name in ("ant/1.jpeg (image file is truncated", "bee/0.png (of no known image format", "bee/5.png ("):
        assert name in message
    vae = PoolingVAE()
    skipping = encode(damaged, run, CENTER, vae, **SKIP, batch_size=2)
    assert not vae.batches
    assert contents(skipping) == contents(encode(damaged, tmp_path / "b", CENTER, **SKIP))
    assert complaint(lambda: encode(damaged, run, CENTER)) == message
    for name in ("bee/0.png", "bee/5.png", "ant/1.png"):
        shutil.copy(root / "train" / name, damaged / "train" / name)
    (damaged / "train/ant/1.jpeg").unlink()
    assert contents(encode(damaged, run, CENTER)) == contents(encode(root, tmp_path / "c", CENTER))


def test_a_class_is_not_skipped_as_a_whole(copy, tmp_path):
    for path in (copy / "train" / "bee").iterdir():
        path.write_bytes(b"")
    message = complaint(lambda: encode(copy, tmp_path / "a", CENTER))
    assert message.startswith("6 of 11 ") and "bee/2" in message and "and 3 more; repair" in message
    message = complaint(lambda: encode(copy, tmp_path / "a", CENTER, **SKIP))
    assert message.startswith("1 of 2 classes have no image that decodes: bee; ")


@pytest.mark.parametrize(
    ("error", "workers", "message"),
    [
        # As decoders do that are sent by damaged bytes to a place before the file
        (OSError(errno.EINVAL, "Invalid argument"), 0, "1 of 11 images do not decode: {path}"),
        (MemoryError(), 0, "{path}: no memory to decode it; lower hardware.workers"),
        (MemoryError(), 2, "{path}: no memory to decode it; lower hardware.workers"),
    ],
)
def test_an_error_of_a_decoder_is_damage_and_want_of_memory_is_not(
    root, tmp_path, monkeypatch, error, workers, message
):
    decode, path = Image.open, root / "train/bee/2.png"

    def refuse(file):
        if file.getvalue() == path.read_bytes():
            raise error
        return decode(file)

    monkeypatch.setattr(Image, "open", refuse)
    given = complaint(lambda: encode(root, tmp_path, CENTER, workers=workers))
    assert given.startswith(message.format(path=path))
    assert (module._UNDECODABLE in marks(tmp_path)) == isinstance(error, OSError)


def test_files_passed_over_are_counted_before_the_work(copy, tmp_path, capsys):
    for name in ("ant/1.gif", "bee/2.gif", "bee/3.gif"):
        (copy / "train" / name).touch()
    said = []
    vae = PoolingVAE(lambda batches: said.append(capsys.readouterr().out))
    encode(copy, tmp_path / "a", CENTER, vae)
    assert f"{copy}/train: 3 other files passed over: 3 .gif; images end in" in said[0]
    assert "passed over" not in "".join(said[1:]) + capsys.readouterr().out


# What goes wrong


@pytest.mark.parametrize("how", [{}, {"workers": 2}, SKIP], ids=str)
def test_a_folder_that_vanishes_is_no_heap_of_damaged_images(root, copy, tmp_path, how):
    (copy / "train/bee").rename(copy / "train/b\udcff")  # a name that is no UTF-8
    gone, run = tmp_path / "gone", tmp_path / "run"
    vae = PoolingVAE(lambda batches: batches == 1 and copy.rename(gone))
    message = complaint(lambda: encode(copy, run, AUGMENTED, vae, **how, batch_size=3))
    assert str(copy / "train") in message and "cannot be read (No such file or directory)" in message
    assert message.endswith("run again once it can be, what is done is kept")
    left = marks(run)
    assert set(left) <= {module._TO_DO, module._DONE}

    gone.rename(copy)
    vae = PoolingVAE()
    got = encode(copy, run, AUGMENTED, vae, **how, batch_size=3)
    assert len(vae.batches) == np.count_nonzero(left == module._TO_DO)
    assert np.array_equal(got.latents, encode(root, tmp_path / "b", AUGMENTED).latents)


def test_a_full_disk_is_named(root, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        vae = PoolingVAE(lambda batches: batches == 2 and patched.setattr(os, "fsync", refuse))
        with pytest.raises(OSError) as error:
            encode(root, tmp_path / "a", AUGMENTED, vae, batch_size=3)
    assert error.value.errno == errno.ENOSPC
    assert Path(error.value.filename).parent == tmp_path / "a" / "latents"
    got = encode(root, tmp_path / "a", AUGMENTED)
    assert contents(got) == contents(encode(root, tmp_path / "b", AUGMENTED))


def test_a_disk_without_room_is_named_before_the_work_or_the_copy(damaged, tmp_path, monkeypatch):
    usage, free = shutil.disk_usage(tmp_path), [100]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    vae = PoolingVAE(lambda batches: free.__setitem__(0, 100))
    message = complaint(lambda: encode(damaged, tmp_path, CENTER, vae, **SKIP))
    assert "the latents need" in message and "the disk has 0.0 GiB free" in message and not vae.batches
    free[0] = usage.free
    assert "the latents need" in complaint(lambda: encode(damaged, tmp_path, CENTER, vae, **SKIP))
    assert vae.batches


def kill_at_image_5(monkeypatch, number, died):
    """Lets image 5 kill the process that decodes it; `died` exists from then on."""
    load = FolderImages.load

    def die(self, index):
        if index == 5:
            died.touch()
            os.kill(os.getpid(), number)
        return load(self, index)

    monkeypatch.setattr(FolderImages, "load", die)


def test_a_worker_that_is_killed_is_reported_with_its_image(root, tmp_path, monkeypatch):
    kill_at_image_5(monkeypatch, signal.SIGKILL, tmp_path / "died")
    message = complaint(lambda: encode(root, tmp_path / "a", CENTER, workers=2, batch_size=2))
    assert "a process that decodes images is gone" in message and "hardware.workers" in message
    assert f"{root}/train/bee/0.png" in message.partition(", reading ")[2]  # image 5
    monkeypatch.undo()
    got = encode(root, tmp_path / "a", CENTER)
    assert contents(got) == contents(encode(root, tmp_path / "b", CENTER))


def test_a_signal_to_workers_as_well_is_no_loss(root, tmp_path, monkeypatch):
    kill_at_image_5(monkeypatch, signal.SIGTERM, tmp_path / "died")
    asked = {"asked_to_stop": lambda: signal.SIGTERM * (tmp_path / "died").exists()}
    with pytest.raises(Stopped, match=r"SIGTERM after [0-5] of 11"):
        encode(root, tmp_path / "a", AUGMENTED, **asked, workers=1, batch_size=3)


def test_a_signal_to_one_rank_stops_all_after_the_block(root, tmp_path):
    run, vaes = tmp_path / "run", [PoolingVAE() for _ in range(3)]

    def of_rank(rank):
        asked = {"asked_to_stop": lambda: signal.SIGTERM * (rank == 1 and len(vaes[1].batches) == 3)}
        return asked | {"vae": vaes[rank]}

    ranks = encode_in_threads(root, run, 3, AUGMENTED, of_rank, batch_size=3)
    stopped = [rank.exception() for rank in ranks]
    assert all(isinstance(error, Stopped) and error.code == 143 for error in stopped)
    assert [str(error)[:40] for error in stopped] == ["encode augmented: SIGTERM after 6 of 11 ", "", ""]
    vae = PoolingVAE()
    got = encode(root, run, AUGMENTED, vae, batch_size=3)
    assert contents(got) == contents(encode(root, tmp_path / "b", AUGMENTED)) and len(vae.batches) == 5


# Latents beyond a number format


def test_latents_beyond_float16_name_the_image(root, tmp_path):
    class OneLarge(PoolingVAE):
        def encode(self, images, noise=None):
            latents = super().encode(images, noise)
            if len(self.batches) == 2:  # images 3, 4, 5, each with its mirror
                latents[3, 0, 1, 1] = 2e5
            return latents

    with pytest.raises(FloatingPointError, match=r"ant/4.png: its latents are not finite in float16"):
        encode(root, tmp_path, CENTER, OneLarge())


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
def test_what_overflows_in_bfloat16_is_encoded_in_float32(partly_white, tmp_path, posterior):
    def latents(precision):
        vae = VAE(Overflowing(), "test", precision=precision)
        how = {"view": Center(mirror=False), "posterior": posterior, "batch_size": 3}
        store = encode(partly_white, tmp_path / precision, CENTER, vae, **how)
        assert store.meta["vae_precision"] == precision
        return vae, store.latents

    exact, expected = latents("float32")
    vae, found = latents("bfloat16")
    assert (exact.recomputed, vae.recomputed) == (0, 2)  # of three blocks
    same = [np.array_equal(a, b) for a, b in zip(found, expected, strict=True)]
    assert same == [i in (1, 8) for i in range(9)]  # neighbours in a block keep what bfloat16 gave them
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_what_is_not_finite_in_float32_either_is_an_error(partly_white, tmp_path):
    broken = Overflowing()
    broken.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"a/0.png: its latents are not finite"):
        encode(partly_white, tmp_path / "out", CENTER, VAE(broken, "broken", precision="bfloat16"))
