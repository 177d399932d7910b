"""The sweep: what its images give, whoever makes them and however often it is interrupted."""

import itertools
import json

import numpy as np
import pytest
import torch
from painting import CLASSES, Decoder, Painter, Source, flat, pixel_network
from PIL import Image
from standins import peers_of, random_port, run_ranks, save_inception
from torch_fidelity_shim import calculate_precision_recall_full, isc_features_to_metric

from drift.data.datasets import ImageFiles
from drift.evaluation.metrics import kernel_distance
from drift.evaluation.moments import frechet_distance
from drift.evaluation.networks import load_feature_network
from drift.evaluation.reference import FeatureStatistics, Reference, measure_images
from drift.evaluation.sample import ImageDecoder, balanced_labels, sample_images
from drift.evaluation.sweep import (
    METRICS,
    Samples,
    best_entry,
    evaluate_sweep,
    sweep_summary,
    write_sweep_csv,
)
from drift.runtime.errors import UserError
from drift.runtime.seeds import derive_seed, numpy_generator

from cleanfid import inception_pytorch  # isort: skip  (after the shim, as it imports torchvision)

OMEGAS = (1.0, 1.5)


@pytest.fixture
def network():
    return pixel_network()


@pytest.fixture
def reference(network, tmp_path):
    return measure_images(Source(60, seed=1), network, tmp_path / "cache", image_size=4, batch_size=7)


def sweep(network, reference, work, *, batch_size=8, images=60, load=lambda decay: Painter(), **changes):
    settings = {"ema_decays": [0.9], "omegas": OMEGAS, "metrics": METRICS, "work": work} | changes
    samples = Samples(balanced_labels(images, CLASSES), seed=5, batch_size=batch_size)
    return evaluate_sweep(load, ImageDecoder(Decoder(), 3), network, reference, samples, **settings)


def test_sweep_is_what_its_images_give(network, reference, tmp_path):
    result = sweep(network, reference, tmp_path)
    assert [(entry["omega"], entry["ema_decay"]) for entry in result] == [(1.0, 0.9), (1.5, 0.9)]
    labels = balanced_labels(60, CLASSES)
    real = flat(Source(60, seed=1).images)
    for entry in result:
        parts = sample_images(
            Painter(), ImageDecoder(Decoder(), 60), range(60), labels, entry["omega"], 5, 60
        )
        ((_, images),) = parts
        pixels = flat(images)
        expected = frechet_distance(
            pixels.mean(0), np.cov(pixels, rowvar=False), real.mean(0), np.cov(real, rowvar=False)
        )
        assert entry["fid"] == pytest.approx(expected, rel=1e-6)
        logits = -np.abs(pixels.mean(1, keepdims=True) - [40, 120, 200])
        assert entry["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
        order = numpy_generator(5, "fid/inception_score").permutation(60)
        score = isc_features_to_metric(torch.from_numpy(logits[order]), shuffle=False)
        assert entry["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-6)
        assert entry["inception_score_std"] == pytest.approx(score["inception_score_std"], rel=1e-5, abs=1e-9)
        precision, recall = calculate_precision_recall_full(
            torch.from_numpy(pixels), torch.from_numpy(real), 3
        )
        assert (entry["precision"], entry["recall"]) == pytest.approx((precision, recall), abs=1e-6)
        features = (x.astype(np.float32) for x in (real, pixels))
        assert entry["kid"] == pytest.approx(kernel_distance(*features, seed=5), rel=1e-6)
    assert result[0]["accuracy"] < 0.95 < result[1]["accuracy"]
    assert best_entry(result) is min(result, key=lambda entry: entry["fid"])
    assert not list(tmp_path.glob("samples-*"))  # the features were needed only so long


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 7), (1, 64), (2, 7), (2, 64), (3, 64)])
def test_ranks_and_batches_do_not_change_the_sweep(network, reference, tmp_path, world_size, batch_size):
    """Neither the numbers nor the images."""
    alone = sweep(network, reference, tmp_path / "alone", png=tmp_path / "alone")

    def work(rank, all_reduce_sum):
        return sweep(
            network,
            reference,
            tmp_path / "work",
            png=tmp_path / "png",
            writers=2,
            batch_size=batch_size,
            peers=peers_of(rank, world_size, all_reduce_sum),
        )

    results = run_ranks(world_size, work)
    assert all(result == results[0] for result in results)
    for entry, expected in zip(results[0], alone, strict=True):
        assert entry.keys() == expected.keys()
        for name in entry.keys() - {"dir"}:
            assert entry[name] == pytest.approx(expected[name], rel=1e-6), name
    for name in ("gen_omega_1", "gen_omega_1.5"):
        files = sorted((tmp_path / "alone" / name).glob("*.png"))
        assert len(files) == 60
        for file in files:
            pixels = (
                np.asarray(Image.open(path / name / file.name))
                for path in (tmp_path / "png", tmp_path / "alone")
            )
            assert np.array_equal(*pixels)


def test_several_copies_are_each_loaded_once(network, reference, tmp_path):
    class Brighter(Painter):
        def __call__(self, noise, labels, omega, style_indices):
            return super().__call__(noise, labels, omega, style_indices) + 0.1

    loaded = []

    def load(decay):
        loaded.append(decay)
        return {0.9: Painter, 0.99: Brighter}[decay]()

    result = sweep(
        network, reference, tmp_path / "w", load=load, ema_decays=[0.9, 0.99], png=tmp_path / "png"
    )
    assert [(e["ema_decay"], e["omega"]) for e in result] == [
        (0.9, 1.0),
        (0.9, 1.5),
        (0.99, 1.0),
        (0.99, 1.5),
    ]
    assert list(dict.fromkeys(loaded)) == [0.9, 0.99] == [k for k, _ in itertools.groupby(loaded)]
    alone = sweep(network, reference, tmp_path / "w", load=load, ema_decays=[0.99])
    assert [e["fid"] for e in alone] == pytest.approx([e["fid"] for e in result[2:]], rel=1e-9)
    assert result[0]["fid"] != pytest.approx(result[2]["fid"], rel=0.01)
    assert (tmp_path / "png/ema_0.99/gen_omega_1.5/000059.png").exists()


class Interrupted(Exception):
    pass


def test_an_interrupted_sweep_goes_on_at_the_next_sample(network, reference, tmp_path):
    """First within a point, with PNG files, then between two points."""
    whole = sweep(network, reference, tmp_path / "whole")

    class Weary(Painter):
        left = 4

        def __call__(self, *arguments):
            self.left -= 1
            if self.left < 0:
                raise Interrupted
            return super().__call__(*arguments)

    with pytest.raises(Interrupted):
        sweep(network, reference, tmp_path / "w", load=lambda decay: Weary(), png=tmp_path / "png")
    assert len(list((tmp_path / "png/gen_omega_1").glob("*.png"))) == 32
    assert not (tmp_path / "png/gen_omega_1/fid.json").exists()
    (tmp_path / "png/gen_omega_1/000003.png").write_bytes(b"")
    made, entries = [], []

    class Counting(Painter):
        def __call__(self, noise, *arguments):
            made.append(noise)
            return super().__call__(noise, *arguments)

    rest = sweep(
        network,
        reference,
        tmp_path / "w",
        load=lambda decay: Counting(),
        png=tmp_path / "png",
        on_entry=entries.append,
        batch_size=11,
    )
    # Batches of 11: what was there is not made again
    assert len(made) == 3 + 6
    assert [e["fid"] for e in rest] == pytest.approx([e["fid"] for e in whole], rel=1e-9)
    assert len(list((tmp_path / "png/gen_omega_1").glob("*.png"))) == 60
    assert json.loads((tmp_path / "png/gen_omega_1/fid.json").read_text()) == entries[0]

    made.clear()
    again = sweep(
        network,
        reference,
        tmp_path / "w",
        load=lambda decay: Counting(),
        finished=entries[:1],
        png=tmp_path / "png",
    )
    assert len(made) == 8  # of 8
    assert again == rest
    made.clear()
    sweep(
        network, reference, tmp_path / "w", load=lambda d: Counting(), finished=entries, png=tmp_path / "new"
    )
    assert len(made) == 16  # the numbers were known, the files were not there


def test_images_of_another_run_never_stand_in_for_these(network, reference, tmp_path):
    """A sweep is interrupted, another one uses its folder, and it goes on."""

    class Brighter(Painter):
        def __call__(self, *arguments):
            return super().__call__(*arguments) + 0.1

    def some(run, load, **changes):
        return sweep(
            network,
            reference,
            tmp_path / run,
            run=run,
            load=load,
            omegas=[1.5],
            png=tmp_path / "png",
            **changes,
        )

    (entry,) = some("a", lambda decay: Painter())
    expected = {path.name: path.read_bytes() for path in (tmp_path / "png/gen_omega_1.5").glob("*.png")}
    some("b", lambda decay: Brighter(), images=90)
    assert some("a", lambda decay: Painter(), finished=[entry]) == [entry]
    assert {p.name: p.read_bytes() for p in (tmp_path / "png/gen_omega_1.5").glob("*.png")} == expected


def test_the_samples_of_the_whole_sweep_are_counted(network, reference, tmp_path):
    """Of 3 strengths, the first is known already; the last batch of a process may be a smaller one."""
    for world_size in (1, 3):
        seen = [[] for _ in range(world_size)]

        def work(rank, all_reduce_sum, world_size=world_size, seen=seen):
            sweep(
                network,
                reference,
                tmp_path / "w",
                images=50,
                omegas=(1.0, 1.5, 2.0),
                metrics=(),
                finished=[{"omega": 1.0, "ema_decay": 0.9, "fid": 1.0}],
                on_images=seen[rank].append,
                peers=peers_of(rank, world_size, all_reduce_sum),
            )

        run_ranks(world_size, work)
        for counts in seen:
            assert counts[0] == 50 and counts[-1] == 150
            assert counts == sorted(counts)


def test_what_cannot_be_measured_is_refused(network, reference, tmp_path):
    with pytest.raises(UserError, match="5 generated"):
        sweep(network, reference, tmp_path, images=5)
    statistics = Reference("x.npz", "", FeatureStatistics(np.zeros(7), np.eye(7)))
    with pytest.raises(UserError, match=r"kid, which compares single images"):
        sweep(network, statistics, tmp_path, metrics=["kid"])
    network.classify = None
    with pytest.raises(UserError, match="pixels does not classify"):
        sweep(network, reference, tmp_path, metrics=["inception_score"])
    network.labels = False
    (entry,) = sweep(network, statistics, tmp_path, metrics=(), omegas=[1.0])
    assert entry.keys() == {"omega", "ema_decay", "fid"}


def test_files_of_the_sweep(tmp_path):
    path = tmp_path / "sweep.csv"
    entries = [
        {"omega": 1.0, "ema_decay": 0.9, "fid": 8.25, "accuracy": 0.5},
        {"omega": 1.5, "ema_decay": None, "fid": 7.0, "kid": 0.25, "dir": "png/gen_omega_1.5"},
    ]
    write_sweep_csv(path, entries)
    head, *rows = path.read_text().splitlines()
    assert head == "omega,ema_decay,fid,kid,inception_score,inception_score_std,precision,recall,accuracy,dir"
    assert rows == ["1.0,0.9,8.25,,,,,,0.5,", "1.5,,7.0,0.25,,,,,,png/gen_omega_1.5"]
    summary = sweep_summary(
        entries,
        generator="artifacts/generator",
        images=100,
        batch_size=10,
        workers=2,
        mode="clean",
        reference="val",
        statistics="abc",
        latent_scale_factor=0.18215,
    )
    assert summary["best"] == entries[1] and summary["omegas"] == [1.0, 1.5]
    assert summary["results"] == [entries[0] | {"dir": None}, entries[1]]
    assert (summary["num_gen"], summary["fid"]["mode"], summary["real_dir"]) == (100, "clean", "val")


def entry_scale(reference):
    """What a distance is large or small by: the sum of the variances."""
    return np.trace(reference.statistics.covariance)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:The `disp` argument")
@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow", "legacy_pytorch"])
def test_distances_are_cleanfids_of_the_png_folders(tmp_path, monkeypatch, mode):
    """With random weights in the place of Inception's, its 2048 features cut to what 60 images can fill."""
    from cleanfid import fid as cleanfid
    from cleanfid.inception_pytorch import InceptionV3
    from cleanfid.inception_torchscript import InceptionV3W

    file = tmp_path / "inception-2015-12-05.pt"
    if mode == "legacy_pytorch":
        torch.save(random_port().state_dict(), file)
        monkeypatch.setattr(
            inception_pytorch, "load_state_dict_from_url", lambda *a, **k: torch.load(file, weights_only=True)
        )
        port = InceptionV3(output_blocks=[3], resize_input=False).eval()
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
        config = type("", (), {"in_channels": 3, "input_size": 24, "style_codebooks": 1, "style_entries": 2})

        def __call__(self, noise, labels, omega, style_indices):
            return 0.4 * noise + 0.1 * omega[:, None, None, None]

    network = load_feature_network("inception", mode, inception=str(file))
    extract = network.extract
    network.extract, network.dimension, network.classify = lambda x: extract(x)[:, some], len(some), None
    reference = measure_images(ImageFiles(real), network, tmp_path / "cache", image_size=24, batch_size=16)
    (entry,) = sweep(
        network,
        reference,
        tmp_path / "work",
        images=count,
        omegas=[1.5],
        metrics=["kid"],
        png=tmp_path / "png",
        load=lambda decay: Noise(),
    )
    folders = str(real), str(tmp_path / "png/gen_omega_1.5")
    arguments = {
        "mode": mode,
        "num_workers": 0,
        "batch_size": 16,
        "device": torch.device("cpu"),
        "verbose": False,
    }

    def extractor(x):
        return whole(x)[:, some]

    expected = cleanfid.compute_fid(*folders, custom_feat_extractor=extractor, **arguments)
    assert entry["fid"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.001 * entry_scale(reference)
    monkeypatch.setattr(cleanfid, "build_feature_extractor", lambda *args, **kwargs: extractor)
    np.random.seed(derive_seed(5, "fid/kid") % 2**32)
    expected = cleanfid.compute_kid(*folders, **arguments)
    assert entry["kid"] == pytest.approx(expected, rel=1e-4)
