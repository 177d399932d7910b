"""Training of the generator: what is drawn for a step, how it is taken, and what is logged of it."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import in_processes
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop

import drift.training.drift
from drift.data.latents import LatentStore, write_latents
from drift.features import MAEEncoder
from drift.features.latent import LatentEncoder
from drift.field import FieldSettings, drifting_loss
from drift.models import LatentMAE
from drift.runtime.errors import UserError
from drift.runtime.processes import Ranks
from drift.settings import Hardware, load_settings
from drift.training.drift import GeneratorTraining, RealSamples, plot_columns, train_generator
from drift.training.export import export_run
from drift.training.log import read_log, write_plot
from drift.training.loop import Learner, Run, parts
from drift.training.objective import drift_objective

PRESETS = Path(__file__).parents[2] / "presets"
OPTIONS = load_settings(PRESETS / "digits.yaml").drift.model_copy(
    update={
        "hidden": 16, "depth": 1, "heads": 2, "style_codebooks": 2, "classes_per_step": 4, "generated": 3,
        "positives": 2, "unconditional": 2, "push_per_step": 16, "steps": 2, "warmup_steps": 0,
    }
)  # fmt: skip
HARDWARE = Hardware(log_every=1, checkpoint_every=2)
ALONE = Ranks(0, 1, torch.device("cpu"))
RELEASE = FieldSettings()
SECOND_BATCH = FieldSettings.sinkhorn(
    coupling="sinkhorn", drift_form="split", dist_metric="l2_sq", negatives="second_batch"
)
WFLOW = FieldSettings.wflow()
PARTS = FieldSettings.wflow(classes_per_part=2)
ATTRACTION = ["neighbours", "row_entropy", "unused_positives"]
FIELDS = {"release": RELEASE, "second": SECOND_BATCH, "wflow": WFLOW}


@pytest.fixture
def store(tmp_path) -> LatentStore:
    latents = np.random.default_rng(0).standard_normal((24, 2, 4, 4)).astype(np.float16)
    write_latents(tmp_path / "latents", "train", latents, np.arange(24) % 4, {"num_classes": 4})
    return LatentStore.open(tmp_path / "latents")


def make_encoder() -> MAEEncoder:
    torch.manual_seed(0)
    model = LatentMAE(in_channels=2, base_channels=8, layers=(1, 1, 1, 1), num_classes=4, norm_groups=2)
    return MAEEncoder(model, drop_duplicates=True).requires_grad_(False)


def train(store, folder, field=RELEASE, ranks=ALONE, options=OPTIONS, **hardware) -> torch.Tensor:
    """The weights after it."""
    run = Run(0, HARDWARE.model_copy(update=hardware), ranks, folder)
    model, _ = train_generator(store, make_encoder(), options, field, run)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# What is drawn


def prepared(store, field=SECOND_BATCH, options=OPTIONS, ranks=ALONE, steps=3):
    training = GeneratorTraining(store, make_encoder(), options, field, Run(0, HARDWARE, ranks, Path()))
    return [training.prepare(step) for step in range(steps)]


@pytest.mark.parametrize("class_sampling", ["uniform", "pushed"])
def test_draws_do_not_depend_on_the_number_of_processes(store, class_sampling):
    options = OPTIONS.model_copy(update={"class_sampling": class_sampling, "push_per_step": 4})
    whole = prepared(store, options=options)
    shares = [prepared(store, options=options, ranks=Ranks(rank, 2, ALONE.device)) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name in ("classes", "omega", "positives", "unconditional"):
            mine = torch.cat([getattr(share[step], name) for share in shares])
            assert torch.equal(mine, getattr(batch, name)), name
        for what, drawn in batch.noise.items():
            for i in range(2):
                assert torch.equal(torch.cat([share[step].noise[what][i] for share in shares]), drawn[i])
    classes = [set(batch.classes.tolist()) for batch in whole]
    assert any(len(c) < 4 for c in classes) == (class_sampling == "pushed")  # a class may occur twice


def test_noise_of_large_latents_is_drawn_on_the_device(store, tmp_path, monkeypatch):
    """It is none of a batch's, another for every step, slot and use, and the same for any parts of a step."""
    monkeypatch.setattr(drift.training.drift, "DRAWN_BY_HOST", 0)
    run = Run(0, HARDWARE, ALONE, tmp_path)
    training = GeneratorTraining(store, make_encoder(), OPTIONS, SECOND_BATCH, run)
    batch = training.prepare(1)
    assert batch.step == 1 and all(noise is None for noise, _ in batch.noise.values())
    whole = training._noise_on_device("generated", 1, range(4))
    assert whole.shape == (4, 3, 2, 4, 4)
    assert torch.equal(training._noise_on_device("generated", 1, range(2, 4)), whole[2:])
    others = [
        training._noise_on_device(what, step, range(4)) for what, step in (("generated", 2), ("negatives", 1))
    ]
    draws = torch.cat([whole, *others]).flatten(1)
    assert len(draws.unique(dim=0)) == 12 and abs(float(draws.std()) - 1) < 0.1
    expected = train(store, tmp_path / "whole", SECOND_BATCH)
    parts = train(store, tmp_path / "parts", SECOND_BATCH, classes_per_pass=1)
    assert relative(parts, expected) < 1e-5
    monkeypatch.undo()
    assert relative(train(store, tmp_path / "host", SECOND_BATCH), expected) > 1e-5


def test_the_second_batch_is_another_draw_without_a_graph(store, tmp_path, monkeypatch):
    caught = []

    def objective(generated, *args, negatives, **kwargs):
        caught.extend([generated, negatives])
        raise ZeroDivisionError

    monkeypatch.setattr(drift.training.drift, "drift_objective", objective)
    # The output layer begins at zero: let it tell noises apart
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda tensor: torch.nn.init.constant_(tensor, 0.01))
    for field in (SECOND_BATCH, RELEASE):
        with pytest.raises(ZeroDivisionError):
            train(store, tmp_path, field)
    generated, negatives, alone, none = caught
    assert generated.shape == negatives.shape == (4, 3, 2, 4, 4)
    assert generated.requires_grad and not negatives.requires_grad
    assert ((generated - negatives).flatten(2).norm(dim=-1) > 1e-6).all()
    assert none is None and torch.equal(alone, generated)


@pytest.mark.parametrize(
    ("sampling", "class_sampling"), [("queue", "uniform"), ("queue", "pushed"), ("direct", "uniform")]
)
def test_real_samples_are_of_their_class_for_any_share_and_after_a_cut(store, sampling, class_sampling):
    options = OPTIONS.model_copy(update={"sampling": sampling, "class_sampling": class_sampling})
    real, share = RealSamples(store, options, seed=0), RealSamples(store, options, seed=0)
    for step in range(5):
        classes, of_class, of_any = real.draw(step, range(4))
        assert (store.labels[of_class] == classes[:, None]).all()
        assert of_class.shape == (4, 2) and of_any.shape == (4, 2)
        if step >= 2:  # of the steps before, it has seen nothing
            some = share.draw(step, range(2, 4))
            assert np.array_equal(some[0], classes)
            assert np.array_equal(some[1], of_class[2:]) and np.array_equal(some[2], of_any[2:])


def test_classes_are_those_of_images_just_pushed():
    """With as many pushed as classes are trained, they are the labels of these images, each as often."""
    update = {"class_sampling": "pushed", "push_per_step": 8, "classes_per_step": 8, "queue_global": 8}
    labels = np.repeat(np.random.default_rng(0).permutation(200) % 6, 2)
    store = SimpleNamespace(labels=labels, num_classes=6, class_names=list("012345"), per_image=2)
    real = RealSamples(store, OPTIONS.model_copy(update={**update, "unconditional": 8}), seed=0)
    for step in range(20):
        classes, _, of_any = real.draw(step, range(8))
        newest = of_any[0]  # all of a queue of the latest eight
        assert np.array_equal(np.sort(classes), np.sort(store.labels[newest]))
        assert len(set(classes)) < 8  # eight of six classes


@pytest.mark.parametrize(
    ("preset", "published"),
    [("imagenet256_ablation", 16), ("imagenet256_b2", 32), ("imagenet256_l2", 16), ("wflow_b2", 8)],
)
def test_a_class_is_trained_on_as_many_new_images_as_published(preset, published):
    """Images in the queue of a class that were not there when it was last trained, counted one by one."""
    options = load_settings(PRESETS / f"{preset}.yaml").drift
    everything = options.model_copy(update={"positives": options.queue_per_class, "unconditional": 0})
    images = 1_280_000
    labels = np.random.default_rng(0).permutation(images) % 1000
    names = [str(label) for label in range(1000)]
    store = SimpleNamespace(labels=labels, num_classes=1000, class_names=names, per_image=1)
    real = RealSamples(store, everything, seed=0)
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


# What is logged


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_every_line_of_the_log_tells_about_the_field(store, tmp_path, field):
    train(store, tmp_path / "run", field)
    lines = read_log(tmp_path / "run" / "logs.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    names = ["drift_rms", *ATTRACTION] + (["marginal_error"] if field.coupling == "sinkhorn" else [])
    for line in lines:
        sets = line["feature_sets"]
        assert {"conv1", "norm_x", "layer1_mean", "global"} <= sets.keys()
        for name in names:
            by_set = np.array([s[name] for s in sets.values()])
            assert by_set.shape == (len(sets), len(field.temps))
            for i, tau in enumerate(field.temps):
                assert line[f"{name}_{tau:g}"] == pytest.approx(by_set[:, i].mean(), rel=1e-3)
            assert line[name] == pytest.approx(by_set.mean(), rel=1e-3)
        of_sets = [s["loss"] for s in sets.values()]
        total = np.mean(of_sets) if field.feature_sets == "mean" else np.sum(of_sets)
        assert line["loss"] == pytest.approx(total, rel=1e-3)
        assert line["scale"] == pytest.approx(np.mean([s["scale"] for s in sets.values()]), rel=1e-3)
        assert 1 <= line["neighbours"] <= OPTIONS.positives
        assert 0 <= line["row_entropy"] <= np.log(OPTIONS.positives) + 1e-6
        assert 0 <= line["unused_positives"] < 1
    write_plot(tmp_path / "run" / "logs.jsonl", tmp_path / "plot.csv", plot_columns(field))
    header = (tmp_path / "plot.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "scale", "lr", *names, *(f"{n}_{t:g}" for n in names for t in field.temps)} <= set(header)


# How it starts, and how a step is taken


def test_a_run_starts_from_another_generator(store, tmp_path):
    """Network and EMAs from its first EMA, whose weights are not those of the network behind it."""
    decays = OPTIONS.model_copy(update={"ema_decays": (0.5, 0.9)})
    model, emas = train_generator(store, make_encoder(), decays, RELEASE, Run(0, HARDWARE, ALONE, tmp_path))
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = emas[0].state_dict()
    assert not torch.equal(wanted["final.output.weight"], last["final.output.weight"])
    options = decays.model_copy(update={"init_from": str(export_run(model, emas, tmp_path, {}))})
    task = GeneratorTraining(store, make_encoder(), options, RELEASE, Run(1, HARDWARE, ALONE, tmp_path))
    learner = Learner(task, ALONE)
    for state in (learner.model.state_dict(), *(ema.state_dict() for ema in learner.emas)):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    other = options.model_copy(update={"style_entries": 5})
    with pytest.raises(UserError, match="its style_entries is 16, and that of this run is 5"):
        GeneratorTraining(store, make_encoder(), other, RELEASE, Run(1, HARDWARE, ALONE, tmp_path))


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_steps_without_a_line_are_the_same_steps_with_less_to_compute(store, tmp_path, monkeypatch, field):
    asked = []

    def objective(*samples, execution, **kwargs):
        asked.append(execution.attraction)
        return drift_objective(*samples, execution=execution, **kwargs)

    monkeypatch.setattr(drift.training.drift, "drift_objective", objective)
    options = OPTIONS.model_copy(update={"steps": 6})
    every, some = (train(store, tmp_path / str(n), field, options=options, log_every=n) for n in (1, 3))
    assert torch.equal(every, some)
    assert asked == [True] * 6 + [True, False, False, True, False, True]
    lines, kept = (read_log(tmp_path / name / "logs.jsonl") for name in "13")
    assert [line["step"] for line in kept] == [0, 3, 5]
    for line in kept:
        assert {**line, "time": 0} == {**lines[line["step"]], "time": 0}


# How a step is taken


IDLE = {
    "direct": (
        {"sampling": "direct", "lr_schedule": "constant", "style_codebooks": 0, "no_guidance_fraction": 1.0},
        {
            "lr_final": 0.5, "warmup_start_lr": 0.1, "style_entries": 3, "queue_per_class": 1,
            "queue_global": 1, "push_per_step": 1, "omega_min": 1.5, "omega_max": 9.0, "omega_exponent": 1.0,
            "evaluate_images": 1, "evaluate_omegas": (4.0,),
        },
    ),
    "one_omega": (
        {"omega_min": 2.0, "omega_max": 2.0, "unconditional": 0},
        {
            "omega_exponent": 1.0, "queue_global": 1, "warmup_start_lr": 0.1, "evaluate_images": 1,
            "evaluate_omegas": (4.0,),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "turned"), IDLE.values(), ids=IDLE)
def test_settings_that_are_declared_without_effect_change_no_bit(store, tmp_path, options, turned):
    options = OPTIONS.model_copy(update=options)
    assert options.without_effect().keys() == turned.keys()
    one = train(store, tmp_path / "one", options=options)
    other = train(store, tmp_path / "other", options=options.model_copy(update=turned))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "hardware",
    [
        {"classes_per_pass": 3, "feature_batch": 5},
        {"classes_per_pass": 1, "feature_batch": 4, "activation_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("field", [RELEASE, SECOND_BATCH], ids=["release", "second"])
def test_a_step_in_less_memory_is_the_same_step(store, tmp_path, field, hardware):
    one, other = train(store, tmp_path / "whole", field), train(store, tmp_path / "parts", field, **hardware)
    assert relative(other, one) < 1e-5
    assert_equal_logs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("classes_per_pass", [2, 4])
def test_passes_over_whole_parts_change_no_number(store, tmp_path, classes_per_pass):
    """Of W-Flow's field, for which a pass computes its features once."""
    one = train(store, tmp_path / "whole", PARTS)
    other = train(store, tmp_path / "parts", PARTS, classes_per_pass=classes_per_pass)
    assert relative(other, one) < 1e-6
    assert_equal_logs(tmp_path / "parts", tmp_path / "whole")
    assert relative(train(store, tmp_path / "all", WFLOW), one) > 1e-5


def test_parts_that_a_process_does_not_have_whole_are_refused(store):
    with pytest.raises(
        UserError, match="classes_per_part = 2: no divisor of the 1 classes of each of 4 proc"
    ):
        prepared(store, PARTS, ranks=Ranks(0, 4, ALONE.device))


def assert_equal_logs(found: Path, wanted: Path) -> None:
    lines, expected = (read_log(folder / "logs.jsonl") for folder in (found, wanted))
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "drift_rms", *ATTRACTION, "scale", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name


SHARED = (("release", RELEASE), ("second", SECOND_BATCH), ("wflow", PARTS))


@pytest.mark.parametrize(
    ("field", "at_once"), [(RELEASE, 4), (RELEASE, 1), (WFLOW, 4)], ids=["release", "in parts", "wflow"]
)
def test_a_step_has_the_temperatures_of_its_place(store, monkeypatch, field, at_once):
    """Four times `temps` first, twice in the middle, `temps` at the end: loss and gradient say so."""
    caught = []

    def objective(*samples, negatives, **kwargs):
        caught.append([*samples[:4], negatives])
        return drift_objective(*samples, negatives=negatives, **kwargs)

    monkeypatch.setattr(drift.training.drift, "drift_objective", objective)
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda tensor: torch.nn.init.constant_(tensor, 0.01))
    options = OPTIONS.model_copy(update={"temps_start": 4.0, "steps": 3})
    training = GeneratorTraining(store, LatentEncoder(), options, field, Run(0, HARDWARE, ALONE, Path()))
    for step, factor in ((0, 4), (1, 2), (2, 1)):
        caught.clear()
        batch, slices = training.prepare(step), parts(4, at_once)
        totals = training.totals(training.model, batch, slices)
        losses = [training.loss(training.model, batch, part, totals)[0] for part in slices]
        *sets, omega, negatives = zip(*caught, strict=True)
        grad = torch.cat(torch.autograd.grad(sum(losses) / len(losses), sets[0])).flatten(2)

        # One feature set, the whole latent: [Nc, *, 1, C*H*W]
        vectors = [torch.cat(t).detach().flatten(2)[:, :, None] for t in sets]
        second = negatives[0].flatten(2)[:, :, None] if negatives[0] is not None else None
        x = vectors.pop(0).requires_grad_()
        at = replace(field, temps=tuple(factor * tau for tau in field.temps))
        expected, _ = drifting_loss(x, *vectors, torch.cat(omega), at, negatives=second)
        assert float(sum(losses) / len(losses)) == pytest.approx(float(expected), rel=1e-5)
        assert relative(grad, torch.autograd.grad(expected, x)[0][:, :, 0]) < 1e-5


SHARED = (("release", RELEASE), ("second", SECOND_BATCH))


def share_the_steps(ranks, folder):
    store = LatentStore.open(folder / "latents")
    for name, field in SHARED:
        per_pass = field.classes_per_part or 1
        weights = train(store, folder / f"{name}-run", field, ranks, classes_per_pass=per_pass)
        torch.save(weights, folder / f"{name}-{ranks.rank}.pt")


def test_a_step_by_two_processes_is_that_of_one(store, tmp_path):
    assert in_processes(share_the_steps, 2, tmp_path) == [0, 0]
    for name, field in SHARED:
        one, other = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert torch.equal(one, other)
        assert relative(one, train(store, tmp_path / name, field)) < 1e-5
        assert_equal_logs(tmp_path / f"{name}-run", tmp_path / name)


@pytest.mark.parametrize(
    "hardware", [{"activation_checkpointing": True}, {"latents_on_device": True}, {"prefetch": 0}], ids=str
)
def test_what_changes_no_sum_changes_no_bit(store, tmp_path, hardware):
    assert torch.equal(train(store, tmp_path / "one"), train(store, tmp_path / "other", **hardware))


RESUMED = {
    "float16": ({"precision": "float16"}, RELEASE, {}),
    "direct": ({"sampling": "direct"}, RELEASE, {}),
    "pushed": ({"class_sampling": "pushed"}, RELEASE, {"classes_per_pass": 1}),
    "class": ({"class_sampling": "pushed"}, SECOND_BATCH, {}),
}


@pytest.mark.parametrize(("options", "field", "hardware"), RESUMED.values(), ids=RESUMED)
def test_a_run_goes_on_to_the_same_bits(store, tmp_path, options, field, hardware):
    options = OPTIONS.model_copy(update={**options, "steps": 4})
    whole = train(store, tmp_path / "whole", field, options=options, **hardware)
    shutil.copytree(tmp_path / "whole" / "step-00000002", tmp_path / "resumed" / "step-00000002")
    resumed = train(store, tmp_path / "resumed", field, options=options, **hardware)
    assert whole.isfinite().all() and torch.equal(whole, resumed)


def test_half_precision_and_direct_sampling_train_otherwise(store, tmp_path):
    single = train(store, tmp_path / "single")
    for precision in ("float16", "bfloat16"):
        options = OPTIONS.model_copy(update={"precision": precision})
        for name, field in FIELDS.items():
            half = train(store, tmp_path / precision / name, field, options=options)
            assert half.isfinite().all()
            assert field != RELEASE or 0 < relative(half, single) < 0.1
    direct = OPTIONS.model_copy(update={"sampling": "direct"})
    assert not torch.equal(train(store, tmp_path / "direct", options=direct), single)


# torch.compile


def test_networks_whose_backward_pass_does_not_compile_train_uncompiled(store, tmp_path, monkeypatch, capsys):
    plain = train(store, tmp_path / "plain", feature_batch=4)

    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    compile, backend = torch.compile, aot_autograd(fw_compiler=nop, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, **how))
    assert torch.equal(train(store, tmp_path / "other", feature_batch=4, compile=True), plain)
    out = capsys.readouterr().out
    for name in ("Generator", "encoder"):
        assert out.count(f"torch.compile of the {name} has failed") == 1


@pytest.mark.large
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs on a CPU")
def test_compiled_networks_train_alike(store, tmp_path, capsys):
    plain, compiled = (train(store, tmp_path / str(on), compile=on) for on in (False, True))
    assert "has failed" not in capsys.readouterr().out
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert_equal_logs(tmp_path / "True", tmp_path / "False")
