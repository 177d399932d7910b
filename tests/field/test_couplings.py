"""Couplings on their own: the registry, what they refuse, and the unbalanced one in closed form."""

import dataclasses
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from field_inputs import draw, loss_and_grad, relative_error

from drift.field import FieldSettings, couplings
from drift.field.couplings import COUPLINGS, Coupling, Row, Sinkhorn, Unbalanced, register
from drift.field.settings import contradictions
from drift.runtime.errors import UserError

CONTRADICTIONS = [
    ({"coupling": "sinkhorn", "alg2_impl": "kernel"}, [{"alg2_impl": "logspace"}]),
    (
        {"coupling": "sinkhorn", "sinkhorn_marginal": "post_guidance", "drift_form": "alg2_joint"},
        [{"drift_form": "split"}, {"sinkhorn_marginal": "weighted_cols"}],
    ),
    (
        {"sinkhorn_agg_kernel": True, "coupling": "row"},
        [{"coupling": "sinkhorn"}, {"sinkhorn_agg_kernel": False}],
    ),
    (
        {"coupling": "sinkhorn", "sinkhorn_agg_kernel": True, "drift_tau_scale": True},
        [{"sinkhorn_agg_kernel": False}, {"drift_tau_scale": False}],
    ),
    ({"drift_unit_vec": True, "dist_metric": "l2_sq"}, [{"dist_metric": "l2"}, {"drift_unit_vec": False}]),
    (
        {"guidance": "velocity", "drift_form": "alg2_joint"},
        [{"drift_form": "split"}, {"guidance": "distribution"}],
    ),
    ({"coupling": "unbalanced", "sinkhorn_tolerance": 0.1}, [{"sinkhorn_tolerance": 0}]),
    (
        {"coupling": "unbalanced", "sinkhorn_iters": 0, "drift_form": "split"},
        [{"coupling": "sinkhorn"}, {"sinkhorn_iters": 1}],
    ),
    ({"coupling": "sinkhorn", "sinkhorn_iters": 0}, [{"drift_form": "split"}, {"sinkhorn_iters": 1}]),
    *(
        (
            {
                "coupling": "sinkhorn",
                "sinkhorn_iters": 0,
                "drift_form": "split",
                "sinkhorn_marginal": marginal,
            },
            [{"sinkhorn_marginal": "weighted_cols"}, {"guidance": "velocity"}, {"sinkhorn_iters": 1}],
        )
        for marginal in ("none", "post_guidance")
    ),
]


@pytest.mark.parametrize(("knobs", "ways_out"), CONTRADICTIONS, ids=str)
def test_a_contradiction_names_the_settings_and_ways_out(knobs, ways_out):
    settings = FieldSettings(**knobs)
    [line] = contradictions(settings)
    assert "\n" not in line
    for way_out in ways_out:
        [(key, value)] = way_out.items()
        assert key in line
        assert str(value).lower() in line
        assert not list(contradictions(replace(settings, **way_out)))


@pytest.mark.parametrize("form", ["split", "alg2_joint"])
def test_two_samples_are_too_few_for_a_masked_plan(form):
    settings = FieldSettings(coupling="sinkhorn", drift_form=form)
    [line] = contradictions(settings, 2)
    for words in (
        "mask_self_neg is true with coupling sinkhorn and 2 generated",
        "use 3 or more",
    ):
        assert words in line
    with pytest.raises(UserError, match="2 generated samples"):
        loss_and_grad(*draw(n=2), settings)
    for way_out in ({"negatives": "second_batch"}, {"mask_self_neg": False}, {"coupling": "row"}):
        loss_and_grad(*draw(n=2), replace(settings, **way_out))
    loss_and_grad(*draw(n=3), settings)


@pytest.mark.parametrize("make", [FieldSettings, FieldSettings.sinkhorn, FieldSettings.wflow])
@pytest.mark.parametrize("key", ["coupling", "dist_metric", "sinkhorn_marginal", "guidance", "negatives"])
def test_misspelt_words_are_refused(make, key):
    with pytest.raises(ValueError, match=f"{key} = 'L2': allowed: .* or "):
        make(**{key: "L2"})


def test_an_option_of_another_coupling_is_refused():
    with pytest.raises(ValueError, match="rho: no option of coupling sinkhorn"):
        FieldSettings(coupling="sinkhorn", options={"rho": 1.0})
    settings = FieldSettings(coupling="unbalanced", options={"rho": 2.0}, sinkhorn_iters=7)
    assert settings.coupling_object() == Unbalanced(rho=2.0, sinkhorn_iters=7)
    assert "rho" in next(contradictions(replace(settings, options={"rho": 0.0})))


def test_a_coupling_is_added_by_one_class():
    @register("uniform")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Uniform(Row):
        """Every target alike."""

        alg2_impl: str = "logspace"
        strength: float = 1.0

        def _affinity(self, logits):
            return torch.full_like(logits, self.strength)

    try:
        inputs = draw()
        settings = FieldSettings(coupling="uniform", options={"strength": 2.0}, temps=(0.1,))
        _, grad, statistics = loss_and_grad(*inputs, settings)
        assert statistics["neighbours"] == pytest.approx(6)
        assert (grad - grad.mean(dim=1, keepdim=True)).abs().max() < 1e-6  # all move alike
    finally:
        del COUPLINGS["uniform"]


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FieldSettings().coupling = "row"


def logits(*shape):
    return -5 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_unbalanced_between_two_points(rho):
    """The minimum of -z A + A (log A - 1) + 2 rho KL(A | 1) is exp(z / (1 + 2 rho))."""
    z = logits(3, 1, 1, 1)
    plan = Unbalanced(rho=rho, sinkhorn_iters=2000).plan(z.clone(), torch.ones(3, 1)).weights
    torch.testing.assert_close(plan, (z / (1 + 2 * rho)).exp())


@pytest.mark.parametrize("rho", [0.3, 3.0])
def test_unbalanced_plans_are_stationary(rho):
    """The derivative of cost, entropy and both penalties vanishes in every entry of the plan."""
    z, marginal = logits(2, 3, 5, 7), torch.rand(2, 7, dtype=torch.float64) + 0.1
    plan = Unbalanced(rho=rho, sinkhorn_iters=3000).plan(z.clone(), marginal).weights
    b = (marginal / marginal.sum(dim=1, keepdim=True))[:, None, None]
    rows, columns = plan.sum(dim=-1, keepdim=True), plan.sum(dim=-2, keepdim=True)
    derivative = -z + plan.log() + rho * (rows * 5).log() + rho * (columns / b).log()
    assert derivative.abs().max() < 1e-8


def test_unbalanced_becomes_balanced():
    z, marginal = logits(2, 3, 5, 7), torch.ones(2, 7)
    balanced = Sinkhorn(sinkhorn_iters=50).plan(z.clone(), marginal).weights
    for rho, error in ((1e2, 1e-1), (1e6, 1e-4)):
        plan = Unbalanced(rho=rho, sinkhorn_iters=50).plan(z.clone(), marginal).weights
        assert relative_error(plan, balanced) < error


def test_far_targets_get_little_mass_from_unbalanced_plans():
    z = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    z[..., 3] = -100.0
    columns = Unbalanced(rho=0.5, sinkhorn_iters=500).plan(z, torch.ones(1, 4)).weights.sum(dim=-2).flatten()
    assert columns[3] < 1e-3 * columns[0]
    assert math.isclose(columns[0], columns[1])


@pytest.mark.parametrize("coupling", [name for name in COUPLINGS if COUPLINGS[name].transport])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("span", [1.0, 30.0, 1000.0])
def test_both_ways_to_sum_agree(coupling, masked, span, monkeypatch):
    """Products with kernels of some iterations ago, as on a CPU, and log-sum-exp, as elsewhere."""
    z = span * logits(2, 3, 6, 6).float()
    if masked:
        z.diagonal(dim1=2, dim2=3).fill_(-math.inf)
    kind: Coupling = COUPLINGS[coupling](sinkhorn_iters=30)
    fast = kind.normalised_rows(z.clone(), torch.ones(2, 6))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = kind.normalised_rows(z.clone(), torch.ones(2, 6))
    torch.testing.assert_close(fast.weights, plain.weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fast.statistics, plain.statistics, rtol=1e-3, atol=1e-4)
    if masked:
        assert (plain.weights.diagonal(dim1=2, dim2=3) == 0).all()


@pytest.mark.slow
def test_fused_sums_are_the_same(monkeypatch):
    z = 5 * logits(2, 3, 6, 6).float()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = Sinkhorn(sinkhorn_iters=30).plan(z.clone(), torch.ones(2, 6)).weights
    monkeypatch.undo()
    monkeypatch.setattr(couplings, "_fastest_log_sum", couplings._fastest_log_sum)
    couplings.fuse()
    monkeypatch.setattr(couplings, "_log_sums_by_kernel", lambda logits, around: couplings._log_sums(logits))
    fused = Sinkhorn(sinkhorn_iters=30).plan(z.clone(), torch.ones(2, 6)).weights
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-8)


def squared_mmd(x, y, width):
    """Of two sets `[N, C]` with the kernel exp(-d^2 / (2 width^2)), the biased one (Gretton et al. 2012)."""

    def mean_kernel(a, b):
        return (-(a[:, None] - b).square().sum(dim=-1) / (2 * width**2)).exp().mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_without_iterations_the_gradient_is_that_of_the_mmd():
    """By autograd in float64: of one class after the other, at one S and one lambda for all."""
    x, pos, _, omega, _ = draw(n=5, p=6, channels=4)
    settings = FieldSettings.wflow(sinkhorn_iters=0, negatives="self", temps=(0.5,))
    _, grad, statistics = loss_and_grad(x, pos, x[:, :0], omega, None, settings)
    width = float(statistics["scale"]) * math.sqrt(0.5 * 4)  # d^2 / 2 over eps C S^2
    x = x.double().requires_grad_()
    sets = zip(x.unbind(2), pos.double().unbind(2), strict=True)
    total = sum(squared_mmd(a, b, width) for ab in sets for a, b in zip(*ab, strict=True))
    (expected,) = torch.autograd.grad(total, x)
    assert relative_error(grad / grad.norm(), expected / expected.norm()) < 1e-5


def test_fused_sums_are_not_compiled_again_for_other_temperatures(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(couplings, "_fastest_log_sum", couplings._fastest_log_sum)
    couplings.fuse(partial(torch.compile, backend=count, dynamic=None))
    monkeypatch.setattr(couplings, "_log_sums_by_kernel", lambda logits, around: couplings._log_sums(logits))
    compiled = []
    for tau in (0.2, 0.1, 0.05):
        loss_and_grad(*draw(), FieldSettings.wflow(temps=(tau,)))
        compiled.append(len(graphs))
    assert compiled[0] > 0 and len(set(compiled)) == 1
