"""The learning rate and the kernel temperatures over the steps, and the distribution of omega."""

import math
from collections.abc import Sequence

import torch

from drift.runtime.errors import one_of
from drift.settings import Drift, Optimizer


def learning_rate(step: int, options: Optimizer) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up to `lr`, then constant or a half cosine.

    After the last step, the cosine has reached `lr_final * lr`.
    """
    constant = one_of("lr_schedule", options.lr_schedule, "constant", "cosine") == "constant"
    low, peak, warmup = options.warmup_start_lr, options.lr, options.warmup_steps
    if step < warmup:
        return low + (peak - low) * step / warmup
    if constant:
        return peak
    done = (step - warmup) / max(1, options.steps - warmup)
    return peak * (options.lr_final + (1 - options.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))


def temperatures(step: int, temps: Sequence[float], options: Drift) -> tuple[float, ...]:
    """The kernel temperatures of step 0, 1, ...; an experiment, off while `temps_start` is 1.

        tau_step = tau temps_start^(1 - step / (steps - 1))

    So each step multiplies all of them by the same number, and the last step has `temps` themselves.
    """
    factor = options.temps_start ** (1 - step / max(1, options.steps - 1))
    return tuple(tau * factor for tau in temps)


def draw_omega(count: int, options: Drift, generator: torch.Generator) -> torch.Tensor:
    """CFG strengths `[count]`, float32: density proportional to omega^-exponent on [min, max] (paper A.8).

    Drawn by the inverse distribution function; exponent 1 is log-uniform. With probability
    `no_guidance_fraction`, a strength is 1 instead.
    """
    low, high = options.omega_min, options.omega_max
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    power = 1.0 - options.omega_exponent
    if abs(power) < 1e-9:
        omega = low * (high / low) ** uniform
    else:
        omega = (low**power + uniform * (high**power - low**power)) ** (1.0 / power)
    unguided = torch.rand(count, generator=generator, dtype=torch.float64) < options.no_guidance_fraction
    return torch.where(unguided, 1.0, omega).clamp(min(low, 1.0), high).float()
