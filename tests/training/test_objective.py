"""The whole objective against the release's numbers, and what it asks of an encoder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import golden_config, golden_params
from oracle import naive_drifting_loss
from torch import Tensor

from drift.field import FieldSettings, drifting_loss
from drift.interop.release import convert_mae
from drift.models.mae import LatentMAE
from drift.training import objective as module
from drift.training.objective import Execution, Samples, drift_objective, step_totals

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASE = FieldSettings()
SECOND_BATCH = FieldSettings(negatives="second_batch")


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double() - expected.double()).norm() / expected.double().norm())


def golden_encoder(folder: str):
    return convert_mae(golden_params(folder), golden_config(folder)).eval().requires_grad_(False)


def golden_objective(name: str) -> dict[str, Tensor]:
    """The arrays of `<name>.npz`; latents and gradients channels-first."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return {key: a.permute(0, 1, 4, 2, 3) if a.ndim == 5 else a for key, a in golden.items()}


class Encoder:
    """A function as a feature encoder that remembers how it was called."""

    def __init__(self, function: Callable[[Tensor], dict[str, Tensor]]):
        self.function = function
        self.calls = []

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        self.calls.append((len(latents), torch.is_grad_enabled()))
        return self.function(latents)


def pixels_and_mean(latents: Tensor) -> dict[str, Tensor]:
    pixels = latents.flatten(2).transpose(1, 2)  # [B, H*W, C]
    return {"pixels": pixels.sin(), "mean": pixels.exp().mean(1, keepdim=True)}


def draw(u: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    generated, positives, unconditional = (
        torch.randn(2, count, 3, 4, 4, generator=generator) for count in (4, 5, u)
    )
    return generated.requires_grad_(), positives, unconditional, torch.tensor([1.0, 2.5])


# Where GroupNorm has one group per channel, as in layer1 of these narrow networks, the mean and the std over
# locations are constants, and so is the std of a single location. Such sets have rounding for a drift.
@pytest.mark.parametrize(
    ("example", "constant", "loss_tolerance", "grad_tolerance"),
    [
        # The release takes inner products of vectors that are not centred. In conv1_mean, they are 50 times
        # as long as they are apart, which costs the release 3e-4.
        ("", {"layer1_mean", "layer1_std"}, 5e-4, 1e-3),
        ("_pixel", {"layer1_mean", "layer1_std", "layer4_std"}, 1e-4, 1e-4),
    ],
)
def test_release_numbers(example, constant, loss_tolerance, grad_tolerance):
    golden = golden_objective(f"release_objective{example}")
    generated = golden["generated"].clone().requires_grad_()
    rest = [golden[key] for key in ("positives", "unconditional", "omega")]
    loss, statistics = drift_objective(generated, *rest, golden_encoder(f"release_mae{example}"), RELEASE)
    loss.backward()

    expected = {key.removeprefix("loss/"): a for key, a in golden.items() if key.startswith("loss/")}
    assert statistics.keys() == expected.keys()
    assert {key for key, values in statistics.items() if values["scale"] < 1.001e-3} == constant
    for key in expected.keys() - constant:
        assert relative_error(statistics[key]["loss"], expected[key]) < loss_tolerance, key
    total = loss - sum(statistics[key]["loss"] for key in constant)
    assert relative_error(total, golden["loss"] - sum(expected[key] for key in constant)) < 1e-4
    assert relative_error(generated.grad, golden["grad"]) < grad_tolerance


CONVENTIONS = {
    "release": RELEASE,
    "sinkhorn": FieldSettings.sinkhorn(coupling="sinkhorn", drift_form="split"),
    "wflow": FieldSettings.wflow(),
}


def test_a_step_by_the_conventions_of_each_code_is_that_of_the_naive_loop():
    """Three feature sets, two classes, unconditional samples, omega above 1; with -s, a table."""
    generated, positives, unconditional, _ = draw(u=3)
    omega = torch.tensor([1.5, 2.5])
    second = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    print(f"\n{'':8} {'loss':>10} {'naive':>10} {'error':>8}  {'|gradient|':>10} {'naive':>10} {'error':>8}")
    for name, settings in CONVENTIONS.items():
        samples = [generated, positives, unconditional, second]
        negatives = second if settings.negatives == "second_batch" else None
        loss, _ = drift_objective(
            *samples[:3], omega, Encoder(pixels_and_mean), settings, negatives=negatives
        )
        (grad,) = torch.autograd.grad(loss, generated)
        expected, expected_grad = naive_objective(samples, omega, settings)
        errors = relative_error(loss, expected), relative_error(grad, expected_grad)
        print(
            f"{name:8} {loss.detach():10.6f} {expected:10.6f} {errors[0]:8.0e}  "
            f"{grad.norm():10.6f} {expected_grad.norm():10.6f} {errors[1]:8.0e}"
        )
        assert max(errors) < 1e-5


def naive_objective(samples: list[Tensor], omega: Tensor, settings: FieldSettings) -> tuple[Tensor, Tensor]:
    """Value and gradient in the generated latents, in float64."""
    generated, *others = (t.detach().double() for t in samples)
    latents = [generated.requires_grad_(), *others]
    losses, grads = [], []
    for name in ("pixels", "mean", "global"):
        x, pos, uncond, second = (
            torch.stack([(pixels_and_mean(c) | {"global": c.flatten(1)[:, None]})[name] for c in t])
            for t in latents
        )
        negatives = second if settings.negatives == "second_batch" else None
        naive = naive_drifting_loss(x, pos, uncond, omega, settings, negatives)
        losses.append(naive.loss)
        grads.append(torch.autograd.grad(x, generated, naive.grad)[0])
    sets = len(losses) if settings.feature_sets == "mean" else 1
    return sum(losses) / sets, sum(grads) / sets


@pytest.mark.parametrize("unconditional", [2, 0])
@pytest.mark.parametrize(
    "settings", [RELEASE, SECOND_BATCH, FieldSettings.wflow()], ids=["release", "second", "wflow"]
)
def test_is_the_sum_or_mean_over_feature_sets_and_the_whole_latent(settings, unconditional):
    """Real samples and a second batch are encoded together and without a graph."""
    generated, *real, omega = draw(unconditional)
    second = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    negatives = second if settings.negatives == "second_batch" else None
    encoder = Encoder(pixels_and_mean)
    loss, statistics = drift_objective(generated, *real, omega, encoder, settings, negatives=negatives)
    loss.backward()
    fixed = 2 * (5 + unconditional + (3 if negatives is not None else 0))
    assert encoder.calls == [(fixed, False), (2 * 4, True)] and second.grad is None

    def sets(latents):
        return pixels_and_mean(latents) | {"global": latents.flatten(1)[:, None]}

    x, losses = generated.detach().clone().requires_grad_(), []
    for name in ("pixels", "mean", "global"):
        vectors = [torch.stack([sets(of_class)[name] for of_class in t]) for t in (x, *real, second.detach())]
        repelling = vectors.pop() if negatives is not None else (vectors.pop(), None)[1]
        part, expected = drifting_loss(*vectors, omega, settings, negatives=repelling)
        torch.testing.assert_close(statistics[name], expected)
        losses.append(part)
    total = torch.stack(losses).sum() / (3 if settings.feature_sets == "mean" else 1)
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(generated.grad, x.grad)


# In parts, and with bounded memory


def small_mae():
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "base_channels": 8, "layers": (2, 1, 1, 1), "num_classes": 4, "norm_groups": 2}
    return LatentMAE(**sizes).eval().requires_grad_(False)


def draw_classes(classes: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    generated, positives, unconditional, negatives = (
        torch.randn(classes, count, 3, 8, 8, generator=generator) for count in (4, 5, 2, 3)
    )
    return generated.requires_grad_(), positives, unconditional, 1 + torch.arange(classes) / 2, negatives


@pytest.mark.parametrize("feature_batch", [None, 3])
@pytest.mark.parametrize(
    "settings", [RELEASE, SECOND_BATCH, FieldSettings.sinkhorn()], ids=["release", "second", "sinkhorn"]
)
def test_a_step_in_parts_equals_the_whole(settings, feature_batch):
    *inputs, negatives = draw_classes()
    if settings.negatives == "self":
        negatives = None
    mae = small_mae()
    loss, statistics = drift_objective(*inputs, mae, settings, negatives=negatives)
    (grad,) = torch.autograd.grad(loss, inputs[0])

    execution = Execution(feature_batch=feature_batch)
    samples = [
        Samples(*(t[part] for t in inputs), None if negatives is None else negatives[part])
        for part in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    if settings.normalization_scope == "batch":
        execution = replace(execution, totals=step_totals(samples, mae, settings, execution))
    shares = [2 / 5, 2 / 5, 1 / 5]
    losses, gathered = zip(
        *(
            drift_objective(*part[:4], mae, settings, negatives=part.negatives, execution=execution)
            for part in samples
        ),
        strict=True,
    )
    total = sum(share * part_loss for share, part_loss in zip(shares, losses, strict=True))
    (in_parts,) = torch.autograd.grad(total, inputs[0])
    torch.testing.assert_close(total, loss)
    # Features of other batches differ by rounding, which near pairs amplify
    assert relative_error(in_parts, grad) < 1e-4
    assert losses[0] != losses[1]
    for name, expected in statistics.items():
        for key in expected:
            power = 2 if key == "drift_rms" else 1
            means = sum(s * of[name][key] ** power for s, of in zip(shares, gathered, strict=True))
            torch.testing.assert_close(means, expected[key] ** power, rtol=1e-3, atol=1e-5)


def test_the_encoder_keeps_the_activations_of_one_batch_at_a_time():
    generated, *rest, _ = draw_classes()
    encoder = Encoder(pixels_and_mean)
    loss, _ = drift_objective(generated, *rest, encoder, RELEASE, execution=Execution(feature_batch=8))
    assert encoder.calls == [(8, False)] * 4 + [(3, False)] + [(8, True)] * 2 + [(4, True)]
    encoder.calls.clear()
    loss.backward()  # computes them again, the last batch first
    assert [count for count, _ in encoder.calls] == [4, 8, 8]
    whole = generated.grad.clone()
    generated.grad = None
    drift_objective(generated, *rest, Encoder(pixels_and_mean), RELEASE)[0].backward()
    torch.testing.assert_close(whole, generated.grad)


@pytest.mark.parametrize("feature_batch", [None, 8])
def test_features_held_in_half_precision(monkeypatch, feature_batch):
    """Those of several vectors alone; the gradient is that of rounded features, near the exact one."""
    seen = {}

    def noting(x, pos, uncond, *arguments, **options):
        seen.setdefault(x.shape[2] > 1, set()).update(t.dtype for t in (x, pos, uncond))
        return drifting_loss(x, pos, uncond, *arguments, **options)

    def run(**options):
        generated, *rest, _ = draw_classes()
        drift_objective(generated, *rest, small_mae(), RELEASE, execution=Execution(**options))[0].backward()
        return generated.grad

    exact = run()
    monkeypatch.setattr(module, "drifting_loss", noting)
    held = run(feature_batch=feature_batch, feature_dtype=torch.bfloat16)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert held.dtype == torch.float32
    assert 1e-5 < relative_error(held, exact) < 0.05
