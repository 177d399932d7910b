"""The sweep: what its images give, whoever makes them and however often it is interrupted."""

import itertools
import json

import numpy as np
import pytest
import torch
from complaints import complaint
from PIL import Image
from small_generator import write_generator
from standins import (
    CLASSES,
    Decoder,
    Painter,
    Source,
    flat,
    pixel_network,
    random_port,
    run_ranks,
    save_inception,
    settings,
)
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from drift.data.datasets import ImageFiles
from drift.data.latents import LatentStore, write_latents
from drift.evaluation.evaluate import Evaluation
from drift.evaluation.metrics import kernel_distance
from drift.evaluation.moments import FeatureStatistics, frechet_distance
from drift.evaluation.networks import load_feature_network
from drift.evaluation.pictures import draw_images
from drift.evaluation.png import PngFolder
from drift.evaluation.reference import Reference, measure_images
from drift.evaluation.sample import ImageDecoder
from drift.evaluation.sweep import Sweep
from drift.evaluation.while_training import TrainingEvaluation
from drift.runtime.errors import UserError
from drift.runtime.seeds import derive_seed, numpy_generator
from drift.settings import Drift, Fid


@pytest.fixture
def network():
    return pixel_network()


@pytest.fixture
def reference(network, tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "cache"))
    return measure_images(Source(60, seed=1), network, settings(data={"image_size": 4}))


def sweep(network, reference, work, *, painter=Painter, images=60, batch_size=8, png=None, how=(), **fid):
    """A sweep over two omegas of one copy; `how` are other arguments."""
    hardware = {"sample_batch": batch_size, "png_folder": None if png is None else str(png)}
    chosen = settings(seed=5, fid={"omegas": (1.0, 1.5), **fid}, hardware=hardware)
    how = {"decays": [0.9], "load": lambda decay: painter()} | dict(how)
    decode, labels = ImageDecoder(Decoder(), 3), np.arange(images) % CLASSES
    counted = how.pop("on_images", lambda images: None)
    work.mkdir(exist_ok=True, parents=True)
    made = Sweep(chosen, labels, decode=decode, network=network, reference=reference, **how)
    return made.run(work, counted)


def test_sweep_is_what_its_images_give(network, reference, tmp_path):
    result = sweep(network, reference, tmp_path)
    assert [(entry["omega"], entry["ema_decay"]) for entry in result] == [(1.0, 0.9), (1.5, 0.9)]
    labels, real = np.arange(60) % CLASSES, flat(Source(60, seed=1).images)
    for entry in result:
        wanted = [(label, i, entry["omega"]) for i, label in enumerate(labels)]
        pixels = flat(draw_images(Painter(), ImageDecoder(Decoder(), 60), wanted, 5, 60))
        moments = [m for x in (pixels, real) for m in (x.mean(0), np.cov(x, rowvar=False))]
        assert entry["fid"] == pytest.approx(frechet_distance(*moments), rel=1e-6)
        logits = -np.abs(pixels.mean(1, keepdims=True) - [40, 120, 200])
        assert entry["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
        order = numpy_generator(5, "fid/inception_score").permutation(60)
        score = isc_features_to_metric(torch.from_numpy(logits[order]), shuffle=False)
        assert entry["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-6)
        assert entry["inception_score_std"] == pytest.approx(score["inception_score_std"], rel=1e-5, abs=1e-9)
        both = calculate_precision_recall_full(torch.from_numpy(pixels), torch.from_numpy(real), 3)
        assert (entry["precision"], entry["recall"]) == pytest.approx(both, abs=1e-6)
        features = (x.astype(np.float32) for x in (real, pixels))
        assert entry["kid"] == pytest.approx(kernel_distance(*features, seed=5), rel=1e-6)
    assert result[0]["accuracy"] < 0.95 < result[1]["accuracy"]
    assert not list(tmp_path.glob("samples-*"))  # the features were needed only so long


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 7), (2, 64), (3, 7)])
def test_ranks_and_batches_do_not_change_the_sweep(network, reference, tmp_path, world_size, batch_size):
    """Neither the numbers, to the bit, nor the images; and the samples of the whole sweep are counted."""
    alone = sweep(network, reference, tmp_path / "alone", png=tmp_path / "alone")
    seen = [[] for _ in range(world_size)]

    def work(ranks):
        how = {"ranks": ranks, "on_images": seen[ranks.rank].append}
        folders = {"work": tmp_path / "work", "png": tmp_path / "png"}
        return sweep(network, reference, batch_size=batch_size, how=how, **folders)

    for result in run_ranks(world_size, work):
        for entry, expected in zip(result, alone, strict=True):
            assert {**entry, "dir": None} == {**expected, "dir": None}
    for counts in seen:
        assert counts == sorted(counts) and 60 in counts and counts[-1] == 120
    for name in ("gen_omega_1", "gen_omega_1.5"):
        files = sorted((tmp_path / "alone" / name).glob("*.png"))
        assert len(files) == 60
        for file in files:
            pixels = (np.asarray(Image.open(tmp_path / run / name / file.name)) for run in ("png", "alone"))
            assert np.array_equal(*pixels)


class Brighter(Painter):
    def __call__(self, *arguments):
        return super().__call__(*arguments) + 0.1


def test_several_copies_are_each_loaded_once(network, reference, tmp_path):
    loaded = []

    def load(decay):
        loaded.append(decay)
        return {0.9: Painter, 0.99: Brighter}[decay]()

    def measured(folder, decays):
        how = {"load": load, "decays": decays}
        return sweep(
            network, reference, tmp_path / folder, how=how, png=tmp_path / f"{folder}-png", metrics=()
        )

    result = measured("both", [0.9, 0.99])
    points = [(entry["ema_decay"], entry["omega"]) for entry in result]
    assert points == [(0.9, 1.0), (0.9, 1.5), (0.99, 1.0), (0.99, 1.5)]
    assert [k for k, _ in itertools.groupby(loaded)] == [0.9, 0.99]
    assert [e["fid"] for e in measured("alone", [0.99])] == [e["fid"] for e in result[2:]]
    assert result[0]["fid"] != pytest.approx(result[2]["fid"], rel=0.01)
    assert (tmp_path / "both-png/ema_0.99/gen_omega_1.5/000059.png").exists()


class Interrupted(Exception):
    pass


class Weary(Painter):
    """Gives up after so many calls; counts them."""

    def __init__(self, left):
        self.left, self.calls = left, 0

    def __call__(self, *arguments):
        if self.calls == self.left:
            raise Interrupted
        self.calls += 1
        return super().__call__(*arguments)


def test_an_interrupted_sweep_goes_on_at_the_next_sample(network, reference, tmp_path):
    """First within a point, with PNG files, then between two points."""
    whole = sweep(network, reference, tmp_path / "whole")
    png, first = tmp_path / "png", tmp_path / "png/gen_omega_1"

    def go_on(left=99, batch_size=8, png=png):
        weary = Weary(left)
        try:
            how = {"painter": lambda: weary, "png": png, "batch_size": batch_size}
            return weary, sweep(network, reference, tmp_path / "w", **how)
        except Interrupted:
            return weary, None

    assert go_on(left=4)[1] is None
    assert len(list(first.glob("*.png"))) == 32
    assert not (first / "fid.json").exists()
    (first / "000003.png").write_bytes(b"")  # as a power failure may leave it
    painter, rest = go_on(left=5, batch_size=11)
    # 37 samples of the first point are left, in batches of 11: the batch before the interruption is lost
    assert rest is None and painter.calls == 5
    assert len(list(first.glob("*.png"))) == 60
    entry = json.loads((first / "fid.json").read_text())
    painter, rest = go_on()
    assert painter.calls == 8  # of 8 samples, of the second point alone
    assert rest[0] == entry and [e["fid"] for e in rest] == [e["fid"] for e in whole]
    assert go_on()[0].calls == 0
    assert go_on(png=tmp_path / "new")[0].calls == 16  # the numbers were known, the files were not there


def test_images_of_another_run_never_stand_in_for_these(network, reference, tmp_path, capsys):
    """A sweep is interrupted, another one uses its folder, and it goes on."""

    def some(run, **changes):
        return sweep(network, reference, tmp_path / run, omegas=(1.5,), png=tmp_path / "png", **changes)

    first = some("a")
    folder = tmp_path / "png/gen_omega_1.5"
    (folder / "notes.txt").touch()
    expected = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    some("b", painter=Brighter, images=90)
    assert "removing 61 files of another run" in capsys.readouterr().out
    assert some("a") == first
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == expected
    assert (folder / "notes.txt").exists()


def test_png_files_have_the_pixels_and_what_is_missing_is_known(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    folder = PngFolder(tmp_path / "a", 1.25)
    for index, image in zip((0, 1, 4), images, strict=True):
        folder.write(index, image)
    (folder.folder / "000001.png").write_bytes(b"")
    assert folder.folder.name == "gen_omega_1.25" and folder.missing(5).tolist() == [1, 2, 3]
    assert np.array_equal(np.asarray(Image.open(folder.folder / "000004.png")), images[2])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        PngFolder(tmp_path / "file", 1.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_cannot_be_measured_is_refused_before_any_work(tmp_path):
    """By a network without classes, whose features are two."""

    class TwoColours(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))[:, :2]

    features = str(tmp_path / "colours.pt")
    torch.jit.script(TwoColours()).save(features)
    folder = write_generator(tmp_path / "generator", names=["0", "1", "2"])

    def refused(side=16, open_it=lambda chosen: Evaluation(chosen, folder), **keys):
        fid = {"features": features, "ema_decays": Drift().ema_decays[:1], **keys}
        chosen = settings(data={"image_size": side}, fid=fid)
        return complaint(lambda: open_it(chosen))

    write_latents(tmp_path / "latents", "train", np.zeros((3, 4, 4, 4)), np.arange(3), {})
    store = LatentStore(tmp_path / "latents")
    others = "its latents are [4, 4, 4], but those of pretrained/digits_vae (encode.autoencoder) at"
    assert refused(32).startswith(f"{folder}: {others} data.image_size 32 are [4, 8, 8]")
    while_training = lambda chosen: TrainingEvaluation(chosen, store)  # noqa: E731
    assert refused(32, while_training).startswith(f"{store.folder}: {others} data.image_size 32 are")
    assert "has inception_score, but" in refused(metrics=("inception_score",))
    assert refused(images=2).startswith("2 generated images per omega (fid.images): too few")
    assert refused(floor_images=2).startswith("2 real training images (fid.floor_images; 0 takes none)")


def test_only_what_can_be_measured_is(network, tmp_path):
    network.labels = False
    statistics = Reference("x.npz", "", FeatureStatistics(np.zeros(7), np.eye(7)), tmp_path)
    (entry,) = sweep(network, statistics, tmp_path, metrics=(), omegas=(1.0,))
    assert entry.keys() == {"omega", "ema_decay", "fid"}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:The `disp` argument")
@pytest.mark.parametrize(
    "mode", ["clean", "legacy_tensorflow", pytest.param("legacy_pytorch", marks=pytest.mark.slow)]
)
def test_distances_are_cleanfids_of_the_png_folders(tmp_path, monkeypatch, mode):
    """With random weights in the place of Inception's, its 2048 features cut to what 60 images can fill."""
    from cleanfid import fid as cleanfid
    from cleanfid import inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    file = tmp_path / "inception-2015-12-05.pt"
    if mode == "legacy_pytorch":
        torch.save(random_port().state_dict(), file)
        load = lambda *args, **kwargs: torch.load(file, weights_only=True)  # noqa: E731
        monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", load)
        port = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
        whole = lambda x: port(x / 255)[0].squeeze(-1).squeeze(-1)  # noqa: E731
    else:
        save_inception(file)
        whole = InceptionV3W(str(tmp_path), download=False, resize_inside=mode == "legacy_tensorflow")
    some = torch.arange(0, 2048, 128)
    count = 20 if mode == "legacy_pytorch" else 50  # its network is of the real size

    real = tmp_path / "real"
    real.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)):
        Image.fromarray(image // 2 + 60).save(real / f"{i:03d}.png")

    class Noise(Painter):
        config = Painter.config | {"input_size": 24}

        def __call__(self, noise, labels, omega, style_indices):
            return 0.4 * noise + 0.1 * omega[:, None, None, None]

    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "cache"))
    network = load_feature_network(Fid(mode=mode, inception=str(file)))
    extract = network.extract
    network.extract, network.dimension, network.classify = lambda x: extract(x)[:, some], len(some), None
    reference = measure_images(ImageFiles(real), network, settings(data={"image_size": 24}))
    how = {"painter": Noise, "images": count, "png": tmp_path / "png", "omegas": (1.5,), "metrics": ("kid",)}
    (entry,) = sweep(network, reference, tmp_path / "work", **how)
    folders = str(real), str(tmp_path / "png/gen_omega_1.5")
    arguments = {"mode": mode, "num_workers": 0, "batch_size": 16, "device": torch.device("cpu")}
    extractor = lambda x: whole(x)[:, some]  # noqa: E731
    expected = cleanfid.compute_fid(*folders, custom_feat_extractor=extractor, verbose=False, **arguments)
    assert entry["fid"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.001 * np.trace(reference.statistics.covariance)
    monkeypatch.setattr(cleanfid, "build_feature_extractor", lambda *args, **kwargs: extractor)
    np.random.seed(derive_seed(5, "fid/kid") % 2**32)
    expected = cleanfid.compute_kid(*folders, verbose=False, **arguments)
    assert entry["kid"] == pytest.approx(expected, rel=1e-4)
