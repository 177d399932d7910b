"""The training loop: the same bits after a cut, gradients averaged over processes, no step after a NaN."""

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import drift.training.loop
from drift.errors import Stopped
from drift.launch import Ranks
from drift.models.ema import EMA
from drift.params import Optimizer, load_settings
from drift.seeds import torch_generator
from drift.training.checkpoint import load_checkpoint
from drift.training.log import read_log
from drift.training.loop import train

ALONE = Ranks(0, 1, torch.device("cpu"))


def options(steps: int) -> Optimizer:
    return Optimizer(
        steps=steps,
        lr=0.1,
        lr_schedule="constant",
        lr_final=1.0,
        warmup_steps=0,
        warmup_start_lr=0.0,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        grad_clip=1.0,
    )


HARDWARE = load_settings(Path(__file__).parents[2] / "presets" / "digits.yaml").hardware.model_copy(
    update={"log_every": 1, "checkpoint_every": 3}
)


class Counter:
    """Stands for the sample queue: something with a state that the steps change and read."""

    def __init__(self):
        self.total = torch.zeros(1)

    def state_after(self, steps):
        return {"total": torch.tensor([steps * (steps - 1) / 2])}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


class Cut(Exception):
    pass


def run(
    folder: Path,
    steps: int = 8,
    cut_at: int | None = None,
    bad_at: int | None = None,
    signals: dict[int, signal.Signals] | None = None,
):
    torch.manual_seed(0)
    model, counter = nn.Linear(3, 2), Counter()

    def prepare(step):
        return torch.randn(4, 3, generator=torch_generator(0, "x", step))

    def compute(step, x, backward):
        if step == cut_at:
            raise Cut
        counter.total += step
        if signals and step in signals:
            os.kill(os.getpid(), signals[step])
        loss = (model(x) - 0.01 * counter.total).square().mean()
        if step == bad_at:
            loss = loss * float("nan")
        backward(loss)
        return {"loss": loss.detach(), "total": counter.total[0]}

    emas = train(
        model,
        prepare,
        compute,
        count=1,
        options=options(steps),
        ema_decays=[0.5, 0.9],
        hardware=HARDWARE,
        ranks=ALONE,
        folder=folder,
        what="test",
        extra=counter,
    )
    return model, emas


def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path):
    model, emas = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_at=5)
    assert load_checkpoint(tmp_path / "cut").step == 3
    resumed, resumed_emas = run(tmp_path / "cut")
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(emas, resumed_emas, strict=True):
        assert all(torch.equal(one.state_dict()[k], v) for k, v in other.state_dict().items())
    without_time = [
        [
            {k: v for k, v in line.items() if k not in ("steps_per_s", "time")}
            for line in read_log(tmp_path / n / "logs.jsonl")
        ]
        for n in ("whole", "cut")
    ]
    assert without_time[0] == without_time[1]
    assert [line["step"] for line in without_time[0]] == list(range(8))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_saves_the_step_and_goes_on_to_the_same_bits(tmp_path, number, code):
    model, _ = run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name} after step 5 of 8; saved") as caught:
        run(tmp_path / "stopped", signals={4: number})
    assert caught.value.code == code
    assert signal.getsignal(number) == before
    assert load_checkpoint(tmp_path / "stopped").step == 5
    resumed, _ = run(tmp_path / "stopped")
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_is_told_to_stop_at_its_last_step_is_finished(tmp_path):
    run(tmp_path, signals={7: signal.SIGTERM})
    assert load_checkpoint(tmp_path).step == 8


def test_a_run_that_is_told_to_save_does_so_and_goes_on(tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, signals={3: signal.SIGUSR1}, cut_at=5)  # the checkpoint before is of step 3
    assert load_checkpoint(tmp_path).step == 4


def test_a_finished_run_takes_no_more_steps(tmp_path):
    run(tmp_path)
    run(tmp_path, cut_at=0)


def test_each_ema_follows_its_decay(tmp_path):
    _, emas = run(tmp_path, steps=3)
    torch.manual_seed(0)
    expected = EMA(nn.Linear(3, 2), 0.9)
    for steps in (1, 2, 3):
        model, _ = run(tmp_path / str(steps), steps=steps)
        expected.update(model)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(emas[1].state_dict()[name], value)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(tmp_path, capsys):
    with pytest.raises(FloatingPointError, match="step 4") as caught:
        run(tmp_path, bad_at=4)
    assert caught.tb  # which keeps the progress bar alive
    assert capsys.readouterr().err.endswith("\n")  # what is told of it does not stand behind the bar
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("sizes", [[3], [1, 2, 3], [7, 1, 1], [2, 9, 2, 2], [5, 5]])
def test_gradients_are_sent_in_buckets(sizes, monkeypatch):
    monkeypatch.setattr(drift.training.loop, "_BUCKET", 4)
    tensors = [torch.zeros(size) for size in sizes]
    buckets = [[t.numel() for t in bucket] for bucket in drift.training.loop._buckets(tensors)]
    assert [size for bucket in buckets for size in bucket] == sizes
    assert all(sum(bucket) <= 4 or len(bucket) == 1 for bucket in buckets)
    assert all(sum(one) + other[0] > 4 for one, other in pairwise(buckets))  # as few as can be


def test_processes_average_their_gradients_bucket_by_bucket(monkeypatch):
    """Of two processes with the same parts: twice the sum, over twice as many."""
    monkeypatch.setattr(drift.training.loop, "_BUCKET", 4)
    ranks, sent = Ranks(0, 2, torch.device("cpu")), []
    monkeypatch.setattr(Ranks, "sum", lambda self, t: (sent.append(t.numel()), t.mul_(2))[1])
    model = nn.Linear(3, 2)
    parameters = list(model.parameters())
    gradients = drift.training.loop._Gradients(parameters, torch.amp.GradScaler("cpu", enabled=False))
    x = torch.randn(6, 3, generator=torch_generator(0, "x"))
    for part in x.split(2):
        gradients.backward(model(part).square().sum())
    gradients.average(12, ranks)
    assert sent == [6, 2]
    expected = torch.autograd.grad(model(x).square().sum() / 6, parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
