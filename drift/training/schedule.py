"""Learning rate over steps, and the distribution of omega."""

import math

import torch

from drift.runtime.errors import one_of


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup_steps: int,
    warmup_start: float,
    schedule: str,
    final_share: float,
) -> float:
    """Learning rate of step 0, 1, ...: a line from `warmup_start` to `peak`, then constant or a half cosine.

    `schedule` is `constant` or `cosine`; the cosine ends at `final_share * peak` after the last step.
    """
    constant = one_of("schedule", schedule, "constant", "cosine") == "constant"
    if step < warmup_steps:
        return warmup_start + (peak - warmup_start) * step / warmup_steps
    if constant:
        return peak
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done)))


def draw_omega(
    count: int,
    *,
    low: float,
    high: float,
    exponent: float,
    no_guidance_fraction: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """CFG strengths `[count]`, float32: density proportional to omega^-exponent on [low, high] (paper A.8).

    Drawn by the inverse of the distribution function; exponent 1 is log-uniform. With probability
    `no_guidance_fraction` a strength is 1 instead.
    """
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    power = 1.0 - exponent
    if abs(power) < 1e-9:
        omega = low * (high / low) ** uniform
    else:
        omega = (low**power + uniform * (high**power - low**power)) ** (1.0 / power)
    unguided = torch.rand(count, generator=generator, dtype=torch.float64) < no_guidance_fraction
    return torch.where(unguided, 1.0, omega).clamp(min(low, 1.0), high).float()
