"""Between two lines of the log, nothing that a step does makes the host wait for its device.

Steps run on PyTorch's meta device, whose tensors have no numbers: whatever looks at one fails, as it would
wait on a GPU. What comes from the host must come from pinned memory, and without waiting for it.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import drift.data.latents
import drift.training.drift
import drift.training.loop
import drift.training.mae
from drift.data.latents import LatentStore, write_latents
from drift.features import MAEEncoder
from drift.field import FieldSettings
from drift.models import LatentMAE
from drift.runtime.processes import Ranks
from drift.settings import load_settings
from drift.training.checkpoint import Checkpoints
from drift.training.drift import train_generator
from drift.training.loop import Learner, Run
from drift.training.mae import train_mae

SETTINGS = load_settings(Path(__file__).parents[2] / "presets" / "digits.yaml")
DRIFT = SETTINGS.drift.model_copy(
    update={
        "hidden": 16, "depth": 1, "heads": 2, "style_codebooks": 2, "classes_per_step": 4, "generated": 3,
        "positives": 2, "unconditional": 2, "push_per_step": 16, "steps": 1, "warmup_steps": 0,
    }
)  # fmt: skip
MAE = SETTINGS.mae.model_copy(
    update={"width": 8, "norm_groups": 2, "batch_size": 8, "steps": 2, "finetune_steps": 1, "held_out": 0}
)
META = Ranks(0, 1, torch.device("meta"))


class Waits(AssertionError):
    pass


class NothingWaits(TorchFunctionMode):
    """Refuses what reads a tensor's numbers, or brings others to the device than those of pinned memory."""

    def __init__(self):
        super().__init__()
        self.pinned: set[int] = set()
        self.copies = 0

    def pin(self, tensor, device):
        self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("new_tensor", "tensor", "as_tensor") and _on_meta(*args, *kwargs.values()):
            raise Waits(f"{name} makes a tensor of the host's numbers on the device")
        if name == "to" and args[0].device.type == "cpu" and _on_meta(*args[1:], *kwargs.values()):
            if isinstance(args[0], torch.nn.Parameter):
                return function(*args, **kwargs)  # networks, before the first step
            if not kwargs.get("non_blocking"):
                raise Waits("a copy to the device that waits for it")
            if args[0].untyped_storage().data_ptr() not in self.pinned:
                raise Waits("a copy to the device from memory that is not pinned")
            self.copies += 1
        return function(*args, **kwargs)


def _on_meta(*arguments) -> bool:
    return any(str(getattr(argument, "device", argument)) == "meta" for argument in arguments)


@pytest.fixture
def device(monkeypatch):
    """A device that can do no more than the steps need, and the mode that watches over it."""
    mode = NothingWaits()
    for module in (drift.data.latents, drift.training.drift, drift.training.mae):
        monkeypatch.setattr(module, "pinned", mode.pin)
    adamw = torch.optim.AdamW  # the fused one takes no meta tensors; its steps are PyTorch's business
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **kwargs: adamw(*args, **kwargs))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    # What looks at numbers, now and then
    monkeypatch.setattr(drift.training.loop, "to_numbers", lambda values: {})
    monkeypatch.setattr(Learner, "require_finite", lambda self: None)
    monkeypatch.setattr(Learner, "tensors", lambda self: {})
    monkeypatch.setattr(Checkpoints, "save", lambda *args: None)
    monkeypatch.setattr(drift.training.loop.RunLog, "write", lambda *args: None)
    return mode


@pytest.fixture
def store(tmp_path) -> LatentStore:
    latents = np.random.default_rng(0).standard_normal((24, 2, 8, 8)).astype(np.float16)
    write_latents(tmp_path / "latents", "train", latents, np.arange(24) % 4, {"num_classes": 4})
    return LatentStore.open(tmp_path / "latents")


def train(store, folder, field, **changes):
    encoder = LatentMAE(in_channels=2, base_channels=8, layers=(1, 1, 1, 1), num_classes=4, norm_groups=2)
    hardware = SETTINGS.hardware.model_copy(update=changes)
    encoder = MAEEncoder(encoder).requires_grad_(False)
    train_generator(store, encoder, DRIFT, field, Run(0, hardware, META, folder))


@pytest.mark.parametrize(
    ("field", "hardware"),
    [
        (FieldSettings(), {}),
        (FieldSettings(), {"classes_per_pass": 2, "feature_batch": 4, "activation_checkpointing": True}),
        (FieldSettings(negatives="second_batch", drift_unit_vec=True), {}),
        (FieldSettings.sinkhorn(normalize_drift_theta=False, drift_tau_scale=True), {"classes_per_pass": 2}),
        (FieldSettings.sinkhorn(coupling="row", drift_form="split"), {"prefetch": 0}),
    ],
    ids=["release", "saving-memory", "second-batch", "tau-scale", "split"],
)
def test_a_step_of_the_generator_waits_for_nothing(store, tmp_path, device, field, hardware):
    with device:
        train(store, tmp_path / "run", field, **hardware)
    assert device.copies >= DRIFT.steps * 7  # noise, style, labels, omega (twice), positives, unconditional


def test_a_step_of_the_mae_waits_for_nothing(store, tmp_path, device):
    hardware = SETTINGS.hardware.model_copy(update={"mae_micro_batch": 4})
    with device:
        train_mae(store, MAE, Run(0, hardware, META, tmp_path / "run"))
    assert device.copies == MAE.steps * 2 * 3  # latents, labels, mask


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.new_tensor(3.0),
        lambda x: torch.tensor(3.0, device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: torch.ones(2).to(x.device, non_blocking=True),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
    ],
)
def test_what_waits_is_noticed(device, waits):
    with device, pytest.raises((Waits, RuntimeError, NotImplementedError)):
        waits(torch.ones(4, device="meta"))
