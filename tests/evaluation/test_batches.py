import threading

import pytest
import torch

from drift.evaluation.batches import BATCH, in_batches, one_behind


@pytest.mark.parametrize("rows", [1, 7, BATCH, BATCH + 1, 3 * BATCH])
def test_the_function_sees_one_shape_and_every_row_has_its_result(rows):
    shapes = []

    def difference(a, b):
        shapes.append((a.shape, b.shape))
        return a.sum(1) - b

    a, b = torch.randn(rows, 5), torch.arange(rows)
    assert torch.equal(in_batches(difference, a, b), a.sum(1) - b)
    assert shapes == [((BATCH, 5), (BATCH,))] * -(-rows // BATCH)


def test_a_row_does_not_feel_its_company_nor_its_place():
    """A plain product does: its kernel is chosen by the number of rows."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(8192, 200)
    )
    images = torch.randn(100, 3, 16, 16, generator=generator)
    with torch.inference_mode():
        whole = in_batches(network, images)
        order = torch.randperm(100, generator=generator)
        for size in (1, 7, 64):
            for part in order.split(size):
                assert torch.equal(in_batches(network, images[part]), whole[part])


def test_work_is_done_in_order_while_the_next_item_is_made():
    """Each is only finished once the next is being made, so one after the other would never end."""
    made = [threading.Event() for _ in range(4)]

    def items():
        for i in range(3):
            made[i].set()
            yield i
        made[3].set()

    def work(i):
        assert made[i + 1].wait(30)
        return 10 * i

    assert list(one_behind(items(), work)) == [(0, 0), (1, 10), (2, 20)]
    assert list(one_behind([], work)) == []


def test_failures_of_making_and_of_working_come_through():
    def items():
        yield 1
        yield 2
        raise KeyError("making")

    seen = []
    with pytest.raises(KeyError, match="making"):
        for item, result in one_behind(items(), lambda i: -i):
            seen.append((item, result))
    assert seen == [(1, -1), (2, -2)]  # nothing that was made is lost
    with pytest.raises(ZeroDivisionError):
        list(one_behind([1, 0], lambda i: 1 / i))
