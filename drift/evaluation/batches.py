"""Batches of one shape, as a network rounds differently for other numbers of rows; and a second thread."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 32
"""Samples that generators and feature networks see at once, however many are asked for."""


def in_batches(function: Callable[..., Tensor], *inputs: Tensor, size: int = BATCH) -> Tensor:
    """`function` of the N > 0 rows of `inputs`, always called with `size` of them.

    Copies of the last row fill the last batch, and their results are left out. So a row's result does not
    change, not by one bit, with the rows beside it.
    """
    results = []
    for start in range(0, len(inputs[0]), size):
        part = [values[start : start + size] for values in inputs]
        rows = len(part[0])
        full = [torch.cat([v, v[-1:].expand(size - rows, *v.shape[1:])]) if rows < size else v for v in part]
        results.append(function(*full)[:rows])
    return torch.cat(results)


def one_behind(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Each item with `work` of it, done in a thread while the next item is made.

    So the CPU resizes one batch while the device generates the next.
    """
    waiting = None
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            following = item, pool.submit(work, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
