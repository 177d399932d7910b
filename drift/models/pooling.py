"""Feature sets of one feature map (paper A.5), split as the release splits them."""

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH_SIZES = (2, 4)  # paper A.5 (c) and (d)
_EPS = 1e-6  # release: below the square root of every std and RMS


def locations(feature_map: Tensor) -> Tensor:
    """Every location as one vector: `[B, C, H, W]` -> `[B, H*W, C]`, row-major.

    A view; contiguous where the map lies in channels-last memory.
    """
    return feature_map.flatten(2).transpose(1, 2)


def root_mean_square(feature_map: Tensor) -> Tensor:
    """Per-channel RMS over locations: `[B, C, H, W]` -> `[B, 1, C]`."""
    return (feature_map.float().square().mean(dim=(2, 3)) + _EPS).sqrt()[:, None]


def feature_sets(name: str, feature_map: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
    """The feature sets of one map `[B, C, H, W]`, each `[B, L, C]` in float32.

    `<name>` holds the locations, `<name>_mean` and `<name>_std` the moments over the whole map,
    `<name>_mean_<p>` and `<name>_std_<p>` those over `p x p` patches, for every p of `PATCH_SIZES` that
    divides both sides. `drop_duplicates` leaves out what repeats another set whatever the values are: the
    moments of a single location, and those of a patch as large as the map.
    """
    # Channels-last, because the location vectors are contiguous there and pooling is several times faster.
    feature_map = feature_map.float().contiguous(memory_format=torch.channels_last)
    size = feature_map.shape[-2:]
    sets = {name: locations(feature_map)}
    if drop_duplicates and size == (1, 1):
        return sets

    # Moments of larger patches come from those of the smaller ones they consist of. That reads the map
    # once, and unlike mean(x^2) - mean(x)^2 it keeps its digits where a patch is nearly constant: there
    # the derivative of the std is 1/(2 sqrt(eps)) and would amplify the cancellation.
    mean, variance, pooled_by = feature_map, None, 1
    for patch in PATCH_SIZES:
        if size[0] % patch or size[1] % patch:
            break
        mean, variance = _pool_moments(mean, variance, patch // pooled_by)
        pooled_by = patch
        if not (drop_duplicates and size == (patch, patch)):
            sets[f"{name}_mean_{patch}"] = locations(mean)
            sets[f"{name}_std_{patch}"] = locations(_std(variance))
    between, mean = torch.var_mean(mean, dim=(2, 3), correction=0)  # [B, C]
    variance = between if variance is None else variance.mean(dim=(2, 3)) + between
    sets[f"{name}_mean"] = mean[:, None]
    sets[f"{name}_std"] = _std(variance)[:, None]
    return sets


def _pool_moments(mean: Tensor, variance: Tensor | None, factor: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance of `factor x factor` groups of patches, by the law of total variance."""
    pooled = F.avg_pool2d(mean, factor)
    deviation = mean - F.interpolate(pooled, scale_factor=factor, mode="nearest")
    between = F.avg_pool2d(deviation.square(), factor)
    return pooled, between if variance is None else F.avg_pool2d(variance, factor) + between


def _std(variance: Tensor) -> Tensor:
    return (variance + _EPS).sqrt()
