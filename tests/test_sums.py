"""Sums that do not depend on who has computed them."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from drift.launch import Ranks
from drift.sums import PairwiseSum, pairwise_sum

COUNT = 16


def terms() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.arange(COUNT).remainder(5)  # so that the order matters
    return [size * torch.randn(3, 5, generator=generator) for size in sizes]


def tree(terms: list[torch.Tensor]) -> torch.Tensor:
    """The same by recursion, for a power of two."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    return tree(terms[:half]) + tree(terms[half:])


def test_the_order_is_that_of_a_binary_tree():
    expected = tree(terms())
    assert torch.equal(pairwise_sum(terms()), expected)
    assert not torch.equal(sum(terms()), expected)  # one after the other gives other bits


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 13])
def test_any_number_of_lists_adds_up(count):
    total = PairwiseSum()
    for term in terms()[:count]:
        total.add([term.clone(), -2 * term])
    expected = torch.stack(terms()[:count]).double().sum(0)
    one, other = total.total()
    torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(other.double(), -2 * expected, rtol=1e-5, atol=2e-2)


def add_share(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting-{world_size}", rank=rank, world_size=world_size)
    part = COUNT // world_size
    mine = pairwise_sum(terms()[rank * part : (rank + 1) * part])
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    result = ranks.sum(mine)
    assert result is mine
    torch.save([result, ranks.sum(torch.tensor([rank])), ranks.sum(torch.tensor(0.5))], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_add_up_to_the_same_bits(tmp_path, world_size):
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, world_size, tmp_path) for rank in range(world_size)]
    processes = [context.Process(target=add_share, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * world_size
    for rank in range(world_size):
        total, number, scalar = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(total, pairwise_sum(terms()))
        assert number.tolist() == [sum(range(world_size))]
        assert scalar.item() == 0.5 * world_size
