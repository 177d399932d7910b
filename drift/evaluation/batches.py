"""Batches of one shape, as a network's rounding depends on how many rows it sees at once; and one ahead."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 32
"""Samples that generators and feature networks see at once, however many are asked for."""


def in_batches(function: Callable[..., Tensor], *inputs: Tensor, size: int = BATCH) -> Tensor:
    """`function` of the rows of `inputs`, always called with `size` of them.

    The last batch is filled with copies of its last row, whose results are left out. So a row's result does
    not change, not by one bit, with the number of rows in its company. All `inputs` have N > 0 rows.
    """
    rows = len(inputs[0])
    results = []
    for start in range(0, rows, size):
        part = [values[start : start + size] for values in inputs]
        if (some := len(part[0])) < size:
            part = [
                torch.cat([values, values[-1:].expand(size - some, *values.shape[1:])]) for values in part
            ]
        results.append(function(*part)[:some])
    return torch.cat(results)


def one_behind(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Each item with `work` of it, which a thread does while the next item is being made.

    So the CPU resizes one batch while the device makes the next. Where making an item fails, the one before
    is still given.
    """
    iterator = iter(items)
    waiting: tuple[Item, Future[Result]] | None = None
    failure: BaseException | None = None
    with ThreadPoolExecutor(1) as pool:
        while failure is None:
            try:
                item = next(iterator)
            except BaseException as error:
                failure, following = error, None
            else:
                following = item, pool.submit(work, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
    if not isinstance(failure, StopIteration):
        raise failure
