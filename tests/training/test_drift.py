"""Training of the generator: what is drawn for a step, and what is logged of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop

import drift.training.drift
import drift.training.loop
from drift.data.latents import LatentStore, write_latents
from drift.field import FieldSettings
from drift.models import LatentMAE
from drift.runtime.processes import Ranks
from drift.settings import load_settings
from drift.training.checkpoint import load_checkpoint
from drift.training.drift import RealSamples, plot_columns, train_generator
from drift.training.log import read_log, write_plot

SETTINGS = load_settings(Path(__file__).parents[2] / "presets" / "digits.yaml")
OPTIONS = SETTINGS.drift.model_copy(
    update={
        "hidden": 16, "depth": 1, "heads": 2, "style_codebooks": 2, "classes_per_step": 4, "generated": 3,
        "positives": 2, "unconditional": 2, "push_per_step": 16, "steps": 2, "warmup_steps": 0,
    }
)  # fmt: skip
HARDWARE = SETTINGS.hardware.model_copy(update={"log_every": 1, "checkpoint_every": 2})
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def store(tmp_path) -> LatentStore:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((24, 2, 4, 4)).astype(np.float16)
    write_latents(tmp_path / "latents", "train", latents, np.arange(24) % 4, {"num_classes": 4})
    return LatentStore.open(tmp_path / "latents")


@pytest.fixture
def encoder() -> LatentMAE:
    torch.manual_seed(0)
    return LatentMAE(in_channels=2, base_channels=8, layers=(1, 1, 1, 1), num_classes=4, norm_groups=2)


def train(store, encoder, field, folder, ranks=ALONE, options=None, **hardware):
    return train_generator(
        store,
        encoder,
        options or OPTIONS,
        field,
        seed=0,
        hardware=HARDWARE.model_copy(update=hardware),
        ranks=ranks,
        folder=folder,
    )


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class FirstStep(Exception):
    pass


def first_batches(store, encoder, field, folder, monkeypatch, ranks=ALONE):
    """Generated samples and negatives of the first step, as the objective gets them."""
    caught = []

    def objective(generated, *args, negatives, **kwargs):
        caught.extend([generated, negatives])
        raise FirstStep

    monkeypatch.setattr(drift.training.drift, "drift_objective", objective)
    monkeypatch.setattr(drift.training.loop, "shared_checkpoint", lambda *args: None)  # needs real peers
    # The output layer begins at zero: let it tell noises apart
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda tensor: torch.nn.init.constant_(tensor, 0.01))
    with pytest.raises(FirstStep):
        train(store, encoder, field, folder, ranks)
    return caught


SECOND_BATCH = FieldSettings.sinkhorn(
    coupling="sinkhorn", drift_form="split", dist_metric="l2_sq", negatives="second_batch"
)


def test_the_second_batch_is_another_draw_without_a_graph(store, encoder, tmp_path, monkeypatch):
    generated, negatives = first_batches(store, encoder, SECOND_BATCH, tmp_path, monkeypatch)
    assert generated.shape == negatives.shape == (4, 3, 2, 4, 4)
    assert generated.requires_grad and not negatives.requires_grad
    assert ((generated - negatives).flatten(2).norm(dim=-1) > 1e-6).all()
    alone, none = first_batches(store, encoder, FieldSettings(), tmp_path / "alone", monkeypatch)
    assert none is None and torch.equal(alone, generated)


def test_the_second_batch_does_not_depend_on_the_number_of_processes(store, encoder, tmp_path, monkeypatch):
    whole = first_batches(store, encoder, SECOND_BATCH, tmp_path, monkeypatch)
    shares = [
        first_batches(store, encoder, SECOND_BATCH, tmp_path / str(r), monkeypatch, Ranks(r, 2, ALONE.device))
        for r in range(2)
    ]
    for i in range(2):
        torch.testing.assert_close(torch.cat([share[i] for share in shares]), whole[i])


@pytest.mark.parametrize("field", [FieldSettings(temps=(0.05, 0.5)), SECOND_BATCH], ids=["release", "second"])
def test_every_line_of_the_log_tells_about_the_field(store, encoder, tmp_path, field):
    train(store, encoder, field, tmp_path / "run")
    lines = read_log(tmp_path / "run" / "logs.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    names = ["drift_rms", "neighbours"] + (["marginal_error"] if field.coupling == "sinkhorn" else [])
    for line in lines:
        sets = line["feature_sets"]
        assert {"conv1", "norm_x", "layer1_mean", "global"} <= sets.keys()
        for name in names:
            by_set = np.array([s[name] for s in sets.values()])
            assert by_set.shape == (len(sets), len(field.temps))
            for i, tau in enumerate(field.temps):
                assert line[f"{name}_{tau:g}"] == pytest.approx(by_set[:, i].mean(), rel=1e-3)
            assert line[name] == pytest.approx(by_set.mean(), rel=1e-3)
        assert line["loss"] == pytest.approx(sum(s["loss"] for s in sets.values()), rel=1e-3)
        assert line["scale"] == pytest.approx(np.mean([s["scale"] for s in sets.values()]), rel=1e-3)
        assert 1 <= line["neighbours"] <= OPTIONS.positives
    write_plot(tmp_path / "run" / "logs.jsonl", tmp_path / "plot.csv", plot_columns(field))
    header = (tmp_path / "plot.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "scale", "lr", *names, *(f"{n}_{t:g}" for n in names for t in field.temps)} <= set(header)


# What has no effect

IDLE = [
    (
        {"sampling": "direct", "lr_schedule": "constant", "style_codebooks": 0, "no_guidance_fraction": 1.0},
        {
            "lr_final": 0.5, "warmup_start_lr": 0.1, "style_entries": 3, "queue_per_class": 1,
            "queue_global": 1, "push_per_step": 1, "omega_min": 1.5, "omega_max": 9.0, "omega_exponent": 1.0,
        },
    ),
    (
        {"omega_min": 2.0, "omega_max": 2.0, "unconditional": 0},
        {"omega_exponent": 1.0, "queue_global": 1, "warmup_start_lr": 0.1},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "turned"), IDLE, ids=["direct", "one_omega"])
def test_settings_that_are_declared_without_effect_change_no_bit(store, encoder, tmp_path, options, turned):
    options = OPTIONS.model_copy(update=options)
    assert options.without_effect().keys() == turned.keys()
    one, _ = train(store, encoder, FieldSettings(), tmp_path / "one", options=options)
    other_options = options.model_copy(update=turned)
    other, _ = train(store, encoder, FieldSettings(), tmp_path / "other", options=other_options)
    assert torch.equal(weights(one), weights(other))


# How a step is taken

MEMORY = [
    {"classes_per_pass": 1},
    {"classes_per_pass": 3},
    {"feature_batch": 5},
    {"classes_per_pass": 2, "feature_batch": 4, "activation_checkpointing": True},
]


@pytest.mark.parametrize("hardware", MEMORY, ids=str)
@pytest.mark.parametrize("field", [FieldSettings(), SECOND_BATCH], ids=["release", "second"])
def test_a_step_in_less_memory_is_the_same_step(store, encoder, tmp_path, field, hardware):
    one, _ = train(store, encoder, field, tmp_path / "whole")
    other, _ = train(store, encoder, field, tmp_path / "parts", **hardware)
    assert (weights(other) - weights(one)).norm() < 1e-5 * weights(one).norm()
    whole, parts = (read_log(tmp_path / run / "logs.jsonl") for run in ("whole", "parts"))
    for line, expected in zip(parts, whole, strict=True):
        for name in ("loss", "drift_rms", "neighbours", "scale", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize(
    "hardware", [{"activation_checkpointing": True}, {"latents_on_device": True}, {"prefetch": 0}], ids=str
)
def test_what_changes_no_sum_changes_no_bit(store, encoder, tmp_path, hardware):
    one, _ = train(store, encoder, FieldSettings(), tmp_path / "one")
    other, _ = train(store, encoder, FieldSettings(), tmp_path / "other", **hardware)
    assert torch.equal(weights(one), weights(other))


def test_float16_trains_and_goes_on_with_its_scale(store, encoder, tmp_path):
    options = OPTIONS.model_copy(update={"steps": 5})
    half = options.model_copy(update={"precision": "float16"})
    whole, _ = train(store, encoder, FieldSettings(), tmp_path / "whole", options=half)
    assert weights(whole).isfinite().all()
    checkpoint = load_checkpoint(tmp_path / "whole")
    assert checkpoint.step == 5 and checkpoint.state["scaler"]["scale"] > 1
    shutil.copytree(tmp_path / "whole" / "step-00000004", tmp_path / "resumed" / "step-00000004")
    resumed, _ = train(store, encoder, FieldSettings(), tmp_path / "resumed", options=half)
    assert torch.equal(weights(whole), weights(resumed))
    single, _ = train(store, encoder, FieldSettings(), tmp_path / "single", options=options)
    assert 0 < (weights(whole) - weights(single)).norm() < 0.1 * weights(single).norm()


REAL = [
    {"sampling": "queue", "class_sampling": "uniform"},
    {"sampling": "queue", "class_sampling": "pushed"},
    {"sampling": "direct", "class_sampling": "uniform"},
]


@pytest.mark.parametrize("how", REAL, ids=lambda how: "-".join(how.values()))
def test_real_samples_are_of_their_class_and_the_same_for_any_share(store, how):
    options = OPTIONS.model_copy(update=how)
    real, share = RealSamples(store, options, seed=0), RealSamples(store, options, seed=0)
    for step in range(5):
        classes, of_class, of_any = real.draw(step, range(4))
        assert (store.labels[of_class] == classes[:, None]).all()
        assert of_class.shape == (4, 2) and of_any.shape == (4, 2)
        some = share.draw(step, range(2, 4))
        assert np.array_equal(some[0], classes)
        assert np.array_equal(some[1], of_class[2:]) and np.array_equal(some[2], of_any[2:])


@pytest.mark.parametrize("how", REAL, ids=lambda how: "-".join(how.values()))
def test_real_samples_go_on_from_a_checkpoint(store, how):
    options = OPTIONS.model_copy(update=how)
    real, resumed = RealSamples(store, options, seed=0), RealSamples(store, options, seed=0)
    expected = [real.draw(step, range(4)) for step in range(6)]
    for step in range(3, 6):
        for got, wanted in zip(resumed.draw(step, range(4)), expected[step], strict=True):
            assert np.array_equal(got, wanted)


class Rows:
    """What `RealSamples` needs of a store: labels of images and their mirrors."""

    def __init__(self, images: int, classes: int, per_image: int = 1):
        self.labels = np.repeat(np.random.default_rng(0).permutation(images) % classes, per_image)
        self.num_classes, self.per_image = classes, per_image
        self.class_names = [str(label) for label in range(classes)]


def test_classes_are_those_of_images_just_pushed():
    """With as many pushed as classes are trained, they are the labels of these images, each as often."""
    options = OPTIONS.model_copy(
        update={"class_sampling": "pushed", "push_per_step": 8, "classes_per_step": 8, "queue_global": 8}
    )
    store = Rows(200, 6, per_image=2)
    real = RealSamples(store, options.model_copy(update={"unconditional": 8}), seed=0)
    repeated = 0
    for step in range(20):
        classes, _, of_any = real.draw(step, range(8))
        newest = of_any[0]  # all of a queue of the latest eight
        assert np.array_equal(np.sort(classes), np.sort(store.labels[newest]))
        repeated += len(set(classes)) < 8
    assert repeated == 20  # eight of six classes


@pytest.mark.parametrize(
    ("preset", "published"), [("imagenet256_ablation", 16), ("imagenet256_b2", 32), ("imagenet256_l2", 16)]
)
def test_a_class_is_trained_on_as_many_new_images_as_published(preset, published):
    """Images in the queue of a class that were not there when it was last trained, counted one by one."""
    options = load_settings(Path(__file__).parents[2] / "presets" / f"{preset}.yaml").drift
    everything = options.model_copy(update={"positives": options.queue_per_class, "unconditional": 0})
    images = 1_280_000
    real = RealSamples(Rows(images, 1000), everything, seed=0)
    begin = images // 2 // options.push_per_step  # in the middle of an epoch, where no image comes again
    slots, seen, new = range(options.classes_per_step), {}, []
    for step in range(140):
        classes, of_class, _ = real.draw(begin + step, slots)
        for label, rows in dict(zip(classes.tolist(), of_class, strict=True)).items():
            if label in seen:
                new.append(len(set(rows) - seen.pop(label)))
            if step < 50:  # as all that begin then have an end
                seen[label] = set(rows)
    assert len(seen) < 0.01 * len(new)
    assert np.mean(new) == pytest.approx(published, rel=0.08)


def test_a_class_that_occurs_twice_does_not_depend_on_the_number_of_processes(
    store, encoder, tmp_path, monkeypatch
):
    pushes = (
        OPTIONS.model_copy(update={"class_sampling": "pushed", "push_per_step": n}) for n in range(4, 30)
    )
    repeats = (o for o in pushes if len(set(RealSamples(store, o, seed=0).draw(0, range(4))[0])) < 4)
    monkeypatch.setitem(globals(), "OPTIONS", next(repeats))
    whole = first_batches(store, encoder, SECOND_BATCH, tmp_path, monkeypatch)
    shares = [
        first_batches(store, encoder, SECOND_BATCH, tmp_path / str(r), monkeypatch, Ranks(r, 2, ALONE.device))
        for r in range(2)
    ]
    for i in range(2):
        torch.testing.assert_close(torch.cat([share[i] for share in shares]), whole[i])


@pytest.mark.parametrize("hardware", [{}, {"classes_per_pass": 1}], ids=str)
@pytest.mark.parametrize("scope", ["batch", "class"])
def test_a_run_whose_classes_repeat_goes_on_to_the_same_bits(store, encoder, tmp_path, scope, hardware):
    options = OPTIONS.model_copy(update={"class_sampling": "pushed", "steps": 4})
    field = FieldSettings(normalization_scope=scope)
    whole, _ = train(store, encoder, field, tmp_path / "whole", options=options, **hardware)
    shutil.copytree(tmp_path / "whole" / "step-00000002", tmp_path / "resumed" / "step-00000002")
    resumed, _ = train(store, encoder, field, tmp_path / "resumed", options=options, **hardware)
    assert weights(whole).isfinite().all() and torch.equal(weights(whole), weights(resumed))


def test_a_run_that_draws_directly_goes_on_to_the_same_bits(store, encoder, tmp_path):
    options = OPTIONS.model_copy(update={"sampling": "direct", "steps": 4})
    whole, _ = train(store, encoder, FieldSettings(), tmp_path / "whole", options=options)
    shutil.copytree(tmp_path / "whole" / "step-00000002", tmp_path / "resumed" / "step-00000002")
    resumed, _ = train(store, encoder, FieldSettings(), tmp_path / "resumed", options=options)
    assert torch.equal(weights(whole), weights(resumed))
    queued, _ = train(store, encoder, FieldSettings(), tmp_path / "queued")
    assert not torch.equal(weights(whole), weights(queued))


def test_networks_whose_backward_pass_does_not_compile_train_uncompiled(
    store, encoder, tmp_path, monkeypatch, capsys
):
    plain, _ = train(store, encoder, FieldSettings(), tmp_path / "plain", feature_batch=4)

    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    compile, backend = torch.compile, aot_autograd(fw_compiler=nop, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, **how))
    other, _ = train(store, encoder, FieldSettings(), tmp_path / "other", feature_batch=4, compile=True)
    assert torch.equal(weights(plain), weights(other))
    out = capsys.readouterr().out
    for name in ("generator", "encoder"):
        assert out.count(f"torch.compile of the {name} has failed") == 1


@pytest.mark.large
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs on a CPU")
def test_compiled_networks_train_alike(store, encoder, tmp_path, capsys):
    models = [
        train(store, encoder, FieldSettings(), tmp_path / str(compile), compile=compile)[0]
        for compile in (False, True)
    ]
    assert "has failed" not in capsys.readouterr().out
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=1e-3, atol=1e-4)
    logs = [read_log(tmp_path / name / "logs.jsonl") for name in ("False", "True")]
    for plain, compiled in zip(*logs, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
