import hashlib
import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from drift import encoding
from drift.data.images import augmented_view, center_view, open_images
from drift.data.latents import LatentStore, check_meta
from drift.encoding import encode_view
from drift.errors import UserError
from drift.models.vae import VAE
from drift.seeds import numpy_generator
from drift.torchvision_shim import ensure_torchvision

SIZE = 16
CENTER = {"view": "center", "mirror": True, "posterior": "mean"}
AUGMENTED = {"view": "augmented", "mirror": False, "posterior": "sample"}


class PoolingVAE:
    """Means of 4x4 patches for latents: exact in any batch, so that whole files can be compared."""

    id, revision, digest, scaling_factor = "pooling", None, "0" * 64, 0.5

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


def encode_in_threads(root, folder, world_size, **settings):
    """Ranks as threads: they share nothing but the folder and the barrier."""
    barrier = threading.Barrier(world_size, timeout=60)
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [
            pool.submit(
                encode,
                root,
                folder,
                PoolingVAE(spread=0.1),
                rank=rank,
                world_size=world_size,
                barrier=barrier.wait,
                **settings,
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


def test_a_run_killed_after_any_write_goes_on_with_the_blocks_that_are_missing(root, tmp_path, monkeypatch):
    """What a kill would leave is what is on the disk after each write: copies of it are resumed."""
    killed = []

    def copy_after(name):
        write = getattr(encoding, name)

        def write_and_copy(path, *arguments):
            write(path, *arguments)
            killed.append(shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(killed)}"))

        monkeypatch.setattr(encoding, name, write_and_copy)

    with monkeypatch.context() as monkeypatch:
        for name in ("_preallocate", "_save", "_write_rows", "write_json"):
            copy_after(name)
        expected = contents(encode(root, tmp_path / "run", PoolingVAE(spread=0.1), **AUGMENTED))
    passes = []
    for folder in killed:
        vae = PoolingVAE(spread=0.1)
        assert contents(encode(root, folder, vae, **AUGMENTED)) == expected
        passes.append(len(vae.batches))
    # latents, labels and marks; then latents and marks of each of six blocks; then the meta file
    assert passes == [6, 6, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_a_killed_run_goes_on_with_other_batches_and_ranks(root, tmp_path):
    vae = PoolingVAE(spread=0.1)
    vae.before_pass = lambda: shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(vae.batches)}")
    expected = contents(encode(root, tmp_path / "run", vae, **AUGMENTED))
    ranks = encode_in_threads(root, tmp_path / "killed-3", 2, **AUGMENTED, batch_size=9)
    assert all(contents(rank.result()) == expected for rank in ranks)


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


# What goes wrong


def test_images_that_do_not_decode_are_told_together_in_one_line(damaged_root, tmp_path):
    vae = PoolingVAE()
    with pytest.raises(UserError) as error:
        encode(damaged_root, tmp_path, vae, **CENTER, batch_size=2)
    message = str(error.value)
    assert "\n" not in message and message.startswith("3 of 11 images do not decode: ")
    for name in ("ant/1.jpeg (image file is truncated", "bee/0.png (cannot identify", "bee/5.png ("):
        assert name in message
    assert not (tmp_path / "latents" / "train_meta.json").exists()
    assert vae.batches == [2]  # the VAE rests once the run cannot succeed


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


def test_a_disk_without_room_is_told_before_the_work(root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    vae = PoolingVAE()
    with pytest.raises(UserError, match=r"the latents need .* GiB, the disk has 0.0 GiB free"):
        encode(root, tmp_path, vae, **CENTER)
    assert not vae.batches
