"""Exponential moving averages of a network's weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class EMA:
    """One moving average of a module's parameters and buffers, in float32 on the module's device.

    It starts at the module's present weights and has no bias correction (release). For several decays,
    make several.
    """

    def __init__(self, module: nn.Module, decay: float):
        assert 0 <= decay < 1, decay
        self.decay = decay
        weights = module.state_dict()
        assert all(tensor.is_floating_point() for tensor in weights.values()), "only floats can be averaged"
        self._average = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """average <- decay * average + (1 - decay) * weights of `module`."""
        weights = module.state_dict()
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # there is no public name
            list(self._average.values()), [weights[name].float() for name in self._average], 1 - self.decay
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the weights of `module` with the average."""
        module.load_state_dict(self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the module's own state; not a copy."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave for a module of the same shapes."""
        assert state.keys() == self._average.keys()
        for name, average in self._average.items():
            assert state[name].shape == average.shape, name
            average.copy_(state[name])


def ema_variant(decays: Sequence[float], decay: float) -> str | None:
    """The variant (see `PretrainedModel`) of one of several EMA decays: None for the first, else `ema_0999`.

    Without the dot of 0.999, because diffusers' pipelines find no variants with dots.
    """
    return None if decay == decays[0] else f"ema_{decay:g}".replace(".", "")
