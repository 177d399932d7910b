"""The training loop: the same bits after a cut, gradients averaged over processes, no step after a NaN."""

import gc
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processes import in_processes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import drift.training.loop
from drift.models.ema import EMA
from drift.runtime.errors import Stopped
from drift.runtime.processes import Ranks
from drift.runtime.seeds import torch_generator
from drift.runtime.sums import PairwiseSum, pairwise_sum
from drift.settings import Optimizer, load_settings
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
        precision="float32",
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
    look: Callable[[int], None] = lambda step: None,
    **hardware,
):
    """`look` is called at every step."""
    torch.manual_seed(0)
    model, counter = nn.Linear(3, 2), Counter()

    def prepare(step):
        return torch.randn(4, 3, generator=torch_generator(0, "x", step))

    def compute(step, x, backward):
        look(step)
        if step == cut_at:
            raise Cut
        counter.total += step
        if signals and step in signals:
            os.kill(os.getpid(), signals[step])
        loss = (model(x) - 0.01 * counter.total).square().mean()
        if step == bad_at:
            loss = loss * float("nan")
        backward(loss, last=True)
        return {"loss": loss.detach(), "total": counter.total[0]}

    emas = train(
        model,
        prepare,
        compute,
        count=1,
        options=options(steps),
        ema_decays=[0.5, 0.9],
        hardware=HARDWARE.model_copy(update=hardware),
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


def tensor_bytes() -> int:
    """Bytes of all tensors in this process, memory that several share counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor):  # other tests compile
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_resumed_run_holds_no_more_than_a_fresh_one(tmp_path):
    """Neither tensors of the checkpoint nor its file, which is mapped while it is read."""
    held, mapped = {}, {}

    def look(step):
        held[step] = tensor_bytes()
        mapped[step] = "tensors.safetensors" in Path("/proc/self/maps").read_text()

    run(tmp_path / "whole", look=look, prefetch=0)  # batches that are read ahead come when they will
    whole = dict(held)
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut_at=5)
    held.clear(), mapped.clear()
    run(tmp_path / "cut", look=look, prefetch=0)
    assert held.keys() == {3, 4, 5, 6, 7}
    assert all(held[step] <= whole[step] for step in held), (held, whole)
    assert not any(mapped.values())


def test_a_run_that_goes_on_in_another_rounding_says_so(tmp_path, capsys):
    with pytest.raises(Cut):
        run(tmp_path, cut_at=5)
    with pytest.raises(Cut):
        run(tmp_path, cut_at=4, checkpoint_every=5, prefetch=0)  # which change no bit
    assert "rounding" not in capsys.readouterr().out
    run(tmp_path, compile=True, mae_micro_batch=8)
    told = "hardware.compile was False and is True, hardware.mae_micro_batch was None and is 8: "
    assert f"test: {told}the result will differ by rounding" in capsys.readouterr().out


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


def gradients_of(parameters, ranks=ALONE):
    return drift.training.loop._Gradients(parameters, torch.amp.GradScaler("cpu", enabled=False), ranks)


@pytest.mark.parametrize("sizes", [[3], [1, 2, 3], [7, 1, 1], [2, 9, 2, 2], [5, 5]])
def test_gradients_are_sent_in_buckets(sizes, monkeypatch):
    monkeypatch.setattr(drift.training.loop, "_BUCKET", 4)
    gradients = gradients_of([nn.Parameter(torch.zeros(size)) for size in sizes])
    found = gradients._in_buckets(range(len(sizes)))
    buckets = [[sizes[index] for index in bucket] for bucket in found]
    assert [size for bucket in buckets for size in bucket] == sizes
    assert all(sum(bucket) <= 4 or len(bucket) == 1 for bucket in buckets)
    assert all(sum(one) + other[0] > 4 for one, other in pairwise(buckets))  # as few as can be


class Branches(nn.Module):
    """Gradients that come in another order than that of the parameters, reversed; or not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.last = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2)
        self.unused, self.of_the_first = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.stem = nn.Linear(3, 3)

    def forward(self, x, rank):
        x = self.stem(x)
        branches = (self.left, self.right) if rank % 2 else (self.right, self.left)
        one, other = (branch(x).tanh() for branch in branches)
        return self.last(one * other) * (self.of_the_first if rank == 0 else 1)


def losses_of(model, rank, step, count):
    """Of sizes so far apart that the order of additions shows."""
    for part in range(count):
        x = torch.randn(4, 3, generator=torch_generator(0, "x", rank, step, part))
        yield 10.0 ** (3 * part % 5 - rank) * model(x, rank).square().sum()


PARTS = (1, 3, 4, 7)


def average_while_they_come(ranks, folder):
    drift.training.loop._BUCKET = 12
    model, results = Branches(), []
    for count in PARTS:
        gradients = gradients_of(list(model.parameters()), ranks)
        for step in range(3):  # after the first, buckets are in another order
            for part, loss in enumerate(losses_of(model, ranks.rank, step, count)):
                gradients.backward(loss, last=part == count - 1)
            gradients.average(count * ranks.world_size)
            results.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.save(results, folder / f"{ranks.rank}.pt")


@pytest.mark.parametrize("world_size", [2])
def test_gradients_sent_during_the_backward_pass_have_the_bits_of_those_sent_after_it(tmp_path, world_size):
    assert in_processes(average_while_they_come, world_size, tmp_path) == [0] * world_size
    model, expected = Branches(), []
    parameters = list(model.parameters())
    for count in PARTS:
        for step in range(3):
            of_processes = []
            for rank in range(world_size):
                total = PairwiseSum()
                for loss in losses_of(model, rank, step, count):
                    total.add(torch.autograd.grad(loss, parameters, materialize_grads=True))
                of_processes.append(total.total())
            sums = (pairwise_sum([g.clone() for g in those]) for those in zip(*of_processes, strict=True))
            expected.append([gradient / (count * world_size) for gradient in sums])
    for rank in range(world_size):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for result, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(result, wanted, strict=True))


def test_buckets_are_sent_before_the_backward_pass_has_ended(monkeypatch):
    """Of two processes with the same parts: twice the sum, over twice as many; only the last pass sends."""
    monkeypatch.setattr(drift.training.loop, "_BUCKET", 12)  # a layer
    events = []
    monkeypatch.setattr(Ranks, "sum", lambda self, t: (events.append(t.numel()), t.mul_(2))[1])
    monkeypatch.setattr(Ranks, "from_first", lambda self, value: value)
    stem, *layers = (nn.Linear(3, 3) for _ in range(3))
    model = nn.Sequential(stem, *layers)
    parameters = [*layers[0].parameters(), *layers[1].parameters(), *stem.parameters()]  # the stem comes late
    for name, layer in zip("abc", (stem, *layers), strict=True):
        layer.weight.register_hook(lambda gradient, name=name: events.append(name))
    x = torch.randn(6, 3, generator=torch_generator(0, "x"))
    gradients = gradients_of(parameters, Ranks(0, 2, torch.device("cpu")))
    expected = torch.autograd.grad(model(x).square().sum() / 6, parameters)
    for order in ([*"cba", 12, 12, 12], ["c", 12, "b", 12, "a", 12]):
        events.clear()
        for part in range(3):
            gradients.backward(model(x[2 * part : 2 * part + 2]).square().sum(), last=part == 2)
        gradients.average(12)
        assert events == [*"cba", *"cba", *order]
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def die_during_the_backward_pass(ranks, folder):
    drift.training.loop._BUCKET = 1
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    loss = model(torch.ones(1, 3)).sum()
    if ranks.rank == 1:
        model[0].weight.register_hook(lambda gradient: os._exit(7))
    with pytest.raises(RuntimeError, match="gloo"):
        gradients_of(list(model.parameters()), ranks).backward(loss, last=True)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    os._exit(0)  # what is left of the group need not be waited for


def test_a_process_that_is_lost_during_the_backward_pass_is_told_as_ever(tmp_path):
    assert in_processes(die_during_the_backward_pass, 2, tmp_path) == [0, 7]
