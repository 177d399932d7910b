import math

import pytest
import torch
from golden_weights import golden_config, golden_numbers, golden_params, relative_error
from torch import nn

from drift.interop.release import convert_mae
from drift.models.mae import LatentMAE, draw_mask
from drift.runtime.errors import UserError

FOLDERS = ["release_mae", "release_mae_pixel"]
SMALL = {"in_channels": 3, "base_channels": 8, "layers": (2, 1, 1, 1), "num_classes": 5, "norm_groups": 8}


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    """A model with the golden weights, and the golden numbers, images channels-first."""
    numbers = {name: torch.from_numpy(array) for name, array in golden_numbers(request.param).items()}
    for name in ("x", "recon", "grad_of_mean_squares"):
        numbers[name] = numbers[name].permute(0, 3, 1, 2).contiguous()
    return convert_mae(golden_params(request.param), golden_config(request.param)), numbers


def small_model(**changes):
    torch.manual_seed(0)
    return LatentMAE(**{**SMALL, **changes})


@torch.no_grad()
def test_reconstruction_and_logits_match_the_release(golden):
    model, numbers = golden
    reconstruction, logits = model.reconstruct(numbers["x"])
    assert relative_error(reconstruction, numbers["recon"]) < 1e-4
    assert relative_error(logits, numbers["logits"]) < 1e-4


@torch.no_grad()
def test_features_match_the_release(golden):
    model, numbers = golden
    sets = model.encode(numbers["x"])
    assert sets.keys() == {name.removeprefix("act/") for name in numbers if name.startswith("act/")}
    for name, value in sets.items():
        assert relative_error(value, numbers[f"act/{name}"]) < 1e-4, name
        assert value.square().mean().sqrt().item() == pytest.approx(numbers[f"rms/{name}"].item(), rel=1e-4)


def test_gradient_matches_the_release(golden):
    model, numbers = golden
    x = numbers["x"].clone().requires_grad_()
    sum(value.square().mean() for value in model.encode(x).values()).backward()
    assert relative_error(x.grad, numbers["grad_of_mean_squares"]) < 1e-4


@pytest.mark.parametrize("width", [256, 640])
def test_published_encoders_have_86_sets_with_the_global_one(width):
    with torch.device("meta"):
        model = LatentMAE(base_channels=width)
        latents = torch.empty(2, 4, 32, 32)
        assert len(model.encode(latents)) + 1 == 86
        dropped = model.encode(latents).keys() - model.encode(latents, drop_duplicates=True).keys()
    assert dropped == {"layer4_mean_4", "layer4_std_4", "layer4_blk2_mean_4", "layer4_blk2_std_4"}


@pytest.mark.parametrize(("fold", "patch"), [(1, 2), (2, 2), (2, 1)])
@torch.no_grad()
def test_masked_loss_by_loops(fold, patch):
    model = small_model(input_patch_size=fold, patch_size=patch).eval()
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    side = fold * patch
    mask = draw_mask((3, *model.mask_grid(16, 16)), 0.4, torch.Generator().manual_seed(2))
    mask[2] = False
    assert mask.shape == (3, 16 // side, 16 // side)
    found, logits = model(x, mask)

    masked = x.clone()
    for b, row, column in mask.nonzero().tolist():
        masked[b, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 0
    reconstruction, expected_logits = model.reconstruct(masked)
    torch.testing.assert_close(logits, expected_logits)
    folded = model.fold(x)
    for b in range(3):
        errors = []
        for row, column in mask[b].nonzero().tolist():
            rows, columns = (slice(i * patch, (i + 1) * patch) for i in (row, column))
            at = b, slice(None), rows, columns
            errors += (reconstruction[at] - folded[at]).square().sum(dim=0).flatten().tolist()
        expected = sum(errors) / len(errors) if errors else 0.0
        assert found[b].item() == pytest.approx(expected, rel=1e-4)


def test_training_pass_reaches_every_parameter():
    model = small_model()
    per_sample, logits = model(torch.randn(2, 3, 8, 8), torch.ones(2, 4, 4, dtype=torch.bool))
    (per_sample.mean() + logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_mask_ratio_and_generator():
    mask = draw_mask((64, 16, 16), 0.3, torch.Generator().manual_seed(0))
    spread = math.sqrt(0.3 * 0.7 / mask.numel())
    assert abs(mask.float().mean().item() - 0.3) < 4 * spread
    assert torch.equal(mask, draw_mask((64, 16, 16), 0.3, torch.Generator().manual_seed(0)))
    assert not torch.equal(mask, draw_mask((64, 16, 16), 0.3, torch.Generator().manual_seed(1)))


def test_kernels_start_lecun_normal():
    weight = small_model(base_channels=32, norm_groups=32).encoder.stages[3][0].conv2.weight  # fan-in 2304
    std = 2304**-0.5
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert weight.abs().max().item() <= 2 * std / 0.879
    kurtosis = (weight.double() / weight.double().std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(2.365, abs=0.03)  # of a normal cut at 2; uncut 3, uniform 1.8


@pytest.mark.parametrize(("base", "groups"), [(4, 32), (8, 8), (32, 32)])
def test_narrow_layers_have_one_group_per_channel(base, groups):
    model = small_model(base_channels=base, norm_groups=min(groups, base))
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == min(min(groups, base), module.num_channels)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_channels": 12, "norm_groups": 8}, "norm_groups is 8"),
        ({"base_channels": 8, "norm_groups": 32}, "norm_groups is 32"),  # a concatenation has 48 channels
        ({"layers": (3, 4, 6)}, r"layers is \(3, 4, 6\)"),
        ({"layers": (3, 4, 0, 3)}, "layers is"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_impossible_sizes_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        LatentMAE(**{**SMALL, **changes})


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="10x16 cannot be masked in squares of 4x4"):
        small_model(input_patch_size=2).mask_grid(10, 16)


@torch.no_grad()
def test_features_are_float32_under_mixed_precision():
    model = small_model(norm_groups=4).eval()
    x = torch.randn(2, 3, 8, 8)
    exact = model.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode(x)
    for name, value in mixed.items():
        assert value.dtype == torch.float32, name
        assert relative_error(value, exact[name]) < 0.05, name
