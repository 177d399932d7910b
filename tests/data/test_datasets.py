import errno
import os
from pathlib import Path

import numpy as np
import pytest
from complaints import complaint
from PIL import Image, ImageFile
from sklearn.datasets import load_digits

from drift.data.datasets import DATASETS, ImageFiles, open_images
from drift.data.images import BadImage, load_rgb
from drift.runtime.errors import UserError
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.datasets.folder import IMG_EXTENSIONS  # noqa: E402


def test_digits_are_scikit_learns_pixels_in_stratified_splits():
    digits, splits = (
        load_digits(),
        [open_images("digits", None, split, 10) for split in ("train", "held_out")],
    )
    rows = []
    for source in splits:
        for i in range(len(source)):
            rows.append(int(source.name(i).removeprefix("digits/")))
            picture = np.asarray(source.load(i))
            assert picture.shape == (8, 8, 3) and (picture == picture[..., :1]).all()
            assert np.abs(picture[..., 0] / 255 - digits.images[rows[-1]] / 16).max() <= 0.5 / 255
            assert source.labels[i] == digits.target[rows[-1]]
        assert source.labels.dtype == np.int64 and source.class_names == list("0123456789")
    assert [len(source) for source in splits] == [1437, 360] and sorted(rows) == list(range(1797))
    assert np.abs(np.bincount(splits[1].labels) - np.bincount(digits.target) / 5).max() < 1
    assert splits[0].digest != splits[1].digest == open_images("digits", None, "held_out", 10).digest


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
    grey.save(ants / "z.Jpg")
    grey.save(ants / "B.jpeg")
    for other in (bees / "notes.txt", bees / ".hidden.png", tmp_path / "val" / "list.txt"):
        other.write_text("not an image")
    (tmp_path / "val" / ".cache").mkdir()
    return tmp_path


def val(root: Path):
    return open_images("folder", str(root), "val", 2)


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
    ours = open_images("folder", str(tmp_path), "val", len(theirs.classes))
    assert ours.class_names == theirs.classes and ours.labels.dtype == np.int64
    found = [(ours.name(i), ours.labels[i]) for i in range(len(ours))]
    assert found == theirs.samples and len(found) == len(names) - 2 + 2
    files = ImageFiles(tmp_path / "val")
    assert [files.name(i) for i in range(len(files))] == sorted(
        (path for path, _ in theirs.samples), key=os.path.split
    )


def test_files_passed_over_are_counted(root):
    bees = root / "val" / "bees"
    for name in ("x.gif", "y.GIF", "z"):
        (bees / name).touch()
    found = val(root).passed_over
    assert found.startswith(f"{root}/val: 7 other files passed over: ") and "; images end in .jpg, " in found
    for kind in ("2 hidden", "2 .gif", "2 .txt", "1 without a suffix"):
        assert kind in found
    assert ImageFiles(bees).passed_over.startswith(f"{bees}: 5 other files passed over: 2 .gif, ")
    for path in bees.iterdir():
        path.rename(path.with_name(f"{path.name}.gif"))
    message = complaint(lambda: val(root))
    assert "bees: a class without images" in message and "11 .gif" in message and ".tiff, .webp" in message


@pytest.mark.parametrize(
    ("train", "other", "message"),
    [
        ("0 1 10 2", "00 01 02 10", "label 0 is '00' in val (4 classes), but '0' in train (4 classes)"),
        ("ant bee cat", "ant bee", "label 2 is no such class in val (2 classes), but 'cat' in train (3"),
        ("ant", "ant bee", "label 1 is 'bee' in val (2 classes), but no such class in train (1"),
        ("caf\u00e9", "cafe\u0301", r"label 0 is 'cafe\u0301' in val (1 classes), but 'caf\xe9' in train"),
        ("ant bee", "bee ant", None),
    ],
)
def test_splits_with_other_class_names_are_refused(tmp_path, train, other, message):
    for split, names in (("train", train), ("val", other)):
        for name in names.split():
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    open_images("folder", str(tmp_path), "train", len(train.split()))
    if message is None:
        open_images("folder", str(tmp_path), "val", 2)
    else:
        found = complaint(lambda: open_images("folder", str(tmp_path), "val", 2))
        assert message in found and str(tmp_path) in found


def test_digest_follows_names_and_sizes_but_not_the_place(root, tmp_path_factory):
    seen = [val(root).digest]
    moved = root.rename(tmp_path_factory.mktemp("moved") / "elsewhere")
    assert val(moved).digest == seen[0] and val(moved).name_in_split(8) == "bees/g.bmp"
    ants = moved / "val" / "ants"
    for change in (
        lambda: (ants / "z.Jpg").rename(ants / "y.Jpg"),
        lambda: (ants / "y.Jpg").write_bytes((ants / "y.Jpg").read_bytes() + b"\0"),
        lambda: ants.rename(moved / "val" / "an"),
    ):
        change()
        seen.append(val(moved).digest)
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ("folder", "ROOT", "val", 3), r"data.classes = 3, but .*/val has 2 classes"),
        (None, ("folder", "ROOT/gone", "val", 2), r"gone/val: cannot be listed \(No such file.*data.root"),
        (None, ("folder", "ROOT/val/list.txt", "val", 2), r"list.txt/val: cannot be listed \(Not a dir"),
        (None, ("folder", None, "val", 2), r"data.root = null"),
        (lambda root: (root / "new").mkdir(), ("folder", "ROOT", "new", 2), r"/new: has no class folders"),
        (
            lambda root: (root / "val/bees/0.png").symlink_to(root / "gone.png"),
            ("folder", "ROOT", "val", 2),
            r"bees/0.png: cannot be read \(No such file",
        ),
        (
            lambda root: (root / "val/ants/again").symlink_to(root / "val"),
            ("folder", "ROOT", "val", 2),
            r"val/ants/again: a link to a folder that it is in",
        ),
        (None, ("digits", None, "val", 10), r"digits has no split val: it has train and held_out"),
        (None, ("digits", None, "train", 7), r"data.classes = 7, but digits/train has 10 classes"),
        (None, ("cifar", None, "train", 10), rf"data.dataset = cifar: allowed: {', '.join(DATASETS)}"),
    ],
)
def test_mistakes_are_one_line(root, prepare, arguments, message):
    if prepare:
        prepare(root)
    arguments = [a.replace("ROOT", str(root)) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(UserError, match=message) as error:
        open_images(*arguments)
    assert "\n" not in str(error.value)


# Reading


def test_every_kind_of_file_is_decoded_to_rgb(root):
    source = val(root)
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
def test_colours_are_decoded_as_stored(tmp_path, suffix, save):
    """Four colours in quarters: channels are in order, nothing is turned or blended with a background."""
    pixels = np.empty((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[:8, 12:] = (250, 60, 20), (10, 200, 90)
    pixels[8:, :12], pixels[8:, 12:] = (30, 40, 180), (128, 128, 0)
    save(Image.fromarray(pixels), tmp_path / f"0{suffix}")
    decoded = np.asarray(load_rgb(tmp_path / f"0{suffix}")).astype(int)
    inside = np.ones((16, 24), bool)
    inside[6:10], inside[:, 10:14] = False, False  # a JPEG rings where colours meet
    assert np.abs(decoded - pixels)[inside].max() <= (12 if suffix == ".jpeg" else 0)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", "<u2"), (".pgm", "<i4"), (".tif", "<u2"), (".tiff", ">u2")]
)
def test_grey_of_16_bits_keeps_its_high_byte(tmp_path, suffix, dtype):
    levels = np.arange(0, 65536, 257)[:, None].repeat(3, 1)
    Image.fromarray(levels.astype(dtype)).save(tmp_path / f"x{suffix}")
    decoded = np.asarray(load_rgb(tmp_path / f"x{suffix}"))
    assert (decoded == (levels // 256)[..., None]).all()


def large(path):
    Image.new("1", (12_000, 9_000)).save(path)


def long(path):
    with path.open("wb") as file:
        file.truncate(2**30)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: Image.fromarray(np.full((4, 4), 200, np.int32)).save(path, "TIFF"), "grey of 32 bits"),
        (lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF"), "grey of 32 bits"),
        (large, "12000x9000 pixels, more than 89478485"),
        (long, "1073741824 bytes, more than"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_bytes(b"no image"), "of no known image format"),
    ],
)
def test_what_does_not_decode_is_refused_by_name(tmp_path, monkeypatch, write, reason):
    path = tmp_path / "x.png"
    write(path)
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded before its size is known")
    )
    with pytest.raises(BadImage) as error:
        load_rgb(path)
    assert str(error.value).startswith(f"{path}: does not decode ({reason}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ((Image, "open"), MemoryError(), "no memory to decode it; lower hardware.workers"),
        ((Path, "open"), OSError(errno.ESTALE, "Stale file handle"), "cannot be read (Stale file handle)"),
    ],
)
def test_want_of_memory_or_of_a_disk_is_no_damage(root, monkeypatch, where, error, message):
    def refuse(*_):
        raise error

    source = val(root)
    monkeypatch.setattr(*where, refuse)
    with pytest.raises(UserError) as caught:
        source.load(0)
    assert f"ants/B.jpeg: {message}" in str(caught.value) and not isinstance(caught.value, BadImage)
