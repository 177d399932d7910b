"""What holds for any drifting field: symmetries, units, and finite numbers whatever comes in."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from field_inputs import draw, loss_and_grad, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import naive_drifting_loss

from drift.field import FieldSettings
from drift.field.settings import contradictions

BASES = {"release": FieldSettings(), "sinkhorn": FieldSettings.sinkhorn()}
KNOBS = {
    "coupling": ["row", "partial_two_sided", "sinkhorn"],
    "drift_form": ["alg2_joint", "split"],
    "dist_metric": ["l2", "l2_sq"],
    "temps": [(0.02, 0.05, 0.2), (0.1,), (0.3, 1.0)],
    "mask_self_neg": [True, False],
    "alg2_impl": ["logspace", "logspace", "kernel"],
    "sinkhorn_iters": [0, 1, 5, 20],
    "sinkhorn_tolerance": [0.0, 0.1],
    "sinkhorn_marginal": ["none", "weighted_cols", "post_guidance"],
    "sinkhorn_agg_kernel": [False, False, True],
    "drift_unit_vec": [False, False, True],
    "drift_tau_scale": [False, False, True],
    "normalize_drift_theta": [True, False],
    "conventions": ["release", "sinkhorn"],
    "normalization_scope": ["batch", "part", "class"],
    "uncond_weighting": ["affinity", "logit"],
    "affinity_floor": [0.0, 1e-6],
    "self_in_scale": [True, False],
    "unit_scale": [False, False, True],
    "negatives": ["self", "second_batch"],
}
KINDS = [
    dict(zip(("coupling", "drift_form", "dist_metric"), kind, strict=True))
    for kind in product(KNOBS["coupling"], KNOBS["drift_form"], KNOBS["dist_metric"])
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
SEEDS = st.integers(0, 1000)
CHANNELS = st.sampled_from([4, 10, 40])  # 40: more channels than targets
STEADY = {
    "unit_scale": False,
    "sinkhorn_tolerance": 0.0,
}  # rounding is not amplified
SOFT = STEADY | {"temps": (0.3, 1.0), "alg2_impl": "logspace"}  # no weight underflows
some = settings(max_examples=4, deadline=None)


def computable(n: int | None = None, **fixed) -> st.SearchStrategy[FieldSettings]:
    """Any knobs that do not contradict each other, for n generated samples, with some of them `fixed`."""
    free = {name: st.sampled_from(values) for name, values in KNOBS.items() if name not in fixed}
    knobs = st.fixed_dictionaries(free).map(lambda drawn: FieldSettings(**drawn, **fixed))
    return knobs.filter(lambda knobs: not list(contradictions(knobs, n)))


def shuffled(vectors, seed):
    """The samples of `[Nc, *, L, C]` in another order, and that order."""
    order = torch.randperm(vectors.shape[1], generator=torch.Generator().manual_seed(seed))
    return vectors[:, order], order


@every_kind
@given(data=st.data(), seed=SEEDS, channels=CHANNELS)
@some
def test_equal_sets_do_not_drift(kind, data, seed, channels):
    """Attraction and repulsion by the same vectors cancel, if a generated vector sees itself in both."""
    knobs = data.draw(computable(mask_self_neg=False, **SOFT, **kind))
    x, other, _, omega, second = draw(seed, channels=channels)
    negatives = x if knobs.negatives == "self" else second
    same, none = shuffled(negatives, seed)[0], x[:, :0]

    def drift_rms(positives):
        return loss_and_grad(x, positives, none, omega, second, knobs)[2]["drift_rms"]

    # As far as float32 knows that two equal vectors are at no distance
    assert (drift_rms(same) < 1e-2 * drift_rms(other + 1)).all()


@every_kind
@given(data=st.data(), seed=SEEDS, channels=CHANNELS)
@some
def test_swapping_attraction_and_repulsion_turns_the_drift_around(kind, data, seed, channels):
    """With nothing masked and no unconditional samples, the two sets differ in their sign only."""
    knobs = data.draw(computable(negatives="second_batch", alg2_impl="logspace", **STEADY, **kind))
    x, pos, _, omega, second = draw(seed, channels=channels)
    none = x[:, :0]
    loss, grad, statistics = loss_and_grad(x, pos, none, omega, second, knobs)
    swapped_loss, swapped_grad, swapped = loss_and_grad(x, second, none, omega, pos, knobs)
    assert relative_error(swapped_loss, loss) < 1e-4
    assert relative_error(-swapped_grad, grad) < 1e-3
    for name in ("scale", "drift_rms"):
        assert relative_error(swapped[name], statistics[name]) < 1e-4


@every_kind
@given(data=st.data(), seed=SEEDS, channels=CHANNELS, n=st.integers(2, 6), u=st.integers(0, 3))
@some
def test_order_of_samples_does_not_matter(kind, data, seed, channels, n, u):
    knobs = data.draw(computable(n, **STEADY, **kind))
    x, pos, uncond, omega, second = draw(seed, channels=channels, n=n, u=u)
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, second, knobs)
    permuted_x, order = shuffled(x, seed)
    pos, uncond, second = (shuffled(t, seed + 1)[0] for t in (pos, uncond, second))
    permuted_loss, permuted_grad, permuted = loss_and_grad(permuted_x, pos, uncond, omega, second, knobs)
    assert relative_error(permuted_loss, loss) < 1e-4
    assert relative_error(permuted_grad, grad[:, order]) < 1e-3
    for name, values in statistics.items():
        torch.testing.assert_close(permuted[name], values, rtol=1e-3, atol=1e-5)


LENGTHS = {
    ("sinkhorn", "l2"): 1.0,  # S >= 1e-6
    ("sinkhorn", "l2_sq"): 10.0,
    ("release", "l2"): 1e5,  # S >= 1e-3; a distance of 1e-4 to oneself, which may not be masked at tau = 0.02
    ("release", "l2_sq"): 1e4,  # S^2 is a float at the other end
}


def agree_in_other_units(knobs, seed, channels, length, factor):
    x, pos, uncond, omega, second = draw(seed, channels=channels)
    x, pos, uncond, second = (length * t for t in (x, pos, uncond, second))
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, second, knobs)
    x, pos, uncond, second = (factor * t for t in (x, pos, uncond, second))
    scaled_loss, scaled_grad, scaled = loss_and_grad(x, pos, uncond, omega, second, knobs)
    unit = factor if knobs.dist_metric == "l2" else factor**2  # of S
    assert relative_error(scaled_loss, loss) < 1e-4
    assert relative_error(unit * scaled_grad, grad) < 1e-3
    assert relative_error(scaled["scale"], unit * statistics["scale"]) < 1e-4
    torch.testing.assert_close(scaled["neighbours"], statistics["neighbours"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("code", ["sinkhorn", "release"])
@every_kind
@given(data=st.data(), seed=SEEDS, channels=CHANNELS, exponent=st.floats(-4, 4))
@some
def test_units_of_the_features_do_not_matter(kind, code, data, seed, channels, exponent):
    """From vectors as long as it takes for no factor to bring S and distances near their absolute guards."""
    fixed = STEADY | {"conventions": code}
    if kind["dist_metric"] == "l2_sq":
        fixed |= {"normalize_drift_theta": True}  # y/S is 1/length, and so is V if nothing divides it
    knobs = data.draw(computable(**fixed, **kind))
    agree_in_other_units(knobs, seed, channels, LENGTHS[code, kind["dist_metric"]], 10**exponent)


@pytest.mark.parametrize(("base", "guard", "length"), [("release", 1e-3, 1e-9), ("sinkhorn", 1e-6, 1e-14)])
def test_guards_take_over_where_features_vanish(base, guard, length):
    """Below them S and lambda are constants, so that the drift vanishes with the features."""
    x, pos, uncond, omega, second = draw()
    tiny = [length * t for t in (x, pos, uncond)]
    loss, grad, statistics = loss_and_grad(*tiny, omega, second, BASES[base])
    naive = naive_drifting_loss(*tiny, omega, BASES[base])
    assert float(statistics["scale"]) == pytest.approx(guard)
    assert 0 < float(loss) < 1e-2
    assert relative_error(loss, naive.loss) < 1e-4
    assert relative_error(grad, naive.grad) < 1e-4


@pytest.mark.parametrize("negatives", ["self", "second_batch"])
@pytest.mark.parametrize("channels", [4, 40])
@every_kind
def test_unconditional_samples_without_weight_are_not_there(kind, channels, negatives):
    """Where log w enters the logits: not even if they are nearer than any other target."""
    knobs = FieldSettings.sinkhorn(sinkhorn_marginal="none", temps=(0.005, 0.1), negatives=negatives, **kind)
    x, pos, uncond, omega, second = draw(channels=channels)
    uncond[:, 0] = x[:, 0]
    omega = torch.ones_like(omega)
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, second, knobs)
    expected_loss, expected_grad, expected = loss_and_grad(x, pos, uncond[:, :0], omega, second, knobs)
    assert relative_error(loss, expected_loss) < 1e-5
    assert relative_error(grad, expected_grad) < 1e-4
    for name, values in expected.items():
        torch.testing.assert_close(statistics[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("coupling", ["partial_two_sided", "row", "sinkhorn"])
@pytest.mark.parametrize("form", ["alg2_joint", "split"])
@pytest.mark.parametrize("channels", [7, 40], ids=["short_vectors", "long_vectors"])
def test_digits_survive_hard_geometry(coupling, form, channels):
    """Far from the origin, with an outlier on each side, twins, and extreme temperatures without a floor."""
    x, pos, uncond, omega, second = draw(channels=channels)
    x[:, 0] *= 20
    pos[:, 0] *= -20
    x[:, 1] = x[:, 2]
    pos[:, 1] = x[:, 3]
    offset = 50 * torch.randn(channels, generator=torch.Generator().manual_seed(1))
    # Multiples of 2^-12: adding the offset must not itself round the vectors
    x, pos, uncond = ((t + offset).mul(4096).round().div(4096) for t in (x, pos, uncond))
    knobs = FieldSettings(coupling=coupling, drift_form=form, temps=(0.005, 0.05, 100.0), affinity_floor=0.0)
    expected = naive_drifting_loss(x, pos, uncond, omega, knobs)
    loss, grad, _ = loss_and_grad(x, pos, uncond, omega, second, knobs)
    # A masked plan couples twins to each other, whose distance is rounding beside the lowest temperature
    factor = 5 if coupling == "sinkhorn" else 1
    assert relative_error(loss, expected.loss) < factor * 1e-4
    assert relative_error(grad, expected.grad) < factor * 1e-3


@given(
    data=st.data(),
    temps=st.lists(st.sampled_from([1e-3, 0.02, 0.2, 1e2]), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 1000),
    n=st.integers(2, 5),
    p=st.integers(1, 4),
    u=st.integers(0, 3),
    channels=st.sampled_from([1, 4, 20]),
    case=st.sampled_from(["random", "twins", "equal_sets", "constant", "far", "small"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=150, deadline=None)
def test_always_finite(data, temps, seed, n, p, u, channels, case, dtype):
    knobs, half = data.draw(computable(n)), dtype == torch.float16
    if half:  # the gradient -2 V / (S numel) has to stay in its range: V of size 1, S not too small
        knobs = replace(knobs, normalize_drift_theta=True)
    x, pos, uncond, omega, second = draw(seed, n=n, p=p, u=u, channels=channels)
    match case:
        case "twins":
            x[:, 0] = x[:, 1]
        case "equal_sets":
            pos = second = x.clone()
        case "constant":
            x, pos, uncond, second = (torch.ones_like(t) for t in (x, pos, uncond, second))
        case "far":
            x[:, 0] = 100.0
        case "small":
            length = 1e-2 if half else 1e-6
            x, pos, uncond, second = (length * t for t in (x, pos, uncond, second))
    x, pos, uncond, second = (t.to(dtype) for t in (x, pos, uncond, second))
    loss, grad, statistics = loss_and_grad(x, pos, uncond, omega, second, replace(knobs, temps=tuple(temps)))
    assert grad.dtype == dtype
    assert loss.dtype == torch.float32
    for value in (loss, grad, *statistics.values()):
        assert value.isfinite().all()
