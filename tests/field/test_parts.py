"""Classes of a step one part after the other against all of them at once."""

import pytest
import torch
from field_inputs import draw, loss_and_grad, relative_error
from test_processes import CASES

from drift.field.loss import FieldPasses

CLASSES = 5
CUTS = {"singles": [1] * 5, "uneven": [2, 3]}


def in_parts(inputs, sizes, settings, reduce=lambda sums: sums, impl="reference"):
    """Loss, gradient and statistics from three rounds over the parts, each with passes made anew."""
    x = inputs[0].clone().requires_grad_()
    parts = list(zip(*(t.split(sizes) for t in (x, *inputs[1:])), strict=True))

    def passes():
        for part, pos, uncond, omega, second in parts:
            negatives = second if settings.negatives == "second_batch" else None
            yield FieldPasses(
                part, pos, uncond, omega, settings, negatives=negatives, keep_bytes=0, impl=impl
            )

    distances = reduce(sum(p.distance_sums().sum(dim=1) for p in passes()))
    total = reduce(sum(p.field_sums(p.scale(distances)) for p in passes()))
    loss = 0
    for p, size in zip(passes(), sizes, strict=True):
        loss = loss + size / CLASSES * p.loss(p.scale(distances), p.factors(total))
        statistics = p.statistics(total)
    loss.backward()
    return loss.detach(), x.grad, statistics


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("channels", [7, 40], ids=["short_vectors", "long_vectors"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("batch")] + ["vanilla"])
def test_parts_equal_the_whole(name, channels, sizes):
    settings = CASES.get(name) or CASES["batch"].__class__(vanilla=True)
    inputs = draw(classes=CLASSES, channels=channels)
    loss, grad, statistics = loss_and_grad(*inputs, settings)
    in_part = in_parts(inputs, sizes, settings)
    torch.testing.assert_close(in_part[0], loss)
    assert relative_error(in_part[1], grad) < 1e-5
    torch.testing.assert_close(in_part[2], statistics, rtol=1e-5, atol=1e-6)


def test_sums_are_taken_over_processes():
    """Two processes with the same classes agree with one: doubled sums leave every mean as it is."""
    inputs = draw(classes=CLASSES)
    alone = in_parts(inputs, CUTS["uneven"], CASES["batch"])
    shared = in_parts(inputs, CUTS["uneven"], CASES["batch"], reduce=lambda sums: 2 * sums)
    torch.testing.assert_close(shared, alone)
