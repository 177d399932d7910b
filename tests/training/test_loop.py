"""The training loop: equal bits after a cut, one step by two processes, no step after a NaN."""

import gc
import os
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from processes import in_processes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from drift.models.ema import EMA
from drift.runtime.errors import Stopped
from drift.runtime.processes import Ranks
from drift.runtime.seeds import torch_generator
from drift.settings import Hardware, Optimizer
from drift.training.checkpoint import Checkpoints
from drift.training.log import read_log
from drift.training.loop import Run, Task, batches, train

ALONE = Ranks(0, 1, torch.device("cpu"))
HARDWARE = Hardware(log_every=1, checkpoint_every=3)


class Cut(Exception):
    pass


class Toy(Task):
    """Eight rows of three numbers; `look` is called at every step, and may stop it or spoil its loss."""

    name, ema_decays = "toy", (0.5, 0.9)

    def __init__(
        self, steps: int, look: Callable[[int], None], ranks: Ranks = ALONE, at_once: int | None = None
    ):
        self.options = Optimizer(
            steps=steps, lr=0.1, lr_schedule="constant", warmup_steps=0, betas=(0.9, 0.95), grad_clip=1.0
        )
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.look, self.mine, self.at_once = look, ranks.share(8, "rows"), at_once
        self.count = 8 // ranks.world_size

    def prepare(self, step):
        return step, torch.randn(8, 3, generator=torch_generator(0, "x", step))[self.mine]

    def totals(self, network, batch, parts):
        return self.look(batch[0])

    def loss(self, network, batch, part, totals):
        x = batch[1][part]
        value = network(x).square().mean() * (float("nan") if totals else 1)
        return value, {"of": {"mean": x.mean(dim=0)}}


def run(folder, steps=8, look=lambda step: None, ranks=ALONE, at_once=None, **hardware):
    task = Toy(steps, look, ranks, at_once)
    emas = train(task, Run(0, HARDWARE.model_copy(update=hardware), ranks, folder))
    return task.model, emas


def at(wanted: int, action: Callable[[], object]) -> Callable[[int], object]:
    return lambda step: action() if step == wanted else None


def cut():
    raise Cut


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def saved_step(folder: Path) -> int:
    return Checkpoints(folder).newest().step


def same_bits(one, other) -> bool:
    return all(torch.equal(one[name], value) for name, value in other.items())


def log_of(folder: Path) -> list[dict]:
    without = ("steps_per_s", "time")
    return [{k: v for k, v in line.items() if k not in without} for line in read_log(folder / "logs.jsonl")]


def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path):
    model, emas = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", look=at(5, cut))
    assert saved_step(tmp_path / "cut") == 3
    resumed, resumed_emas = run(tmp_path / "cut")
    assert same_bits(model.state_dict(), resumed.state_dict())
    assert all(same_bits(a.state_dict(), b.state_dict()) for a, b in zip(emas, resumed_emas, strict=True))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    assert [line["step"] for line in log_of(tmp_path / "cut")] == list(range(8))
    run(tmp_path / "cut", look=lambda step: cut())  # finished: takes no more steps


def test_a_run_that_goes_on_in_another_rounding_says_so(tmp_path, capsys):
    with pytest.raises(Cut):
        run(tmp_path, look=at(5, cut))
    with pytest.raises(Cut):
        run(tmp_path, look=at(4, cut), checkpoint_every=5, prefetch=0)  # which change no bit
    assert "rounding" not in capsys.readouterr().out
    run(tmp_path, deterministic=True, mae_micro_batch=8)
    said = "hardware.deterministic was False and is True, hardware.mae_micro_batch was None and is 8: "
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_saves_the_step_and_goes_on_to_the_same_bits(tmp_path, number, code):
    model, _ = run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name} after step 5 of 8; saved") as caught:
        run(tmp_path / "stopped", look=at(4, send(number)))
    assert caught.value.code == code and signal.getsignal(number) == before
    assert saved_step(tmp_path / "stopped") == 5
    resumed, _ = run(tmp_path / "stopped")
    assert same_bits(model.state_dict(), resumed.state_dict())


def test_a_stop_at_the_last_step_finishes_and_a_request_to_save_goes_on(tmp_path):
    run(tmp_path / "last", look=at(7, send(signal.SIGTERM)))
    assert saved_step(tmp_path / "last") == 8

    def look(step):
        at(3, send(signal.SIGUSR1))(step)
        at(5, cut)(step)

    with pytest.raises(Cut):
        run(tmp_path / "save", look=look)  # the checkpoint before is of step 3
    assert saved_step(tmp_path / "save") == 4


def test_each_ema_follows_its_decay(tmp_path):
    _, emas = run(tmp_path, steps=3)
    expected = EMA(Toy(1, cut).model, 0.9)
    for steps in (1, 2, 3):
        expected.update(run(tmp_path / str(steps), steps=steps)[0])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(emas[1].state_dict()[name], value)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_next_checkpoint(tmp_path, capsys):
    with pytest.raises(FloatingPointError, match="step 4") as caught:
        run(tmp_path, look=at(4, lambda: True))
    assert caught.tb  # which keeps the progress bar alive
    assert capsys.readouterr().err.endswith("\n")  # what is told of it does not stand behind the bar
    assert saved_step(tmp_path) == 3


def test_parts_of_a_step_add_up_to_the_whole(tmp_path):
    whole, _ = run(tmp_path / "whole")
    for at_once in (1, 3):  # equal parts, and one that is smaller
        model, _ = run(tmp_path / str(at_once), at_once=at_once)
        torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)
        of, expected = (log_of(tmp_path / folder)[-1]["of"]["mean"] for folder in (str(at_once), "whole"))
        assert of == pytest.approx(expected, rel=1e-3)


# Several processes


def share_the_steps(ranks, folder):
    model, emas = run(folder / "run", ranks=ranks, at_once=3)
    torch.save([model.state_dict(), emas[1].state_dict()], folder / f"{ranks.rank}.pt")
    with pytest.raises(RuntimeError):  # which `run_stage` knows
        run(folder / "lost", look=at(2, lambda: os._exit(7) if ranks.rank else None), ranks=ranks)
    os._exit(0)  # what is left of the group need not be waited for


def test_two_processes_take_the_steps_of_one_and_notice_that_the_other_is_lost(tmp_path):
    whole, emas = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "run", look=at(4, cut))  # so that both go on from what the first can read
    assert in_processes(share_the_steps, 2, tmp_path) == [0, 7]
    (one, ema), other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same_bits(one, other[0]) and same_bits(ema, other[1])
    torch.testing.assert_close(one, dict(whole.state_dict()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema, emas[1].state_dict(), rtol=1e-5, atol=1e-6)
    for line, expected in zip(log_of(tmp_path / "run"), log_of(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["of"]["mean"] == pytest.approx(expected["of"]["mean"], rel=1e-3)


# What is read ahead


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_batches_come_in_order_and_not_too_early(ahead):
    made, makers = [], set()

    def prepare(step):
        made.append(step)
        makers.add(threading.current_thread())
        return step**2

    for step, batch in enumerate(batches(prepare, 2, 8, ahead), start=2):
        assert batch == step**2 and len(made) <= step - 1 + ahead
    assert step == 7 and made == list(range(2, 8))
    assert len(makers) == 1 and (threading.main_thread() in makers) == (ahead == 0)
    assert list(batches(prepare, 8, 8, ahead)) == []


def tensor_bytes() -> int:
    """Bytes of all tensors in this process, memory that several share counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor):  # other tests compile
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_resumed_run_holds_no_more_than_a_fresh_one(tmp_path):
    held, before = {}, tensor_bytes()

    def look(step):
        held[step] = tensor_bytes() - before

    # Batches that are read ahead, and copies on their way to the disk, come and go when they will
    quiet = {"prefetch": 0, "checkpoint_every": 100}
    run(tmp_path / "whole", look=look, **quiet)
    whole = dict(held)
    with pytest.raises(Cut):
        run(tmp_path / "cut", look=at(5, cut))
    held.clear()
    before = tensor_bytes()  # other tests may have left some
    run(tmp_path / "cut", look=look, **quiet)
    assert held.keys() == {3, 4, 5, 6, 7}
    assert all(held[step] <= whole[step] for step in held), (held, whole)


def test_an_error_reaches_the_step_it_belongs_to():
    found = batches(lambda step: 1 // (step - 4), 0, 8, 3)
    assert [next(found) for _ in range(4)] == [-1, -1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_leaving_early_waits_for_one_call_and_makes_no_more():
    made, begun, go_on = [], threading.Event(), threading.Event()

    def prepare(step):
        if step == 1:
            begun.set()
            assert go_on.wait(10)
        made.append(step)

    with closing(batches(prepare, 0, 20, 3)) as found:
        next(found)
        assert begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
    assert made == [0, 1]
