import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from complaints import complaint
from PIL import Image, ImageFile
from scipy.stats import ks_2samp
from sklearn.datasets import load_digits

from drift.data import images
from drift.runtime.errors import UserError
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.datasets.folder import IMG_EXTENSIONS  # noqa: E402
from torchvision.transforms import RandomResizedCrop  # noqa: E402


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth_image(width: int, height: int) -> Image.Image:
    """Far enough from black and white that no filter overshoots, where PIL clips after each of its passes."""
    few = np.random.default_rng(0).integers(64, 192, (4, 5, 3), np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


# Digits


def test_digits_are_scikit_learns_pixels_in_256_levels():
    source = images.open_images("digits", None, "train", 10)
    digits = load_digits()
    for i in (0, 700, 1436):
        row = int(source.name(i).removeprefix("digits/"))
        picture = np.asarray(source.load(i))
        assert picture.shape == (8, 8, 3) and (picture == picture[..., :1]).all()
        assert np.abs(picture[..., 0] / 255 - digits.images[row] / 16).max() <= 0.5 / 255
        assert source.labels[i] == digits.target[row]
    assert source.labels.dtype == np.int64 and source.class_names == list("0123456789")


def test_digits_splits_are_disjoint_complete_and_stratified():
    train = images.open_images("digits", None, "train", 10)
    held_out = images.open_images("digits", None, "held_out", 10)
    assert (len(train), len(held_out)) == (1437, 360)
    names = [s.name(i) for s in (train, held_out) for i in range(len(s))]
    assert len(set(names)) == 1797
    per_digit = np.bincount(load_digits().target)
    assert np.abs(np.bincount(held_out.labels) - per_digit / 5).max() < 1
    assert train.digest != held_out.digest == images.open_images("digits", None, "held_out", 10).digest


# Folders


@pytest.fixture
def root(tmp_path):
    """Two classes, written out of order; the second has every kind of file."""
    ants, bees = tmp_path / "val" / "ants", tmp_path / "val" / "bees"
    bees.mkdir(parents=True)
    ants.mkdir()
    grey = Image.new("L", (6, 4), 200)
    grey.save(bees / "b_grey.png")
    grey.convert("RGB").quantize(2).save(bees / "c_palette.PNG")
    grey.convert("CMYK").save(bees / "a_cmyk.JPEG")
    Image.fromarray(np.full((4, 6), 200 * 257, np.uint16)).save(bees / "d_grey16.png")
    grey.convert("RGB").save(bees / "e.webp", lossless=True)
    grey.convert("RGBA").save(bees / "f.png")
    grey.convert("RGB").save(bees / "g.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to display"
    grey.save(bees / "h.jpg", exif=exif)
    grey.save(ants / "z.Jpg")
    grey.save(ants / "B.jpeg")
    for other in (bees / "notes.txt", bees / ".hidden.png", tmp_path / "val" / "list.txt"):
        other.write_text("not an image")
    (tmp_path / "val" / ".cache").mkdir()
    return tmp_path


def test_folder_lists_in_the_order_of_names(root):
    source = images.open_images("folder", str(root), "val", 2)
    files = [os.path.relpath(source.name(i), root / "val") for i in range(len(source))]
    bees = ["a_cmyk.JPEG", "b_grey.png", "c_palette.PNG", "d_grey16.png", "e.webp", "f.png", "g.bmp", "h.jpg"]
    assert files == ["ants/B.jpeg", "ants/z.Jpg"] + [f"bees/{name}" for name in bees]
    assert source.class_names == ["ants", "bees"]
    assert source.labels.tolist() == [0, 0] + [1] * 8 and source.labels.dtype == np.int64


def test_folder_has_the_samples_of_torchvisions_image_folder(tmp_path):
    """Files in folders below a class (as Tiny ImageNet has them) or in linked ones, with all its suffixes."""
    names = [
        "ant/1.jpg", "ant/10.jpg", "ant/2.JPG",
        "ant/images/0.png", "ant/images/deep/0.png", "ant/images-b/0.png",
        "ant/notes.txt", "Bee/0.gif", "Bee/0.png", "Bee/\ue000.png", "Bee/\udcff.png", "Bee/\U0001f41d.png",
        "10/0.png", "9/0.png", "9/folder.png/0.png", "caf\u00e9/0.png", "cafe\u0301/0.png",
    ]  # fmt: skip
    names += [f"suffixes/{number}{suffix}" for number, suffix in enumerate(IMG_EXTENSIONS)]
    for name in names:
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).write_bytes(b"x")
    (tmp_path / "val/9/linked").symlink_to(tmp_path / "val/ant/images", target_is_directory=True)
    theirs = ImageFolder(str(tmp_path / "val"))
    ours = images.open_images("folder", str(tmp_path), "val", len(theirs.classes))
    assert ours.class_names == theirs.classes
    found = [(ours.name(i), ours.labels[i]) for i in range(len(ours))]
    assert found == theirs.samples and len(found) == len(names) - 2 + 2
    assert images.ImageFiles(tmp_path / "val")._names == sorted(
        (os.path.relpath(path, tmp_path / "val") for path, _ in theirs.samples), key=os.path.split
    )


def test_files_passed_over_are_counted(root):
    bees = root / "val" / "bees"
    for name in ("x.gif", "y.GIF", "z"):
        (bees / name).touch()
    found = images.open_images("folder", str(root), "val", 2).passed_over
    assert found.startswith(f"{root}/val: 7 other files passed over: ") and "; images end in .jpg, " in found
    for kind in ("2 hidden", "2 .gif", "2 .txt", "1 without a suffix"):
        assert kind in found
    assert images.ImageFiles(bees).passed_over.startswith(f"{bees}: 5 other files passed over: 2 .gif, ")
    for path in bees.iterdir():
        path.rename(path.with_name(f"{path.name}.gif"))
    told = complaint(lambda: images.open_images("folder", str(root), "val", 2))
    assert "bees: a class without images" in told and "12 .gif" in told and ".tiff, .webp" in told


def test_a_link_in_a_circle_is_refused(root):
    (root / "val" / "ants" / "again").symlink_to(root / "val", target_is_directory=True)
    for read in (lambda: images.open_images("folder", str(root), "val", 2), lambda: images.ImageFiles(root)):
        assert "val/ants/again: a link to a folder that it is in" in complaint(read)


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ("0 1 10 2", "00 01 02 10", "label 0 is '00' in val (4 classes), but '0' in train (4 classes)"),
        ("ant bee", "ant wasp", "label 1 is 'wasp' in val (2 classes), but 'bee' in train (2 classes)"),
        ("ant bee cat", "ant bee", "label 2 is no such class in val (2 classes), but 'cat' in train (3"),
        ("ant", "ant bee", "label 1 is 'bee' in val (2 classes), but no such class in train (1"),
        ("caf\u00e9", "cafe\u0301", r"label 0 is 'cafe\u0301' in val (1 classes), but 'caf\xe9' in train"),
        ("ant bee", "bee ant", None),
    ],
)
def test_splits_with_other_class_names_are_refused(tmp_path, train, val, told):
    for split, names in (("train", train), ("val", val)):
        for name in names.split():
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    if told is None:
        images.open_images("folder", str(tmp_path), "val", len(val.split()))
    else:
        message = complaint(lambda: images.open_images("folder", str(tmp_path), "val", len(val.split())))
        assert told in message and str(tmp_path) in message
    images.open_images("folder", str(tmp_path), "train", len(train.split()))


def test_folder_decodes_every_kind_of_file_to_rgb_as_stored(root):
    source = images.open_images("folder", str(root), "val", 2)
    for i in range(len(source)):
        image = source.load(i)
        assert image.mode == "RGB" and image.size == (6, 4), source.name(i)
        assert np.abs(np.asarray(image).astype(int) - 200).max() <= 2, source.name(i)


def save_transparent_palette(picture, path):
    picture.quantize(8).save(path, transparency=bytes([0, 128, 255]))


def save_half_transparent(picture, path):
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(path)


def save_turned(picture, path):
    exif = Image.Exif()
    exif[0x0112] = 8  # "turn by 270 degrees to display"
    picture.save(path, exif=exif, quality=95, subsampling=0)


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        (".jpeg", lambda picture, path: picture.save(path, quality=95, subsampling=0)),
        (".jpeg", lambda picture, path: picture.convert("CMYK").save(path, quality=95, subsampling=0)),
        (".jpeg", save_turned),
        (".png", save_transparent_palette),
        (".png", save_half_transparent),
    ],
    ids=["plain", "cmyk", "turned by exif", "palette with transparency", "alpha"],
)
def test_folder_decodes_colours_as_stored(tmp_path, suffix, save):
    """Four colours in quarters: channels are in order, nothing is turned or blended with a background."""
    pixels = np.empty((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[:8, 12:] = (250, 60, 20), (10, 200, 90)
    pixels[8:, :12], pixels[8:, 12:] = (30, 40, 180), (128, 128, 0)
    (tmp_path / "val" / "a").mkdir(parents=True)
    save(Image.fromarray(pixels), tmp_path / "val" / "a" / f"0{suffix}")
    decoded = np.asarray(images.open_images("folder", str(tmp_path), "val", 1).load(0)).astype(int)
    assert decoded.shape == pixels.shape
    inside = np.ones((16, 24), bool)
    inside[6:10], inside[:, 10:14] = False, False  # a JPEG rings where colours meet
    assert np.abs(decoded - pixels)[inside].max() <= (12 if suffix == ".jpeg" else 0)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", "<u2"), (".pgm", "<i4"), (".tif", "<u2"), (".tiff", ">u2")]
)
def test_grey_of_16_bits_keeps_its_high_byte(tmp_path, suffix, dtype):
    levels = np.arange(0, 65536, 257)[:, None].repeat(3, 1)
    Image.fromarray(levels.astype(dtype)).save(tmp_path / f"x{suffix}")
    decoded = np.asarray(images.load_rgb(tmp_path / f"x{suffix}"))
    assert (decoded == (levels // 256)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_32_bits_is_not_clipped_but_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 4), 200, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(images.BadImage, match=r"x\.tif: does not decode \(grey of 32 bits"):
        images.load_rgb(tmp_path / "x.tif")


def test_an_image_that_is_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.new("1", (12_000, 9_000)).save(path)
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(images.BadImage, match=r"x\.png: .*12000x9000 pixels, more than 89478485") as told:
            images.load_rgb(path)
    assert "\n" not in str(told.value)
    with path.open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(images.BadImage, match=r"x\.png: does not decode \(1073741824 bytes, more than"):
        images.load_rgb(path)
    path.write_bytes(b"")
    with pytest.raises(images.BadImage, match=r"x\.png: does not decode \(an empty file\); repair or remove"):
        images.load_rgb(path)


def test_want_of_memory_is_no_damage(root, monkeypatch):
    def refuse(file):
        raise MemoryError

    monkeypatch.setattr(Image, "open", refuse)
    source = images.open_images("folder", str(root), "val", 2)
    with pytest.raises(
        UserError, match=r"ants/B\.jpeg: no memory to decode it; lower hardware.workers"
    ) as told:
        source.load(0)
    assert not isinstance(told.value, images.BadImage)


def test_an_image_that_cannot_be_read_is_told_from_one_that_does_not_decode(root, monkeypatch):
    source = images.open_images("folder", str(root), "val", 2)
    (root / "val" / "ants" / "B.jpeg").write_bytes(b"no image")
    told = complaint(lambda: source.load(0))
    assert told.startswith(f"{root}/val/ants/B.jpeg: does not decode (of no known image format); repair")
    (root / "val" / "ants" / "z.Jpg").unlink()
    told = complaint(lambda: source.load(1))
    assert told.startswith(f"{root}/val/ants/z.Jpg: cannot be read (No such file or directory); run again")

    def refuse(path, mode):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", refuse)
    assert "a_cmyk.JPEG: cannot be read (Stale file handle)" in complaint(lambda: source.load(2))


def test_a_name_in_the_split_does_not_tell_the_place(root):
    source = images.open_images("folder", str(root), "val", 2)
    assert [source.name_in_split(i) for i in (0, 9)] == ["ants/B.jpeg", "bees/h.jpg"]
    digits = images.open_images("digits", None, "held_out", 10)
    assert digits.name(3) == f"digits/{digits.name_in_split(3)}"


def test_folder_digest_follows_names_and_sizes_not_the_place(root, tmp_path_factory):
    def digest():
        return images.open_images("folder", str(root), "val", 2).digest

    seen = [digest()]
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    root.rename(moved)
    root = moved
    assert digest() == seen[0]
    (root / "val" / "ants" / "z.Jpg").rename(root / "val" / "ants" / "y.Jpg")
    seen.append(digest())
    with open(root / "val" / "ants" / "y.Jpg", "ab") as file:
        file.write(b"\0")
    seen.append(digest())
    (root / "val" / "ants").rename(root / "val" / "an")
    seen.append(digest())
    assert len(set(seen)) == len(seen)


def empty_class(root):
    (root / "val" / "cats").mkdir()
    (root / "val" / "cats" / "notes.txt").touch()


def dangling_link(root):
    (root / "val" / "bees" / "0.png").symlink_to(root / "gone.png")


def no_class_folders(root):
    (root / "train").mkdir()


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ("folder", "ROOT", "val", 3), r"data.classes = 3, but .*/val has 2 classes"),
        (None, ("folder", "ROOT", "train", 2), r"/train: there is no such folder; data.root has val"),
        (None, ("folder", "ROOT/gone", "val", 2), r"data.root = .*/gone: there is no such folder"),
        (
            None,
            ("folder", "ROOT/val/list.txt", "val", 2),
            r"list.txt/val: cannot be listed \(Not a directory\)",
        ),
        (None, ("folder", None, "val", 2), r"data.root = null"),
        (no_class_folders, ("folder", "ROOT", "train", 2), r"/train: has no class folders"),
        (empty_class, ("folder", "ROOT", "val", 3), r"/cats: a class without images"),
        (dangling_link, ("folder", "ROOT", "val", 2), r"bees/0.png: cannot be read \(No such file"),
        (None, ("digits", None, "val", 10), r"digits has no split val: it has train and held_out"),
        (None, ("digits", None, "train", 7), r"data.classes = 7, but digits/train has 10 classes"),
        (None, ("cifar", None, "train", 10), r"data.dataset = cifar: allowed: digits, folder"),
    ],
)
def test_mistakes_are_one_line(root, prepare, arguments, message):
    if prepare:
        prepare(root)
    arguments = [a.replace("ROOT", str(root)) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(UserError, match=message) as error:
        images.open_images(*arguments)
    assert "\n" not in str(error.value)


def test_unreadable_class_folder_is_named(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # by hand, because root may read everything
        if os.fsencode(path).endswith(b"bees"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"val/bees: cannot be read \(Permission denied\)"):
        images.open_images("folder", str(root), "val", 2)


# Views


def bicubic(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """torch's antialiased bicubic, in float, of `[H, W, 3]`; PIL computes the same in 8 bits."""
    planes = F.interpolate(pixels.permute(2, 0, 1)[None], (height, width), mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0).clamp(0, 255)


@pytest.mark.parametrize(
    ("width", "height", "size", "halvings", "resized"),
    [
        (200, 120, 32, 1, (53, 32)),  # 120 -> 60, and 60 < 2 * 32
        (96, 256, 24, 2, (24, 64)),  # 96 -> 48 -> 24: exactly twice the target is halved once more
        (47, 30, 16, 0, (25, 16)),
        (9, 8, 32, 0, (36, 32)),  # grows
    ],
)
def test_center_view_is_halving_bicubic_and_central_crop(width, height, size, halvings, resized):
    image = smooth_image(width, height)
    pixels = torch.from_numpy(np.array(image)).float()
    for _ in range(halvings):
        pixels = F.avg_pool2d(pixels.permute(2, 0, 1), 2).permute(1, 2, 0)
    pixels = bicubic(pixels, resized[1], resized[0])
    top, left = (resized[1] - size) // 2, (resized[0] - size) // 2
    expected = pixels[top : top + size, left : left + size].numpy()
    view = images.center_view(image, size)
    assert view.shape == (size, size, 3) and view.dtype == np.uint8
    assert np.abs(view - expected).max() <= 1 + halvings  # 8-bit rounding after each resize


def whole_then_cut(image: Image.Image, size: int) -> np.ndarray:
    """ADM's center_crop_arr, which the release took over: the whole picture is resized before it is cut."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(500, 333), (97, 31), (31, 490), (33, 520), (8, 8), (3, 47)])
def test_center_view_is_the_releases_to_the_bit(width, height):
    image = noise_image(width, height)
    assert np.array_equal(images.center_view(image, 32), whole_then_cut(image, 32))


@pytest.mark.parametrize(
    ("width", "height"), [(1, 2000), (2001, 3), (31, 999), (40, 5000), (4001, 97), (1, 1)]
)
def test_center_view_of_a_narrow_image_is_the_releases_within_rounding(width, height):
    image = smooth_image(width, height)
    difference = np.abs(images.center_view(image, 32).astype(int) - whole_then_cut(image, 32))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
@pytest.mark.parametrize("shape", ["1, 2000", "2000, 1"])
def test_center_view_of_a_narrow_image_takes_little_memory(shape):
    program = f"""
import re
from pathlib import Path
from PIL import Image
from drift.data.images import center_view

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

center_view(Image.new("RGB", (300, 300)), 256)
before = peak()
center_view(Image.new("RGB", ({shape})), 256)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB; the whole would be 512 000 x 256 pixels


def test_center_view_of_a_square_of_the_right_size_is_the_image():
    image = noise_image(32, 32)
    assert (images.center_view(image, 32) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(500, 375, (0.2, 1.0)), (120, 200, (0.08, 1.0)), (40, 100, (0.5, 0.9))]
)
def test_random_crop_is_distributed_like_torchvisions(width, height, scale):
    """Kolmogorov-Smirnov on area, aspect ratio and place; the last image often needs several attempts."""
    ratio, n = (3 / 4, 4 / 3), 3000
    rng = np.random.default_rng(0)
    ours = np.array([images.random_crop(width, height, scale, ratio, rng) for _ in range(n)], float)
    torch.manual_seed(0)
    canvas = torch.empty(1, height, width)
    boxes = [RandomResizedCrop.get_params(canvas, list(scale), list(ratio)) for _ in range(n)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in boxes], float)

    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (width, height)).all()
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] / (width - b[:, 2] + 1),
        lambda b: b[:, 1] / (height - b[:, 3] + 1),
    ):
        assert ks_2samp(statistic(ours), statistic(theirs), method="asymp").pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(10, 100), (100, 10), (101, 8), (1, 50)])
def test_random_crop_that_cannot_fit_falls_back_like_torchvision(width, height):
    scale, ratio = (1.0, 1.0), (3 / 4, 4 / 3)
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), list(ratio))
    box = images.random_crop(width, height, scale, ratio, np.random.default_rng(0))
    assert box == (left, top, w, h)


def test_augmented_view_is_the_drawn_crop_resized():
    image = smooth_image(90, 70)
    left, top, w, h = images.random_crop(90, 70, (0.2, 0.6), (3 / 4, 4 / 3), np.random.default_rng(5))
    crop = torch.from_numpy(np.array(image))[top : top + h, left : left + w].float()
    view = images.augmented_view(image, 32, (0.2, 0.6), (3 / 4, 4 / 3), False, np.random.default_rng(5))
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8
    assert np.abs(view - bicubic(crop, 32, 32).numpy()).max() <= 1


def test_augmented_view_mirrors_half_of_the_time():
    image = noise_image(8, 8)
    rng = np.random.default_rng(0)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    views = [images.augmented_view(image, 8, flip=True, rng=rng, **whole) for _ in range(400)]
    flips = [np.array_equal(view, mirrored) for view in views]
    assert all(flipped or np.array_equal(view, plain) for view, flipped in zip(views, flips, strict=True))
    assert abs(np.mean(flips) - 0.5) < 4 * math.sqrt(0.25 / 400)
    views = [images.augmented_view(image, 8, flip=False, rng=rng, **whole) for _ in range(20)]
    assert all(np.array_equal(view, plain) for view in views)
