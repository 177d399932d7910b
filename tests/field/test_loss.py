"""The drifting loss against the release's numbers, a literal loop in float64, and its own symmetries."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_field import naive_drifting_loss

from drift.field import FieldSettings, drifting_loss

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASE = FieldSettings()


def relative_error(value, expected) -> float:
    value, expected = torch.as_tensor(value).double(), torch.as_tensor(expected).double()
    return float((value - expected).norm() / expected.norm())


def draw(seed=0, *, classes=3, n=5, p=6, u=2, locations=4, channels=7, shift=0.5):
    """x, pos, uncond and omega of one feature set; the first class has no guidance."""
    generator = torch.Generator().manual_seed(seed)
    x, pos, uncond = (
        torch.randn(classes, count, locations, channels, generator=generator) for count in (n, p, u)
    )
    omega = 1 + torch.arange(classes) / 2
    return x + shift, pos, uncond, omega


def loss_and_grad(x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    loss, statistics = drifting_loss(x, *args, **kwargs)
    loss.backward()
    return loss.detach(), x.grad, statistics


@pytest.mark.parametrize("name", ["plain", "guided", "one_temp", "wide"])
def test_release_numbers(name):
    with np.load(GOLDEN / f"release_loss_{name}.npz") as arrays:
        golden = {key: torch.from_numpy(array) for key, array in arrays.items()}
    gen, pos, uncond = (golden[key][:, :, None] for key in ("gen", "pos", "uncond"))  # one class per problem
    n, u = gen.shape[1], uncond.shape[1]
    omega = 1 + golden["uncond_weight"] * u / (n - 1)
    temps = tuple(round(tau, 6) for tau in golden["temps"].tolist())

    loss, grad, statistics = loss_and_grad(gen, pos, uncond, omega, replace(RELEASE, temps=temps))

    assert relative_error(loss, golden["loss"]) < 2e-5
    assert relative_error(statistics["loss"], golden["loss"]) < 2e-5
    assert relative_error(grad[:, :, 0], golden["grad"]) < 2e-5
    assert relative_error(statistics["scale"], golden["scale"]) < 2e-5
    for tau, rms in zip(temps, statistics["drift_rms"], strict=True):
        assert relative_error(rms.square(), golden[f"force_ms_{tau}"]) < 2e-5
    drift = -grad * grad.numel() / 2 * golden["scale"] / gen.shape[-1] ** 0.5
    assert relative_error(drift.square().mean(dim=(1, 2, 3)), golden["loss_per_problem"]) < 2e-5


@pytest.mark.parametrize("coupling", ["partial_two_sided", "row"])
@pytest.mark.parametrize("mask_self_neg", [True, False])
@pytest.mark.parametrize("channels", [7, 40], ids=["short_vectors", "long_vectors"])
@pytest.mark.parametrize("u", [0, 2])
def test_equals_literal_loop(coupling, mask_self_neg, channels, u):
    knobs = replace(RELEASE, coupling=coupling, mask_self_neg=mask_self_neg)
    inputs = draw(channels=channels, u=u)
    expected = naive_drifting_loss(*inputs, knobs)
    loss, grad, statistics = loss_and_grad(*inputs, knobs)
    assert relative_error(loss, expected.loss) < 1e-5
    assert relative_error(grad, expected.grad) < 2e-5
    assert relative_error(statistics["scale"], expected.scale) < 1e-5
    assert relative_error(statistics["drift_rms"], expected.drift_rms) < 2e-5


@pytest.mark.parametrize("coupling", ["partial_two_sided", "row"])
@pytest.mark.parametrize("channels", [7, 40], ids=["short_vectors", "long_vectors"])
def test_digits_survive_hard_geometry(coupling, channels):
    """Far from the origin, with an outlier on each side, twins, and extreme temperatures without a floor."""
    x, pos, uncond, omega = draw(channels=channels)
    x[:, 0] *= 20
    pos[:, 0] *= -20
    x[:, 1] = x[:, 2]
    pos[:, 1] = x[:, 3]
    offset = 50 * torch.randn(channels, generator=torch.Generator().manual_seed(1))
    # Multiples of 2^-12: adding the offset must not itself round the vectors
    x, pos, uncond = ((t + offset).mul(4096).round().div(4096) for t in (x, pos, uncond))
    knobs = replace(RELEASE, coupling=coupling, temps=(0.005, 0.05, 100.0), affinity_floor=0.0)
    expected = naive_drifting_loss(x, pos, uncond, omega, knobs)
    loss, grad, _ = loss_and_grad(x, pos, uncond, omega, knobs)
    assert relative_error(loss, expected.loss) < 1e-4
    assert relative_error(grad, expected.grad) < 1e-3


def test_only_the_drift_is_kept_for_backward():
    x, pos, uncond, omega = draw()
    x, pos, uncond, omega = (t.requires_grad_() for t in (x, pos, uncond, omega))
    loss, statistics = drifting_loss(x, pos, uncond, omega, RELEASE)
    kept = [tuple(t.shape) for t in loss.grad_fn.saved_tensors]
    assert sorted(kept, key=len) == [(), tuple(x.shape)]
    assert not any(value.requires_grad for value in statistics.values())
    loss.backward()
    assert pos.grad is None and uncond.grad is None and omega.grad is None


def test_gradient_is_scaled_by_what_follows():
    x, *rest = draw()
    _, grad, _ = loss_and_grad(x, *rest, RELEASE)
    x.requires_grad_()
    loss, _ = drifting_loss(x, *rest, RELEASE)
    (-3 * loss).backward()
    torch.testing.assert_close(x.grad, -3 * grad)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 6),
    u=st.integers(0, 3),
    coupling=st.sampled_from(["partial_two_sided", "row"]),
)
@settings(max_examples=25, deadline=None)
def test_permuting_generated_samples_permutes_the_gradient(seed, n, u, coupling):
    x, *rest = draw(seed, n=n, u=u)
    knobs = replace(RELEASE, coupling=coupling)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss, grad, _ = loss_and_grad(x, *rest, knobs)
    permuted_loss, permuted_grad, _ = loss_and_grad(x[:, order], *rest, knobs)
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-5, atol=0)
    assert relative_error(permuted_grad, grad[:, order]) < 1e-4


@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 1e4), channels=st.sampled_from([3, 30]))
@settings(max_examples=25, deadline=None)
def test_units_of_the_features_do_not_matter(seed, factor, channels):
    x, pos, uncond, omega = draw(seed, channels=channels)
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, RELEASE)
    scaled = loss_and_grad(factor * x, factor * pos, factor * uncond, omega, RELEASE)
    torch.testing.assert_close(scaled[0], loss, rtol=1e-4, atol=0)
    assert relative_error(scaled[1] * factor, grad) < 1e-3
    # Pairs of a vector with itself stay at the guard's distance, whatever the units are
    torch.testing.assert_close(scaled[2]["scale"], factor * statistics["scale"], rtol=1e-3, atol=0)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 5),
    p=st.integers(1, 4),
    u=st.integers(0, 3),
    channels=st.sampled_from([1, 4, 20]),
    temps=st.lists(st.sampled_from([1e-3, 0.02, 0.2, 1e2]), min_size=1, max_size=3, unique=True),
    case=st.sampled_from(["random", "twins", "identical_sets", "constant", "far", "tiny"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    knobs=st.fixed_dictionaries(
        {
            "coupling": st.sampled_from(["partial_two_sided", "row"]),
            "mask_self_neg": st.booleans(),
            "affinity_floor": st.sampled_from([0.0, 1e-6]),
        }
    ),
)
@settings(max_examples=150, deadline=None)
def test_always_finite(seed, n, p, u, channels, temps, case, dtype, knobs):
    x, pos, uncond, omega = draw(seed, n=n, p=p, u=u, channels=channels)
    match case:
        case "twins":
            x[:, 0] = x[:, 1]
        case "identical_sets":
            pos = x.clone()
        case "constant":
            x, pos, uncond = (torch.ones_like(t) for t in (x, pos, uncond))
        case "far":
            x[:, 0] = 100.0
        case "tiny":
            x, pos, uncond = (1e-6 * t for t in (x, pos, uncond))
    x, pos, uncond = (t.to(dtype) for t in (x, pos, uncond))
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, FieldSettings(temps=tuple(temps), **knobs))
    assert grad.dtype == dtype
    assert loss.dtype == torch.float32
    for value in (loss, grad, *statistics.values()):
        assert value.isfinite().all()


def test_float32_inside_whatever_comes_in():
    x, *rest = draw(channels=40)
    x = x.bfloat16()
    loss, grad, _ = loss_and_grad(x.float(), *rest, RELEASE)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low_grad, _ = loss_and_grad(x, *rest, RELEASE)
    torch.testing.assert_close(low_loss, loss)
    torch.testing.assert_close(low_grad, grad.bfloat16(), rtol=2**-7, atol=0)  # rounded twice


def test_no_drift_between_identical_sets():
    """Without the self mask, attraction and repulsion of the same vectors cancel (paper: anti-symmetry)."""
    x, _, _, omega = draw()
    empty = x[:, :0]
    _, _, statistics = loss_and_grad(x, x, empty, omega, replace(RELEASE, mask_self_neg=False))
    shifted = loss_and_grad(x, x + 1, empty, omega, replace(RELEASE, mask_self_neg=False))[2]
    assert (statistics["drift_rms"] < 1e-4).all()  # the guard of lambda
    assert (shifted["drift_rms"] > 1e-3).all()


def test_processes_that_share_the_classes_equal_one():
    """Gradients averaged over two processes, and each one's statistics, are those of one with all classes."""
    x, pos, uncond, omega = draw(classes=4, channels=12)
    x[2:] *= 3  # the shares differ in scale
    barrier = threading.Barrier(2)
    boxes = [None, None]

    def share(rank):
        def reduce(sums):
            boxes[rank] = sums.clone()
            barrier.wait()
            total = boxes[0] + boxes[1]
            barrier.wait()
            return sums.copy_(total)  # as an all-reduce does, in place

        mine = slice(2 * rank, 2 * rank + 2)
        try:
            return loss_and_grad(x[mine], pos[mine], uncond[mine], omega[mine], RELEASE, reduce=reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(share, range(2)))
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, RELEASE)

    assert relative_error(torch.cat([s[1] for s in shares]) / 2, grad) < 1e-5
    assert abs(float(shares[0][0] - shares[1][0])) > 1e-3  # each share's own mean
    torch.testing.assert_close((shares[0][0] + shares[1][0]) / 2, loss)
    for _, _, shared in shares:
        for key, value in statistics.items():
            torch.testing.assert_close(shared[key], value, rtol=1e-5, atol=0)
