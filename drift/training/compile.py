"""torch.compile with a way back."""

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException


class Compiled(nn.Module):
    """A module or function under torch.compile, for shapes that repeat; uncompiled if that fails.

    A line on the screen then says so, and calls it `name`. The backward pass is compiled with the forward
    pass, so that it fails before anything is computed: `torch._dynamo.config.suppress_errors` would not catch
    a later failure, and would try every inner function. Compiled networks round differently.
    """

    def __init__(self, plain: Callable, name: str, *, dynamic: bool | None = False):
        super().__init__()
        self.plain, self._name = plain, name
        # Not the module itself: it would be registered twice
        function = plain.forward if isinstance(plain, nn.Module) else plain
        self._fast: Callable | None = torch.compile(function, dynamic=dynamic)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._fast is None:
            return self.plain(*args, **kwargs)
        try:
            # Set here, as the compiler's settings belong to a thread, and autograd has its own
            with (
                torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
                torch._inductor.config.patch(deterministic=torch.are_deterministic_algorithms_enabled()),
            ):
                return self._fast(*args, **kwargs)
        except TorchDynamoException as error:
            result = self.plain(*args, **kwargs)  # if this fails too, compiling was not the reason
            self._fast = None
            reason = " ".join(str(error).split())[:200] or repr(error)
            print(
                f"note: torch.compile of the {self._name} has failed ({reason}); it runs uncompiled, and "
                "slower (hardware.compile: false does so from the start)",
                flush=True,
            )
            return result
