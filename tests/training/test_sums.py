"""Sums that do not depend on who has computed them."""

import pytest
import torch

from drift.runtime.sums import PairwiseSum, pairwise_sum

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


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8, 13])
def test_tensors_of_the_last_term_may_come_one_by_one(count):
    lists = [[size * term for size in (1, 3, 7)] for term in terms()[:count]]
    whole, parts = PairwiseSum(), PairwiseSum()
    for term in lists:
        whole.add([tensor.clone() for tensor in term])
    for term in lists[:-1]:
        parts.add([tensor.clone() for tensor in term])
    came = {index: parts.finish(index, lists[-1][index]) for index in (1, 2, 0)}
    assert all(torch.equal(came[index], expected) for index, expected in enumerate(whole.total()))
