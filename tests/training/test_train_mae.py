"""Training of the MAE: parts of a batch, what is held out, and what is logged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import golden_config, golden_numbers, golden_params

from drift.data.latents import LatentStore, write_latents
from drift.interop.release import convert_mae
from drift.models import LatentMAE
from drift.models.mae import draw_mask
from drift.runtime.errors import UserError
from drift.runtime.processes import Ranks
from drift.runtime.seeds import torch_generator
from drift.settings import load_settings
from drift.training.log import read_log, write_plot
from drift.training.loop import Run
from drift.training.mae import HELD_OUT_COLUMNS, PLOT_COLUMNS, class_share, mae_loss, train_mae

SETTINGS = load_settings(Path(__file__).parents[2] / "presets" / "digits.yaml")
OPTIONS = SETTINGS.mae.model_copy(
    update={
        "width": 8, "norm_groups": 2, "batch_size": 10, "steps": 4, "warmup_steps": 0, "finetune_steps": 2,
        "finetune_ramp_steps": 1, "held_out": 3, "evaluate_every": 2,
    }
)  # fmt: skip
HARDWARE = SETTINGS.hardware.model_copy(update={"log_every": 1, "checkpoint_every": 2})
CROPS = 2


@pytest.fixture
def store(tmp_path) -> LatentStore:
    """Twelve images of two crops, one class after the other."""
    latents = np.random.default_rng(0).standard_normal((24, 2, 8, 8)).astype(np.float16)
    meta = {"num_classes": 4, "view": "augmented", "crops": CROPS, "images": 12}
    write_latents(tmp_path / "latents", "train", latents, np.arange(24) // 6, meta)
    return LatentStore.open(tmp_path / "latents")


def train(store, folder, options=OPTIONS, **hardware):
    hardware = HARDWARE.model_copy(update=hardware)
    model, (ema,) = train_mae(store, options, Run(0, hardware, Ranks(0, 1, torch.device("cpu")), folder))
    return model, ema


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_settings_that_are_declared_without_effect_change_no_bit(store, tmp_path):
    options = OPTIONS.model_copy(update={"finetune_steps": 0, "held_out": 0, "lr_schedule": "constant"})
    turned = {
        "finetune_weight": 0.7, "finetune_ramp_steps": 3, "evaluate_every": 1, "lr_final": 0.5,
        "warmup_start_lr": 0.1,
    }  # fmt: skip
    assert options.without_effect().keys() == turned.keys()
    one, _ = train(store, tmp_path / "one", options)
    other, _ = train(store, tmp_path / "other", options.model_copy(update=turned))
    assert torch.equal(weights(one), weights(other))


@pytest.mark.parametrize("share", [0, 0.1])
@pytest.mark.parametrize("folder", ["release_mae", "release_mae_pixel"])
def test_loss_and_gradients_are_the_releases(folder, share):
    """In float64: one ReLU of the pixels' example has an input of 5e-9, whose sign float32 gets wrong."""
    expected = {n: torch.from_numpy(a) for n, a in golden_numbers(folder, "training.npz").items()}
    model = convert_mae(golden_params(folder), golden_config(folder)).train().double()
    x, mask, labels = expected["x"].permute(0, 3, 1, 2).double(), expected["mask"], expected["labels"]
    of = {name.partition("/")[2]: value for name, value in expected.items() if f"lambda_{share}/" in name}

    per_sample, logits = model(x, mask)
    torch.testing.assert_close(per_sample, of["recon_loss"], rtol=1e-4, atol=0)
    entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(entropy.float(), of["cls_loss"], rtol=1e-4, atol=0)

    loss, reconstruction, _ = mae_loss(model, x, mask, labels, share)
    assert loss.item() == pytest.approx(of["loss"].mean().item(), rel=1e-4)
    assert reconstruction.item() == pytest.approx(of["recon_loss"].mean().item(), rel=1e-4)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert norm.item() == pytest.approx(of["grad_norm"].item(), rel=1e-4)
    for path, found in (
        ("decoder/head/bias", model.decoder.head.bias.grad),
        ("encoder/conv1/kernel", model.encoder.stem.conv.weight.grad.permute(2, 3, 1, 0)),
        ("fc/kernel", model.classifier.weight.grad.T),
    ):
        wanted = of[f"grad/{path}"]
        assert (found - wanted).norm() <= 1e-4 * wanted.norm(), path


@pytest.mark.parametrize(
    ("ramp", "shares"), [(4, [0, 0.25, 0.5, 0.75, 1, 1]), (1, [0, 1, 1, 1, 1, 1]), (0, [1] * 6)]
)
def test_the_share_of_the_class_loss_rises_from_0(ramp, shares):
    options = OPTIONS.model_copy(
        update={"steps": 10, "finetune_steps": 6, "finetune_ramp_steps": ramp, "finetune_weight": 0.5}
    )
    found = [class_share(step, options) for step in range(10)]
    assert found == [0] * 4 + [0.5 * share for share in shares]


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_micro_batches_add_up_to_the_batch(store, tmp_path, size):
    whole, _ = train(store, tmp_path / "whole")
    parts, _ = train(store, tmp_path / "parts", mae_micro_batch=size)
    # Adam makes a step of full length of a gradient that is 0 but for rounding, and few latents make many
    assert (weights(parts) - weights(whole)).norm() < 3e-3 * weights(whole).norm()
    for line, expected in zip(
        *(read_log(tmp_path / run / "logs.jsonl") for run in ("parts", "whole")), strict=True
    ):
        for name in ("loss", "reconstruction", "accuracy", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4 if line["step"] == 1 else 0.1), name


@pytest.mark.parametrize("hardware", [{"latents_on_device": True}, {"prefetch": 0}], ids=str)
def test_how_latents_come_changes_no_bit(store, tmp_path, hardware):
    one, _ = train(store, tmp_path / "one")
    other, _ = train(store, tmp_path / "other", **hardware)
    assert torch.equal(weights(one), weights(other))


def test_float16_goes_on_to_the_same_bits(store, tmp_path):
    options = OPTIONS.model_copy(update={"precision": "float16"})
    whole, _ = train(store, tmp_path / "whole", options)
    shutil.copytree(tmp_path / "whole" / "step-00000002", tmp_path / "resumed" / "step-00000002")
    resumed, _ = train(store, tmp_path / "resumed", options)
    assert torch.equal(weights(whole), weights(resumed))
    single, _ = train(store, tmp_path / "single")
    assert 0 < (weights(whole) - weights(single)).norm() < 0.1 * weights(single).norm()


def seen_rows(store, folder, monkeypatch, options=OPTIONS) -> list[np.ndarray]:
    """Rows that are read from the store, call after call."""
    seen = []
    read = LatentStore.read
    monkeypatch.setattr(LatentStore, "read", lambda self, rows: (seen.append(rows), read(self, rows))[1])
    train(store, folder, options, prefetch=0)
    monkeypatch.undo()
    return seen


def test_held_out_images_are_never_trained_on(store, tmp_path, monkeypatch):
    seen = seen_rows(
        store, tmp_path, monkeypatch, OPTIONS.model_copy(update={"steps": 20, "evaluate_every": 20})
    )
    trained, held_out = np.unique(np.concatenate(seen[:-1])), seen[-1]
    assert len(held_out) == 3 * CROPS and len(trained) == 24 - 3 * CROPS
    assert not set(trained) & set(held_out)
    images = held_out // CROPS
    assert (np.bincount(images)[np.unique(images)] == CROPS).all()  # all crops of each


def test_held_out_error_is_that_of_the_averaged_weights(store, tmp_path, monkeypatch):
    held_out = seen_rows(store, tmp_path, monkeypatch)[-1]
    model, ema = train(store, tmp_path)  # only loads what is finished
    averaged = LatentMAE.from_config(model.config)
    averaged.load_state_dict(ema.state_dict())
    errors = []
    for row in held_out:
        mask = draw_mask((1, 4, 4), OPTIONS.mask_ratio, torch_generator(0, "mae/held_out", int(row)))
        with torch.no_grad():
            errors.append(averaged(store.rows(row[None]), mask)[0].item())
    lines = read_log(tmp_path / "logs.jsonl")
    assert [line["step"] for line in lines if "held_out" in line] == [1, 3]
    assert lines[-1]["held_out"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_plots_have_the_steps_at_which_something_was_measured(store, tmp_path):
    train(store, tmp_path)
    for columns, steps in ((PLOT_COLUMNS, [0, 1, 2, 3]), (HELD_OUT_COLUMNS, [1, 3])):
        write_plot(tmp_path / "logs.jsonl", tmp_path / "plot.csv", columns)
        header, *rows = (tmp_path / "plot.csv").read_text().splitlines()
        assert header == ",".join(["step", *columns])
        assert [int(row.split(",")[0]) for row in rows] == steps


def test_nothing_held_out_is_nothing_measured(store, tmp_path):
    train(store, tmp_path, OPTIONS.model_copy(update={"held_out": 0}))
    assert not any("held_out" in line for line in read_log(tmp_path / "logs.jsonl"))


def test_too_many_held_out_are_refused(store, tmp_path):
    with pytest.raises(UserError, match=r"mae.held_out = 12: allowed: fewer than the 12 images"):
        train(store, tmp_path, OPTIONS.model_copy(update={"held_out": 12}))
