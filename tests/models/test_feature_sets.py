import numpy as np
import pytest
import torch

from drift.models.pooling import feature_sets, root_mean_square

SHAPES = [(1, 1), (2, 2), (4, 4), (8, 8), (2, 4), (8, 4), (6, 6), (3, 5)]


def naive_sets(x):
    """The feature sets of `x [B, C, H, W]` by loops over patches, in the precision of `x`."""
    height, width = x.shape[2:]

    def over(size_h, size_w, statistic):
        rows = range(0, height, size_h)
        columns = range(0, width, size_w)
        patches = [x[:, :, r : r + size_h, c : c + size_w].flatten(2) for r in rows for c in columns]
        return torch.stack([statistic(patch) for patch in patches], dim=1)

    def mean(patch):
        return patch.sum(2) / patch.shape[2]

    def std(patch):
        return (((patch - mean(patch)[:, :, None]) ** 2).sum(2) / patch.shape[2] + 1e-6).sqrt()

    sets = {"f": over(1, 1, mean), "f_mean": over(height, width, mean), "f_std": over(height, width, std)}
    for p in (2, 4):
        if height % p == 0 and width % p == 0:
            sets[f"f_mean_{p}"], sets[f"f_std_{p}"] = over(p, p, mean), over(p, p, std)
    return sets


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradient_match_loops_in_float64(shape, memory_format):
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    exact = x.double().requires_grad_()
    x.requires_grad_()
    found, expected = feature_sets("f", x), naive_sets(exact)
    assert found.keys() == expected.keys()
    weights = {name: torch.randn(value.shape) for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    sum((found[name] * weight).sum() for name, weight in weights.items()).backward()
    sum((expected[name] * weight).sum() for name, weight in weights.items()).backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_std_of_a_nearly_constant_map_keeps_its_digits():
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = 10 + 1e-3 * noise  # mean(x^2) - mean(x)^2 would be off by ten times the variance
    found, expected = feature_sets("f", x), naive_sets(x.double())
    for name in ("f_std", "f_std_2", "f_std_4"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_dropped_sets_are_exactly_the_duplicates(shape):
    x = torch.randn(3, 5, *shape, generator=torch.Generator().manual_seed(0))
    every, kept = feature_sets("f", x), feature_sets("f", x, drop_duplicates=True)

    def equal(a, b):
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)

    for name, value in every.items():
        if name in kept:
            assert torch.equal(kept[name], value)
            assert not any(equal(value, other) for key, other in kept.items() if key != name)
        else:
            constant = torch.allclose(value, value.mean(), atol=1e-6)
            assert constant or any(equal(value, other) for other in kept.values())


def test_locations_are_row_major_and_contiguous():
    x = torch.arange(6.0).view(1, 1, 2, 3).expand(2, 4, 2, 3)
    found = feature_sets("f", x)["f"]
    assert found[1, :, 3].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.is_contiguous()


def test_root_mean_square():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    expected = np.sqrt((x.astype(np.float64) ** 2).mean(axis=(2, 3)) + 1e-6)
    np.testing.assert_allclose(root_mean_square(torch.from_numpy(x))[:, 0].numpy(), expected, rtol=1e-6)
