"""Sums whose bits do not depend on how many processes share them.

Floating-point addition is not associative, so the order of additions is a fixed one: neighbours in pairs,
the pairs' sums in pairs, and so on. Where each process has the same power of two of the terms, its own sum is
one of that tree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class PairwiseSum:
    """Lists of tensors, summed pairwise as they come; holds as many lists as the tree is deep."""

    def __init__(self):
        self._subtrees: list[tuple[int, list[Tensor]]] = []  # (terms, sum), as a binary number has its ones

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Take in a term, whose memory is used from now on."""
        terms, tensors = 1, list(tensors)
        while self._subtrees and self._subtrees[-1][0] == terms:
            _, left = self._subtrees.pop()
            torch._foreach_add_(left, tensors)
            terms, tensors = 2 * terms, left
        self._subtrees.append((terms, tensors))

    def total(self) -> list[Tensor]:
        """The sum of at least one term; no more can be added."""
        _, total = self._subtrees.pop()
        while self._subtrees:
            _, left = self._subtrees.pop()
            torch._foreach_add_(left, total)
            total = left
        return total

    def finish(self, index: int, tensor: Tensor) -> Tensor:
        """One tensor of the sum, to the bit as by `add` of the last term and `total`.

        `tensor` is that of the last term. They may come in any order, each once; no more can be added.
        """
        for _, left in reversed(self._subtrees):
            tensor = left[index].add_(tensor)
        return tensor


def pairwise_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, which are overwritten."""
    result = PairwiseSum()
    for term in terms:
        result.add([term])
    return result.total()[0]
