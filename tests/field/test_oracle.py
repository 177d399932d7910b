"""The drifting loss against a naive loop in float64: every pair of settings, of two values each or more."""

import random
from itertools import combinations

import pytest
import torch
from field_inputs import draw, loss_and_grad, relative_error
from oracle import naive_drifting_loss

from drift.field import FieldSettings
from drift.field.couplings import COUPLINGS
from drift.field.settings import contradictions

SWITCHES = {
    "conventions": ["release", "sinkhorn", "wflow"],
    "coupling": list(COUPLINGS),
    "drift_form": ["alg2_joint", "split"],
    "dist_metric": ["l2", "l2_sq"],
    "guidance": ["distribution", "velocity"],
    "negatives": ["self", "second_batch"],
    "mask_self_neg": [True, False],
    "alg2_impl": ["logspace", "kernel"],
    "affinity_floor": [0.0, 1e-6, 1e-2],
    "uncond_weighting": ["affinity", "logit"],
    "sinkhorn_iters": [0, 1, 3, 20],
    "sinkhorn_tolerance": [0.0, 0.02],
    "sinkhorn_marginal": ["none", "weighted_cols", "post_guidance"],
    "sinkhorn_agg_kernel": [False, True],
    "drift_unit_vec": [False, True],
    "drift_tau_scale": [False, True],
    "normalize_drift_theta": [True, False],
    "normalization_scope": ["batch", "part", "class"],
    "classes_per_part": [None, 2],
    "self_in_scale": [True, False],
    "scale_statistic": ["mean", "rms", "mean_length"],
    "generated_in_scale": [False, True],
    "cost_factor": [1.0, 0.5],
    "unit_scale": [False, True],
}


def pairwise(seed: int = 0) -> list[FieldSettings]:
    """Settings among which every pair of values that can go together occurs; found greedily."""
    rng, found = random.Random(seed), []
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in combinations(SWITCHES, 2)
        for x in SWITCHES[a]
        for y in SWITCHES[b]
    }
    for _ in range(600):
        best, covered = None, set()
        for _ in range(30):
            drawn = {key: rng.choice(values) for key, values in SWITCHES.items()}
            if missing:
                drawn |= dict(rng.choice(sorted(missing, key=lambda pair: sorted(map(str, pair)))))
            temps = (4.0, 30.0) if drawn["unit_scale"] else (0.1, 0.4)
            settings = FieldSettings(temps=temps, **drawn)
            pairs = {frozenset(pair) for pair in combinations(drawn.items(), 2)} & missing
            if len(pairs) > len(covered) and not list(contradictions(settings)):
                best, covered = settings, pairs
        if best is not None:
            found.append(best)
            missing -= covered
    return found


CASES = pairwise()


def test_pairs_are_covered_by_few_cases():
    assert len(CASES) < 150
    for a, b in combinations(SWITCHES, 2):
        assert {(getattr(s, a), getattr(s, b)) for s in CASES} >= {
            (x, y)
            for x in SWITCHES[a]
            for y in SWITCHES[b]
            if not list(contradictions(FieldSettings(**{a: x, b: y, **companions(a, b)})))
        }


def companions(a: str, b: str) -> dict:
    """What lets as much as possible go with two other settings."""
    most = {"coupling": "sinkhorn", "drift_form": "split"}
    return {key: value for key, value in most.items() if key not in (a, b)}


def agree(inputs, settings, loss_tolerance=3e-5, grad_tolerance=1e-4):
    *given, second = inputs
    second = second if settings.negatives == "second_batch" else None
    naive = naive_drifting_loss(*given, settings, second)
    loss, grad, statistics = loss_and_grad(*inputs, settings)
    assert relative_error(loss, naive.loss) < loss_tolerance
    assert relative_error(grad, naive.grad) < grad_tolerance
    expected = {name: getattr(naive, name) for name in ("loss", "scale", "drift_rms")} | naive.attraction
    assert statistics.keys() == expected.keys() | set(COUPLINGS[settings.coupling].statistics)
    for name, value in expected.items():
        assert statistics[name].shape == value.shape
        error = float((statistics[name] - value).norm())
        assert error < loss_tolerance * float(value.norm()) + 1e-6, name
    if naive.marginal_error is not None:
        error = statistics["marginal_error"].double()
        torch.testing.assert_close(error, naive.marginal_error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_pairs_of_settings(index):
    classes = 4 if CASES[index].classes_per_part else 3
    sizes = {"n": 5 if index % 2 else 4, "channels": 7 if index % 3 else 40}
    agree(draw(seed=index, classes=classes, **sizes), CASES[index])


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("form", ["alg2_joint", "split"])
def test_smallest_problems(coupling, form):
    """Two generated vectors of one channel, one positive, no unconditional sample."""
    unmasked = {"mask_self_neg": not COUPLINGS[coupling].transport}
    settings = FieldSettings(coupling=coupling, drift_form=form, temps=(0.05, 0.2, 1.0), **unmasked)
    agree(draw(n=2, p=1, u=0, locations=1, channels=1), settings)


def test_positives_with_a_little_of_many_samples():
    """Less than a hundredth of each sample's weight may be enough of all samples together."""
    temps = tuple(0.04 + 0.01 * i for i in range(10))
    settings = FieldSettings(coupling="row", drift_form="split", affinity_floor=0.0, temps=temps)
    agree(draw(classes=1, n=30, p=20, locations=1, channels=3), settings)
