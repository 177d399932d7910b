"""Training of the MAE: its loss, what is held out, parts of a batch, and what is logged."""

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
from drift.settings import Hardware, load_settings
from drift.training.log import read_log, write_plot
from drift.training.loop import Run
from drift.training.mae import (
    HELD_OUT_COLUMNS,
    PLOT_COLUMNS,
    adopt_encoder,
    class_share,
    mae_loss,
    open_encoder,
    train_mae,
)

OPTIONS = load_settings(Path(__file__).parents[2] / "presets" / "digits.yaml").mae.model_copy(
    update={
        "width": 8, "norm_groups": 2, "batch_size": 10, "steps": 4, "warmup_steps": 0, "finetune_steps": 2,
        "finetune_ramp_steps": 1, "held_out": 3, "evaluate_every": 2,
    }
)  # fmt: skip
HARDWARE = Hardware(log_every=1, checkpoint_every=2)
CROPS = 2


@pytest.fixture
def store(tmp_path) -> LatentStore:
    """Twelve images of two crops, one class after the other."""
    latents = np.random.default_rng(0).standard_normal((24, 2, 8, 8)).astype(np.float16)
    meta = {"num_classes": 4, "view": "augmented", "crops": CROPS, "images": 12}
    write_latents(tmp_path / "latents", "train", latents, np.arange(24) // 6, meta)
    return LatentStore.open(tmp_path / "latents")


def run_in(folder: Path, **hardware) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(0, HARDWARE.model_copy(update=hardware), Ranks(0, 1, torch.device("cpu")), folder)


def train(store, folder, update=None, **hardware) -> torch.Tensor:
    """The weights after it."""
    options = OPTIONS.model_copy(update=update or {})
    return weights(train_mae(store, options, run_in(folder, **hardware))[0])


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_settings_that_are_declared_without_effect_change_no_bit(store, tmp_path):
    options = {"finetune_steps": 0, "held_out": 0, "lr_schedule": "constant"}
    turned = {
        "finetune_weight": 0.7, "finetune_ramp_steps": 3, "evaluate_every": 1, "lr_final": 0.5,
        "warmup_start_lr": 0.1,
    }  # fmt: skip
    assert OPTIONS.model_copy(update=options).without_effect().keys() == turned.keys()
    one, other = train(store, tmp_path / "one", options), train(store, tmp_path / "other", options | turned)
    assert torch.equal(one, other)
    assert not any("held_out" in line for line in read_log(tmp_path / "one" / "logs.jsonl"))


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
    update = {"steps": 10, "finetune_steps": 6, "finetune_ramp_steps": ramp, "finetune_weight": 0.5}
    found = [class_share(step, OPTIONS.model_copy(update=update)) for step in range(10)]
    assert found == [0] * 4 + [0.5 * share for share in shares]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_micro_batches_add_up_to_the_batch(store, tmp_path, size):
    whole, parts = train(store, tmp_path / "whole"), train(store, tmp_path / "parts", mae_micro_batch=size)
    # Adam makes a step of full length of a gradient that is 0 but for rounding, and few latents make many
    assert (parts - whole).norm() < 3e-3 * whole.norm()
    logs = (read_log(tmp_path / run / "logs.jsonl") for run in ("parts", "whole"))
    for line, expected in zip(*logs, strict=True):
        for name in line.keys() & {"loss", "reconstruction", "accuracy", "grad_norm"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4 if line["step"] == 1 else 0.1), name


def test_how_latents_come_changes_no_bit(store, tmp_path):
    one = train(store, tmp_path / "one")
    assert torch.equal(train(store, tmp_path / "other", latents_on_device=True, prefetch=0), one)


def test_float16_trains_nearly_alike(store, tmp_path):
    half, single = (
        train(store, tmp_path / "half", {"precision": "float16"}),
        train(store, tmp_path / "single"),
    )
    assert 0 < (half - single).norm() < 0.1 * single.norm()


def test_held_out_images_are_measured_by_the_averaged_weights_and_never_trained_on(
    store, tmp_path, monkeypatch
):
    seen, read = [], LatentStore.read
    monkeypatch.setattr(
        LatentStore, "read", lambda self, rows, **how: (seen.append(rows), read(self, rows))[1]
    )
    options = OPTIONS.model_copy(update={"steps": 20, "evaluate_every": 20})
    model, (ema,) = train_mae(store, options, run_in(tmp_path / "run", prefetch=0))
    trained, held_out = np.unique(np.concatenate(seen[:-1])), seen[-1]
    assert len(held_out) == 3 * CROPS and len(trained) == 24 - 3 * CROPS
    assert not set(trained) & set(held_out)
    images = held_out // CROPS
    assert (np.bincount(images)[np.unique(images)] == CROPS).all()  # all crops of each

    averaged = LatentMAE.from_config(model.config)
    averaged.load_state_dict(ema.state_dict())
    errors = []
    for row in held_out:
        mask = draw_mask((1, 4, 4), OPTIONS.mask_ratio, torch_generator(0, "mae/held_out", int(row)))
        with torch.no_grad():
            errors.append(averaged(store.rows(row[None]), mask)[0].item())
    assert read_log(tmp_path / "run/logs.jsonl")[-1]["held_out"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_plots_have_the_steps_at_which_something_was_measured(store, tmp_path):
    train(store, tmp_path)
    for columns, steps in ((PLOT_COLUMNS, [0, 1, 2, 3]), (HELD_OUT_COLUMNS, [1, 3])):
        write_plot(tmp_path / "logs.jsonl", tmp_path / "plot.csv", columns)
        header, *rows = (tmp_path / "plot.csv").read_text().splitlines()
        assert header == ",".join(["step", *columns])
        assert [int(row.split(",")[0]) for row in rows] == steps


def test_too_many_held_out_are_refused(store, tmp_path):
    with pytest.raises(UserError, match=r"mae.held_out = 12: allowed: fewer than the 12 images"):
        train(store, tmp_path, {"held_out": 12})


def test_an_encoder_is_adopted_as_it_is_with_its_error_on_the_latents(store, tmp_path):
    model, _ = train_mae(store, OPTIONS, run_in(tmp_path / "source"))
    model.save_pretrained(tmp_path / "source")
    source = open_encoder(str(tmp_path / "source"), store)
    adopted, (copy,) = adopt_encoder(source, tmp_path / "source", store, OPTIONS, run_in(tmp_path / "run"))
    copy.copy_to(adopted)
    assert torch.equal(weights(adopted), weights(model))
    *log, line = read_log(tmp_path / "run/logs.jsonl")
    assert log == read_log(tmp_path / "source/logs.jsonl")
    assert line["step"] == 3 and 0 < line["held_out"] < float("inf")


def test_a_source_that_is_missing_or_for_other_latents_is_refused(store, tmp_path):
    with pytest.raises(UserError, match=r"mae.source = .*there is no config.json in it"):
        open_encoder(str(tmp_path), store)
    train_mae(store, OPTIONS, run_in(tmp_path / "run"))[0].save_pretrained(tmp_path / "two")
    store.latents = np.zeros((24, 4, 8, 8), np.float16)
    with pytest.raises(UserError, match=r"an encoder of 2 channels, but the latents in .* have 4"):
        open_encoder(str(tmp_path / "two"), store)
